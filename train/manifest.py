"""`MANIFEST.json`: what a checkpoint must consist of, to the byte; and the broken ones put aside.

A folder is a checkpoint when its manifest says so: it lists size and BLAKE2b of every file, is
written last, and only then the folder gets its name. Whatever differs afterwards (a file cut off,
a bit flipped, a file missing, added or taken from another checkpoint) is found before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ..hd.errors import DataError

MANIFEST_FILE = "MANIFEST.json"
QUARANTINE, OPTIMIZER = "quarantine", "optimizer"
LOADED = frozenset({".safetensors", ".bin", ".pt", ".json", ".model", ".jinja", ".txt"})
BLOCK_BYTES = 1 << 22
THREADS = 4  # hashing lets the interpreter go


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size and BLAKE2b (32 bytes, hexadecimal)."""

    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Manifest:
    """The files of the checkpoint of step `step`, by name relative to its folder."""

    step: int
    world_size: int
    files: Mapping[str, FileEntry]

    def text(self) -> str:
        """The only text that stands for this manifest: any other byte in the file is damage."""
        values = asdict(self) | {"files": {k: asdict(v) for k, v in sorted(self.files.items())}}
        inner = json.dumps({"format": 1, **values}, indent=1, sort_keys=True)
        digest = hashlib.blake2b(inner.encode(), digest_size=32).hexdigest()
        return f'{{"blake2b": "{digest}", "manifest": {inner}}}\n'


def entry_of(path: Path, sync: bool = False) -> FileEntry:
    """Size and hash of a file; with `sync` also make sure that it is on the disk."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def entries_of(folder: Path, files: Iterable[str], sync: bool = False) -> dict[str, FileEntry]:
    """The entries of some files of a folder, read in a few threads."""
    names = list(files)
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: entry_of(folder / name, sync), names)
        return dict(zip(names, found, strict=True))


def files_below(folder: Path) -> list[str]:
    """The files of a folder and its sub-folders but the manifest, relative, sorted."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in paths if str(path) != MANIFEST_FILE)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and see to it that it and the names in the folder are on the disk."""
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        file.write(manifest.text())
        file.flush()
        os.fsync(file.fileno())
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(inner)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk (a rename is safe only after this)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; DataError says what is wrong with it. Raises OSError where the
    folder cannot be read: that says nothing about the checkpoint."""
    folder.stat()
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)["manifest"]
        if values.pop("format") != 1:
            raise ValueError("it is of another format")
        files = {name: FileEntry(**entry) for name, entry in values.pop("files").items()}
        manifest = Manifest(files=files, **values)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    if manifest.text() != text:
        raise DataError(f"{path} is damaged (its own hash differs)")
    if folder.name != f"checkpoint-{manifest.step}":
        raise DataError(f"{path} is that of checkpoint-{manifest.step}")
    return manifest


def quick_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as names and sizes tell; None if nothing is.

    A file too many is a fault where a loader could take it for its own; others, such as what a
    network file system leaves behind, are not looked at. Raises OSError as `read_manifest`.
    """
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return str(error)
    present = files_below(folder)
    for name in sorted({*present, *manifest.files}):
        if name not in manifest.files:
            if _may_be_loaded(name):
                return f"{folder / name} does not belong there"
        elif name not in present:
            return f"{folder / name} is missing"
        else:
            size, due = (folder / name).stat().st_size, manifest.files[name].bytes
            if size != due:
                return f"{folder / name} has {size:,} bytes, not {due:,}"
    return None


def _may_be_loaded(name: str) -> bool:
    path = Path(name)
    in_place = len(path.parts) == 1 or path.parts[0] == OPTIMIZER
    return in_place and not path.name.startswith(".") and path.suffix in LOADED


def fault_in(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, every byte read; None if nothing is.

    share of shares: which part of the files is read here, so that ranks divide the work. Raises
    OSError where the disk does not let it be read.
    """
    fault = quick_fault(folder)
    if fault is not None:
        return fault
    due = read_manifest(folder).files
    mine = _shares(due, shares)[share]
    found = entries_of(folder, mine)
    wrong = [name for name in mine if found[name] != due[name]]
    return f"{folder / wrong[0]} is damaged (its hash differs)" if wrong else None


def _shares(files: Mapping[str, FileEntry], shares: int) -> list[list[str]]:
    """File names dealt out so that the shares have about equally many bytes."""
    dealt: list[list[str]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        least = loads.index(min(loads))
        dealt[least].append(name)
        loads[least] += files[name].bytes
    return dealt


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders of a run that call themselves checkpoints, oldest first; not yet verified."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and path.is_dir():
            found.append((int(number[1]), path))
    return [path for _, path in sorted(found)]


def put_aside(folder: Path) -> Path:
    """Move a broken checkpoint to `quarantine/` beside it; returns where it is now."""
    shelf = folder.parent / QUARANTINE
    shelf.mkdir(exist_ok=True)
    taken = {path.name for path in shelf.iterdir()}
    names = (folder.name if n == 1 else f"{folder.name}.{n}" for n in range(1, len(taken) + 2))
    target = shelf / next(name for name in names if name not in taken)
    folder.replace(target)
    sync_folder(folder.parent)
    return target
