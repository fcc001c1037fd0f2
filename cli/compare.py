"""`llava-hd compare`: models' POPE answers side by side, paired statistics, a report."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.bootstrap import MIN_RESAMPLES
from ..bench.compare import ALL, MEAN, Comparison, Pair, compare
from ..bench.contestants import (
    Contestant,
    check_names,
    check_same_questions,
    contestant_names,
    holds_images,
    power_words,
    read_contestant,
    run_facts,
    show_p,
    verdicts,
    warnings_of,
)
from ..bench.pope import PARSERS
from ..bench.pope_data import split_files
from ..bench.question_sets import question_sets
from ..hd.errors import UsageError
from ..hd.files import check_out
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd compare`."""
    parser = Parser(
        command,
        "Compare models' answers to the same POPE questions: scores side by side, differences\n"
        "with 95 % intervals (bootstrap over images), McNemar's exact test and its power,\n"
        "agreement, F1 by the size of objects. Give output folders of `llava-hd eval pope`, or\n"
        "answers files; each model is set against the first. report.html, report.json and the\n"
        "charts as PNG go to --out.",
        [
            "llava-hd compare runs/base336 runs/hd448 --out runs/comparison",
            "llava-hd compare runs/base336 runs/hd448 runs/hdflex --names 336 448 flex",
            "llava-hd compare a.jsonl b.jsonl --questions pope --images val2014 --json",
        ],
    )
    add = parser.add_argument
    add("runs", type=str, nargs="+", metavar="RUN", help="two models' answers, or more")
    add("--out", type=str, default="comparison", metavar="DIR", help="folder of the report")
    add("--names", type=str, nargs="+", metavar="NAME", help="what to call the models, in order")
    add("--parser", type=str, default="original", help=f"{' or '.join(PARSERS)}")
    add("--images", type=str | None, metavar="DIR", help="images for the examples, if moved")
    add("--boxes", type=str | None, metavar="FILE", help="boxes.json, or COCO's instances_*.json")
    add("--questions", type=str, nargs="+", metavar="FILE", help="where answers have no labels")
    add(
        "--labels", type=str | None, metavar="DIR", help="POPE's label files, for LLaVA's questions"
    )
    add("--resamples", type=int, default=10_000, help="bootstrap resamples")
    add("--seed", type=int, default=0, help="seed of the bootstrap")
    add("--json", action="store_true", help="print report.json instead of tables")
    return parser


def run(args: Namespace) -> int:
    """Read all sides, compare, write the report, print."""
    _check_options(args)
    out = Path(args.out)
    check_out(out)
    questions = split_files(args.questions or [])
    labels = split_files([args.labels]) if args.labels else []
    names = args.names or contestant_names(args.runs)
    check_names(names, len(args.runs))
    sides = [
        read_contestant(name, path, questions, labels)
        for name, path in zip(names, args.runs, strict=True)
    ]
    check_same_questions(sides)
    answers = {side.name: side.answered for side in sides}
    comparison = compare(answers, args.parser, args.resamples, args.seed)
    images = _images(args.images, sides)
    # Only the report needs torch, to draw what the models see.
    from ..bench.compare_report import CHARTS, comparison_json, write_comparison
    from ..bench.compare_sizes import by_size

    boxes = _boxes(args.boxes, images)
    sizes = by_size(answers, boxes, args.parser, args.resamples, args.seed) if boxes else None
    write_comparison(out, sides, comparison, images, sizes)
    if args.json:
        print(json.dumps(comparison_json(sides, comparison, sizes), indent=2))
    else:
        _print(Console(), sides, comparison)
        pictures = "" if images else " (without pictures: give their folder with --images)"
        print(f"report: {out / 'report.html'}{pictures}, {out / 'report.json'}, {out / CHARTS}")
    return 0


def _check_options(args: Namespace) -> None:
    if len(args.runs) < 2:
        raise UsageError(f"only {args.runs[0]} is given; a comparison needs two models or more")
    if args.parser not in PARSERS:
        raise UsageError(f"--parser {args.parser!r} is unknown; there is {', '.join(PARSERS)}")
    for option, value, least in (
        ("seed", args.seed, 0),
        ("resamples", args.resamples, MIN_RESAMPLES),
    ):
        if value < least:
            raise UsageError(f"--{option} {value}: give a number from {least}")


def _images(given: str | None, sides: Sequence[Contestant]) -> Path | None:
    """The folder of the images: as given, or from the record of a run if some are still there."""
    if given is not None:
        if not holds_images(Path(given), sides[0]):
            name = sides[0].answered[0].image
            raise UsageError(
                f"--images {given}: {name} is not in it, nor is any other of the images; "
                "give the right folder"
            )
        return Path(given)
    for side in sides:
        if side.run is not None and holds_images(Path(side.run.images), sides[0]):
            return Path(side.run.images)
    return None


def _boxes(given: str | None, images: Path | None) -> Path | None:
    """The file of the boxes: as given, or boxes.json beside the images' folder if there is one."""
    from ..bench.compare_sizes import BOXES

    if given is not None:
        return Path(given)
    beside = images.parent / BOXES if images else None
    return beside if beside and beside.is_file() else None


def _print(console: Console, sides: Sequence[Contestant], comparison: Comparison) -> None:
    for pair in comparison.from_first:
        console.print(_scores_table(pair, comparison))
    console.print(_tests_table(comparison))
    said = [text for text, _ in verdicts(comparison)]
    for line in [*said, *map(power_words, comparison.from_first)]:
        console.print(line, highlight=False, markup=False)
    for line in warnings_of(sides, comparison):
        console.print(line, style="yellow", highlight=False, markup=False)
    console.print(
        f"{comparison.parser} parser; {comparison.num_questions} questions, "
        f"{comparison.num_images} images; {comparison.resamples} resamples, seed {comparison.seed}",
        highlight=False,
    )
    for entry in question_sets(sides[0].answered):
        text = f"{entry.split}: {entry.text}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for side in sides:
        for name, value in run_facts(side):
            text = f"{side.name}: {name}: {'; '.join(value.splitlines())}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _scores_table(pair: Pair, comparison: Comparison) -> Table:
    title = f"{pair.a} (A) and {pair.b} (B)"
    table = _table(title, ["split", "", "A", "B", "B - A", "95 %", "p"])
    for split, figures in pair.difference.items():
        for metric, name in (("f1", "F1"), ("accuracy", "accuracy"), ("yes_ratio", "yes ratio")):
            difference = figures[metric]
            table.add_row(
                split if metric == "f1" else "",
                name,
                *(f"{comparison.models[x][split][metric].value:.4f}" for x in (pair.a, pair.b)),
                f"{difference.value:+.4f}",
                "" if difference.few_images else f"{difference.low:+.4f} {difference.high:+.4f}",
                show_p(difference.p),
                style="bold" if split == MEAN else "",
            )
        table.add_section()
    return table


def _tests_table(comparison: Comparison) -> Table:
    many = len(comparison.names) > 2
    columns = ["pair, all questions" if many else "split", "only A", "only B", "exact p"]
    columns += ["adjusted"] if many else []
    title = "McNemar: questions that exactly one of them has right"
    table = _table(f"{title} (adjusted: Holm, for all pairs)" if many else title, columns)
    for pair in comparison.pairs:
        # Of many pairs all questions together, or the splits would hide them.
        tests = {ALL: pair.mcnemar[ALL]} if many else pair.mcnemar
        for split, test in tests.items():
            style = "bold" if split == ALL and not many else ""
            row = [str(test.only_a), str(test.only_b), show_p(test.p)]
            if many:
                row = [f"A {pair.a}, B {pair.b}", *row, show_p(pair.mcnemar_adjusted)]
            table.add_row(*(row if many else [split, *row]), style=style)
        if not many:
            table.add_section()
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        # Names may wrap; a figure that is cut off would be another figure.
        table.add_column(name, justify="right" if place else "left", no_wrap=bool(place))
    return table
