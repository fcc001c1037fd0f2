"""POPE's questions, labels and answers brought together.

Everything is joined by (split, question_id), never by the order of lines, and whatever is left
over on either side is an error: POPE has a random split of 2910 and one of 3000 questions, and
matched line by line such files quietly score about as high as guessing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..hd.errors import DataError
from .pope_data import (
    Answer,
    Answered,
    Key,
    Question,
    SplitFile,
    index_by,
    read_answers,
    read_questions,
    say_id,
)


def bare_question(text: str) -> str:
    """The question without a response prompt: POPE's questions are one line."""
    return text.split("\n", 1)[0].strip()


def comparable_question(text: str) -> str:
    """The bare question with the misprint of POPE's files before October 2023 repaired."""
    return bare_question(text).replace("imange", "image")


def with_labels(questions: Sequence[Question], labels: Sequence[Question]) -> list[Question]:
    """The questions with the labels of POPE's own files, joined by (split, image, question).

    Question ids do not carry over between LLaVA's file and POPE's. Raises DataError when anything
    is left over on either side.
    """

    def key(question: Question) -> tuple[str, ...]:
        return comparable_question(question.text), question.image, question.split

    def say(question: Question) -> str:
        return f"{question.text!r} about {question.image} in split {question.split}"

    by_key = index_by(labels, key, say)
    index_by(questions, key, say)
    unlabelled = [question for question in questions if key(question) not in by_key]
    asked = {key(question) for question in questions}
    unasked = [label for name, label in by_key.items() if name not in asked]
    _refuse_leftovers(
        ("questions", "label", unlabelled, len(questions)),
        ("labels", "question", unasked, len(labels)),
        "take the label files of the same version of POPE (LLaVA's 8910 questions: POPE e3e3926)",
    )
    return [replace(question, label=by_key[key(question)].label) for question in questions]


def join(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Answered]:
    """Each question with its answer, by (split, question_id), in the order of the questions.

    An answer without a split finds its question by id alone if no two splits share that id. Raises
    DataError when anything is left over on either side, or when the two contradict each other.
    """
    by_key = index_by(questions, lambda question: question.key, say_id)
    splits_of_id: dict[str, list[str]] = {}
    for question in questions:
        splits_of_id.setdefault(str(question.question_id), []).append(question.split)
    answer_of: dict[Key, Answer] = {}
    strangers: list[Answer] = []
    for answer in answers:
        key = (_split_of(answer, splits_of_id), str(answer.question_id))
        if key not in by_key:
            strangers.append(answer)
        elif key in answer_of:
            raise DataError(
                f"question_id {key[1]} of split {key[0]} is answered twice: "
                f"{answer_of[key].where} and {answer.where}; remove one"
            )
        else:
            answer_of[key] = answer
    _refuse_leftovers(
        ("questions", "answer", [q for q in questions if q.key not in answer_of], len(questions)),
        ("answers", "question", strangers, len(answers)),
        "give the question files that these answers belong to",
    )
    return [_answered(question, answer_of[question.key]) for question in questions]


def _split_of(answer: Answer, splits_of_id: Mapping[str, list[str]]) -> str:
    if answer.split is not None:
        return answer.split
    splits = splits_of_id.get(str(answer.question_id), [])
    if len(splits) > 1:
        raise DataError(
            f"{answer.where}: question_id {answer.question_id} exists in the splits "
            f"{', '.join(splits)} and the answer names none; give each line a 'split', or one "
            "answers file per split, as in random=FILE"
        )
    return splits[0] if splits else ""


def _answered(question: Question, answer: Answer) -> Answered:
    if question.label is None:
        raise DataError(f"{question.where}: no label; correct the line")
    for name, ours, theirs in (
        ("image", question.image, answer.image),
        (
            "question",
            comparable_question(question.text),
            answer.question and comparable_question(answer.question),
        ),
        ("label", question.label, answer.label),
    ):
        if theirs not in (None, ours):
            raise DataError(
                f"{answer.where}: {name} is {theirs!r}, but {question.where} has {ours!r} for "
                f"question_id {question.question_id}; give the question files of these answers"
            )
    return with_answer(question, answer.text)


Side = tuple[str, str, Sequence[Any], int]  # what, what they lack, the left-over ones, of how many


def _refuse_leftovers(one: Side, other: Side, remedy: str) -> None:
    if not one[2] and not other[2]:
        return
    parts = []
    for what, lacked, left, total in (one, other):
        part = f"{len(left)} of {total} {what} have no {lacked}"
        if left:
            part += f" (first: {say_id(left[0])}, {left[0].where})"
        parts.append(part)
    raise DataError(f"{', '.join(parts)}; {remedy}")


def load_answered(
    answers: Sequence[SplitFile],
    questions: Sequence[SplitFile] = (),
    labels: Sequence[SplitFile] = (),
) -> list[Answered]:
    """Answers with their questions and labels, from any of the three layouts (see the module).

    Without `questions` the answers must carry split, image, question and label themselves.
    """
    found = read_answers(answers)
    if not found:
        names = ", ".join(str(file.path) for file in answers)
        raise DataError(f"{names}: no answer in it; answer the questions first")
    if questions or labels:
        return join(load_questions(questions, labels), found)
    return [_complete(answer) for answer in found]


def load_questions(
    questions: Sequence[SplitFile], labels: Sequence[SplitFile] = ()
) -> list[Question]:
    """Questions with labels: from their own files, or joined from POPE's label files."""
    if not questions:  # POPE's label files are its question files
        return _read_labels(labels)
    found = read_questions(questions)
    if labels:
        return with_labels(found, _read_labels(labels))
    for question in found:
        if question.label is None:
            raise DataError(
                f"{question.where}: field 'label' is missing; correct the line, or give the "
                "folder of POPE's label files with --labels"
            )
    return found


def _read_labels(files: Sequence[SplitFile]) -> list[Question]:
    """The questions of label files, each with its label."""
    found = read_questions(files)
    for question in found:
        if question.label is None:
            raise DataError(
                f"{question.where}: field 'label' is missing in a label file; correct the line, "
                "or give POPE's own files with --labels"
            )
    return found


def _complete(answer: Answer) -> Answered:
    for name in ("split", "image", "question", "label"):
        if getattr(answer, name) is None:
            raise DataError(
                f"{answer.where}: field {name!r} is missing; give the question files with "
                "--questions (and POPE's label files with --labels if those have no labels)"
            )
    return Answered(
        split=answer.split or "",
        question_id=answer.question_id,
        image=answer.image or "",
        question=bare_question(answer.question or ""),
        label=answer.label or "",
        text=answer.text,
    )


def with_answer(question: Question, text: str) -> Answered:
    """A labelled question with its answer. Raises ValueError without a label."""
    if question.label is None:
        raise ValueError(f"{question.where} has no label")
    return Answered(
        split=question.split,
        question_id=question.question_id,
        image=question.image,
        question=bare_question(question.text),
        label=question.label,
        text=text,
    )
