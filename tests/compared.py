"""Answered questions with known errors, and the comparison of two models with its parts at hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from llava_hd.bench import compare as module
from llava_hd.bench.compare import Comparison, Figures
from llava_hd.bench.mcnemar import McNemar
from llava_hd.bench.pope_data import Answered

SPLITS = ("random", "popular", "adversarial")


def questions(
    num_images: int, per_image: int = 6, splits: tuple[str, ...] = SPLITS
) -> list[Answered]:
    return [
        Answered(split, image * per_image + place, f"{image}.jpg", f"Is it {place}?", label, label)
        for split in splits
        for image in range(num_images)
        for place in range(per_image)
        for label in (("yes", "no")[place % 2],)
    ]


def noisy(items: list[Answered], rate: float, seed: int) -> list[Answered]:
    """Answers that are wrong at `rate`, a few of them unreadable."""
    rng = random.Random(seed)
    flip = {"yes": "No", "no": "Yes"}
    return [
        replace(item, text=("?" if rng.random() < 0.1 else flip[item.label]))
        if rng.random() < rate
        else item
        for item in items
    ]


@dataclass(frozen=True)
class Two:
    """A comparison of two models, A and B, with its parts at hand."""

    whole: Comparison
    a: Figures
    b: Figures
    difference: Figures
    mcnemar: dict[str, McNemar]
    few_images: dict[str, int]


def compare(a: list[Answered], b: list[Answered], *rest: str, **options: int) -> Two:
    whole = module.compare({"A": a, "B": b}, *rest, **options)
    [pair] = whole.pairs
    return Two(
        whole,
        whole.models["A"],
        whole.models["B"],
        pair.difference,
        pair.mcnemar,
        whole.few_images,
    )
