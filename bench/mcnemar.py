"""McNemar's exact test of two models on the same questions, its power, and many tests at once.

Of n questions, b are right in A alone and c in B alone. Without a difference each of these b + c
discordant ones falls to either side like a fair coin: the test is binomial. It takes questions as
independent.

**Power.** With the share psi of discordant questions and the difference delta = (c - b) / n of the
accuracies, a discordant question falls to B with probability 1/2 + delta / (2 psi), and the number
of discordant ones is binomial(n, psi). `power` sums the exact test's chance to reject over all of
them; nothing is approximated but tails below 1e-12. Where errors cluster in images, n questions
are worth fewer: `Power` counts them as n / design effect, the factor by which the bootstrap over
images widens the variance of the accuracy difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, binomtest

ALPHA = 0.05  # two-sided
TARGET = 0.8  # the power that is usually asked for
MOST_QUESTIONS = 10_000_000  # nobody asks more
TAIL = 1e-12
STEPS = 40  # of a bisection


@dataclass(frozen=True)
class McNemar:
    """Questions that only A, or only B, has right; the exact two-sided p."""

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Power:
    """What a test of this size can find at ALPHA, given the observed share of discordant questions.

    design_effect: None where the images are too few to know it; 1 is taken then. power: to find a
    difference as large as the observed one. detectable: the smallest difference of accuracies found
    with TARGET power, None where even the largest possible one is not. needed: questions of this
    kind for TARGET power at the observed difference, None where it is 0 or they pass
    MOST_QUESTIONS.
    """

    questions: int
    discordance: float
    difference: float
    design_effect: float | None
    power: float
    detectable: float | None
    needed: int | None


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p that `only_a` of the discordant questions fell to A by a fair coin."""
    total = only_a + only_b
    return float(binomtest(only_a, total, 0.5).pvalue) if total else 1.0


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> McNemar:
    """The test of two rows of right answers, bool `[n]`."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return McNemar(only_a, only_b, mcnemar_p(only_a, only_b))


def power(questions: int, discordance: float, difference: float, alpha: float = ALPHA) -> float:
    """The chance that the exact test of so many independent questions has p <= alpha.

    discordance: share of discordant questions, 0 to 1; difference: of the accuracies, at most as
    large. Raises ValueError otherwise.
    """
    if not 0 <= abs(difference) <= discordance <= 1:
        raise ValueError(f"a difference of {difference} with {discordance} discordant")
    if not discordance:
        return 0.0
    low, high = binom.isf([1 - TAIL, TAIL], questions, discordance)
    number = np.arange(max(0, int(low)), min(questions, int(high)) + 1)
    to_b = 0.5 + difference / (2 * discordance)
    edge = _rejected_up_to(number, alpha)
    rejected = binom.cdf(edge, number, to_b) + binom.sf(number - edge - 1, number, to_b)
    return float(binom.pmf(number, questions, discordance) @ np.where(edge >= 0, rejected, 0.0))


def _rejected_up_to(number: np.ndarray, alpha: float) -> np.ndarray:
    """For each number of discordant questions the largest count of one side with p <= alpha; -1
    where there is none."""
    edge = binom.ppf(alpha / 2, number, 0.5).astype(np.int64)  # the first to reach alpha / 2
    return np.where(2 * binom.cdf(edge, number, 0.5) <= alpha, edge, edge - 1)


def detectable(questions: int, discordance: float, target: float = TARGET) -> float | None:
    """The smallest difference found with `target` power, None where there is none."""
    if power(questions, discordance, discordance) < target:
        return None
    low, high = 0.0, discordance
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if power(questions, discordance, middle) >= target else (middle, high)
        )
    return high


def needed(discordance: float, difference: float, target: float = TARGET) -> int | None:
    """Independent questions for `target` power, None where no number below MOST_QUESTIONS will do.

    (Power grows with the questions but for small steps back; the number is one where it is reached
    and one question less does not reach it.)
    """
    if not difference:
        return None
    high = 1
    while power(high, discordance, difference) < target:
        high *= 2
        if high > MOST_QUESTIONS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if power(middle, discordance, difference) >= target else (middle, high)
        )
    return high


def power_of(test: McNemar, questions: int, design_effect: float | None) -> Power:
    """The power of a test that was made, its questions counted by the design effect."""
    discordance = (test.only_a + test.only_b) / questions
    difference = (test.only_b - test.only_a) / questions
    effect = 1.0 if design_effect is None else design_effect
    worth = max(1, round(questions / effect))
    more = needed(discordance, difference)
    return Power(
        questions=questions,
        discordance=discordance,
        difference=difference,
        design_effect=design_effect,
        power=power(worth, discordance, difference),
        detectable=detectable(worth, discordance),
        needed=None if more is None else round(more * effect),
    )


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for being many, by Holm's method: the chance of one false find among all
    stays below the level at which the adjusted ones are read."""
    order = np.argsort(values, kind="stable")
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted
