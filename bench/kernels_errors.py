"""Errors against fp64, and the rule by which a provider is wrong.

Every provider's output and gradients are compared with the same operation in fp64 on the same
(rounded) inputs. For each of these tensors, error = max |provider - fp64|. The rule:

    wrong if  error > 2 * eager's error + floor
    floor = eps / 4 * max |fp64|             bf16 (eps 2^-7), fp16 (2^-10)
    floor = eps * sqrt(n) * max |fp64|       fp32 (2^-23), n as in Case.terms

The 16-bit floor is a quarter of the spacing at the largest value; it is there because eager's own
error is zero where an operation only copies, and small by luck where the result is one number (the
loss). In fp32 the order of a sum is the whole error: eager adds in pairs, a loop adds one after the
other, and n roundings of a random walk are sqrt(n) of one. Both are right; a product in fewer bits
(TF32, bf16) is a thousand times further off. NaN and infinity are wrong. A provider that is wrong
gets no time. Of attention that is too large to be compared as a whole, attention_spots.py compares
rows of the output and the gradients of some heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..kernels.flash_attention import flash_attention_reference
from ..kernels.gelu_mlp import gelu_mlp_reference
from ..kernels.linear_loss import linear_loss_reference
from .kernels_cases import Case, Problem, Tensors
from .kernels_providers import EAGER, Call, Provider, eager_place, mlp_weights

OUTPUT = "output"
ANSWER = "output without graph"  # another path may run where nothing is kept for a backward


@dataclass(frozen=True)
class Errors:
    """max |provider - fp64| of the output and of each gradient ('d w1'), and max |fp64| of each."""

    largest: dict[str, float]
    scale: dict[str, float]

    @property
    def output(self) -> float:
        """Error of the output, with and without a graph."""
        return max(self.largest[OUTPUT], self.largest[ANSWER])

    @property
    def gradients(self) -> float:
        """Largest error of any gradient."""
        return max(value for name, value in self.largest.items() if name.startswith("d "))


def _exact_project_place(t: Tensors, tables: Tensors) -> Tensor:
    rows = gelu_mlp_reference(t["x"], *mlp_weights(t), rows=tables["rows"])
    return eager_place(rows, t, tables)


def _exact_attention(t: Tensors, tables: Tensors, causal: bool, packed: bool = False) -> Tensor:
    ends = tables["cu_seqlens"] if packed else None
    return flash_attention_reference(t["q"], t["k"], t["v"], cu_seqlens=ends, causal=causal)


# The definitions of kernels/. Placing is eager's: place_rows_reference is a loop whose backward
# takes quadratic time; the tests hold both equal.
EXACT: dict[str, Call] = {
    "gelu_mlp": lambda t, tables: gelu_mlp_reference(t["x"], *mlp_weights(t)),
    "place_rows": EAGER["place_rows"],
    "project_place": _exact_project_place,
    "linear_loss": lambda t, tables: linear_loss_reference(
        t["hidden"], t["weight"], tables["label_rows"], tables["targets"]
    ),
    "attention_dense": partial(_exact_attention, causal=True),
    "attention_packed": partial(_exact_attention, causal=True, packed=True),
    "attention_tower": partial(_exact_attention, causal=False),
}


def leaves(tensors: Tensors, learned: tuple[str, ...]) -> Tensors:
    """The tensors as leaves of a new graph; those that are learned ask for a gradient."""
    return {name: t.detach().requires_grad_(name in learned) for name, t in tensors.items()}


def exact_results(case: Case, problem: Problem) -> Tensors:
    """Output and gradients in fp64."""
    wide = {name: tensor.double() for name, tensor in problem.tensors.items()}
    inputs = leaves(wide, problem.learned)
    output = EXACT[case.op](inputs, problem.tables)
    learned = [inputs[name] for name in problem.learned]
    grads = torch.autograd.grad(output, learned, problem.grad.to(output.dtype))
    truth = output.detach()
    return {OUTPUT: truth, ANSWER: truth, **_named(problem.learned, grads)}


def results_of(provider: Provider, problem: Problem) -> Tensors:
    """Output and gradients of a provider, in our form."""
    form = provider.form
    inputs = leaves(form.prepare(problem.tensors, problem.tables), problem.learned)
    output = provider.run(inputs, problem.tables)
    grad = form.grad_of(problem.grad).to(output.dtype)
    grads = torch.autograd.grad(output, [inputs[name] for name in problem.learned], grad)
    own = dict(zip(problem.learned, grads, strict=True))
    ours = form.grads_of(own, problem.tables)
    with torch.no_grad():
        answer = form.packed(provider.run(leaves(inputs, ()), problem.tables))
    named = _named(problem.learned, [ours[name] for name in problem.learned])
    return {OUTPUT: form.packed(output.detach()), ANSWER: answer, **named}


def _named(names: tuple[str, ...], grads: tuple[Tensor, ...] | list[Tensor]) -> Tensors:
    return {f"d {name}": grad for name, grad in zip(names, grads, strict=True)}


def errors_against(found: Tensors, exact: Tensors) -> Errors:
    """Errors of every tensor; infinite where shapes differ or a value is not a number."""
    largest, scale = {}, {}
    for name, truth in exact.items():
        mine = found[name]
        error = math.inf
        if mine.shape == truth.shape:
            error = float((mine.double() - truth).abs().max()) if truth.numel() else 0.0
        largest[name] = error if math.isfinite(error) else math.inf
        scale[name] = float(truth.abs().max()) if truth.numel() else 0.0
    return Errors(largest, scale)


def allowed(eager_error: float, scale: float, dtype: torch.dtype, n: int) -> float:
    """The largest error that is not wrong (the rule above)."""
    steps = n**0.5 if dtype.itemsize > 2 else 0.25
    return 2 * eager_error + torch.finfo(dtype).eps * steps * scale


def fault(errors: Errors, eager: Errors, dtype: torch.dtype, n: int) -> str | None:
    """Why a provider is wrong: its worst tensor; None where it is right."""
    faults = []
    for name, error in errors.largest.items():
        limit = allowed(eager.largest[name], eager.scale[name], dtype, n)
        if not error <= limit:
            faults.append((error / limit if limit else math.inf, name, error, limit))
    if not faults:
        return None
    _, name, error, limit = max(faults)
    return f"wrong: error of {name} {error:.2e}, allowed {limit:.2e}"


def against_eager(errors: Errors, eager: Errors) -> float | None:
    """The largest ratio error / eager's error among tensors where eager errs at all."""
    ratios = [e / eager.largest[n] for n, e in errors.largest.items() if eager.largest[n] > 0]
    return max(ratios) if ratios else None
