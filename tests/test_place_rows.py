"""Placing rows against the definition as a loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_hd.kernels.place_rows import (
    ROW_END,
    TEXT,
    _by_masks,
    place_rows,
    place_rows_reference,
)


def inputs(places: int, rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(-2, rows, (places,), generator=generator)
    tensors = [
        torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (places, rows, 1)
    ]
    text, visual, end = (x.requires_grad_() for x in tensors)
    return text, visual, end, source


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 1000))
def test_values_and_gradients_are_those_of_the_loop(places: int, rows: int, seed: int) -> None:
    """The public function, and the form that torch takes on a GPU."""
    text, visual, end, source = inputs(places, rows, seed)
    weight = torch.randn(places, 5, dtype=torch.float64)
    results = []
    for function in (place_rows, _by_masks, place_rows_reference):
        out = function(text, visual, end[0], source)
        gradients = torch.autograd.grad(
            (out * weight).sum(), (text, visual, end), allow_unused=True
        )
        results.append(
            (out, [torch.zeros(1, dtype=torch.float64) if g is None else g for g in gradients])
        )
    *ours, (loop, loop_gradients) = results
    for out, gradients in ours:
        assert torch.equal(out, loop)
        for a, b in zip(gradients, loop_gradients, strict=True):
            torch.testing.assert_close(a, b.expand_as(a))


def test_inputs_that_go_nowhere_receive_zeros_not_none() -> None:
    text, visual, end, _ = inputs(6, 3, 0)
    out = place_rows(text, visual, end[0], torch.full((6,), TEXT))
    out.sum().backward()
    assert visual.grad.eq(0).all() and end.grad.eq(0).all() and text.grad.eq(1).all()


def test_the_row_end_gradient_is_the_sum_over_its_places() -> None:
    text, visual, end, _ = inputs(4, 2, 1)
    out = place_rows(text, visual, end[0], torch.tensor([ROW_END, 0, ROW_END, TEXT]))
    out.sum().backward()
    assert end.grad.eq(2).all()


def test_a_wrong_source_length_is_named() -> None:
    text, visual, end, source = inputs(4, 2, 1)
    with pytest.raises(ValueError, match="source"):
        place_rows(text, visual, end[0], source[:-1])


@pytest.mark.parametrize("function", [place_rows, _by_masks])
def test_gradients_pass_gradcheck_in_fp64(function) -> None:  # type: ignore[no-untyped-def]
    text, visual, end, _ = inputs(6, 3, 2)
    source = torch.tensor([TEXT, 2, ROW_END, 0, 2, ROW_END])
    assert torch.autograd.gradcheck(
        lambda a, b, c: function(a, b, c[0], source), (text, visual, end)
    )
