"""`llava-hd demo`: the whole job at nano size, with progress and a report."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .parser import Parser
from .step_bars import StepBars

if TYPE_CHECKING:
    from ..bench.demo import DemoSettings


def build_parser(command: str) -> Parser:
    """Options of `llava-hd demo`."""
    parser = Parser(
        command,
        "Draw scenes with small objects, train a base and an HD model in two stages with "
        "DeepSpeed, ask both POPE's questions, compare. Takes a few minutes on two CPU cores; an "
        "interrupted demo goes on when the same command is given again.",
        ["llava-hd demo --out runs/demo", "llava-hd demo --seed 1 --out runs/demo-1 --json"],
    )
    parser.add_argument("--out", type=str, default="runs/demo", help="folder of everything made")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, data order and weights")
    parser.add_argument("--train-scenes", type=int, default=None, help="scenes of each stage")
    parser.add_argument("--test-scenes", type=int, default=None, help="held-out scenes")
    parser.add_argument("--steps-1", type=int, default=None, help="steps of stage 1")
    parser.add_argument("--steps-2", type=int, default=None, help="steps of stage 2")
    parser.add_argument("--json", action="store_true", help="print report.json at the end")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet, write the report, print the table."""
    from ..bench import demo
    from ..bench.files import write_json
    from ..bench.nano_steps import run_steps
    from ..bench.scenes import draw_dataset

    given = {name: getattr(args, name) for name in DEMO_OPTIONS if getattr(args, name) is not None}
    settings = demo.DemoSettings(**given)
    out = Path(args.out)
    demo.check_folder(out, settings)
    console = Console(stderr=True)
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / demo.SETTINGS_FILE, asdict(settings))
    with StepBars(console) as show:
        if not (out / "data" / "boxes.json").is_file():
            draw_dataset(
                out / "data",
                settings.train_scenes,
                settings.test_scenes,
                settings.seed,
                progress=lambda done, total: show("data", "scenes", done / total),
            )
        show("data", "scenes", 1.0)
        chains = {model: demo.chain(model, out, settings) for model in demo.MODELS}
        times = out / demo.TIMES_FILE
        seconds = run_steps(chains, len(chains), times, show, "demo")
    report = demo.write_demo_report(out, settings, seconds)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, out, settings, time.monotonic() - start)
    return 0


DEMO_OPTIONS = ("seed", "train_scenes", "test_scenes", "steps_1", "steps_2")


def _print(report: dict[str, Any], out: Path, settings: DemoSettings, seconds: float) -> None:
    from ..bench.contestants import show_p

    console = Console()
    table = Table(title=f"POPE at nano size, {settings.test_scenes} held-out scenes (F1)")
    models = report["models"]
    splits = [split for split in next(iter(models.values())) if split != "strict"]
    for title in ("model", *splits):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, scores in models.items():
        table.add_row(name, *(f"{scores[split]['f1']:.4f}" for split in splits))
    console.print(table)
    difference = report["comparison"]["pairs"][0]["difference"]["mean"]["f1"]
    console.print(
        f"hd - base, mean F1: {difference['value']:+.4f} "
        f"[{difference['low']:+.4f}, {difference['high']:+.4f}], "
        f"p {show_p(difference['p']) or 'not given: too few scenes'}",
        highlight=False,
    )
    console.print("One run each: the interval covers the questions, another seed may differ.")
    console.print(f"{seconds:.0f} s; report: {out / 'report.html'}", highlight=False)
