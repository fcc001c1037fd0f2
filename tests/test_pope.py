"""The parsers against verified cases and the rule said again; scores against counting by hand."""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import astuple, fields
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_hd.bench.pope import (
    Scores,
    parse_original,
    parse_strict,
    score,
    score_splits,
    score_table,
)
from llava_hd.bench.pope_data import Answered

# Read out of LLaVA's eval_pope.py by running it.
YES_BY_THE_ORIGINAL_RULE = (
    "",
    "NO",
    "No!",
    "no\n",
    "No\nBecause",
    "None",
    "Nope",
    "isn't",
    "1. No",
    "Yes. There is no cat",
    "Unanswerable",
)
NO_BY_THE_ORIGINAL_RULE = ("No.", "No, there is none", "not sure", "Yes, there is no doubt")

WORDS = (
    "yes",
    "Yes",
    "no",
    "No",
    "NO",
    "not",
    "there",
    "is",
    ".",
    ",",
    " ",
    "  ",
    "\n",
    "!",
    "is,",
)
answers = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(WORDS)).map("".join))


@pytest.mark.parametrize("text", YES_BY_THE_ORIGINAL_RULE)
def test_the_original_parser_reads_a_yes(text: str) -> None:
    assert parse_original(text) is True


@pytest.mark.parametrize("text", NO_BY_THE_ORIGINAL_RULE)
def test_the_original_parser_reads_a_no(text: str) -> None:
    assert parse_original(text) is False


@given(answers)
def test_the_original_parser_looks_for_a_no_between_spaces_before_the_first_full_stop(
    text: str,
) -> None:
    sentence = re.sub(",", "", re.sub(r"\..*", "", text, count=1, flags=re.DOTALL))
    found = re.search(r"(\A| )(No|not|no)( |\Z)", sentence)
    assert parse_original(text) is (found is None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", True),
        ("YES!", True),
        ("  **Yes**, it is", True),
        ("_Yes_", True),
        ("“No”, there is none", False),
        ("no\n", False),
        ("NO", False),
        ("No,there", False),
        ("", None),
        ("...", None),
        ("None", None),
        ("Nope", None),
        ("No-one", None),
        ("no'one", None),
        ("1. No", None),
        ("not sure", None),
        ("There is no cat", None),
        ("Unanswerable", None),
        ("Yess", None),
    ],
)
def test_the_strict_parser_takes_the_first_word_or_nothing(text: str, answer: bool | None) -> None:
    assert parse_strict(text) is answer


@given(st.one_of(st.text(string.printable), st.lists(st.sampled_from(WORDS)).map("".join)))
def test_punctuation_and_case_do_not_change_the_strict_answer(text: str) -> None:
    assert parse_strict(f" *({text.swapcase()}") is parse_strict(text)


def answered(pairs: list[tuple[str, str]], split: str = "random") -> list[Answered]:
    """Answers from (label, text) pairs."""
    return [
        Answered(split, number, f"{number // 6}.jpg", f"Is there a {number}?", label, text)
        for number, (label, text) in enumerate(pairs)
    ]


def test_scores_of_a_small_case_by_hand() -> None:
    # yes-questions: hit, hit, miss, unreadable; no-questions: right, right, false alarm
    items = answered(
        [
            *(("yes", text) for text in ("Yes", "yes, two", "No", "dogs")),
            *(("no", text) for text in ("No.", "no", "Yes")),
        ]
    )
    strict = score(items, parse_strict)
    assert strict == Scores(
        accuracy=4 / 7, precision=2 / 3, recall=2 / 4, f1=4 / 7, yes_ratio=3 / 7,
        unparsable=1, questions=7,
    )  # fmt: skip
    original = score(items, parse_original)  # takes "dogs" for a yes
    assert original == Scores(
        accuracy=5 / 7, precision=3 / 4, recall=3 / 4, f1=3 / 4, yes_ratio=4 / 7,
        unparsable=1, questions=7,
    )  # fmt: skip


labelled = st.lists(
    st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["Yes", "No.", "dogs", "NO", ""])),
    min_size=1,
    max_size=40,
)


@given(labelled)
def test_scores_equal_counting(pairs: list[tuple[str, str]]) -> None:
    read = {"Yes": "yes", "No.": "no", "dogs": "?", "NO": "no", "": "?"}
    table = Counter((label, read[text]) for label, text in pairs)
    hits = table["yes", "yes"]
    said = hits + table["no", "yes"]
    there = hits + table["yes", "no"] + table["yes", "?"]
    precision = Fraction(hits, said) if said else Fraction(0)
    recall = Fraction(hits, there) if there else Fraction(0)
    both = precision + recall
    expected = (
        Fraction(hits + table["no", "no"], len(pairs)),
        precision,
        recall,
        2 * precision * recall / both if both else Fraction(0),
        Fraction(said, len(pairs)),
        table["yes", "?"] + table["no", "?"],
        len(pairs),
    )
    found = astuple(score(answered(pairs), parse_strict))
    assert found == pytest.approx([float(value) for value in expected], abs=1e-12)


@pytest.mark.parametrize("label", ["yes", "no"])
@pytest.mark.parametrize("text", ["Yes", "No", "?"])
def test_one_sided_labels_and_answers_never_divide_by_zero(label: str, text: str) -> None:
    for parser in (parse_original, parse_strict):
        values = score(answered([(label, text)] * 3), parser)
        assert all(0 <= value <= 3 for value in astuple(values))


def test_nothing_predicted_positive_has_precision_and_f1_zero() -> None:
    values = score(answered([("yes", "No"), ("no", "No")]))
    assert (values.precision, values.recall, values.f1) == (0, 0, 0)


def test_no_answers_are_no_scores() -> None:
    with pytest.raises(ValueError, match="no answers"):
        score([])


def test_the_mean_is_the_mean_of_the_splits_and_not_of_the_questions() -> None:
    few = answered([("yes", "Yes")], "random")
    many = answered([("yes", "No")] * 9 + [("no", "Yes")], "popular")
    scores = score_splits([*many, *few])
    assert list(scores) == ["random", "popular", "mean"]
    for field in fields(Scores):
        values = [getattr(scores[split], field.name) for split in ("random", "popular")]
        assert getattr(scores["mean"], field.name) == pytest.approx(sum(values) / 2)
    assert scores["mean"].accuracy == 0.5


def test_the_table_holds_the_original_scores_on_top_and_the_strict_ones_below() -> None:
    table = score_table(answered([("yes", "Yes"), ("no", "NO")]))
    assert list(table) == ["random", "mean", "strict"]
    assert list(table["strict"]) == ["random", "mean"]
    assert table["random"]["accuracy"] == 0.5
    assert table["strict"]["random"]["accuracy"] == 1.0
    names = ["accuracy", "precision", "recall", "f1", "yes_ratio", "unparsable", "questions"]
    assert list(table["random"]) == names
