"""The projector's Triton kernels, interpreted on the CPU, against torch and fp64.

bf16 is not tested here: the interpreter computes it wrongly without an error. A GPU compares it
with fp64 in `llava-hd bench kernels`.
"""

import kernel_checks
import numpy as np
import pytest
import scipy.special
import torch
import triton
import triton.language as tl
from kernel_checks import assert_as_exact_as_torch, small_table
from torch import Tensor

from llava_hd.kernels import backend
from llava_hd.kernels.backend import PRODUCTS, SWITCH
from llava_hd.kernels.gelu_mlp import (
    gelu_mlp,
    gelu_mlp_reference,
    gelu_mlp_torch,
    gelu_mlp_triton,
)
from llava_hd.kernels.products import _normal

WIDTHS = (40, 72, 48)  # vision, hidden, language
ODD = (37, 51, 29)


def inputs(rows: int, widths: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, w1, b1, w2, b2 with values whose products stay of order one."""
    torch.manual_seed(rows + widths[0])
    d, f, h = widths
    shapes = [(rows, d), (f, d), (f,), (h, f), (h,)]
    tensors = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    tensors[0] = torch.randn(rows, d)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def check(args, rows, table, grad) -> None:  # type: ignore[no-untyped-def]
    """Values and every gradient, from poisoned memory; grad: from the output to its gradient."""
    wide = [x.detach().double().requires_grad_() for x in args]
    with kernel_checks.poisoned_memory():
        ours = gelu_mlp_triton(*args, rows, table=table)
        dy = grad(ours)
        ours_grads = torch.autograd.grad(ours, args, dy)
    torchs = gelu_mlp_torch(*args, rows)
    exact = gelu_mlp_reference(*wide, rows)
    assert_as_exact_as_torch(ours, torchs, exact)
    torchs_grads = torch.autograd.grad(torchs, args, dy)
    exact_grads = torch.autograd.grad(exact, wide, dy.double())
    for mine, theirs, true in zip(ours_grads, torchs_grads, exact_grads, strict=True):
        assert_as_exact_as_torch(mine, theirs, true)


def random_grad(out: Tensor) -> Tensor:
    return torch.randn(out.shape, dtype=out.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 63, 257, 577, 1000])
def test_values_and_gradients_at_many_sizes(count: int, dtype: torch.dtype) -> None:
    widths = ODD if count % 2 else WIDTHS
    check(inputs(count, widths, dtype), None, small_table(), random_grad)


def test_no_rows_give_no_rows_and_zero_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "triton")
    backend._table_for.cache_clear()
    for rows in (None, torch.empty(0, dtype=torch.int64)):
        args = inputs(0 if rows is None else 5, WIDTHS, torch.float32)
        out = gelu_mlp(*args, rows)
        assert out.shape == (0, WIDTHS[2])
        grads = torch.autograd.grad(out.sum(), args)
        assert all(grad.eq(0).all() for grad in grads)


def test_the_public_function_takes_the_kernels_when_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SWITCH, "triton")
    backend._table_for.cache_clear()
    args = inputs(3, WIDTHS, torch.float32)
    out = gelu_mlp(*args)
    assert type(out.grad_fn).__name__ == "_GeluMLPBackward"
    torch.testing.assert_close(out, gelu_mlp_torch(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("widths", [WIDTHS, ODD])
def test_rows_are_gathered_while_they_are_read(
    widths: tuple[int, int, int], tma: bool, dtype: torch.dtype
) -> None:
    args = inputs(150, widths, dtype)
    rows = torch.randperm(150)[:97]
    rows[5] = rows[6]  # a row may be named twice
    check(args, rows, small_table(tma=tma), random_grad)


@pytest.mark.parametrize("ours", [(), *((name,) for name in PRODUCTS)])
def test_every_mixture_of_our_products_and_the_librarys(ours: tuple[str, ...]) -> None:
    args = inputs(70, WIDTHS, torch.float32)
    check(args, torch.randperm(70)[:50], small_table(used=ours), random_grad)


def strided(out: Tensor) -> Tensor:
    return torch.randn(out.shape[1], out.shape[0], dtype=out.dtype).T


def expanded(out: Tensor) -> Tensor:
    return torch.tensor(0.7, dtype=out.dtype).expand(out.shape)


def slice_of_a_cat(out: Tensor) -> Tensor:
    other = torch.randn(3, out.shape[1], dtype=out.dtype)
    return torch.cat([other, torch.randn(out.shape, dtype=out.dtype)])[3:]


def columns_of_a_wider(out: Tensor) -> Tensor:
    return torch.randn(out.shape[0], out.shape[1] + 5, dtype=out.dtype)[:, 2:-3]


@pytest.mark.parametrize("grad", [strided, expanded, slice_of_a_cat, columns_of_a_wider])
def test_gradients_of_any_layout(grad) -> None:  # type: ignore[no-untyped-def]
    for tma in (False, True):
        check(inputs(66, WIDTHS, torch.float32), None, small_table(tma=tma), grad)


def test_inputs_of_any_layout() -> None:
    d, f, h = WIDTHS
    _, _, b1, _, b2 = inputs(50, WIDTHS, torch.float32)
    x = torch.randn(50, d + 7)[:, 3:-4].requires_grad_()  # like features without their CLS
    w1, w2 = torch.randn(d, f).T.requires_grad_(), torch.randn(h, 2 * f)[:, ::2].requires_grad_()
    check([x, w1, b1, w2, b2], None, small_table(), random_grad)


def test_vectors_of_any_stride() -> None:
    args = inputs(50, WIDTHS, torch.float32)
    args[2] = torch.randn(WIDTHS[1], 2)[:, 0].requires_grad_()
    args[4] = torch.tensor(0.5).expand(WIDTHS[2]).requires_grad_()
    rows = torch.randint(50, (30, 3))[:, 1]
    for tma in (False, True):
        check(args, rows, small_table(tma=tma), random_grad)


def test_rows_that_nobody_names_do_not_matter() -> None:
    args = inputs(40, WIDTHS, torch.float32)
    args[0].data[[0, 3, 39]] = float("nan")  # row 0 is what masked-out rows read
    rows = torch.tensor([1, 2, 38, 5, 6])
    out = gelu_mlp_triton(*args, rows, table=small_table())
    grads = torch.autograd.grad(out, args, torch.ones_like(out))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    assert grads[0][[0, 3, 39]].eq(0).all()


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (3,), (4,), (1, 2), (3, 4), (1, 2, 3, 4)])
def test_only_the_gradients_that_are_asked_for(asked: tuple[int, ...]) -> None:
    args = inputs(45, WIDTHS, torch.float32)
    for i, tensor in enumerate(args):
        tensor.requires_grad_(i in asked)
    chosen = [args[i] for i in asked]
    outs = [gelu_mlp_triton(*args, table=small_table()), gelu_mlp_torch(*args)]
    dy = random_grad(outs[0])
    ours, torchs = (torch.autograd.grad(out, chosen, dy) for out in outs)
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def saved_bytes(function, args, **options) -> int:  # type: ignore[no-untyped-def]
    """The bytes that autograd keeps beside the inputs themselves."""
    inputs_at = {tensor.data_ptr() for tensor in args}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in inputs_at:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(*args, **options)
    assert out.requires_grad
    return sum(kept.values())


def test_it_keeps_at_most_half_of_what_autograd_keeps() -> None:
    args = inputs(200, WIDTHS, torch.float32)
    rows = torch.randperm(200)[:150]
    eager = saved_bytes(gelu_mlp_torch, args, rows=rows)
    hidden = 150 * WIDTHS[1] * 4
    assert eager >= 2 * hidden
    numbers = rows.numel() * rows.element_size()
    assert saved_bytes(gelu_mlp_triton, args, rows=rows, table=small_table()) <= hidden + numbers
    recomputed = saved_bytes(gelu_mlp_triton, args, rows=rows, table=small_table(), recompute=True)
    assert recomputed <= numbers


def test_backward_runs_once_and_with_recompute_again() -> None:
    args = inputs(20, WIDTHS, torch.float32)
    out = gelu_mlp_triton(*args, table=small_table()).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute=True"):
        out.backward()
    out = gelu_mlp_triton(*args, table=small_table(), recompute=True).sum()
    first, second = (torch.autograd.grad(out, args, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_repeated_runs_agree_bit_for_bit() -> None:
    args = inputs(130, WIDTHS, torch.float16)
    runs = []
    for _ in range(3):
        out = gelu_mlp_triton(*args, table=small_table())
        runs.append([out, *torch.autograd.grad(out, args, torch.ones_like(out))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_types_that_differ_are_named() -> None:
    args = inputs(4, WIDTHS, torch.float32)
    args[1] = args[1].half()
    with pytest.raises(ValueError, match="float16"):
        gelu_mlp_triton(*args, table=small_table())


@triton.jit
def normal_kernel(x, cdf, density, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = _normal(tl.load(x + i), EXACT)
    tl.store(cdf + i, first)
    tl.store(density + i, second)


@pytest.mark.parametrize(("quick", "error"), [(False, 1.2e-7), (True, 2.5e-7)])
def test_the_normal_distribution_against_scipy(quick: bool, error: float) -> None:
    x = torch.linspace(-12, 12, 1 << 16)
    cdf, density = torch.empty_like(x), torch.empty_like(x)
    normal_kernel[(64,)](x, cdf, density, EXACT=not quick, BLOCK=1024)
    wide = x.double().numpy()
    assert np.abs(cdf.numpy() - scipy.special.ndtr(wide)).max() <= error
    exact = np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
    assert np.abs(density.numpy() - exact).max() <= 1e-7
