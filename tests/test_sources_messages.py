"""Records with `messages`: how they become turns, and every fault with field and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_hd.hd.errors import DataError
from llava_hd.model.prompt import TEMPLATES
from llava_hd.train.record import Record
from llava_hd.train.sources import open_records

IMAGE, SYSTEM = {"type": "image"}, TEMPLATES["vicuna_v1"].system


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def talk(*contents: Any, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)],
        **more,
    }


def said(*messages: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


def read(tmp_path: Path, value: Any) -> Record:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(value) + "\n")
    return open_records([path], None)[0]


@pytest.mark.parametrize(
    ("content", "images", "expected"),
    [
        ("hello", [], "hello"),
        ("<image>\nWhat?", ["a.jpg"], "<image>\nWhat?"),
        ([IMAGE, text("What?")], ["a.jpg"], "<image>\nWhat?"),
        ([IMAGE, IMAGE, text("Same?")], ["a.jpg", "b.jpg"], "<image>\n<image>\nSame?"),
        ([text("This"), IMAGE, text("or"), text(" that?")], ["a.jpg"], "This\n<image>\nor that?"),
        ([{**IMAGE, "text": None, "path": "a.jpg"}, text("?")], None, "<image>\n?"),
        ([{**IMAGE, "image": "a.jpg"}, text("?")], ["a.jpg"], "<image>\n?"),
    ],
)
def test_parts_become_tags_and_words(
    tmp_path: Path, content: Any, images: list[str] | None, expected: str
) -> None:
    record = read(tmp_path, talk(content, [text("a"), text(" mat")], images=images, id=3))
    assert [(turn.role, turn.text) for turn in record.turns] == [
        ("human", expected),
        ("gpt", "a mat"),
    ]
    assert record.images == (tuple(images) if images is not None else ("a.jpg",))
    assert record.id == 3


def test_the_templates_own_system_text_may_stand_first(tmp_path: Path) -> None:
    plain = read(tmp_path, talk("hi", "hello"))
    for system in (SYSTEM, SYSTEM.strip(), [text(SYSTEM)]):
        record = read(tmp_path, said(("system", system), ("user", "hi"), ("assistant", "hello")))
        assert record.turns == plain.turns


QUESTION, ANSWER = ("user", "What?"), ("assistant", "A mat")
URL = {"type": "image_url", "image_url": {"url": "https://a/b.jpg"}}
FAULTS = {
    "not a list": ({"messages": "hi"}, "messages is text", "list of messages"),
    "none": ({"messages": []}, "messages is empty", "give a user's message"),
    "a system text alone": (said(("system", SYSTEM)), "messages is empty", "its answer"),
    "another system text": (
        said(("system", "Be rude."), QUESTION, ANSWER),
        "messages[0] is a system text that no template has",
        "leave the message out",
    ),
    "an empty system text": (said(("system", ""), QUESTION, ANSWER), "messages[0]", "leave"),
    "a late system text": (
        said(QUESTION, ANSWER, ("system", SYSTEM), ANSWER),
        "messages[2].role is 'system'",
        "only stand first",
    ),
    "not an object": ({"messages": ["hi"]}, "messages[0] is text", "role and content"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role is missing", "add it"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content is missing", "add it"),
    "a null content": (said(("user", None), ANSWER), "messages[0].content is null", "give text"),
    "a tool": (said(("tool", "x")), "messages[0].role 'tool' is unknown", "'user' or 'assistant'"),
    "a role of the wrong kind": (said(([], "x")), "messages[0].role []", "'user'"),
    "the wrong turn": (
        said(QUESTION, QUESTION),
        "messages[1].role is 'user' where 'assistant' is due",
        "alternate",
    ),
    "no answer": (said(QUESTION), "the last one is from 'user'", "end with an answer"),
    "an empty answer": (talk("hi", " "), "messages[1].content is an empty answer", "drop"),
    "half a character": (talk("hi", "\ud83d"), "half of a character", "write the whole one"),
    "a part of text": (talk(["hi"], "a"), "messages[0].content[0] is text", "with type"),
    "a part without words": (talk([{"type": "text"}], "a"), "content[0].text is null", "give text"),
    "a video": (talk([{"type": "video"}], "a"), "content[0].type 'video'", "'text' or 'image'"),
    "an address": (talk([URL], "a"), "type 'image_url'", "save the image and name its file"),
    "an address in url": (
        talk([{**IMAGE, "url": "https://a/b.jpg"}], "a"),
        "messages[0].content[0].url is an address",
        "save the image",
    ),
    "an address as name": (
        talk([IMAGE, text("?")], "a", images=["https://a/b.jpg"]),
        "images[0] 'https://a/b.jpg' is an address",
        "save the image",
    ),
    "an image in the text": (
        talk([{**IMAGE, "image": "data:image/png;base64,AAAA"}], "a"),
        "is an address",
        "save the image",
    ),
    "a part's image of the wrong kind": (
        talk([{**IMAGE, "image": {"bytes": "AA"}}], "a"),
        "messages[0].content[0].image is an object",
        "give a relative path",
    ),
    "an image in an answer": (
        talk("hi", [IMAGE], images=["a.jpg"]),
        "messages[1].content[0] is an image outside a user's message",
        "move it",
    ),
    "an absolute name": (
        talk([IMAGE, text("?")], "a", images=["/etc/passwd"]),
        "images[0] '/etc/passwd' is an absolute path",
        "below the image folder",
    ),
    "a path upwards": (
        talk([{**IMAGE, "path": "../a.jpg"}], "a"),
        "content[0].path '../a.jpg' leaves the image folder",
        "below",
    ),
    "images not a list": (talk("<image>", "a", images="a.jpg"), "images is text", "a list"),
    "an image not a name": (talk("<image>", "a", images=[3]), "images[0] is a number", "path"),
    "different names": (
        talk([{**IMAGE, "path": "a.jpg"}, text("?")], "a", images=["b.jpg"]),
        "images and the image parts name different images",
        "keep the names in images",
    ),
    "too few images": (
        talk([IMAGE, IMAGE], "a", images=["a.jpg"]),
        "messages: 2 <image> tags in the human turns but 1 images in images",
        "one tag per image",
    ),
    "no images": (talk([IMAGE], "a"), "1 <image> tags", "add 'images'"),
    "a misspelt key": (talk([IMAGE], "a", imagess=["a"]), "'imagess'", "rename that to 'images'"),
    "both schemas": ({**talk("a", "b"), "conversations": []}, "has both", "keep one"),
    "a wrong id": (talk("a", "b", id=1.5), "id is a fraction", "text or a whole number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_record_is_named_with_field_and_remedy(tmp_path: Path, fault: str) -> None:
    value, reason, remedy = FAULTS[fault]
    with pytest.raises(DataError) as caught:
        read(tmp_path, value)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'data.jsonl'}: record 0") and "\n" not in message
    assert reason in message and remedy in message
