"""The model against transformers' LlavaNext and Llava, and the laws of its packs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    IMAGE_ID,
    PATCH,
    TILE,
    random_image,
    save_llava,
    save_llava_next,
    save_parts,
    tiny_hd,
    tiny_tokenizer,
)
from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil

from llava_hd.hd.errors import UsageError
from llava_hd.hd.plan import plan_image
from llava_hd.hd.tiler import tile_image
from llava_hd.kernels import flash_attention
from llava_hd.model.assemble import assemble
from llava_hd.model.attention import refusal
from llava_hd.model.generate import generate
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import Sample, pack

SIZES = [
    (56, 56), (57, 57), (100, 90), (33, 200), (200, 33), (120, 160),
    (480, 640), (17, 19), (300, 100), (427, 640), (64, 512), (1, 40),
]  # fmt: skip


def sample(model: LlavaHD, size: tuple[int, int], seed: int = 0, extra: int = 0) -> Sample:
    """A prompt about noise of that size: a few words before and behind the image."""
    plan = plan_image(size, model.config.hd)
    tiles = tile_image(random_image(size, seed), plan)
    words = [10 + (seed * 7 + i) % 200 for i in range(6 + extra)]
    ids = [1, *words[:3], *[IMAGE_ID] * plan.num_tokens, *words[3:]]
    return Sample(ids, ids, (plan,), (tiles,), f"sample {seed}")


def text_sample(seed: int = 0, length: int = 9) -> Sample:
    ids = [1, *[10 + (seed * 5 + i) % 200 for i in range(length)]]
    return Sample(ids, ids, name=f"text {seed}")


@pytest.fixture(scope="module", params=["hd448", "hdflex"])
def next_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """transformers' LlavaNext, and ours read from the folder that it saved."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save_llava_next(folder, request.param)
    ours = LlavaHD.from_pretrained(folder)
    assert ours.config.hd == tiny_hd(request.param)
    return ours, theirs


@pytest.fixture(scope="module")
def llava_pair(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("llava")
    theirs = save_llava(folder)
    return LlavaHD.from_pretrained(folder), theirs


def next_inputs(theirs, size: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Pixels and sizes by transformers' own processor."""
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=theirs.config.image_grid_pinpoints,
    )
    made = processor(random_image(size, seed), return_tensors="pt")
    return {"pixel_values": made["pixel_values"], "image_sizes": made["image_sizes"]}


@pytest.mark.parametrize("size", SIZES[:-1])
@torch.no_grad()
def test_features_and_logits_equal_llava_next(next_pair, size: tuple[int, int]) -> None:
    ours, theirs = next_pair
    inputs = next_inputs(theirs, size)
    one = sample(ours, size)
    batch = pack([one], ours.config)

    features = theirs.get_image_features(**inputs).pooler_output[0]
    visual = ours.embeddings(batch)[batch.ids == IMAGE_ID]
    assert (visual - features).abs().max() <= 1e-5

    logits = theirs(input_ids=torch.tensor([one.ids]), **inputs).logits[0]
    assert (ours.logits(batch) - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_features_and_logits_equal_llava(llava_pair, size: tuple[int, int]) -> None:
    ours, theirs = llava_pair
    side = ours.config.hd.tile_px
    processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )
    pixels = processor(random_image(size), return_tensors="pt")["pixel_values"]
    one = sample(ours, size)
    batch = pack([one], ours.config)
    assert sum(i == IMAGE_ID for i in one.ids) == (side // PATCH) ** 2

    features = theirs.get_image_features(pixels).pooler_output[0]
    visual = ours.embeddings(batch)[batch.ids == IMAGE_ID]
    assert (visual - features).abs().max() <= 1e-5

    logits = theirs(input_ids=torch.tensor([one.ids]), pixel_values=pixels).logits[0]
    assert (ours.logits(batch) - logits).abs().max() <= 1e-5


@torch.inference_mode()
def test_greedy_answers_equal_the_oracles_alone_and_in_a_mixed_batch(next_pair) -> None:
    ours, theirs = next_pair
    tokenizer = tiny_tokenizer()
    sizes = [(56, 56), (120, 160), (33, 200)]
    images = [sample(ours, size, seed=i, extra=i) for i, size in enumerate(sizes)]
    expected = []
    for i, (one, size) in enumerate(zip(images, sizes, strict=True)):
        row = theirs.generate(
            input_ids=torch.tensor([one.ids]),
            attention_mask=torch.ones(1, len(one.ids), dtype=torch.int64),
            **next_inputs(theirs, size, seed=i),
            max_new_tokens=12,
            do_sample=False,
        )[0, len(one.ids) :].tolist()
        expected.append(row[: row.index(2)] if 2 in row else row)
    text = text_sample()
    row = theirs.generate(input_ids=torch.tensor([text.ids]), max_new_tokens=12, do_sample=False)
    row = row[0, len(text.ids) :].tolist()
    expected.append(row[: row.index(2)] if 2 in row else row)

    batch = [*images, text]
    assert generate(ours, batch, 12, tokenizer) == expected
    assert [generate(ours, [one], 12, tokenizer)[0] for one in batch] == expected
    assert len({tuple(row) for row in expected}) > 1  # they are not all the same answer


@torch.inference_mode()
def test_greedy_answers_equal_llavas(llava_pair) -> None:
    ours, theirs = llava_pair
    tokenizer = tiny_tokenizer()
    side = ours.config.hd.tile_px
    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    sizes = [(60, 90), (90, 40), (84, 84)]
    samples = [sample(ours, size, seed=i, extra=2 * i) for i, size in enumerate(sizes)]
    expected = []
    for i, (one, size) in enumerate(zip(samples, sizes, strict=True)):
        row = theirs.generate(
            input_ids=torch.tensor([one.ids]),
            attention_mask=torch.ones(1, len(one.ids), dtype=torch.int64),
            pixel_values=processor(random_image(size, i), return_tensors="pt")["pixel_values"],
            max_new_tokens=12,
            do_sample=False,
        )[0, len(one.ids) :].tolist()
        expected.append(row[: row.index(2)] if 2 in row else row)
    assert generate(ours, samples, 12, tokenizer) == expected
    assert [generate(ours, [one], 12, tokenizer)[0] for one in samples] == expected


@torch.no_grad()
def test_samples_of_a_pack_never_see_each_other(next_pair) -> None:
    ours, _ = next_pair
    samples = [sample(ours, (120, 160), 0), text_sample(1), sample(ours, (33, 200), 2)]
    batch = pack(samples, ours.config)
    before = ours.logits(batch)
    first = slice(0, len(samples[0].ids))
    noisy = batch.tiles.clone()
    noisy[: samples[0].plans[0].num_tiles] = 255 - noisy[: samples[0].plans[0].num_tiles]
    ids = batch.ids.clone()
    ids[1:3] = 77
    after = ours.logits(replace(batch, tiles=noisy, ids=ids))
    assert (after[first] - before[first]).abs().max() > 1e-3
    assert torch.equal(after[first.stop :], before[first.stop :])


@torch.no_grad()
def test_a_pack_gives_each_sample_the_logits_that_it_has_alone(next_pair) -> None:
    ours, _ = next_pair
    samples = [text_sample(3), sample(ours, (100, 90), 1), sample(ours, (200, 33), 2)]
    together = ours.logits(pack(samples, ours.config))
    alone = torch.cat([ours.logits(pack([one], ours.config)) for one in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_other_attention_implementations_agree_on_a_pack(attention: str, tmp_path: Path) -> None:
    save_llava_next(tmp_path, "hdflex")
    ours = LlavaHD.from_pretrained(tmp_path)
    other = LlavaHD.from_pretrained(tmp_path, attention=attention)
    samples = [sample(ours, (120, 160), 0), text_sample(1), sample(ours, (33, 200), 2)]
    batch = pack(samples, ours.config)
    torch.testing.assert_close(other.logits(batch), ours.logits(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@torch.no_grad()
def test_another_image_changes_the_other_samples_by_exactly_nothing(
    attention: str, tmp_path: Path
) -> None:
    save_llava_next(tmp_path, "hdflex")
    ours = LlavaHD.from_pretrained(tmp_path, attention=attention)
    packs = [
        pack([text_sample(3), sample(ours, (100, 90), seed), text_sample(4)], ours.config)
        for seed in (1, 2)
    ]
    packs[1] = replace(packs[1], ids=packs[0].ids)  # the words alike, the image another one
    first, second = (ours.logits(batch) for batch in packs)
    words = packs[0].cu_seqlens[1:3].tolist()
    assert not torch.equal(first[words[0] : words[1]], second[words[0] : words[1]])
    assert torch.equal(first[: words[0]], second[: words[0]])
    assert torch.equal(first[words[1] :], second[words[1] :])


@torch.no_grad()
def test_all_layers_share_one_schedule(next_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = next_pair
    batch = pack([sample(ours, (100, 90)), text_sample(1)], ours.config)
    expected = ours.logits(batch)

    def again(*args) -> None:
        raise AssertionError("a layer worked the schedule out again")

    monkeypatch.setattr(flash_attention, "pack_schedule", again)  # what a layer would call
    assert torch.equal(ours.logits(batch), expected)


def test_the_loss_of_a_pack_is_the_sum_of_its_samples_losses(next_pair) -> None:
    ours, _ = next_pair
    samples = [text_sample(3), sample(ours, (100, 90), 1)]
    with torch.no_grad():
        together = ours(pack(samples, ours.config))
        alone = [ours(pack([one], ours.config)) for one in samples]
    assert together.num_label_tokens == sum(one.num_label_tokens for one in alone)
    torch.testing.assert_close(together.loss_sum, sum(one.loss_sum for one in alone))


@torch.no_grad()
def test_the_loss_is_torchs_cross_entropy_over_the_next_tokens(next_pair) -> None:
    ours, _ = next_pair
    one = sample(ours, (100, 90), 1)
    batch = pack([one], ours.config)
    labels = torch.tensor(one.labels)
    logits = ours.logits(batch)
    expected = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    torch.testing.assert_close(ours(batch).loss_sum, expected)


def test_a_text_only_pack_gives_every_trained_part_a_gradient_of_exactly_zero(
    tmp_path: Path,
) -> None:
    save_llava_next(tmp_path, "hd448")
    model = LlavaHD.from_pretrained(tmp_path)
    batch = pack([text_sample()], model.config)
    assert batch.has_dummy and batch.num_images == 0
    model(batch).loss_sum.backward()
    for parameter in model.projector.parameters():
        assert parameter.grad is not None and parameter.grad.eq(0).all()


def test_padding_rows_are_never_projected(next_pair) -> None:
    ours, _ = next_pair
    one = sample(ours, (33, 200))
    batch = pack([one], ours.config)
    plan = one.plans[0]
    kept = plan.num_global_tokens + plan.kept_size[0] * plan.kept_size[1]
    assert len(batch.rows) == kept < plan.num_tiles * plan.config.patches_per_tile


@torch.no_grad()
def test_a_sample_may_hold_two_images(next_pair) -> None:
    ours, _ = next_pair
    first, second = sample(ours, (100, 90), 1), sample(ours, (33, 200), 2)
    both = Sample(
        [*first.ids, *second.ids],
        [*first.labels, *second.labels],
        first.plans + second.plans,
        first.tiles + second.tiles,
    )
    visual = ours.embeddings(pack([both], ours.config))
    apart = torch.cat([ours.embeddings(pack([one], ours.config)) for one in (first, second)])
    torch.testing.assert_close(visual, apart)


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_saving_and_loading_keeps_every_logit(projector: str, tied: bool, tmp_path: Path) -> None:
    parts = save_parts(tmp_path / "parts", tied=tied)
    model, processor = assemble(
        vision=parts / "vision",
        language=parts / "language",
        hd=tiny_hd("hdflex"),
        projector=projector,
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = LlavaHD.from_pretrained(tmp_path / "model")
    batch = pack([sample(model, (120, 160))], model.config)
    assert torch.equal(model.eval().logits(batch), again.logits(batch))
    assert again.config == model.config


def test_the_tower_is_frozen_and_stays_in_eval_mode(next_pair) -> None:
    ours, _ = next_pair
    ours.train()
    assert not ours.vision.training and not any(p.requires_grad for p in ours.vision.parameters())
    ours.eval()


def test_a_tower_of_another_tile_size_is_refused(parts: Path) -> None:
    wrong = replace(tiny_hd("hd448"), tile_px=84)
    with pytest.raises(UsageError, match=r"hd\.tile_px is 84, but the vision tower takes 56"):
        assemble(vision=parts / "vision", language=parts / "language", hd=wrong)


def test_an_unknown_attention_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    save_llava(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'sdpa'"):
        LlavaHD.from_pretrained(tmp_path, attention="spda")


@pytest.mark.skipif(refusal("flash_attention_2") is None, reason="flash-attn is installed")
def test_an_attention_that_cannot_run_here_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_llava(tmp_path)
    with pytest.raises(UsageError, match="flash-attn is not usable here"):
        LlavaHD.from_pretrained(tmp_path, attention="flash_attention_2")
