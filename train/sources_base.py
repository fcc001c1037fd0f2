"""What every kind of data file offers (`Source`), and where one of its images stands."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..hd.errors import DataError, UsageError
from ..hd.image import ImageError, load_image
from .record import BadRecord, Record
from .record_images import image_path

if TYPE_CHECKING:
    from PIL.Image import Image

OPEN_FILES = 64  # that a process keeps

Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


class ImagePlace(Protocol):
    """Where an image stands; small, and may be sent to another process."""

    @property
    def key(self) -> str:
        """Which image it is, the same for each use of the same one; for messages as well."""

    @property
    def name(self) -> str:
        """The image for a message that names file and record already."""

    def load(self) -> Path | bytes:
        """What `hd.image.load_image` takes. DataError names the image and the remedy."""


class Source(Protocol):
    """One data file: records by index from 0, in the order of the file.

    path: the file. names_files: whether its images are files below a folder, rather than inside
    of it. faults: the bad records that are known already.
    """

    path: Path
    names_files: bool

    @property
    def faults(self) -> Mapping[int, BadRecord]: ...

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """The record, checked. Raises BadRecord."""

    def locate(self, record: Record, number: int) -> ImagePlace:
        """Where the image of that number (from 0) of one of its records stands."""

    def has_image(self, index: int) -> bool:
        """Whether the record has images, as far as that is seen without reading it whole."""

    def num_images(self) -> int:
        """Images inside of the file."""

    def digest(self) -> bytes:
        """SHA-256 that differs when the records do, or their order."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file below a folder. Its key is its name."""

    root: Path | None
    name: str

    @property
    def key(self) -> str:
        return self.name

    def load(self) -> Path:
        """The file; UsageError without a folder."""
        if self.root is None:
            raise UsageError(
                f"data.images is missing; image {self.name!r} is a file, give the folder of images"
            )
        return image_path(self.root, self.name)


def open_image(place: ImagePlace) -> Image:
    """The RGB image of a place, by the one loader. Raises DataError that names the image."""
    source = place.load()
    try:
        return load_image(source)
    except ImageError as error:
        if isinstance(source, bytes):
            raise ImageError(place.name, error.reason, error.remedy) from error
        raise


class OpenFiles:
    """Files read at any place, the last ones kept open; each process opens its own.

    Reading moves no position, so processes that are forked may share what was open.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def read(self, path: Path, stamp: Stamp, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. DataError when the file is another one than `stamp`."""
        try:
            data = os.pread(self._file(path, stamp), size, offset)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check the disk") from error
        if len(data) != size:
            raise DataError(f"{path} ends before byte {offset + size}; is it cut off?")
        return data

    def _file(self, path: Path, stamp: Stamp) -> int:
        name = str(path)
        file = self._open.pop(name, None)
        if file is None:
            file = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if _stamp(os.fstat(file)) != stamp:
                os.close(file)
                raise changed(path)
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open[name] = file
        return file


def changed(path: Path) -> DataError:
    """The error for a file that is another one than when its index was made."""
    return DataError(f"{path} was changed after it was opened; start again")


def stamp_of(path: Path) -> Stamp:
    """Size and time of the last change of a file; OSError where it is not there."""
    return _stamp(path.stat())


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns
