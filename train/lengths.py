"""How many tokens each sample of a data set has, before any pixel is decoded.

The length is exactly that of the sample that will be read: image sizes come from the files'
headers, turned as EXIF says (hd/image.py), their tokens from the plan, the words from the real
tokenizer through the real prompt, cut at max_length. A record that cannot be read or trained on
has the length of its words alone, so that packing goes on, and is noted; what happens to it is
decided when it is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..hd.errors import DataError, LlavaHDError, UsageError
from ..hd.image import read_size
from ..hd.plan import plan_image
from ..model.processor import Processor
from ..model.prompt import Turn
from .data_check_tokens import measure_conversation
from .lengths_cache import cache_key, read_cached, write_cached
from .loader_workers import is_dead_worker, quiet_worker, start
from .record import Record, without_images
from .workers import Done, silent

CHUNK = 64  # records that a loader process hands over at a time
SPOT_CHECKS = 32  # records whose lengths are measured again before cached ones are believed


class Records(Protocol):
    """Records by index; reading a bad one raises DataError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True, eq=False)
class Lengths:
    """total: int32 `[n]`, tokens of each sample; visual: int32 `[n]`, those of images among them.
    faults: by index, why a sample cannot be trained on; its length is that of its words."""

    total: np.ndarray
    visual: np.ndarray
    faults: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.total)


@dataclass(frozen=True)
class LengthReader:
    """Index -> the length of that sample; runs in loader processes.

    image: record and number of its image -> what the image loader takes. template None is the
    model's own.
    """

    records: Records
    image: Callable[[Record, int], Path | bytes]
    processor: Processor
    template: str | None
    max_length: int

    def __call__(self, index: int) -> Length:
        """Never raises for what the data holds."""
        try:
            record = self.records[index]
        except DataError as error:
            return Length(0, 0, str(error))
        try:
            counts = [self._image_tokens(record, k) for k in range(len(record.images))]
        except DataError as error:
            return Length(self._words(record), 0, f"{record.where}: {error}")
        tokens, reason = self._measure(record.turns, counts)
        if reason is not None:
            words = self._words(record) if counts else 0
            return Length(words, 0, f"{record.where}: {reason}")
        return Length(tokens, sum(counts))

    def _image_tokens(self, record: Record, number: int) -> int:
        size = read_size(self.image(record, number))
        return plan_image(size, self.processor.config.hd).num_tokens

    def _words(self, record: Record) -> int:
        """The length of a record without its images; 0 where nothing is left to train on."""
        tokens, reason = self._measure(without_images(record).turns, [])
        return tokens if reason is None else 0

    def _measure(self, turns: tuple[Turn, ...], counts: list[int]) -> tuple[int, str | None]:
        config = self.processor.config
        template = config.template if self.template is None else self.template
        found = measure_conversation(
            self.processor.tokenizer, turns, counts, template, config.image_token_id,
            self.max_length,
        )  # fmt: skip
        return min(found.tokens, self.max_length), found.reason


@dataclass(frozen=True)
class Length:
    """Tokens of one sample, those of images among them, and why it cannot be trained on."""

    total: int
    visual: int
    fault: str | None = None


def token_lengths(
    reader: LengthReader,
    source: str,
    cache_dir: Path | None = None,
    num_workers: int = 0,
    done: Done = silent,
    say: Callable[[str], None] = print,
) -> Lengths:
    """The lengths of all samples: from the cache, or measured by `num_workers` processes.

    source: fingerprint of the data, its records and the place of its images. Cached lengths are
    found by it and by all that the reader measures with (tokenizer, template, geometry, limit).
    Image files are taken to be unchanged while the records are: looking at every file would cost
    minutes on a network disk. Instead a few records spread over the data are measured again, and
    if one differs, all are; those with faults always are, since they may have been mended.
    done: told ("lengths", how many are measured, of how many). say: told where the cache cannot be
    written, which stops nothing.

    Raises UsageError for a tokenizer that prompts cannot be built with, LlavaHDError where a
    process dies.
    """
    key, cached = "", None
    if cache_dir is not None:
        key = cache_key(reader.processor, reader.template, reader.max_length, source)
        cached = read_cached(cache_dir, key, len(reader.records))
    known: dict[int, str] | None = None
    if cached is None or not _is_true(reader, lengths := Lengths(*cached)):
        count = len(reader.records)
        lengths = Lengths(np.zeros(count, np.int32), np.zeros(count, np.int32))
        due: Sequence[int] = range(count)
    else:
        due, known = sorted(lengths.faults), dict(lengths.faults)
    _measure(reader, lengths, due, num_workers, done)
    if cache_dir is not None and lengths.faults != known:
        try:
            write_cached(cache_dir, key, lengths.total, lengths.visual, lengths.faults)
        except LlavaHDError as error:
            say(f"{error}; they will be counted again next time")
    return lengths


def _is_true(reader: LengthReader, lengths: Lengths) -> bool:
    """Whether records spread over the data still have their lengths."""
    places = np.unique(np.linspace(0, len(lengths) - 1, SPOT_CHECKS).astype(int)).tolist()
    return all(
        reader(i) == Length(int(lengths.total[i]), int(lengths.visual[i]))
        for i in places
        if i not in lengths.faults
    )


def _measure(
    reader: LengthReader, lengths: Lengths, due: Sequence[int], num_workers: int, done: Done
) -> None:
    """Fill in the lengths of some records."""
    indices = iter(due)
    count = 0
    for chunk in _chunks(reader, due, num_workers if len(due) > CHUNK else 0):
        for one, index in zip(chunk, indices, strict=False):
            if isinstance(one, UsageError):
                raise one
            lengths.total[index], lengths.visual[index] = one.total, one.visual
            lengths.faults.pop(index, None)
            if one.fault is not None:
                lengths.faults[index] = one.fault
        count += len(chunk)
        done("lengths", count, len(due))


def _chunks(
    reader: LengthReader, due: Sequence[int], num_workers: int
) -> Iterator[list[Length | UsageError]]:
    """Lengths in order. The processes are those of torch's loader, as in training: they share the
    records that this one holds, whereas handing 665,000 of them over would cost more than it saves.
    """
    loader = DataLoader(
        _Indexed(reader),
        sampler=due,
        batch_size=CHUNK,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=quiet_worker if num_workers else None,
    )
    try:
        yield from start(loader)
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise LlavaHDError(
            "a process that measured lengths died, perhaps out of memory; lower data.num_workers"
        ) from error


class _Indexed(Dataset):
    """A LengthReader as torch's loader wants it; an error of usage crosses as a value."""

    def __init__(self, reader: LengthReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader.records)

    def __getitem__(self, index: int) -> Length | UsageError:
        try:
            return self.reader(index)
        except UsageError as error:
            return UsageError(str(error))
