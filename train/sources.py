"""Data files of every kind as one sequence of records: JSON, JSON lines, Parquet and tar shards.

All are read at any place, so the order of the data and exact resuming know nothing of formats.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ..hd.errors import DataError, UsageError
from .record import BadRecord, Record
from .records import check_images as check_files
from .records import first_of, read_json_file
from .sources_base import FileImage, ImagePlace, OpenFiles, Source
from .sources_parquet import ParquetSource, RowGroups
from .sources_paths import Kind, expand, kind_of_file
from .sources_tar import TarSource
from .sources_tar_index import index_shards
from .workers import Done, silent

BLOCK_BYTES = 1 << 20
SHARE_DRAW = 1  # beside the seed, so that this draw is not that of the data order


class JsonSource:
    """The records of a JSON array or of JSON lines, all in memory."""

    names_files = True

    def __init__(self, path: Path, root: Path | None) -> None:
        """Raises UsageError for a file that is not there, DataError for one that is no JSON."""
        self.path, self.root = path, root
        self.records, self._faults = read_json_file(path)

    @property
    def faults(self) -> Mapping[int, BadRecord]:
        return self._faults

    def __len__(self) -> int:
        return len(self.records)

    def record(self, index: int) -> Record:
        """The record; BadRecord names file, index, field and remedy."""
        record = self.records[index]
        if record is None:
            fault = self._faults[index]
            raise BadRecord(fault.where, fault.reason)
        return record

    def locate(self, record: Record, number: int) -> FileImage:
        """The file of an image."""
        return FileImage(self.root, record.images[number])

    def has_image(self, index: int) -> bool:
        record = self.records[index]
        return record is not None and bool(record.images)

    def num_images(self) -> int:
        return 0

    def digest(self) -> bytes:
        """Of the file's bytes."""
        found = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                found.update(block)
        return found.digest()


class RecordSet(Sequence[Record]):
    """The records of several files, in order; pickled, each process opens files of its own.

    `records[i]` raises BadRecord (a DataError) with file, place, field and remedy where that one
    is bad.

    chosen: ascending int64 `[n]`, the only records of the files that are in the sequence; all.
    """

    def __init__(self, sources: Sequence[Source], chosen: np.ndarray | None = None) -> None:
        self.sources = tuple(sources)
        self.chosen = chosen
        self._by_file = {str(source.path): source for source in sources}
        self._ends: list[int] = []
        for source in sources:
            self._ends.append(len(source) + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._in_files if self.chosen is None else len(self.chosen)

    @property
    def _in_files(self) -> int:
        return self._ends[-1] if self._ends else 0

    def share(self, share: float, seed: int) -> RecordSet:
        """So large a share of the records (above 0, at most 1), at least one, in their order.

        One seed's smaller share lies inside its larger one. A share of 1 is the set itself.
        """
        if share == 1:
            return self
        drawn = np.random.default_rng((seed, SHARE_DRAW)).permutation(len(self))
        places = np.sort(drawn[: max(1, round(share * len(self)))])
        return RecordSet(self.sources, places if self.chosen is None else self.chosen[places])

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        source, within = self.find(index)
        return source.record(within)

    def find(self, index: int) -> tuple[Source, int]:
        """The file of a record, and its place there."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if self.chosen is not None:
            place = int(self.chosen[place])
        number = bisect_right(self._ends, place)
        return self.sources[number], place - (self._ends[number - 1] if number else 0)

    @property
    def faults(self) -> Mapping[int, str]:
        """The bad records that were found on reading JSON: index -> what is wrong."""
        starts = [0, *self._ends]
        found = {
            start + index: str(fault)
            for start, source in zip(starts, self.sources, strict=False)
            for index, fault in source.faults.items()
        }
        if self.chosen is None:
            return found
        return {i: found[at] for i, at in enumerate(self.chosen.tolist()) if at in found}

    def locate(self, record: Record, number: int) -> ImagePlace:
        """Where an image of one of these records stands, `number` from 0."""
        return self._by_file[record.file].locate(record, number)

    def image(self, record: Record, number: int) -> Path | bytes:
        """What `hd.image.load_image` takes: a file, or an image's bytes. DataError names it."""
        return self.locate(record, number).load()

    def has_image(self, index: int) -> bool:
        """Whether a record has images; of a bad one, whether any stand beside it."""
        source, within = self.find(index)
        return source.has_image(within)

    def digest(self) -> str:
        """SHA-256 over the files in order: of a JSON file its bytes, of a Parquet file name, size
        and footer, of a shard name, size and table of members; and over the choice of records."""
        whole = hashlib.sha256()
        for source in self.sources:
            whole.update(source.digest())
        if self.chosen is not None:
            whole.update(self.chosen.astype("<i8").tobytes())
        return whole.hexdigest()


def open_records(
    paths: Sequence[str | Path],
    images_root: str | Path | None,
    tolerant: bool = False,
    *,
    cache: Path | None = None,
    done: Done = silent,
) -> RecordSet:
    """The records of data files; names may hold braces (`shard-{0000..0099}.tar`).

    Args:
        images_root: folder of the images that records name; None where all stand inside the files.
        tolerant: a bad record of a JSON file keeps its index and is told in `faults`.
        cache: folder of the indices of tar shards, instead of the user's.
        done: told what is read, how many are done, and of how many.

    Raises UsageError for files that are not there, DataError for one that cannot be read as a
    whole, or a JSON file without one good record, and for a bad one unless tolerant.
    """
    sources: list[Source] = []
    for found in open_files(paths, images_root, cache, done):
        if isinstance(found, DataError):
            raise found
        # A file without one good record is another file than was meant, such as a page; or all
        # records stand inside of one object, which would be left out as a single bad record.
        if found.faults and (not tolerant or len(found.faults) == len(found)):
            raise first_of(found.faults)
        sources.append(found)
    return RecordSet(sources)


def open_files(
    paths: Sequence[str | Path],
    images_root: str | Path | None,
    cache: Path | None = None,
    done: Done = silent,
) -> list[Source | DataError]:
    """Each data file by itself, or why it cannot be read as a whole; see `open_records`."""
    files = expand(paths)
    root = Path(images_root) if images_root else None
    kinds = {path: _kind_or_error(path) for path in files}
    shards = [path for path, kind in kinds.items() if kind == "tar"]
    indices = dict(zip(shards, index_shards(shards, cache, done), strict=True))
    opened: dict[Path, Source | DataError] = {}
    handles, groups = OpenFiles(), RowGroups()
    for count, (path, kind) in enumerate(kinds.items(), start=1):
        if isinstance(kind, DataError):
            opened[path] = kind
        elif kind == "tar":
            found = indices[path]
            opened[path] = (
                found if isinstance(found, DataError) else TarSource(path, *found, handles)
            )
        else:
            try:
                is_json = kind == "json"
                opened[path] = (
                    JsonSource(path, root) if is_json else ParquetSource(path, root, groups)
                )
            except DataError as error:
                opened[path] = error
        done("files", count, len(kinds))
    return [opened[path] for path in files]


def _kind_or_error(path: Path) -> Kind | DataError:
    try:
        return kind_of_file(path)
    except DataError as error:
        return error


def check_images(records: RecordSet) -> int:
    """Make sure that every image of the good records is there; returns how many there are (of
    files, how many different ones).

    Files are looked up in listings of their folders; images inside of data files are counted, those
    of records that are not chosen too.
    Raises UsageError without a folder for files, DataError naming the first bad record and the
    count of bad ones.
    """
    inside = sum(source.num_images() for source in records.sources if not source.names_files)
    with_files = [source for source in records.sources if source.names_files]
    if not with_files:
        return inside
    root = _root_of(with_files)
    if root is None:
        first = next((record for record in _good(records) if record.images), None)
        if first is None:
            return inside
        raise UsageError(
            f"data.images is missing; {first.where} names image files, give their folder"
        )
    return inside + check_files(_good(records), root)


def _root_of(sources: Sequence[Source]) -> Path | None:
    roots = {source.root for source in sources if isinstance(source, (JsonSource, ParquetSource))}
    return next(iter(roots))


def _good(records: RecordSet) -> Iterator[Record]:
    """The good records whose images are files."""
    for index in range(len(records)):
        source, within = records.find(index)
        if not source.names_files:
            continue
        try:
            yield source.record(within)
        except BadRecord:
            continue  # told on opening, or when it is due
