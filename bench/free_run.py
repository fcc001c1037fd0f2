"""Asking a model questions whose answers are free text, resumably.

An output folder holds `run.json` (what was asked of which model) and `answers.jsonl`, one line per
answer in LLaVA's form: question_id, prompt, text. The same command goes on where one was stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from ..train.generate_journal import RUN, check_run
from .files import drop_half_line, find_images, naming_question, read_json_lines
from .pope_data import ANSWERS

# images (None for a question without one), prompts -> answers
AnswerMixed = Callable[[Sequence[Path | None], Sequence[str]], list[str]]


@dataclass(frozen=True)
class Item:
    """A question: its id, its image's name or None, all of its prompt; where: file and place."""

    key: str
    image: str | None
    prompt: str
    where: str


def item_images(items: Sequence[Item], folder: Path) -> dict[str, Path]:
    """Where each image is. UsageError without the folder, DataError naming a missing image."""
    return find_images(((i.image, i.where, i.where) for i in items if i.image is not None), folder)


def read_texts(path: Path, known: Sequence[str]) -> dict[str, str]:
    """The answers of a file by question id, in the order of `known`, which all must have one.

    Raises DataError for an unknown id, one that stands twice, and one that is missing.
    """
    texts = _texts(path, known)
    missing = [key for key in known if key not in texts]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(known)} questions have no answer (first: question_id "
            f"{missing[0]}); give the answers to these questions"
        )
    return {key: texts[key] for key in known}


def _texts(path: Path, known: Sequence[str]) -> dict[str, str]:
    expected = set(known)
    places: dict[str, str] = {}
    texts: dict[str, str] = {}
    for number, record in read_json_lines(path):
        where, key, text = f"{path}:{number}", record.get("question_id"), record.get("text")
        if isinstance(key, bool) or not isinstance(key, (int, str)):
            raise DataError(f"{where}: field 'question_id' must be a number or a string")
        if not isinstance(text, str):
            raise DataError(f"{where}: field 'text' must be the answer, a string")
        key = str(key)
        if key not in expected:
            raise DataError(
                f"{where}: question_id {key} is not among the questions; give the questions that "
                "these answers belong to"
            )
        if key in texts:
            raise DataError(
                f"question_id {key} stands twice: {places[key]} and {where}; remove one"
            )
        places[key], texts[key] = where, text
    return texts


def begin(
    out: Path, items: Sequence[Item], identity: dict[str, Any], notify: Callable[[str], None]
) -> dict[str, str]:
    """Start a run in `out`, or go on with it: the answers that are there, by key.

    identity: what makes the answers; UsageError where it differs from the folder's.
    """
    if (out / ANSWERS).exists() and not (out / RUN).exists():
        raise UsageError(f"--out {out} has {ANSWERS} but no {RUN}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    check_run(out, json.loads(json.dumps(identity)))
    path = out / ANSWERS
    if not path.exists():
        return {}
    drop_half_line(path, notify)
    return _texts(path, [item.key for item in items])


def ask_items(
    items: Sequence[Item],
    images: dict[str, Path],
    answer: AnswerMixed,
    out: Path,
    done: dict[str, str],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda answered, total: None,
) -> dict[str, str]:
    """Ask what is not in `done`, each batch written before the next; all answers by key.

    Raises DataError naming the question that cannot be asked; what is answered by then stays.
    """
    found = dict(done)
    waiting = [item for item in items if item.key not in found]
    progress(len(found), len(items))
    with (out / ANSWERS).open("ab") as file:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            paths = [None if item.image is None else images[item.image] for item in batch]
            asked = [(item.where, path) for item, path in zip(batch, paths, strict=True)]
            with naming_question(asked):
                texts = answer(paths, [item.prompt for item in batch])
            for item, text in zip(batch, texts, strict=True):
                found[item.key] = text
                record = {"question_id": item.key, "prompt": item.prompt, "text": text}
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            progress(len(found), len(items))
    return {item.key: found[item.key] for item in items}
