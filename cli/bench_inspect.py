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
        try:
            table = load_table(arch)
        except ValueError as error:
            raise UsageError(f"bench inspect: {error}") from error
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
    """Plain lines, so that a pipe or a narrow terminal cuts nothing."""
    for arch in dict.fromkeys(row["architecture"] for row in found):
        rows = [row for row in found if row["architecture"] == arch]
        limit = rows[0]["shared_limit"] // 1024
        print(
            f"{arch}, {dtype}, compiled, not run; a program may have {limit} KiB of shared memory"
        )
        print(f"  {'kernel':<29}{'tile':<12}warps stages  regs spills   shared  instructions")
        for row in rows:
            blocks = row["blocks"]
            shape = "x".join(str(blocks[key]) for key in ("rows", "cols", "inner") if blocks[key])
            core = "wgmma" if row["HGMMA"] else "mma" if row["HMMA"] else "-"
            print(
                f"  {row['name']:<29}{shape:<12}{blocks['warps']:>5} {blocks['stages']:>6} "
                f"{row['registers']:>5} {row['spills']:>6} {row['shared'] / 1024:>4.0f} KiB  "
                f"{core}{', TMA' if row['UTMALDG'] else ''}"
            )
