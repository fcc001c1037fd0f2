"""The options of `bench tune`; imports no torch, so that its help is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """widths: vision, hidden, language. rows: the visual rows (for attention, tokens) to try.
    heads: of attention in the language model, twice those of the tower."""

    widths: tuple[int, int, int] = (1024, 4096, 4096)
    rows: tuple[int, ...] = (1024, 2048, 4096, 16384, 65536)
    seed: int = 0
    heads: int = 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both entry points."""
    parser.add_argument(
        "--out", type=str, metavar="FILE", help="the table's file (default: this machine's own)"
    )
    parser.add_argument("--widths", type=int, nargs=3, default=[1024, 4096, 4096],
                        metavar=("VISION", "HIDDEN", "LANGUAGE"), help="default: 7B")  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096, 16384, 65536],
                        help="visual rows; the largest decides the blocks")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)


def sizes_of(args: argparse.Namespace) -> Sizes:
    """ValueError for a size below 1."""
    if min(*args.widths, *args.rows) < 1:
        raise ValueError("--widths and --rows must be 1 or more")
    return Sizes(tuple(args.widths), tuple(sorted(set(args.rows))), args.seed)
