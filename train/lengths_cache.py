"""Measured lengths on disk: one file for each data set and way of measuring, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..hd.errors import LlavaHDError
from ..model.processor import Processor
from ..model.prompt import get_template

VERSION = 1  # of the file and of what a length means; another one is measured again
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def cache_key(processor: Processor, template: str | None, max_length: int, source: str) -> str:
    """Hex digest of all that a length depends on, image files apart (lengths.py)."""
    config = processor.config
    values = {
        "version": VERSION,
        "source": source,
        "tokenizer": tokenizer_digest(processor.tokenizer),
        "template": asdict(get_template(config.template if template is None else template)),
        "image_token_id": config.image_token_id,
        "hd": config.hd.to_dict(),
        "max_length": max_length,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex digest of a tokenizer's files, as it would save them now."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_file(folder: Path, key: str) -> Path:
    """The file of a key."""
    return folder / f"lengths-{key[:32]}.npz"


def read_cached(
    folder: Path, key: str, count: int
) -> tuple[np.ndarray, np.ndarray, dict[int, str]] | None:
    """Totals, visual tokens and faults of `count` samples; None where there are none, or the file
    is damaged (it is then measured and written again)."""
    path = cache_file(folder, key)
    try:
        with np.load(path, allow_pickle=False) as file:  # zip: every member has a checksum
            found_key, total, visual = str(file["key"]), file["total"], file["visual"]
            faults = {int(k): str(v) for k, v in json.loads(str(file["faults"])).items()}
    except UNREADABLE:
        return None
    shapes = {(array.shape, array.dtype) for array in (total, visual)}
    if found_key != key or shapes != {((count,), np.dtype(np.int32))}:
        return None
    return total, visual, faults


def write_cached(
    folder: Path, key: str, total: np.ndarray, visual: np.ndarray, faults: dict[int, str]
) -> None:
    """Write a file that a reader sees whole or not at all; LlavaHDError where that cannot be."""
    path = cache_file(folder, key)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                np.savez(file, key=key, total=total, visual=visual, faults=json.dumps(faults))
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise LlavaHDError(
            f"{path}: lengths cannot be saved ({error.strerror}); give a folder that can be written"
        ) from error
