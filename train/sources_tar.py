"""WebDataset's tar shards, read at any place: each sample is `KEY.json` with its images beside it.

One image is `KEY.jpg` (or another suffix of image), several are `KEY.0.jpg`, `KEY.1.jpg`, … in the
order of their image tags. Members with other extensions are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ..hd.errors import DataError
from ..hd.image import ImageLimits
from .record import BadRecord, Record, checked_record
from .records import parse_file_text
from .sources_base import OpenFiles, Stamp
from .sources_tar_index import ShardIndex, image_fault

MAX_JSON_BYTES = 16 * 2**20
MAX_IMAGE_BYTES = ImageLimits().max_bytes


@dataclass(frozen=True)
class TarImage:
    """An image member of a shard: `size` bytes from `offset` on."""

    files: OpenFiles
    path: Path
    stamp: Stamp
    member: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        return f"{self.path}: {self.name}"

    @property
    def name(self) -> str:
        return f"member {self.member!r}"

    def load(self) -> bytes:
        """The member's bytes. DataError for one that is too large, or a file that is gone."""
        if self.size > MAX_IMAGE_BYTES:
            raise DataError(
                f"{self.name}: {self.size} bytes, above the limit of {MAX_IMAGE_BYTES}; "
                "make it smaller"
            )
        return self.files.read(self.path, self.stamp, self.offset, self.size)


class TarSource:
    """The samples of one shard, in the order of its members."""

    names_files = False

    def __init__(self, path: Path, index: ShardIndex, stamp: Stamp, files: OpenFiles) -> None:
        self.path, self.index, self.stamp, self.files = path, index, stamp, files

    @property
    def faults(self) -> Mapping[int, BadRecord]:
        return {}

    def __len__(self) -> int:
        return len(self.index.keys)

    def record(self, index: int) -> Record:
        """The record of a sample; BadRecord names shard, key, field and remedy."""
        key = self.index.keys[index].decode()
        place = f"sample {key!r}"
        where = f"{self.path}: {place}"
        offset, size = self.index.json[index].tolist()
        suffixes = self.index.suffixes_of(index)
        fault = image_fault(suffixes)
        if size < 0:
            fault = f"has no member {key + '.json'!r}; write the record into one"
        elif size > MAX_JSON_BYTES:
            fault = f"its record has {size} bytes, above the limit of {MAX_JSON_BYTES}; split it"
        if fault is not None:
            raise BadRecord(where, fault)
        member = f"member {key + '.json'!r}"
        try:
            text = self.files.read(self.path, self.stamp, offset, size).decode("utf-8-sig")
            value = parse_file_text(member, text, 1)
        except UnicodeDecodeError as error:
            raise BadRecord(
                where, f"{member}: byte {error.start} is not UTF-8; save it as UTF-8"
            ) from error
        except DataError as error:
            raise BadRecord(where, str(error)) from error
        members = [f"{key}.{suffix}" for suffix in suffixes]
        return checked_record(value, str(self.path), index, place, members)

    def locate(self, record: Record, number: int) -> TarImage:
        """The member of an image."""
        offset, size = self.index.images[self.index.first_image[record.index] + number].tolist()
        return TarImage(self.files, self.path, self.stamp, record.images[number], offset, size)

    def has_image(self, index: int) -> bool:
        return bool(self.index.first_image[index + 1] > self.index.first_image[index])

    def num_images(self) -> int:
        return len(self.index.images)

    def digest(self) -> bytes:
        """Of name, size and table of members; a member's bytes are not read."""
        found = hashlib.sha256(f"tar\n{self.path.name}\n{self.stamp[0]}\n".encode())
        for field in fields(self.index):
            array = getattr(self.index, field.name)
            found.update(f"{array.dtype.str}{array.shape}".encode())
            found.update(array.tobytes())
        return found.digest()
