"""One record of a data set, in either of two schemas, checked and brought into one form.

LLaVA's: `{"id", "image", "conversations": [{"from", "value"}, …]}`; image is a name, a list of
names or absent. Hugging Face's: `{"messages": [{"role", "content"}, …], "images": […]}`
(record_messages.py). Other keys are allowed (LLaVA's own text-only records carry `"model"`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..hd.errors import DataError
from ..hd.grid import suggest
from ..model.prompt import IMAGE_TAG, Turn
from .record_fields import RecordFault, kind_of
from .record_images import has_lone_surrogate, path_fault
from .record_messages import read_messages

ROLES = ("human", "gpt")
KEYS = ("id", "image", "conversations")


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation and where it stands: `index` counts the records of `file` from 0.

    images: names, as many as there are image tags in the human turns. place: what the record is
    called in messages, "record 5" where it is empty.
    """

    id: str | int | None
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    file: str
    index: int
    place: str = ""

    @property
    def where(self) -> str:
        """File, index and id, for messages."""
        return f"{self.file}: {record_name(self.index, self.id, self.place)}"


def without_images(record: Record) -> Record:
    """The record without its images and their tags; a question may be left empty."""
    turns = tuple(
        Turn(t.role, t.text.replace(IMAGE_TAG, "").strip()) if t.role == ROLES[0] else t
        for t in record.turns
    )
    return replace(record, images=(), turns=turns)


class BadRecord(DataError):
    """A record that cannot be used. where: its file and place; reason: field, fault, remedy."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def record_name(index: int, identity: object, place: str = "") -> str:
    """A record for messages: its index from 0, and its id where it has one."""
    name = place or f"record {index}"
    return name if identity is None else f"{name} (id {identity!r:.80})"


def checked_record(
    value: Any, file: str, index: int, place: str = "", members: Sequence[str] | None = None
) -> Record:
    """`parse_record` whose fault is a BadRecord with the record's place."""
    try:
        return parse_record(value, file, index, place, members)
    except RecordFault as fault:
        identity = value.get("id") if isinstance(value, dict) else None
        raise BadRecord(f"{file}: {record_name(index, identity, place)}", str(fault)) from fault


def parse_record(
    value: Any, file: str, index: int, place: str = "", members: Sequence[str] | None = None
) -> Record:
    """One record of a data file, checked; RecordFault with field and remedy where it is faulty.

    members: the images that stand beside the record in its file; the record need not name them
    then, and names of its own count for nothing but their number.
    """
    if not isinstance(value, dict):
        raise RecordFault(f"is {kind_of(value)}, not an object with {', '.join(KEYS)}")
    identity = value.get("id")
    if not isinstance(identity, (str, int, type(None))) or isinstance(identity, bool):
        kind = "a fraction" if isinstance(identity, float) else kind_of(identity)
        raise RecordFault(f"id is {kind}; give text or a whole number")
    if value.get("messages") is not None:
        if value.get("conversations") is not None:
            raise RecordFault("has both conversations and messages; keep one of them")
        turns, names = read_messages(value)
        field, image_field = "messages", "images"
    elif "conversations" in value:
        names = _images(value.get("image"))
        turns = _turns(value["conversations"])
        field, image_field = "conversations", "image"
    else:
        raise RecordFault(f"conversations is missing; {_near('conversations', value)}")
    images = names if members is None else tuple(members)
    if members is not None and names and len(names) != len(images):
        raise RecordFault(
            f"{image_field} names {len(names)} images but {len(images)} stand beside the record; "
            f"write one member per image"
        )
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    if tags != len(images):
        _raise_tag_fault(value, field, image_field, tags, len(images), members is not None)
    return Record(identity, images, turns, file, index, place)


def _raise_tag_fault(
    value: dict[str, Any], field: str, image_field: str, tags: int, count: int, beside: bool
) -> None:
    hint = "write one tag per image"
    if image_field not in value and tags and not beside:
        hint = _near(image_field, value)
    raise RecordFault(
        f"{field}: {tags} {IMAGE_TAG} tags in the human turns but {count} images "
        f"{'beside the record' if beside else f'in {image_field}'}; {hint}"
    )


def _near(key: str, value: dict[str, Any]) -> str:
    """A remedy: the unknown key that was probably meant, or the key to add."""
    others = [name for name in value if name not in (*KEYS, "messages")]
    hint = suggest(key, others) if others else ""
    if hint.startswith("did you mean"):
        return f"it has {hint.removeprefix('did you mean ').rstrip('?')}, rename that to {key!r}"
    return f"add {key!r}"


def _images(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordFault(f"image is {kind_of(value)}; give a relative path, or a list of them")
    for name in names:
        fault = path_fault(name)
        if fault:
            raise RecordFault(f"image {name!r} {fault}; give a path below the image folder")
    return tuple(names)


def _turns(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise RecordFault(f"conversations is {kind_of(value)}; give a list of turns")
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
        raise RecordFault(f"{field} is {kind_of(value)}; give an object with from and value")
    for key in ("from", "value"):
        if key not in value:
            raise RecordFault(f"{field}.{key} is missing; add it")
        if not isinstance(value[key], str):
            raise RecordFault(f"{field}.{key} is {kind_of(value[key])}; give text")
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
    if has_lone_surrogate(text):
        raise RecordFault(
            f"{field}.value holds half of a character (a lone surrogate); write the whole one"
        )
    return Turn(role, text)
