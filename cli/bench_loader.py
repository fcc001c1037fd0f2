"""`llava-hd bench loader`: our data path against transformers' processors."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .bench_output import command_line, measure_and_show, out_folder
from .parser import Parser

DESCRIPTION = """Load the same JPEG files with our loader (reading, cutting, words, packing) and
with transformers' processors in a torch DataLoader: same batches, same loader processes, in turns.
The pixels of both are compared first. Prints images per second, the ratios, and what an image
costs. loader.json and loader.csv go to bench/results/DEVICE/DATE or to --out."""
EXAMPLES = ("--quick", "--presets hdflex --workers 0 2 --images 200", "--quick --json")
CHOICES = ("hd448", "hdflex", "base336")


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench loader`."""
    parser = Parser(command, DESCRIPTION, [f"llava-hd {command} {words}" for words in EXAMPLES])
    add = parser.add_argument
    add("--presets", nargs="+", choices=CHOICES, help="geometries; all, with --quick hd448")
    add("--workers", nargs="+", type=int, default=[0, 1, 2], help="loader processes, by turns")
    add("--images", type=int, help="files; 96, with --quick 24")
    add("--batch", type=int, default=8, help="images of a batch")
    add("--rounds", type=int, help="timed passes over the files; 3, with --quick 2")
    add("--seed", type=int, default=0, help="of sizes and pictures")
    add("--quick", action="store_true", help="few files: half a minute on two cores")
    add("--out", type=str, metavar="DIR", help="folder of the results")
    add("--json", action="store_true", help="print rows, ratios and parts as JSON")
    return parser


def run(args: Namespace) -> int:
    """Measure, write the results, print the table (or JSON)."""
    from ..bench.loader import RECORD, Request, run_benchmark

    usual = (CHOICES[:1], 24, 2) if args.quick else (CHOICES, 96, 3)
    request = Request(
        presets=tuple(dict.fromkeys(args.presets or usual[0])),
        workers=tuple(dict.fromkeys(args.workers)),
        images=usual[1] if args.images is None else args.images,
        batch=args.batch,
        rounds=usual[2] if args.rounds is None else args.rounds,
        seed=args.seed,
        out=out_folder(args),
        command=command_line(),
    )
    shown = ("files", "pixels", "rows", "ratios", "parts")
    return measure_and_show(partial(run_benchmark, request), _print, args, shown, RECORD)


def _print(console: Console, record: dict[str, Any]) -> None:
    """Who, how fast, against transformers; what an image of ours costs."""
    ratios = {(r["preset"], r["workers"], r["contestant"]): r for r in record["ratios"]}
    files = record["files"]
    title = f"{files['images']} files of {files['mean_megapixels']:.2f} megapixels on average"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("preset", "processes", "loader"):
        table.add_column(name, no_wrap=True)
    for name in ("images/s", "ms an image", "of transformers", "by CPU time"):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        ratio = ratios.get((row["preset"], row["workers"], row["contestant"]))
        cpu = None if ratio is None else ratio["cpu_ratio"]
        table.add_row(
            row["preset"],
            str(row["workers"]),
            row["contestant"],
            f"{row['images_per_second']:,.1f}",
            f"{row['ms_per_image']:.2f}",
            "" if ratio is None else f"{ratio['ratio']:.2f}x",
            "" if cpu is None else f"{cpu:.2f}x",
        )
    console.print(table)
    for part in record["parts"]:
        spent = ", ".join(f"{k.replace('_', ' ')} {v} ms" for k, v in part.items() if k != "preset")
        console.print(f"ours, CPU time of an image, {part['preset']}: {spent}", highlight=False)
    for one in record["pixels"]:
        console.print(
            f"{one['preset']}: {one['differing']} pixel values of {one['images']} images differ, "
            f"largest difference {one['largest_difference']:.1e}",
            highlight=False,
        )
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
