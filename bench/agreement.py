"""How far models say the same: agreement and Cohen's kappa of every two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNREADABLE = 2  # beside 1 for yes and 0 for no

Square = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Agreement:
    """Square tables, a row and a column for each model in order.

    same: share of the questions with the same reading (yes, no or unreadable). kappa: that, beyond
    what chance gives with the models' own shares; None where chance alone gives all. shared_errors:
    of the questions that the row's model has wrong, the share that the column's has wrong too; None
    without an error.
    """

    same: Square
    kappa: Square
    shared_errors: Square


def agreement(said: np.ndarray, right: np.ndarray) -> Agreement:
    """Of the models' readings, int `[M n]`, and whether each is right, bool `[M n]`."""
    models = range(len(said))
    shares = np.array([np.bincount(row, minlength=UNREADABLE + 1) / len(row) for row in said])
    same = [[float((said[i] == said[j]).mean()) for j in models] for i in models]
    chance = shares @ shares.T
    return Agreement(
        same=tuple(map(tuple, same)),
        kappa=tuple(tuple(_kappa(same[i][j], chance[i, j]) for j in models) for i in models),
        shared_errors=tuple(tuple(_shared(~right[i], ~right[j]) for j in models) for i in models),
    )


def _kappa(same: float, chance: float) -> float | None:
    return None if chance >= 1 - 1e-12 else float((same - chance) / (1 - chance))


def _shared(wrong: np.ndarray, also: np.ndarray) -> float | None:
    return float((wrong & also).sum() / wrong.sum()) if wrong.any() else None
