"""The nano parts: what is shipped, what it can do, and that it can be built again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from llava_hd.bench.drawing import MAX_OBJECTS, WORDS, draw_scene, whole
from llava_hd.bench.nano import PARTS, TOWERS, build, text_accuracy
from llava_hd.bench.nano_lm import Encoder, LanguageRecipe, collate, draw_text
from llava_hd.bench.nano_loop import Recipe, train
from llava_hd.bench.nano_probe import area, probe_tower
from llava_hd.bench.nano_towers import TowerRecipe, contrastive_loss, draw_batch, draw_window
from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError
from llava_hd.model.nano import (
    SHIPPED,
    SPECIAL_TOKENS,
    VOCABULARY,
    new_clip,
    new_language,
    scale_language,
    scale_tower,
)
from llava_hd.model.prompt import IGNORE, get_template


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED / "lm")


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((SHIPPED / "nano.json").read_text(encoding="utf-8"))


def test_shipped_parts_fit_into_six_megabytes() -> None:
    total = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    assert total <= 6_000_000
    assert {path.name for path in SHIPPED.iterdir()} == {*PARTS, "nano.json"}


@pytest.mark.parametrize("part", TOWERS)
def test_shipped_towers_load_whole(part: str) -> None:
    tower, report = CLIPVisionModel.from_pretrained(SHIPPED / part, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = TOWERS[part]
    assert (tower.config.image_size, tower.config.patch_size) == (config.tile_px, config.patch_px)
    for tensor in load_file(SHIPPED / part / "model.safetensors").values():
        assert tensor.isfinite().all()


def test_both_towers_had_the_same_budget_and_recipe(facts: dict) -> None:
    one, other = (facts[part] for part in TOWERS)
    assert one["images_seen"] == other["images_seen"] > 0
    sizes = {part: facts[part]["recipe"].pop("tile_px") for part in TOWERS}
    assert sizes == {part: config.tile_px for part, config in TOWERS.items()}
    assert one["recipe"] == other["recipe"]


def test_shipped_weights_were_made_by_the_defaults(facts: dict) -> None:
    recipes = {"lm": LanguageRecipe()}
    recipes |= {part: TowerRecipe(tile_px=config.tile_px) for part, config in TOWERS.items()}
    for part, recipe in recipes.items():
        for key, value in facts[part]["recipe"].items():
            assert vars(recipe)[key] == value, (part, key)


def test_every_object_word_is_one_token_and_nothing_is_unknown(tokenizer) -> None:
    for word in WORDS:
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
    text = "Ünïcode \t 漢字 <none> 🐟\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[1:]) == text


def test_special_tokens_lie_inside_the_vocabulary(tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(SPECIAL_TOKENS)))
    assert len(tokenizer) <= VOCABULARY
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "lm")
    assert model.config.vocab_size == VOCABULARY
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_shipped_language_model_answers_questions_about_text_scenes(tokenizer) -> None:
    language = AutoModelForCausalLM.from_pretrained(SHIPPED / "lm", dtype=torch.float32).eval()
    assert text_accuracy(language, tokenizer, seed=99, texts=60) >= 0.95


@pytest.mark.parametrize("part", TOWERS)
def test_shipped_towers_tell_objects_apart(part: str) -> None:
    tower = CLIPVisionModel.from_pretrained(SHIPPED / part, dtype=torch.float32).eval()
    clip = new_clip(TOWERS[part].tile_px, len(WORDS), MAX_OBJECTS).eval()
    clip.vision_model.load_state_dict(tower.state_dict())
    areas = probe_tower(clip, TOWERS[part], train=250, test=80)
    assert areas["large"] > 0.9


def test_scaling_the_streams_changes_only_the_hidden_states(tokenizer) -> None:
    torch.manual_seed(0)
    clip = new_clip(56, len(WORDS), MAX_OBJECTS).eval()
    views, ids = torch.rand(2, 3, 56, 56), torch.tensor([[1, 7, 9, 4]])
    language = new_language(tokenizer).eval()
    with torch.no_grad():
        for parameter in [*clip.parameters(), *language.parameters()]:
            parameter.add_(0.1 * torch.randn(parameter.shape))  # biases begin at zero
        before = clip.vision_model(pixel_values=views, output_hidden_states=True)
        logits = language(input_ids=ids).logits
        scale_tower(clip, 4.0)
        scale_language(language, 4.0)
        after = clip.vision_model(pixel_values=views, output_hidden_states=True)
        assert torch.allclose(language(input_ids=ids).logits, logits, atol=1e-3)
    wanted = 4 * before.hidden_states[-2]
    assert (after.hidden_states[-2] - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert torch.allclose(after.pooler_output, before.pooler_output, atol=1e-3)


def test_windows_open_from_one_object_to_the_whole_scene() -> None:
    rng = random.Random(0)
    scenes = [draw_scene(rng) for _ in range(200)]
    early = [draw_window(rng, scene, 0.0).side for scene in scenes]
    late = [draw_window(rng, scene, 1.0) for scene in scenes]
    assert max(early) < 56 * 1.15 + 9
    frames = [whole(scene).side for scene in scenes]
    shares = [window.side / frame for window, frame in zip(late, frames, strict=True)]
    assert sum(share == 1 for share in shares) > 40
    assert sum(share == 0.5 for share in shares) > 40


def test_both_towers_see_the_same_captions_and_scenes() -> None:
    small, large = (draw_batch(TowerRecipe(tile_px=px, batch=8), 2500) for px in (56, 84))
    assert torch.equal(small[1], large[1]) and torch.equal(small[2], large[2])
    shrunk = torch.nn.functional.interpolate(large[0], (56, 56), mode="area")
    assert torch.corrcoef(torch.stack([shrunk.flatten(), small[0].flatten()]))[0, 1] > 0.95


def test_equal_captions_are_no_negatives_of_each_other() -> None:
    torch.manual_seed(0)
    clip = new_clip(56, len(WORDS), MAX_OBJECTS)
    views, ids, sets = draw_batch(TowerRecipe(batch=4), 10)
    same = [t[:1].repeat(4, *[1] * (t.ndim - 1)) for t in (views, ids, sets)]
    assert contrastive_loss(clip, *same).abs() < 1e-4
    assert contrastive_loss(clip, views, ids, sets) > 0.1


def test_area_is_the_share_of_ordered_pairs() -> None:
    present, absent = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([0.0, 1.0])
    assert area(present, absent) == pytest.approx((1 + 2 + 0) / 6)


def test_text_labels_cover_answers_and_never_the_map(tokenizer) -> None:
    encode, rng = Encoder(tokenizer), random.Random(0)
    end = tokenizer.eos_token_id
    for plain in (0.0, 1.0):
        recipe = LanguageRecipe(plain_share=plain)
        texts = [draw_text(rng, encode, recipe, 1.0) for _ in range(20)]
        for text in texts:
            stop = text.map_range[1]
            assert set(text.labels[:stop]) == {IGNORE}
            answers = tokenizer.decode([x for x in text.labels if x not in (IGNORE, end)])
            assert ("Yes" in answers or "No" in answers) != bool(plain)
            # Built from pieces, yet the same ids as the whole text tokenised at once.
            whole_text = tokenizer.decode(text.ids[1:])
            assert get_template("plain" if plain else "vicuna_v1").system in whole_text
            assert tokenizer(whole_text).input_ids == text.ids
        ids, labels, places = collate(texts, tokenizer.pad_token_id)
        assert ids.shape == labels.shape == places.shape
        assert places.sum() == sum(t.map_range[1] - t.map_range[0] for t in texts)


def test_a_cut_run_ends_with_the_weights_of_an_uncut_one(tmp_path: Path) -> None:
    recipe = Recipe(steps=4, batch=2, muon_lr=0.01, adamw_lr=0.01, weight_decay=0.1, warmup_steps=2)

    def run(path: Path, fail_at: int | None) -> torch.nn.Module:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))

        def loss_of(step: int) -> torch.Tensor:
            if step == fail_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return (module(x) - x.sum(1, keepdim=True)).square().mean()

        is_matrix = "0.weight".__eq__
        train("test", module, recipe, is_matrix, loss_of, path, lambda line: None, save_every=2)
        return module

    uncut = run(tmp_path / "uncut.pt", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.pt", 3)
    resumed = run(tmp_path / "cut.pt", None)
    for one, other in zip(uncut.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_three_steps_build_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    build(tmp_path, PARTS, 0, 3, 3, lines.append, probe_scenes=(20, 10))
    written = json.loads((tmp_path / "nano.json").read_text(encoding="utf-8"))
    assert set(written) == set(PARTS)
    for part in TOWERS:
        CLIPVisionModel.from_pretrained(tmp_path / part)
        assert written[part]["images_seen"] == 3 * TowerRecipe.batch
    AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert any("step 3 of 3" in line for line in lines)
    # Given again with other steps, the checkpoint is refused by name.
    code = main(["nano", "build", "--out", str(tmp_path), "--parts", "tower56", "--steps", "4"])
    assert code == 2
    assert "another steps" in capsys.readouterr().err


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tower99.*tower56"):
        build(tmp_path, ["tower99"], 0, 1, 1, print)
