"""Bootstrap over images: whole images are drawn with replacement, and sums over them estimated.

The six questions about an image (eighteen over POPE's three splits) are not independent, so the
image is the unit. The same seed gives the same draws, so that figures of several models, splits and
tables come from the same resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-12  # a difference of two equal scores may miss 0 by the last bit
MIN_IMAGES = 20  # for intervals and p
MIN_RESAMPLES = 100  # below, a 95 % interval is a matter of chance
CHUNK = 512  # resamples at a time: [512 images] weights stay in the cache


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; `p` (two-sided, against 0) only for differences.

    few_images: too few for the bootstrap; p is None, and the interval is not worth showing.
    """

    value: float
    low: float
    high: float
    p: float | None = None
    few_images: bool = False

    @property
    def span(self) -> tuple[float, float]:
        """The interval as it may be shown: the bare value twice where the images are too few."""
        return (self.value, self.value) if self.few_images else (self.low, self.high)

    @property
    def clear(self) -> bool:
        """Whether the images suffice and the interval does not hold 0."""
        return not self.few_images and not self.low <= 0 <= self.high


def resampled(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of each image `[images ...]` -> of resampled images `[resamples ...]`."""
    images = len(sums)
    flat = sums.reshape(images, -1)
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        picks = rng.integers(images, size=(size, images)) + images * np.arange(size)[:, None]
        weights = np.bincount(picks.ravel(), minlength=size * images).reshape(size, images)
        drawn.append(weights @ flat)
    return np.concatenate(drawn).reshape(resamples, *sums.shape[1:])


def estimate(value: float, drawn: np.ndarray, with_p: bool, few: bool) -> Estimate:
    """The estimate of resamples `[r]`, those that drew no question (NaN) left out."""
    valid = drawn[~np.isnan(drawn)]
    low, high = np.percentile(valid, (2.5, 97.5)) if len(valid) else (value, value)
    p = bootstrap_p(valid) if with_p and not few else None
    return Estimate(value, float(low), float(high), p, few)


def bootstrap_p(differences: np.ndarray) -> float:
    """Two-sided p against 0 of resampled differences `[r]`, NaN left out: twice the smaller share
    on either side of zero, (1 + k) / (1 + r) each, so it is never 0."""
    valid = differences[~np.isnan(differences)]
    tails = (int((valid <= ROUNDING).sum()), int((valid >= -ROUNDING).sum()))
    return min(1.0, 2 * (1 + min(tails)) / (1 + len(valid)))
