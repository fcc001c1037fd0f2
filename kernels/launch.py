"""The kernels of products.py as functions of tensors: strides, grids, descriptors, workspaces."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .backend import Blocks
from .products import (
    gelu_grad_kernel,
    hidden_grad_kernel,
    linear_rows_kernel,
    weight_grad_kernel,
)

TMA_BYTES = 16  # a descriptor's rows and its start are multiples of it


def rows_in_memory(x: Tensor) -> Tensor:
    """x `[R D]`, or a copy of it where its columns do not lie side by side or its rows overlap
    (a gradient expanded by `.sum()` has strides of 0)."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _numbers(rows: Tensor | None) -> Tensor | None:
    """Row numbers side by side."""
    return None if rows is None else rows.contiguous()


def _described(x: Tensor, blocks: Blocks, shape: list[int]) -> tuple[Any, bool]:
    """x for the kernel: a tensor descriptor where the blocks ask for TMA and x allows it."""
    size = x.element_size()
    aligned = x.data_ptr() % TMA_BYTES == 0 and x.stride(0) * size % TMA_BYTES == 0
    if not (blocks.tma and aligned):
        return x, False
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], shape), True


def _common(x: Tensor, blocks: Blocks) -> dict[str, Any]:
    return {
        "PRECISION": "ieee",
        "BM": blocks.rows,
        "BN": blocks.cols,
        "BK": blocks.inner,
        "GROUP": blocks.group,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def linear_rows(
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    blocks: Blocks,
    *,
    rows: Tensor | None = None,
    gelu: bool = False,
    pre: Tensor | None = None,
    out: Tensor | None = None,
    to: Tensor | None = None,
) -> Tensor:
    """`out[to[r]] = f(x[rows[r]] wᵀ + bias)`, f = GELU where `gelu`.

    Args:
        x: `[R0 K]`. w: `[N K]`. bias: `[N]`. rows: int64 `[R]`, or None for all of x in order.
        pre: `[R N]` that receives the rows before f. out: `[.. N]`, by default a new `[R N]`.
        to: int64 `[R]`, the row of `out` that each result goes to, negative for none.
    """
    x, w, bias = rows_in_memory(x), rows_in_memory(w), bias.contiguous()
    rows, to = _numbers(rows), _numbers(to)
    count, width = x.shape[0] if rows is None else rows.shape[0], w.shape[0]
    if out is None:
        out = x.new_empty(count, width)
    weight, tma = _described(w, blocks, [blocks.cols, blocks.inner])
    grid = (triton.cdiv(count, blocks.rows) * triton.cdiv(width, blocks.cols),)
    kept = out if pre is None else pre
    linear_rows_kernel[grid](
        x, rows, weight, bias, kept, out, to,
        count, width, x.shape[1], x.stride(0), w.stride(0), kept.stride(0), out.stride(0),
        GATHER=rows is not None, SCATTER=to is not None, GELU=gelu, SAVE=pre is not None,
        TMA=tma, EVEN_K=x.shape[1] % blocks.inner == 0, EXACT=x.dtype == torch.float32,
        **_common(x, blocks),
    )  # fmt: skip
    return out


def hidden_grad(
    dy: Tensor,
    w: Tensor,
    pre: Tensor,
    blocks: Blocks,
    *,
    keep_gelu: bool = True,
) -> tuple[Tensor, Tensor]:
    """`dH = (dy w) ⊙ gelu'(pre)` `[R N]` and its column sums, fp32 `[N]`.

    Args:
        dy: `[R K]`. w: `[K N]`. pre: `[R N]`, overwritten by gelu(pre) with `keep_gelu`.
    """
    dy, w = rows_in_memory(dy), rows_in_memory(w)
    count, width = pre.shape
    dh = torch.empty_like(pre)
    tile_rows = triton.cdiv(count, blocks.rows)
    sums = torch.empty(tile_rows, width, dtype=torch.float32, device=dy.device)
    weight, tma = _described(w, blocks, [blocks.inner, blocks.cols])
    hidden_grad_kernel[(tile_rows * triton.cdiv(width, blocks.cols),)](
        dy, weight, pre, dh, sums,
        count, width, dy.shape[1], dy.stride(0), w.stride(0), pre.stride(0), dh.stride(0),
        KEEP_GELU=keep_gelu, TMA=tma,
        EVEN_K=dy.shape[1] % blocks.inner == 0, EXACT=dy.dtype == torch.float32,
        **_common(dy, blocks),
    )  # fmt: skip
    return dh, sums.sum(0)


def weight_grad(
    a: Tensor,
    b: Tensor,
    blocks: Blocks,
    *,
    rows: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`dW = aᵀ b[rows]` `[M N]`, summed in fp32, and the column sums of a, fp32 `[M]`.

    Args:
        a: `[R M]`. b: `[.. N]`. rows: int64 `[R]`, or None for all of b in order.
    """
    a, b, rows = rows_in_memory(a), rows_in_memory(b), _numbers(rows)
    count, height, width = *a.shape, b.shape[1]
    dw = a.new_empty(height, width)
    tile_cols = triton.cdiv(width, blocks.cols)
    partial = torch.empty(tile_cols, height, dtype=torch.float32, device=a.device) if sums else None
    left, tma = _described(a, blocks, [blocks.inner, blocks.rows])
    weight_grad_kernel[(triton.cdiv(height, blocks.rows) * tile_cols,)](
        left, b, rows, dw, partial,
        count, height, width, a.stride(0), b.stride(0), dw.stride(0),
        GATHER=rows is not None, SUMS=sums, TMA=tma,
        **_common(a, blocks),
    )  # fmt: skip
    return dw, None if partial is None else partial.sum(0)


def gelu_grad(dg: Tensor, pre: Tensor, blocks: Blocks, *, keep_gelu: bool = True) -> Tensor:
    """In place: `dg <- dg ⊙ gelu'(pre)` `[R N]`, `pre <- gelu(pre)` with `keep_gelu`.

    Returns the column sums of the new dg, fp32 `[N]`.
    """
    count, width = pre.shape
    tile_rows = triton.cdiv(count, blocks.rows)
    sums = torch.empty(tile_rows, width, dtype=torch.float32, device=dg.device)
    gelu_grad_kernel[(tile_rows, triton.cdiv(width, blocks.cols))](
        dg, pre, sums, count, width, dg.stride(0), pre.stride(0),
        KEEP_GELU=keep_gelu, EXACT=dg.dtype == torch.float32,
        BM=blocks.rows, BN=blocks.cols, num_warps=blocks.warps,
    )  # fmt: skip
    return sums.sum(0)
