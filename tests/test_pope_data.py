"""Reading POPE's, LLaVA's and our files: what they hold, and one named line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pope_files import SPLITS, llava_records, pope_records, write_lines, write_pope

from llava_hd.bench.pope_data import (
    answer_files,
    read_answers,
    read_questions,
    split_files,
)
from llava_hd.hd.errors import DataError, LlavaHDError, UsageError


def test_popes_files_are_read_with_the_split_of_their_names(tmp_path: Path) -> None:
    questions = read_questions(split_files(write_pope(tmp_path)))
    assert len(questions) == 3 * 18
    for split in SPLITS:
        of_split = [question for question in questions if question.split == split]
        assert [(q.question_id, q.image, q.text, q.label) for q in of_split] == [
            (r["question_id"], r["image"], r["text"], r["label"]) for r in pope_records(split)
        ]
    assert questions[1].where == f"{tmp_path}/coco_pope_random.json:2"


def test_a_folder_stands_for_its_split_files(tmp_path: Path) -> None:
    write_pope(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    files = split_files([tmp_path])
    assert [file.split for file in files] == list(SPLITS)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("coco_pope_random.json", "random"),
        ("gqa_pope_seem_adversarial.jsonl", "adversarial"),
        ("popular.json", "popular"),
        ("pope-popular.jsonl", "popular"),
        ("unpopular.json", None),
        ("random_words.json", None),
        ("coco_pope_random.txt", None),
    ],
)
def test_the_split_comes_from_the_end_of_the_file_name(name: str, split: str | None) -> None:
    [file] = split_files([name])
    assert file.split == split


def test_a_split_can_be_given_before_the_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", pope_records("random"))
    [file] = split_files([f"hard={path}"])
    assert (file.split, file.path) == ("hard", path)
    assert {question.split for question in read_questions([file])} == {"hard"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("randon", "random"),
        ("Random", "random"),
        ("rnadom", "random"),
        ("populer", "popular"),
        ("adverserial", "adversarial"),
        ("adversial", "adversarial"),
    ],
)
def test_a_misspelt_split_is_no_split_of_ones_own(tmp_path: Path, name: str, meant: str) -> None:
    path = write_lines(tmp_path / "mine.jsonl", pope_records("random"))
    with pytest.raises(UsageError, match=f"no split {name!r}; did you mean {meant!r}"):
        split_files([f"{name}={path}"])
    answers = write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "split": name, "text": "No"}])
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*did you mean {meant!r}"):
        read_answers(split_files([answers]))
    for own in ("random2", "hard", "popular-gqa", "rare", "nano"):
        assert split_files([f"{own}={path}"])[0].split == own


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x=y_random.json", pope_records("random"))
    assert [file.path for file in split_files([path])] == [path]


def test_a_name_without_a_split_is_an_error_that_names_the_file_and_the_remedy(
    tmp_path: Path,
) -> None:
    path = write_lines(tmp_path / "mine.jsonl", pope_records("random"))
    with pytest.raises(DataError, match=rf"{path}: cannot tell the split.*random={path}"):
        read_questions(split_files([path]))


def test_llavas_category_is_the_split(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "llava_pope_test.jsonl", llava_records())
    questions = read_questions(split_files([path]))
    assert [q.split for q in questions[::18]] == ["adversarial", "random", "popular"]
    assert all(question.label is None for question in questions)


def record(**changes: object) -> dict[str, object]:
    return {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes", **changes}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (record(label="maybe"), ["label 'maybe'", "'yes' nor 'no'"]),
        (record(label="Yes"), ["label 'Yes'"]),
        (record(label=["yes"]), ["label"]),
        (record(question_id=None), ["question_id", "None"]),
        (record(question_id=True), ["question_id", "True"]),
        (record(question_id=1.5), ["question_id", "1.5"]),
        (record(image=""), ["image"]),
        (record(text=3), ["text", "3"]),
        (record(category="popular"), ["category", "'popular'", "'random'"]),
        (record(category="mean"), ["split cannot be called 'mean'"]),
    ],
)
def test_a_broken_question_is_named_by_file_line_and_value(
    tmp_path: Path, broken: dict[str, object], words: list[str]
) -> None:
    path = write_lines(tmp_path / "pope_random.json", [record(question_id=7), broken])
    with pytest.raises(DataError) as caught:
        read_questions(split_files([path]))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b'[{"question_id": 1}]', "JSON lines"),
        (b"hello", "'hello' is not a JSON object"),
        (b'{"question_id": 1,', "not a JSON object"),
        (b"[" * 5000, "not a JSON object"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"\n \n", "no question"),
    ],
)
def test_a_file_that_is_not_json_lines_is_one_named_line(
    tmp_path: Path, content: bytes, word: str
) -> None:
    path = tmp_path / "pope_random.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_questions(split_files([path]))
    assert str(path) in str(caught.value)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blank_lines_a_byte_order_mark_and_line_separators_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "pope_random.json"
    line = json.dumps(record(text="Is\u2028it?"), ensure_ascii=False)
    path.write_text(f"\ufeff\n{line}\r\n\n", encoding="utf-8")
    [question] = read_questions(split_files([path]))
    assert (question.text, question.where) == ("Is\u2028it?", f"{path}:2")


def test_a_question_that_stands_twice_is_named_with_both_places(tmp_path: Path) -> None:
    first, _, _ = write_pope(tmp_path / "a")
    second = write_lines(tmp_path / "b_random.json", pope_records("random")[4:])
    with pytest.raises(
        DataError, match=rf"question_id 5 of split random.*{first}:5 and {second}:1"
    ):
        read_questions(split_files([first, second]))


def test_answers_are_read_with_what_they_carry(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "answers.jsonl",
        [
            {"question_id": 1, "text": "", "model_id": "x", "metadata": {}},
            {"question_id": 1, "split": "popular", "text": "Yes", "label": "no", "image": "a"},
            {"question_id": 1, "category": "random", "text": "No", "question": "Is it?"},
        ],
    )
    found = read_answers(split_files([path]))
    assert [(a.split, a.text, a.label, a.image, a.question) for a in found] == [
        (None, "", None, None, None),
        ("popular", "Yes", "no", "a", None),
        ("random", "No", None, None, "Is it?"),
    ]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ({"question_id": 1}, "'text'"),
        ({"question_id": 1, "text": None}, "'text'"),
        ({"text": "Yes"}, "'question_id'"),
        ({"question_id": 1, "text": "Yes", "label": "perhaps"}, "'perhaps'"),
        ({"question_id": 1, "text": "Yes", "split": 3}, "'split'"),
    ],
)
def test_a_broken_answer_is_named_by_file_and_line(
    tmp_path: Path, line: dict[str, object], word: str
) -> None:
    path = write_lines(tmp_path / "answers.jsonl", [line])
    with pytest.raises(DataError) as caught:
        read_answers(split_files([path]))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert word in str(caught.value)


def test_an_answer_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    line = {"question_id": 3, "split": "random", "text": "Yes"}
    path = write_lines(tmp_path / "answers.jsonl", [line, line])
    with pytest.raises(DataError, match=rf"3 of split random stands twice: {path}:1 and {path}:2"):
        read_answers(split_files([path]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nothing.json", UsageError), ("random=nothing.json", UsageError), ("mean=x", UsageError)],
)
def test_files_that_are_not_there_are_usage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[LlavaHDError]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind):
        read_questions(split_files([name]))


def test_folders_without_the_files_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        split_files([tmp_path])
    with pytest.raises(UsageError, match=r"no answers\.jsonl"):
        answer_files([tmp_path])
