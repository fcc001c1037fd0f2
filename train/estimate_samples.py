"""How large samples are, measured from the data's image headers and words or assumed, and the
largest pass that can be made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..hd.errors import DataError, UsageError
from ..hd.grid import HDConfig
from ..hd.image import read_size
from ..hd.plan import plan_image
from ..model.processor import Processor
from .batches import BatchOrder
from .config import TrainConfig
from .estimate_trace import PassShape
from .lengths import CHUNK, LengthReader
from .packs import default_pack_tokens
from .record import Record
from .workers import Done, silent

TYPICAL_SIZES = ((480, 640), (640, 480), (640, 640), (336, 336), (1080, 1920))  # px


@dataclass(frozen=True, eq=False)
class Samples:
    """Sizes of samples, int64 `[n]` each: tokens in all, visual ones among them, tiles.

    images: visual tokens of each image, int64 `[images]`. num_samples: of the whole data, None if
    not known; only some may be measured. faults: why samples cannot be read or trained on.
    limit: the largest (total, visual, tiles) that a sample may have where these are assumed; None
    where the data says it. source: where all this comes from, in words.
    """

    total: np.ndarray
    visual: np.ndarray
    tiles: np.ndarray
    images: np.ndarray
    num_samples: int | None
    source: str
    faults: tuple[str, ...] = ()
    limit: tuple[int, int, int] | None = None
    image_bytes: float | None = None  # mean of an image's file

    def __len__(self) -> int:
        return len(self.total)


@dataclass(frozen=True)
class _Measured:
    total: int
    visual: int
    images: tuple[tuple[int, int], ...] = ()  # (tokens, tiles) of each
    num_bytes: int = 0
    fault: str | None = None


@dataclass(frozen=True)
class SizeReader(Dataset):
    """Index of `chosen` -> the sizes of that sample; runs in loader processes."""

    lengths: LengthReader
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> _Measured | UsageError:
        index = int(self.chosen[place])
        try:
            length = self.lengths(index)
        except UsageError as error:
            return UsageError(str(error))  # raised, it would cross as a page of traceback
        if length.fault is not None:
            return _Measured(length.total, length.visual, fault=length.fault)
        record, hd = self.lengths.records[index], self.lengths.processor.config.hd
        found, num_bytes = [], 0
        try:
            for number in range(len(record.images)):
                source = self.lengths.image(record, number)
                plan = plan_image(read_size(source), hd)
                found.append((plan.num_tokens, plan.num_tiles))
                num_bytes += len(source) if isinstance(source, bytes) else source.stat().st_size
        except (DataError, OSError) as error:
            return _Measured(length.total, length.visual, fault=f"{record.where}: {error}")
        return _Measured(length.total, length.visual, tuple(found), num_bytes)


def measure_samples(
    config: TrainConfig,
    processor: Processor,
    records: Sequence[Record],
    image: Callable[[Record, int], Path | bytes],
    at_most: int | None = None,
    done: Done = silent,
) -> Samples:
    """The sizes of the samples as training will make them; no pixel is decoded.

    image: record and number of its image -> file or bytes. at_most: measure so many, evenly spread
    over the data, instead of all. done: told ("samples", how many are measured, of how many).
    """
    count = len(records)
    chosen = np.arange(count)
    if at_most is not None and at_most < count:
        chosen = np.unique(np.linspace(0, count - 1, at_most).astype(np.int64))
    reader = LengthReader(records, image, processor, config.sample_template, config.max_length)
    loader = DataLoader(
        SizeReader(reader, chosen),
        batch_size=CHUNK,
        collate_fn=list,
        num_workers=config.data.num_workers if len(chosen) > CHUNK else 0,
    )
    found: list[_Measured] = []
    for chunk in loader:
        for one in chunk:
            if isinstance(one, UsageError):
                raise one
            found.append(one)
        done("samples", len(found), len(chosen))
    images = [image for one in found for image in one.images]
    part = "" if len(chosen) == count else f"{len(chosen):,} evenly spread of "
    return Samples(
        total=np.array([one.total for one in found], dtype=np.int64),
        visual=np.array([one.visual for one in found], dtype=np.int64),
        tiles=np.array([sum(tiles for _, tiles in one.images) for one in found], dtype=np.int64),
        images=np.array([tokens for tokens, _ in images], dtype=np.int64),
        num_samples=count,
        source=f"measured: {part}{count:,} records of {', '.join(config.data.paths)}",
        faults=tuple(one.fault for one in found if one.fault is not None),
        image_bytes=sum(one.num_bytes for one in found) / len(images) if images else None,
    )


def assumed_samples(
    config: TrainConfig,
    hd: HDConfig,
    sizes: Sequence[tuple[int, int]],
    text_tokens: int,
    num_samples: int | None,
    reason: str,
) -> Samples:
    """One image of each of these (height, width) px with so many tokens of text; the largest
    sample has max_length tokens and the most tiles and visual tokens of the geometry. reason: why
    nothing was measured."""
    plans = [plan_image(size, hd) for size in sizes]
    visual = np.array([plan.num_tokens for plan in plans], dtype=np.int64)
    tiles = np.array([plan.num_tiles for plan in plans], dtype=np.int64)
    most_tokens, most_tiles = largest_image(hd)
    words = ", ".join(f"{height}x{width}" for height, width in sizes)
    return Samples(
        total=np.minimum(visual + text_tokens, config.max_length),
        visual=visual,
        tiles=tiles,
        images=visual,
        num_samples=num_samples,
        source=f"assumed ({reason}): one image of {words} px in equal shares, {text_tokens} tokens "
        f"of text",
        limit=(config.max_length, min(most_tokens, config.max_length), most_tiles),
    )


def largest_image(hd: HDConfig) -> tuple[int, int]:
    """(visual tokens, tiles) that no image exceeds: nothing dropped, in the largest grid."""
    side, views = hd.patches_per_side, int(hd.global_view != "none")
    ends = int(hd.row_end)
    tokens = [views * hd.patches_per_tile + (0 if hd.grids else ends)]
    tokens += [
        views * hd.patches_per_tile + rows * side * (cols * side + ends) for rows, cols in hd.grids
    ]
    most = max(tokens) if hd.max_visual_tokens is None else min(max(tokens), hd.max_visual_tokens)
    return most, views + max((rows * cols for rows, cols in hd.grids), default=0)


def pack_budget(config: TrainConfig, samples: Samples, samples_per_step: int) -> int:
    """Tokens of a pack (batching packs); `auto`, which asks a machine, counts as the default."""
    if isinstance(config.data.pack_tokens, int):
        return config.data.pack_tokens
    return default_pack_tokens(samples.total, config.per_device_batch_size, samples_per_step)


def largest_pass(config: TrainConfig, samples: Samples, samples_per_step: int) -> PassShape:
    """The largest pass that some data order can make: the longest samples and the most tiles at
    once, which no single pass need have together."""
    count = config.per_device_batch_size
    if samples.limit is None:
        total, visual, tiles = samples.total, samples.visual, samples.tiles
    else:
        total, visual, tiles = (np.full(count, most) for most in samples.limit)
    if config.data.batching == "packs":
        return _largest_pack(pack_budget(config, samples, samples_per_step), samples)
    lengths = np.resize(np.sort(total)[::-1], count)
    most_visual = int(np.resize(np.sort(visual)[::-1], count).sum())
    # At most all words of the longest samples are learned.
    labels = int(np.resize(np.sort(total - visual)[::-1], count).sum())
    if config.data.batching == "padded":
        lengths = np.full(count, lengths[0])
    return PassShape(
        lengths=tuple(int(length) for length in lengths),
        tiles=max(1, int(np.resize(np.sort(tiles)[::-1], count).sum())),
        rows=most_visual,
        labels=max(1, labels),
    )


def _largest_pack(budget: int, samples: Samples) -> PassShape:
    longest = int(samples.total.max()) if samples.limit is None else samples.limit[0]
    tokens = max(budget, longest)
    lengths = [longest] * (tokens // longest)
    lengths += [tokens - sum(lengths)] if tokens > sum(lengths) else []
    densest = _fill(samples.tiles, samples.total, tokens)
    visual = _fill(samples.visual, samples.total, tokens)
    words = _fill(samples.total - samples.visual, samples.total, tokens)
    most_tiles = 0 if samples.limit is None else samples.limit[2]
    return PassShape(tuple(lengths), max(1, densest, most_tiles), visual, max(1, words))


def _fill(value: np.ndarray, cost: np.ndarray, budget: int) -> int:
    """Most value within a budget, taking samples (again and again) by value per token: a bound."""
    used = cost > 0
    return int(np.ceil(budget * (value[used] / cost[used]).max())) if used.any() else 0


@dataclass(frozen=True)
class PlacedPass:
    """A pass of the run: its step and rank (from 0), the samples in it."""

    step: int
    rank: int
    samples: tuple[int, ...]
    tokens: int
    tiles: int


def heaviest_passes(
    order: BatchOrder, samples: Samples, world_size: int, steps: range, padded: bool = False
) -> tuple[PlacedPass, PlacedPass]:
    """Of these steps, the pass with most computed tokens (padding included) and the one with most
    tiles (first ones if equal); all samples must have been measured."""
    most_tokens = most_tiles = PlacedPass(0, 0, (), -1, -1)
    for step in steps:
        for rank in range(world_size):
            for chosen in order.passes_of_rank(step, rank, world_size):
                lengths = samples.total[chosen]
                tokens = int(lengths.max(initial=0) * len(chosen) if padded else lengths.sum())
                tiles = int(samples.tiles[chosen].sum())
                if tokens > most_tokens.tokens or tiles > most_tiles.tiles:
                    one = PlacedPass(step, rank, tuple(map(int, chosen)), tokens, tiles)
                    most_tokens = one if tokens > most_tokens.tokens else most_tokens
                    most_tiles = one if tiles > most_tiles.tiles else most_tiles
    return most_tokens, most_tiles
