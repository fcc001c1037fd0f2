"""`llava-hd eval pack`: a benchmark's local files as a task pack that lmms-eval runs offline."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..bench.pack_kinds import KINDS
from ..bench.task_packs import PackSummary, write_pack
from ..hd.errors import UsageError
from ..hd.grid import suggest
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd eval pack`."""
    kinds = "\n".join(f"  {name:<18} {kind.wants}" for name, kind in KINDS.items())
    parser = Parser(
        command,
        "Turn a benchmark's own files into a folder that lmms-eval runs without a network: YAML,\n"
        "questions as JSON lines, and the images that they name. The prompts are those of\n"
        f"LLaVA-1.5's paper, the scores lmms-eval's.\n\nbenchmarks, and what --annotations is:\n"
        f"{kinds}",
        [
            "llava-hd eval pack pope --annotations pope --images val2014 --out packs/pope",
            "llava-hd eval pack mmbench --annotations mmbench_dev_20230712.tsv --out packs/mmbench",
            "HF_HUB_OFFLINE=1 lmms-eval --model llava_hd --model_args pretrained=runs/hd \\",
            "    --include_path packs/pope --tasks llava_hd_pope_random --batch_size 16",
        ],
    )
    add = parser.add_argument
    add("benchmark", type=str, metavar="BENCHMARK", help="one of the names above")
    add("--annotations", type=str, nargs="+", required=True, metavar="FILE", help="its files")
    add("--images", type=str | None, metavar="DIR", help="folder of its images")
    add("--out", type=str, required=True, metavar="DIR", help="the pack, a new folder")
    add("--limit", type=int | None, help="only the first N questions of each split")
    add("--json", action="store_true", help="print what was written as JSON")
    return parser


def run(args: Namespace) -> int:
    """Write the pack and tell how to run it."""
    if args.benchmark not in KINDS:
        raise UsageError(
            f"benchmark {args.benchmark!r} is unknown; {suggest(args.benchmark, KINDS)}"
        )
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit}: give a number from 1")
    files = [Path(name) for name in args.annotations]
    images = Path(args.images) if args.images else None
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("copying images", total=None)
        summary = write_pack(
            args.benchmark,
            files,
            images,
            Path(args.out),
            args.limit,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    if args.json:
        print(json.dumps(asdict(summary), indent=2))
    else:
        _tell(summary)
    return 0


def _tell(summary: PackSummary) -> None:
    for name, rows in summary.tasks.items():
        print(f"{name}: {rows} questions")
    print(f"{summary.images} images, {summary.image_bytes / 1e6:.1f} MB, in {summary.out}")
    print("run it with")
    print("  HF_HUB_OFFLINE=1 lmms-eval --model llava_hd --model_args pretrained=DIR \\")
    print(f"      --include_path {shlex.quote(summary.out)} --tasks {','.join(summary.tasks)}")
