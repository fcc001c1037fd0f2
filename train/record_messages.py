"""Records in Hugging Face's form: `messages` with roles and typed parts, and `images`.

`{"messages": [{"role": "user" | "assistant" | "system", "content": text or parts}, …], "images":
[names]}`. A part is `{"type": "text", "text"}` or `{"type": "image"}`, the latter with an optional
name of its own (`image` or `path`). Each image part becomes an image tag at its place; text parts
are joined without anything between them, as chat templates do. A content that is plain text may
hold image tags itself.
"""

from __future__ import annotations

from typing import Any

from ..model.prompt import IMAGE_TAG, TEMPLATES, Turn
from .record_fields import RecordFault, kind_of
from .record_images import has_lone_surrogate, path_fault

ROLES = {"user": "human", "assistant": "gpt"}
ADDRESSES = ("http:", "https:", "ftp:", "file:", "data:", "s3:", "gs:", "hf:")


def read_messages(value: dict[str, Any]) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Turns and image names of a record with `messages`; RecordFault names field and remedy."""
    messages = value["messages"]
    if not isinstance(messages, list):
        raise RecordFault(f"messages is {kind_of(messages)}; give a list of messages")
    has_system = bool(messages) and isinstance(messages[0], dict) and _is_system(messages[0])
    if has_system:
        _check_system(messages[0])
    spoken = messages[has_system:]
    if not spoken:
        raise RecordFault("messages is empty; give a user's message and its answer")
    own_names: list[str] = []
    turns = tuple(
        _turn(number, f"messages[{number + has_system}]", message, own_names)
        for number, message in enumerate(spoken)
    )
    if len(turns) % 2:
        raise RecordFault("messages: the last one is from 'user'; end with an answer")
    return turns, _images(value.get("images"), own_names)


def _is_system(message: dict[str, Any]) -> bool:
    return message.get("role") == "system"


def _check_system(message: dict[str, Any]) -> None:
    """The templates write a system text of their own; only that may stand in a record."""
    text = _content("messages[0]", message, [], is_answer=True)
    if text.strip() not in {template.system.strip() for template in TEMPLATES.values()} - {""}:
        raise RecordFault(
            "messages[0] is a system text that no template has; leave the message out (the "
            "template's own text is used)"
        )


def _turn(number: int, field: str, message: Any, own_names: list[str]) -> Turn:
    if not isinstance(message, dict):
        raise RecordFault(f"{field} is {kind_of(message)}; give an object with role and content")
    for key in ("role", "content"):
        if key not in message:
            raise RecordFault(f"{field}.{key} is missing; add it")
    role, expected = message["role"], ("user", "assistant")[number % 2]
    if role == "system":
        raise RecordFault(f"{field}.role is 'system'; a system text may only stand first")
    if not isinstance(role, str) or role not in ROLES:
        raise RecordFault(f"{field}.role {role!r:.80} is unknown; write 'user' or 'assistant'")
    if role != expected:
        raise RecordFault(
            f"{field}.role is {role!r} where {expected!r} is due; messages alternate, user first"
        )
    text = _content(field, message, own_names, is_answer=role == "assistant")
    if not text.strip():
        who = "question" if role == "user" else "answer"
        raise RecordFault(f"{field}.content is an empty {who}; write it or drop the record")
    if has_lone_surrogate(text):
        raise RecordFault(
            f"{field}.content holds half of a character (a lone surrogate); write the whole one"
        )
    return Turn(ROLES[role], text)


def _content(field: str, message: dict[str, Any], own_names: list[str], is_answer: bool) -> str:
    """The text of a message, with a tag for each image part; names of images are added."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RecordFault(f"{field}.content is {kind_of(content)}; give text or a list of parts")
    text = ""
    for number, part in enumerate(content):
        place = f"{field}.content[{number}]"
        if not isinstance(part, dict):
            raise RecordFault(f"{place} is {kind_of(part)}; give an object with type")
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise RecordFault(f"{place}.text is {kind_of(part.get('text'))}; give text")
            text += part["text"]
        elif kind == "image":
            if is_answer:
                raise RecordFault(f"{place} is an image outside a user's message; move it there")
            name = _own_name(place, part)
            own_names += [] if name is None else [name]
            # A line of its own, so that words before and after it stay apart.
            text += "\n" * bool(text and not text[-1].isspace()) + IMAGE_TAG + "\n"
        else:
            remedy = "write 'text' or 'image'"
            if kind == "image_url":
                remedy = "addresses are not read; save the image and name its file"
            raise RecordFault(f"{place}.type {kind!r:.80} is unknown; {remedy}")
    return text


def _own_name(place: str, part: dict[str, Any]) -> str | None:
    """The name that an image part carries itself, if any."""
    if part.get("url") is not None:
        raise RecordFault(f"{place}.url is an address; save the image and name its file")
    given = [key for key in ("image", "path") if part.get(key) is not None]
    if not given:
        return None
    name = part[given[0]]
    if not isinstance(name, str):
        raise RecordFault(f"{place}.{given[0]} is {kind_of(name)}; give a relative path")
    return _checked_name(f"{place}.{given[0]}", name)


def _images(value: Any, own_names: list[str]) -> tuple[str, ...]:
    if value is None:
        return tuple(own_names)
    if not isinstance(value, list):
        raise RecordFault(f"images is {kind_of(value)}; give a list of relative paths")
    for number, name in enumerate(value):
        if not isinstance(name, str):
            raise RecordFault(f"images[{number}] is {kind_of(name)}; give a relative path")
        _checked_name(f"images[{number}]", name)
    if own_names and own_names != value:
        raise RecordFault(
            "images and the image parts name different images; keep the names in images"
        )
    return tuple(value)


def _checked_name(field: str, name: str) -> str:
    if name.lower().startswith(ADDRESSES):
        raise RecordFault(f"{field} {name!r:.80} is an address; save the image and name its file")
    fault = path_fault(name)
    if fault:
        raise RecordFault(f"{field} {name!r} {fault}; give a path below the image folder")
    return name
