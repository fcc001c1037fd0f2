"""The argument parser of a benchmark's entry point on a bare machine: nothing but Python's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def bare_parser(call: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for `python -m ...` (`call`), with the examples of the `llava-hd` command."""
    return argparse.ArgumentParser(
        prog=call,
        description=description,
        epilog="\n".join(["examples:", *(f"  {call} {words}" for words in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
