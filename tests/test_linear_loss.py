"""The label-row loss against torch's cross entropy."""

import pytest
import torch

from llava_hd.kernels import linear_loss as module
from llava_hd.kernels.linear_loss import linear_loss, linear_loss_reference


def inputs(
    tokens: int, labels: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 12, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(31, 12, generator=generator, dtype=dtype).requires_grad_()
    rows = torch.randperm(tokens, generator=generator)[:labels]
    targets = torch.randint(0, 31, (labels,), generator=generator)
    return hidden, weight, rows, targets


def weights_of(labels: int) -> torch.Tensor:
    return torch.rand(labels, generator=torch.Generator().manual_seed(5)) + 0.1


@pytest.mark.parametrize("labels", [1, 5, 40])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_torchs_for_every_chunk_size(
    labels: int, chunk: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
    args = inputs(50, labels)
    weights = weights_of(labels) if weighted else None
    ours, theirs = linear_loss(*args, weights), linear_loss_reference(*args, weights)
    torch.testing.assert_close(ours, theirs)
    our_gradients = torch.autograd.grad(3 * ours, args[:2])
    their_gradients = torch.autograd.grad(3 * theirs, args[:2])
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_pass_gradcheck_in_fp64() -> None:
    hidden, weight, rows, targets = inputs(6, 4)
    for weights in (None, weights_of(4)):
        assert torch.autograd.gradcheck(
            lambda h, w, f=weights: linear_loss(h, w, rows, targets, f), (hidden, weight)
        )


def test_a_weight_counts_a_row_so_many_times() -> None:
    hidden, weight, rows, targets = inputs(50, 4)
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0])
    repeated = torch.tensor([0, 1, 1, 1, 3, 3])
    torch.testing.assert_close(
        linear_loss(hidden, weight, rows, targets, weights),
        linear_loss(hidden, weight, rows[repeated], targets[repeated]),
    )


def test_weights_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4,\) rows, \(4,\) targets, \(3,\) weights"):
        linear_loss(*inputs(6, 4), weights_of(3))


def test_no_label_gives_zero_loss_and_zero_gradients() -> None:
    hidden, weight, rows, targets = inputs(6, 0)
    loss = linear_loss(hidden, weight, rows, targets, torch.ones(0))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, rows, targets = inputs(6, 3)
    loss = linear_loss(hidden, weight.detach(), rows, targets)
    assert loss.grad_fn.saved_tensors[1] is None  # nothing of the head's size is made
    loss.backward()
    assert hidden.grad.abs().sum() > 0


def test_the_sum_is_fp32_for_narrow_inputs() -> None:
    hidden, weight, rows, targets = inputs(64, 64, torch.bfloat16)
    assert linear_loss(hidden, weight, rows, targets).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_err_at_most_twice_as_much_as_torch(dtype: torch.dtype) -> None:
    hidden, weight, rows, targets = inputs(200, 150, dtype)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    results = []
    for function, pair in (
        (linear_loss, (hidden, weight)),
        (linear_loss_reference, (hidden, weight)),
        (linear_loss_reference, wide),
    ):
        loss = function(*pair, rows, targets)
        results.append([loss, *torch.autograd.grad(loss, pair)])
    for ours, plain, truth in zip(*results, strict=True):
        error = (ours.double() - truth).abs().max()
        assert error <= 2 * (plain.double() - truth).abs().max() + 1e-6


def test_a_loss_scale_of_two_to_the_sixteen_stays_finite_in_fp16() -> None:
    hidden, weight, rows, targets = inputs(20, 8, torch.float16)
    (2.0**16 * 1e-4 * linear_loss(hidden * 1e-2, weight, rows, targets)).backward()
    scaled = torch.autograd.grad(
        2.0**16 * linear_loss(hidden * 1e-2, weight * 1e-2, rows, targets), hidden
    )[0]
    assert torch.isfinite(scaled).all() and scaled.abs().sum() > 0
