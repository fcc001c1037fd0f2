"""The Triton kernels of place_rows.py and their launches: one program moves one row at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import Blocks
from .launch import rows_in_memory


@triton.jit
def _text_or_end(text, row_end, number, t, stride_text, c, inside, HAS_END: tl.constexpr):
    """What stands at place t without a row: its text (number -1) or the row-end (-2)."""
    value = tl.load(text + t * stride_text + c, mask=inside & (number == -1), other=0.0)
    if HAS_END:
        end = tl.load(row_end + c, mask=inside & (number == -2), other=0.0)
        value = tl.where(number == -2, end.to(value.dtype), value)
    return value


@triton.jit
def place_kernel(
    text, rows, row_end, source, out, H, stride_text, stride_rows, stride_out,
    HAS_END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] from text, rows or row_end, whichever source[t] names (-1, r, -2)."""
    t = tl.program_id(0).to(tl.int64)
    number = tl.load(source + t).to(tl.int64)
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < H
        if number >= 0:
            value = tl.load(rows + number * stride_rows + c, mask=inside).to(out.dtype.element_ty)
        else:
            value = _text_or_end(text, row_end, number, t, stride_text, c, inside, HAS_END)
        tl.store(out + t * stride_out + c, value, mask=inside)


@triton.jit
def fill_kernel(
    text, row_end, source, to, out, H, stride_text, stride_out,
    HAS_END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The places of text and row-ends in `out`, in which row r already stands at to[r]; a second
    place of a row is copied from there."""
    t = tl.program_id(0).to(tl.int64)
    number = tl.load(source + t).to(tl.int64)
    first = t
    if number >= 0:
        first = tl.load(to + number).to(tl.int64)
    if (number < 0) | (first != t):
        for start in range(0, H, BLOCK):
            c = start + tl.arange(0, BLOCK)
            inside = c < H
            if number >= 0:
                value = tl.load(out + first * stride_out + c, mask=inside)
            else:
                value = _text_or_end(text, row_end, number, t, stride_text, c, inside, HAS_END)
            tl.store(out + t * stride_out + c, value, mask=inside)


@triton.jit
def rows_grad_kernel(dout, order, starts, drows, H, stride_dout, stride_drows, BLOCK: tl.constexpr):
    """drows[r] = Σ dout[order[starts[r + 2] : starts[r + 3]]], in fp32 and in that order."""
    r = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + r + 2)
    last = tl.load(starts + r + 3)
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(first, last):
            place = tl.load(order + i)
            total += tl.load(dout + place * stride_dout + c, mask=c < H, other=0.0).to(tl.float32)
        tl.store(drows + r * stride_drows + c, total.to(drows.dtype.element_ty), mask=c < H)


@triton.jit
def row_end_grad_kernel(
    dout, order, starts, sums, H, stride_dout, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[k] = Σ dout[order[i]] over every CHUNKS-th row-end place i, beginning with the k-th."""
    k = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(starts) + k, tl.load(starts + 1), CHUNKS):
        place = tl.load(order + i)
        total += tl.load(dout + place * stride_dout + c, mask=c < H, other=0.0).to(tl.float32)
    tl.store(sums + k.to(tl.int64) * H + c, total, mask=c < H)


def place(
    text: Tensor, rows: Tensor, row_end: Tensor | None, source: Tensor, blocks: Blocks
) -> Tensor:
    """`[T H]` in text's type; see `place_rows`."""
    text, rows, source = rows_in_memory(text), rows_in_memory(rows), source.contiguous()
    row_end = None if row_end is None else row_end.contiguous()
    out = torch.empty(text.shape, dtype=text.dtype, device=text.device)
    place_kernel[(text.shape[0],)](
        text, rows, row_end, source, out,
        text.shape[1], text.stride(0), rows.stride(0), out.stride(0),
        HAS_END=row_end is not None, BLOCK=blocks.cols, num_warps=blocks.warps,
    )  # fmt: skip
    return out


def fill(
    text: Tensor, row_end: Tensor | None, source: Tensor, to: Tensor, out: Tensor, blocks: Blocks
) -> None:
    """Write text and row-ends into out `[T H]`, where the rows stand already; to: int64 `[R]`."""
    text, source = rows_in_memory(text), source.contiguous()
    row_end = None if row_end is None else row_end.contiguous()
    fill_kernel[(text.shape[0],)](
        text, row_end, source, to, out, text.shape[1], text.stride(0), out.stride(0),
        HAS_END=row_end is not None, BLOCK=blocks.cols, num_warps=blocks.warps,
    )  # fmt: skip


def rows_grad(dout: Tensor, order: Tensor, starts: Tensor, drows: Tensor, blocks: Blocks) -> None:
    """Write the rows' gradients `[R H]` (`place_rows.Places` has order and starts)."""
    dout = rows_in_memory(dout)
    rows_grad_kernel[(drows.shape[0],)](
        dout, order, starts, drows, drows.shape[1], dout.stride(0), drows.stride(0),
        BLOCK=blocks.cols, num_warps=blocks.warps,
    )  # fmt: skip


def row_end_grad(dout: Tensor, order: Tensor, starts: Tensor, blocks: Blocks) -> Tensor:
    """The row-end's gradient, fp32 `[H]`: `blocks.rows` partial sums, added in order."""
    dout = rows_in_memory(dout)
    width = dout.shape[1]
    sums = torch.empty(blocks.rows, width, dtype=torch.float32, device=dout.device)
    row_end_grad_kernel[(blocks.rows, triton.cdiv(width, blocks.cols))](
        dout, order, starts, sums, width, dout.stride(0),
        CHUNKS=blocks.rows, BLOCK=blocks.cols, num_warps=blocks.warps,
    )  # fmt: skip
    return sums.sum(0)
