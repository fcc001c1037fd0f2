"""Files: JSON lines with errors that name file and line, images below one folder, whole writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..hd.errors import BatchItemError, DataError, UsageError
from ..hd.files import write_whole
from ..train.record_images import image_path, path_fault


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


def drop_half_line(path: Path, notify: Callable[[str], None]) -> None:
    """Cut off a last line without its end, which a stopped run left, with a word."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
        notify(f"{path}: dropped a half-written last line; its question is asked again")


def find_image(folder: Path, name: str) -> Path | None:
    """The file of an image name below `folder`, links followed; None where there is none.

    Raises DataError for a name, or a link, that leaves the folder, and for what is no file.
    """
    # os.path.exists, because Path.exists raises for a name that is too long
    if path_fault(name) is None and not os.path.exists(folder / name):  # noqa: PTH110
        return None
    return image_path(folder, name)


@contextmanager
def naming_question(asked: Sequence[tuple[str, Path | None]]) -> Iterator[None]:
    """A DataError inside, of one question of a batch or of its image, says which question it is.

    asked: what each question of the batch is called, and the path of its image.
    """
    try:
        yield
    except DataError as error:
        number = error.number if isinstance(error, BatchItemError) else None
        for place, (question, image) in enumerate(asked):
            begins = (f"{image}: ", f"{str(image)!r}: ")
            if place == number or (number is None and str(error).startswith(begins)):
                kept = "the answers so far are kept, the same command goes on"
                raise DataError(f"{question}: {error}; {kept}") from error
        raise


def find_images(asked: Iterable[tuple[str, str, str]], folder: Path) -> dict[str, Path]:
    """The file of each image that is asked for, as (its name, file and line, who asks).

    Raises UsageError without the folder, DataError naming image and place for one that is missing;
    a name, or a link, that leads out of the folder is refused.
    """
    if not folder.is_dir():
        raise UsageError(f"--images {folder} is not a folder; give the folder of the images")
    found: dict[str, Path] = {}
    missing: list[str] = []
    for name, where, who in asked:
        if name in found:
            continue
        try:
            path = find_image(folder, name)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if path is None:
            missing.append(f"{folder / name}: no such image, asked for by {who}")
        found[name] = path or folder / name
    if missing:
        raise DataError(
            f"{missing[0]}; {len(missing)} of {len(found)} images are missing, check --images"
        )
    return found


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def json_text(value: Any) -> str:
    """A JSON-able value, indented; ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON-able value, indented, as `write_whole` does."""
    write_whole(path, json_text(value))
