"""`llava-hd bench step`: whole training steps of ours and of transformers' LlavaNext, in turn."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.step_options import DESCRIPTION, EXAMPLES, OURS, add_options, request_of
from .bench_output import command_line
from .parser import Parser

WIDEST = 124  # characters of the table
FIGURES = ("useful tokens/s", "images/s", "MFU", "peak MiB", "loading", "padding", "loss differs")


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench step`."""
    parser = Parser(command, DESCRIPTION, [f"llava-hd {command} {words}" for words in EXAMPLES])
    add_options(parser)
    return parser


def run(args: Namespace) -> int:
    """Measure, write the results, print the tables (or JSON)."""
    import torch

    from ..bench.step import finish

    command = command_line()
    request = request_of(args, command, torch.cuda.device_count())
    show = partial(_print, Console())
    return finish(request, args.json, show, args.profile)


def _print(console: Console, record: dict[str, Any]) -> None:
    """A table for each stage, or for growth; then the goals and the notes."""
    for curve in record.get("curves", ()):
        console.print(f"{curve['axis']}: {curve['words']}", highlight=False, markup=False)
    wide = Console(width=max(console.width, WIDEST))  # a figure that is cut off is none
    for stage in dict.fromkeys(row["stage"] for row in record.get("rows", ())):
        wide.print(_table(stage, record))
    failed = [row for row in record.get("rows", ()) if row["reason"]]
    for line in dict.fromkeys(f"{row['competitor']}: {row['reason']}" for row in failed):
        console.print(line, highlight=False, markup=False)
    for target in record.get("targets", ()):
        reached = "reached" if target["reached"] else "not reached"
        line = f"{target['what']}: {target['value']:.3g}, goal {target['goal']}: {reached}"
        console.print(line, highlight=False, markup=False)
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


def _table(stage: int, record: dict[str, Any]) -> Table:
    ratios = {(one["stage"], one["rival"]): one for one in record["ratios"]}
    on_gpu = record["environment"]["device_type"] == "cuda"
    title = f"stage {stage}: the time of each over that of {OURS}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("who", no_wrap=True)
    for name in (f"/ {OURS}", "by CPU time", *FIGURES):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        if row["stage"] != stage:
            continue
        if row["reason"]:
            continue  # told below the tables
        ratio = ratios.get((stage, row["competitor"]))
        table.add_row(
            row["competitor"],
            "" if ratio is None else f"{ratio['ratio']:.2f}",
            "" if ratio is None or on_gpu else f"{ratio['cpu_ratio']:.2f}",
            f"{row['useful_tokens_per_second']:,.1f}",
            f"{row['images_per_second']:.2f}",
            f"{row['mfu']:.1%}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            f"{row['loading_share']:.1%}",
            f"{row['padding']:.1%}",
            f"{row['largest_loss_difference']:.1e}",
        )
    return table
