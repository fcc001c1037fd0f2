"""Places visual rows and row-ends among the text embeddings of a pack.

    out[t] = text[t]          if source[t] == TEXT    (-1)
             row_end          if source[t] == ROW_END (-2)
             rows[source[t]]  otherwise

    text [T H]   rows [R H]   row_end [H]   source [T] int   ->   out [T H]

Backward: each input row receives the gradient of the places it went to; `row_end` receives the
sum over its places. An input that went nowhere receives zeros, not None: that is what keeps ranks
of a distributed run in step when one of them has only text (the dummy tile of model/packing.py).

Bytes: reads R·H (rows) and the text places, writes T·H.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    table = rows if row_end is None else torch.cat([rows, row_end[None]])
    index = torch.where(source == ROW_END, rows.shape[0], source).clamp(min=0)
    return torch.where((source == TEXT)[:, None], text, table.to(text.dtype)[index])
