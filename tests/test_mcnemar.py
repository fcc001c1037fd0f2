"""The exact test against enumeration, its power against enumeration and simulation, Holm's p."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from llava_hd.bench.mcnemar import (
    MOST_QUESTIONS,
    McNemar,
    detectable,
    holm,
    mcnemar,
    mcnemar_p,
    needed,
    power,
    power_of,
)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemars_p_is_twice_the_coins_tail(only_a: int, only_b: int) -> None:
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    assert mcnemar_p(only_a, only_b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 6, 0.03125), (5, 15, 0.04138947), (59, 121, 4.4344492637e-06)],
)
def test_mcnemars_p_of_known_tables(only_a: int, only_b: int, p: float) -> None:
    """The last two: R's binom.test(5, 20), and the example of statsmodels' mcnemar."""
    assert mcnemar_p(only_a, only_b) == pytest.approx(p, rel=1e-6)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(a, b) for a, b in itertools.product(range(7), repeat=2) if a + b <= 10]
)
def test_p_is_the_share_of_all_coin_rows_at_least_as_uneven(only_a: int, only_b: int) -> None:
    rows = itertools.product((0, 1), repeat=only_a + only_b)
    gaps = [abs(2 * sum(row) - len(row)) for row in rows]
    p = sum(gap >= abs(only_a - only_b) for gap in gaps) / len(gaps)
    assert mcnemar_p(only_a, only_b) == pytest.approx(p, rel=1e-12)


def test_the_test_counts_what_exactly_one_has_right() -> None:
    a, b = np.array([1, 1, 1, 0, 0, 1], dtype=bool), np.array([1, 0, 0, 1, 0, 0], dtype=bool)
    assert mcnemar(a, b) == McNemar(3, 1, mcnemar_p(3, 1))


@pytest.mark.parametrize(
    ("discordance", "difference"), [(0.5, 0.1), (0.9, -0.6), (1.0, 0.4), (0.3, 0.0), (0.4, 0.4)]
)
def test_power_is_the_sum_over_every_outcome_of_a_few_questions(
    discordance: float, difference: float
) -> None:
    chances = {
        1: (discordance + difference) / 2,  # B alone right
        -1: (discordance - difference) / 2,
        0: 1 - discordance,
    }
    expected = 0.0
    for outcome in itertools.product(chances, repeat=9):
        if mcnemar_p(outcome.count(-1), outcome.count(1)) <= 0.05:
            expected += math.prod(chances[x] for x in outcome)
    assert power(9, discordance, difference) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("questions", "discordance", "difference"), [(500, 0.1, 0.03), (3000, 0.12, 0.02)]
)
def test_power_is_how_often_simulated_tests_find_the_difference(
    questions: int, discordance: float, difference: float
) -> None:
    rng = np.random.default_rng(0)
    discordant = rng.binomial(questions, discordance, size=4000)
    only_b = rng.binomial(discordant, 0.5 + difference / (2 * discordance))
    found = np.mean([mcnemar_p(n - b, b) <= 0.05 for n, b in zip(discordant, only_b, strict=True)])
    value = power(questions, discordance, difference)
    assert 0.3 < value < 0.95
    assert found == pytest.approx(value, abs=4 * math.sqrt(value * (1 - value) / 4000))


def test_power_is_near_the_normal_formula_for_many_questions() -> None:
    """Connor's formula (Biometrics 1987), uncorrected; the exact test is a little more careful."""
    for questions, psi, delta in ((9000, 0.1, 0.01), (3000, 0.2, 0.025), (20000, 0.05, 0.004)):
        spread = math.sqrt(psi - delta**2)
        expected = norm.cdf((delta * math.sqrt(questions) - 1.959964 * math.sqrt(psi)) / spread)
        assert expected - 0.04 < power(questions, psi, delta) <= expected + 0.002


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 1), st.floats(-1, 1))
def test_power_has_two_equal_sides_and_keeps_the_level(
    questions: int, discordance: float, part: float
) -> None:
    difference = part * discordance
    value = power(questions, discordance, difference)
    assert 0 <= value <= 1 + 1e-9
    assert value == pytest.approx(power(questions, discordance, -difference), abs=1e-9)
    assert power(questions, discordance, 0) <= 0.05 + 1e-9


def test_impossible_differences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a difference of 0\.2"):
        power(100, 0.1, 0.2)


@pytest.mark.parametrize(("questions", "discordance"), [(300, 0.2), (3000, 0.1), (9000, 0.08)])
def test_the_detectable_difference_has_the_power_and_a_smaller_one_has_not(
    questions: int, discordance: float
) -> None:
    found = detectable(questions, discordance)
    assert found is not None
    assert power(questions, discordance, found) >= 0.8
    assert power(questions, discordance, found * 0.999) < 0.8


def test_too_few_questions_detect_nothing() -> None:
    assert detectable(5, 1.0) is None  # five of five: p = 1/16
    assert detectable(6, 1.0) is not None


@pytest.mark.parametrize(("discordance", "difference"), [(0.1, 0.01), (0.3, -0.1), (1.0, 0.9)])
def test_the_needed_questions_are_enough_and_not_many_too_many(
    discordance: float, difference: float
) -> None:
    found = needed(discordance, difference)
    assert found is not None
    assert power(found, discordance, difference) >= 0.8
    assert power(found - 1, discordance, difference) < 0.8


def test_no_difference_needs_no_number_of_questions() -> None:
    assert needed(0.1, 0.0) is None
    assert needed(0.1, 1e-6) is None  # beyond what anyone asks
    assert MOST_QUESTIONS >= 10**7


def test_the_power_of_a_test_counts_questions_by_the_design_effect() -> None:
    test = McNemar(60, 100, mcnemar_p(60, 100))
    plain, clustered = power_of(test, 1000, None), power_of(test, 1000, 2.0)
    assert (plain.discordance, plain.difference) == (0.16, 0.04)
    assert plain.power == power(1000, 0.16, 0.04)
    assert clustered.power == power(500, 0.16, 0.04)
    assert clustered.detectable == detectable(500, 0.16)
    assert clustered.needed == 2 * plain.needed
    nothing = power_of(McNemar(0, 0, 1.0), 10, None)
    assert (nothing.power, nothing.detectable, nothing.needed) == (0, None, None)


def test_holms_p_of_a_known_example() -> None:
    """R: p.adjust(c(0.01, 0.02, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
