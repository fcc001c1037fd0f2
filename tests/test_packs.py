"""Laws of the packs: every sample once, none over the limit, few of them, evenly filled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_hd.train.packs import (
    best_fit_decreasing,
    default_pack_tokens,
    equal_shares,
    pack_lengths,
)

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array)


def loads(packs: list[np.ndarray], lengths: np.ndarray) -> list[int]:
    return [int(lengths[pack].sum()) for pack in packs]


@settings(max_examples=200)
@given(lengths=LENGTHS, budget=st.integers(1, 90), multiple=st.integers(1, 5))
def test_every_sample_is_in_one_pack_and_no_pack_is_over_the_limit(lengths, budget, multiple):
    packs = pack_lengths(lengths, budget, multiple)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(
        load <= budget or len(p) == 1 for p, load in zip(packs, loads(packs, lengths), strict=True)
    )
    assert loads(packs, lengths) == sorted(loads(packs, lengths), reverse=True)
    fewest = len(best_fit_decreasing(lengths, budget))
    assert len(packs) % multiple == 0 and fewest <= len(packs) < fewest + multiple


@settings(max_examples=200)
@given(lengths=LENGTHS, budget=st.integers(60, 200))
def test_best_fit_needs_few_packs(lengths, budget):
    packs = best_fit_decreasing(lengths, budget)
    at_least = -(-int(lengths.sum()) // budget)
    assert len(packs) <= 11 / 9 * max(at_least, 1) + 4
    # No two packs could be one, or best fit would have made them one.
    pairs = itertools.combinations(loads(packs, lengths), 2)
    assert all(a + b > budget for a, b in pairs)


def brute_force_best_fit(lengths: np.ndarray, budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [budget - sum(lengths[i] for i in pack) - lengths[place] for pack in packs]
        fitting = [(room, number) for number, room in enumerate(left) if room >= 0]
        if fitting:
            packs[min(fitting)[1]].append(place)
        else:
            packs.append([place])
    return packs


@settings(max_examples=200)
@given(lengths=LENGTHS, budget=st.integers(1, 200))
def test_best_fit_is_its_definition(lengths, budget):
    ours = {tuple(pack.tolist()) for pack in best_fit_decreasing(lengths, budget)}
    assert ours == {tuple(sorted(pack)) for pack in brute_force_best_fit(lengths, budget)}


@settings(max_examples=100)
@given(lengths=LENGTHS, count=st.integers(1, 12))
def test_equal_shares_differ_by_one_sample_at_most(lengths, count):
    found = loads(equal_shares(lengths, count), lengths)
    assert len(found) == count and sum(found) == lengths.sum()
    assert found[0] - found[-1] <= lengths.max()


def test_ranks_share_the_work_of_a_pack_too_many():
    """Nine packs on eight ranks: sixteen half-full ones, not nine and seven idle ranks."""
    lengths = np.random.default_rng(0).integers(50, 150, 90)
    budget = int(lengths.sum()) // 8 - 100
    assert len(pack_lengths(lengths, budget)) == 9
    found = loads(pack_lengths(lengths, budget, 8), lengths)
    assert len(found) == 16 and found[-1] > 0
    rounds = max(found[:8]) + max(found[8:])
    assert rounds < 1.1 * lengths.sum() / 8


def test_a_sample_longer_than_the_limit_is_alone():
    packs = pack_lengths(np.array([3, 50, 4]), 10)
    assert [pack.tolist() for pack in packs] == [[1], [0, 2]]


@pytest.mark.parametrize(("per_pass", "per_step"), [(16, 128), (2, 8), (4, 4)])
def test_the_default_limit_holds_a_step_in_its_passes_nearly_always(per_pass, per_step):
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(6.5, 0.6, 20_000).astype(int) + 20, 2048)
    budget = default_pack_tokens(lengths, per_pass, per_step)
    assert budget % 128 == 0 and budget >= lengths.max()
    steps = rng.choice(lengths, (200, per_step))
    more = sum(len(pack_lengths(step, budget)) > per_step // per_pass for step in steps)
    assert more <= 20
    fill = steps.sum() / (len(steps) * per_step // per_pass * budget)
    assert fill > 0.5
