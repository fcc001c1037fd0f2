"""`llava-hd bench faults`: training runs killed, torn and fed with rubbish; what survives."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..hd.errors import LlavaHDError, UsageError
from .bench_output import command_line
from .parser import Parser

PARTS = ("resume", "kill", "torn", "save", "modality", "nonfinite", "data")
DESCRIPTION = """Break real training runs of the nano model (two ranks, DeepSpeed over gloo) in all
ways that docs/reliability.md speaks of, and count: resumption to the bit, SIGKILL at random moments
(beside DeepSpeed's own checkpoints), broken checkpoint files, saves that fail on one rank, any mix
of images and text over the ranks, NaN, bad images and records. Takes an hour and more on two cores,
with --quick some minutes; each part is kept as soon as it is done, and parts can be made one by
one. Exit code 1 if anything is not as promised."""
EXAMPLES = ("--quick", "--only kill torn", "--docs docs/reliability.md")


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench faults`."""
    parser = Parser(command, DESCRIPTION, [f"llava-hd {command} {words}" for words in EXAMPLES])
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, help="parts; all of them by default")
    add("--quick", action="store_true", help="a few cases of each part")
    add("--without-deepspeed", action="store_true", help="kill ours only, not its checkpoints too")
    add("--out", type=str, metavar="DIR", help="folder of the faults-PART.json; none with --quick")
    add("--docs", type=str, metavar="FILE", help="write the figures of the folder into this page")
    add("--json", action="store_true", help="print the record as JSON")
    return parser


def run(args: Namespace) -> int:
    """Try, write the results, print a line for each part (or JSON)."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the ranks are forks without threads
    from ..bench.faults import FULL, QUICK, page_with, read_records, results_folder, run_faults
    from ..hd.files import write_whole

    page = None if args.docs is None else Path(args.docs)
    if page is not None and (args.quick or not page.is_file()):
        why = "a quick run gives no figures" if args.quick else "no such file; name the page"
        raise UsageError(f"--docs {page}: {why}")
    out = Path(args.out) if args.out else None if args.quick else results_folder()
    console = Console(stderr=True, highlight=False)

    def progress(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    command = command_line()
    sizes = QUICK if args.quick else replace(FULL, rival=not args.without_deepspeed)
    records = run_faults(args.only or PARTS, sizes, out, command, progress)
    if page is not None and out is not None:
        text = page.read_text(encoding="utf-8")
        write_whole(page, page_with(text, read_records(out), out))
    if args.json:
        print(json.dumps(records, indent=1))
    else:
        for part, record in records.items():
            print(f"{part}: {record['text']}")
    failed = [part for part, record in records.items() if record["failed"]]
    if failed:
        raise LlavaHDError(f"not as promised: {', '.join(failed)}; the rows with ok false say what")
    return 0
