"""Words for what is wrong with a field of a record, shared by the schemas."""

from __future__ import annotations

from typing import Any


class RecordFault(Exception):
    """What is wrong with one record: field, reason and remedy."""


def kind_of(value: Any) -> str:
    """A JSON value's kind, for messages."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else words.get(type(value), "a number")
