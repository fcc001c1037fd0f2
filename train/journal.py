"""Files of JSON lines that a run appends to as it goes, each line with its `step`.

A kill may leave half a line, and a full disk too: the half is cut off, so that every line is whole.
A run that goes on from a checkpoint drops the lines of later steps, which it will write again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, in order; none where there is no file."""
    if not path.is_file():
        return []
    data = path.read_bytes()  # a cut may go through a character
    text = data[: data.rfind(b"\n") + 1].decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def cut_journal(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps behind `step`, and half ones; returns what is left."""
    kept = [line for line in read_journal(path) if line["step"] <= step]
    if path.exists():
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_bytes(b"".join(map(_line, kept)))
        unfinished.replace(path)
    return kept


def append_journal(path: Path, lines: Iterable[Mapping[str, Any]], sync: bool = True) -> None:
    """Append lines, all of them or none; `sync` sees to it that they are on the disk.

    Raises OSError with the file's name.
    """
    data = b"".join(map(_line, lines))
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            written = file.write(data)
            if written != len(data):  # a disk that filled up in between
                file.write(data[written:])
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            if path.is_file():
                os.ftruncate(file.fileno(), start)
            raise OSError(error.errno, error.strerror, str(path)) from error


def _line(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
