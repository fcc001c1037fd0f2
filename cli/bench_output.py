"""What the commands of benchmarks share: their call, --out and --json, progress, the result."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..hd.errors import UsageError

Record = dict[str, Any]


def command_line() -> str:
    """This call, for the record."""
    return " ".join(["llava-hd", *sys.argv[1:]])


def out_folder(args: Namespace) -> Path | None:
    """--out; None where it is left out. UsageError for an empty one."""
    if args.out == "":
        raise UsageError("--out is empty; give a folder")
    return None if args.out is None else Path(args.out)


def measure_and_show(
    measure: Callable[[Callable[[str], None]], tuple[Record, Path]],
    show: Callable[[Console, Record], None],
    args: Namespace,
    shown: Sequence[str],
    name: str,
) -> int:
    """Run a benchmark with its progress on stderr; print its tables or, with --json, what `shown`
    names of its record; tell where its file `name` is. Returns the exit code."""
    progress = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        progress.print(text, markup=False, soft_wrap=True)

    record, out = measure(say)
    if args.json:
        print(json.dumps({key: record[key] for key in shown}, indent=1, allow_nan=False))
    else:
        show(Console(), record)
    say(f"results: {out / name}")
    return 0
