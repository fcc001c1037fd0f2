"""Folders that appear whole: written beside their place under another name, renamed when done."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from ..hd.errors import UsageError

UNFINISHED = ".unfinished-"


def check_new(target: Path) -> None:
    """UsageError where `target` holds something already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"--out {target} is not empty; give a new folder")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `target` at the end and vanishes after an exception.

    Raises UsageError where `target` holds something already, OSError naming it where the disk is
    full or cannot be written.
    """
    check_new(target)
    place = target.resolve()  # a link may lead to an empty folder
    unfinished = place.with_name(f"{UNFINISHED}{place.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        _sync(unfinished)
        unfinished.replace(place)
    except OSError as error:
        reason = f"could not be written ({error.strerror or error}), so it is not there"
        raise OSError(error.errno or errno.EIO, reason, str(target)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sync(folder: Path) -> None:
    """See to it that the files are on the disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def save_tensors(state: Mapping[str, Tensor], folder: Path) -> None:
    """`model.safetensors`, or shards of 5 GB with an index; raises OSError like other writing.

    Nothing shares memory in what is written, so no name is dropped as another one's twin.
    """
    taken: set[int] = set()
    plain = {}
    for name, tensor in state.items():
        whole = tensor.detach().contiguous()
        start = whole.data_ptr()
        plain[name] = whole.clone() if start in taken and whole.numel() else whole
        taken.add(start)
    try:
        save_torch_state_dict(plain, folder, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_json(path: Path, values: Any) -> None:
    """Write a JSON-able value, indented."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
