"""Which questions were answered: POPE's versions, a digest, and that all models got the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..hd.errors import DataError
from .pope_data import Answered, split_rank

# (split, questions, labelled yes, images) -> the version that has just so many. Popular and
# adversarial are the same in all versions but for the misprint "imange".
PUBLISHED = {
    ("random", 3000, 1500, 500): "as in POPE's present file of 3,000",
    ("random", 2910, 1500, 500): "as in POPE's file of 2,910 before October 2023 (commit e3e3926), "
    "which LLaVA's question file has too",
    ("popular", 3000, 1500, 500): "as in POPE's files",
    ("adversarial", 3000, 1500, 500): "as in POPE's files",
}
MISPRINT = "imange"
OWN = "no published size"


@dataclass(frozen=True)
class SplitQuestions:
    """A split's questions: their numbers, the published version with the same numbers, and whether
    the texts hold the misprint of POPE's files before October 2023."""

    split: str
    questions: int
    labelled_yes: int
    images: int
    version: str
    misprints: int

    @property
    def text(self) -> str:
        """`2,910 questions about 500 images, 1,500 yes: as in ...`."""
        misprint = f"; {self.misprints:,} misprinted ({MISPRINT})" if self.misprints else ""
        return (
            f"{self.questions:,} questions about {self.images:,} images, "
            f"{self.labelled_yes:,} yes: {self.version}{misprint}"
        )


def question_sets(answered: Sequence[Answered]) -> list[SplitQuestions]:
    """One entry for each split, POPE's in their usual order."""
    found = []
    for split in sorted({item.split for item in answered}, key=split_rank):
        items = [item for item in answered if item.split == split]
        yes, images = sum(x.label == "yes" for x in items), len({x.image for x in items})
        version = PUBLISHED.get((split, len(items), yes, images), OWN)
        misprints = sum(MISPRINT in item.question for item in items)
        found.append(SplitQuestions(split, len(items), yes, images, version, misprints))
    return found


def questions_digest(answered: Sequence[Answered]) -> str:
    """sha256 of the questions with images and labels, whatever their order and ids."""
    lines = sorted(json.dumps([x.split, x.image, x.question, x.label]) for x in answered)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def questions_json(answered: Sequence[Answered]) -> dict[str, Any]:
    """JSON-able: the digest and the splits."""
    return {
        "sha256": questions_digest(answered),
        "splits": [vars(entry) for entry in question_sets(answered)],
    }


def all_matched(sides: Mapping[str, Sequence[Answered]]) -> dict[str, list[Answered]]:
    """The answers of all sides in the order of the first side's; DataError when one answers other
    questions."""
    names = iter(sides)
    first = next(names)
    rest = {name: matched(sides[first], sides[name], (first, name)) for name in names}
    return {first: list(sides[first]), **rest}


def matched(a: Sequence[Answered], b: Sequence[Answered], names: tuple[str, str]) -> list[Answered]:
    """B's answers in the order of A's; DataError when the two sets of questions differ."""
    of_a, of_b = ({item.key: item for item in items} for items in (a, b))
    only_a = [item for item in a if item.key not in of_b]
    only_b = [item for item in b if item.key not in of_a]
    if only_a or only_b:
        raise DataError(
            f"{names[0]} and {names[1]} answer different questions: {_some(only_a, names[0])} and "
            f"{_some(only_b, names[1])}{_sizes(a, b)}; compare answers to the same question files"
        )
    for item in a:
        other = of_b[item.key]
        for name in ("image", "question", "label"):
            ours, theirs = getattr(item, name), getattr(other, name)
            if ours != theirs:
                raise DataError(
                    f"question_id {item.question_id} of split {item.split} has {name} {ours!r} in "
                    f"{names[0]} and {theirs!r} in {names[1]}; "
                    "compare answers to the same question files"
                )
    return [of_b[item.key] for item in a]


def _some(items: Sequence[Answered], name: str) -> str:
    first = f" (first: question_id {items[0].question_id} of {items[0].split})" if items else ""
    return f"{len(items)} only in {name}{first}"


def _sizes(a: Sequence[Answered], b: Sequence[Answered]) -> str:
    """The first split whose size differs, with the version that each side has."""
    of_b = {entry.split: entry for entry in question_sets(b)}
    for ours in question_sets(a):
        theirs = of_b.get(ours.split)
        if theirs is not None and theirs.questions != ours.questions:
            return (
                f"; {ours.split} is {ours.questions:,} questions ({ours.version}) "
                f"against {theirs.questions:,} ({theirs.version})"
            )
    return ""
