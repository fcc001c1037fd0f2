"""Which samples make up each step: a pure function of (seed, epoch, place), nothing else.

Loader processes, ranks and accumulation share a step out among themselves but never change it, so
the state of the data is one number, the steps done, and a run resumes in no time.

plain: the epochs' permutations are laid end to end and cut into steps; the last step of a run is
filled from the next epoch. modality (LLaVA's `group_by_modality_length`): samples with and without
images are shuffled apart and cut into steps of one kind each, the last of a kind filled up from
the beginning of its own permutation; then the steps are shuffled. Inside a step, samples are dealt
by length, so that its passes (and the ranks) have about equal work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from .records import Record

PLAIN, MODALITY = 0, 1  # streams of random numbers


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """The data order of a run.

    num_samples: size of the data. samples_per_step: over all ranks and accumulation.
    samples_per_pass: of one rank's forward. has_image: bool `[num_samples]`, and lengths: int
    `[num_samples]` in any unit; both only needed for batching by modality.
    """

    num_samples: int
    samples_per_step: int
    samples_per_pass: int
    seed: int
    batching: Literal["plain", "modality"] = "plain"
    has_image: np.ndarray | None = field(default=None, repr=False)
    lengths: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.samples_per_step % self.samples_per_pass:
            raise ValueError(
                f"{self.num_samples} samples in steps of {self.samples_per_step} and passes of "
                f"{self.samples_per_pass} cannot be ordered"
            )
        if self.batching == "modality" and (self.has_image is None or self.lengths is None):
            raise ValueError("batching by modality needs has_image and lengths")

    def num_steps(self, epochs: float) -> int:
        """Steps of so many epochs, at least one; the last may reach into the next epoch."""
        if self.batching == "plain":
            exact = epochs * self.num_samples / self.samples_per_step
        else:
            exact = epochs * sum(-(-len(kind) // self.samples_per_step) for kind in self.kinds())
        return max(1, math.ceil(round(exact, 6)))

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps."""
        per_epoch = self.num_steps(1.0)
        if self.batching == "plain":
            return step * self.samples_per_step / self.num_samples
        return step / per_epoch

    def step(self, step: int) -> np.ndarray:
        """int64 `[passes, samples_per_pass]`: the samples of step `step` (from 0)."""
        if self.batching == "plain":
            places = step * self.samples_per_step + np.arange(self.samples_per_step)
            epochs, within = np.divmod(places, self.num_samples)
            samples = np.empty_like(places)
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                samples[chosen] = self._permutation(int(epoch))[within[chosen]]
            return samples.reshape(-1, self.samples_per_pass)
        epoch, within_epoch = divmod(step, self.num_steps(1.0))
        return self._deal(_modality_epoch(self, epoch)[within_epoch])

    def passes_of_rank(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """int64 `[accumulation, samples_per_pass]`: rank r takes passes r, r + world, …"""
        return self.step(step)[rank::world_size]

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


def order_of(
    records: Sequence[Record],
    samples_per_step: int,
    samples_per_pass: int,
    seed: int,
    batching: Literal["plain", "modality"],
) -> BatchOrder:
    """The order of these records; their lengths are counted in characters."""
    has_image = np.array([bool(record.images) for record in records])
    characters = [sum(len(turn.text) for turn in record.turns) for record in records]
    return BatchOrder(
        num_samples=len(records),
        samples_per_step=samples_per_step,
        samples_per_pass=samples_per_pass,
        seed=seed,
        batching=batching,
        has_image=has_image,
        lengths=np.array(characters),
    )


@dataclass(frozen=True)
class PassSampler:
    """Iterates over the passes of one rank from `first_step` on: tuples of sample indices."""

    order: BatchOrder
    rank: int
    world_size: int
    first_step: int
    num_steps: int

    def __len__(self) -> int:
        passes = self.order.samples_per_step // self.order.samples_per_pass // self.world_size
        return (self.num_steps - self.first_step) * passes

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for step in range(self.first_step, self.num_steps):
            for samples in self.order.passes_of_rank(step, self.rank, self.world_size):
                yield tuple(int(sample) for sample in samples)
