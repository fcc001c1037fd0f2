"""`llava-hd bench report`: charts and the tables of docs/performance.md, from result files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..hd.errors import UsageError
from .parser import Parser

DOCS = Path("docs", "performance.md")


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench report`."""
    parser = Parser(
        command,
        "Draw PNG charts beside the results of `llava-hd bench kernels` and `bench step`, and\n"
        "write the tables of docs/performance.md between their two markers. Every figure comes\n"
        "from a result file.",
        [
            "llava-hd bench report",
            "llava-hd bench report bench/results/nvidia-h200/2026-11-30 --docs notes.md",
        ],
    )
    add = parser.add_argument
    add("results", type=str, nargs="*", default=[], metavar="DIR", help="folders; all results")
    add("--docs", type=str, default=str(DOCS), metavar="FILE", help="the page with the markers")
    return parser


def run(args: Namespace) -> int:
    """Read the results, draw the charts, write the page."""
    from ..bench.performance import RECORD, find_results, read_result, write_charts, write_page
    from ..bench.performance_steps import find_steps, write_step_chart

    page = Path(args.docs)
    if not page.is_file():
        raise UsageError(f"--docs {page}: no such file; run in the repository, or name the page")
    root = Path("bench", "results")
    named = [Path(name) for name in args.results]
    steps = find_steps(named or [root])
    # A named folder with steps alone needs no kernels.
    with_steps = {result.folder for result in steps}
    kernels = [f for f in named if (f / RECORD).exists() or f not in with_steps]
    results = [read_result(folder) for folder in (kernels if named else find_results(root))]
    for result in results:
        for path in write_charts(result):
            print(path)
    for step in steps:
        print(write_step_chart(step))
    write_page(page, results, steps)
    count = len(results) + len(steps)
    print(f"{page}: tables of {count} result{'s' * (count != 1)}")
    return 0
