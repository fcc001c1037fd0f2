"""What the kernels' tests share: small blocks, poisoned memory, the rule for errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from llava_hd.kernels.backend import (
    ATTENTION,
    ELEMENTWISE,
    OPERATIONS,
    PRODUCTS,
    Blocks,
    Entry,
    Table,
)


def small_table(
    used: Sequence[str] = PRODUCTS, tma: bool = False, shape: tuple[int, int, int] = (32, 32, 16)
) -> Table:
    """Blocks that the interpreter is quick with; `used` products are ours, the others torch's."""
    rows, cols, inner = shape
    entries = {name: Entry(0, None) for name in OPERATIONS}
    for name in PRODUCTS:
        blocks = Blocks(rows, cols, inner, group=2, tma=tma)
        entries[name] = Entry(0 if name in used else None, blocks)
    for name in ELEMENTWISE:
        entries[name] = Entry(0, Blocks(16, 64))
    for name in ATTENTION:
        entries[name] = Entry(0, Blocks(32, 16))
    return Table("test", "", entries, "test")


def only_some(table: Table, **from_rows: int | None) -> Table:
    """The table with other first rows."""
    changed = {name: replace(table.entries[name], from_rows=n) for name, n in from_rows.items()}
    return replace(table, entries={**table.entries, **changed})


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory (torch.empty and its kin: outputs and workspaces) is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(2).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice that of torch in the same type, plus one rounding step of
    the largest value (torch's error can be 0 by luck)."""
    assert ours.shape == exact.shape and ours.dtype == torchs.dtype
    if not exact.numel():
        return
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (torchs.double() - exact).abs().max().item()
    floor = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= allowed + floor, f"error {error:.3g}, allowed {allowed:.3g} + {floor:.3g}"
