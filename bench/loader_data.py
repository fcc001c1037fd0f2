"""Photo-like JPEG files with the sizes of LLaVA's stage 2, and loaders of them, for `bench loader`.

Sizes are drawn from the sets of the 665K mixture in their shares (bench/packing_data.py). The
pictures are noise whose spectrum falls like that of photographs, amplitude as 1 / frequency (Field
1987), in grey with a little colour: a decoder and a resize work on them as on photos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..hd.grid import HDConfig
from ..hd.image import from_array
from ..hd.tiler import Resizing, find_resizer, normalise
from ..model.config import LlavaHDConfig
from ..model.processor import Processor
from ..model.prompt import IMAGE_TAG, Turn
from ..model.rival_processor import RivalReader, rival_processor
from ..train.dataset import BadPass, Pass, Passes, RecordReader
from ..train.loader_workers import quiet_worker
from ..train.record import Record
from .packing_data import draw

QUALITY = 87  # about half a byte a pixel, as COCO's files
QUESTION = "What is in the picture?"
ANSWER = "A picture of a boat, a cup and a fish. " * 3
TEMPLATE = "vicuna_v1"
MAX_LENGTH = 8192

Size = tuple[int, int]  # (height, width)


def draw_sizes(count: int, seed: int) -> list[Size]:
    """Sizes of pictures; the same ones for the same seed."""
    drawn = draw("mix665k", 2 * count + 16, seed)
    return [one.size for one in drawn if one.size is not None][:count]


def photo_like(size: Size, seed: int) -> np.ndarray:
    """uint8 `[height width 3]`."""
    rng = np.random.default_rng(seed)
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0

    def plane() -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal(size)) / frequency
        spectrum[0, 0] = 0
        made = np.fft.irfft2(spectrum, s=size)
        return made / made.std()

    grey = 128 + 55 * plane()
    pixels = np.stack([grey + 12 * plane() for _ in range(3)], axis=2)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def write_files(folder: Path, sizes: Sequence[Size], seed: int) -> list[Path]:
    """A JPEG of each size."""
    files = []
    for number, size in enumerate(sizes):
        file = folder / f"{number}.jpg"
        from_array(photo_like(size, seed * 1_000_003 + number)).save(file, "JPEG", quality=QUALITY)
        files.append(file)
    return files


def processor_of(hd: HDConfig, tokenizer: Any, resizing: Resizing) -> Processor:
    """Our processor of a geometry with the real tile size; only what it asks a model's
    configuration for is filled in."""
    config = LlavaHDConfig(
        hd=hd,
        vision={"num_hidden_layers": 24, "image_size": hd.tile_px, "patch_size": hd.patch_px},
        text={"model_type": "llama", "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TAG),
        template=TEMPLATE,
    )
    return Processor(tokenizer, config, find_resizer(resizing)[0])


@dataclass(frozen=True)
class RivalPasses(Dataset):
    """Tuple of indices -> transformers' batch of these files, made in a loader process."""

    files: Sequence[Path]
    read: RivalReader

    def __getitem__(self, samples: tuple[int, ...]) -> dict[str, Tensor]:
        prompt = f"USER: {IMAGE_TAG}\n{QUESTION} ASSISTANT: {ANSWER}"
        return self.read([self.files[index] for index in samples], [prompt] * len(samples))


def our_passes(files: Sequence[Path], processor: Processor) -> Passes:
    """The passes of training on these files, by training's own code."""
    turns = (Turn("human", f"{IMAGE_TAG}\n{QUESTION}"), Turn("gpt", ANSWER))
    records = [
        Record(file.stem, (file.name,), turns, "drawn", index) for index, file in enumerate(files)
    ]
    reader = RecordReader(records, files[0].parent, processor, TEMPLATE, MAX_LENGTH)
    return Passes(reader, processor)


Take = Callable[[Any], Any]


@dataclass(frozen=True)
class Contestant:
    """What loads, and what the training process does with each batch that arrives."""

    passes: Dataset
    take: Take

    def loader(self, batches: Sequence[tuple[int, ...]], workers: int) -> DataLoader:
        """A loader of these batches whose processes stay from one epoch to the next."""
        return DataLoader(
            self.passes,
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=quiet_worker if workers else None,
        )


def keep(batch: Any) -> Any:
    """A batch as it arrives; one of ours whose samples are bad is an error."""
    assert not isinstance(batch, BadPass), batch.message
    return batch


def keep_normalised(batch: Pass) -> Tensor:
    """The normalised pixels of a batch of ours, made in the training process."""
    return normalise(keep(batch).batch.tiles)


OURS, NORMALISED, PILLOW, RIVAL = "ours", "ours-normalised", "ours-pillow", "transformers"


def contestants(files: Sequence[Path], hd: HDConfig, tokenizer: Any) -> dict[str, Contestant]:
    """Who takes part: ours (uint8 tiles, which the device normalises), the same normalised by the
    training process on the CPU, ours resized by Pillow, and transformers' processor. UsageError
    without numba."""
    ours = our_passes(files, processor_of(hd, tokenizer, "numba"))
    pillow = our_passes(files, processor_of(hd, tokenizer, "pillow"))
    theirs = RivalPasses(files, RivalReader(rival_processor(hd, tokenizer)))
    return {
        OURS: Contestant(ours, keep),
        NORMALISED: Contestant(ours, keep_normalised),
        PILLOW: Contestant(pillow, keep),
        RIVAL: Contestant(theirs, keep),
    }


def pixel_differences(
    made: dict[str, Contestant], batches: Sequence[tuple[int, ...]]
) -> Iterator[tuple[float, int]]:
    """For each batch: the largest difference of the normalised pixels of ours and transformers',
    in their units, and how many of the 8-bit values differ. Their padding tiles are left out."""
    ours_of = made[OURS].passes
    assert isinstance(ours_of, Passes)
    for samples in batches:
        tiles = keep(ours_of[samples]).batch.tiles
        theirs = made[RIVAL].passes[samples]
        pixels = theirs["pixel_values"]
        pixels = pixels if pixels.dim() == 5 else pixels[:, None]
        counts = [len(ours_of.read(index).tiles[0]) for index in samples]
        same = [own[:count] for own, count in zip(pixels, counts, strict=True)]
        ours = normalise(tiles).split(counts)
        worst = max(float((a - b).abs().max()) for a, b in zip(ours, same, strict=True))
        # Two neighbouring 8-bit values lie 1 / (255 x 0.28) apart, or more.
        differ = sum(int(((a - b).abs() > 1e-3).sum()) for a, b in zip(ours, same, strict=True))
        yield worst, differ
