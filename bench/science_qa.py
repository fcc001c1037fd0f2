"""ScienceQA: questions with choices, asked straight away or with a chain of thought before.

The forms are LLaVA's (scripts/convert_sqa_to_llava.py and llava/eval/eval_science_qa.py there):

- `letter` (CQM-A, of LLaVA-1.5): context, question, options, and the request to answer with the
  option's letter. One pass.
- `thought` (QCM-LEPA, of the first LLaVA): question, context, options. The model writes lecture and
  solution; then the same answer is carried on behind `###` and `ANSWER:`, and what follows is the
  letter. Two passes; the text that is scored is the thought and "The answer is X".

An answer is read as there: the letter alone; `X. ` at the start; `The answer is X` with any
character behind it, if that stands once. Anything else, and a letter beyond the choices, is wrong
and counted as unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..hd.errors import DataError, UsageError
from ..train.mixture_fields import Fields, read_json
from .free_run import Item

Form = Literal["letter", "thought"]
FORMS: tuple[Form, ...] = get_args(Form)
LETTERS = "ABCDE"
SPLIT = "test"
LETTER_REQUEST = "\nAnswer with the option's letter from the given choices directly."
THOUGHT_END = "###"  # ends the chain of thought, in training and in asking
ANSWER_OPENING = f" {THOUGHT_END}\nANSWER:"

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
SAID = re.compile(r"The answer is ([A-Z]).")  # LLaVA's: its last point stands for any character


@dataclass(frozen=True)
class Problem:
    """One problem. answer: place among the choices. image: name below the split's folder."""

    key: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str | None
    subject: str
    grade: int
    lecture: str
    solution: str

    @property
    def groups(self) -> list[str]:
        """Columns of the paper's table that it counts in: subject, context, grades."""
        context = [*(["TXT"] if self.hint else []), *(["IMG"] if self.image else [])]
        grades = "G1-6" if self.grade <= 6 else "G7-12"
        return [SUBJECTS[self.subject], *(context or ["NO"]), grades]


def read_problems(folder: Path, split: str = SPLIT) -> list[Problem]:
    """The problems of a split, from problems.json and pid_splits.json.

    Raises UsageError for an unknown split, DataError naming file, problem and field.
    """
    path = folder / "problems.json"
    splits = read_json(folder / "pid_splits.json")
    if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
        known = ", ".join(splits) if isinstance(splits, dict) else "none"
        raise UsageError(
            f"{folder / 'pid_splits.json'}: has no split {split!r} but {known}; see --split"
        )
    values = read_json(path)
    problems = []
    for key in map(str, splits[split]):
        if not isinstance(values, dict) or key not in values:
            raise DataError(f"{path}: problem {key} of split {split} is missing; fetch it again")
        problems.append(_problem(Fields(values[key], path, f"problem {key}"), key))
    if not problems:
        raise DataError(f"{folder / 'pid_splits.json'}: split {split!r} is empty; see --split")
    if len({problem.key for problem in problems}) < len(problems):
        raise DataError(f"{folder / 'pid_splits.json'}: a problem stands twice in split {split}")
    return problems


def _problem(fields: Fields, key: str) -> Problem:
    choices, answer = tuple(fields.texts("choices")), fields.whole("answer")
    if not 2 <= len(choices) <= len(LETTERS):
        raise fields.fault("choices", f"has {len(choices)} entries", f"give 2 to {len(LETTERS)}")
    if not 0 <= answer < len(choices):
        raise fields.fault("answer", f"is {answer}", f"give the place of one of {len(choices)}")
    subject, grade = fields.text("subject"), re.fullmatch(r"grade(\d+)", fields.text("grade"))
    if subject not in SUBJECTS:
        raise fields.fault("subject", f"is {subject!r}", f"there is {', '.join(SUBJECTS)}")
    if grade is None:
        raise fields.fault("grade", f"is {fields.text('grade')!r}", "write it like grade4")
    image = None if fields.get("image") is None else fields.text("image")
    return Problem(
        key=key,
        question=fields.text("question"),
        choices=choices,
        answer=answer,
        hint=fields.text("hint"),
        image=f"{key}/{image}" if image else None,
        subject=subject,
        grade=int(grade[1]),
        lecture=fields.text("lecture"),
        solution=fields.text("solution"),
    )


def prompt_of(problem: Problem, form: Form) -> str:
    """What is asked."""
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False)
    )
    context, question = f"Context: {problem.hint or 'N/A'}", f"Question: {problem.question}"
    first, second = (context, question) if form == "letter" else (question, context)
    text = _single_spaces(f"{first}\n{second}\nOptions: {options}")
    return text + LETTER_REQUEST if form == "letter" else text


def target_of(problem: Problem, form: Form) -> str:
    """The answer that a model is trained to give to this prompt."""
    letter = LETTERS[problem.answer]
    if form == "letter":
        return letter
    parts = [("LECTURE", problem.lecture), ("SOLUTION", problem.solution)]
    thought = "".join(f"{name}: {text}\n" for name, text in parts if text)
    return _single_spaces(f"{thought}{THOUGHT_END}\nANSWER: {letter}.")


def _single_spaces(text: str) -> str:
    return text.replace("  ", " ").strip()  # each pair once, as LLaVA's converter does


def items_of(problems: Sequence[Problem], form: Form, where: Path) -> list[Item]:
    """The problems as questions to a model."""
    return [
        Item(
            problem.key, problem.image, prompt_of(problem, form), f"{where}: problem {problem.key}"
        )
        for problem in problems
    ]


def thought_of(text: str) -> str:
    """A chain of thought without what stands behind its end."""
    return text.split(THOUGHT_END, 1)[0].rstrip()


def with_answer(thought: str, letter: str) -> str:
    """The text that is scored, out of a thought and what the model wrote behind `ANSWER:`."""
    return f"{thought}\n The answer is {letter.strip()}"


def read_letter(text: str, num_choices: int) -> int | None:
    """The place of the choice that an answer names, None where it names none or several."""
    letters = tuple(LETTERS)
    if text in letters or (text[:1] in letters and text[1:3] == ". "):
        letter = text[0]
    else:
        said = SAID.findall(text)
        letter = said[0] if len(said) == 1 else ""
    place = letters.index(letter) if letter in letters else num_choices
    return place if place < num_choices else None


def score_problems(problems: Sequence[Problem], texts: Mapping[str, str]) -> dict[str, Any]:
    """JSON-able: accuracy (0 to 1) and number of all, and of each column of the paper's table."""
    right: dict[str, list[bool]] = {"all": []}
    unreadable = 0
    for problem in problems:
        place = read_letter(texts[problem.key], len(problem.choices))
        unreadable += place is None
        for group in ("all", *problem.groups):
            right.setdefault(group, []).append(place == problem.answer)
    order = ["all", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"]
    return {
        "groups": {
            name: {"accuracy": sum(right[name]) / len(right[name]), "questions": len(right[name])}
            for name in order
            if name in right
        },
        "unreadable": unreadable,
    }
