"""Benchmarks as their authors distribute them -> documents with images, one function for each.

The fields of a document are those that lmms-eval's own task functions read, so that its scores
serve a pack too. An image is a name below the image folder, or its bytes where the annotation file
holds them (MMBench).
"""

from __future__ import annotations

import base64
import csv
import io
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from ..train.mixture_fields import Fields, keyed, listed, only, read_json
from .files import read_json_lines
from .free_run import read_texts
from .judge import read_bench, read_contexts
from .pope_data import split_files
from .pope_join import load_questions

CSV_FIELD = 64 * 2**20  # bytes of an image as base64 in a table


@dataclass(frozen=True)
class Picture:
    """An image of a document: its name in the pack, and its bytes where no file holds them."""

    name: str
    data: bytes | None = None


@dataclass(frozen=True)
class Document:
    """One question. fields: JSON-able, without the images; part: the split, or the task it goes to
    ("" where there is one alone)."""

    fields: dict[str, Any]
    pictures: tuple[Picture, ...]
    where: str
    part: str = ""


def read_pope(files: Sequence[Path]) -> list[Document]:
    """POPE's files of questions, one for each split (or their folder)."""
    documents = []
    for question in load_questions(split_files(list(files)), []):
        fields = {
            "question_id": str(question.question_id),
            "question": question.text.split("\n")[0].strip(),
            "answer": question.label,
            "category": question.split,
        }
        pictures = (Picture(question.image),)
        documents.append(Document(fields, pictures, question.where, question.split))
    return documents


def read_mme(files: Sequence[Path]) -> list[Document]:
    """MME's folder: a folder for each category, in which (or below which) each image has a text
    file of its name with lines `question TAB answer`."""
    documents = []
    for root in files:
        for text in sorted(root.rglob("*.txt")):
            category = text.relative_to(root).parts[0]
            image = _beside(root, category, text.stem)
            if image is None:
                continue  # a readme
            for number, line in enumerate(_text(text).splitlines(), start=1):
                if not line.strip():
                    continue
                question, _, answer = line.rpartition("\t")
                if answer.strip().lower() not in ("yes", "no"):
                    raise DataError(f"{text}:{number}: expected question, tab, Yes or No")
                fields = {
                    "question_id": f"{category}/{text.stem}",
                    "question": question.strip(),
                    "answer": answer.strip(),
                    "category": category,
                }
                documents.append(Document(fields, (Picture(image),), f"{text}:{number}"))
    return documents


def _beside(root: Path, category: str, stem: str) -> str | None:
    """The image of a stem in a category's folder, below `root`."""
    for path in sorted((root / category).rglob(f"{stem}.*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            return path.relative_to(root).as_posix()
    return None


def read_gqa(files: Sequence[Path]) -> list[Document]:
    """GQA's testdev_balanced_questions.json: {id: {question, answer, imageId}}."""
    documents = []
    for name, record in keyed(files, only("question", "answer", "imageId")):
        fields = {"question_id": name, **_texts(record, "question", "answer")}
        documents.append(_document(record, fields, f"{record.name('imageId')}.jpg"))
    return documents


def read_vqav2(files: Sequence[Path]) -> list[Document]:
    """VQAv2's questions and annotations of a split, joined by question_id."""
    questions: dict[str, tuple[Fields, str]] = {}
    answers: dict[str, Fields] = {}
    for path in files:
        table = Fields(read_json(path), path, "")
        for name in ("questions", "annotations"):
            for record in table.objects(name) if name in table.value else ():
                number = record.name("question_id")
                if number in (questions if name == "questions" else answers):
                    raise record.fault("question_id", f"{number} stands twice", "remove one")
                if name == "questions":
                    questions[number] = (record, table.text("data_subtype"))
                else:
                    answers[number] = record
    _check_same(files, questions, answers)
    documents = []
    for number, (record, subset) in questions.items():
        told = answers[number]
        given = [{**answer.value, **_texts(answer, "answer")} for answer in told.objects("answers")]
        fields = {
            "question_id": record.value["question_id"],
            **_texts(record, "question"),
            "answer": told.text("multiple_choice_answer"),
            "answers": given,
        }
        image = f"COCO_{subset}_{record.whole('image_id'):012d}.jpg"
        documents.append(_document(record, fields, image))
    return documents


def read_textvqa(files: Sequence[Path]) -> list[Document]:
    """TextVQA_0.5.1_val.json: {data: [{question_id, image_id, question, answers}]}."""
    documents: dict[str, Document] = {}
    for path in files:
        for record in Fields(read_json(path), path, "").objects("data"):
            key = _new_id(record, "question_id", documents)
            fields = {"question_id": record.value["question_id"], **_texts(record, "question")}
            fields["answers"] = record.texts("answers")
            documents[key] = _document(record, fields, f"{record.name('image_id')}.jpg")
    return list(documents.values())


def read_vizwiz(files: Sequence[Path]) -> list[Document]:
    """VizWiz's val.json: [{image, question, answers: [{answer}]}]."""
    documents: dict[str, Document] = {}
    for path in files:
        for record in listed(path):
            image = _new_id(record, "image", documents)
            answers = [answer.text("answer") for answer in record.objects("answers")]
            fields = {"question_id": Path(image).stem, **_texts(record, "question")}
            documents[image] = _document(record, {**fields, "answers": answers}, image)
    return list(documents.values())


def read_scienceqa(files: Sequence[Path]) -> list[Document]:
    """ScienceQA's problems.json: the questions of the test split, with an image or without."""
    documents = []
    for number, record in keyed(files):
        split, image = record.text("split"), record.get("image")
        if split != "test":
            continue
        fields = {
            "question_id": number,
            **_texts(record, "question", "hint"),
            "choices": record.texts("choices"),
            "answer": _place(record, record.whole("answer"), len(record.texts("choices"))),
        }
        name = f"{split}/{number}/{record.text('image')}" if image is not None else None
        documents.append(_document(record, fields, name))
    return documents


def read_mmbench(files: Sequence[Path]) -> list[Document]:
    """MMBench's table with tabs; its images are base64, or the index of the row that has it."""
    documents: dict[str, Document] = {}
    csv.field_size_limit(min(CSV_FIELD, sys.maxsize))
    for path in files:
        images: dict[str, bytes] = {}
        for record in _table(path):
            index, image = _new_id(record, "index", documents), record.text("image")
            images[index] = images[image] if image in images else _decoded(record)
            row = {name: value for name, value in record.value.items() if value}
            if not index.isdecimal():
                raise record.fault("index", f"is {index!r:.40}", "give a whole number")
            fields = {
                "index": int(index),
                "question": record.text("question"),
                "answer": row.get("answer", ""),
                "hint": row.get("hint", "nan"),
                "category": row.get("category", ""),
                "L2-category": row.get("l2-category") or row.get("L2-category", ""),
                "source": row.get("source", ""),
                "split": row.get("split", "dev"),
                **{letter: row.get(letter, "nan") for letter in "ABCDE"},
            }
            picture = Picture(f"{image if image in images else index}.jpg", images[index])
            documents[index] = Document(fields, (picture,), _where(record))
    return list(documents.values())


def _table(path: Path) -> list[Fields]:
    """The rows of a table with tabs, each with as many fields as its head."""
    rows = []
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t")
    try:
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{path}: {place}: has more or fewer fields than the head of the table; fetch "
                    "it again"
                )
            rows.append(Fields(row, path, place))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; fetch it again") from error
    return rows


def _decoded(record: Fields) -> bytes:
    try:
        return base64.b64decode(record.text("image"), validate=True)
    except ValueError:  # binascii.Error is one
        raise record.fault("image", "is not base64", "fetch the table again") from None


def read_seedbench(files: Sequence[Path]) -> list[Document]:
    """SEED-Bench.json: the questions about images (videos are left out)."""
    documents: dict[str, Document] = {}
    for path in files:
        for record in Fields(read_json(path), path, "").objects("questions"):
            if record.text("data_type") != "image":
                continue
            number = _new_id(record, "question_id", documents)
            words = _texts(record, "question", "answer", *(f"choice_{x}" for x in "abcd"))
            fields = {"question_id": number, "data_type": "image", **words}
            documents[number] = _document(record, fields, record.text("data_id"))
    return list(documents.values())


def read_llava_w(files: Sequence[Path]) -> list[Document]:
    """LLaVA-Bench's questions.jsonl, context.jsonl and answers_gpt4.jsonl, of one folder."""
    if len(files) != 1 or not files[0].is_dir():
        raise UsageError("--annotations: give the folder with questions.jsonl and its others")
    folder = files[0]
    questions = read_bench(folder / "questions.jsonl")
    context = read_contexts(folder / "context.jsonl", questions)
    answers = read_texts(folder / "answers_gpt4.jsonl", [question.key for question in questions])
    return [
        Document(
            {
                "question_id": question.key,
                "question": question.text,
                "caption": context[question.image],
                "gpt_answer": answers[question.key],
                "category": question.category,
            },
            (Picture(question.image),),
            question.where,
        )
        for question in questions
    ]


def read_mmvet(files: Sequence[Path]) -> list[Document]:
    """mm-vet.json: {id: {imagename, question, answer, capability}}."""
    documents = []
    for name, record in keyed(files):
        fields = {
            "question_id": name,
            **_texts(record, "question", "answer"),
            "capability": ",".join(record.texts("capability")),
        }
        documents.append(_document(record, fields, record.text("imagename")))
    return documents


def read_choices(files: Sequence[Path]) -> list[Document]:
    """One's own questions, JSON lines {question_id, question, choices, answer, image}: answer is
    the letter or the number from 0; image may be missing."""
    documents: dict[str, Document] = {}
    for path in files:
        for line, value in read_json_lines(path):
            record = Fields(value, path, f"line {line}")
            number, choices = _new_id(record, "question_id", documents), record.texts("choices")
            answer = record.get("answer")
            if isinstance(answer, str) and len(answer) == 1:
                answer = ord(answer) - ord("A")
            fields = {
                "question_id": number,
                **_texts(record, "question"),
                "choices": choices,
                "answer": _place(record, answer, len(choices)),
            }
            name = record.text("image") if value.get("image") is not None else None
            documents[number] = _document(record, fields, name or None)
    return list(documents.values())


def _document(record: Fields, fields: dict[str, Any], image: str | None) -> Document:
    return Document(fields, () if image is None else (Picture(image),), _where(record))


def _where(record: Fields) -> str:
    return record.where.removesuffix(": ")


def _texts(record: Fields, *names: str) -> dict[str, str]:
    return {name: record.text(name) for name in names}


def _new_id(record: Fields, field: str, known: dict[str, Document]) -> str:
    """The id of a record, as text; DataError where another has it."""
    key = record.name(field)
    if key in known:
        raise record.fault(field, f"{key} stands twice", f"remove one (see {known[key].where})")
    return key


def _place(record: Fields, answer: Any, choices: int) -> int:
    """The answer's place among the choices, checked."""
    if type(answer) is not int or not 0 <= answer < choices:
        raise record.fault("answer", f"is {answer!r:.40}", "give the letter or number of a choice")
    return answer


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _check_same(
    files: Sequence[Path], questions: Collection[str], answers: Collection[str]
) -> None:
    if set(questions) != set(answers):
        left = min(set(questions) ^ set(answers))
        raise DataError(
            f"{', '.join(map(str, files))}: {len(questions)} questions and {len(answers)} "
            f"annotations (question {left} is in one only); give both files of one split"
        )
