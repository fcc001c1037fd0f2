"""`llava-hd tile`: a picture of what the model sees of each image, and its token counts."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..hd.errors import DataError, UsageError
from ..hd.grid import PRESETS, HDConfig, get_preset
from ..hd.image import image_size, load_image, save_png
from ..hd.plan import TilePlan, TooManyTokens, plan_image
from ..hd.preview import draw_plan
from .parser import Parser
from .resolution import add_limits, limited_geometry, limits_of, limits_record


def build_parser(command: str) -> Parser:
    """The options of `llava-hd tile`."""
    parser = Parser(
        command,
        "Draw what the model sees of each image (tiles, padding, dropped cells, global view) and "
        "count its visual tokens.",
        [
            "llava-hd tile photo.jpg --preset hd448 --out tiles",
            "llava-hd tile photos/*.jpg --json > plans.json",
            "llava-hd tile photo.jpg --max-tiles 9 --max-visual-tokens 1200",
        ],
    )
    parser.add_argument("images", nargs="+", type=str, metavar="IMAGE", help="image files")
    parser.add_argument("--preset", type=str, default="hdflex", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--out", type=str, default="tiles", help="folder of the pictures")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    add_limits(parser)
    return parser


def run(args: Namespace) -> int:
    """Draw every image that can be read; 3 when one could not, 0 otherwise."""
    limits = limits_of(args)
    config = limited_geometry(get_preset(args.preset), limits)
    out = Path(args.out)
    _make_folder(out)
    pictures = _picture_paths(args.images, out)
    entries, failed = [], False
    for source, picture in _watched(list(zip(args.images, pictures, strict=True)), args.json):
        try:
            entry = _draw(source, picture, args.preset, config) | limits_record(limits)
        except DataError as error:
            print(f"llava-hd: error: {error}", file=sys.stderr)
            failed = True
            continue
        entries.append(entry)
        if not args.json:
            print(_line(entry))
    if args.json:
        print("[" + ",\n ".join(json.dumps(entry) for entry in entries) + "]")
    return DataError.exit_code if failed else 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {folder}: cannot be made ({error.strerror}); name a folder you can write to"
        ) from error


def _picture_paths(images: list[str], out: Path) -> list[Path]:
    """One new file name per image: no picture takes another's name or that of an input."""
    taken = {Path(image).resolve() for image in images}
    pictures = []
    for image in images:
        stem = Path(image).stem
        picture, number = out / f"{stem}.tiles.png", 1
        while picture.resolve() in taken:
            number += 1
            picture = out / f"{stem}-{number}.tiles.png"
        taken.add(picture.resolve())
        pictures.append(picture)
    return pictures


def _watched(jobs: list[tuple[str, Path]], quiet: bool) -> Iterator[tuple[str, Path]]:
    """The jobs, under a progress bar where lines do not show the progress already."""
    console = Console(stderr=True)
    if quiet and len(jobs) > 1 and console.is_terminal:
        return iter(track(jobs, description="tiling", console=console, transient=True))
    return iter(jobs)


def _draw(source: str, picture: Path, preset: str, config: HDConfig) -> dict[str, Any]:
    """Write the picture of one image; its plan as JSON-able values. Raises DataError."""
    image = load_image(source)
    try:
        plan = plan_image(image_size(image), config)
    except TooManyTokens as error:
        raise DataError(f"{source}: {error}") from error
    try:
        save_png(draw_plan(image, plan), picture)
    except OSError as error:
        raise UsageError(
            f"{picture}: cannot be written ({error.strerror}); name another folder with --out"
        ) from error
    return {"image": source, "picture": str(picture), "preset": preset, **_summary(plan)}


def _summary(plan: TilePlan) -> dict[str, Any]:
    rows, cols = plan.kept_size
    return {
        "image_size": list(plan.image_size),
        "grid": list(plan.grid),
        "canvas_size": list(plan.canvas_size),
        "resized_size": list(plan.resized_size),
        "offset": list(plan.offset),
        "kept_rows": list(plan.kept_rows),
        "kept_cols": list(plan.kept_cols),
        "num_tiles": plan.num_tiles,
        "num_tokens": plan.num_tokens,
        "tokens": {
            "global_view": plan.num_global_tokens,
            "map": rows * cols,
            "row_ends": plan.num_row_ends,
        },
    }


def _line(entry: dict[str, Any]) -> str:
    """One image in one line: size, grid, canvas, tokens per part, picture."""
    tokens = entry["tokens"]
    grid = "no grid"
    if entry["canvas_size"] != [0, 0]:
        grid = f"grid {_times(entry['grid'])}, canvas {_times(entry['canvas_size'])} px"
    return (
        f"{entry['image']}: {_times(entry['image_size'])} px, {grid}, "
        f"{entry['num_tokens']} tokens = {tokens['global_view']} global view + {tokens['map']} map "
        f"+ {tokens['row_ends']} row-ends -> {entry['picture']}"
    )


def _times(pair: list[int]) -> str:
    return f"{pair[0]}x{pair[1]}"
