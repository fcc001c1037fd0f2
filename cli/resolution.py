"""`--max-tiles`, `--max-visual-tokens`, `--grid`: the same options of every command that asks a
model, and the lines that tell before the run what they come to."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hd.errors import DataError, UsageError
from ..hd.grid import HDConfig
from ..hd.limits import ResolutionLimits, beyond_training, limited, parse_grid
from ..hd.plan import TilePlan, TooManyTokens, plan_image
from .parser import Parser

if TYPE_CHECKING:
    from ..model.config import LlavaHDConfig

OPTIONS = ("max_tiles", "max_visual_tokens", "grid")
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def add_limits(parser: Parser) -> None:
    """The three options; `limits_of` reads them."""
    group = parser.add_argument_group("resolution (instead of what the model was trained on)")
    add = group.add_argument
    add("--max-tiles", type=int | None, metavar="N", help="all grids of at most N tiles")
    add(
        "--max-visual-tokens", type=int | None, metavar="N",
        help="the best grid for each image that gives at most N tokens",
    )  # fmt: skip
    add("--grid", type=str | None, metavar="RxC", help="this grid for every image, such as 2x3")


def limits_of(args: Namespace) -> ResolutionLimits:
    """The limits that were asked for. Raises UsageError."""
    try:
        grid = None if args.grid is None else parse_grid(args.grid)
        return ResolutionLimits(args.max_tiles, args.max_visual_tokens, grid)
    except UsageError as error:
        raise _as_option(error) from error


def limited_geometry(trained: HDConfig, limits: ResolutionLimits) -> HDConfig:
    """The geometry within the limits; a warning on stderr where the model has not seen the like.
    Raises UsageError."""
    try:
        used = limited(trained, limits)
    except UsageError as error:
        raise _as_option(error) from error
    warning = beyond_training(trained, used)
    if warning is not None:
        print(f"llava-hd: warning: {warning}", file=sys.stderr)
    return used


def limits_record(limits: ResolutionLimits) -> dict[str, Any]:
    """The limits as values of a run's record; nothing where there are none, so that records of
    runs without limits stay as they were."""
    given = {name: getattr(limits, name) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if limits.grid is not None:
        given["grid"] = list(limits.grid)
    return {"resolution": given} if given else {}


def tell_before(
    folder: Path, limits: ResolutionLimits, dtype: str, images: Iterable[Path] = ()
) -> None:
    """What answering with the model of a folder will need, on stderr, before it is loaded: a line
    about the images, where they are known, and one about memory; a warning where the limits go
    beyond what it was trained on.

    Raises UsageError for limits that make no sense with it, DataError for an image that none of
    its grids fits.
    """
    from ..model.foreign import read_config

    config = read_config(folder)
    largest = tell_images(images, limited_geometry(config.hd, limits))
    tell_memory(config, dtype, None if largest is None else largest.num_tokens)


def tell_images(images: Iterable[Path], hd: HDConfig) -> TilePlan | None:
    """One line on stderr: how many tokens and tiles the images have, by their headers; the plan
    of the largest. What cannot be read is left to the run, which says whose image it is.

    Raises DataError, with the image's name, where no allowed grid is within the limit of tokens.
    """
    from ..hd.image import ImageError, read_size  # imports numpy, which scoring does without

    plans = []
    for path in images:
        try:
            plans.append(plan_image(read_size(path), hd))
        except ImageError:
            continue
        except TooManyTokens as error:
            raise DataError(f"{path}: {error}") from error
    if not plans:
        return None
    counts = [plan.num_tokens for plan in plans]
    largest = max(plans, key=lambda plan: plan.num_tokens)
    tiles = max(plan.num_tiles for plan in plans)
    least, most, mean = min(counts), max(counts), sum(counts) / len(counts)
    spread = f"{most:,}" if least == most else f"{least:,} to {most:,} ({mean:,.0f} on average)"
    print(
        f"images: {len(plans):,}, of {spread} visual tokens, at most "
        f"{tiles} tile{'s' * (tiles > 1)} with the global view",
        file=sys.stderr,
    )
    return largest


def tell_memory(config: LlavaHDConfig, dtype: str, visual_tokens: int | None) -> None:
    """One line on stderr: weights and cache of keys and values, by formula (model/needs.py).

    visual_tokens: of the largest image; None where it is not known yet.
    """
    import torch

    from ..model.needs import needs_of

    needs = needs_of(config, getattr(torch, dtype))
    line = f"memory: weights {amount(needs.weight_bytes)}, keys and values "
    line += f"{amount(needs.kv_bytes_per_token)} a token"
    if visual_tokens is not None:
        line += f", {amount(visual_tokens * needs.kv_bytes_per_token)} for the largest image"
    print(f"{line} ({dtype})", file=sys.stderr)


def amount(num_bytes: int) -> str:
    """Bytes in words: "1.50 MiB"."""
    for unit, name in UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} bytes"


def _as_option(error: UsageError) -> UsageError:
    """The error with its field named as the option is."""
    text = str(error)
    for name in OPTIONS:
        if text.startswith(f"{name} "):
            text = f"--{name.replace('_', '-')}{text[len(name) :]}"
    return UsageError(text.replace("so max_tiles", "so --max-tiles"))
