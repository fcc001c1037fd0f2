"""`llava-hd compare`: two models' POPE answers side by side, paired statistics, a report."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.compare import ALL, MEAN, MIN_RESAMPLES, Comparison, compare
from ..bench.contestants import (
    Contestant,
    contestant_names,
    holds_images,
    read_contestant,
    run_facts,
    show_p,
    verdict,
    warnings_of,
)
from ..bench.files import check_out
from ..bench.pope import PARSERS
from ..bench.pope_data import split_files
from ..hd.errors import UsageError
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd compare`."""
    parser = Parser(
        command,
        "Compare two models' answers to the same POPE questions: scores side by side,\n"
        "differences with 95 % intervals (bootstrap over images), McNemar's exact test.\n"
        "A and B are output folders of `llava-hd eval pope`, or answers files; report.html\n"
        "and report.json go to --out.",
        [
            "llava-hd compare runs/base336 runs/hd448 --out runs/comparison",
            "llava-hd compare a.jsonl b.jsonl --questions pope --images val2014 --json",
        ],
    )
    add = parser.add_argument
    add("a", type=str, metavar="A", help="the first model's answers")
    add("b", type=str, metavar="B", help="the second model's; differences are B minus A")
    add("--out", type=str, default="comparison", metavar="DIR", help="folder of the report")
    add("--names", type=str, nargs=2, metavar="NAME", help="what to call A and B")
    add("--parser", type=str, default="original", help=f"{' or '.join(PARSERS)}")
    add("--images", type=str | None, metavar="DIR", help="images for the examples, if moved")
    add("--questions", type=str, nargs="+", metavar="FILE", help="where answers have no labels")
    add(
        "--labels", type=str | None, metavar="DIR", help="POPE's label files, for LLaVA's questions"
    )
    add("--resamples", type=int, default=10_000, help="bootstrap resamples")
    add("--seed", type=int, default=0, help="seed of the bootstrap")
    add("--json", action="store_true", help="print report.json instead of tables")
    return parser


def run(args: Namespace) -> int:
    """Read both sides, compare, write the report, print."""
    if args.parser not in PARSERS:
        raise UsageError(f"--parser {args.parser!r} is unknown; there is {', '.join(PARSERS)}")
    for option, value, least in (
        ("seed", args.seed, 0),
        ("resamples", args.resamples, MIN_RESAMPLES),
    ):
        if value < least:
            raise UsageError(f"--{option} {value}: give a number from {least}")
    out = Path(args.out)
    check_out(out)
    questions = split_files(args.questions or [])
    labels = split_files([args.labels]) if args.labels else []
    names = args.names or contestant_names(args.a, args.b)
    if names[0] == names[1]:
        raise UsageError(f"A and B are both called {names[0]!r}; tell them apart with --names")
    a, b = (
        read_contestant(name, path, questions, labels)
        for name, path in zip(names, (args.a, args.b), strict=True)
    )
    paths = (str(a.answers), str(b.answers))
    comparison = compare(a.answered, b.answered, args.parser, args.resamples, args.seed, paths)
    images = _images(args.images, a, b)
    # Only the report needs torch, to draw what the models see.
    from ..bench.compare_report import comparison_json, write_comparison

    write_comparison(out, a, b, comparison, images)
    if args.json:
        print(json.dumps(comparison_json(a, b, comparison), indent=2))
    else:
        _print(Console(), a, b, comparison)
        pictures = "" if images else " (without pictures: give their folder with --images)"
        print(f"report: {out / 'report.html'}{pictures}, {out / 'report.json'}")
    return 0


def _images(given: str | None, a: Contestant, b: Contestant) -> Path | None:
    """The folder of the images: as given, or from the record of a run if some are still there."""
    if given is not None:
        if not holds_images(Path(given), a):
            name = a.answered[0].image
            raise UsageError(
                f"--images {given}: {name} is not in it, nor is any other of the images; "
                "give the right folder"
            )
        return Path(given)
    for side in (a, b):
        if side.run is not None and holds_images(Path(side.run.images), a):
            return Path(side.run.images)
    return None


def _print(console: Console, a: Contestant, b: Contestant, comparison: Comparison) -> None:
    console.print(_scores_table(a, b, comparison))
    console.print(_tests_table(a, b, comparison))
    console.print(verdict(a.name, b.name, comparison), highlight=False, markup=False)
    for line in warnings_of(a, b, comparison):
        console.print(line, style="yellow", highlight=False, markup=False)
    console.print(
        f"{comparison.parser} parser; {comparison.num_questions} questions, "
        f"{comparison.num_images} images; {comparison.resamples} resamples, seed {comparison.seed}",
        highlight=False,
    )
    for side in (a, b):
        for name, value in run_facts(side):
            text = f"{side.name}: {name}: {'; '.join(value.splitlines())}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _scores_table(a: Contestant, b: Contestant, comparison: Comparison) -> Table:
    table = _table(f"{a.name} (A) and {b.name} (B)", ["split", "", "A", "B", "B - A", "95 %", "p"])
    for split, figures in comparison.difference.items():
        for metric, name in (("f1", "F1"), ("accuracy", "accuracy"), ("yes_ratio", "yes ratio")):
            difference = figures[metric]
            table.add_row(
                split if metric == "f1" else "",
                name,
                f"{comparison.a[split][metric].value:.4f}",
                f"{comparison.b[split][metric].value:.4f}",
                f"{difference.value:+.4f}",
                "" if difference.few_images else f"{difference.low:+.4f} {difference.high:+.4f}",
                show_p(difference.p),
                style="bold" if split == MEAN else "",
            )
        table.add_section()
    return table


def _tests_table(a: Contestant, b: Contestant, comparison: Comparison) -> Table:
    columns = ["split", "only A right", "only B right", "exact p"]
    table = _table("McNemar: questions that exactly one of them has right", columns)
    for split, test in comparison.mcnemar.items():
        style = "bold" if split == ALL else ""
        table.add_row(split, str(test.only_a), str(test.only_b), show_p(test.p), style=style)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    return table
