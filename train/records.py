"""Files of records as JSON: an array, or JSON lines; and the image files that records name.

The form of a record: record.py. A fault is never skipped.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from .record import BadRecord, Record, checked_record
from .record_images import image_path


def read_records(paths: Sequence[str | Path]) -> list[Record]:
    """The records of all files, in order.

    Raises UsageError for a file that is not there, DataError for its content: the first faulty
    record with file, index, id, field and remedy, and how many are faulty in all.
    """
    records: list[Record] = []
    for path in paths:
        found, faults = read_json_file(Path(path))
        if faults:
            raise first_of(faults)
        records += [record for record in found if record is not None]
    return records


def first_of(faults: Mapping[int, BadRecord]) -> BadRecord:
    """The first fault of a file; it says how many there are."""
    first = faults[min(faults)]
    more = f" ({len(faults)} faulty records in this file)" if len(faults) > 1 else ""
    return BadRecord(first.where, first.reason + more)


@contextmanager
def without_collection() -> Iterator[None]:
    """Without garbage collection, which would go over all records again and again: reading 100,000
    took 4.7 s of CPU with it and 2.4 s without."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_json_file(path: Path) -> tuple[list[Record | None], dict[int, BadRecord]]:
    """The records of one file in order, None in the place of a bad one; and by index what is wrong
    with those.

    Raises UsageError for a file that is not there, DataError for one that is no JSON as a whole,
    or empty.
    """
    records: list[Record | None] = []
    faults: dict[int, BadRecord] = {}
    with without_collection():
        for index, value in enumerate(_values(path)):
            bad = value if isinstance(value, BadRecord) else None
            if bad is None:
                try:
                    records.append(checked_record(value, str(path), index))
                    continue
                except BadRecord as fault:
                    bad = fault
            records.append(None)
            faults[index] = BadRecord(bad.where, bad.reason)  # without the frames of a traceback
    if not records:
        raise DataError(f"{path}: holds no record; give a LLaVA JSON file with at least one")
    return records, faults


def _values(path: Path) -> Iterator[Any]:
    """The JSON values of the records; a `[` begins an array, anything else JSON lines. A line that
    is no JSON is a BadRecord."""
    text = read_file_text(path)
    if text.lstrip()[:1] == "[":
        yield from parse_file_text(path, text, 1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = parse_file_text(path, line, number, text)
            except DataError as error:
                yield BadRecord(str(path), str(error).removeprefix(f"{path}: "))
                continue
            yield value


def read_file_text(path: Path) -> str:
    """A data file as text; UsageError where it is not there, DataError where it is no UTF-8."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise UsageError(f"data.path {path} is a folder; give a JSON file") from None
    except FileNotFoundError:
        raise UsageError(f"data.path {path}: no such file; check the path") from None
    except OSError as error:
        raise UsageError(f"data.path {path} cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error


def parse_file_text(path: Path | str, text: str, line: int, whole: str = "") -> Any:
    """The JSON value of `text`, which begins in that line of the file; DataError otherwise."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        reason = _not_json(error, text, whole if line == 1 else "")
        raise DataError(f"{path}: {place}: {reason}") from error
    except ValueError:  # Python reads no whole number of more than 4300 digits
        raise DataError(
            f"{path}: line {line}: a number has thousands of digits; write it as text"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: line {line}: nested too deeply; this is no LLaVA data") from None


def _not_json(error: json.JSONDecodeError, text: str, whole: str) -> str:
    """The likely cause of a fault, and its remedy."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()[:1]
    if whole and _is_json(whole):
        return "one object over many lines, not a list of records; put the records into [ ]"
    if before.endswith(",") and after in ("]", "}"):
        return "a comma stands before the closing bracket; remove it"
    if error.msg.startswith("Illegal trailing comma"):
        return "a comma stands before the closing bracket; remove it"
    if not after:
        return "the JSON ends too early; is the file cut off?"
    return f"not JSON ({error.msg}); mend the file"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(word: str) -> Any:
    raise json.JSONDecodeError(f"{word} is not allowed", word, 0)


def check_images(records: Iterable[Record], root: str | Path) -> int:
    """Make sure that every image of the records is there; returns how many different ones.

    Folders are listed once each, so half a million images take seconds. Raises UsageError without
    the root, DataError naming the first bad record and the count of bad ones.
    """
    if not Path(root).is_dir():
        raise UsageError(f"data.images {root} is not a folder; give the root of the images")
    folders: dict[str, dict[str, bool]] = {}
    first, bad, seen = "", 0, set()
    for record in records:
        for name in record.images:
            if name in seen:
                continue
            seen.add(name)
            folder, _, base = name.rpartition("/")
            if folder not in folders:
                folders[folder] = _listing(Path(root), folder)
            is_plain_file = folders[folder].get(base)
            if is_plain_file:
                continue
            try:
                image_path(root, name)
            except DataError as error:
                bad += 1
                first = first or f"{record.where}: {error}"
    if bad:
        more = f" ({bad} of {len(seen)} images are missing or refused)" if bad > 1 else ""
        raise DataError(first + more)
    return len(seen)


def _listing(root: Path, folder: str) -> dict[str, bool]:
    """Names in a folder, each with whether it is a regular file of its own (and no link); none
    where it cannot be listed, and `image_path` says why."""
    top = os.path.realpath(root)
    path = os.path.realpath(Path(root) / folder)
    if os.path.commonpath([top, path]) != top:
        return {}
    try:
        with os.scandir(path) as entries:
            return {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    except OSError:
        return {}
