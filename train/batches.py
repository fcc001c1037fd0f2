"""Which samples make up each step: a pure function of (seed, epoch, place), nothing else.

Loader processes, ranks and accumulation share a step out among themselves but never change it, so
the state of the data is one number, the steps done, and a run resumes in no time.

packs, padded, plain: the epochs' permutations are laid end to end and cut into steps; the last
step of a run is filled from the next epoch. modality (LLaVA's `group_by_modality_length`): samples
with and without images are shuffled apart and cut into steps of one kind each, the last of a kind
filled up from the beginning of its own permutation; then the steps are shuffled.

A step falls into passes. packs: of at most `pack_tokens` tokens (packs.py). padded, plain: of
`samples_per_pass` samples as they come. modality: of as many, dealt by length, so that the passes
have about equal work. The loss of a step does not depend on how it falls into passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from .packs import pack_lengths

Batching = Literal["packs", "modality", "padded", "plain"]
PLAIN, MODALITY = 0, 1  # streams of random numbers


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """The data order of a run.

    num_samples: size of the data. samples_per_step: over all ranks and accumulation.
    samples_per_pass: of one rank's forward; packs have any number of them. has_image: bool
    `[num_samples]`, for batching by modality. lengths: int `[num_samples]`; in tokens for packs,
    in any unit for modality, not needed otherwise. pack_tokens: the limit of a pack.
    """

    num_samples: int
    samples_per_step: int
    samples_per_pass: int
    seed: int
    batching: Batching = "plain"
    has_image: np.ndarray | None = field(default=None, repr=False)
    lengths: np.ndarray | None = field(default=None, repr=False)
    pack_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.samples_per_step % self.samples_per_pass:
            raise ValueError(
                f"{self.num_samples} samples in steps of {self.samples_per_step} and passes of "
                f"{self.samples_per_pass} cannot be ordered"
            )
        if self.batching == "modality" and (self.has_image is None or self.lengths is None):
            raise ValueError("batching by modality needs has_image and lengths")
        if self.batching == "packs" and (self.lengths is None or self.pack_tokens is None):
            raise ValueError("batching in packs needs lengths and pack_tokens")

    def num_steps(self, epochs: float) -> int:
        """Steps of so many epochs, at least one; the last may reach into the next epoch."""
        if self.batching == "modality":
            exact = epochs * sum(-(-len(kind) // self.samples_per_step) for kind in self.kinds())
        else:
            exact = epochs * self.num_samples / self.samples_per_step
        return max(1, math.ceil(round(exact, 6)))

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps."""
        if self.batching == "modality":
            return step / self.num_steps(1.0)
        return step * self.samples_per_step / self.num_samples

    def samples(self, step: int) -> np.ndarray:
        """int64 `[samples_per_step]`: the samples of step `step` (from 0)."""
        if self.batching == "modality":
            epoch, within_epoch = divmod(step, self.num_steps(1.0))
            return _modality_epoch(self, epoch)[within_epoch]
        places = step * self.samples_per_step + np.arange(self.samples_per_step)
        epochs, within = np.divmod(places, self.num_samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self._permutation(int(epoch))[within[chosen]]
        return samples

    def step(self, step: int) -> list[np.ndarray]:
        """The passes of step `step` (from 0) for one rank: int64 arrays of samples."""
        return list(_passes(self, step, 1))

    def num_passes(self, step: int, world_size: int) -> int:
        """Passes of every rank in a step: all run as many, so that no collective waits."""
        return len(_passes(self, step, world_size)) // world_size

    def passes_of_rank(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The passes of one rank, `num_passes` of them; those that the ranks run at the same time
        have about equal work.

        Where the passes of a step do not come out even, packs share their samples out over as many
        passes as the ranks run, so that none is idle; all else is filled with empty passes.
        """
        return list(_passes(self, step, world_size)[rank::world_size])

    def _permutation(self, epoch: int) -> np.ndarray:
        return _permutation(self.num_samples, self.seed, epoch)

    def kinds(self) -> list[np.ndarray]:
        """The samples with images, and those without, where there are any."""
        has_image = np.asarray(self.has_image)
        kinds = [np.flatnonzero(has_image), np.flatnonzero(~has_image)]
        return [kind for kind in kinds if len(kind)]

    def _deal(self, samples: np.ndarray) -> np.ndarray:
        """Samples of a step to its passes, longest first and back and forth over the passes."""
        passes = self.samples_per_step // self.samples_per_pass
        longest_first = samples[np.argsort(-np.asarray(self.lengths)[samples], kind="stable")]
        table = longest_first.reshape(self.samples_per_pass, passes).copy()
        table[1::2] = table[1::2, ::-1]
        return table.T


@lru_cache(maxsize=4)
def _passes(order: BatchOrder, step: int, world_size: int) -> tuple[np.ndarray, ...]:
    """The passes of a step; their number is a multiple of the ranks."""
    samples = order.samples(step)
    if order.batching == "packs":
        assert order.lengths is not None and order.pack_tokens is not None
        packs = pack_lengths(order.lengths[samples], order.pack_tokens, world_size)
        return tuple(samples[places] for places in packs)
    table = order._deal(samples) if order.batching == "modality" else samples
    passes = tuple(table.reshape(-1, order.samples_per_pass))
    return passes + (np.empty(0, dtype=np.int64),) * (-len(passes) % world_size)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, PLAIN)).permutation(size)


@lru_cache(maxsize=2)
def _modality_epoch(order: BatchOrder, epoch: int) -> np.ndarray:
    """int64 `[steps, samples_per_step]`, each row of one kind."""
    rng = np.random.default_rng((order.seed, epoch, MODALITY))
    rows = []
    for kind in order.kinds():
        steps = -(-len(kind) // order.samples_per_step)
        filled = np.resize(rng.permutation(kind), steps * order.samples_per_step)
        rows.append(filled.reshape(steps, order.samples_per_step))
    return rng.permutation(np.concatenate(rows), axis=0)


@dataclass(frozen=True)
class PassSampler:
    """Iterates over the passes of one rank from `first_step` on: tuples of sample indices, empty
    where the rank only keeps the others company. A step has `order.num_passes` of them."""

    order: BatchOrder
    rank: int
    world_size: int
    first_step: int
    num_steps: int

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for step in range(self.first_step, self.num_steps):
            for samples in self.order.passes_of_rank(step, self.rank, self.world_size):
                yield tuple(int(sample) for sample in samples)
