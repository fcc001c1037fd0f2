"""`llava-hd data mix`: the instruction mixture out of public annotation files, with its counts."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..hd.errors import Interrupted
from ..train.mixture import MixtureSummary, check_inputs, summary_path, write_mixture
from ..train.mixture_kinds import RELEASED
from ..train.mixture_recipe import load_mixture, mixture_names
from .parser import Parser

MODALITY = "the trainer keeps one modality per batch with data.batching: modality"


def build_parser(command: str) -> Parser:
    """The options of `llava-hd data mix`."""
    parser = Parser(
        command,
        "Build the instruction mixture of LLaVA-1.5 from the public annotation files in their own\n"
        "formats: LLaVA JSON with a summary beside it. The same seed gives the same file, byte\n"
        "for byte; 0.3 of a mixture is contained in 0.5 of it. Shipped recipes: "
        f"{', '.join(mixture_names())}.",
        [
            "llava-hd data mix llava-665k --annotations annotations --out mix665k.json",
            "llava-hd data mix my.yaml --fraction 0.3 --out mix30.json --json",
        ],
    )
    add = parser.add_argument
    add("recipe", type=str, metavar="RECIPE", help="a shipped recipe or a YAML file")
    add("--out", type=str, default="mixture.json", metavar="FILE", help="the LLaVA JSON")
    add("--annotations", type=str, default=".", metavar="DIR", help="folder of the recipe's files")
    add("--seed", type=int | None, help="seed of all that is drawn, instead of the recipe's")
    add("--fraction", type=float | None, help="share of every source, above 0 and at most 1")
    add("--json", action="store_true", help="print the summary as JSON instead of tables")
    return parser


def run(args: Namespace) -> int:
    """Write the mixture and tell its counts."""
    recipe = load_mixture(args.recipe)
    given = {name: getattr(args, name) for name in ("seed", "fraction")}
    recipe = replace(recipe, **{name: v for name, v in given.items() if v is not None})
    annotations, out = Path(args.annotations), Path(args.out)
    check_inputs(recipe, annotations, out)
    errors = Console(stderr=True)
    try:
        with errors.status("reading") as status:
            summary = write_mixture(
                recipe, annotations, out, lambda source: status.update(f"reading {source.name}")
            )
    except KeyboardInterrupt:
        raise Interrupted("nothing was written; start the same command again") from None
    if args.json:
        print(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False))
        return 0
    console = Console(markup=False)
    console.print(_sources_table(summary))
    for source in summary.sources:
        for reason, count in source.skipped.items():
            console.print(f"{source.name}: left out {count:,} x {reason}")
    console.print(_folders_table(summary))
    console.print(f"{summary.records:,} records in {out}, counts in {summary_path(out)}")
    console.print(MODALITY, style="dim")
    return 0


def _sources_table(summary: MixtureSummary) -> Table:
    """Conversations by source, ours beside the paper's."""
    title = f"conversations by source, fraction {summary.fraction:g}, seed {summary.seed}"
    table = _table(title, ["source", "in the files", "left out", "written", "paper", ""])
    for one in summary.sources:
        table.add_row(
            one.name,
            f"{one.read:,}",
            f"{sum(one.skipped.values()):,}",
            f"{one.written:,}",
            "-" if one.paper is None else f"{one.paper:,}",
            f"differs by {one.written - one.paper:+,}" if one.differs and one.paper else "",
        )
    values = summary.to_dict()
    paper, missing = values["paper"]["records"], values["missing_sources"]
    note = f"without {', '.join(missing)}" if missing else ""
    table.add_section()
    table.add_row("all", "", "", f"{summary.records:,}", f"{paper:,}", note, style="bold")
    return table


def _folders_table(summary: MixtureSummary) -> Table:
    """Records by image folder, ours beside the released file's (they differ in little)."""
    released = summary.to_dict()["released"]["folders"]
    table = _table("records by image folder", ["folder", "written", "llava_v1_5_mix665k.json"])
    for folder in dict.fromkeys([*RELEASED, *summary.folders]):
        theirs = f"{released[folder]:,}" if folder in released else "-"
        table.add_row(folder or "no image", f"{summary.folders.get(folder, 0):,}", theirs)
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        is_text = place == 0 or not name
        table.add_column(name, justify="left" if is_text else "right", no_wrap=bool(name))
    return table
