"""`llava-hd bench inspect`: every kernel compiled for a chip, with what its machine code needs."""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec
from typing import Any

from ..hd.errors import LlavaHDError, UsageError
from .parser import Parser

DTYPES = ("bf16", "fp16")  # fp32 takes the library's products


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench inspect`."""
    parser = Parser(
        command,
        "Compile every kernel with the block sizes in use, for chips that need not be here, and "
        "print registers, spills, shared memory and tensor-core instructions. Exit code 1 when a "
        "kernel spills or does not fit.",
        [f"llava-hd {command}", f"llava-hd {command} --arch sm_90 --dtype fp16 --json"],
    )
    parser.add_argument("--arch", nargs="+", choices=("sm_80", "sm_90"), default=["sm_90", "sm_80"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compile, print, and say whether all is well."""
    if find_spec("triton") is None:
        raise LlavaHDError("bench inspect: triton is not installed; pip install 'llava-hd[gpu]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("bench inspect: unset TRITON_INTERPRET; it keeps kernels from compiling")
    from ..kernels.backend import load_table
    from ..kernels.offline import SHARED_LIMIT, compile_variant, facts, narrow_strides, variants

    found = []
    for arch in args.arch:
        table = load_table(arch)
        for variant in variants(table, args.dtype):
            code = compile_variant(variant, arch)
            row = {**facts(code), "shared_limit": SHARED_LIMIT[arch], "table": table.path}
            row["narrow_offsets"] = len(narrow_strides(code))
            row["blocks"] = vars(variant.blocks)
            found.append(row)
    print(json.dumps(found, indent=1)) if args.json else _print(found, args.dtype)
    bad = [
        f"{row['name']} for {row['architecture']}"
        for row in found
        if row["spills"] or row["stack"] or row["shared"] > row["shared_limit"]
    ]
    if bad:
        raise LlavaHDError(f"bench inspect: spills or does not fit: {', '.join(bad)}")
    return 0


def _print(found: list[dict[str, Any]], dtype: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for arch in dict.fromkeys(row["architecture"] for row in found):
        rows = [row for row in found if row["architecture"] == arch]
        title = (
            f"{arch}, {dtype}, compiled, not run; shared <= {rows[0]['shared_limit'] // 1024} KiB"
        )
        table = Table(
            title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
        )
        table.add_column("kernel", no_wrap=True)
        table.add_column("tile", no_wrap=True)
        for heading in ("warps", "stages", "regs", "spills", "shared"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("core", no_wrap=True)
        for row in rows:
            blocks = row["blocks"]
            shape = "x".join(str(blocks[key]) for key in ("rows", "cols", "inner") if blocks[key])
            core = "wgmma" if row["HGMMA"] else "mma" if row["HMMA"] else "-"
            counts = [blocks["warps"], blocks["stages"], row["registers"], row["spills"]]
            cells = [*(str(count) for count in counts), f"{row['shared'] / 1024:.0f} KiB"]
            table.add_row(row["name"], shape, *cells, core + (" TMA" if row["UTMALDG"] else ""))
        console.print(table)
