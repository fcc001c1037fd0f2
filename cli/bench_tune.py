"""`llava-hd bench tune`: measure block sizes on this GPU and write a table of its own."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec

from ..hd.errors import LlavaHDError, UsageError
from .bench_output import command_line
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench tune`."""
    from ..bench.tune_options import add_options

    parser = Parser(
        command,
        "Time the candidates for every kernel's block sizes on this GPU, check each against fp64, "
        "and write a table that is used instead of the shipped one (llava-hd doctor names it). "
        "About five minutes; nothing is tuned while training.",
        [f"llava-hd {command}", f"llava-hd {command} --widths 1024 5120 5120 --rows 2048 16384"],
    )
    add_options(parser)
    return parser


def run(args: Namespace) -> int:
    """Tune and say where the table stands."""
    if find_spec("triton") is None:
        raise LlavaHDError("bench tune: triton is not installed; pip install 'llava-hd[gpu]'")
    from ..bench.tune import sizes_of, tune_device

    try:
        tune_device(sizes_of(args), args.out, command_line(), print)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0
