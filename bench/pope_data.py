"""POPE's questions, labels and answers: what they are, and reading their files.

Three layouts are read, and joined in pope_join.py:

- POPE's own files, JSON lines `question_id, image, text, label`, one file per split;
- LLaVA's question file, where each line has a `category` (the split) and no label; the labels come
  from POPE's files, joined by (split, image, question);
- our answers, `split, question_id, image, question, label, text`, which need no other file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from .files import read_json_lines

SPLITS = ("random", "popular", "adversarial")
ANSWERS = "answers.jsonl"  # in the output folder of an evaluation
MISSPELT = 0.8  # likeness of a split's name to one of POPE's from which it is taken for a slip
RESERVED = ("mean", "strict", "all")  # keys of the score files beside the splits

SPLIT_IN_NAME = re.compile(rf"(?:^|[_-])({'|'.join(SPLITS)})\.jsonl?$")
NAMED_FILE = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)

Key = tuple[str, str]  # split, question id as text


@dataclass(frozen=True)
class Question:
    """One question; `label` is None where the file has none; `where` is file:line."""

    split: str
    question_id: int | str
    image: str
    text: str
    label: str | None
    where: str

    @property
    def key(self) -> Key:
        return self.split, str(self.question_id)


@dataclass(frozen=True)
class Answer:
    """One answer as its file has it; what the file does not tell is None."""

    split: str | None
    question_id: int | str
    text: str
    where: str
    image: str | None = None
    question: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Answered:
    """A question with its label ("yes" or "no") and an answer: one line of answers.jsonl."""

    split: str
    question_id: int | str
    image: str
    question: str
    label: str
    text: str

    @property
    def key(self) -> Key:
        return self.split, str(self.question_id)


@dataclass(frozen=True)
class SplitFile:
    """A file, and the split that its name or the user gives it (None: its lines must tell)."""

    path: Path
    split: str | None


def split_files(names: Sequence[str | Path]) -> list[SplitFile]:
    """Files from the command line: `FILE`, `SPLIT=FILE`, or a folder with `..._SPLIT.json[l]`.

    Raises UsageError for a folder without such files and for a reserved or misspelt split name.
    """
    found: list[SplitFile] = []
    for name in map(str, names):
        named = NAMED_FILE.fullmatch(name)
        if Path(name).is_dir():
            found += _files_of_folder(Path(name))
        elif named and not Path(name).exists():
            _check_split_name(named[1], name, UsageError)
            found.append(SplitFile(Path(named[2]), named[1]))
        else:
            match = SPLIT_IN_NAME.search(Path(name).name)
            found.append(SplitFile(Path(name), match[1] if match else None))
    return found


def answer_files(names: Sequence[str | Path]) -> list[SplitFile]:
    """Answer files from the command line: `FILE`, `SPLIT=FILE`, or an evaluation's output folder.

    Raises UsageError for a folder without answers.jsonl.
    """
    for name in names:
        if Path(name).is_dir() and not (Path(name) / ANSWERS).is_file():
            raise UsageError(f"{name}: no {ANSWERS} in this folder; give an evaluation's folder")
    return split_files([Path(n) / ANSWERS if Path(n).is_dir() else n for n in names])


def _files_of_folder(folder: Path) -> list[SplitFile]:
    files = split_files([path for path in sorted(folder.iterdir()) if path.is_file()])
    files = [file for file in files if file.split is not None]
    if not files:
        raise UsageError(
            f"{folder}: no file ..._random.json, ..._popular.json or ..._adversarial.json in it; "
            "name the files one by one"
        )
    return sorted(files, key=lambda file: split_rank(file.split or ""))


def _check_split_name(split: str, where: str, error: type[Exception]) -> None:
    if split in RESERVED:
        raise error(f"{where}: a split cannot be called {split!r}; give it another name")
    near = difflib.get_close_matches(split.lower(), SPLITS, n=1, cutoff=MISSPELT)
    if near and split not in SPLITS and split.isalpha():
        raise error(
            f"{where}: there is no split {split!r}; did you mean {near[0]!r}? (One of your own "
            "needs a name less like it, as in random2)"
        )


def split_rank(split: str) -> int:
    """POPE's three splits first and in their usual order, then all others."""
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)


def read_questions(files: Sequence[SplitFile]) -> list[Question]:
    """The questions of all files; (split, question_id) is unique.

    Raises DataError naming file, line and field.
    """
    questions = [
        _question(file, number, record)
        for file in files
        for number, record in read_json_lines(file.path)
    ]
    if not questions:
        names = ", ".join(str(file.path) for file in files)
        raise DataError(f"{names}: no question; give POPE's files of JSON lines")
    index_by(questions, lambda question: question.key, say_id)
    return questions


def _question(file: SplitFile, number: int, record: Mapping[str, Any]) -> Question:
    where = f"{file.path}:{number}"
    split = _split(file, where, record, "category")
    if split is None:
        raise DataError(
            f"{file.path}: cannot tell the split, its name does not end in _random.json, "
            f"_popular.json or _adversarial.json; name it, as in random={file.path}"
        )
    label = record.get("label")
    if label not in ("yes", "no", None):
        raise DataError(f"{where}: label {label!r} is neither 'yes' nor 'no'; correct the line")
    return Question(
        split=split,
        question_id=_question_id(where, record),
        image=_text(where, record, "image"),
        text=_text(where, record, "text"),
        label=label,
        where=where,
    )


def read_answers(files: Sequence[SplitFile]) -> list[Answer]:
    """The answers of all files: ours, LLaVA's, or any with question_id and text.

    Raises DataError naming file, line and field.
    """
    answers = []
    for file in files:
        for number, record in read_json_lines(file.path):
            where = f"{file.path}:{number}"
            if not isinstance(record.get("text"), str):
                raise DataError(f"{where}: field 'text' must be the answer, a string")
            optional = {
                name: _text(where, record, name)
                for name in ("image", "question", "label")
                if name in record
            }
            if optional.get("label") not in (None, "yes", "no"):
                raise DataError(f"{where}: label {record['label']!r} is neither 'yes' nor 'no'")
            split = _split(file, where, record, "split" if "split" in record else "category")
            number_id = _question_id(where, record)
            answers.append(Answer(split, number_id, record["text"], where, **optional))
    index_by([a for a in answers if a.split], lambda a: (a.split, str(a.question_id)), say_id)
    remedy = (
        "remove one, or, if they answer different splits, give one answers file per split, each as "
        "SPLIT=FILE"
    )
    index_by([a for a in answers if not a.split], lambda a: str(a.question_id), say_id, remedy)
    return answers


def _split(file: SplitFile, where: str, record: Mapping[str, Any], field: str) -> str | None:
    """The split that the record's own field or the file tells; DataError when they disagree."""
    if field not in record:
        return file.split
    split = _text(where, record, field)
    _check_split_name(split, where, DataError)
    if file.split not in (None, split):
        raise DataError(f"{where}: {field} is {split!r}, but the file is given as {file.split!r}")
    return split


def _question_id(where: str, record: Mapping[str, Any]) -> int | str:
    value = record.get("question_id")
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise DataError(f"{where}: field 'question_id' must be a number or a string, not {value!r}")
    return value


def _text(where: str, record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: field {field!r} must be a non-empty string, not {value!r}")
    return value


def index_by(
    items: Iterable[Any],
    key: Callable[[Any], Any],
    say: Callable[[Any], str],
    remedy: str = "remove one",
) -> dict[Any, Any]:
    """The items by key; DataError, with what `say` calls it, when two (each with a `where`) share
    one."""
    index: dict[Any, Any] = {}
    for item in items:
        name = key(item)
        if name in index:
            raise DataError(
                f"{say(item)} stands twice: {index[name].where} and {item.where}; {remedy}"
            )
        index[name] = item
    return index


def say_id(item: Question | Answer) -> str:
    """`question_id 3 of split random`."""
    split = f" of split {item.split}" if item.split else ""
    return f"question_id {item.question_id}{split}"
