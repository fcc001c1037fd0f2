"""The one decision "Triton or torch", and the block sizes of the Triton kernels.

Both come from a table per architecture, `blocks/sm_90.json` and so on: nothing is tuned inside a
training step. `llava-hd bench tune` measures a machine and writes a table of its own, which is read
instead of the shipped one (`table_path`). A table holds for each operation and for each kernel the
number of rows from which on it is used, null for never:

    gelu_mlp, place_rows,     the operation: our autograd function, or plain torch
    attention_…
    up, down, hidden_grad,    products of gelu_mlp: our Triton kernel, or the library's (cuBLAS)
    weight_grad               product with an element-wise kernel or none

The environment variable LLAVA_HD_KERNELS overrides the operations: "torch" uses no Triton kernel at
all, "triton" uses every Triton kernel at every size (for looking into a suspicion, not for speed).
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

OPERATIONS = ("gelu_mlp", "place_rows", "attention_dense", "attention_packed", "attention_tower")
PRODUCTS = ("up", "down", "hidden_grad", "weight_grad")
ELEMENTWISE = ("gelu_grad", "place", "place_grad")
ATTENTION = (
    *(f"attention_{kernel}_{width}" for kernel in ("forward", "query_grad", "key_grad")
      for width in (64, 128, 256)),
    "attention_tower_64",
)  # fmt: skip
SWITCH = "LLAVA_HD_KERNELS"
SHIPPED = Path(__file__).with_name("blocks")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Blocks:
    """The shape of one program's work: `rows` x `cols` of the output, `inner` of the summed axis;
    `warps` per program, pipeline `stages`, tile rows in a raster `group`, and whether whole tiles
    are read through TMA descriptors."""

    rows: int
    cols: int
    inner: int = 0
    warps: int = 4
    stages: int = 1
    group: int = 8
    tma: bool = False


@dataclass(frozen=True)
class Entry:
    """One line of a table: the blocks of a kernel and the rows from which on it is used."""

    from_rows: int | None
    blocks: Blocks | None


@dataclass(frozen=True)
class Table:
    """The blocks of an architecture. measured: the result file behind it, "" for none."""

    architecture: str
    measured: str
    entries: dict[str, Entry]
    path: str

    def uses(self, name: str, rows: int) -> bool:
        """Whether operation or kernel `name` is used for so many rows."""
        start = self.entries[name].from_rows
        return start is not None and rows >= start

    def blocks(self, name: str) -> Blocks:
        """The block sizes of kernel `name`."""
        found = self.entries[name].blocks
        if found is None:
            raise KeyError(f"{self.path}: {name} has no blocks")
        return found


@dataclass(frozen=True)
class Choice:
    """table: the blocks to use, or None for torch. reason: why, in a few words."""

    table: Table | None
    reason: str

    @property
    def path(self) -> str:
        """ "triton" or "torch"."""
        return "torch" if self.table is None else "triton"


def choose(operation: str, device: torch.device, dtype: torch.dtype, rows: int) -> Choice:
    """How `operation` (one of OPERATIONS) is computed for `rows` rows on a device."""
    switch = os.environ.get(SWITCH, "")
    if operation not in OPERATIONS:
        return Choice(None, "a shape that bench tune does not measure")
    table, reason = _table_for(device.type, device.index, switch, dtype == torch.float32)
    if table is None:
        return Choice(None, reason)
    if dtype not in DTYPES:
        return Choice(None, f"the kernels do not serve {dtype}")
    if rows == 0:
        return Choice(None, "no rows")
    if operation.startswith("attention") and dtype == torch.float32 and device.type == "cuda":
        return Choice(None, "the attention kernels serve 16 bits on a GPU")
    if not table.uses(operation, rows):
        start = table.entries[operation].from_rows
        if start is None:
            why = "not used" if table.measured else "off until measured (llava-hd bench tune)"
            return Choice(None, f"{table.architecture}: Triton {why}")
        return Choice(None, f"{table.architecture}: Triton from {start} rows on, these are {rows}")
    return Choice(table, reason)


def forced(device: torch.device) -> Choice:
    """Every Triton kernel at every size, for one who asks for them by name; table None and the
    reason where they cannot run."""
    return Choice(*_table_for(device.type, device.index, "triton", False))


@cache
def _table_for(kind: str, index: int | None, switch: str, fp32: bool) -> tuple[Table | None, str]:
    if switch not in ("", "torch", "triton"):
        raise ValueError(f"{SWITCH}={switch!r}: give torch or triton, or leave it unset")
    if switch == "torch":
        return None, f"{SWITCH}=torch"
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed (pip install 'llava-hd[gpu]')"
    if kind != "cuda":
        if switch == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return everywhere(load_table("sm_80")), "Triton's interpreter"
        return None, f"Triton kernels run on CUDA, not on {kind}"
    major, minor = torch.cuda.get_device_capability(index)
    name = architecture(major, minor)
    if name is None:
        return None, f"compute capability {major}.{minor} is older than 8.0"
    table = load_table(name)
    if switch == "triton":
        table = everywhere(table)
    if fp32:
        table = library_products(table)
    if switch == "triton":
        return table, f"{SWITCH}=triton"
    if table.measured:
        return table, f"{name}, measured: {table.measured}"
    return table, f"{name}, block sizes not measured yet (llava-hd bench tune)"


def architecture(major: int, minor: int) -> str | None:
    """The table that serves a compute capability, or None.

    sm_80's blocks fit the 99 KiB of shared memory that every chip since 8.0 offers a program;
    sm_90's need a data-centre chip (9.x, 10.x)."""
    if major < 8:
        return None
    return "sm_90" if major in (9, 10) else "sm_80"


def everywhere(table: Table) -> Table:
    """The table with every kernel in use from the first row on."""
    entries = {name: Entry(0, entry.blocks) for name, entry in table.entries.items()}
    return replace(table, entries=entries)


def library_products(table: Table) -> Table:
    """The table with the library's products: what fp32 takes on a GPU. The blocks are made for 16
    bits, and without the tensor cores our products have nothing to win."""
    theirs = {name: Entry(None, table.entries[name].blocks) for name in PRODUCTS}
    return replace(table, entries={**table.entries, **theirs})


def table_path(name: str) -> Path:
    """Where a machine's own table of architecture `name` stands: below $XDG_CONFIG_HOME, by default
    ~/.config."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "llava-hd" / "blocks" / f"{name}.json"


def load_table(name: str) -> Table:
    """The machine's own table of an architecture, else the shipped one.

    Raises ValueError naming file, field and remedy where the file is not a table.
    """
    own = table_path(name)
    return read_table(own) if own.is_file() else load_shipped(name)


def load_shipped(name: str) -> Table:
    """The shipped table of an architecture."""
    return read_table(SHIPPED / f"{name}.json")


def read_table(path: Path) -> Table:
    """The table in a file; ValueError naming file, field and remedy where it is none."""
    try:
        return parse_table(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a table of block sizes ({error}); delete it or run llava-hd bench tune"
        ) from error


def parse_table(values: dict[str, Any], path: str) -> Table:
    """A table from what its JSON file holds; KeyError, TypeError or ValueError where it lacks or
    misnames something."""
    entries = {}
    for name in (*OPERATIONS, *PRODUCTS, *ELEMENTWISE, *ATTENTION):
        entry = values[name]
        start = entry["from_rows"]
        if start is not None and (not isinstance(start, int) or start < 0):
            raise ValueError(f"{name}.from_rows is {start!r}, not a number of rows or null")
        blocks = None if name in OPERATIONS else Blocks(**entry["blocks"])
        entries[name] = Entry(start, blocks)
    return Table(values["architecture"], values["measured"], entries, path)


def table_values(table: Table) -> dict[str, Any]:
    """The table as its JSON file holds it; the inverse of `parse_table`."""
    values: dict[str, Any] = {"architecture": table.architecture, "measured": table.measured}
    for name, entry in table.entries.items():
        values[name] = {"from_rows": entry.from_rows}
        if entry.blocks is not None:
            values[name]["blocks"] = vars(entry.blocks).copy()
    return values
