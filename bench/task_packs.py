"""Task packs: a benchmark's local files as a folder that lmms-eval runs without a network.

A pack holds `KIND.jsonl` for each task, the images that its questions name (and no others) in
`images/`, the tasks' YAML and `utils.py`. It may be moved: all its paths are its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..hd.errors import DataError, UsageError
from ..hd.files import check_out, write_whole
from ..hd.image import read_size
from ..train.record_images import path_fault
from .files import find_image
from .lmms_prompts import PACK
from .pack_kinds import KINDS, Kind, Task
from .pack_readers import Document, Picture

Progress = Callable[[int, int], None]  # documents done, of how many
SPLIT = "test"
TEMPLATE = Path(__file__).parent / "templates" / "pack_utils.txt"


class Function(str):
    """A function of utils.py, as the task's YAML names it."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", name))


@dataclass(frozen=True)
class PackSummary:
    """What was written: rows of each task (name as lmms-eval takes it), images and their bytes."""

    out: str
    tasks: dict[str, int]
    images: int
    image_bytes: int


def write_pack(
    kind_name: str,
    annotations: Sequence[Path],
    images: Path | None,
    out: Path,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> PackSummary:
    """Read a benchmark's files and write its pack into `out`, a new or an empty folder.

    limit: only the first documents of each part. Everything is checked before anything is written;
    the pack appears whole or not at all. Raises UsageError and DataError naming file and record.
    """
    kind = KINDS[kind_name]
    _check_new(out)
    for path in annotations:
        if not path.exists():
            raise UsageError(f"--annotations {path}: no such file or folder; check the path")
    documents = first_of_each_part(kind.read(annotations), limit)
    tasks = {name: [d for d in documents if task.keep(d)] for name, task in kind.tasks.items()}
    tasks = {name: kept for name, kept in tasks.items() if kept}
    if not tasks:
        raise DataError(f"{', '.join(map(str, annotations))}: no questions of {kind_name} in it")
    sources = _image_sources(documents, images)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        total = _write_images(unfinished / "images", sources, progress)
        for name, kept in tasks.items():
            _write_task(unfinished, name, kind.tasks[name], kept)
        write_whole(unfinished / "utils.py", _utils(kind))
        if out.is_dir():
            out.rmdir()
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    counts = {PACK + name: len(kept) for name, kept in tasks.items()}
    return PackSummary(str(out), counts, len(sources), total)


def first_of_each_part(documents: Sequence[Document], limit: int | None) -> list[Document]:
    """The first `limit` documents of each part; all for None."""
    seen: dict[str, int] = {}
    kept = []
    for document in documents:
        seen[document.part] = seen.get(document.part, 0) + 1
        if limit is None or seen[document.part] <= limit:
            kept.append(document)
    return kept


def _check_new(out: Path) -> None:
    check_out(out)
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out}: the folder is not empty; give a new one")


def _image_sources(documents: Sequence[Document], folder: Path | None) -> dict[str, Path | bytes]:
    """Name in the pack -> file or bytes, each with a header that can be read."""
    found: dict[str, Path | bytes] = {}
    for document in documents:
        for picture in document.pictures:
            if picture.name not in found:
                found[picture.name] = _source(picture, folder, document.where)
    return found


def _source(picture: Picture, folder: Path | None, where: str) -> Path | bytes:
    if fault := path_fault(picture.name):
        raise DataError(f"{where}: image {picture.name!r} {fault}")
    source: Path | bytes | None = picture.data
    if source is None:
        if folder is None:
            raise UsageError("--images DIR is missing; this benchmark's images are files")
        if not folder.is_dir():
            raise UsageError(f"--images {folder} is not a folder; give the folder of the images")
        source = find_image(folder, picture.name)
        if source is None:
            raise DataError(f"{where}: {folder / picture.name}: no such image; check --images")
    try:
        read_size(source)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return source


def _write_images(folder: Path, sources: dict[str, Path | bytes], progress: Progress) -> int:
    """Copy the images as they are; returns their bytes."""
    folder.mkdir(parents=True)
    total = 0
    for number, (name, source) in enumerate(sources.items(), start=1):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            target.write_bytes(source)
        else:
            shutil.copyfile(source, target)
        total += target.stat().st_size
        progress(number, len(sources))
    return total


def _write_task(folder: Path, name: str, task: Task, documents: Sequence[Document]) -> None:
    rows = [{**d.fields, "images": [picture.name for picture in d.pictures]} for d in documents]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / f"{name}.jsonl", lines)
    config = yaml.dump(
        task_config(name, task), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
    )
    write_whole(folder / f"{name}.yaml", config)


def task_config(name: str, task: Task) -> dict[str, Any]:
    """The task's YAML as a value; functions are `Function`."""
    config: dict[str, Any] = {
        "task": PACK + name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {SPLIT: f"{name}.jsonl"}},
        "test_split": SPLIT,
        "output_type": "multiple_choice" if task.choices else "generate_until",
        "doc_to_visual": Function("utils.doc_to_visual"),
        "doc_to_text": _named(task.text if "." in task.text else f"utils.{task.text}"),
        "doc_to_target": _named(task.target),
    }
    if task.choices:
        config["doc_to_choice"] = _named(task.choices)
    else:
        config["generation_kwargs"] = {
            "max_new_tokens": task.max_new_tokens,
            "temperature": 0,
            "do_sample": False,
            "until": ["ASSISTANT:"],  # without one lmms-eval stops at an empty line
        }
    if task.results:
        config["process_results"] = _named(task.results)
    config["metric_list"] = [
        {
            "metric": metric.name,
            "aggregation": _named(metric.aggregation),
            "higher_is_better": True,
            **metric.options,
        }
        for metric in task.metrics
    ]
    if task.prompt:  # lmms-eval hands these to the text's function only where there are any
        words = {"pre_prompt": "", "post_prompt": task.prompt, **task.words}
        config["lmms_eval_specific_kwargs"] = {"default": words}
    config["metadata"] = {"version": 1.0}
    return config


def _named(name: str) -> str:
    return Function(name) if name.startswith("utils.") else name


def _utils(kind: Kind) -> str:
    return TEMPLATE.read_text(encoding="utf-8").replace("{harness}", kind.harness)
