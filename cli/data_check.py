"""`llava-hd data check`: all records and images of a data set read to the end, and a report."""

from __future__ import annotations

import base64
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ..bench.files import json_text
from ..bench.report import Block, Facts, Note, Picture, Pictures, Section, Table, render
from ..hd.errors import DataError, Interrupted, UsageError
from ..hd.files import check_out, write_whole
from ..hd.grid import PRESETS, get_preset
from ..hd.limits import limited
from ..train.config import TrainConfig, part_folder
from ..train.data_check import Checked, Fault, check_data
from ..train.data_check_report import histogram_png, is_clean, report_of
from ..train.data_check_tokens import CheckSettings
from ..train.recipe import find_recipe, load_config, read_recipe
from ..train.workers import Done, num_cores
from .parser import Parser

SHOWN = 10  # faults that are printed
ON_PAGE = 500  # faults that the page lists
KINDS = {
    "file": "files that cannot be read",
    "record": "records whose form is not right",
    "image": "images that are missing, damaged or refused",
    "sample": "samples with no room for images or answers within the limit",
}


def build_parser(command: str) -> Parser:
    """The options of `llava-hd data check`."""
    parser = Parser(
        command,
        "Read every record and every image of data files (JSON, JSON lines, Parquet, tar), in\n"
        "parallel and to the end, and write report.json, report.html and token_lengths.png. Exit\n"
        "code 0 when all is good, 3 when something is bad; samples over the limit and duplicates\n"
        "are told, but not bad.",
        [
            "llava-hd data check mix665k.json --images images --tokenizer vicuna-7b-v1.5",
            "llava-hd data check a.json b.jsonl --images images --recipe vicuna-7b-hd448",
            "llava-hd data check 'shard-{0000..0099}.tar' train.parquet",
        ],
    )
    add = parser.add_argument
    add("files", type=str, nargs="+", metavar="FILE", help="data files; docs/formats.md")
    add("--images", type=str | None, metavar="DIR", help="root folder of images that records name")
    add("--out", type=str, default="data-check", metavar="DIR", help="folder of the report")
    add("--preset", type=str | None, help=f"geometry: {', '.join(PRESETS)} (default hdflex)")
    add("--recipe", type=str | None, help="training recipe: geometry, template, limit, tokenizer")
    add("--tokenizer", type=str | None, metavar="DIR", help="folder of a model; else estimated")
    add("--max-length", type=int | None, help="limit in tokens (default: the recipe's, or 2048)")
    add("--workers", type=int | None, help="processes; 0 reads in this one (default: all cores)")
    add("--json", action="store_true", help="print report.json instead of lines")
    return parser


def run(args: Namespace) -> int:
    """Check everything, write the report; 3 when something is bad."""
    if args.workers is not None and args.workers < 0:
        raise UsageError(f"--workers {args.workers}: give a number from 0")
    out = Path(args.out)
    check_out(out)
    settings = check_settings(args)
    workers = num_cores() if args.workers is None else args.workers
    try:
        with _bars() as done:
            checked = check_data(args.files, args.images, settings, workers, done)
    except KeyboardInterrupt:
        raise Interrupted("no report was written; start the same command again") from None
    report = report_of(checked, settings)
    report = {"files": list(args.files), "root": args.images, **report}
    _write(out, report, checked, settings)
    if args.json:
        print(json_text(report), end="")
    else:
        _print(report, checked, out)
    return 0 if is_clean(checked) else DataError.exit_code


def check_settings(args: Namespace) -> CheckSettings:
    """Geometry, template, limit and tokenizer of the options, or of the recipe."""
    if args.recipe is None:
        settings = CheckSettings(get_preset(args.preset or "hdflex"))
        values: dict[str, Any] = {}
    else:
        if args.preset is not None:
            raise UsageError("--recipe has a geometry, so --preset has no place; leave one out")
        values = _of_recipe(args.recipe)
        settings = CheckSettings(**values)
    tokenizer = settings.tokenizer
    if args.tokenizer is not None:
        tokenizer = str(part_folder(args.tokenizer))
    return CheckSettings(
        hd=settings.hd,
        template=settings.template,
        max_length=settings.max_length if args.max_length is None else args.max_length,
        tokenizer=tokenizer,
    )


def _of_recipe(name: str) -> dict[str, Any]:
    path = find_recipe(name, "finetune")
    stage = read_recipe(path).get("stage", "finetune")
    config: TrainConfig = load_config(path, str(stage))
    source = config.model
    folder = source.path if source.path is not None else source.language
    hd, template = source.geometry, config.sample_template or source.template
    if source.path is not None:
        # The geometry of a whole model stands in its folder, which transformers reads.
        from ..model.foreign import read_config

        whole = read_config(part_folder(source.path))
        hd = limited(whole.hd, source.limits)
        template = config.sample_template or whole.template
    return {
        "hd": hd,
        "template": template,
        "max_length": config.max_length,
        "tokenizer": None if folder is None else str(part_folder(folder)),
    }


@contextmanager
def _bars() -> Iterator[Done]:
    """A bar for the images and one for the records, on stderr."""
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def done(what: str, count: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=count, total=total)

        yield done


def _write(out: Path, report: dict[str, Any], checked: Checked, settings: CheckSettings) -> None:
    """All three files are made before the first is written."""
    png = histogram_png(checked, settings)
    values = json_text(report)
    page = render("Data check", report_sections(report, checked.faults, png), _headline(report))
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f".token_lengths.png.{os.getpid()}.unfinished"
    try:
        unfinished.write_bytes(png)
        unfinished.replace(out / "token_lengths.png")
    finally:
        unfinished.unlink(missing_ok=True)
    write_whole(out / "report.html", page)
    write_whole(out / "report.json", values)


def _headline(report: dict[str, Any]) -> str:
    bad = sum(report[f"bad_{kind}s"] for kind in KINDS)
    return (
        f"{report['records']:,} records and {report['images']:,} images of "
        f"{', '.join(report['files'])}: {f'{bad:,} faults' if bad else 'nothing is bad'}"
    )


def report_sections(report: dict[str, Any], faults: list[Fault], png: bytes) -> list[Section]:
    """The page: what is bad, lengths, images, duplicates."""
    picture = Picture(
        "data:image/png;base64," + base64.b64encode(png).decode("ascii"),
        "Histogram of the tokens of a sample with the length limit",
    )
    tiles = Table(
        ("tiles (rows x cols)", "images", "share"),
        [
            (grid, f"{count:,}", f"{count / sum(report['tiles'].values()):.1%}")
            for grid, count in report["tiles"].items()
        ],
    )
    limit = report["limit"]
    verdict = (
        f"max_length {limit['max_length']} cuts the end off {limit['cut']:,} samples "
        f"({limit['share']:.2%})."
    )
    length_blocks: list[Block] = [
        Note(verdict, "warning" if limit["cut"] else "good"),
        Pictures([picture]),
        _spread_table(report, ("tokens", "visual_tokens")),
    ]
    sizes = _spread_table(report, ("image_height_px", "image_width_px"))
    return [
        Section("What is bad", "", _fault_blocks(report, faults)),
        Section("Lengths", _how_counted(report), length_blocks),
        Section("Images", "", [tiles, sizes]),
        Section("Duplicates", "Reported, but not counted as bad.", _duplicate_blocks(report)),
    ]


def _fault_blocks(report: dict[str, Any], faults: list[Fault]) -> list[Block]:
    text = report["text_only"]
    pairs = [(words, f"{report[f'bad_{kind}s']:,}") for kind, words in KINDS.items()]
    pairs.append(("records without an image", f"{text['records']:,} ({text['share']:.2%})"))
    if not faults:
        return [Note("Every record and every image can be read.", "good"), Facts(pairs)]
    rows = [(f"{fault.kind}: {fault.where}: {fault.reason}",) for fault in faults[:ON_PAGE]]
    more = f"The first {ON_PAGE} of {len(faults):,}; report.json has all."
    caption = more if len(faults) > ON_PAGE else ""
    return [
        Note(f"{len(faults):,} faults.", "warning"),
        Facts(pairs),
        Table(("kind, place, reason and remedy",), rows, caption),
    ]


def _how_counted(report: dict[str, Any]) -> str:
    if report["tokens_are"] == "exact":
        return "Tokens are counted by the tokenizer, as in training."
    return (
        f"Text tokens are estimated at {report['characters_per_token']} characters each (no "
        "tokenizer was given); visual tokens are exact."
    )


def _spread_table(report: dict[str, Any], names: tuple[str, ...]) -> Table:
    columns = ("min", "p05", "median", "p95", "p99", "max", "mean")
    rows = [
        (name.replace("_", " "), *(f"{report[name][column]:,.0f}" for column in columns))
        for name in names
        if report[name] is not None
    ]
    return Table(("", *columns), rows)


def _duplicate_blocks(report: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for name, found in report["duplicates"].items():
        words = name.replace("_", " ")
        rows = [(" = ".join(group),) for group in found["examples"]]
        blocks.append(Facts([(f"records with the {words} as another", f"{found['records']:,}")]))
        if rows:
            blocks.append(Table((f"the first groups of the {words}",), rows))
    return blocks


def _print(report: dict[str, Any], checked: Checked, out: Path) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for fault in checked.faults[:SHOWN]:
        console.print(f"{fault.kind}: {fault.where}: {fault.reason}")
    if len(checked.faults) > SHOWN:
        console.print(f"... and {len(checked.faults) - SHOWN:,} more in {out / 'report.json'}")
    console.print(_headline(report))
    text, limit, tokens = report["text_only"], report["limit"], report["tokens"]
    console.print(f"{text['records']:,} records without an image ({text['share']:.2%})")
    if tokens is not None:
        console.print(
            f"tokens ({report['tokens_are']}): median {tokens['median']:,.0f}, longest "
            f"{tokens['max']:,.0f}; max_length {limit['max_length']} cuts {limit['cut']:,} "
            f"({limit['share']:.2%})"
        )
    tiles = ", ".join(f"{grid} {count:,}" for grid, count in report["tiles"].items())
    if tiles:
        console.print(f"tiles: {tiles}")
    for name, found in report["duplicates"].items():
        console.print(f"duplicates, {name.replace('_', ' ')}: {found['records']:,}")
    console.print(f"report: {out / 'report.html'}, {out / 'report.json'}")
