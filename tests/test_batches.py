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
        pack_tokens=per_pass * 52 if batching == "packs" else None,
    )


ALL = ["packs", "modality", "padded", "plain"]


def flat(data: BatchOrder, step: int) -> np.ndarray:
    return np.concatenate(data.step(step))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    passes=st.integers(1, 4),
    per_pass=st.integers(1, 4),
    batching=st.sampled_from(["packs", "padded", "plain"]),
)
def test_each_epoch_holds_every_sample_once(n, passes, per_pass, batching):
    data = order(n, passes * per_pass, per_pass, batching=batching)
    stream = np.concatenate([data.samples(s) for s in range(data.num_steps(3.0))])
    assert len(stream) >= 3 * n > len(stream) - data.samples_per_step
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 70), passes=st.integers(1, 4), per_pass=st.integers(1, 4))
def test_a_step_by_modality_never_mixes_and_an_epoch_leaves_nothing_out(n, passes, per_pass):
    data = order(n, passes * per_pass, per_pass, batching="modality")
    steps = [data.step(s) for s in range(data.num_steps(1.0))]
    for step in steps:
        assert len(set(data.has_image[np.concatenate(step)])) == 1
    counts = np.bincount(np.concatenate([data.samples(s) for s in range(len(steps))]), minlength=n)
    assert counts.min() >= 1
    assert counts.sum() == len(steps) * data.samples_per_step
    extra = counts.sum() - n
    assert extra <= 2 * (data.samples_per_step - 1)


@pytest.mark.parametrize("has_image", [True, False])
def test_one_kind_alone_can_be_batched_by_modality(has_image):
    data = replace(order(20, batching="modality"), has_image=np.full(20, has_image))
    assert data.num_steps(1.0) == 3
    assert set(np.concatenate([flat(data, s) for s in range(3)])) == set(range(20))


@pytest.mark.parametrize("batching", ALL)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 7])
def test_ranks_share_a_step_out_without_changing_it(batching, world):
    data = order(step=8, per_pass=2, batching=batching)
    for step in range(8):
        parts = [data.passes_of_rank(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {data.num_passes(step, world)}
        assert data.num_passes(step, world) == -(-len(data.step(step)) // world)
        passes = [samples for part in parts for samples in part]
        assert sorted(np.concatenate(passes)) == sorted(data.samples(step))
        assert all(samples.dtype == np.int64 for samples in passes)
        if len(data.step(step)) % world == 0 or batching != "packs":
            given = sorted(tuple(samples) for samples in passes if len(samples))
            assert given == sorted(map(tuple, data.step(step)))


def test_ranks_that_a_step_has_no_pass_for_get_an_empty_one():
    data = order(step=4, per_pass=1)
    passes = [data.passes_of_rank(0, rank, 3) for rank in range(3)]
    assert [[len(samples) for samples in part] for part in passes] == [[1, 1], [1, 0], [1, 0]]
    more = list(PassSampler(data, 2, 3, 0, 1))
    assert len(more) == 2 and more[1] == ()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_packs_keep_their_limit_and_the_passes_at_one_time_are_about_equal(world):
    data = order(400, step=64, per_pass=16, batching="packs")
    for step in range(data.num_steps(1.0)):
        parts = [data.passes_of_rank(step, rank, world) for rank in range(world)]
        for at_once in zip(*parts, strict=True):
            work = [data.lengths[samples].sum() for samples in at_once]
            assert max(work) <= data.pack_tokens
            assert max(work) - min(work) <= data.lengths.max()


def test_packs_by_modality_stay_apart_at_every_number_of_ranks():
    data = order(60, step=8, per_pass=2, batching="modality")
    for step in range(data.num_steps(1.0)):
        for world in (1, 3):
            for rank in range(world):
                for samples in data.passes_of_rank(step, rank, world):
                    assert len(set(data.has_image[samples])) <= 1


@pytest.mark.parametrize("batching", ALL)
def test_a_later_start_continues_the_same_order(batching):
    data = order(batching=batching)
    whole = list(PassSampler(data, 0, 2, 0, 10))
    later = list(PassSampler(order(batching=batching), 0, 2, 6, 10))
    assert whole[-len(later) :] == later
    assert len(whole) == sum(data.num_passes(step, 2) for step in range(10))


@pytest.mark.parametrize("batching", ALL)
def test_random_state_of_the_process_changes_nothing(batching):
    before = [samples.tolist() for samples in order(batching=batching).step(3)]
    np.random.seed(1)
    assert [samples.tolist() for samples in order(batching=batching).step(3)] == before


@pytest.mark.parametrize("batching", ALL)
def test_seed_and_epoch_change_the_order(batching):
    data = order(48, batching=batching)
    assert not np.array_equal(data.samples(0), order(48, seed=4, batching=batching).samples(0))
    assert not np.array_equal(data.samples(0), data.samples(data.num_steps(1.0)))


def test_the_passes_of_a_step_by_modality_have_about_equal_work():
    data = order(400, step=64, per_pass=16, batching="modality")
    for step in range(data.num_steps(1.0)):
        work = np.array([data.lengths[samples].sum() for samples in data.step(step)])
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
    with pytest.raises(ValueError, match="packs needs lengths and pack_tokens"):
        replace(order(batching="packs"), pack_tokens=None)
