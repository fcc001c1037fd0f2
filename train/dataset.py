"""Records to packs: load images, write prompts, pack one pass; runs in loader processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from ..hd.errors import DataError
from ..hd.image import load_image
from ..model.packing import PackedBatch, Sample, pack
from ..model.processor import Processor
from .batches import PassSampler
from .records import Record, image_path


@dataclass(frozen=True)
class RecordReader:
    """Record -> Sample: the same loader and processor as in evaluation and chat."""

    records: Sequence[Record]
    images: Path
    processor: Processor
    template: str | None
    max_length: int

    def __call__(self, index: int) -> Sample:
        """The sample of a record. DataError names file, record, image or field, and remedy."""
        record = self.records[index]
        try:
            pictures = [load_image(image_path(self.images, name)) for name in record.images]
            return self.processor.conversation(
                record.turns,
                pictures,
                max_length=self.max_length,
                template=self.template,
                name=record.where,
            )
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error


@dataclass(frozen=True)
class BadPass:
    """A pass that could not be read, handed over as a value.

    An exception that crosses a loader process becomes a page of traceback; this stays one line.
    """

    message: str


class Passes(Dataset):
    """Tuple of sample indices -> the pack of them, or why there is none."""

    def __init__(self, read: Callable[[int], Sample], processor: Processor) -> None:
        self.read = read
        self.processor = processor

    def __getitem__(self, samples: tuple[int, ...]) -> PackedBatch | BadPass:
        try:
            return pack([self.read(sample) for sample in samples], self.processor.config)
        except DataError as error:
            return BadPass(str(error))


def read_passes(
    passes: Passes, sampler: PassSampler, num_workers: int, pin_memory: bool
) -> Iterator[PackedBatch]:
    """The packs of one rank in order, read ahead by `num_workers` processes.

    Raises DataError when the pass is due that holds a bad record.
    """
    loader = DataLoader(
        passes,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, BadPass):
            raise DataError(batch.message)
        yield batch


def _one_thread(worker: int) -> None:
    """Loader processes run beside the model; more threads in each would only get in its way."""
    torch.set_num_threads(1)
