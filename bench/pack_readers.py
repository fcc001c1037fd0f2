"""Benchmarks as their authors distribute them -> documents with images, one function for each.

The fields of a document are those that lmms-eval's own task functions read, so that its scores
serve a pack too. An image is a name below the image folder, or its bytes where the annotation file
holds them (MMBench).
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from .files import read_json_lines
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
    for path, table in _tables(files, dict):
        for name, record in table.items():
            where = f"{path}: question {name}"
            question, answer, image = _fields(record, where, "question", "answer", "imageId")
            fields = {"question_id": name, "question": question, "answer": answer}
            documents.append(Document(fields, (Picture(f"{image}.jpg"),), where))
    return documents


def read_vqav2(files: Sequence[Path]) -> list[Document]:
    """VQAv2's questions and annotations of a split, joined by question_id."""
    questions, answers = {}, {}
    subset = ""
    for path, table in _tables(files, dict):
        for record in table.get("questions", []):
            (number,) = _fields(record, f"{path}: a question", "question_id")
            questions[number] = (f"{path}: question {number}", record)
        for record in table.get("annotations", []):
            (number,) = _fields(record, f"{path}: an annotation", "question_id")
            answers[number] = record
        subset = table.get("data_subtype", subset)
    _same_keys(questions, answers, "questions", "annotations")
    documents = []
    for number, (where, record) in questions.items():
        question, image = _fields(record, where, "question", "image_id")
        best, given = _fields(answers[number], where, "multiple_choice_answer", "answers")
        fields = {"question_id": number, "question": question, "answer": best, "answers": given}
        picture = Picture(f"COCO_{subset}_{int(image):012d}.jpg")
        documents.append(Document(fields, (picture,), where))
    return documents


def read_textvqa(files: Sequence[Path]) -> list[Document]:
    """TextVQA_0.5.1_val.json: {data: [{question_id, image_id, question, answers}]}."""
    documents = []
    for path, table in _tables(files, dict):
        for record in _list_of(table, "data", path):
            where = f"{path}: question {record.get('question_id')}"
            number, image, question = _fields(record, where, "question_id", "image_id", "question")
            (answers,) = _fields(record, where, "answers")
            fields = {"question_id": number, "question": question, "answers": answers}
            documents.append(Document(fields, (Picture(f"{image}.jpg"),), where))
    return documents


def read_vizwiz(files: Sequence[Path]) -> list[Document]:
    """VizWiz's val.json: [{image, question, answers: [{answer}]}]."""
    documents = []
    for path, records in _tables(files, list):
        for record in records:
            where = f"{path}: {record.get('image')}"
            image, question, answers = _fields(record, where, "image", "question", "answers")
            fields = {
                "question_id": Path(image).stem,
                "question": question,
                "answers": [_fields(answer, where, "answer")[0] for answer in answers],
            }
            documents.append(Document(fields, (Picture(image),), where))
    return documents


def read_scienceqa(files: Sequence[Path]) -> list[Document]:
    """ScienceQA's problems.json: the questions of the test split, with an image or without."""
    documents = []
    for path, problems in _tables(files, dict):
        for number, record in problems.items():
            where = f"{path}: problem {number}"
            split, question, choices = _fields(record, where, "split", "question", "choices")
            answer, hint, image = _fields(record, where, "answer", "hint", "image")
            if split != "test":
                continue
            fields = {
                "question_id": number,
                "question": question,
                "choices": choices,
                "answer": answer,
                "hint": hint,
            }
            pictures = (Picture(f"{split}/{number}/{image}"),) if image else ()
            documents.append(Document(fields, pictures, where))
    return documents


def read_mmbench(files: Sequence[Path]) -> list[Document]:
    """MMBench's table with tabs; its images are base64, or the index of the row that has it."""
    documents = []
    csv.field_size_limit(min(CSV_FIELD, sys.maxsize))
    for path in files:
        images: dict[str, bytes] = {}
        lines = _text(path).splitlines(keepends=True)
        for row in csv.DictReader(lines, delimiter="\t"):
            where = f"{path}: row {row.get('index')}"
            index, question, image = _fields(row, where, "index", "question", "image")
            images[index] = images[image] if image in images else _decoded(image, where)
            fields = {
                "index": int(index),
                "question": question,
                "answer": row.get("answer") or "",
                "hint": row.get("hint") or "nan",
                "category": row.get("category") or "",
                "L2-category": row.get("l2-category") or row.get("L2-category") or "",
                "source": row.get("source") or "",
                "split": row.get("split") or "dev",
                **{letter: row.get(letter) or "nan" for letter in "ABCDE"},
            }
            source = image if image in images and image != index else index
            documents.append(Document(fields, (Picture(f"{source}.jpg", images[index]),), where))
    return documents


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{where}: its image is not base64; fetch the table again") from None


def read_seedbench(files: Sequence[Path]) -> list[Document]:
    """SEED-Bench.json: the questions about images (videos are left out)."""
    documents = []
    for path, table in _tables(files, dict):
        for record in _list_of(table, "questions", path):
            where = f"{path}: question {record.get('question_id')}"
            kind, name, number = _fields(record, where, "data_type", "data_id", "question_id")
            if kind != "image":
                continue
            keys = ("question", "answer", "choice_a", "choice_b", "choice_c", "choice_d")
            values = _fields(record, where, *keys)
            fields = {
                "question_id": str(number),
                "data_type": kind,
                **dict(zip(keys, values, strict=True)),
            }
            documents.append(Document(fields, (Picture(name),), where))
    return documents


def read_llava_w(files: Sequence[Path]) -> list[Document]:
    """LLaVA-Bench's questions.jsonl, context.jsonl and answers_gpt4.jsonl, of one folder."""
    if len(files) != 1 or not files[0].is_dir():
        raise UsageError("--annotations: give the folder with questions.jsonl and its others")
    folder = files[0]
    context = {record.get("image"): record for _, record in _lines(folder / "context.jsonl")}
    answers = {r.get("question_id"): r for _, r in _lines(folder / "answers_gpt4.jsonl")}
    documents = []
    for where, record in _lines(folder / "questions.jsonl"):
        number, image, text = _fields(record, where, "question_id", "image", "text")
        (category,) = _fields(record, where, "category")
        if image not in context or number not in answers:
            raise DataError(f"{where}: no context of {image}, or no reference answer {number}")
        fields = {
            "question_id": number,
            "question": text,
            "caption": _fields(context[image], where, "caption")[0],
            "gpt_answer": _fields(answers[number], where, "text")[0],
            "category": category.removeprefix("llava_bench_"),
        }
        documents.append(Document(fields, (Picture(image),), where))
    return documents


def read_mmvet(files: Sequence[Path]) -> list[Document]:
    """mm-vet.json: {id: {imagename, question, answer, capability}}."""
    documents = []
    for path, table in _tables(files, dict):
        for name, record in table.items():
            where = f"{path}: {name}"
            image, question, answer = _fields(record, where, "imagename", "question", "answer")
            (capability,) = _fields(record, where, "capability")
            fields = {
                "question_id": name,
                "question": question,
                "answer": answer,
                "capability": ",".join(capability),
            }
            documents.append(Document(fields, (Picture(image),), where))
    return documents


def read_choices(files: Sequence[Path]) -> list[Document]:
    """One's own questions, JSON lines {question_id, question, choices, answer, image}: answer is
    the letter or the number from 0; image may be missing."""
    documents = []
    for path in files:
        for where, record in _lines(path):
            number, question, choices = _fields(record, where, "question_id", "question", "choices")
            (answer,) = _fields(record, where, "answer")
            if isinstance(answer, str):
                answer = ord(answer) - ord("A") if len(answer) == 1 else -1
            if not isinstance(choices, list) or not 0 <= answer < len(choices):
                raise DataError(f"{where}: answer must be the letter or number of a choice")
            fields = {
                "question_id": str(number),
                "question": question,
                "choices": [str(choice) for choice in choices],
                "answer": answer,
            }
            image = record.get("image")
            documents.append(Document(fields, (Picture(image),) if image else (), where))
    return documents


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _tables(files: Sequence[Path], kind: type) -> Iterable[tuple[Path, Any]]:
    """Each file's JSON value, which must be an object or a list."""
    for path in files:
        try:
            value = json.loads(_text(path))
        except (ValueError, RecursionError):
            raise DataError(f"{path}: not JSON; give the benchmark's own file") from None
        if not isinstance(value, kind):
            named = "an object" if kind is dict else "a list"
            raise DataError(f"{path}: expected {named}, as in the benchmark's own file")
        yield path, value


def _list_of(table: dict[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    records = table.get(name)
    if not isinstance(records, list):
        raise DataError(f"{path}: no list {name!r} in it; give the benchmark's own file")
    return [record if isinstance(record, dict) else {} for record in records]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{path}:{number}", record) for number, record in read_json_lines(path)]


def _fields(record: Any, where: str, *names: str) -> list[Any]:
    """Values of a record's fields; DataError naming the missing one."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {', '.join(names)}")
    for name in names:
        if name not in record:
            raise DataError(f"{where}: {name} is missing; give the benchmark's own file")
    return [record[name] for name in names]


def _same_keys(one: dict[Any, Any], two: dict[Any, Any], first: str, second: str) -> None:
    if one.keys() != two.keys():
        left = next(iter(one.keys() ^ two.keys()))
        raise DataError(
            f"{len(one)} {first} and {len(two)} {second} (question {left} is in one only); "
            "give both files of one split"
        )
