"""Laws of the data order: everything once per epoch, whoever asks, whatever the ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_hd.train.batches import BatchOrder, PassSampler


def order(n=50, step=8, per_pass=2, seed=3, batching="plain", text_every=3) -> BatchOrder:
    index = np.arange(n)
    return BatchOrder(
        num_samples=n,
        samples_per_step=step,
        samples_per_pass=per_pass,
        seed=seed,
        batching=batching,
        has_image=index % text_every != 0,
        lengths=(index * 7919) % 101 + 1,
    )


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), passes=st.integers(1, 4), per_pass=st.integers(1, 4))
def test_each_epoch_of_the_plain_order_holds_every_sample_once(n, passes, per_pass):
    data = order(n, passes * per_pass, per_pass)
    stream = np.concatenate([data.step(s).reshape(-1) for s in range(data.num_steps(3.0))])
    assert len(stream) >= 3 * n > len(stream) - data.samples_per_step
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 70), passes=st.integers(1, 4), per_pass=st.integers(1, 4))
def test_a_step_by_modality_never_mixes_and_an_epoch_leaves_nothing_out(n, passes, per_pass):
    data = order(n, passes * per_pass, per_pass, batching="modality")
    steps = [data.step(s) for s in range(data.num_steps(1.0))]
    for step in steps:
        assert len(set(data.has_image[step.reshape(-1)])) == 1
    counts = np.bincount(np.concatenate(steps).reshape(-1), minlength=n)
    assert counts.min() >= 1
    assert counts.sum() == len(steps) * data.samples_per_step
    extra = counts.sum() - n
    assert extra <= 2 * (data.samples_per_step - 1)


@pytest.mark.parametrize("has_image", [True, False])
def test_one_kind_alone_can_be_batched_by_modality(has_image):
    data = replace(order(20, batching="modality"), has_image=np.full(20, has_image))
    assert data.num_steps(1.0) == 3
    assert set(np.concatenate([data.step(s) for s in range(3)]).reshape(-1)) == set(range(20))


@pytest.mark.parametrize("batching", ["plain", "modality"])
def test_ranks_share_a_step_out_without_changing_it(batching):
    data = order(step=8, per_pass=2, batching=batching)
    for step in range(5):
        for world in (1, 2, 4):
            parts = [data.passes_of_rank(step, rank, world) for rank in range(world)]
            assert {len(part) for part in parts} == {4 // world}
            together = np.concatenate(parts)
            assert sorted(map(tuple, together)) == sorted(map(tuple, data.step(step)))


@pytest.mark.parametrize("batching", ["plain", "modality"])
def test_a_later_start_continues_the_same_order(batching):
    data = order(batching=batching)
    whole = list(PassSampler(data, 0, 2, 0, 10))
    later = list(PassSampler(order(batching=batching), 0, 2, 6, 10))
    assert whole[-len(later) :] == later
    assert len(whole) == len(PassSampler(data, 0, 2, 0, 10)) == 20


@pytest.mark.parametrize("batching", ["plain", "modality"])
def test_seed_and_epoch_change_the_order(batching):
    data = order(48, batching=batching)
    assert not np.array_equal(data.step(0), order(48, seed=4, batching=batching).step(0))
    assert not np.array_equal(data.step(0), data.step(data.num_steps(1.0)))


def test_the_passes_of_a_step_by_modality_have_about_equal_work():
    data = order(400, step=64, per_pass=16, batching="modality")
    for step in range(data.num_steps(1.0)):
        work = data.lengths[data.step(step)].sum(axis=1)
        assert work.max() - work.min() <= data.lengths.max()


def test_epochs_count_in_steps():
    assert order(50, 8).num_steps(1.0) == 7
    assert order(48, 8).num_steps(1.0) == 6
    assert order(48, 8).num_steps(0.5) == 3
    assert order(48, 8).num_steps(2.0) == 12
    assert order(665_298, 128, 16).num_steps(1.0) == 5198  # LLaVA's stage 2


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="passes of 3"):
        order(10, 8, 3)
    with pytest.raises(ValueError, match="0 samples"):
        order(0)
