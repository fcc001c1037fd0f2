"""Samples into packs of limited length: as few as best fit finds, filled about equally.

Functions of the lengths alone; equal lengths go in their order, so every process that computes
them gets the same packs.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort

import numpy as np

ROUND_TO = 128  # tokens


def pack_lengths(lengths: np.ndarray, budget: int, multiple: int = 1) -> list[np.ndarray]:
    """Places of `lengths` (int `[n]`, tokens) in packs of at most `budget` tokens, heaviest first.

    A sample that is longer than the budget is alone in its pack. There are as many packs as best
    fit needs, rounded up to a `multiple` (of the ranks; some are empty where the samples are too
    few), and their samples are shared out evenly: a step takes as long as its heaviest packs, so
    full packs and a nearly empty one would waste what the empty one lacks. Where an even share
    would not fit, best fit's own packs stay.
    """
    packs = best_fit_decreasing(lengths, budget)
    count = -(-len(packs) // multiple) * multiple
    even = equal_shares(lengths, count)
    if all(len(pack) < 2 or lengths[pack].sum() <= budget for pack in even):
        return even
    return packs + [np.empty(0, dtype=np.int64)] * (count - len(packs))


def best_fit_decreasing(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Places in packs of at most `budget` tokens: the longest sample first, each into the fullest
    pack that still has room for it.

    At most 11/9 of the fewest packs possible and four more (Johnson et al. 1974).
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), rising
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        found = bisect_left(room, (length, -1))
        if found == len(room):
            left, number = budget, len(packs)
            packs.append([])
        else:
            left, number = room.pop(found)
        packs[number].append(place)
        if left > length:
            insort(room, (left - length, number))
    return _heaviest_first(packs, lengths)


def equal_shares(lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Places in `count` packs of about equal tokens: the longest sample first, each into the
    emptiest pack (Graham 1969, longest processing time)."""
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for place in np.argsort(-lengths, kind="stable").tolist():
        load, number = heapq.heappop(loads)
        packs[number].append(place)
        heapq.heappush(loads, (load + int(lengths[place]), number))
    return _heaviest_first(packs, lengths)


def _heaviest_first(packs: list[list[int]], lengths: np.ndarray) -> list[np.ndarray]:
    arrays = [np.array(sorted(pack), dtype=np.int64) for pack in packs]
    return sorted(arrays, key=lambda pack: -int(lengths[pack].sum()))


def default_pack_tokens(lengths: np.ndarray, samples_per_pass: int, samples_per_step: int) -> int:
    """The budget that holds `samples_per_pass` samples of these lengths on average.

    Two standard deviations of a step's mean length are added: without them, half of the steps are
    longer than the mean and would need one pack more than they have passes. Rounded up to a
    multiple of 128, and never below the longest sample.
    """
    spread = 2 * float(np.std(lengths)) / samples_per_step**0.5
    tokens = samples_per_pass * (float(np.mean(lengths)) + spread)
    wanted = max(tokens, float(np.max(lengths)))
    return ROUND_TO * int(np.ceil(wanted / ROUND_TO))
