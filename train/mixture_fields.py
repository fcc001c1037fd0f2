"""What the readers of annotation files share: JSON, checked fields, draws by a seed.

A fault in the form of a file is a DataError with file, record, field and remedy. A record in good
form with nothing to learn from (an empty answer) is left out and counted by its reason.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from ..hd.grid import suggest
from ..model.prompt import IMAGE_TAG
from .mixture_recipe import Source
from .record_images import path_fault


@dataclass(frozen=True, slots=True)
class Conversation:
    """Rounds (question, answer) about an image, or about none.

    key: what it is within its source, the same however its files are ordered.
    """

    key: str
    image: str | None
    rounds: tuple[tuple[str, str], ...]


@dataclass
class Reading:
    """One source while it is read: its files by role, the seed, and what is left out and why."""

    source: Source
    files: dict[str, list[Path]]
    seed: int
    skipped: Counter[str]

    def draw(self, *parts: object) -> int:
        """A number below 2**64 that depends on the seed, the source's name and the parts alone."""
        return draw(self.seed, self.source.name, *parts)

    def drawn(self, items: Iterable[Any], count: int, *parts: object) -> list[Any]:
        """`count` of the items (or all), in the order of the draw; it needs no order of theirs."""
        return sorted(items, key=lambda item: (self.draw(*parts, item), item))[:count]

    def image(self, name: str, fields: Fields, field: str) -> str:
        """The image name below the image root. DataError where it would leave that."""
        fault = path_fault(name)
        if fault:
            raise fields.fault(field, f"names the image {name!r}, which {fault}", "mend it")
        return f"{self.source.images}/{name}" if self.source.images else name


def draw(seed: int, *parts: object) -> int:
    """A number below 2**64 out of the seed and the parts, the same on every machine."""
    text = json.dumps([seed, *(str(part) for part in parts)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def digest(value: Any) -> str:
    """16 hex digits of a JSON-able value; the order of its keys does not matter."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def natural(name: str) -> tuple[int, str]:
    """Sorts decimal numbers by value and all else by length and text."""
    return len(name), name


def unusable(text: str) -> str | None:
    """Why a text cannot stand in a conversation; None where it can."""
    if not text.strip():
        return "empty text"
    if IMAGE_TAG in text:
        return f"{IMAGE_TAG} in the text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "half of a character (a lone surrogate)"
    return None


def read_json(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The JSON of a file; `hook` replaces each object as it is read, so that what nobody needs
    takes no memory. Raises UsageError without the file, DataError for its content."""
    try:
        return json.loads(path.read_bytes(), object_hook=hook)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: {place}: not JSON ({error.msg}); fetch the file again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); fetch the file again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def only(*keys: str) -> Callable[[dict[str, Any]], Any]:
    """A hook for `read_json`: an object that has all these keys keeps them alone. (One that lacks
    a key stays whole, so that its error can name a misspelt one.)"""

    def slim(value: dict[str, Any]) -> dict[str, Any]:
        if all(key in value for key in keys):
            return {key: value[key] for key in keys}
        return value

    return slim


class Fields:
    """One object of an annotation file; its fields are taken with their types checked."""

    __slots__ = ("path", "place", "value")

    def __init__(self, value: Any, path: Path, place: str) -> None:
        self.value, self.path, self.place = value, path, place
        if not isinstance(value, dict):
            raise DataError(
                f"{self.where}is {kind_of(value)}, not an object; is it the right file?"
            )

    @property
    def where(self) -> str:
        return f"{self.path}: {self.place}: " if self.place else f"{self.path}: "

    def fault(self, field: str, reason: str, remedy: str) -> DataError:
        """The error of one field, in one line."""
        return DataError(f"{self.where}{field} {reason}; {remedy}")

    def get(self, field: str) -> Any:
        if field not in self.value:
            near = suggest(field, list(self.value)) if self.value else ""
            remedy = f"add {field!r}, or is this another file?"
            if near.startswith("did you mean"):
                meant = near.removeprefix("did you mean ").rstrip("?")
                remedy = f"it has {meant}, rename that to {field!r}"
            raise self.fault(field, "is missing", remedy)
        return self.value[field]

    def text(self, field: str) -> str:
        return self._typed(field, str, "text").strip()

    def whole(self, field: str) -> int:
        value = self.get(field)
        if type(value) is not int:
            raise self.fault(field, f"is {kind_of(value)}", "give a whole number")
        return value

    def name(self, field: str) -> str:
        """An id: text or a whole number, as text."""
        value = self.get(field)
        if type(value) not in (int, str) or value == "":
            raise self.fault(field, f"is {kind_of(value)}", "give text or a whole number")
        return str(value)

    def number(self, field: str) -> float:
        return _number(self, field, self.get(field))

    def numbers(self, field: str, count: int) -> list[float]:
        values = self._typed(field, list, "a list")
        if len(values) != count:
            raise self.fault(field, f"has {len(values)} values", f"give {count} numbers")
        return [_number(self, field, value) for value in values]

    def texts(self, field: str) -> list[str]:
        values = self._typed(field, list, "a list of texts")
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise self.fault(f"{field}[{i}]", f"is {kind_of(value)}", "give text")
        return [value.strip() for value in values]

    def objects(self, field: str) -> Iterator[Fields]:
        """The objects of a list, each with its place."""
        for i, value in enumerate(self._typed(field, list, "a list")):
            place = f"{field}[{i}]"
            yield Fields(value, self.path, f"{self.place}.{place}" if self.place else place)

    def _typed(self, field: str, kind: type, words: str) -> Any:
        value = self.get(field)
        if not isinstance(value, kind):
            raise self.fault(field, f"is {kind_of(value)}", f"give {words}")
        return value


def _number(fields: Fields, field: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise fields.fault(field, f"holds {kind_of(value)}", "give a finite number")
    return float(value)


def listed(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Iterator[Fields]:
    """The records of a file that is one list of objects."""
    values = read_json(path, hook)
    if not isinstance(values, list):
        raise DataError(f"{path}: is {kind_of(values)}, not a list of records; is it another file?")
    for i, value in enumerate(values):
        yield Fields(value, path, f"record {i}")


def keyed(
    paths: Iterable[Path], hook: Callable[[dict[str, Any]], Any] | None = None
) -> Iterator[tuple[str, Fields]]:
    """The records of files that are one object of objects each, with their keys."""
    seen: set[str] = set()
    for path in paths:
        values = read_json(path, hook)
        if not isinstance(values, dict):
            raise DataError(
                f"{path}: is {kind_of(values)}, not an object of records by id; is it another file?"
            )
        for key, value in values.items():
            fields = Fields(value, path, f"record {key!r:.80}")
            if key in seen:
                raise fields.fault("its id", "stands in two files", "give each record once")
            seen.add(key)
            yield key, fields


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    words |= {int: "a whole number"}
    return "null" if value is None else words.get(type(value), "a number")
