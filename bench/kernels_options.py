"""The options of the kernels' benchmark, for the `llava-hd` command and a bare machine alike."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attention_shapes import OPERATIONS as ATTENTION_OPERATIONS

ATTENTION = "attention"  # short for the three operations of attention_shapes.py
OPERATIONS = ("gelu_mlp", "place_rows", "project_place", "linear_loss", *ATTENTION_OPERATIONS)
PROVIDERS = (
    "ours", "eager", "compile", "llava", "liger", "xformers",
    "ours-triton", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "padded", "flex",
    "varlen", "flash-attn",
)  # fmt: skip
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MOST_ROWS = 2**22
DESCRIPTION = """Time our kernels against eager torch, torch.compile, LLaVA's own sequence of
operations, and for attention torch's, xformers' and flash-attn's kernels. Median and 20/80
quantiles of forward, backward and both; TFLOP/s, GB/s, share of the roofline measured in the same
run, memory, and the error against fp64: a provider that is wrong gets no time. kernels.csv and
kernels.json go to bench/results/DEVICE/DATE or to --out."""
EXAMPLES = (
    "--quick",
    "--ops gelu_mlp --rows 16384 65536",
    "--ops attention --providers ours eager sdpa-flash sdpa-cudnn",
    "--ops project_place --dtype bf16 fp16 --out runs/kernels",
    "--quick --json",
)


class RefusedOption(ValueError):
    """An option that cannot be used; the message names it and the remedy, in one line."""


@dataclass(frozen=True)
class Request:
    """One run of the benchmark.

    ops, providers: names of the tables above; rows: feature rows, None for each operation's own;
    dtypes: short names, None for the device's own (bf16 on CUDA, fp32 on a CPU); out: a folder
    without results, None for one named after device and date; command: how it was called.
    """

    ops: tuple[str, ...] = OPERATIONS
    providers: tuple[str, ...] = PROVIDERS
    rows: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    device: str | None = None
    quick: bool = False
    out: Path | None = None
    seed: int = 0
    command: str = ""


def add_options(parser: Any) -> None:
    """The options, on an argparse parser or on one with the same `add_argument`."""
    add = parser.add_argument
    listed = f"of {', '.join(OPERATIONS)}, {ATTENTION}; all"
    add("--ops", "--op", type=str, nargs="+", metavar="OP", help=listed)
    rows = "feature rows; of attention: tokens, tiles; else each operation's list"
    add("--rows", type=int, nargs="+", metavar="R", help=rows)
    add("--dtype", type=str, nargs="+", metavar="T", help="bf16, fp16, fp32; bf16, on a CPU fp32")
    add("--providers", type=str, nargs="+", metavar="P", help=f"of {', '.join(PROVIDERS)}; all")
    add("--device", type=str, metavar="D", help="cpu or cuda[:N]; cuda where there is one")
    add("--quick", action="store_true", help="small shapes: two minutes on two CPU cores")
    add("--out", type=str, metavar="DIR", help="folder of the results")
    add("--seed", type=int, default=0, help="seed of the random data")
    add("--json", action="store_true", help="print rows and ratios as JSON")


def request_of(args: Namespace, command: str) -> Request:
    """The request of parsed options; RefusedOption where one cannot be."""
    ops = _known("--ops", _spelled_out(args.ops), OPERATIONS, extra=(ATTENTION,))
    providers = _known("--providers", args.providers, PROVIDERS)
    if "eager" not in providers:
        raise RefusedOption("--providers: add eager; errors are measured against its own")
    dtypes = _known("--dtype", args.dtype, tuple(DTYPES)) if args.dtype else None
    for rows in args.rows or ():
        if not 1 <= rows <= MOST_ROWS:
            raise RefusedOption(f"--rows {rows}: give numbers from 1 to {MOST_ROWS}")
    if args.seed < 0:
        raise RefusedOption(f"--seed {args.seed}: give a number from 0")
    return Request(
        ops=ops,
        providers=providers,
        rows=tuple(dict.fromkeys(args.rows)) if args.rows else None,
        dtypes=dtypes,
        device=args.device,
        quick=args.quick,
        out=Path(args.out) if args.out is not None else None,
        seed=args.seed,
        command=command,
    )


def _spelled_out(given: Sequence[str] | None) -> list[str] | None:
    """The given operations, "attention" as its three."""
    if given is None:
        return None
    return [op for name in given for op in (ATTENTION_OPERATIONS if name == ATTENTION else (name,))]


def _known(
    option: str, given: Sequence[str] | None, known: tuple[str, ...], extra: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The given names in the table's order, or all of them; `extra`: other words to offer."""
    for name in given or ():
        if name not in known:
            offered = ", ".join((*known, *extra))
            raise RefusedOption(f"{option} {name!r} is unknown; there is {offered}")
    return tuple(name for name in known if not given or name in given)
