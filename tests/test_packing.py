"""Laws of the pack: what goes in comes out, and nothing leaks over a seam."""

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


def test_placeholders_that_differ_from_the_plan_are_named() -> None:
    good = make([(100, 90)], 4, 7)
    bad = Sample(good.ids[1:5], good.labels[1:5], good.plans, good.tiles, "photo 12")
    with pytest.raises(ValueError, match=r"photo 12: 4 image placeholders for \d+ visual tokens"):
        pack([bad], CONFIG)


def test_a_plan_for_another_geometry_is_refused() -> None:
    plan = plan_image((100, 90), tiny_hd("hd448"))
    tiles = tile_image(random_image((100, 90)), plan)
    ids = [1, *[IMAGE_ID] * plan.num_tokens, 9]
    with pytest.raises(ValueError, match="photo 14: planned for another geometry"):
        pack([Sample(ids, ids, (plan,), (tiles,), "photo 14")], CONFIG)


def test_tiles_that_differ_from_the_plan_are_named() -> None:
    good = make([(100, 90)], 4, 7)
    with pytest.raises(ValueError, match="0 tiles for"):
        pack([Sample(good.ids, good.labels, good.plans, (), "photo 13")], CONFIG)
