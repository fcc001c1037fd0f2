"""`llava-hd bench kernels`: our kernels against their rivals, with errors beside every time."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.kernels_options import (
    DESCRIPTION,
    EXAMPLES,
    RefusedOption,
    add_options,
    request_of,
)
from ..hd.errors import Interrupted, UsageError
from .bench_output import command_line
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench kernels`."""
    parser = Parser(command, DESCRIPTION, [f"llava-hd {command} {words}" for words in EXAMPLES])
    add_options(parser)
    return parser


def run(args: Namespace) -> int:
    """Measure, write the results, print the ratios (or JSON)."""
    from ..bench.kernels import RECORD, report, run_benchmark, tell

    try:
        request = request_of(args, command_line())
        record, out = run_benchmark(request, tell)
    except RefusedOption as refusal:
        raise UsageError(str(refusal)) from refusal
    if not args.json:
        _print(Console(), record)
    if report(record, out, args.json):
        kept = f"the finished cases are in {out / RECORD}" if record["rows"] else "nothing is kept"
        raise Interrupted(f"{kept}; start again with the other --ops or --rows")
    return 0


def _print(console: Console, record: dict[str, Any]) -> None:
    """Rivals' times over ours, operation by operation, and everyone who got no time."""
    console.print("rival's time / ours: above 1, ours is faster")
    for op in dict.fromkeys(ratio["op"] for ratio in record["ratios"]):
        console.print(_table(op, [ratio for ratio in record["ratios"] if ratio["op"] == op]))
    where: dict[str, list[str]] = {}
    for row in record["rows"]:
        if "reason" in row:
            where.setdefault(f"{row['provider']}: {row['reason']}", []).append(row["op"])
    for reason, ops in where.items():
        text = f"{reason} [{', '.join(dict.fromkeys(ops))}]"
        console.print(text, highlight=False, markup=False)
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


def _table(op: str, ratios: list[dict[str, Any]]) -> Table:
    """A line for each case and mode, a column for each rival; names of rivals may wrap."""
    rivals = list(dict.fromkeys(ratio["rival"] for ratio in ratios))
    table = Table(title=op, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("case", "type", "mode"):
        table.add_column(name, no_wrap=True)
    for name in rivals:
        table.add_column(name, justify="right", overflow="fold", min_width=5)
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for ratio in ratios:
        keep = "" if ratio["keep"] == 1 else f" keep {ratio['keep']:g}"
        case = f"{ratio['size']} R={ratio['rows']}{keep}"
        found = lines.setdefault((case, ratio["dtype"], ratio["mode"]), {})
        found[ratio["rival"]] = ratio["ratio"]
    for words, found in lines.items():
        table.add_row(*words, *(f"{found[r]:.3f}" if r in found else "" for r in rivals))
    return table
