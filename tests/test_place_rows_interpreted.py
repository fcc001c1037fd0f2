"""The Triton kernels that place rows, interpreted on the CPU, against the loop and fp64."""

import kernel_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_as_exact_as_torch, small_table
from torch import Tensor

from llava_hd.kernels.place_rows import (
    ROW_END,
    TEXT,
    place_rows_reference,
    place_rows_torch,
    place_rows_triton,
)


def inputs(places: int, rows: int, width: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(places, width), (rows, width), (width,)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def check(args: list[Tensor], source: Tensor, dout: Tensor) -> None:
    with kernel_checks.poisoned_memory():
        ours = place_rows_triton(*args, source, table=small_table())
        ours_grads = torch.autograd.grad(ours, args, dout)
    assert torch.equal(ours, place_rows_reference(*args, source))
    wide = [x.detach().double().requires_grad_() for x in args]
    exact = place_rows_torch(*wide, source)
    exact_grads = torch.autograd.grad(exact, wide, dout.double())
    torchs_grads = torch.autograd.grad(place_rows_torch(*args, source), args, dout)
    for mine, theirs, true in zip(ours_grads, torchs_grads, exact_grads, strict=True):
        assert_as_exact_as_torch(mine, theirs, true)


@settings(max_examples=40)
@given(
    st.integers(1, 60),
    st.integers(1, 30),
    st.sampled_from([1, 5, 64, 65, 130]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 1000),
)
def test_any_table_of_places(
    places: int, rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    """Rows placed nowhere, once or often; row-ends and text anywhere."""
    args = inputs(places, rows, width, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(-2, rows, (places,), generator=generator)
    check(args, source, torch.randn(places, width, generator=generator).to(dtype))


def map_source(height: int, width: int, before: int, after: int) -> Tensor:
    """A map with its row-ends between text, as the packer makes it."""
    numbers = torch.arange(height * width).reshape(height, width)
    ends = torch.full((height, 1), ROW_END)
    text = [torch.full((n,), TEXT) for n in (before, after)]
    return torch.cat([text[0], torch.cat([numbers, ends], 1).flatten(), text[1]])


def test_a_map_of_577_rows_between_text() -> None:
    source = map_source(577, 1, 5, 3)
    args = inputs(len(source), 577, 96, torch.float32, 0)
    check(args, source, torch.randn(len(source), 96))


@pytest.mark.parametrize("kind", ["expanded", "strided", "cat"])
def test_gradients_of_any_layout(kind: str) -> None:
    source = map_source(6, 5, 4, 4)
    args = inputs(len(source), 30, 70, torch.float32, 1)
    shape = (len(source), 70)
    dout = {
        "expanded": torch.tensor(0.3).expand(shape),
        "strided": torch.randn(shape[1], shape[0]).T,
        "cat": torch.cat([torch.randn(2, 70), torch.randn(shape)])[2:],
    }[kind]
    check(args, source, dout)


def test_inputs_of_any_layout() -> None:
    source = map_source(4, 4, 3, 3)
    text = torch.randn(70, len(source)).T.requires_grad_()
    rows = torch.randn(16, 75)[:, 2:-3].requires_grad_()
    end = torch.randn(140)[::2].requires_grad_()
    check([text, rows, end], source, torch.randn(len(source), 70))


def test_places_of_any_stride() -> None:
    source = torch.stack([map_source(4, 4, 3, 3)] * 2, 1)[:, 0]
    assert source.stride() == (2,)
    check(inputs(len(source), 16, 40, torch.float32, 2), source, torch.randn(len(source), 40))


def test_without_row_ends_and_with_rows_of_another_type() -> None:
    source = torch.tensor([TEXT, 0, 2, TEXT])
    text, rows = torch.randn(4, 9).half(), torch.randn(3, 9)
    out = place_rows_triton(text, rows, None, source, table=small_table())
    assert out.dtype == torch.float16
    assert torch.equal(out, place_rows_torch(text, rows, None, source))


def test_rows_that_are_placed_nowhere_do_not_matter_and_get_zeros() -> None:
    source = torch.tensor([TEXT, 1, ROW_END])
    args = inputs(3, 3, 8, torch.float32, 3)
    args[1].data[[0, 2]] = float("nan")
    args[0].data[1:] = float("nan")
    out = place_rows_triton(*args, source, table=small_table())
    grads = torch.autograd.grad(out, args, torch.ones_like(out))
    assert out.isfinite().all()
    assert grads[1].tolist() == [[0.0] * 8, [1.0] * 8, [0.0] * 8]
    assert grads[0].tolist() == [[1.0] * 8, [0.0] * 8, [0.0] * 8]
    assert grads[2].tolist() == [1.0] * 8
