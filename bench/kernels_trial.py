"""One case of the kernels' benchmark: everyone's answer is checked, then the right ones are timed.

`forward` runs without a graph, as answering does; `backward` and `both` come from the same calls,
with the clock read between the two steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .attention_spots import (
    error_of_rows,
    exact_rows,
    fault_of_gradients,
    gradient_spots,
    spots,
)
from .kernels_cases import Case, Problem, Tensors, make_problem
from .kernels_errors import (
    OUTPUT,
    Errors,
    against_eager,
    allowed,
    errors_against,
    exact_results,
    fault,
    leaves,
    results_of,
)
from .kernels_options import DTYPES
from .kernels_providers import Provider
from .kernels_rows import Row, blank_row, figures
from .measure import Roofline, Steps, Times, peak_bytes, saved_bytes, short_error, time_interleaved

SHORT = {getattr(torch, long): short for short, long in DTYPES.items()}
BUDGET_S = {"cuda": 1.5, "cpu": 0.6}  # of timing, for each case and kind of call


def try_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    asked: list[Provider],
    roof: Roofline,
    seed: int,
    checkers: list[Provider] | None = None,
) -> tuple[list[Row], dict[str, list[str]]]:
    """All rows of a case, and the names of the CUDA kernels by provider.

    Who is right is timed; the others' rows say why not. checkers: the same providers for
    `case.checked`, where errors are measured at another size.
    """
    name = SHORT[dtype]
    try:
        checked = make_problem(case.checked, dtype, device, seed)
        errors, reasons = _check(checkers or asked, case.checked, checked, dtype)
        known = {p.name: p.reason or p.untimed for p in asked if p.call is None or p.untimed}
        reasons = known | reasons
        problem = checked
        if case.checked != case:
            del checked
            problem = make_problem(case, dtype, device, seed)
            reasons |= _at_full_size(asked, case, problem, errors, reasons)
        right = [p for p in asked if p.name not in reasons]
        measured = _measure(right, problem, device)
    except torch.OutOfMemoryError:
        why = {p.name: p.reason or "not timed: out of memory at this shape" for p in asked}
        return _blank(asked, case, name, why), {}
    rows = [
        _filled(row, case, dtype.itemsize, measured, roof, errors)
        for row in _blank(asked, case, name, reasons)
    ]
    return rows, measured.kernels


def _blank(asked: list[Provider], case: Case, dtype: str, reasons: dict[str, str]) -> list[Row]:
    """A row for each provider and mode; a single one where there is no such operation."""
    return [
        blank_row(case, dtype, p.name, mode, p.path, reasons.get(p.name, ""), p.setup_ms)
        for p in asked
        for mode in (case.modes if p.call is not None else case.modes[-1:])
    ]


@dataclass(frozen=True)
class Measured:
    """By (kind of call, provider): times, peak bytes; by provider: saved bytes, CUDA kernels."""

    times: dict[tuple[str, str], Times]
    peaks: dict[tuple[str, str], int | None]
    saved: dict[str, int]
    kernels: dict[str, list[str]]


def _measure(providers: list[Provider], problem: Problem, device: torch.device) -> Measured:
    found = Measured({}, {}, {p.name: _saved(p, problem, device) for p in providers}, {})
    for kind, make in (("forward", _forward_steps), ("training", _training_steps)):
        calls = {p.name: make(p, problem) for p in providers}
        for name, steps in calls.items():
            found.peaks[kind, name] = peak_bytes(partial(_run, steps), device)
            if device.type == "cuda" and kind == "training":
                found.kernels[name] = kernel_names(steps)
        if calls:
            timed = time_interleaved(calls, device, BUDGET_S[device.type])
            found.times.update({(kind, name): times for name, times in timed.items()})
    return found


def _check(
    asked: list[Provider], case: Case, problem: Problem, dtype: torch.dtype
) -> tuple[dict[str, Errors], dict[str, str]]:
    """Errors of every provider that runs, and the reasons of those that get no time."""
    errors: dict[str, Errors] = {}
    reasons = {p.name: p.reason for p in asked if p.call is None}
    exact = exact_results(case, problem)
    for provider in asked:
        if provider.call is None:
            continue
        try:
            errors[provider.name] = errors_against(results_of(provider, problem), exact)
        except Exception as error:  # a rival may fail in any way; its row says which
            reasons[provider.name] = f"does not run here: {short_error(error)}"
    for provider in asked:
        if provider.name not in errors:
            continue
        if "eager" not in errors:
            reasons[provider.name] = "not checked: eager, the yardstick of errors, does not run"
        elif (why := fault(errors[provider.name], errors["eager"], dtype, case.terms)) is not None:
            reasons[provider.name] = why
    return errors, reasons


def _at_full_size(
    asked: list[Provider],
    case: Case,
    problem: Problem,
    errors: dict[str, Errors],
    reasons: dict[str, str],
) -> dict[str, str]:
    """Reasons of those who are right at the smaller size and not at this one."""
    assert case.attention is not None
    if "eager" not in errors:
        return {}
    rows = spots(case.attention)
    exact = exact_rows(case.attention, problem.tensors, rows)
    exact_grads = gradient_spots(case, problem)
    dtype, eager = problem.grad.dtype, errors["eager"]
    limit = allowed(eager.output, eager.scale[OUTPUT], dtype, case.terms)
    found: dict[str, str] = {}
    for provider in asked:
        if provider.name in reasons:
            continue
        try:
            answer = _run(_forward_steps(provider, problem))
            error = error_of_rows(provider.form.packed(answer), rows, exact)
            grads = _gradients(provider, problem)
            finite = all(bool(x.isfinite().all()) for x in grads.values())
            why = fault_of_gradients(grads, exact_grads)
            del answer, grads
        except Exception as failure:  # a rival may fail in any way; its row says which
            found[provider.name] = f"does not run here: {short_error(failure)}"
            continue
        if not error <= limit:
            found[provider.name] = (
                f"wrong: error of output rows at this size {error:.2e}, allowed {limit:.2e}"
            )
        elif not finite:
            found[provider.name] = "wrong: a gradient at this size is not finite"
        elif why is not None:
            found[provider.name] = why
    return found


def _gradients(provider: Provider, problem: Problem) -> Tensors:
    """A provider's gradients in our form."""
    own = dict(zip(problem.learned, _run(_training_steps(provider, problem)), strict=True))
    return provider.form.grads_of(own, problem.tables)


def _forward_steps(provider: Provider, problem: Problem) -> Steps:
    tensors = leaves(provider.form.prepare(problem.tensors, problem.tables), ())

    def step(_: Any) -> Any:
        with torch.no_grad():
            return provider.run(tensors, problem.tables)

    return (step,)


def _training_steps(provider: Provider, problem: Problem) -> Steps:
    tensors = leaves(provider.form.prepare(problem.tensors, problem.tables), problem.learned)
    learned = [tensors[name] for name in problem.learned]
    grad = provider.form.grad_of(problem.grad)
    return (
        lambda _: provider.run(tensors, problem.tables),
        lambda output: torch.autograd.grad(output, learned, grad),
    )


def _run(steps: Steps) -> Any:
    value = None
    for step in steps:
        value = step(value)
    return value


def _saved(provider: Provider, problem: Problem, device: torch.device) -> int:
    tensors = leaves(provider.form.prepare(problem.tensors, problem.tables), problem.learned)
    inputs = [*tensors.values(), *problem.tables.values()]
    return saved_bytes(lambda: provider.run(tensors, problem.tables), inputs, device)


def kernel_names(steps: Steps) -> list[str]:
    """Names of the CUDA kernels that one call launches, sorted."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        _run(steps)
        torch.cuda.synchronize()
    on_cuda = torch.autograd.DeviceType.CUDA
    return sorted({event.name for event in seen.events() if event.device_type == on_cuda})


def _filled(
    row: Row,
    case: Case,
    itemsize: int,
    measured: Measured,
    roof: Roofline,
    errors: dict[str, Errors],
) -> Row:
    """The row with all that is known; a wrong provider has errors and no time."""
    kind = "forward" if row.mode == "forward" else "training"
    known: dict[str, Any] = {}
    if row.provider in errors:
        found = errors[row.provider]
        ratio = against_eager(found, errors["eager"]) if "eager" in errors else None
        known["error_output"] = _finite(found.output)
        known["error_gradients"] = _finite(found.gradients)
        known["error_vs_eager"] = None if ratio is None else _finite(ratio)
    if (kind, row.provider) in measured.times:
        known |= figures(case, row.mode, itemsize, measured.times[kind, row.provider], roof)
        peak = measured.peaks[kind, row.provider]
        known["peak_mib"] = None if peak is None else round(peak / 2**20, 3)
        known["saved_mib"] = round(measured.saved[row.provider] / 2**20, 3)
    return replace(row, **known)


def _finite(value: float) -> float | None:
    """None for infinity, which JSON does not know; the row's reason tells the rest."""
    return float(f"{value:.3g}") if value < float("inf") else None
