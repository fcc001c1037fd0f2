"""Data files: what is read, and that every fault is named with file, record, field and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.train.record_images import image_path, path_fault
from llava_hd.train.records import check_images, read_records

GOOD = {
    "id": "a1",
    "image": "x/1.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cup."},
    ],
}
TEXT = {
    "id": 7,
    "model": "",
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
}


def write(tmp_path: Path, content: object, name: str = "data.json") -> Path:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return path


def test_an_array_and_json_lines_give_the_same_records(tmp_path):
    array = read_records([write(tmp_path, [GOOD, TEXT])])
    lines = read_records(
        [write(tmp_path, json.dumps(GOOD) + "\r\n\n" + json.dumps(TEXT) + "\n", "d.jsonl")]
    )
    assert [(r.id, r.images, r.turns) for r in array] == [(r.id, r.images, r.turns) for r in lines]
    assert array[0].images == ("x/1.jpg",) and array[1].images == ()
    assert array[0].turns[1].role == "gpt" and array[0].turns[1].text == "A cup."
    assert array[1].where.endswith("data.json: record 1 (id 7)")


def test_several_files_are_joined_and_a_byte_order_mark_is_ignored(tmp_path):
    first = write(tmp_path, b"\xef\xbb\xbf" + json.dumps([GOOD]).encode(), "a.json")
    second = write(tmp_path, [TEXT], "b.json")
    assert [record.id for record in read_records([first, second])] == ["a1", 7]


def test_a_record_may_hold_several_images(tmp_path):
    turns = [{"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "No"}]
    (record,) = read_records(
        [write(tmp_path, [{"image": ["a.png", "b.png"], "conversations": turns}])]
    )
    assert record.images == ("a.png", "b.png") and record.id is None


def changed(**values: object) -> dict:
    return {**GOOD, **values}


def turns(*pairs: tuple[object, object]) -> list:
    return [{"from": role, "value": value} for role, value in pairs]


QUESTION = ("human", "<image>\nWhat?")
FAULTS = {
    "not an object": (["text"], "record 1", "an object"),
    "no conversations": ({"id": "a", "image": "b.jpg"}, "conversations is missing", "add"),
    "a misspelt key": (
        {"id": "a", "conversation": GOOD["conversations"]},
        "conversations is missing",
        "'conversation', rename that to 'conversations'",
    ),
    "a misspelt image key": (
        {"id": "a", "images": "b.jpg", "conversations": GOOD["conversations"]},
        "1 <image> tags",
        "rename that to 'image'",
    ),
    "no turns": (changed(conversations=[]), "conversations is empty", "give a human turn"),
    "turns not a list": (changed(conversations="hi"), "conversations is text", "list of turns"),
    "a turn not an object": (changed(conversations=["hi"]), "conversations[0] is text", "from"),
    "no from": (changed(conversations=[{"value": "x"}]), "conversations[0].from is missing", "add"),
    "no value": (changed(conversations=[{"from": "human"}]), "conversations[0].value", "add it"),
    "value not text": (
        changed(conversations=turns(("human", 3), ("gpt", "x"))),
        "conversations[0].value is a number",
        "give text",
    ),
    "an unknown role": (
        changed(conversations=turns(("user", "<image>"), ("gpt", "x"))),
        "conversations[0].from 'user' is unknown",
        "'human' or 'gpt'",
    ),
    "roles swapped": (
        changed(conversations=turns(("gpt", "x"), QUESTION)),
        "conversations[0].from is 'gpt' where 'human' is due",
        "human first",
    ),
    "two humans in a row": (
        changed(conversations=turns(QUESTION, ("human", "x"))),
        "conversations[1].from",
        "turns alternate",
    ),
    "no answer": (
        changed(conversations=turns(QUESTION)),
        "1 turns, the last",
        "end with an answer",
    ),
    "an empty answer": (
        changed(conversations=turns(QUESTION, ("gpt", " \n"))),
        "conversations[1].value is an empty answer",
        "drop the record",
    ),
    "a tag too many": (
        changed(conversations=turns(("human", "<image><image>"), ("gpt", "x"))),
        "2 <image> tags in the human turns but 1 images",
        "one tag per image",
    ),
    "an image without a tag": (
        changed(conversations=turns(("human", "what?"), ("gpt", "x"))),
        "0 <image> tags",
        "one tag per image",
    ),
    "an image of the wrong kind": (changed(image={"a": 1}), "image is an object", "relative path"),
    "an empty image": (changed(image=""), "image '' is empty", "below the image folder"),
    "an absolute path": (changed(image="/etc/passwd"), "is an absolute path", "below"),
    "a path upwards": (changed(image="x/../../y.jpg"), "leaves the image folder", "below"),
    "a wrong id": (changed(id=[1]), "id is a list", "text or a whole number"),
    "a fraction as id": (changed(id=1.5), "id is a fraction", "text or a whole number"),
    "a folder as image": (changed(image="."), "image '.' names no file", "below the image folder"),
    "half a character in a name": (changed(image="a\ud800.jpg"), "half of a character", "below"),
    "half a character in a turn": (
        changed(conversations=turns(QUESTION, ("gpt", "a \ud83d cup"))),
        "conversations[1].value holds half of a character",
        "write the whole one",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_record_is_named_with_field_and_remedy(tmp_path, fault):
    record, reason, remedy = FAULTS[fault]
    path = write(tmp_path, [TEXT, record])
    with pytest.raises(DataError) as caught:
        read_records([path])
    message = str(caught.value)
    assert message.startswith(f"{path}: record 1")
    assert reason in message and remedy in message and "\n" not in message


def test_the_first_fault_is_shown_and_all_are_counted(tmp_path):
    path = write(tmp_path, [TEXT, changed(image="/a"), TEXT, changed(conversations=[])])
    with pytest.raises(DataError, match=r"record 1 \(id 'a1'\).*2 faulty records"):
        read_records([path])


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ('[{"id": 1},]', "line 1", "a comma stands before the closing bracket"),
        ('{"id": 1,}\n{}', "line 1", "a comma stands before the closing bracket"),
        ('[\n{"id": 1}\n', "line", "ends too early"),
        (json.dumps(TEXT) + '\n{"id": "b", "conv', "line 2", "not JSON"),
        ('{\n"data": []\n}', "line 1", "not a list of records"),
        ("3", "record 0", "is a number, not an object"),
        ('[{"id": NaN}]', "line 1", "NaN is not allowed"),
        (b'[{"id": "\xff"}]', "line 1: byte 9", "not UTF-8"),
        ("[]", "holds no record", "at least one"),
        ("", "holds no record", "at least one"),
        ("[" * 100_000, "line 1", "nested too deeply"),
        ('[{"id": ' + "1" * 5000 + "}]", "line 1", "thousands of digits"),
        ('{"id": ' + "1" * 5000 + "}", "line 1", "thousands of digits"),
        ('{\n"id": ' + "1" * 5000 + "}", "line 1", "ends too early"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(tmp_path, content, place, reason):
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_records([path])
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert place in message and reason in message


def test_a_missing_file_and_a_folder_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_records([tmp_path / "none.json"])
    with pytest.raises(UsageError, match="is a folder"):
        read_records([tmp_path])


def records_with(tmp_path: Path, *names: str) -> list:
    return read_records([write(tmp_path, [changed(image=name) for name in names])])


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    root = tmp_path / "images"
    (root / "x").mkdir(parents=True)
    (root / "x/1.jpg").touch()
    assert check_images(records_with(tmp_path, "x/1.jpg", "x/1.jpg"), root) == 1
    with pytest.raises(DataError, match=r"record 1 .*'x/2.jpg'.*2 of 3 images"):
        check_images(records_with(tmp_path, "x/1.jpg", "x/2.jpg", "y/3.jpg"), root)
    with pytest.raises(UsageError, match=r"data\.images"):
        check_images([], tmp_path / "none")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/a.jpg", "a/" * 3000 + "a.jpg"])
def test_a_name_too_long_for_the_system_is_a_missing_image(tmp_path, name):
    with pytest.raises(DataError, match="File name too long"):
        check_images(records_with(tmp_path, name), tmp_path)


def test_a_link_may_stay_below_the_root_but_not_leave_it(tmp_path):
    root, outside = tmp_path / "images", tmp_path / "images-evil"
    (root / "x").mkdir(parents=True)
    outside.mkdir()
    for folder in (root, outside):
        (folder / "1.jpg").touch()
    (root / "x/inside.jpg").symlink_to(root / "1.jpg")
    (root / "x/out.jpg").symlink_to(outside / "1.jpg")
    (root / "folder").symlink_to(outside, target_is_directory=True)
    (root / "x/dir.jpg").mkdir()
    assert image_path(root, "x/inside.jpg") == (root / "1.jpg").resolve()
    assert check_images(records_with(tmp_path, "x/inside.jpg"), root) == 1
    for name, reason in (
        ("x/out.jpg", "leaves"),
        ("folder/1.jpg", "leaves"),
        ("x/dir.jpg", "not a regular file"),
    ):
        with pytest.raises(DataError, match=reason):
            image_path(root, name)
        with pytest.raises(DataError, match=reason):
            check_images(records_with(tmp_path, name), root)


@pytest.mark.parametrize(
    "name",
    [
        "/a",
        "../a",
        "a/../../b",
        "..",
        "a/..",
        "\\\\host\\a",
        "C:\\a.jpg",
        "a\\..\\..\\b",
        "",
        " ",
        "a\0b",
    ],
)
def test_hostile_names_are_refused_by_their_text(tmp_path, name):
    assert path_fault(name) is not None
    with pytest.raises(DataError):
        image_path(tmp_path, name)


@pytest.mark.parametrize("name", ["a.jpg", "x/y.jpg", "..a.jpg", "a..b/c.jpg", "é/ü 1.jpg"])
def test_plain_names_are_accepted(name):
    assert path_fault(name) is None
