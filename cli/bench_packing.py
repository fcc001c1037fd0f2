"""`llava-hd bench packing`: packs against padded batches on lengths like those of HD training."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .bench_output import command_line, measure_and_show, out_folder
from .parser import Parser

DESCRIPTION = """Train a nano HD model with token-budget packs, with batches padded to their longest
sample, and with LLaVA's batches by modality, the same samples in each step, in turns. Prints useful
tokens per second, the share of padding, the ratios, and how far the losses differ. Two settings of
lengths: hd (pictures of all sizes, long-tailed answers) and mix665k (like LLaVA's stage 2).
packing.json and packing.csv go to bench/results/DEVICE/DATE or to --out."""
EXAMPLES = ("--quick", "--lengths hd --batch 8 --out runs/packing", "--quick --json")


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench packing`."""
    parser = Parser(command, DESCRIPTION, [f"llava-hd {command} {words}" for words in EXAMPLES])
    add = parser.add_argument
    add("--lengths", nargs="+", choices=("hd", "mix665k"), help="settings of lengths; both")
    add("--batch", type=int, default=16, help="samples of a padded batch; of a pack on average")
    add("--step-samples", type=int, help="samples of a step; 128, with --quick 32")
    add("--steps", type=int, help="timed steps of each setting; 10, with --quick 3")
    add("--seed", type=int, default=0, help="of samples, order and weights")
    add("--quick", action="store_true", help="small steps: half a minute on one core")
    add("--out", type=str, metavar="DIR", help="folder of the results")
    add("--json", action="store_true", help="print rows and ratios as JSON")
    return parser


def run(args: Namespace) -> int:
    """Measure, write the results, print the tables (or JSON)."""
    from ..bench.packing import RECORD, Request, run_benchmark
    from ..bench.packing_data import SETTINGS

    usual = (32, 3) if args.quick else (128, 10)
    request = Request(
        settings=tuple(dict.fromkeys(args.lengths)) if args.lengths else SETTINGS,
        batch=args.batch,
        step_samples=usual[0] if args.step_samples is None else args.step_samples,
        steps=usual[1] if args.steps is None else args.steps,
        seed=args.seed,
        out=out_folder(args),
        command=command_line(),
    )
    shown = ("lengths", "rows", "ratios")
    return measure_and_show(partial(run_benchmark, request), _print, args, shown, RECORD)


def _print(console: Console, record: dict[str, Any]) -> None:
    """A table for each setting of lengths: who, how fast, how much padding, against packs."""
    ratios = {(one["lengths"], one["rival"]): one for one in record["ratios"]}
    for setting, facts in record["lengths"].items():
        marks = facts["percentiles"]
        title = (
            f"{setting}: {facts['mean']:.0f} tokens a sample ({marks['5']} to {marks['95']} of "
            f"nine in ten), {facts['with_image']:.0%} with a picture"
        )
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("batches", no_wrap=True)
        for name in ("useful tokens/s", "padding", "packs / this", "by CPU time", "loss differs"):
            table.add_column(name, justify="right")
        for row in record["rows"]:
            if row["lengths"] == setting:
                ratio = ratios.get((setting, row["contestant"]))
                table.add_row(
                    row["contestant"],
                    f"{row['useful_tokens_per_second']:,.0f}",
                    f"{row['padding']:.1%}",
                    "" if ratio is None else f"{ratio['ratio']:.3f}",
                    "" if ratio is None else f"{ratio['cpu_ratio']:.3f}",
                    f"{row['largest_loss_difference']:.1e}",
                )
        console.print(table)
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
