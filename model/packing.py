"""Samples to a `PackedBatch`: sequences end to end, and the index tables for the device.

Letters: N tiles, P patches of a tile, R visual rows kept, T tokens, S sequences, L label tokens.
Everything ragged is settled here, on the CPU, in the loader's workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..hd.merge import ROW_END, visual_source
from ..hd.plan import TilePlan
from ..kernels.place_rows import TEXT
from .config import LlavaHDConfig
from .prompt import IGNORE

Loss = Literal["token", "sample"]


@dataclass(frozen=True)
class Sample:
    """One sequence: ids and labels `[t]`, and per image its plan and tiles uint8 `[n 3 px px]`.

    features: where a cache takes part, per image the tower's kept rows `[r D]`, in place of its
    tiles (n is 0 then), or None. keys: per image its name in that cache, or "". faults: what was
    wrong with entries of it, a line each.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    plans: tuple[TilePlan, ...] = ()
    tiles: tuple[Tensor, ...] = ()
    name: str = ""
    features: tuple[Tensor | None, ...] = ()
    keys: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def known(self, image: int) -> Tensor | None:
        """The features of an image (from 0) that the tower need not see."""
        return self.features[image] if self.features else None


@dataclass(frozen=True)
class FreshRows:
    """An image that the tower sees and a cache wants: its name there, and its places (first, behind
    the last) in the batch's `rows`."""

    key: str
    first: int
    last: int


@dataclass(frozen=True)
class PackedBatch:
    """Samples laid end to end.

    tiles: uint8 `[N 3 px px]`; one zero tile when the tower has no image to see (`has_dummy`).
    rows: int64 `[R]`, the feature rows kept, among N·P. source: int64 `[T]`, what stands at each
    place (kernels/place_rows.py). ids, positions: int64 `[T]`; positions restart in each sample.
    cu_seqlens: int32 `[S+1]`; max_seqlen the longest. label_rows, targets: int64 `[L]`, the
    places that predict a learned token, and that token (shifted inside each sample, so no
    sample predicts the next one's first token). weights: float32 `[L]`, the factors of these
    places' losses, and loss_units what their sum is divided by: label tokens, all of weight 1, or
    samples that have a label, 1 / (label tokens of the sample) each. num_padding: tokens of the T
    that belong to no sample (names has one entry for each sample).
    features: `[C D]`, kept rows that a cache knew, numbered in `rows` behind the N·P of the tiles,
    of num_cached images; None where there are none. fresh: what that cache is to be told.
    """

    tiles: Tensor
    rows: Tensor
    source: Tensor
    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    label_rows: Tensor
    targets: Tensor
    weights: Tensor
    loss_units: int
    num_padding: int
    max_seqlen: int
    num_images: int
    has_dummy: bool
    names: tuple[str, ...]
    features: Tensor | None = None
    num_cached: int = 0
    fresh: tuple[FreshRows, ...] = ()

    @property
    def num_samples(self) -> int:
        """0 for a dummy pack."""
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return len(self.ids)

    @property
    def num_useful_tokens(self) -> int:
        """Tokens of the samples."""
        return len(self.ids) - self.num_padding

    @property
    def num_label_tokens(self) -> int:
        return len(self.targets)

    def to(self, device: str | torch.device, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Any) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in tensors.items() if torch.is_tensor(v)})


def pack(
    samples: Sequence[Sample],
    config: LlavaHDConfig,
    loss: Loss = "token",
    padded: bool = False,
) -> PackedBatch:
    """Lay samples end to end.

    No samples give a dummy pack: one token of text and one zero tile, no label, so that a rank
    without work runs the same modules; its loss and its gradients are 0. loss: what the batch's
    weights make of it, the mean over label tokens or over the samples' own means. padded: behind
    each sample stands padding up to the longest one, as a sequence of its own: what a padded batch
    computes, for comparison.

    Raises ValueError, naming the sample, when its placeholders differ from its plans' tokens.
    """
    if any(len(sample.ids) == 0 for sample in samples):
        raise ValueError("pack needs samples that are not of length zero")
    sequences = _with_padding(samples, config) if padded else list(samples)
    sequences = sequences or [_filler(1, config)]
    lengths = [len(sequence.ids) for sequence in sequences]
    ids = np.concatenate([np.asarray(sequence.ids, dtype=np.int64) for sequence in sequences])
    per_sample = [_next_labels(sequence) for sequence in sequences]
    labels = np.concatenate(per_sample)
    tiles = [tile for sample in samples for tile in sample.tiles]
    tables = _tables(sequences, ids, config)
    known = [rows for sample in samples for rows in sample.features if rows is not None]
    has_tiles = any(len(tile) for tile in tiles)
    px = config.hd.tile_px
    label_rows = np.flatnonzero(labels != IGNORE)
    counts = np.array([np.count_nonzero(own != IGNORE) for own in per_sample])
    by_sample = loss == "sample"
    return PackedBatch(
        tiles=torch.cat(tiles) if has_tiles else torch.zeros(1, 3, px, px, dtype=torch.uint8),
        rows=torch.from_numpy(tables.rows),
        source=torch.from_numpy(tables.source),
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        label_rows=torch.from_numpy(label_rows),
        targets=torch.from_numpy(labels[label_rows]),
        weights=torch.from_numpy(_weights(counts, by_sample)),
        loss_units=int(np.count_nonzero(counts)) if by_sample else len(label_rows),
        num_padding=sum(lengths) - sum(len(sample.ids) for sample in samples),
        max_seqlen=max(lengths),
        num_images=len(tiles),
        has_dummy=not has_tiles,
        names=tuple(sample.name for sample in samples),
        features=torch.cat(known) if known else None,
        num_cached=len(known),
        fresh=tables.fresh,
    )


def _filler(length: int, config: LlavaHDConfig) -> Sample:
    """So many tokens of text that nobody learns from; any id but the image's will do."""
    token = int(config.image_token_id == 0)
    return Sample([token] * length, [IGNORE] * length)


def _with_padding(samples: Sequence[Sample], config: LlavaHDConfig) -> list[Sample]:
    """The samples, each followed by what it lacks to the longest."""
    longest = max((len(sample.ids) for sample in samples), default=0)
    sequences = []
    for sample in samples:
        sequences.append(sample)
        if len(sample.ids) < longest:
            sequences.append(_filler(longest - len(sample.ids), config))
    return sequences


def _weights(counts: np.ndarray, by_sample: bool) -> np.ndarray:
    """float32 `[L]` from the label tokens of each sequence."""
    if not by_sample:
        return np.ones(counts.sum(), dtype=np.float32)
    return np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)


def _next_labels(sample: Sample) -> np.ndarray:
    """int64 `[t]`: what each place must predict, the label of the next; the last predicts none."""
    if len(sample.labels) != len(sample.ids):
        raise ValueError(f"{sample.name}: {len(sample.labels)} labels, {len(sample.ids)} ids")
    return np.append(np.asarray(sample.labels[1:], dtype=np.int64), IGNORE)


@dataclass(frozen=True)
class _Tables:
    """rows `[R]` and source `[T]` of a PackedBatch, and its fresh rows."""

    rows: np.ndarray
    source: np.ndarray
    fresh: tuple[FreshRows, ...]


def _tables(samples: Sequence[Sample], ids: np.ndarray, config: LlavaHDConfig) -> _Tables:
    """Kept feature rows among all tiles' rows, cached ones behind them, and the source of every
    place."""
    rows: list[np.ndarray] = []
    visual: list[np.ndarray] = []
    fresh: list[FreshRows] = []
    per_tile = config.hd.patches_per_tile
    first_row, kept = 0, 0
    first_cached = per_tile * max(1, sum(len(t) for sample in samples for t in sample.tiles))
    for sample in samples:
        _check(sample, config)
        for image, plan in enumerate(sample.plans):
            table = visual_source(plan)
            is_row = table != ROW_END
            count = int(is_row.sum())
            if sample.known(image) is not None:
                rows.append(first_cached + np.arange(count))
                first_cached += count
            else:
                rows.append(table[is_row] + first_row)
                first_row += plan.num_tiles * per_tile
                if sample.keys and sample.keys[image]:
                    fresh.append(FreshRows(sample.keys[image], kept, kept + count))
            numbered = np.full(len(table), ROW_END, dtype=np.int64)
            numbered[is_row] = kept + np.arange(count)
            visual.append(numbered)
            kept += count
    source = np.full(len(ids), TEXT, dtype=np.int64)
    if not visual:
        return _Tables(np.zeros(1, dtype=np.int64), source, ())
    source[ids == config.image_token_id] = np.concatenate(visual)
    return _Tables(np.concatenate(rows), source, tuple(fresh))


def _check(sample: Sample, config: LlavaHDConfig) -> None:
    """ValueError where placeholders, plans, tiles and features of a sample do not fit."""
    planned = sum(plan.num_tokens for plan in sample.plans)
    holders = sum(1 for token in sample.ids if token == config.image_token_id)
    wanted = [
        plan.num_tiles if sample.known(image) is None else 0
        for image, plan in enumerate(sample.plans)
    ]
    cut = sum(len(tiles) for tiles in sample.tiles)
    if holders != planned or cut != sum(wanted) or len(sample.plans) != len(sample.tiles):
        raise ValueError(
            f"{sample.name}: {holders} image placeholders for {planned} visual tokens, "
            f"{cut} tiles for {sum(wanted)} planned"
        )
    for image, plan in enumerate(sample.plans):
        if not plan.config.reads_like(config.hd):
            raise ValueError(f"{sample.name}: planned for another geometry, {plan.config}")
        known = sample.known(image)
        if known is not None and len(known) != num_rows(plan):
            raise ValueError(f"{sample.name}: {len(known)} rows for {num_rows(plan)} planned")


def num_rows(plan: TilePlan) -> int:
    """Feature rows of an image that are kept: its visual tokens but for the row-ends."""
    return int((visual_source(plan) != ROW_END).sum())
