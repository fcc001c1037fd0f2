"""Every kernel on a real GPU in 16 bits against fp64, and its determinism; skipped without one.

The shipped blocks at the real widths: what the interpreter (no bf16, no races) and offline
compilation (no values) cannot show.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_as_exact_as_torch
from torch import Tensor

from llava_hd.kernels.backend import Table, architecture, everywhere, load_shipped
from llava_hd.kernels.flash_attention import (
    flash_attention,
    flash_attention_reference,
    flash_attention_torch,
    pack_schedule,
)
from llava_hd.kernels.gelu_mlp import gelu_mlp_reference, gelu_mlp_torch
from llava_hd.kernels.place_rows import ROW_END, TEXT, place_rows_torch
from llava_hd.kernels.project_rows import project_rows_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def table() -> Table:
    name = architecture(*torch.cuda.get_device_capability())
    if name is None:
        pytest.skip("a GPU older than the kernels serve")
    return everywhere(load_shipped(name))


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "widths"), [(1000, (1024, 4096, 4096)), (577, (1000, 264, 520))])
def test_projecting_into_the_sequence(
    table: Table, kept: int, widths: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """All five products, the gather and the scatter, and the row-end's sum."""
    torch.manual_seed(0)
    d, f, h = widths
    rows = torch.randperm(kept + 300, device="cuda")[:kept]
    ends = torch.full((40,), ROW_END, device="cuda")
    text = torch.full((200,), TEXT, device="cuda")
    source = torch.cat([torch.arange(kept, device="cuda"), ends, text])
    source = source[torch.randperm(len(source), device="cuda")]
    args = [
        draw(kept + 300, d, dtype=dtype), draw(f, d, dtype=dtype, scale=d**-0.5),
        draw(f, dtype=dtype), draw(h, f, dtype=dtype, scale=f**-0.5), draw(h, dtype=dtype),
        draw(len(source), h, dtype=dtype), draw(h, dtype=dtype),
    ]  # fmt: skip

    def composed(mlp, values: list[Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
        return place_rows_torch(values[5], mlp(*values[:5], rows), values[6], source)

    dout = torch.randn(len(source), h, device="cuda").to(dtype)
    ours = project_rows_triton(*args, source, rows, table=table)
    theirs = composed(gelu_mlp_torch, args)
    wide = [x.detach().double().requires_grad_() for x in args]
    exact = composed(gelu_mlp_reference, wide)
    assert_as_exact_as_torch(ours, theirs, exact)
    for mine, other, true in zip(
        torch.autograd.grad(ours, args, dout),
        torch.autograd.grad(theirs, args, dout),
        torch.autograd.grad(exact, wide, dout.double()),
        strict=True,
    ):
        assert_as_exact_as_torch(mine, other, true)


def pack(dtype: torch.dtype, d: int, heads: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    lengths = [1, 0, 63, 257, 577, 1000, 128]
    total = sum(lengths) + 5
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return [draw(total, n, d, dtype=dtype) for n in (heads[0], heads[1], heads[1])], cu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("d", "heads"), [(64, (8, 8)), (128, (8, 2)), (80, (4, 4)), (256, (4, 2))])
def test_attention_over_packs(
    table: Table, d: int, heads: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    args, cu = pack(dtype, d, heads)
    dout = torch.randn(args[0].shape, device="cuda").to(dtype)
    ours = flash_attention(*args, cu_seqlens=cu, causal=causal, table=table)
    schedule = pack_schedule(cu, len(dout), causal)
    theirs = flash_attention_torch(*args, schedule=schedule)
    wide = [x.detach().double().requires_grad_() for x in args]
    exact = flash_attention_reference(*wide, cu_seqlens=cu, causal=causal)
    assert_as_exact_as_torch(ours, theirs, exact)
    for mine, other, true in zip(
        torch.autograd.grad(ours, args, dout),
        torch.autograd.grad(theirs, args, dout),
        torch.autograd.grad(exact, wide, dout.double()),
        strict=True,
    ):
        assert_as_exact_as_torch(mine, other, true)


@pytest.mark.parametrize("tokens", [257, 577])
def test_the_tower(table: Table, tokens: int) -> None:
    torch.manual_seed(0)
    args = [draw(5, tokens, 16, 64, dtype=torch.bfloat16) for _ in range(3)]
    ours = flash_attention(*args, causal=False, table=table)
    exact = flash_attention_reference(*(x.double() for x in args), causal=False)
    assert_as_exact_as_torch(ours, flash_attention_torch(*args, causal=False), exact)


def test_a_thousand_backwards_agree_bit_for_bit(table: Table) -> None:
    torch.manual_seed(0)
    args, cu = pack(torch.bfloat16, 128, (8, 2))
    dout = torch.randn(args[0].shape, device="cuda").to(torch.bfloat16)
    first = None
    for _ in range(1000):
        out = flash_attention(*args, cu_seqlens=cu, table=table)
        results = (out, *torch.autograd.grad(out, args, dout))
        first = results if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
