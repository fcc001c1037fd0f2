"""Names of data files: braces written out, and what kind of file stands behind a name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..hd.errors import DataError, UsageError

Kind = Literal["json", "parquet", "tar"]
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")
MAX_FILES = 100_000

# First bytes of kinds that are not read, and what to do with them.
REFUSED = {
    b"\x1f\x8b": "is compressed (gzip); unpack it, records are read at any place of it",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it, records are read at any place of it",
    b"BZh": "is compressed (bzip2); unpack it, records are read at any place of it",
    b"\xfd7zXZ": "is compressed (xz); unpack it, records are read at any place of it",
    b"PK\x03\x04": "is a zip file; give JSON, JSON lines, Parquet or tar",
    b"ARROW1": "is an Arrow file; write it as Parquet",
}


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """The files of names that may hold braces: `shard-{0000..0099}.tar` and `{a,b}.json`.

    Numbers keep the width of the first one. A name of a file that is there is taken as it is.
    """
    found: list[Path] = []
    for path in paths:
        name = str(path)
        if "{" not in name or Path(name).exists():
            found.append(Path(name))
            continue
        for one in _written_out(name):
            if len(found) == MAX_FILES:
                raise UsageError(f"data.path {name} stands for more than {MAX_FILES:,} files")
            found.append(Path(one))
    return found


def _written_out(name: str) -> Iterator[str]:
    match = BRACES.search(name)
    if match is None:
        yield name
        return
    first, last, words = match.groups()
    if words is not None:
        values: Iterator[str] = iter(words.split(","))
    else:
        if int(last) < int(first):
            raise UsageError(f"data.path {name}: {match[0]} counts down; write it the other way")
        if int(last) - int(first) >= MAX_FILES:
            raise UsageError(f"data.path {name} stands for more than {MAX_FILES:,} files")
        values = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    for value in values:
        yield from _written_out(name[: match.start()] + value + name[match.end() :])


def kind_of_file(path: Path) -> Kind:
    """What a data file is, by its first bytes; its suffix says what a damaged one should be.

    Raises UsageError for one that is not there, DataError for kinds that are not read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except IsADirectoryError:
        raise UsageError(
            f"data.path {path} is a folder; give a JSON file, Parquet files or tar shards"
        ) from None
    except FileNotFoundError:
        raise UsageError(f"data.path {path}: no such file; check the path") from None
    except OSError as error:
        raise UsageError(f"data.path {path} cannot be read ({error.strerror})") from error
    for start, reason in REFUSED.items():
        if head.startswith(start):
            raise DataError(f"{path}: {reason}")
    if head[:4] == b"PAR1" or path.suffix == ".parquet":
        return "parquet"
    if head[257:262] == b"ustar" or path.suffix == ".tar":
        return "tar"
    return "json"


def is_json(path: Path) -> bool:
    """Whether a file that is there would be read as JSON or JSON lines."""
    try:
        return kind_of_file(path) == "json"
    except DataError:
        return False
