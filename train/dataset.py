"""Records to packs: load images, write prompts, pack one pass; runs in loader processes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from torch.utils.data import DataLoader, Dataset

from ..hd.errors import DataError
from ..hd.tiler import find_resizer
from ..model.packing import Loss, PackedBatch, Sample, pack
from ..model.processor import Cut, Processor
from .bad_samples import BadSample
from .batches import PassSampler
from .config import TrainConfig
from .feature_cache import FeatureCache
from .loader_workers import quiet_worker, start
from .record import Record, without_images
from .sources import RecordSet
from .sources_base import FileImage, ImagePlace, open_image

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class RecordReader:
    """Record -> Sample: the same loader and processor as in evaluation and chat.

    records: of data files; or a plain list, whose images are files below `images`. cache: of the
    tower's features, if one is kept.
    """

    records: RecordSet | Sequence[Record]
    images: Path | None
    processor: Processor
    template: str | None
    max_length: int
    cache: FeatureCache | None = None

    def __call__(self, index: int) -> Sample:
        """The sample of a record. DataError names file, record, image or field, and remedy."""
        record = self.records[index]
        try:
            pictures = [self._picture(self._place(record, k)) for k in range(len(record.images))]
            return self._sample(record, pictures)
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error

    def _picture(self, place: ImagePlace) -> Image | Cut:
        if self.cache is None:
            return open_image(place)
        source = place.load()
        name = place.name if isinstance(source, bytes) else str(source)
        return self.cache.cut(source, name, self.processor)

    def _place(self, record: Record, number: int) -> ImagePlace:
        if isinstance(self.records, RecordSet):
            return self.records.locate(record, number)
        return FileImage(self.images, record.images[number])

    def text_only(self, index: int) -> Sample:
        """The sample of a record without its images and their tags; DataError as above."""
        record = without_images(self.records[index])
        if not all(turn.text for turn in record.turns):
            raise DataError(f"{record.where}: without its image a question is empty")
        return self._sample(record, [])

    def _sample(self, record: Record, pictures: Sequence[Image | Cut]) -> Sample:
        return self.processor.conversation(
            record.turns,
            pictures,
            max_length=self.max_length,
            template=self.template,
            name=record.where,
        )


@dataclass(frozen=True)
class Pass:
    """One forward of a rank: its pack, the samples that are not in it as they should be, and what
    was wrong with entries of the feature cache."""

    batch: PackedBatch
    bad: tuple[BadSample, ...] = ()
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadPass:
    """A pass that could not be read, handed over as a value.

    An exception that crosses a loader process becomes a page of traceback; this stays one line.
    """

    message: str


class Reader(Protocol):
    """Index -> Sample; both raise DataError."""

    def __call__(self, index: int) -> Sample: ...

    def text_only(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Passes(Dataset):
    """Tuple of sample indices -> the pack of them (of none, a dummy pack), or why there is none.

    loss and padded are those of `pack`; bad_samples the policy (bad_samples.py).
    """

    read: Reader
    processor: Processor
    loss: Loss = "token"
    padded: bool = False
    bad_samples: Literal["error", "skip", "text_only"] = "error"

    def __getitem__(self, samples: tuple[int, ...]) -> Pass | BadPass:
        good: list[Sample] = []
        bad: list[BadSample] = []
        for index in samples:
            try:
                good.append(self.read(index))
            except DataError as error:
                if self.bad_samples == "error":
                    return BadPass(str(error))
                text = self._text(index) if self.bad_samples == "text_only" else None
                good += [] if text is None else [text]
                bad.append(BadSample(index, str(error), kept_text=text is not None))
        damaged = tuple(fault for sample in good for fault in sample.faults)
        batch = pack(good, self.processor.config, self.loss, self.padded)
        return Pass(batch, tuple(bad), damaged)

    def _text(self, index: int) -> Sample | None:
        """What is left of a sample without its images; None where the record itself is bad."""
        try:
            return self.read.text_only(index)
        except DataError:
            return None  # counted as left out


def run_passes(
    config: TrainConfig,
    records: RecordSet,
    processor: Processor,
    cache: FeatureCache | None = None,
) -> Passes:
    """The passes of a run, as its configuration wants them. UsageError for a resizer that is not
    installed."""
    resizer, _ = find_resizer(config.data.resizing)
    processor = Processor(processor.tokenizer, processor.config, resizer, processor.sentencepiece)
    reader = RecordReader(
        records=records,
        images=Path(config.data.images) if config.data.images else None,
        processor=processor,
        template=config.sample_template,
        max_length=config.max_length,
        cache=cache,
    )
    return Passes(
        reader,
        processor,
        loss=config.loss,
        padded=config.data.batching == "padded",
        bad_samples=config.data.bad_samples,
    )


def read_passes(
    passes: Passes, sampler: PassSampler, num_workers: int, pin_memory: bool
) -> Generator[Pass, None, None]:
    """The passes of one rank in order, read ahead by `num_workers` processes, which end when it is
    closed.

    Raises DataError when the pass is due that holds a bad sample which is not to be left out.
    """
    loader = DataLoader(
        passes,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=quiet_worker if num_workers else None,
    )
    for one in start(loader):
        if isinstance(one, BadPass):
            raise DataError(one.message)
        yield one
