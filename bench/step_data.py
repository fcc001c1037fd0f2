"""The samples of `bench step`: drawn once, their pictures written as files, read by everyone.

Stage 2: pictures of all sizes and answers of all lengths (bench/packing_data.py). Stage 1: the same
pictures with captions. Both stages cut the pictures into tiles, because transformers' LlavaNext
does; our recipes' stage 1 reads a single view.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..hd.image import load_image, read_size
from ..hd.plan import plan_image
from ..model.processor import Processor
from ..model.prompt import IMAGE_TAG, Turn
from ..model.rival_training import RivalCollator, RivalPass
from ..train.batches import BatchOrder, PassSampler
from ..train.dataset import Passes, RecordReader
from ..train.lengths import LengthReader, token_lengths
from ..train.packs import ROUND_TO
from ..train.record import Record
from .packing_data import CAPTIONS, TEMPLATE, Scale, draw, picture, records_of
from .step_options import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Facts:
    """One sample in integers: tokens, those of images, feature rows kept among them, tiles."""

    length: int
    visual: int
    rows: int
    tiles: int

    @property
    def labels(self) -> int:
        """All but the first token and the image's are learned."""
        return self.length - 1 - self.visual


@dataclass(frozen=True, eq=False)
class StepData:
    """A stage's samples: records whose images are files of `images`, and their facts."""

    records: tuple[Record, ...]
    images: Path
    facts: tuple[Facts, ...]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 `[n]`, tokens of each sample."""
        return np.array([one.length for one in self.facts])

    def order(self, request: Request, packs: bool) -> BatchOrder:
        """Which samples make up each step and its passes; the same steps either way. A pack may
        have as many tokens as a padded pass computes on average: about the same activations."""
        budget = 0
        if packs:
            plain = self.order(request, packs=False)
            passes = [part for step in range(request.num_steps) for part in plain.step(step)]
            longest = np.array([self.lengths[part].max() for part in passes])
            tokens = max(request.batch * float(longest.mean()), float(self.lengths.max()))
            budget = ROUND_TO * int(np.ceil(tokens / ROUND_TO))
        return BatchOrder(
            num_samples=len(self.records),
            samples_per_step=request.step_samples,
            samples_per_pass=request.batch,
            seed=request.seed,
            batching="packs" if packs else "plain",
            lengths=self.lengths,
            pack_tokens=budget if packs else None,
        )


def write_data(request: Request, stage: int, folder: Path, processor: Processor) -> StepData:
    """Draw a stage's samples, for every step once, and write them below `folder`."""
    scale = Scale(request.tile_px)
    count = request.step_samples * request.num_steps
    setting = CAPTIONS if stage == 1 else request.lengths
    drawn = records_of(draw(setting, count, request.seed), scale)
    images = folder / f"images-{stage}"
    images.mkdir(parents=True)
    records, facts = [], []
    for record in drawn:
        names = tuple(f"{record.index}-{k}.png" for k in range(len(record.images)))
        for number, name in enumerate(names):
            (images / name).write_bytes(picture(record, number, scale))
        records.append(Record(record.id, names, record.turns, record.file, record.index))
    reader = LengthReader(
        records, lambda r, k: images / r.images[k], processor, TEMPLATE, never_cut(request)
    )
    lengths = token_lengths(reader, "")
    for record, total, visual in zip(records, lengths.total, lengths.visual, strict=True):
        sizes = [read_size(images / name) for name in record.images]
        plans = [plan_image(size, processor.config.hd) for size in sizes]
        rows = sum(plan.num_tokens - plan.num_row_ends for plan in plans)
        tiles = sum(plan.num_tiles for plan in plans)
        facts.append(Facts(int(total), int(visual), rows, tiles))
    data = StepData(tuple(records), images, tuple(facts))
    words = [record.turns[1].text for record in records]
    written = [
        {"images": record.images, "answer": text, "facts": asdict(one)}
        for record, text, one in zip(records, words, facts, strict=True)
    ]
    (folder / f"data-{stage}.json").write_text(json.dumps(written), encoding="utf-8")
    return data


def read_data(folder: Path, stage: int) -> StepData:
    """What `write_data` has written."""
    records, facts = [], []
    written = json.loads((folder / f"data-{stage}.json").read_text(encoding="utf-8"))
    for index, one in enumerate(written):
        tag = f"{IMAGE_TAG}\n" * len(one["images"])
        turns = (Turn("human", f"{tag}What is it?"), Turn("gpt", one["answer"]))
        records.append(Record(str(index), tuple(one["images"]), turns, "drawn", index))
        facts.append(Facts(**one["facts"]))
    return StepData(tuple(records), folder / f"images-{stage}", tuple(facts))


def our_passes(data: StepData, request: Request, processor: Processor) -> Passes:
    """The passes of the training's own data path."""
    limit = never_cut(request)
    return Passes(RecordReader(data.records, data.images, processor, TEMPLATE, limit), processor)


def never_cut(request: Request) -> int:
    """A limit of tokens that no sample comes to. The recipes' own, scaled, would cut a few drawn
    ones (56 px tiles: one in 700, by up to three), which transformers' processor leaves whole."""
    return 2 * Scale(request.tile_px).max_length


@dataclass(frozen=True)
class RivalSamples(Dataset):
    """Index -> (images, text) of a sample, as users hand them to transformers' processor."""

    data: StepData

    def __len__(self) -> int:
        return len(self.data.records)

    def __getitem__(self, index: int) -> tuple[Sequence[Image], str]:
        record = self.data.records[index]
        images = [load_image(self.data.images / name) for name in record.images]
        return images, f"{IMAGE_TAG * len(images)}{record.turns[1].text}\n"


def rival_loader(
    data: StepData, request: Request, collator: RivalCollator
) -> DataLoader[RivalPass]:
    """transformers' passes of the same samples in the same order."""
    sampler = PassSampler(data.order(request, packs=False), 0, 1, 0, request.num_steps)
    return DataLoader(
        RivalSamples(data),
        batch_sampler=[list(samples) for samples in sampler],
        num_workers=request.workers,
        collate_fn=collator,
        pin_memory=request.device.startswith("cuda"),
    )
