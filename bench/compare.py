"""Paired statistics: the same questions answered by two or more models.

Models that answer the same questions err on many of the same ones, so their differences are far
better known than their scores: POPE's F1 has a standard error of about 0.7 points for one 13B
model, more than published differences between models. Hence everything here is paired.

- **Intervals** are 95 % percentile intervals of a bootstrap over images (bootstrap.py); the same
  draw serves all models and all splits. Of a few images there are too few different draws: a split
  of fewer than MIN_IMAGES gets no p, its intervals are marked as not to be shown, and so is the
  mean over it.
- **p of a difference** is of the same resamples.
- **McNemar, exact**, with its power (mcnemar.py). The test takes questions as independent, so where
  errors cluster in images the bootstrap's p for the accuracy is the more careful one; the power
  counts questions by that clustering.
- **Many pairs.** k models make k (k - 1) / 2 pairs: the p of the mean F1 and McNemar's p of all
  questions are given adjusted for that, too (Holm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from .agreement import UNREADABLE, Agreement, agreement
from .bootstrap import MIN_IMAGES, Estimate, estimate, resampled
from .mcnemar import McNemar, Power, holm, mcnemar, power_of
from .pope import PARSERS
from .pope_data import Answered, split_rank
from .question_sets import all_matched

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
MEAN, ALL = "mean", "all"

# What is summed over questions, per image and split; all scores are quotients of these.
NUM, LABEL_YES, TRUE_YES, SAID_YES, RIGHT = range(5)

Figures = dict[str, dict[str, Estimate]]  # split (and "mean") -> metric -> estimate


@dataclass(frozen=True)
class Pair:
    """Two of the models; `difference` is B - A, `mcnemar` and `power` are by split and "all".

    mean_f1_adjusted: the p of the mean F1's difference, adjusted for the number of pairs; None
    where the images are too few. mcnemar_adjusted: the same of McNemar's p of all questions.
    """

    a: str
    b: str
    difference: Figures
    mcnemar: dict[str, McNemar]
    power: dict[str, Power]
    mean_f1_adjusted: float | None = None
    mcnemar_adjusted: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Models on the same questions: the scores of each, and what lies between every two.

    pairs: (first, second), (first, third), ..., in the order of the models. few_images: the number
    of images of each split that has too few for the bootstrap.
    """

    parser: str
    num_questions: int
    num_images: int
    resamples: int
    seed: int
    models: dict[str, Figures]
    pairs: tuple[Pair, ...]
    agreement: Agreement
    few_images: dict[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.models)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits, and "mean"."""
        return tuple(self.models[self.names[0]])

    @property
    def from_first(self) -> tuple[Pair, ...]:
        """The pairs of the first model with each of the others."""
        return tuple(pair for pair in self.pairs if pair.a == self.names[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Readings:
    """The answers of M models to n questions, read by a parser.

    split, image: of each question, int `[n]` into `splits` and `images`. label: bool `[n]`, true
    for yes. said: int8 `[M n]`, 1 yes, 0 no, 2 unreadable.
    """

    splits: tuple[str, ...]
    images: tuple[str, ...]
    split: np.ndarray
    image: np.ndarray
    label: np.ndarray
    said: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool `[M n]`"""
        return self.said == self.label

    def sums(self) -> np.ndarray:
        """float64 `[images M splits 5]`: the sums named NUM ... RIGHT."""
        models = len(self.said)
        found = np.zeros((len(self.images), models, len(self.splits), 5))
        for m, (said, right) in enumerate(zip(self.said == 1, self.right, strict=True)):
            one = np.ones_like(self.label)
            parts = np.stack([one, self.label, said & self.label, said, right], axis=-1)
            np.add.at(found[:, m], (self.image, self.split), parts)
        return found


def read_all(sides: Mapping[str, Sequence[Answered]], parser: str) -> Readings:
    """All answers read, in the order of the first side's questions; DataError when they differ."""
    ordered = list(all_matched(sides).values())
    first = ordered[0]
    splits = tuple(sorted({item.split for item in first}, key=split_rank))
    images = tuple(sorted({item.image for item in first}))
    split_place = {split: place for place, split in enumerate(splits)}
    image_place = {image: place for place, image in enumerate(images)}
    code = {True: 1, False: 0, None: UNREADABLE}
    read = PARSERS[parser]
    return Readings(
        splits=splits,
        images=images,
        split=np.array([split_place[item.split] for item in first]),
        image=np.array([image_place[item.image] for item in first]),
        label=np.array([item.label == "yes" for item in first]),
        said=np.array([[code[read(x.text)] for x in side] for side in ordered], dtype=np.int8),
    )


def compare(
    sides: Mapping[str, Sequence[Answered]],
    parser: str = "original",
    resamples: int = 10_000,
    seed: int = 0,
    min_images: int = MIN_IMAGES,
) -> Comparison:
    """Compare the answers of models by name; `min_images` of a split for intervals.

    Raises ValueError for fewer than two models, DataError when the questions differ (in id, image,
    text or label).
    """
    if len(sides) < 2:
        raise ValueError(f"{len(sides)} models; a comparison needs two or more")
    read = read_all(sides, parser)
    sums = read.sums()
    per_split = (sums[:, 0, :, NUM] > 0).sum(axis=0)
    few = {s: int(n) for s, n in zip(read.splits, per_split, strict=True) if n < min_images}
    point, drawn_sums = sums.sum(axis=0), resampled(sums, resamples, seed)
    drawn = scores_of(drawn_sums)  # [r M K S+1]
    scores = scores_of(point)  # [M K S+1]
    models = {
        name: _figures(scores[m], drawn[:, m], read.splits, few) for m, name in enumerate(sides)
    }
    pairs = []
    for (i, a), (j, b) in combinations(enumerate(sides), 2):
        gaps = scores[j] - scores[i], drawn[:, j] - drawn[:, i]
        tests = _tests(read, i, j)
        effects = _design_effects(drawn_sums[:, [i, j]], tests, read.splits, few)
        pair = Pair(
            a=a,
            b=b,
            difference=_figures(*gaps, read.splits, few, with_p=True),
            mcnemar={name: test for name, (test, _) in tests.items()},
            power={name: power_of(*tests[name], effects[name]) for name in tests},
        )
        pairs.append(pair)
    return Comparison(
        parser=parser,
        num_questions=len(read.label),
        num_images=len(read.images),
        resamples=resamples,
        seed=seed,
        models=models,
        pairs=_adjusted(pairs),
        agreement=agreement(read.said, read.right),
        few_images=few,
    )


def scores_of(sums: np.ndarray) -> np.ndarray:
    """Sums `[... S 5]` -> scores `[... K S+1]` in the order of METRICS, last column their mean.

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


def _figures(
    point: np.ndarray,
    drawn: np.ndarray,
    splits: Sequence[str],
    few: Mapping[str, int],
    with_p: bool = False,
) -> Figures:
    """Point `[K S+1]` and resamples `[r K S+1]` -> estimates by split and metric."""
    return {
        split: {
            metric: estimate(
                float(point[k, s]),
                drawn[:, k, s],
                with_p,
                split in few or (split == MEAN and bool(few)),
            )
            for k, metric in enumerate(METRICS)
        }
        for s, split in enumerate([*splits, MEAN])
    }


def _tests(read: Readings, a: int, b: int) -> dict[str, tuple[McNemar, int]]:
    """McNemar's test of each split and of all questions, with their number."""
    masks = {split: read.split == place for place, split in enumerate(read.splits)}
    masks[ALL] = np.ones_like(read.label)
    right = read.right
    return {
        name: (mcnemar(right[a, mask], right[b, mask]), int(mask.sum()))
        for name, mask in masks.items()
    }


def _design_effects(
    drawn: np.ndarray,
    tests: Mapping[str, tuple[McNemar, int]],
    splits: Sequence[str],
    few: Mapping[str, int],
) -> dict[str, float | None]:
    """By split and ALL: the variance of the difference of two accuracies over resampled images,
    sums `[r 2 S 5]`, divided by that of as many independent questions."""
    sums = np.concatenate([drawn, drawn.sum(axis=2, keepdims=True)], axis=2)
    with np.errstate(invalid="ignore"):  # a resample without any question is NaN
        gap = (sums[:, 1, :, RIGHT] - sums[:, 0, :, RIGHT]) / sums[:, 0, :, NUM]
    found: dict[str, float | None] = {}
    for place, name in enumerate([*splits, ALL]):
        test, questions = tests[name]
        share, shift = np.array([test.only_a + test.only_b, test.only_b - test.only_a]) / questions
        independent = (share - shift**2) / questions
        known = independent > 0 and name not in few and not (name == ALL and few)
        effect = float(np.nanvar(gap[:, place]) / independent) if known else 0.0
        found[name] = effect or None
    return found


def _adjusted(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """The pairs with their p adjusted for being so many."""
    means = [pair.difference[MEAN]["f1"].p for pair in pairs]
    known = [p for p in means if p is not None]  # all of them or none
    mean_f1 = holm(known) if known else [None] * len(pairs)
    of_all = holm([pair.mcnemar[ALL].p for pair in pairs])
    return tuple(
        replace(pair, mean_f1_adjusted=x, mcnemar_adjusted=y)
        for pair, x, y in zip(pairs, mean_f1, of_all, strict=True)
    )
