"""Projecting straight into the packed sequence, interpreted on the CPU, against torch and fp64."""

import kernel_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_as_exact_as_torch, small_table
from torch import Tensor

from llava_hd.kernels import backend
from llava_hd.kernels.backend import SWITCH
from llava_hd.kernels.gelu_mlp import gelu_mlp_torch
from llava_hd.kernels.place_rows import place_rows, place_rows_torch
from llava_hd.kernels.project_rows import (
    project_rows,
    project_rows_reference,
    project_rows_triton,
)

VISION, HIDDEN, LANGUAGE = 24, 40, 36


def inputs(features: int, places: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """x, w1, b1, w2, b2, text, row_end."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (features, VISION), (HIDDEN, VISION), (HIDDEN,), (LANGUAGE, HIDDEN), (LANGUAGE,),
        (places, LANGUAGE), (LANGUAGE,),
    ]  # fmt: skip
    scales = [1, VISION**-0.5, 1, HIDDEN**-0.5, 1, 1, 1]
    return [
        (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def composed(x, w1, b1, w2, b2, text, row_end, source, rows=None) -> Tensor:  # type: ignore[no-untyped-def]
    return place_rows_torch(text, gelu_mlp_torch(x, w1, b1, w2, b2, rows), row_end, source)


@settings(max_examples=30)
@given(
    st.integers(1, 80),
    st.integers(1, 50),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_values_and_gradients_of_any_table_of_places(
    places: int, kept: int, dtype: torch.dtype, tma: bool, seed: int
) -> None:
    """Rows placed nowhere, once or often; row-ends and text anywhere; all from poisoned memory."""
    args = inputs(60, places, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(60, generator=generator)[:kept]
    source = torch.randint(-2, kept, (places,), generator=generator)
    dout = torch.randn(places, LANGUAGE, generator=generator).to(dtype)
    with kernel_checks.poisoned_memory():
        ours = project_rows_triton(*args, source, rows, table=small_table(tma=tma))
        ours_grads = torch.autograd.grad(ours, args, dout)
    torchs = composed(*args, source, rows)
    torchs_grads = torch.autograd.grad(torchs, args, dout)
    wide = [x.detach().double().requires_grad_() for x in args]
    exact = project_rows_reference(*wide, source, rows)
    exact_grads = torch.autograd.grad(exact, wide, dout.double(), allow_unused=True)
    assert_as_exact_as_torch(ours, torchs, exact)
    for mine, theirs, true in zip(ours_grads, torchs_grads, exact_grads, strict=True):
        zeros = torch.zeros_like(mine, dtype=torch.float64)
        assert_as_exact_as_torch(mine, theirs, zeros if true is None else true)


def test_text_stays_what_it_was_and_undefined_rows_stay_out() -> None:
    args = inputs(8, 6, torch.float32, 0)
    args[0].data[[0, 5]] = float("nan")
    args[5].data[[1, 2, 4]] = float("nan")  # the places of rows and of a row-end
    source = torch.tensor([-1, 0, 1, -1, -2, -1])
    out = project_rows_triton(*args, source, torch.tensor([3, 7]), table=small_table())
    assert out.isfinite().all()
    assert torch.equal(out[[0, 3, 5]], args[5][[0, 3, 5]])


def test_recompute_keeps_the_graph_usable_and_strides_do_not_matter() -> None:
    args = inputs(9, 5, torch.float32, 1)
    source = torch.tensor([[-1, 0], [0, 0], [1, 0], [-2, 0], [2, 0]])[:, 0]
    rows = torch.tensor([[7, 0], [0, 0], [3, 0]])[:, 0]
    dout = torch.randn(5, LANGUAGE)
    table = small_table()
    out = project_rows_triton(*args, source, rows, table=table, recompute=True)
    torchs = torch.autograd.grad(composed(*args, source, rows), args, dout)
    for _ in range(2):
        ours = torch.autograd.grad(out, args, dout, retain_graph=True)
        for mine, theirs in zip(ours, torchs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    once = project_rows_triton(*args, source, rows, table=table)
    torch.autograd.grad(once, args, dout, retain_graph=True)
    with pytest.raises(RuntimeError, match="project_rows with recompute=True"):
        torch.autograd.grad(once, args, dout)


def test_nothing_to_place_or_to_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "triton")
    backend._table_for.cache_clear()
    args = inputs(3, 0, torch.float32, 0)
    assert project_rows(*args, torch.empty(0, dtype=torch.int64)).shape == (0, LANGUAGE)
    args = inputs(0, 2, torch.float32, 0)
    out = project_rows(*args, torch.tensor([-1, -2]))
    assert torch.equal(out, torch.stack([args[5][0], args[6]]))
    assert torch.autograd.grad(out.sum(), args)[0].shape == (0, VISION)
    assert place_rows(args[5][:0], args[5][:1], None, args[0].new_empty(0).long()).shape[0] == 0


def test_only_the_gradients_that_are_asked_for() -> None:
    source = torch.tensor([-1, 0, 1, -2, 2])
    for asked in ((6,), (5,), (1, 2, 3, 4), (1, 2, 3, 4, 6)):
        args = inputs(3, 5, torch.float32, 1)
        for i, tensor in enumerate(args):
            tensor.requires_grad_(i in asked)
        chosen = [args[i] for i in asked]
        dout = torch.randn(5, LANGUAGE)
        ours = torch.autograd.grad(
            project_rows_triton(*args, source, table=small_table()), chosen, dout
        )
        for mine, theirs in zip(
            ours, torch.autograd.grad(composed(*args, source), chosen, dout), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_types_and_shapes_that_differ_are_named() -> None:
    args = inputs(3, 5, torch.float32, 1)
    source = torch.tensor([-1, 0, 1, -2, 2])
    with pytest.raises(ValueError, match="float16"):
        project_rows_triton(*args[:5], args[5].half(), args[6], source, table=small_table())
    with pytest.raises(ValueError, match=r"source \(4,\)"):
        project_rows_triton(*args, source[:4], table=small_table())
