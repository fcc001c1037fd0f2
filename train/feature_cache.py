"""What a frozen tower said about an image, kept on disk: neither decoded nor encoded again.

An entry is a file of its own, named by SHA-256 of the image's bytes, its size and geometry, and all
that the tower's features depend on (model/vision.py, `digest`) with their type and the kind of
device. It holds the image's kept rows `[r D]`, in their places' order, behind a SHA-256 of name and
rows. A file appears whole or not at all, so any number of processes, ranks and runs may share a
folder; one that is damaged is dropped, said, and made again.

A hit gives the rows bit by bit as the tower made them. In a pack of other tiles the tower's
products may round otherwise in the last bits, as they do between two packs without a cache too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from ..hd.image import ImageError, load_image, read_bytes, read_size
from ..hd.plan import TilePlan, plan_image
from ..model.packing import PackedBatch, num_rows
from ..model.processor import Cut, Processor
from ..model.vision import VisionTower, kept_rows

VERSION = 1  # of the files and of what they hold
SUFFIX, UNFINISHED = ".features", ".unfinished"
DIGEST_BYTES = hashlib.sha256().digest_size
GIB = 2**30


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features of one tower in one type; small, and sent to loader processes.

    tower: digest of the tower, the device's kind included. width: D.
    """

    folder: Path
    tower: str
    dtype: torch.dtype
    width: int

    @classmethod
    def of(cls, folder: Path, tower: VisionTower, device: torch.device) -> FeatureCache:
        """The cache of a tower that will be computed on such a device; before ZeRO-3."""
        weight = tower.clip.embeddings.patch_embedding.weight
        about = f"{VERSION} {tower.digest()} {weight.dtype} {device.type}"
        digest = hashlib.sha256(about.encode()).hexdigest()
        return cls(folder, digest, weight.dtype, tower.clip.config.hidden_size)

    def key(self, data: bytes, plan: TilePlan) -> str:
        """The name of an image's entry, from its file's bytes and its plan."""
        geometry = json.dumps([plan.image_size, plan.config.to_dict()], sort_keys=True)
        about = f"{self.tower} {hashlib.sha256(data).hexdigest()} {geometry}"
        return hashlib.sha256(about.encode()).hexdigest()

    def file(self, key: str) -> Path:
        """Where an entry stands; a folder holds the 256th part of them."""
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def cut(self, source: Path | bytes, name: str, processor: Processor) -> Cut:
        """An image as the model takes it, without tiles where its features are known. name: of the
        image. Raises ImageError."""
        try:
            data = read_bytes(source)
            plan = plan_image(read_size(data), processor.config.hd)
            key = self.key(data, plan)
            features, fault = self.read(key, num_rows(plan))
            if features is not None:
                px = plan.config.tile_px
                none = torch.empty(0, 3, px, px, dtype=torch.uint8)
                return Cut(plan, none, features, key)
            return replace(processor.cut(load_image(data)), key=key, fault=fault)
        except ImageError as error:
            raise ImageError(name, error.reason, error.remedy) from error

    def read(self, key: str, rows: int) -> tuple[Tensor | None, str | None]:
        """The features `[rows D]` of an entry; None where there is none, or where it is damaged:
        then it is removed, and the second value says so."""
        file = self.file(key)
        try:
            data = bytearray(file.read_bytes())
        except FileNotFoundError:
            return None, None
        except OSError as error:
            return None, f"{file}: cannot be read ({error.strerror})"
        body = memoryview(data)[DIGEST_BYTES:]
        size = rows * self.width * self.dtype.itemsize
        if len(body) != size or bytes(data[:DIGEST_BYTES]) != checksum(key, body):
            file.unlink(missing_ok=True)
            return None, f"{file}: damaged"
        found = torch.frombuffer(data, dtype=torch.uint8, offset=DIGEST_BYTES, count=size)
        # Copied, so that the features begin where their type wants numbers to begin.
        return found.clone().view(self.dtype).view(rows, self.width), None

    def write(self, key: str, rows: Tensor) -> int:
        """Store an image's kept rows `[r D]`; bytes written, 0 where the entry is there already.
        OSError where the disk is full or the folder may not be written."""
        file = self.file(key)
        if file.exists():
            return 0
        flat = rows.detach().to("cpu", self.dtype).contiguous().flatten().view(torch.uint8)
        body = flat.numpy().data
        unfinished = file.with_name(f".{key[:16]}.{uuid4().hex}{UNFINISHED}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as out:
                out.write(checksum(key, body))
                out.write(body)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        return DIGEST_BYTES + len(body)

    def held(self) -> tuple[int, int]:
        """Entries of the folder, of this tower and of others, and their bytes. What a run that was
        killed left unfinished is removed."""
        entries = size = 0
        for part in _listed(self.folder):
            for file in _listed(Path(part.path)) if part.is_dir() else []:
                try:
                    if file.name.endswith(UNFINISHED) and _is_old(file):
                        Path(file.path).unlink(missing_ok=True)
                    elif file.name.endswith(SUFFIX):
                        entries, size = entries + 1, size + file.stat().st_size
                except FileNotFoundError:  # another run has just named or removed it
                    continue
        return entries, size


def checksum(key: str, body: memoryview) -> bytes:
    """SHA-256 of an entry's name and rows."""
    digest = hashlib.sha256(key.encode())
    digest.update(body)
    return digest.digest()


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(folder)) if folder.is_dir() else []


OLD_SECONDS = 24 * 3600.0


def _is_old(file: os.DirEntry[str]) -> bool:
    """Whether nobody can be writing it any more, by the clock of the disk's own files."""
    newest = Path(file.path).parent.stat().st_mtime
    return newest - file.stat().st_mtime > OLD_SECONDS


class CacheWriter:
    """Stores what the tower makes on this rank, up to its share of a limit.

    room: bytes that this rank may add; None without a limit. What cannot be written ends the
    writing, with a line by `say`, and never the run.
    """

    def __init__(self, cache: FeatureCache, room: int | None, say: Callable[[str], None]) -> None:
        self.cache, self.room, self.say = cache, room, say
        self.entries = self.size = 0
        self.stopped = False

    def store(self, batch: PackedBatch, features: Tensor | None) -> None:
        """Store the fresh rows of a pack. features: those of the model's Output."""
        for fresh in batch.fresh if features is not None else ():
            if self.stopped:
                return
            assert features is not None
            rows = batch.rows[fresh.first : fresh.last]
            bytes_needed = DIGEST_BYTES + len(rows) * self.cache.width * self.cache.dtype.itemsize
            if self.room is not None and self.size + bytes_needed > self.room:
                self._stop("data.feature_cache_gib is reached")
                return
            try:
                written = self.cache.write(fresh.key, kept_rows(features, rows))
            except OSError as error:
                self._stop(f"{self.cache.folder} cannot be written ({error.strerror})")
                return
            self.entries += written > 0
            self.size += written

    def _stop(self, reason: str) -> None:
        self.stopped = True
        self.say(f"feature cache: {reason}; nothing more is stored, what is there is used")
