"""Versions of POPE's questions are told apart, and answers to different ones are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_hd.bench.pope_data import Answered
from llava_hd.bench.question_sets import (
    OWN,
    all_matched,
    matched,
    question_sets,
    questions_digest,
    questions_json,
)
from llava_hd.hd.errors import DataError


def pope(split: str, questions: int = 3000, misprints: int = 0) -> list[Answered]:
    """A split of POPE's size: 500 images, 1,500 yes, the rest no."""
    return [
        Answered(
            split,
            number,
            f"{number % 500}.jpg",
            f"Is there an egg {number} in the {'imange' if number < misprints else 'image'}?",
            "yes" if number < 1500 else "no",
            "Yes",
        )
        for number in range(questions)
    ]


def test_the_two_random_splits_are_told_apart() -> None:
    [new], [old] = question_sets(pope("random")), question_sets(pope("random", 2910, 144))
    assert "3,000 questions about 500 images, 1,500 yes: as in POPE's present file" in new.text
    assert "2,910 questions about 500 images, 1,500 yes: as in POPE's file of 2,910" in old.text
    assert "144 misprinted (imange)" in old.text
    assert "misprinted" not in new.text


def test_the_splits_are_listed_in_their_order_and_others_have_no_version() -> None:
    own = [Answered("own", 1, "a.jpg", "Is there?", "yes", "Yes")]
    found = question_sets([*own, *pope("adversarial"), *pope("popular", 600)])
    assert [entry.split for entry in found] == ["popular", "adversarial", "own"]
    assert [entry.version == OWN for entry in found] == [True, False, True]


def test_the_digest_is_of_the_questions_alone() -> None:
    items = pope("random")
    answered = [replace(x, text="No", question_id=f"x{x.question_id}") for x in reversed(items)]
    assert questions_digest(answered) == questions_digest(items)
    for change in ({"label": "no"}, {"image": "b.jpg"}, {"question": "Is it?"}, {"split": "own"}):
        assert questions_digest([replace(items[0], **change), *items[1:]]) != questions_digest(
            items
        )
    assert questions_json(items)["sha256"] == questions_digest(items)


def test_answers_to_the_two_random_splits_are_refused_by_their_versions() -> None:
    with pytest.raises(DataError) as caught:
        matched(pope("random"), pope("random", 2910), ("new", "old"))
    message = str(caught.value)
    assert "90 only in new (first: question_id 2910 of random)" in message
    assert "random is 3,000 questions (as in POPE's present file of 3,000) against 2,910" in message
    assert "compare answers to the same question files" in message


def test_the_misprint_is_another_question() -> None:
    with pytest.raises(DataError, match="imange"):
        matched(pope("random"), pope("random", misprints=1), ("a", "b"))


def test_all_sides_come_in_the_order_of_the_first() -> None:
    items = pope("random", 20)
    found = all_matched({"a": items, "b": items[::-1], "c": items})
    assert found == {"a": items, "b": items, "c": items}
    with pytest.raises(DataError, match="a and c answer different questions"):
        all_matched({"a": items, "b": items, "c": items[1:]})
