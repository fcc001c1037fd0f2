"""Joining questions, labels and answers: by id and split, whatever the order, nothing left over."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pope_files import SPLITS, llava_records, pope_records, true_label, write_lines, write_pope

from llava_hd.bench.pope import score_splits
from llava_hd.bench.pope_data import split_files
from llava_hd.bench.pope_join import load_answered
from llava_hd.hd.errors import DataError


def pope_answers(**extra: Any) -> list[dict[str, Any]]:
    """A right answer to every question of the three files."""
    return [
        {
            "split": split,
            "question_id": record["question_id"],
            "text": record["label"].title(),
            **extra,
        }
        for split in SPLITS
        for record in pope_records(split)
    ]


def llava_answers() -> list[dict[str, Any]]:
    return [
        {"question_id": record["question_id"], "text": true_label(record["text"]).title()}
        for record in llava_records()
    ]


def test_answers_are_joined_by_id_and_split_in_any_order(tmp_path: Path) -> None:
    files = split_files(write_pope(tmp_path))
    answers = pope_answers()
    random.Random(0).shuffle(answers)
    found = load_answered(split_files([write_lines(tmp_path / "a.jsonl", answers)]), files)
    assert [item.key for item in found] == [(s, str(n)) for s in SPLITS for n in range(1, 19)]
    assert all(scores.accuracy == 1 for scores in score_splits(found).values())


def test_a_number_and_its_text_are_the_same_id(tmp_path: Path) -> None:
    files = split_files(write_pope(tmp_path))
    answers = [{**a, "question_id": str(a["question_id"])} for a in pope_answers()]
    path = write_lines(tmp_path / "a.jsonl", answers)
    assert len(load_answered(split_files([path]), files)) == 54


def test_answers_to_the_old_short_split_are_refused_with_both_sides(tmp_path: Path) -> None:
    """POPE#17: scored line by line such answers score like guesses; here they are an error."""
    files = write_pope(tmp_path)
    old = [a for a in pope_answers() if (a["split"], a["question_id"]) != ("random", 4)]
    old.append({"split": "popular", "question_id": 99, "text": "Yes"})
    path = write_lines(tmp_path / "a.jsonl", old)
    with pytest.raises(DataError) as caught:
        load_answered(split_files([path]), split_files(files))
    message = str(caught.value)
    assert (
        f"1 of 54 questions have no answer (first: question_id 4 of split random, {files[0]}:4)"
        in (message)
    )
    assert (
        f"1 of 54 answers have no question (first: question_id 99 of split popular, {path}:54)"
        in (message)
    )


def test_one_missing_answer_shows_that_the_other_side_is_complete(tmp_path: Path) -> None:
    files = split_files(write_pope(tmp_path))
    path = write_lines(tmp_path / "a.jsonl", pope_answers()[:-1])
    with pytest.raises(DataError, match=r"1 of 54 questions.*0 of 53 answers have no question"):
        load_answered(split_files([path]), files)


@pytest.mark.parametrize(
    ("field", "value"),
    [("image", "other.png"), ("question", "Is there a cow in the image?"), ("label", "no")],
)
def test_an_answer_that_contradicts_its_question_is_refused_with_both_values(
    tmp_path: Path, field: str, value: str
) -> None:
    files = split_files(write_pope(tmp_path))
    answers = pope_answers()
    answers[2][field] = value
    path = write_lines(tmp_path / "a.jsonl", answers)
    with pytest.raises(DataError, match=rf"{path}:3: {field} is '{value[:9]}.*_random\.json:3 has"):
        load_answered(split_files([path]), files)


def test_answers_without_a_split_need_ids_that_no_two_splits_share(tmp_path: Path) -> None:
    files = write_pope(tmp_path)
    plain = [{k: v for k, v in a.items() if k != "split"} for a in pope_answers()]
    one = write_lines(tmp_path / "one.jsonl", plain[:18])
    with pytest.raises(DataError, match="random, popular, adversarial and the answer names none"):
        load_answered(split_files([one]), split_files(files))
    assert len(load_answered(split_files([one]), split_files(files[:1]))) == 18
    named = [
        f"{split}={write_lines(tmp_path / f'{n}.jsonl', plain[18 * n : 18 * n + 18])}"
        for n, split in enumerate(SPLITS)
    ]
    assert len(load_answered(split_files(named), split_files(files))) == 54


def test_the_same_answer_with_and_without_a_split_is_answered_twice(tmp_path: Path) -> None:
    files = split_files(write_pope(tmp_path)[:1])
    answers = [a for a in pope_answers() if a["split"] == "random"]
    answers.append({"question_id": 5, "text": "No"})
    path = write_lines(tmp_path / "a.jsonl", answers)
    with pytest.raises(DataError, match=rf"5 of split random is answered twice: {path}:5 and"):
        load_answered(split_files([path]), files)


def test_llavas_layout_gets_popes_labels_through_prompts_and_misprints(tmp_path: Path) -> None:
    write_pope(tmp_path / "labels")
    questions = write_lines(tmp_path / "llava_pope_test.jsonl", llava_records())
    answers = write_lines(tmp_path / "model.jsonl", llava_answers())
    found = load_answered(
        split_files([answers]), split_files([questions]), split_files([tmp_path / "labels"])
    )
    assert len(found) == 54
    assert any("imange" in item.question for item in found)
    assert not any("single word" in item.question for item in found)
    assert all(item.label == true_label(item.question) for item in found)
    assert all(scores.f1 == 1 for scores in score_splits(found).values())


def test_labels_of_another_version_are_refused_with_both_sides(tmp_path: Path) -> None:
    """Current POPE has 90 questions that LLaVA's file does not ask."""
    write_pope(tmp_path / "labels")
    asked = [r for r in llava_records() if not r["text"].startswith("Is there a random boat")]
    questions = write_lines(tmp_path / "q.jsonl", asked)
    answers = write_lines(tmp_path / "a.jsonl", llava_answers())
    with pytest.raises(
        DataError, match=r"0 of 51 questions have no label, 3 of 54 labels have no question \(first"
    ):
        load_answered(
            split_files([answers]), split_files([questions]), split_files([tmp_path / "labels"])
        )


def test_label_files_alone_are_question_files(tmp_path: Path) -> None:
    write_pope(tmp_path / "labels")
    path = write_lines(tmp_path / "a.jsonl", pope_answers())
    labels = split_files([tmp_path / "labels"])
    assert len(load_answered(split_files([path]), labels=labels)) == 54


def test_our_own_answers_need_no_other_file(tmp_path: Path) -> None:
    lines = [
        {
            "split": split,
            "question_id": record["question_id"],
            "image": record["image"],
            "question": record["text"],
            "label": record["label"],
            "text": "Yes",
        }
        for split in SPLITS
        for record in pope_records(split)
    ]
    found = load_answered(split_files([write_lines(tmp_path / "answers.jsonl", lines)]))
    assert score_splits(found)["mean"].accuracy == 0.5


def test_bare_answers_without_questions_say_what_is_missing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", pope_answers())
    with pytest.raises(DataError, match=rf"{path}:1: field 'image' is missing; .*--questions"):
        load_answered(split_files([path]))


def test_questions_without_labels_say_what_is_missing(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "q.jsonl", llava_records())
    answers = write_lines(tmp_path / "a.jsonl", llava_answers())
    with pytest.raises(DataError, match=rf"{questions}:1: field 'label' is missing.*--labels"):
        load_answered(split_files([answers]), split_files([questions]))


def test_a_label_file_with_an_unlabelled_line_is_refused_at_that_line(tmp_path: Path) -> None:
    labels = write_pope(tmp_path / "labels")
    records = pope_records("random")
    del records[4]["label"]
    write_lines(labels[0], records)
    questions = write_lines(tmp_path / "q.jsonl", llava_records())
    answers = write_lines(tmp_path / "a.jsonl", llava_answers())
    for asked in (split_files([questions]), []):
        with pytest.raises(DataError, match=rf"^{labels[0]}:5: field 'label' is missing in a lab"):
            load_answered(split_files([answers]), asked, split_files([tmp_path / "labels"]))


def test_concatenated_answers_without_splits_are_told_how_to_be_given(tmp_path: Path) -> None:
    files = split_files(write_pope(tmp_path))
    plain = [{k: v for k, v in a.items() if k != "split"} for a in pope_answers()]
    path = write_lines(tmp_path / "a.jsonl", plain)
    with pytest.raises(DataError, match=rf"1 stands twice: {path}:1 and {path}:19; .*SPLIT=FILE"):
        load_answered(split_files([path]), files)


def test_an_empty_answers_file_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match=rf"{path}: no answer"):
        load_answered(split_files([path]))


def test_a_question_asked_twice_under_two_ids_is_an_error_for_the_label_join(
    tmp_path: Path,
) -> None:
    write_pope(tmp_path / "labels")
    asked = llava_records()
    asked.append({**asked[0], "question_id": 5_000_000})
    questions = write_lines(tmp_path / "q.jsonl", asked)
    answers = write_lines(tmp_path / "a.jsonl", llava_answers())
    with pytest.raises(
        DataError, match=rf"about photo_2\.png in split adversarial .*{questions}:55"
    ):
        load_answered(
            split_files([answers]), split_files([questions]), split_files([tmp_path / "labels"])
        )
