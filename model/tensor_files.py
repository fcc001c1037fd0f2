"""The tensors of any model folder or file: safetensors or PyTorch's .bin, whole or in shards.

One file is open at a time and its tensors are mapped, not copied, so reading never needs more than
one file above what is kept. A .bin is a pickle: torch reads it with weights_only, which knows
tensors and containers and refuses everything that would call a function; nothing of it is run.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..hd.errors import DataError, UsageError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights under the names that transformers gives them."""
    return any((folder / name).is_file() for name in (*INDEXES, *WHOLE)) or bool(_loose(folder))


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, as its index names them; safetensors before .bin.

    Raises DataError for a shard that is missing or an index that is damaged, UsageError where
    there is no weight file.
    """
    for index, whole in zip(INDEXES, WHOLE, strict=True):
        if (folder / index).is_file():
            return _indexed(folder / index)
        if (folder / whole).is_file():
            return [folder / whole]
    loose = _loose(folder)
    if not loose:
        raise UsageError(
            f"model folder {folder} has no weights (model.safetensors or pytorch_model.bin); "
            "copy the model again"
        )
    return loose


def _loose(folder: Path) -> list[Path]:
    """Shards without an index, from which nothing tells whether one is missing but their names."""
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    files = files or sorted(folder.glob("pytorch_model-*-of-*.bin"))
    due = {int(file.stem.rpartition("-of-")[2]) for file in files if file.stem[-1].isdigit()}
    if files and due != {len(files)}:
        raise DataError(
            f"model folder {folder} has {len(files)} shards of {max(due, default=0)} and no index; "
            "copy the model again"
        )
    return files


def _indexed(index: Path) -> list[Path]:
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [index.parent / name for name in sorted(named)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged; copy the model again") from error
    if any(Path(name).name != name for name in named):
        raise DataError(f"{index} names a file outside its folder; copy the model again")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        folder = index.parent
        raise DataError(f"model folder {folder} lacks {missing[0]} ({len(missing)} shards missing)")
    return files


def folder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model folder, file by file. Raises UsageError and DataError."""
    seen: dict[str, Path] = {}
    for file in weight_files(folder):
        for name, tensor in file_tensors(file):
            if name in seen:
                raise DataError(f"{name} stands in {seen[name].name} and again in {file}")
            seen[name] = file
            yield name, tensor


def file_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file, on the CPU. Raises DataError: damaged, or code in a pickle."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} is damaged ({error}); copy or save it again") from error
        return
    yield from _unpickled(file).items()


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file by weights_only; mapped where it is one of torch's zip files."""
    if not file.is_file():
        raise UsageError(f"{file} is not a file; give a file of weights")
    mapped = zipfile.is_zipfile(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "eights" in str(error):
            raise DataError(
                f"{file} is a pickle with more than tensors in it ({_refused(str(error))}); it was "
                "refused and nothing of it was run; get the weights as .safetensors"
            ) from error
        raise DataError(f"{file} is damaged ({error}); copy it again") from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError) as error:
        text = str(error).strip().splitlines()
        reason = text[0] if text else type(error).__name__
        raise DataError(f"{file} is damaged ({reason}); copy it again") from error
    return _only_tensors(file, state)


def _only_tensors(file: Path, state: object) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise DataError(f"{file} holds a {type(state).__name__}, not a table of tensors")
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not plain:
            raise DataError(f"{file}: {name!r} is not an ordinary tensor; get another copy")
    return dict(state)


def _refused(text: str) -> str:
    """What the pickle asked for, out of torch's words."""
    for line in text.splitlines():
        for mark in ("GLOBAL ", "Unsupported "):
            if mark in line:
                return line[line.index(mark) :].split(" was not")[0].strip()[:120]
    return "objects of other kinds"
