"""`llava-hd bench faults`: training runs killed, torn and fed with rubbish; what survives."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from ..hd.errors import LlavaHDError, UsageError
from .parser import Parser

PARTS = ("resume", "kill", "torn", "save", "modality", "nonfinite", "data")
DESCRIPTION = """Break real training runs of the nano model (two ranks, DeepSpeed over gloo) in all
ways that docs/reliability.md speaks of, and count: resumption to the bit, SIGKILL at random moments
(beside DeepSpeed's own checkpoints), broken checkpoint files, saves that fail on one rank, any mix
of images and text over the ranks, NaN, bad images and records. Takes an hour and more on two cores,
with --quick some minutes. Exit code 1 if anything is not as promised."""
EXAMPLES = ("--quick", "--only kill torn", "--docs docs/reliability.md")


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench faults`."""
    parser = Parser(command, DESCRIPTION, [f"llava-hd {command} {words}" for words in EXAMPLES])
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, help="parts; all of them by default")
    add("--quick", action="store_true", help="a few cases of each part")
    add("--out", type=str, metavar="DIR", help="folder of faults.json; none with --quick")
    add("--docs", type=str, metavar="FILE", help="write the figures into this page")
    add("--json", action="store_true", help="print the record as JSON")
    return parser


def run(args: Namespace) -> int:
    """Try, write the results, print a line for each part (or JSON)."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the ranks are forks without threads
    from ..bench.faults import FULL, QUICK, RECORD, page_with, results_folder, run_faults
    from ..bench.files import write_whole

    page = None if args.docs is None else Path(args.docs)
    if page is not None and not page.is_file():
        raise UsageError(f"--docs {page}: no such file; run in the repository, or name the page")
    out = Path(args.out) if args.out else None if args.quick else results_folder()
    console = Console(stderr=True, highlight=False)

    def progress(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    command = " ".join(["llava-hd", *sys.argv[1:]])
    sizes = QUICK if args.quick else FULL
    record, folder = run_faults(args.only or PARTS, sizes, out, command, progress)
    if page is not None:
        source = str((folder or Path()) / RECORD)
        text = page_with(page.read_text(encoding="utf-8"), record, source)
        write_whole(page, text)
    if args.json:
        print(json.dumps(record, indent=1))
    else:
        for line in record["summary"]:
            print(f"{line['part']}: {line['text']}")
    failed = [line["part"] for line in record["summary"] if line["failed"]]
    if failed:
        raise LlavaHDError(f"not as promised: {', '.join(failed)}; the rows with ok false say what")
    return 0
