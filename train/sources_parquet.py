"""Parquet files of records, read by row groups: the one door to pyarrow.

A column `conversations` with `image`, or `messages` with `images`; `id` may stand beside them. The
image column holds names, or bytes, or Hugging Face's `{"bytes", "path"}`, each alone or in a list.
A row is read with its row group, the last of which stay in memory, so small groups are faster to
read in any order.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..hd.errors import DataError, UsageError
from ..hd.grid import suggest
from .record import BadRecord, Record, checked_record
from .record_images import path_fault
from .sources_base import OPEN_FILES, FileImage, Stamp, changed, stamp_of

KEPT_BYTES = 256 * 2**20  # of decoded row groups, in each process
MAX_GROUP_BYTES = 2 * 2**30  # of the columns that are read together
TAIL_BYTES = 8  # length of the footer, and the mark
SCHEMAS = {"conversations": "image", "messages": "images"}


def _pyarrow(path: Path) -> tuple[Any, Any]:
    """pyarrow and its parquet module."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"{path} is a Parquet file, which pyarrow reads; pip install 'llava-hd[data]'"
        ) from error
    return pyarrow, pyarrow.parquet


@dataclass(frozen=True)
class ParquetImage:
    """An image of a row, `number` from 0."""

    source: ParquetSource
    row: int
    number: int

    @property
    def key(self) -> str:
        return f"{self.source.path}: row {self.row}, {self.name}"

    @property
    def name(self) -> str:
        return f"{self.source.image_column}[{self.number}]"

    def load(self) -> bytes | Path:
        """Its bytes, or the file that it names."""
        return self.source.load_image(self.row, self.number)


class RowGroups:
    """The files that were opened lately and the row groups that were read, of all sources of one
    set; each process has its own."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._readers: OrderedDict[Path, Any] = OrderedDict()
        self._tables: OrderedDict[tuple[Path, int, tuple[str, ...]], Any] = OrderedDict()
        self._kept_bytes = 0  # of the tables; counting one takes long

    def __reduce__(self) -> tuple[type[RowGroups], tuple[()]]:
        return RowGroups, ()

    def table(self, path: Path, stamp: Stamp, group: int, leaves: tuple[str, ...]) -> Any:
        """The columns of a row group, from memory where it was read lately. Raises DataError."""
        key = (path, group, leaves)
        table = self._tables.pop(key, None)
        if table is None:
            table = _read(self.reader(path, stamp), path, group, leaves)
            self._kept_bytes += table.nbytes
            while self._tables and self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= self._tables.popitem(last=False)[1].nbytes
        self._tables[key] = table
        return table

    def reader(self, path: Path, stamp: Stamp) -> Any:
        """The file, opened in this process; one from before a fork is not used."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._readers.clear()
        reader = self._readers.pop(path, None)
        if reader is None:
            if stamp_of(path) != stamp:
                raise changed(path)
            reader = _open(path)
            if len(self._readers) >= OPEN_FILES:
                self._readers.popitem(last=False)
        self._readers[path] = reader
        return reader


class ParquetSource:
    """The rows of one file.

    image_column: where there is one. names_files: the column holds names of files below `root`.
    """

    def __init__(self, path: Path, root: Path | None, groups: RowGroups) -> None:
        """Reads the footer. Raises DataError for a file or a schema that does not fit."""
        self.path, self.root, self.stamp, self.groups = path, root, stamp_of(path), groups
        pa, _ = _pyarrow(path)
        reader = groups.reader(path, self.stamp)
        metadata, schema = reader.metadata, reader.schema_arrow
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.first_rows = np.cumsum([0, *counts])
        if not metadata.num_rows:
            raise DataError(f"{path}: holds no row; give a file with at least one")
        self.column, self.image_column = _columns(path, schema.names)
        leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        texts = [name for name in ("id", self.column) if name in schema.names]
        self.text_leaves = _leaves_of(leaves, texts)
        self.image_leaves: tuple[str, ...] = ()
        self.names_files = False
        if self.image_column in schema.names:
            element = _element(pa, schema.field(self.image_column).type)
            self._check_image_type(pa, element)
            self.image_leaves = _leaves_of(leaves, [self.image_column])
            self.names_files = _is_text(pa, element)
            paths = tuple(leaf for leaf in self.image_leaves if leaf.endswith(".path"))
            # How many images a row has is seen without reading them where they have a path.
            self.text_leaves += paths or self.image_leaves

    def _check_image_type(self, pa: Any, element: Any) -> None:
        is_struct = pa.types.is_struct(element)
        names = {element.field(i).name for i in range(element.num_fields)} if is_struct else set()
        fits = _is_text(pa, element) or _is_binary(pa, element) or {"bytes", "path"} <= names
        if not fits:
            raise DataError(
                f"{self.path}: column {self.image_column} is {element}; give names, bytes, or "
                "objects with bytes and path"
            )

    @property
    def faults(self) -> Mapping[int, BadRecord]:
        return {}

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def record(self, index: int) -> Record:
        """The record of a row; BadRecord names file, row, column and remedy."""
        place = f"row {index}"
        row = self._row(index, self.text_leaves)
        value = {name: row[name] for name in ("id", self.column) if row.get(name) is not None}
        cells = _cells(row.get(self.image_column))
        for number, cell in enumerate(cells):
            if cell is None:
                reason = f"{self.image_column}[{number}] is null; give the image or drop the record"
                raise BadRecord(f"{self.path}: {place}", reason)
        if cells:
            value[self.image_column] = [
                cell if isinstance(cell, str) else _label(cell, index, number)
                for number, cell in enumerate(cells)
            ]
        return checked_record(value, str(self.path), index, place)

    def locate(self, record: Record, number: int) -> ParquetImage | FileImage:
        """The file of an image, or its place in the row."""
        if self.names_files:
            return FileImage(self.root, record.images[number])
        return ParquetImage(self, record.index, number)

    def load_image(self, index: int, number: int) -> bytes | Path:
        """An image's bytes, or the file that it names in their place."""
        name = f"{self.image_column}[{number}]"
        cell = _cells(self._row(index, self.image_leaves)[self.image_column])[number]
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            return data
        if not isinstance(cell, dict) or not cell["path"]:
            raise DataError(f"{name} holds neither bytes nor a path; give one, or drop the record")
        if self.root is None:
            raise DataError(f"{name} holds a path without bytes; give the folder of the images")
        return FileImage(self.root, cell["path"]).load()

    def has_image(self, index: int) -> bool:
        try:
            row = self._row(index, self.text_leaves)
        except BadRecord:
            return False  # told when it is due, or on counting tokens
        return bool(_cells(row.get(self.image_column)))

    def num_images(self) -> int:
        """Images of all rows, of which the names or paths are read where there are any."""
        total = 0
        for group in range(len(self.first_rows) - 1):
            if self.image_leaves:
                rows = self._table(group, self.text_leaves).column(self.image_column).to_pylist()
                total += sum(len(_cells(row)) for row in rows)
        return total

    def digest(self) -> bytes:
        """Of name, size and footer, in which place, size and statistics of each column chunk stand;
        the data are not read."""
        found = hashlib.sha256(f"parquet\n{self.path.name}\n{self.stamp[0]}\n".encode())
        with self.path.open("rb") as file:
            file.seek(-TAIL_BYTES, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-TAIL_BYTES - length, os.SEEK_END)
            found.update(file.read(length))
        return found.digest()

    def _row(self, index: int, leaves: tuple[str, ...]) -> dict[str, Any]:
        group = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        start = index - int(self.first_rows[group])
        try:
            [row] = self._table(group, leaves).slice(start, 1).to_pylist()
        except DataError as error:
            raise BadRecord(f"{self.path}: row {index}", str(error)) from error
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise BadRecord(
                f"{self.path}: row {index}", f"cannot be read ({reason:.200}); write it again"
            ) from error
        return row

    def _table(self, group: int, leaves: tuple[str, ...]) -> Any:
        return self.groups.table(self.path, self.stamp, group, leaves)


def _read(reader: Any, path: Path, group: int, leaves: tuple[str, ...]) -> Any:
    """The columns of a row group. DataError names the group only."""
    pa, _ = _pyarrow(path)
    found = reader.metadata.row_group(group)
    columns = [found.column(number) for number in range(found.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema in leaves)
    if size > MAX_GROUP_BYTES:
        raise DataError(
            f"row group {group} has {size} bytes, above the limit of {MAX_GROUP_BYTES}; write "
            "the file again with smaller ones (pyarrow: row_group_size=100)"
        )
    try:
        return reader.read_row_group(group, columns=list(leaves), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"row group {group} cannot be read ({reason:.200}); fetch the file again"
        ) from error


def _open(path: Path) -> Any:
    pa, parquet = _pyarrow(path)
    try:
        return parquet.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: not a Parquet file, or a damaged one ({reason:.200}); fetch or write it again"
        ) from error


def _columns(path: Path, names: list[str]) -> tuple[str, str]:
    """The column of the conversation, and the one of its images (which may not be there)."""
    found = [name for name in SCHEMAS if name in names]
    if len(found) == 1:
        twice = [name for name in (*found, SCHEMAS[found[0]], "id") if names.count(name) > 1]
        if twice:
            raise DataError(f"{path}: column {twice[0]} stands in it twice; keep one of them")
        return found[0], SCHEMAS[found[0]]
    if found:
        raise DataError(f"{path}: has columns conversations and messages; keep one of them")
    known = ", ".join(names)
    hint = suggest("conversations", names) if names else ""
    hint = hint if hint.startswith("did you mean") else "rename the one that holds the turns"
    raise DataError(f"{path}: no column conversations or messages among {known:.200}; {hint}")


def _leaves_of(leaves: list[str], columns: list[str]) -> tuple[str, ...]:
    return tuple(leaf for leaf in leaves if leaf.partition(".")[0] in columns)


def _element(pa: Any, kind: Any) -> Any:
    """What a list holds; another type as it is."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if is_list or pa.types.is_fixed_size_list(kind) else kind


def _is_text(pa: Any, kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(pa: Any, kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _cells(value: Any) -> list[Any]:
    """The images of a row: none, one, or those of a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _label(cell: Any, row: int, number: int) -> str:
    """A name for an image whose bytes stand in the row."""
    name = cell.get("path") if isinstance(cell, dict) else None
    return name if name and path_fault(name) is None else f"row{row}-{number}"
