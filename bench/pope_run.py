"""Asking a model POPE's questions: batches, answers on disk as they come, resuming.

An output folder holds `run.json` (what was asked of which model), `answers.jsonl` (one line per
answer, in the order they were given) and, once all questions are answered, `scores.json`.

The questions of one image stand in one batch, through all splits: POPE asks 18 questions about
each of 500 images, and an image that a batch shares is read, cut, encoded and prefilled only once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from ..hd.files import check_out
from .files import (
    drop_half_line,
    find_images,
    naming_question,
    sha256,
    write_json,
)
from .pope import score_table
from .pope_data import (
    ANSWERS,
    RESERVED,
    Answered,
    Question,
    SplitFile,
    answer_files,
    read_answers,
    say_id,
)
from .pope_join import bare_question, join, with_answer

AnswerBatch = Callable[[list[Path], list[str]], list[str]]  # images, questions -> answers
RUN, SCORES = "run.json", "scores.json"

# What may differ between the start and the resumption of a run: none of it changes an answer by
# design, and a smaller batch or another device may be the very reason for starting again.
FREE_FIELDS = ("batch_size", "device")
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class RunRecord:
    """What makes a run: written beside its answers, and compared when it is resumed.

    model: path, fingerprint and, where known, the geometry ("hd"). questions: one entry per file,
    its path, sha256 and number of questions; labels: the same of label files. images: the folder.
    decoding: how text was made. limit: questions per split, None for all.
    """

    model: dict[str, Any]
    prompt: str
    questions: tuple[dict[str, Any], ...]
    images: str
    decoding: dict[str, Any]
    limit: int | None
    batch_size: int
    device: str
    labels: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `read_run` reads it back."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The part that must be equal for two runs to share one set of answers."""
        values = {k: v for k, v in asdict(self).items() if k not in FREE_FIELDS}
        values["model"] = self.model["fingerprint"]
        for name, files in (("questions", self.questions), ("labels", self.labels)):
            values[name] = sorted(entry["sha256"] for entry in files)
        return values


def first_questions(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions of each split (None: all)."""
    if limit is None:
        return list(questions)
    seen: dict[str, int] = {}
    chosen = []
    for question in questions:
        seen[question.split] = seen.get(question.split, 0) + 1
        if seen[question.split] <= limit:
            chosen.append(question)
    return chosen


def batches_by_image(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Batches of at most `size` questions; images in order of appearance.

    An image's questions stand together in one batch; only where they are more than `size` are they
    spread, over batches of their own.
    """
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image, []).append(question)
    batches: list[list[Question]] = []
    open_for = 0  # questions that the last batch may still take
    for group in groups.values():
        if len(group) <= open_for:
            batches[-1] += group
        else:
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        open_for = size - len(batches[-1]) if len(group) <= size else 0
    return batches


def image_paths(questions: Sequence[Question], folder: Path) -> dict[str, Path]:
    """Where each image is. Raises DataError naming image and question for one that is missing.

    An image name, or a link, that leads out of the folder is refused.
    """
    asked = (
        (q.image, q.where, f"question_id {q.question_id} of split {q.split} ({q.where})")
        for q in questions
    )
    return find_images(asked, folder)


def fingerprint(folder: Path) -> str:
    """A digest of a model folder: config.json, and each weight file's name, size and content.

    A file above 64 MiB is read at 64 evenly spaced blocks of 1 MiB: enough to tell two
    checkpoints of a training apart in a second. Raises UsageError without config.json.
    """
    config = folder / "config.json"
    if not config.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UsageError(f"--model {folder} {what}; give a folder that a model was saved in")
    digest = hashlib.sha256(config.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}".encode())
        with path.open("rb") as file:
            step = max(BLOCK_BYTES, num_bytes // SAMPLED_BLOCKS)
            for start in range(0, num_bytes, step):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def describe_files(files: Sequence[SplitFile], questions: Sequence[Question]) -> list[dict]:
    """Path, sha256 and number of questions of each question (or label) file."""
    entries = []
    for file in files:
        number = sum(question.where.rpartition(":")[0] == str(file.path) for question in questions)
        path = str(file.path.resolve())
        entries.append({"file": path, "sha256": sha256(file.path), "questions": number})
    return entries


def read_run(folder: Path) -> RunRecord | None:
    """The record in an output folder, None where there is none; DataError for a damaged one."""
    path = folder / RUN
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        files, labels = tuple(values["questions"]), tuple(values.get("labels", ()))
        record = RunRecord(**{**values, "questions": files, "labels": labels})
        record.identity()
        model = record.model
        texts = (record.prompt, record.images, record.device, model["path"], model["fingerprint"])
        objects = (record.decoding, model.get("hd") or {})
        if {*map(type, texts)} != {str} or {*map(type, objects)} != {dict}:
            raise TypeError("a field of another type")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not the record of an evaluation; remove it") from error
    return record


def check_resumable(out: Path, record: RunRecord) -> None:
    """Refuse, with UsageError, a folder whose answers were made by something else."""
    run, answers = out / RUN, out / ANSWERS
    check_out(out)
    if answers.exists() and not run.exists():
        raise UsageError(f"--out {out} has {ANSWERS} but no {RUN}; choose another folder")
    old = read_run(out)
    if old is None:
        return
    old_identity = json.loads(json.dumps(old.identity()))
    new_identity = json.loads(json.dumps(record.identity()))
    for name, value in new_identity.items():
        if old_identity[name] != value:
            raise UsageError(
                f"--out {out} holds the answers of another run: its {name} is "
                f"{_shown(old, name)}, now it is {_shown(record, name)}; "
                "choose another --out, or remove that one"
            )


def _shown(record: RunRecord, name: str) -> str:
    """A field of a run for an error message; files with a bit of their digest."""
    value = getattr(record, name)
    if name == "model":
        return f"{value['path']} ({value['fingerprint'][:8]})"
    if name in ("questions", "labels"):
        return ", ".join(f"{entry['file']} ({entry['sha256'][:8]})" for entry in value)
    return repr(value)


def finished_answers(out: Path, notify: Callable[[str], None]) -> list[Answered]:
    """The answers that are on disk already; a half-written last line is dropped, with a word.

    Nothing else is repaired: a damaged line elsewhere is a DataError.
    """
    path = out / ANSWERS
    if not path.exists():
        return []
    drop_half_line(path, notify)
    return [
        Answered(
            split=answer.split or "",
            question_id=answer.question_id,
            image=answer.image or "",
            question=answer.question or "",
            label=answer.label or "",
            text=answer.text,
        )
        for answer in read_answers(answer_files([out]))
    ]


def check_finished(answers: SplitFile) -> None:
    """DataError for the answers of an evaluation's folder that are not all of its run's."""
    folder = answers.path.parent
    if answers.path.name != ANSWERS or not (folder / RUN).exists():
        return
    found = read_answers([answers])
    scores, remedy = folder / SCORES, "start its `eval pope` again, it goes on"
    if not scores.exists():
        raise DataError(
            f"{folder}: not finished, {len(found)} answers and no {SCORES}; {remedy} (for the "
            f"answers so far copy {ANSWERS} to another folder)"
        )
    try:
        table = json.loads(scores.read_bytes())
        scored = sum(table[split]["questions"] for split in table if split not in RESERVED)
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{scores}: not the scores of an evaluation; {remedy}") from error
    if scored != len(found):
        raise DataError(f"{folder}: {len(found)} answers, but {SCORES} is of {scored}; {remedy}")


def evaluate(
    questions: Sequence[Question],
    images: dict[str, Path],
    answer: AnswerBatch,
    out: Path,
    record: RunRecord,
    done: Sequence[Answered] = (),
    progress: Callable[[int, int], None] = lambda answered, total: None,
) -> list[Answered]:
    """Ask what is not in `done`, write each batch to disk before the next, then the scores.

    `answer` gets image paths and questions with the response prompt; `progress` (answered, total)
    is called before the first batch and after each. Returns all answers in the order of
    `questions`. Raises DataError naming the question when its image cannot be used; what is
    answered by then stays on disk.
    """
    finished = {item.key for item in done}
    strange = finished - {question.key for question in questions}
    if strange:  # with a limit, files in another order give other first questions
        split, number = min(strange)
        raise UsageError(
            f"--out {out} answers question_id {number} of split {split}, which is not asked now; "
            "give the question files in the first run's order, or choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    waiting = [question for question in questions if question.key not in finished]
    if waiting or not (out / RUN).exists():
        write_json(out / RUN, record.to_dict())
    progress(len(questions) - len(waiting), len(questions))
    with (out / ANSWERS).open("ab") as file:
        left = len(waiting)
        for batch in batches_by_image(waiting, record.batch_size):
            texts = _ask(answer, batch, images, record.prompt)
            lines = [
                json.dumps(asdict(with_answer(question, text)), ensure_ascii=False) + "\n"
                for question, text in zip(batch, texts, strict=True)
            ]
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            left -= len(batch)
            progress(len(questions) - left, len(questions))
    answered = join(questions, read_answers(answer_files([out])))
    write_json(out / SCORES, score_table(answered))
    return answered


def _ask(
    answer: AnswerBatch, batch: Sequence[Question], images: dict[str, Path], prompt: str
) -> list[str]:
    """One batch's answers; a DataError says which question it is about."""
    paths = [images[question.image] for question in batch]
    names = [f"{question.where}: {say_id(question)}" for question in batch]
    with naming_question(list(zip(names, paths, strict=True))):
        texts = answer(paths, [bare_question(question.text) + prompt for question in batch])
    if len(texts) != len(batch):
        raise ValueError(f"{len(texts)} answers for {len(batch)} questions")
    return texts
