"""Paired statistics: the same questions answered by two models, A and B.

Two models that answer the same questions err on many of the same ones, so the difference is far
better known than either score: POPE's F1 has a standard error of about 0.7 points for one 13B
model, more than published differences between models. Hence everything here is paired.

- **Intervals.** Bootstrap clustered by image: the six questions about an image (eighteen over the
  three splits) are not independent, so whole images are drawn, with replacement, and the same draw
  serves both models and all splits. 95 % percentile intervals. Of a few images there are too few
  different draws: a split of fewer than MIN_IMAGES gets no p, its intervals are marked as not to
  be shown, and so is the mean over it.
- **p of a difference**, from the same resamples: twice the smaller share of resampled differences
  on either side of zero, (1 + k) / (1 + resamples) each, so it is never 0.
- **McNemar, exact.** Of the questions that exactly one model has right, is the split between A and
  B compatible with a fair coin? Binomial test; it takes questions as independent, so where errors
  cluster in images the bootstrap's p for the accuracy is the more careful one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ..hd.errors import DataError
from .pope import PARSERS, Parser
from .pope_data import Answered, split_rank

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
MEAN, ALL = "mean", "all"
ROUNDING = 1e-12  # a difference of two equal scores may miss 0 by the last bit
MIN_IMAGES = 20  # of a split, for intervals and p by bootstrap
MIN_RESAMPLES = 100  # below, a 95 % interval is a matter of chance
CHUNK = 512  # resamples at a time: [512 images] weights stay in the cache

# What is summed over questions, per image and split; all scores are quotients of these.
NUM, LABEL_YES, TRUE_YES, SAID_YES, RIGHT = range(5)


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


@dataclass(frozen=True)
class McNemar:
    """Questions that only A, or only B, has right; the exact two-sided p."""

    only_a: int
    only_b: int
    p: float


Figures = dict[str, dict[str, Estimate]]  # split (and "mean") -> metric -> estimate


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions; `difference` is B - A, `mcnemar` is by split and "all".

    few_images: the number of images of each split that has too few for the bootstrap.
    """

    parser: str
    num_questions: int
    num_images: int
    resamples: int
    seed: int
    a: Figures
    b: Figures
    difference: Figures
    mcnemar: dict[str, McNemar]
    few_images: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def compare(
    a: Sequence[Answered],
    b: Sequence[Answered],
    parser: str = "original",
    resamples: int = 10_000,
    seed: int = 0,
    names: tuple[str, str] = ("A", "B"),
    min_images: int = MIN_IMAGES,
) -> Comparison:
    """Compare two models' answers to the same questions; `min_images` of a split for intervals.

    Raises DataError, with `names`, when the questions differ (in id, image, text or label).
    """
    b = matched(a, b, names)
    splits = sorted({item.split for item in a}, key=split_rank)
    images = sorted({item.image for item in a})
    counts = np.stack([_counts(items, PARSERS[parser], splits, images) for items in (a, b)])
    point = _scores(counts.sum(axis=1))  # [2 M S+1]
    drawn = _bootstrap(counts, resamples, seed)  # [r 2 M S+1]
    per_split = (counts[0, :, :, NUM] > 0).sum(axis=0)
    few = {s: int(n) for s, n in zip(splits, per_split, strict=True) if n < min_images}
    return Comparison(
        parser=parser,
        num_questions=len(a),
        num_images=len(images),
        resamples=resamples,
        seed=seed,
        a=_figures(point[0], drawn[:, 0], splits, few),
        b=_figures(point[1], drawn[:, 1], splits, few),
        difference=_figures(point[1] - point[0], drawn[:, 1] - drawn[:, 0], splits, few, True),
        mcnemar=_mcnemar(a, b, PARSERS[parser], splits),
        few_images=few,
    )


def matched(
    a: Sequence[Answered], b: Sequence[Answered], names: tuple[str, str] = ("A", "B")
) -> list[Answered]:
    """B's answers in the order of A's; DataError when the two sets of questions differ."""
    of_a, of_b = ({item.key: item for item in items} for items in (a, b))
    only_a = [item for item in a if item.key not in of_b]
    only_b = [item for item in b if item.key not in of_a]
    if only_a or only_b:
        raise DataError(
            f"{names[0]} and {names[1]} answer different questions: {_some(only_a, names[0])} and "
            f"{_some(only_b, names[1])}; "
            "compare answers to the same question files"
        )
    for item in a:
        other = of_b[item.key]
        for name in ("image", "question", "label"):
            ours, theirs = getattr(item, name), getattr(other, name)
            if ours != theirs:
                raise DataError(
                    f"question_id {item.question_id} of split {item.split} has {name} {ours!r} in "
                    f"{names[0]} and {theirs!r} in {names[1]}; "
                    "compare answers to the same question files"
                )
    return [of_b[item.key] for item in a]


def _some(items: Sequence[Answered], name: str) -> str:
    first = f" (first: question_id {items[0].question_id} of {items[0].split})" if items else ""
    return f"{len(items)} only in {name}{first}"


def _counts(
    items: Sequence[Answered], parser: Parser, splits: Sequence[str], images: Sequence[str]
) -> np.ndarray:
    """float64 `[images splits 5]`: the sums named NUM ... RIGHT."""
    row = {image: number for number, image in enumerate(images)}
    col = {split: number for number, split in enumerate(splits)}
    counts = np.zeros((len(images), len(splits), 5))
    for item in items:
        label, answer = item.label == "yes", parser(item.text)
        cell = counts[row[item.image], col[item.split]]
        cell += (1, label, label and answer is True, answer is True, label is answer)
    return counts


def _scores(sums: np.ndarray) -> np.ndarray:
    """Sums `[... S 5]` -> scores `[... M S+1]` in the order of METRICS, last column their mean.

    As in pope.py a quotient without a denominator is 0; a split without any question (possible in
    a resample of few images) is NaN.
    """
    num, label_yes, true_yes, said_yes, right = np.moveaxis(sums, -1, 0)

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    scores = np.stack(
        [
            ratio(right, num),
            ratio(true_yes, said_yes),
            ratio(true_yes, label_yes),
            ratio(2 * true_yes, said_yes + label_yes),
            ratio(said_yes, num),
        ],
        axis=-2,
    )
    scores = np.where(num[..., None, :] > 0, scores, np.nan)
    return np.concatenate([scores, scores.mean(axis=-1, keepdims=True)], axis=-1)


def _bootstrap(counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Counts `[2 images S 5]` -> scores of resampled images `[resamples 2 M S+1]`."""
    models, images, splits, sums = counts.shape
    flat = counts.transpose(1, 0, 2, 3).reshape(images, -1)
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        picks = rng.integers(images, size=(size, images)) + images * np.arange(size)[:, None]
        weights = np.bincount(picks.ravel(), minlength=size * images).reshape(size, images)
        drawn.append(_scores((weights @ flat).reshape(size, models, splits, sums)))
    return np.concatenate(drawn)


def _figures(
    point: np.ndarray,
    drawn: np.ndarray,
    splits: Sequence[str],
    few: Mapping[str, int],
    with_p: bool = False,
) -> Figures:
    """Point `[M S+1]` and resamples `[r M S+1]` -> estimates by split and metric."""
    return {
        split: {
            metric: _estimate(
                float(point[m, s]),
                drawn[:, m, s],
                with_p,
                split in few or (split == MEAN and bool(few)),
            )
            for m, metric in enumerate(METRICS)
        }
        for s, split in enumerate([*splits, MEAN])
    }


def _estimate(value: float, drawn: np.ndarray, with_p: bool, few: bool) -> Estimate:
    """The estimate of resamples `[r]`, those that drew no question (NaN) left out."""
    valid = drawn[~np.isnan(drawn)]
    low, high = np.percentile(valid, (2.5, 97.5)) if len(valid) else (value, value)
    p = bootstrap_p(valid) if with_p and not few else None
    return Estimate(value, float(low), float(high), p, few)


def bootstrap_p(differences: np.ndarray) -> float:
    """Two-sided p against 0 of resampled differences `[r]`, NaN left out (module's docstring)."""
    valid = differences[~np.isnan(differences)]
    tails = (int((valid <= ROUNDING).sum()), int((valid >= -ROUNDING).sum()))
    return min(1.0, 2 * (1 + min(tails)) / (1 + len(valid)))


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p that `only_a` of the discordant questions fell to A by a fair coin."""
    total = only_a + only_b
    return float(binomtest(only_a, total, 0.5).pvalue) if total else 1.0


def _mcnemar(
    a: Sequence[Answered], b: Sequence[Answered], parser: Parser, splits: Sequence[str]
) -> dict[str, McNemar]:
    only_a, only_b = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    for item, other in zip(a, b, strict=True):
        right_a, right_b = is_right(item, parser), is_right(other, parser)
        only_a[item.split] += right_a and not right_b
        only_b[item.split] += right_b and not right_a
    totals: Mapping[str, tuple[int, int]] = {
        **{split: (only_a[split], only_b[split]) for split in splits},
        ALL: (sum(only_a.values()), sum(only_b.values())),
    }
    return {name: McNemar(x, y, mcnemar_p(x, y)) for name, (x, y) in totals.items()}


def is_right(item: Answered, parser: Parser) -> bool:
    """Whether the parser reads the label out of the answer."""
    return parser(item.text) is (item.label == "yes")
