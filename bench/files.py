"""Reading JSON lines with errors that name file and line; files that appear whole or never."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, record) of every line that is not blank; each record is a JSON object.

    Raises UsageError for a file that cannot be opened, DataError for a line that is not an object.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold U+2028
    return [(number, _record(path, number, line)) for number, line in lines if line.strip()]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        shown = line.strip() if len(line.strip()) <= 40 else line.strip()[:37] + "..."
        raise DataError(
            f"{path}:{number}: {shown!r} is not a JSON object; this is a file of JSON lines, "
            "one object on each line"
        )
    return record


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text; a reader sees the old file or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON-able value, indented, as `write_whole` does."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
