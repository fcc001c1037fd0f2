"""Laws of the pack: what goes in comes out, and nothing leaks over a seam."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import IMAGE_ID, random_image, text_config, tiny_hd, vision_config

from llava_hd.hd.merge import ROW_END, visual_source
from llava_hd.hd.plan import plan_image
from llava_hd.hd.tiler import tile_image
from llava_hd.kernels.place_rows import TEXT
from llava_hd.model.config import LlavaHDConfig
from llava_hd.model.packing import Sample, pack
from llava_hd.model.prompt import IGNORE

CONFIG = LlavaHDConfig(
    hd=tiny_hd("hdflex"),
    vision=vision_config().to_dict(),
    text=text_config().to_dict(),
    image_token_id=IMAGE_ID,
)
SIZE = st.tuples(st.integers(1, 300), st.integers(1, 300))


def make(sizes: list[tuple[int, int]], words: int, number: int) -> Sample:
    plans = tuple(plan_image(size, CONFIG.hd) for size in sizes)
    tiles = tuple(tile_image(random_image(p.image_size, number), p) for p in plans)
    ids = [1]
    for plan in plans:
        ids += [IMAGE_ID] * plan.num_tokens + [20 + number]
    ids += list(range(30, 30 + words))
    labels = [IGNORE] * (len(ids) - words) + ids[len(ids) - words :]
    return Sample(ids, labels, plans, tiles, f"sample {number}")


@given(st.lists(st.tuples(st.lists(SIZE, max_size=2), st.integers(1, 5)), min_size=1, max_size=4))
def test_every_sample_is_found_again_in_the_pack(recipes: list) -> None:
    samples = [make(sizes, words, i) for i, (sizes, words) in enumerate(recipes)]
    batch = pack(samples, CONFIG)
    ends = batch.cu_seqlens.tolist()
    patches = CONFIG.hd.patches_per_tile
    first_row = 0
    for number, sample in enumerate(samples):
        part = slice(ends[number], ends[number + 1])
        assert batch.ids[part].tolist() == list(sample.ids)
        assert batch.positions[part].tolist() == list(range(len(sample.ids)))
        expected = np.full(len(sample.ids), TEXT)
        tables = []
        for plan in sample.plans:
            table = visual_source(plan)
            tables.append(np.where(table == ROW_END, ROW_END, table + first_row))
            first_row += plan.num_tiles * patches
        if tables:
            expected[np.asarray(sample.ids) == IMAGE_ID] = np.concatenate(tables)
        source = batch.source[part]
        found = torch.where(source >= 0, batch.rows[source.clamp(min=0)], source)
        assert found.tolist() == expected.tolist()
    if first_row:
        assert len(batch.tiles) * patches == first_row
        assert sorted(batch.source[batch.source >= 0].tolist()) == list(range(len(batch.rows)))


@given(st.lists(st.integers(2, 6), min_size=1, max_size=5))
def test_targets_are_the_next_labels_inside_each_sample(lengths: list[int]) -> None:
    samples = [Sample(range(9, 9 + n), range(9, 9 + n), name=str(n)) for n in lengths]
    batch = pack(samples, CONFIG)
    assert batch.num_label_tokens == sum(n - 1 for n in lengths)
    assert batch.targets.tolist() == (batch.ids[batch.label_rows] + 1).tolist()
    last = (batch.cu_seqlens[1:] - 1).tolist()
    assert not set(last) & set(batch.label_rows.tolist())


def test_a_text_only_pack_has_one_dummy_tile_that_is_placed_nowhere() -> None:
    batch = pack([make([], 4, 0), make([], 3, 1)], CONFIG)
    assert batch.has_dummy and batch.num_images == 0
    assert batch.tiles.shape == (1, 3, 56, 56) and batch.tiles.eq(0).all()
    assert batch.rows.tolist() == [0] and batch.source.eq(TEXT).all()


def test_no_samples_give_a_dummy_pack_without_labels() -> None:
    batch = pack([], CONFIG)
    assert batch.num_samples == batch.num_label_tokens == batch.loss_units == 0
    assert batch.num_tokens == batch.num_padding == 1 and batch.num_useful_tokens == 0
    assert batch.has_dummy and batch.source.eq(TEXT).all() and batch.names == ()
    assert batch.cu_seqlens.tolist() == [0, 1] and batch.weights.dtype == torch.float32


@given(st.lists(st.tuples(st.lists(SIZE, max_size=2), st.integers(1, 5)), min_size=1, max_size=4))
def test_padding_fills_every_sample_up_to_the_longest_and_changes_no_sample(recipes: list) -> None:
    samples = [make(sizes, words, i) for i, (sizes, words) in enumerate(recipes)]
    plain, padded = pack(samples, CONFIG), pack(samples, CONFIG, padded=True)
    longest = max(len(sample.ids) for sample in samples)
    assert padded.num_tokens == longest * len(samples) == plain.num_tokens + padded.num_padding
    assert padded.num_useful_tokens == plain.num_tokens and padded.num_samples == len(samples)
    assert padded.names == plain.names and torch.equal(padded.rows, plain.rows)
    assert torch.equal(padded.targets, plain.targets)
    seams = set(padded.cu_seqlens.tolist())
    for number, sample in enumerate(samples):
        start, end = longest * number, longest * number + len(sample.ids)
        assert {start, end} <= seams  # the padding is a sequence of its own
        assert padded.ids[start:end].tolist() == list(sample.ids)
        assert padded.positions[start:end].tolist() == list(range(len(sample.ids)))
        filler = slice(end, longest * (number + 1))
        assert padded.source[filler].eq(TEXT).all()
        assert not padded.ids[filler].eq(IMAGE_ID).any()
        ours = plain.source[plain.cu_seqlens[number] : plain.cu_seqlens[number + 1]]
        assert torch.equal(padded.source[start:end], ours)


def test_padding_is_no_image_where_the_image_token_is_the_first_id() -> None:
    config = dataclasses.replace(CONFIG, image_token_id=0)
    samples = [Sample([5, 6, 7], [5, 6, 7]), Sample([5], [5])]
    assert pack(samples, config, padded=True).ids.tolist() == [5, 6, 7, 5, 1, 1]
    assert pack([], config).ids.tolist() == [1]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_weights_make_the_mean_over_tokens_or_over_samples(lengths: list[int]) -> None:
    samples = [Sample(range(9, 9 + n), range(9, 9 + n), name=str(n)) for n in lengths]
    by_token, by_sample = pack(samples, CONFIG), pack(samples, CONFIG, "sample")
    counts = [n - 1 for n in lengths if n > 1]  # of one token alone nothing is learned
    assert by_token.loss_units == sum(counts) and by_token.weights.eq(1).all()
    assert by_sample.loss_units == len(counts)
    wanted = [1 / n for n in counts for _ in range(n)]
    assert by_sample.weights.tolist() == pytest.approx(wanted)


def test_placeholders_that_differ_from_the_plan_are_named() -> None:
    good = make([(100, 90)], 4, 7)
    bad = Sample(good.ids[1:5], good.labels[1:5], good.plans, good.tiles, "photo 12")
    with pytest.raises(ValueError, match=r"photo 12: 4 image placeholders for \d+ visual tokens"):
        pack([bad], CONFIG)


def test_a_plan_for_another_geometry_is_refused() -> None:
    plan = plan_image((100, 90), tiny_hd("hdflex-paper"))
    tiles = tile_image(random_image((100, 90)), plan)
    ids = [1, *[IMAGE_ID] * plan.num_tokens, 9]
    with pytest.raises(ValueError, match="photo 14: planned for another geometry"):
        pack([Sample(ids, ids, (plan,), (tiles,), "photo 14")], CONFIG)


def test_tiles_that_differ_from_the_plan_are_named() -> None:
    good = make([(100, 90)], 4, 7)
    with pytest.raises(ValueError, match="0 tiles for"):
        pack([Sample(good.ids, good.labels, good.plans, (), "photo 13")], CONFIG)
