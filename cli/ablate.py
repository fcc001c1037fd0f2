"""`llava-hd ablate`: variants of the nano recipe trained, asked and compared, by a plan."""

from __future__ import annotations

import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..hd.errors import UsageError
from ..hd.grid import suggest
from .parser import Parser
from .sigterm import sigterm_is_ctrl_c
from .step_bars import StepBars

if TYPE_CHECKING:
    from ..bench.ablate import Run
    from ..bench.ablate_plan import Plan

DESCRIPTION = """Train and ask variants of the nano HD recipe, each with several seeds, and set what
comes out beside the paper's tables: linear projector, other resolutions, no global view, no
row-ends, less data, no format prompt. A plan is a YAML file, or the name of a shipped one (paper,
tiny). What is done is not done again; an interrupted run goes on when the same command is given
again."""


def build_parser(command: str) -> Parser:
    """The options of `llava-hd ablate`."""
    parser = Parser(
        command,
        DESCRIPTION,
        [
            "llava-hd ablate paper --dry-run",
            "llava-hd ablate paper --out runs/ablations",
            "llava-hd ablate my.yaml --only linear --out runs/mine --json",
        ],
    )
    add = parser.add_argument
    add("plan", type=str, help="a plan's file, or the name of a shipped one")
    add("--out", type=str, default="runs/ablations", metavar="DIR", help="folder of everything")
    add("--only", type=str, nargs="+", default=[], metavar="NAME", help="only these variants")
    add("--jobs", type=int, default=2, help="runs side by side, each with its part of the cores")
    add("--dry-run", action="store_true", help="list the runs, their steps and time; run nothing")
    add("--page", type=str | None, metavar="FILE", help="the report as Markdown, with its chart")
    add("--record", type=str | None, metavar="FILE", help="report.json once more, at this place")
    add("--json", action="store_true", help="print report.json (or the list of --dry-run)")
    return parser


def run(args: Namespace) -> int:
    """Run what is not done, write the report, print the table."""
    from ..bench import ablate
    from ..bench.ablate_plan import load_plan
    from ..bench.nano_steps import DONE

    plan, out = load_plan(args.plan), Path(args.out)
    _check(args, plan)
    ablate.check_folder(out)
    runs = ablate.runs_of(plan, out, args.only)
    if args.dry_run:
        return _dry_run(plan, runs, out, args)
    console, start = Console(stderr=True), time.monotonic()
    with sigterm_is_ctrl_c(), StepBars(console, finished=DONE) as show:
        ablate.run_plan(plan, runs, out, args.jobs, show)
    return _report(plan, out, args, console, time.monotonic() - start)


def _check(args: Namespace, plan: Plan) -> None:
    for name in args.only:
        if name not in plan.variants:
            raise UsageError(f"--only {name!r} is no variant; {suggest(name, plan.variants)}")
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: give a number from 1")


def _dry_run(plan: Plan, runs: Sequence[Run], out: Path, args: Namespace) -> int:
    """List the runs with what is left of them; the time is that of `--jobs` processes."""
    from ..bench.ablate import TIMES_FILE, estimated_seconds
    from ..bench.nano_steps import EVAL, TRAINING, read_seconds

    left = estimated_seconds(runs, read_seconds(out / TIMES_FILE))
    entries = [
        {
            "variant": run.variant,
            "seed": run.seed,
            "steps": {step.name: step.total for step in run.steps},
            "done": run.is_done,
            "seconds_left": round(left[run.name]),
        }
        for run in runs
    ]
    minutes = sum(left.values()) / args.jobs / 60
    if args.json:
        print(json.dumps({"runs": entries, "minutes_left": round(minutes, 1)}, indent=2))
        return 0
    table = Table(title=f"{len(runs)} runs, {plan.test_scenes} held-out scenes")
    for title in ("run", "stage 1", "stage 2", "questions", "left"):
        table.add_column(title, justify="left" if title == "run" else "right")
    for run in runs:
        totals = {step.name: str(step.total) for step in run.steps}
        counts = [totals.get(name, "shared") for name in (*TRAINING, EVAL)]
        table.add_row(run.name, *counts, "done" if run.is_done else f"{left[run.name]:.0f} s")
    console = Console()
    console.print(table)
    console.print(
        f"about {minutes:.0f} min with {args.jobs} jobs, at the speed of what is done in {out}, or "
        "of idle cores where nothing is; drawing the scenes is not in it",
        highlight=False,
    )
    return 0


def _report(plan: Plan, out: Path, args: Namespace, console: Console, seconds: float) -> int:
    """The report of all variants that are done; a sentence where they are too few."""
    from ..bench.ablate_report import write_ablations
    from ..bench.ablate_results import find_results

    results = find_results(plan, out)
    if results is None:
        console.print(f"{seconds:.0f} s; no report yet: the variants to compare are not all done")
        return 0
    command = shlex.join(["llava-hd", *sys.argv[1:]])
    page = Path(args.page) if args.page else None
    values = write_ablations(
        results, out, command, page, Path(args.record) if args.record else None
    )
    if args.json:
        print(json.dumps(values, indent=2))
        return 0
    shown = Console()
    table = Table(title="POPE at nano size, mean F1 of three splits")
    for title in ("variant", "F1", "against", "difference", "verdict"):
        table.add_column(title, justify="right" if title in ("F1", "difference") else "left")
    for name, entry in values["variants"].items():
        gap = entry["difference"]
        cells = ["", "", ""]
        if gap:
            cells = [gap["against"], f"{gap['value']:+.4f}", gap["verdict"]]
        table.add_row(name, f"{entry['f1']['value']:.4f}", *cells)
    shown.print(table)
    shown.print(f"{seconds:.0f} s; report: {out / 'report.html'}", highlight=False)
    return 0
