"""Agreement and kappa against counting by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_hd.bench.agreement import agreement

Rows = list[list[int]]


@given(
    st.integers(1, 25).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=2, max_size=4
        )
    ),
)
def test_every_two_agree_as_counted(said: Rows) -> None:
    labels = [value % 2 for value in said[0][::-1]]
    right = [[value == label for value, label in zip(row, labels, strict=True)] for row in said]
    found = agreement(np.array(said), np.array(right))
    n = len(labels)
    for i, j in itertools.product(range(len(said)), repeat=2):
        pairs = Counter(zip(said[i], said[j], strict=True))
        same = sum(pairs[k, k] for k in range(3)) / n
        chance = sum(said[i].count(k) * said[j].count(k) for k in range(3)) / n**2
        assert found.same[i][j] == pytest.approx(same)
        if chance == 1:
            assert found.kappa[i][j] is None
        else:
            assert found.kappa[i][j] == pytest.approx((same - chance) / (1 - chance))
        wrong = [q for q in range(n) if not right[i][q]]
        shared = found.shared_errors[i][j]
        if wrong:
            assert shared == pytest.approx(sum(not right[j][q] for q in wrong) / len(wrong))
        else:
            assert shared is None


def test_kappa_of_a_known_table() -> None:
    """Cohen 1960's own kind of table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no gives 0.4."""
    one = [1] * 25 + [0] * 25
    other = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    found = agreement(np.array([one, other]), np.ones((2, 50), dtype=bool))
    assert found.kappa[0][1] == pytest.approx(0.4)
    assert found.same[0][1] == pytest.approx(0.7)
