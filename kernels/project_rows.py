"""The projector and its rows' places in one: place_rows(text, gelu_mlp(x, ..., rows), row_end).

    x [R0 D]   w1 [F D]  b1 [F]   w2 [H F]  b2 [H]   rows [R]
    text [T H]   row_end [H]   source [T]   ->   out [T H]

The definitions are those of gelu_mlp.py and place_rows.py. Where the table of block sizes gives the
second product to our kernel, it writes each row straight to its place in the packed sequence, and
the projected rows `[R H]` never exist by themselves: one trip of R·H through memory less. Backward
collects the rows' gradients from their places and goes on as in gelu_mlp.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import gelu_mlp as mlp
from . import place_rows as placing
from .backend import Table, choose


def project_rows_reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    text: Tensor,
    row_end: Tensor | None,
    source: Tensor,
    rows: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """The definition; same signature as `project_rows`."""
    projected = mlp.gelu_mlp_reference(x, w1, b1, w2, b2, rows)
    return placing.place_rows_reference(text, projected, row_end, source)


def project_rows(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    text: Tensor,
    row_end: Tensor | None,
    source: Tensor,
    rows: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Project the chosen rows of x and fill the visual places of a packed embedding sequence.

    Args:
        x, w1, b1, w2, b2, rows, recompute: as for `gelu_mlp`.
        text, row_end, source: as for `place_rows`.

    Returns:
        `[T H]` in the type of text.
    """
    mlp.check_shapes(x, w1, b1, w2, b2)
    count = x.shape[0] if rows is None else rows.shape[0]
    table = choose("gelu_mlp", x.device, x.dtype, count).table
    if table is not None and table.uses("down", count) and text.dtype == x.dtype and len(source):
        return project_rows_triton(
            x, w1, b1, w2, b2, text, row_end, source, rows, table=table, recompute=recompute
        )
    projected = mlp.gelu_mlp(x, w1, b1, w2, b2, rows, recompute=recompute)
    return placing.place_rows(text, projected, row_end, source)


def project_rows_triton(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    text: Tensor,
    row_end: Tensor | None,
    source: Tensor,
    rows: Tensor | None = None,
    *,
    table: Table,
    recompute: bool = False,
) -> Tensor:
    """Our autograd function, with our second product; at least one row and one token, one type for
    all."""
    inputs = [x, w1, b1, w2, b2, text]
    if any(tensor.dtype != x.dtype for tensor in inputs):
        raise ValueError(f"project_rows: one type for all inputs, not {[t.dtype for t in inputs]}")
    if source.shape != text.shape[:1] or text.shape[1] != w2.shape[0]:
        raise ValueError(
            f"project_rows: text {tuple(text.shape)}, w2 {tuple(w2.shape)}, source "
            f"{tuple(source.shape)}; need text [T H], w2 [H F], source [T]"
        )
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    with torch.cuda.device_of(x):
        out = _ProjectRows.apply(*inputs, row_end, source, rows, table, keep and not recompute)
    assert isinstance(out, Tensor)
    return out


class _ProjectRows(torch.autograd.Function):
    """x, w1, b1, w2, b2, text, row_end, source, rows, table, keep (the hidden rows)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        text: Tensor,
        row_end: Tensor | None,
        source: Tensor,
        rows: Tensor | None,
        table: Table,
        keep: bool,
    ) -> Tensor:
        from .launch import linear_rows  # Triton is imported only where it runs
        from .place_kernels import fill

        hidden, activated = mlp.up(x, w1, b1, rows, table, keep)
        places = placing.Places(source, activated.shape[0])
        to = places.first()
        out = torch.empty(text.shape, dtype=text.dtype, device=text.device)
        linear_rows(activated, w2, b2, table.blocks("down"), out=out, to=to)
        fill(text, row_end, source, to, out, table.blocks("place"))
        mlp.remember(ctx, x, w1, b1, w2, rows, hidden if keep else None, table)
        ctx.source, ctx.places = source, places
        projected = (activated.shape[0], w2.shape[0]), x.dtype
        ends = None if row_end is None else (row_end.shape, row_end.dtype)
        ctx.like = [(text.shape, text.dtype), projected, ends]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        wanted = [need[5], any(need[:5]), need[6]]
        dtext, dy, dend = placing.gradients(
            dout, ctx.source, ctx.places, wanted, ctx.like, ctx.table
        )
        found = [None] * 5 if dy is None else mlp.gradients(ctx, dy)
        return (*found, dtext, dend, None, None, None, None)
