"""Attention at the full size, where fp64 scores of everything would fill the memory: some of it.

Errors of long sequences are measured at a smaller shape (attention_shapes.checked_shape); offsets
beyond 2^31, a wrong sequence, a block left out would not show there. So a provider also has to
answer at the full size. Compared with fp64 there are

- rows of its output: the first and the last of some sequences, and some between;
- the gradients of some key heads, each in one sequence, with all their query heads: dq of every
  query, dk and dv of every key. Scores are written out for some queries at a time (a query's
  softmax and delta need its own scores alone) and dk and dv summed over the queries.

A key near the end of a long causal sequence is seen by few queries, each of which looks at
thousands of keys: its dk and dv are a thousandth of the first key's, and an error as large as they
are would vanish under a limit for the whole tensor. So gradients are compared in bands of 64
tokens, each under the rule of kernels_errors.py with the band's own largest |fp64|. Eager cannot
run at this size, but a head of it can, some queries at a time and in the case's type. Its error is
taken relative to each band's largest |fp64|, the worst band of the head counts for all: in a single
band eager is right by luck now and then, and who errs as much as eager does would be wrong there. A
difference that is exactly zero (dq of a first token) is one of rounded fp32 numbers for everyone;
the rule's fp32 floor for the largest gradient compared is therefore added.

What this does not see: other heads and sequences, and in 16 bits the very last keys of a long
sequence, whose own gradients lie below their band's limit.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_shapes import Shape
from .kernels_cases import Case, Problem, Tensors
from .kernels_errors import allowed

SEQUENCES, BETWEEN = 6, 20
BAND = 64  # tokens under one limit
SCORES_AT_ONCE = 2**24  # 128 MiB in fp64, of which a backward holds several


def spots(shape: Shape) -> list[int]:
    """Rows of the output, counted through the whole batch; always the same for a shape."""
    ends, drawn = shape.ends, random.Random(0)
    chosen = range(0, len(shape.lengths), max(1, len(shape.lengths) // SEQUENCES))
    edges = {row for n in [*chosen, len(shape.lengths) - 1] for row in (ends[n], ends[n + 1] - 1)}
    return sorted(edges | {drawn.randrange(shape.tokens) for _ in range(BETWEEN)})


def exact_rows(shape: Shape, tensors: Tensors, rows: list[int]) -> Tensor:
    """The output of these rows in fp64, `[rows Hq d]`."""
    flat = {name: _flat(x) for name, x in tensors.items()}
    groups = shape.heads // shape.kv_heads
    made = []
    for row in rows:
        n = bisect_right(shape.ends, row) - 1
        keys = slice(shape.ends[n], row + 1 if shape.causal else shape.ends[n + 1])
        k, v = (flat[name][keys].double().repeat_interleave(groups, 1) for name in ("k", "v"))
        scores = torch.einsum("hd,lhd->hl", flat["q"][row].double(), k) * shape.head_dim**-0.5
        made.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v))
    return torch.stack(made)


def error_of_rows(output: Tensor, rows: list[int], exact: Tensor) -> float:
    """max |output - exact| over these rows; infinite where one is not a number."""
    found = _flat(output)[rows].double()
    error = float((found - exact).abs().max())
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Piece:
    """A key head of one sequence, and the query heads that look at it."""

    sequence: int
    head: int
    tokens: slice  # of the whole batch
    heads: slice  # of the queries

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Its part of q or of its gradient, `[S G d]`; of k, v and theirs, `[S 1 d]`."""
        queries = name in ("q", "d q", "grad")
        heads = self.heads if queries else slice(self.head, self.head + 1)
        return _flat(tensor)[self.tokens, heads]


@dataclass(frozen=True)
class GradientSpot:
    """The fp64 gradients 'd q', 'd k', 'd v' of a piece, and the limits of each one's bands."""

    piece: Piece
    exact: Tensors
    limits: dict[str, list[float]]


def pieces(shape: Shape) -> list[Piece]:
    """The first sequence, the middle one, the longest and the last, in turn with the first and the
    last key head; the last sequence always with the last head, where offsets are largest.

    Sequences shorter than a band are passed over: among a few keys, dq and dk are small differences
    of rounded numbers, and who computes delta from the rounded output errs otherwise than eager.
    """
    last = shape.kv_heads - 1
    least = min(BAND, shape.longest)
    fit = [n for n, length in enumerate(shape.lengths) if length >= least]
    chosen = sorted({fit[0], fit[len(fit) // 2], shape.lengths.index(shape.longest), fit[-1]})
    pairs = {(n, last * (turn % 2)) for turn, n in enumerate(chosen)} | {(fit[-1], last)}
    groups, ends = shape.heads // shape.kv_heads, shape.ends
    return [
        Piece(n, head, slice(ends[n], ends[n + 1]), slice(head * groups, (head + 1) * groups))
        for n, head in sorted(pairs)
    ]


def gradients_of(shape: Shape, problem: Problem, piece: Piece, dtype: torch.dtype) -> Tensors:
    """Gradients of a piece with its scores written out in `dtype`: fp64, or eager's.

    'd q' `[S G d]`, 'd k' and 'd v' `[S 1 d]`. Of 16 bits, every part of dk and dv is rounded as
    eager rounds the whole, and the parts are summed in fp32.
    """
    named = {**problem.tensors, "grad": problem.grad}
    q, k, v, grad = (piece.of(name, named[name]).to(dtype) for name in ("q", "k", "v", "grad"))
    wide = torch.promote_types(dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    length = len(q)
    step = max(1, SCORES_AT_ONCE // length)
    for head in range(q.shape[1]):
        for start in range(0, length, step):
            stop = min(start + step, length)
            seen = stop if shape.causal else length
            inputs = q[start:stop, head], k[:seen, 0], v[:seen, 0]
            a, b, c = (x.detach().requires_grad_() for x in inputs)
            output = _written_out(a, b, c, start if shape.causal else None)
            parts = torch.autograd.grad(output, (a, b, c), grad[start:stop, head])
            dq[start:stop, head] = parts[0]
            dk[:seen, 0] += parts[1]
            dv[:seen, 0] += parts[2]
    return {"d q": dq, "d k": dk.to(dtype), "d v": dv.to(dtype)}


def _written_out(q: Tensor, k: Tensor, v: Tensor, first: int | None) -> Tensor:
    """As attention_rivals.written_out, for one head and some of its queries, `[n d]`.

    first: the first query's place among the keys when causal.
    """
    scores = q @ k.T * q.shape[-1] ** -0.5
    if first is not None:
        hidden = torch.ones(scores.shape, dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(q.dtype) @ v


def gradient_spots(case: Case, problem: Problem) -> list[GradientSpot]:
    """What gradients at the full size are compared with."""
    shape, dtype = case.attention, problem.grad.dtype
    assert shape is not None
    chosen = pieces(shape)
    exact = [gradients_of(shape, problem, piece, torch.float64) for piece in chosen]
    top = {name: max(float(x[name].abs().max()) for x in exact) for name in exact[0]}
    found = []
    for piece, truth in zip(chosen, exact, strict=True):
        eager = gradients_of(shape, problem, piece, dtype)
        limits = {}
        for name, x in truth.items():
            scales, least = _bands(x), allowed(0.0, top[name], torch.float32, case.terms)
            errors = _bands(eager[name].double() - x)
            relative = max(e / s if s else 0.0 for e, s in zip(errors, scales, strict=True))
            limits[name] = [allowed(relative * s, s, dtype, case.terms) + least for s in scales]
        found.append(GradientSpot(piece, truth, limits))
    return found


def fault_of_gradients(grads: Tensors, wanted: list[GradientSpot]) -> str | None:
    """Why gradients at the full size are wrong: the worst band; None where they are right.

    grads: 'q', 'k' and 'v' in our form.
    """
    faults = []
    for spot in wanted:
        for name, exact in spot.exact.items():
            errors = _bands(spot.piece.of(name, grads[name.removeprefix("d ")]).double() - exact)
            for band, (error, limit) in enumerate(zip(errors, spot.limits[name], strict=True)):
                if not error <= limit:
                    worst = error / limit if error == error and limit else float("inf")
                    faults.append((worst, name, error, limit, spot.piece, band))
    if not faults:
        return None
    _, name, error, limit, piece, band = max(faults, key=lambda fault: fault[0])
    return (
        f"wrong: error of {name} at this size {error:.2e}, allowed {limit:.2e} (sequence "
        f"{piece.sequence}, key head {piece.head}, from token {band * BAND})"
    )


def _bands(x: Tensor) -> list[float]:
    """max |x| of each band of tokens; of the last, longer one a remainder is part."""
    rows = x.abs().flatten(1).amax(1)  # keeps what is not a number
    count = max(1, len(rows) // BAND)
    ends = [BAND * n for n in range(1, count)]
    return torch.stack([part.amax() for part in rows.tensor_split(ends)]).tolist()


def _flat(x: Tensor) -> Tensor:
    """`[T heads d]` of a batch or a pack."""
    return x.reshape(-1, *x.shape[-2:])
