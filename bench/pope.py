"""POPE, the yes/no test of object hallucination: the two parsers of an answer, and the scores.

Plain Python: scoring starts at once. Reading the files is pope_data.py, joining them pope_join.py,
asking a model pope_run.py.

With `yes` as the positive class, over the questions of one split:

    accuracy  = right / questions              precision = true yes / answered yes
    recall    = true yes / labelled yes        F1        = 2 precision recall / (precision + recall)
    yes_ratio = answered yes / questions

A quotient without a denominator is 0. An answer that a parser cannot read is wrong: it lowers the
accuracy, it is a missed object where the label is yes (recall), and it is no `yes` (precision and
yes_ratio are those of the answers that were read as yes). `unparsable` always counts the answers
that the *strict* parser cannot read; the original parser takes each of those for a yes, or for a
no where it finds a no-word in it. The published single figure is the mean F1 of the three splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .pope_data import Answered, split_rank

PROMPT = "\nAnswer the question using a single word or phrase."  # the paper's response prompt
ORIGINAL_NO = {"No", "not", "no"}
FIRST_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

Parser = Callable[[str], bool | None]


def parse_original(text: str) -> bool:
    """LLaVA's and POPE's own rule: False (no) if one of the words is `No`, `not` or `no`.

    The words are those before the first full stop, without commas, separated by single spaces;
    everything else is a yes: an empty answer, "NO", "None", "Unanswerable".
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return ORIGINAL_NO.isdisjoint(words)


def parse_strict(text: str) -> bool | None:
    """True or False if the first word is yes or no in any case, after punctuation; else None.

    A word is letters and digits, with hyphens and apostrophes inside: "No-one" is not a no.
    """
    word = FIRST_WORD.search(text)
    return {"yes": True, "no": False}.get(word[0].lower()) if word else None


PARSERS: dict[str, Parser] = {"original": parse_original, "strict": parse_strict}


@dataclass(frozen=True)
class Scores:
    """The scores of one split, or the mean of several splits' scores (the module's docstring)."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsable: float
    questions: float


def score(answered: Sequence[Answered], parser: Parser = parse_original) -> Scores:
    """The scores of one split's answers; raises ValueError when there is none."""
    if not answered:
        raise ValueError("no answers to score")
    pairs = [(item.label == "yes", parser(item.text)) for item in answered]
    true_yes = sum(label and answer is True for label, answer in pairs)
    said_yes = sum(answer is True for _, answer in pairs)
    labelled_yes = sum(label for label, _ in pairs)
    return Scores(
        accuracy=sum(label is answer for label, answer in pairs) / len(pairs),
        precision=ratio(true_yes, said_yes),
        recall=ratio(true_yes, labelled_yes),
        f1=ratio(2 * true_yes, said_yes + labelled_yes),
        yes_ratio=said_yes / len(pairs),
        unparsable=sum(parse_strict(item.text) is None for item in answered),
        questions=len(pairs),
    )


def is_right(item: Answered, parser: Parser) -> bool:
    """Whether the parser reads the label out of the answer."""
    return parser(item.text) is (item.label == "yes")


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 where the whole is 0."""
    return part / whole if whole else 0.0


def by_split(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    """The answers of each split; POPE's splits in their usual order, then the others."""
    groups: dict[str, list[Answered]] = {}
    for item in answered:
        groups.setdefault(item.split, []).append(item)
    return {split: groups[split] for split in sorted(groups, key=split_rank)}


def score_splits(
    answered: Sequence[Answered], parser: Parser = parse_original
) -> dict[str, Scores]:
    """The scores of each split, and as "mean" the plain mean over the splits of every figure."""
    splits = {split: score(items, parser) for split, items in by_split(answered).items()}
    means = {
        field.name: sum(getattr(scores, field.name) for scores in splits.values()) / len(splits)
        for field in fields(Scores)
    }
    return {**splits, "mean": Scores(**means)}


def score_table(answered: Sequence[Answered]) -> dict[str, Any]:
    """JSON-able: split and "mean" -> scores by the original parser; "strict" -> all by that."""
    table: dict[str, Any] = _plain(score_splits(answered, parse_original))
    return {**table, "strict": _plain(score_splits(answered, parse_strict))}


def _plain(scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    return {split: asdict(values) for split, values in scores.items()}
