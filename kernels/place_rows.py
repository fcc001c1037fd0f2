"""Places visual rows and row-ends among the text embeddings of a pack.

    out[t] = text[t]          if source[t] == TEXT    (-1)
             row_end          if source[t] == ROW_END (-2)
             rows[source[t]]  otherwise

    text [T H]   rows [R H]   row_end [H]   source [T] int   ->   out [T H]

Backward: each input row receives the sum of the gradients of the places it went to, added in fp32
in the order of the places; `row_end` receives the sum over its places, in a fixed order too. An
input that went nowhere receives zeros, not None: that is what keeps ranks of a distributed run in
step when one of them has only text (the dummy tile of model/packing.py).

Bytes: reads R·H (rows) and the text places, writes T·H; backward reads T·H once for the rows and
row-ends, and once more, writing T·H, where the text embeddings train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Table, choose

TEXT = -1
ROW_END = -2


def place_rows_reference(
    text: Tensor, rows: Tensor, row_end: Tensor | None, source: Tensor
) -> Tensor:
    """The definition as a loop over places; same signature as `place_rows`."""
    out = []
    for place, number in enumerate(source.tolist()):
        if number == TEXT:
            out.append(text[place])
        elif number == ROW_END and row_end is not None:
            out.append(row_end)
        else:
            out.append(rows[number])
    return torch.stack(out) if out else text


def place_rows_torch(text: Tensor, rows: Tensor, row_end: Tensor | None, source: Tensor) -> Tensor:
    """Plain torch, under autograd."""
    if source.device.type == "cpu":
        return _by_copies(text, rows, row_end, source)
    return _by_masks(text, rows, row_end, source)


def _by_copies(text: Tensor, rows: Tensor, row_end: Tensor | None, source: Tensor) -> Tensor:
    """Copies what is placed and nothing else; counts the places, so a GPU would be waited for."""
    at = (source >= 0).nonzero()[:, 0]
    out = text.index_copy(0, at, rows.index_select(0, source[at]).to(text.dtype))
    if row_end is None:
        return out
    ends = (source == ROW_END).nonzero()[:, 0]
    return out.index_copy(0, ends, row_end.to(text.dtype).expand(len(ends), -1))


def _by_masks(text: Tensor, rows: Tensor, row_end: Tensor | None, source: Tensor) -> Tensor:
    """Without data-dependent shapes. Places without a row read some row, each another one: their
    zero gradients would otherwise all be added to the same."""
    if not len(rows):
        rows = rows.new_zeros(1, rows.shape[1])
    spread = torch.arange(len(source), device=source.device) % len(rows)
    placed = rows[torch.where(source >= 0, source, spread)].to(text.dtype)
    out = torch.where((source == TEXT)[:, None], text, placed)
    if row_end is None:
        return out
    return torch.where((source == ROW_END)[:, None], row_end.to(text.dtype), out)


def place_rows(text: Tensor, rows: Tensor, row_end: Tensor | None, source: Tensor) -> Tensor:
    """Fill the visual places of a packed embedding sequence.

    Args:
        text: `[T H]` embeddings of every token (the placeholders' are overwritten).
        rows: `[R H]` projected visual rows, `R >= 1`.
        row_end: `[H]`, or None where the configuration has no row-ends.
        source: `[T]` int64: -1 text, -2 row-end, r >= 0 row r.

    Returns:
        `[T H]` in the type of text.

    Without a data-dependent shape, so nothing waits for the device; a row-end place without a
    `row_end` is the packer's error and is caught there.
    """
    if text.ndim != 2 or source.shape != text.shape[:1] or rows.shape[1:] != text.shape[1:]:
        raise ValueError(
            f"place_rows: text {tuple(text.shape)}, rows {tuple(rows.shape)}, source "
            f"{tuple(source.shape)}; need text [T H], rows [R H], source [T]"
        )
    table = choose("place_rows", text.device, text.dtype, text.shape[0]).table
    if table is None:
        return place_rows_torch(text, rows, row_end, source)
    return place_rows_triton(text, rows, row_end, source, table=table)


def place_rows_triton(
    text: Tensor, rows: Tensor, row_end: Tensor | None, source: Tensor, *, table: Table
) -> Tensor:
    """Our autograd function, one pass each way; at least one token and one row."""
    with torch.cuda.device_of(text):
        out = _PlaceRows.apply(text, rows, row_end, source, table)
    assert isinstance(out, Tensor)
    return out


class Places:
    """Where each row went: the places sorted by what stands there, row-ends first, then text, then
    row 0, row 1, ... in the order of the sequence.

    order: int64 `[T]`. starts: int64 `[R + 3]`; row-ends are `order[starts[0]:starts[1]]`, row r's
    places `order[starts[r + 2]:starts[r + 3]]`.
    """

    def __init__(self, source: Tensor, num_rows: int) -> None:
        ordered, self.order = torch.sort(source, stable=True)
        firsts = torch.arange(ROW_END, num_rows + 1, device=source.device)
        self.starts = torch.searchsorted(ordered, firsts)

    def first(self) -> Tensor:
        """The first place of each row, int64 `[R]`, -1 for a row that went nowhere."""
        begin, end = self.starts[2:-1], self.starts[3:]
        place = self.order[begin.clamp(max=len(self.order) - 1)]
        return torch.where(end > begin, place, -1)


def gradients(
    dout: Tensor,
    source: Tensor,
    places: Places,
    need: Sequence[bool],
    like: Sequence[Any],
    table: Table,
) -> list[Tensor | None]:
    """Those of text, rows and row_end where `need` asks, None elsewhere; like: (shape, type)."""
    from .place_kernels import row_end_grad, rows_grad  # Triton is imported only where it runs

    dtext = drows = dend = None
    if need[0]:
        dtext = torch.where((source == TEXT)[:, None], dout, 0).to(like[0][1])
    if need[1]:
        drows = dout.new_empty(like[1][0], dtype=like[1][1])
        rows_grad(dout, places.order, places.starts, drows, table.blocks("place"))
    if need[2]:
        blocks = table.blocks("place_grad")
        dend = row_end_grad(dout, places.order, places.starts, blocks).to(like[2][1])
    return [dtext, drows, dend]


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        text: Tensor,
        rows: Tensor,
        row_end: Tensor | None,
        source: Tensor,
        table: Table,
    ) -> Tensor:
        from .place_kernels import place  # Triton is imported only where it runs

        ctx.save_for_backward(source)
        ctx.table = table
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in (text, rows, row_end)]
        return place(text, rows, row_end, source, table.blocks("place"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        places = Places(source, ctx.like[1][0][0])
        found = gradients(dout, source, places, ctx.needs_input_grad[:3], ctx.like, ctx.table)
        return (*found, None, None)
