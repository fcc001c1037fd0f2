"""LLaVA's data files: a JSON array or JSON lines into `Record`s, checked before anything starts.

A record is `{"id", "image", "conversations": [{"from", "value"}, …]}`; image is a name, a list of
names or absent.
Other keys are allowed (LLaVA's own text-only records carry `"model"`); a fault is never skipped.
Images stay below one root folder: absolute names, `..` and links that leave it are refused.
"""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..hd.errors import DataError, UsageError
from ..hd.grid import suggest
from ..model.prompt import IMAGE_TAG, Turn

ROLES = ("human", "gpt")
KEYS = ("id", "image", "conversations")


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation and where it stands: `index` counts the records of `file` from 0."""

    id: str | int | None
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    file: str
    index: int

    @property
    def where(self) -> str:
        """File, index and id, for messages."""
        return f"{self.file}: {record_name(self.index, self.id)}"


class RecordFault(Exception):
    """What is wrong with one record: field, reason and remedy."""


def read_records(paths: Sequence[str | Path]) -> list[Record]:
    """The records of all files, in order.

    Raises UsageError for a file that is not there, DataError for its content: the first faulty
    record with file, index, id, field and remedy, and how many are faulty in all.
    """
    records: list[Record] = []
    with without_collection():
        for path in paths:
            records += _read_file(Path(path))
    return records


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


def _read_file(path: Path) -> list[Record]:
    records, faults = [], []
    for index, value in enumerate(_values(path)):
        try:
            records.append(parse_record(value, str(path), index))
        except RecordFault as fault:
            identity = value.get("id") if isinstance(value, dict) else None
            faults.append(f"{path}: {record_name(index, identity)}: {fault}")
    if faults:
        more = f" ({len(faults)} faulty records in this file)" if len(faults) > 1 else ""
        raise DataError(faults[0] + more)
    if not records:
        raise DataError(f"{path}: holds no record; give a LLaVA JSON file with at least one")
    return records


def record_name(index: int, identity: object) -> str:
    """A record for messages: its index from 0, and its id where it has one."""
    return f"record {index}" if identity is None else f"record {index} (id {identity!r:.80})"


def _values(path: Path) -> Iterator[Any]:
    """The JSON values of the records; a `[` begins an array, anything else JSON lines."""
    text = read_file_text(path)
    if text.lstrip()[:1] == "[":
        values = parse_file_text(path, text, 1)
        yield from values
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield parse_file_text(path, line, number, text)


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


def parse_file_text(path: Path, text: str, line: int, whole: str = "") -> Any:
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


def parse_record(value: Any, file: str, index: int) -> Record:
    """One record of a data file, checked; RecordFault with field and remedy where it is faulty."""
    if not isinstance(value, dict):
        raise RecordFault(f"is {_kind(value)}, not an object with {', '.join(KEYS)}")
    if "conversations" not in value:
        raise RecordFault(f"conversations is missing; {_near('conversations', value)}")
    identity = value.get("id")
    if not isinstance(identity, (str, int, type(None))) or isinstance(identity, bool):
        kind = "a fraction" if isinstance(identity, float) else _kind(identity)
        raise RecordFault(f"id is {kind}; give text or a whole number")
    images = _images(value.get("image"))
    turns = _turns(value["conversations"])
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    if tags != len(images):
        hint = "write one tag per image"
        if "image" not in value and tags:
            hint = _near("image", value)
        raise RecordFault(
            f"conversations: {tags} {IMAGE_TAG} tags in the human turns but {len(images)} images "
            f"in image; {hint}"
        )
    return Record(identity, images, turns, file, index)


def _near(key: str, value: dict[str, Any]) -> str:
    """A remedy: the unknown key that was probably meant, or the key to add."""
    others = [name for name in value if name not in KEYS]
    hint = suggest(key, others) if others else ""
    if hint.startswith("did you mean"):
        return f"it has {hint.removeprefix('did you mean ').rstrip('?')}, rename that to {key!r}"
    return f"add {key!r}"


def _images(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordFault(f"image is {_kind(value)}; give a relative path, or a list of them")
    for name in names:
        fault = path_fault(name)
        if fault:
            raise RecordFault(f"image {name!r} {fault}; give a path below the image folder")
    return tuple(names)


def path_fault(name: str) -> str | None:
    """Why an image name is refused by its text alone; None when it is a plain relative path."""
    if not name.strip():
        return "is empty"
    if not PurePosixPath(name).name:
        return "names no file"
    if "\0" in name:
        return "holds a NUL character"
    if _has_lone_surrogate(name):
        return "holds half of a character (a lone surrogate)"
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        return "is an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "leaves the image folder by '..'"
    return None


def _has_lone_surrogate(text: str) -> bool:
    """JSON may hold half of a UTF-16 pair (`"\\ud800"`), which no file name or tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _turns(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise RecordFault(f"conversations is {_kind(value)}; give a list of turns")
    if not value:
        raise RecordFault("conversations is empty; give a human turn and its answer")
    turns = tuple(_turn(number, turn) for number, turn in enumerate(value))
    if len(turns) % 2:
        raise RecordFault(
            f"conversations: {len(turns)} turns, the last one from human; end with an answer"
        )
    return turns


def _turn(number: int, value: Any) -> Turn:
    field = f"conversations[{number}]"
    if not isinstance(value, dict):
        raise RecordFault(f"{field} is {_kind(value)}; give an object with from and value")
    for key in ("from", "value"):
        if key not in value:
            raise RecordFault(f"{field}.{key} is missing; add it")
        if not isinstance(value[key], str):
            raise RecordFault(f"{field}.{key} is {_kind(value[key])}; give text")
    role, text, expected = value["from"], value["value"], ROLES[number % 2]
    if role not in ROLES:
        raise RecordFault(f"{field}.from {role!r} is unknown; write 'human' or 'gpt'")
    if role != expected:
        raise RecordFault(
            f"{field}.from is {role!r} where {expected!r} is due; turns alternate, human first"
        )
    if not text.strip():
        who = "question" if role == "human" else "answer"
        raise RecordFault(f"{field}.value is an empty {who}; write it or drop the record")
    if _has_lone_surrogate(text):
        raise RecordFault(
            f"{field}.value holds half of a character (a lone surrogate); write the whole one"
        )
    return Turn(role, text)


def _kind(value: Any) -> str:
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else words.get(type(value), "a number")


def check_images(records: Sequence[Record], root: str | Path) -> int:
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


def image_path(root: str | Path, name: str) -> Path:
    """The file of an image name, links followed; DataError if it is missing or leaves the root."""
    fault = path_fault(name)
    if fault:
        raise DataError(f"image {name!r} {fault}; give a path below the image folder")
    top = os.path.realpath(root)
    path = os.path.realpath(Path(root) / name)
    if os.path.commonpath([top, path]) != top:
        raise DataError(
            f"image {name!r} is a link that leaves {root}; copy the file into the image folder"
        )
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise DataError(
            f"image {name!r} is not below {root} ({error.strerror}); "
            "check data.images, or drop the record"
        ) from None
    if not stat.S_ISREG(mode):
        raise DataError(f"image {name!r} below {root} is not a regular file; give an image file")
    return Path(path)
