"""Where the members of a tar shard stand: read once from its headers, kept beside the user's files.

A shard is WebDataset's: members `KEY.EXTENSION`, those of one sample next to each other; the key
is the name up to the first dot of its last part. Nothing is unpacked, and no pickle is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..hd.errors import DataError
from .record_images import path_fault
from .sources_base import Stamp, stamp_of
from .workers import Done, num_cores, silent, workers

FORMAT = 1  # of kept indices
KEEP_FROM_BYTES = 64 * 2**20  # the index of a smaller shard is made anew each time
PARALLEL_FROM_BYTES = 4 * 2**30  # of shards without an index
MAX_NAME_BYTES = 512
BLOCK = 512  # of tar files
MAX_TAIL_BYTES = 2**20  # zeros behind the end mark

NAME = re.compile(r"(?s)((?:.*/|)[^./]+)\.([^/]*)")
META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes
IMAGE = re.compile(r"(?:(\d{1,6})\.)?(?:jpg|jpeg|png|webp|gif|bmp|tif|tiff)")
PICKLES = ("pyd", "pickle", "pkl", "pt", "pth")
TAR_ERRORS = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The members of n samples with m images in all, as arrays.

    keys: bytes `[n]`. json: int64 `[n 2]`, offset and size of the record, size -1 where there is
    none. first_image: int64 `[n + 1]` into the images. images: int64 `[m 2]`, offset and size;
    suffixes: bytes `[m]`, what follows the key and its dot; both ordered by the suffix's number.
    """

    keys: np.ndarray
    json: np.ndarray
    first_image: np.ndarray
    images: np.ndarray
    suffixes: np.ndarray

    def suffixes_of(self, index: int) -> list[str]:
        """Of a sample's images, in order."""
        found = self.suffixes[self.first_image[index] : self.first_image[index + 1]]
        return [suffix.decode() for suffix in found.tolist()]


def index_shards(
    paths: Sequence[Path], cache: Path | None = None, done: Done = silent
) -> list[tuple[ShardIndex, Stamp] | DataError]:
    """The indices of shards, in order, with what the files were then; the error of a bad one.

    Indices of shards from KEEP_FROM_BYTES on are kept in `cache`, by default the user's cache
    folder, as long as path, size and time of change are the same; where that folder cannot be
    written, each run reads the headers again.
    """
    folder = _user_cache() if cache is None else cache
    stamps = [stamp_of(path) for path in paths]
    found: list[ShardIndex | DataError | None] = [
        _read_kept(folder, path, stamp) for path, stamp in zip(paths, stamps, strict=True)
    ]
    missing = [number for number, index in enumerate(found) if index is None]
    parallel = sum(stamps[number][0] for number in missing) >= PARALLEL_FROM_BYTES
    with workers(min(num_cores(), len(missing)) if parallel else 0, chunk=1) as run:
        results = run(_index_chunk, [paths[number] for number in missing], ())
        for count, (number, [made]) in enumerate(zip(missing, results, strict=True), start=1):
            if not isinstance(made, DataError):
                _keep(folder, paths[number], stamps[number], made)
            found[number] = made
            done("tar shards", count, len(missing))
    return [
        index if isinstance(index, DataError) else (index, stamp)
        for index, stamp in zip(found, stamps, strict=True)
        if index is not None
    ]


def _index_chunk(paths: Sequence[Path]) -> list[ShardIndex | DataError]:
    """Errors are handed over as values, because one raised in a process brings a page along."""
    found: list[ShardIndex | DataError] = []
    for path in paths:
        try:
            found.append(index_shard(path))
        except DataError as error:
            found.append(DataError(str(error)))
    return found


def index_shard(path: Path) -> ShardIndex:
    """The index of one shard, from the headers of its members. DataError names file and member."""
    samples = _Samples(path)
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            end = 0
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                _check_member(path, member)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.isreg():
                    samples.add(member)
            _check_end(path, file, end)
    except TAR_ERRORS as error:
        raise DataError(
            f"{path}: not a tar file, or a damaged one ({error}); fetch or write it again"
        ) from error
    return samples.index()


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    where = f"{path}: member {member.name!r:.200}"
    fault = None if member.isdir() else path_fault(member.name)
    if fault is not None:
        raise DataError(f"{where} {fault}; write the shard with plain relative names")
    if not (member.isreg() or member.isdir()) or member.issparse():
        kind = "a sparse file" if member.issparse() else "a link or a device"
        raise DataError(f"{where} is {kind}; write the shard with plain files only")
    if member.name.lower().rpartition(".")[2] in PICKLES:
        raise DataError(f"{where} is a pickle, which is never read; write the shard without it")
    if len(os.fsencode(member.name)) > MAX_NAME_BYTES:
        raise DataError(f"{where} has a name of over {MAX_NAME_BYTES} bytes; give a shorter one")


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """tarfile takes a damaged header, or the end of the file, for the end of the archive."""
    size = path.stat().st_size
    if end > size:
        raise DataError(f"{path}: its last member is cut off; fetch the file again")
    file.seek(end)
    tail = file.read(MAX_TAIL_BYTES + 1)
    if len(tail) < BLOCK:
        raise DataError(f"{path}: has no end mark, so it is cut off; fetch the file again")
    if len(tail) > MAX_TAIL_BYTES or tail.strip(b"\0"):
        raise DataError(
            f"{path}: damaged at byte {end}, or several archives laid end to end; fetch it again, "
            "or give each shard as a file"
        )


class _Samples:
    """Members put together to samples as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key: str | None = None
        self.seen: set[str] = set()  # suffixes of this sample
        self.names: dict[str, None] = {}  # keys so far, in order
        self.json: list[tuple[int, int]] = []
        self.here: list[tuple[int, str, int, int]] = []  # images: number, suffix, offset, size
        self.images: list[tuple[int, int]] = []
        self.suffixes: list[str] = []
        self.first_image = [0]

    def add(self, member: tarfile.TarInfo) -> None:
        name = NAME.fullmatch(member.name)
        if name is None or META.match(member.name):
            return  # no extension, or hidden: nobody's member
        key, suffix = name[1], name[2].lower()
        if key != self.key:
            self._begin(key)
        if suffix in self.seen:
            raise DataError(
                f"{self.path}: member {member.name!r:.200} stands in it twice; write it once"
            )
        self.seen.add(suffix)
        image = IMAGE.fullmatch(suffix)
        if image is not None:
            number = -1 if image[1] is None else int(image[1])
            self.here.append((number, suffix, member.offset_data, member.size))
        elif suffix == "json":
            self.json[-1] = (member.offset_data, member.size)

    def _begin(self, key: str) -> None:
        if self.key is not None:
            self._end()
        if key in self.names:
            raise DataError(
                f"{self.path}: the members of sample {key!r:.200} do not stand next to each other; "
                "write the shard in the order of its keys"
            )
        self.key = key
        self.names[key] = None
        self.json.append((0, -1))
        self.seen.clear()

    def _end(self) -> None:
        for _, suffix, offset, size in sorted(self.here):
            self.images.append((offset, size))
            self.suffixes.append(suffix)
        self.first_image.append(len(self.images))
        self.here.clear()

    def index(self) -> ShardIndex:
        if self.key is None:
            raise DataError(
                f"{self.path}: holds no sample; its members must be named KEY.json, KEY.jpg"
            )
        self._end()
        return ShardIndex(
            keys=np.array([key.encode() for key in self.names]),
            json=np.array(self.json, dtype=np.int64),
            first_image=np.array(self.first_image, dtype=np.int64),
            images=np.array(self.images, dtype=np.int64).reshape(-1, 2),
            suffixes=np.array([suffix.encode() for suffix in self.suffixes], dtype=np.bytes_),
        )


def image_fault(suffixes: Sequence[str]) -> str | None:
    """Why the images of a sample have no order: either one without a number, or 0, 1, 2, …"""
    numbers = [suffix.rpartition(".")[0] for suffix in suffixes]
    if numbers in ([], [""]) or numbers == [str(number) for number in range(len(numbers))]:
        return None
    names = ", ".join(f".{suffix}" for suffix in suffixes)
    return f"its images {names} have no order; name them KEY.0.jpg, KEY.1.jpg, …"


def _user_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llava-hd" / "tar-index"


def _kept_path(folder: Path, path: Path, stamp: Stamp) -> Path:
    name = f"{FORMAT}\n{os.path.realpath(path)}\n{stamp[0]}\n{stamp[1]}"
    return folder / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:40]}.npz"


def _read_kept(folder: Path, path: Path, stamp: Stamp) -> ShardIndex | None:
    """A kept index; None where there is none that can be read, so that it is made again."""
    try:
        with np.load(_kept_path(folder, path, stamp), allow_pickle=False) as arrays:
            return ShardIndex(**{field.name: arrays[field.name] for field in fields(ShardIndex)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _keep(folder: Path, path: Path, stamp: Stamp, index: ShardIndex) -> None:
    if stamp[0] < KEEP_FROM_BYTES:
        return
    whole = _kept_path(folder, path, stamp)
    unfinished = whole.with_name(f".{whole.name}.{os.getpid()}.unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                np.savez(
                    file, **{field.name: getattr(index, field.name) for field in fields(index)}
                )
            unfinished.replace(whole)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError:
        return  # a cache only: the folder may be read-only or the disk full
