"""Scenes, their text and their POPE files: deterministic, true to the pixels, balanced."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_hd.bench.drawing import WORDS, Scene, Thing, Window, render, seen_words, whole
from llava_hd.bench.icons import icon_masks
from llava_hd.bench.scene_text import (
    LIST_QUESTION,
    RESPONSE_PROMPT,
    checklist,
    choose_asked,
    conversation,
    enumeration,
    exist_question,
)
from llava_hd.bench.scenes import (
    CAPTION_STYLE,
    SPLITS,
    STYLE,
    dataset_scene,
    draw_dataset,
    native_pixels,
)
from llava_hd.hd.image import image_size, load_image

TRAIN, TEST = 30, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    draw_dataset(out, TRAIN, TEST, seed=3)
    return out


def questions(data: Path, split: str) -> list[dict]:
    text = (data / "pope" / f"nano_pope_{split}.json").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def word_of(question: str) -> str:
    return question.removesuffix(" in the image?").rsplit(" ", 1)[1]


def words_in(data: Path) -> dict[str, list[str]]:
    table = json.loads((data / "boxes.json").read_text(encoding="utf-8"))
    return {name: [thing["word"] for thing in entry["objects"]] for name, entry in table.items()}


def test_the_same_seed_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path, TRAIN, TEST, seed=3)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert len(files) == 2 * TRAIN + TEST + 6
    for file in files:
        assert (tmp_path / file).read_bytes() == (data / file).read_bytes(), file


def test_a_scene_does_not_depend_on_how_many_are_drawn(data: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path, 2, 1, seed=3)
    name = "images/train_000001.png"
    assert (tmp_path / name).read_bytes() == (data / name).read_bytes()


def test_another_seed_draws_other_scenes() -> None:
    assert dataset_scene(0, "train", 0) != dataset_scene(1, "train", 0)
    parts = [dataset_scene(0, part, 0) for part in ("caption", "train", "test")]
    assert len(set(parts)) == 3


def test_stage_1_shows_the_objects_twice_as_large(data: Path) -> None:
    table = json.loads((data / "boxes.json").read_text(encoding="utf-8"))
    for part, style in (("caption", CAPTION_STYLE), ("train", STYLE), ("test", STYLE)):
        sides = [
            thing["box"][2]
            for name, entry in table.items()
            if name.startswith(part)
            for thing in entry["objects"]
        ]
        assert style.min_side_px <= min(sides) and max(sides) <= style.max_side_px
    assert CAPTION_STYLE.min_side_px == 2 * STYLE.min_side_px
    assert CAPTION_STYLE.max_side_px == 2 * STYLE.max_side_px


def test_icons_differ_from_each_other_even_at_eight_pixels() -> None:
    small = {w: m.reshape(8, 8, 8, 8).mean(axis=(1, 3)) for w, m in icon_masks().items()}
    assert set(small) == set(WORDS) and len(WORDS) >= 12
    for one, other in combinations(WORDS, 2):
        assert np.abs(small[one] - small[other]).mean() > 0.08, (one, other)


def test_objects_lie_inside_apart_and_are_distinct() -> None:
    for index in range(200):
        scene = dataset_scene(7, "train", index)
        assert 3 <= len(scene.things) <= 5
        assert len(set(scene.words)) == len(scene.words)
        for thing in scene.things:
            assert thing.top >= 0 and thing.top + thing.side <= scene.size[0]
            assert thing.left >= 0 and thing.left + thing.side <= scene.size[1]
        for one, other in combinations(scene.things, 2):
            apart_y = max(one.top, other.top) - min(one.top + one.side, other.top + other.side)
            apart_x = max(one.left, other.left) - min(one.left + one.side, other.left + other.side)
            assert max(apart_y, apart_x) > 0


def test_boxes_hold_all_pixels_of_their_objects() -> None:
    for index in range(10):
        scene = dataset_scene(5, "test", index)
        pixels = native_pixels(scene).astype(int)
        empty = native_pixels(Scene(scene.size, scene.ground, ())).astype(int)
        changed = np.abs(pixels - empty).max(axis=2) > 8
        for thing in scene.things:
            top, left = int(thing.top) - 2, int(thing.left) - 2
            side = int(thing.side) + 5
            box = (slice(max(0, top), top + side), slice(max(0, left), left + side))
            # Every icon covers a good part of its box, in a colour unlike the ground's.
            assert changed[box].mean() > 0.1, WORDS[thing.word]
            changed[box] = False
        assert not changed.any()


def test_a_view_is_the_same_scene_at_another_size() -> None:
    scene = dataset_scene(1, "train", 4)
    large = render([scene], [whole(scene)], (224, 224))
    small = render([scene], [whole(scene)], (56, 56))
    pooled = torch.nn.functional.avg_pool2d(large, 4)
    assert (pooled - small).abs().mean() < 0.01
    quarter = render([scene], [Window(0.0, 0.0, 112.0, (0.0, 0.0, 0.0))], (112, 112))
    if scene.size == (224, 224):
        assert torch.allclose(large[..., :112, :112], quarter, atol=1e-3)


def test_outside_the_scene_is_the_pad_colour() -> None:
    scene = Scene((192, 224), (0.2,) * 75, ())
    view = render([scene], [whole(scene, (0.9, 0.1, 0.5))], (112, 112))[0]
    assert torch.allclose(view[:, 0, 5], torch.tensor([0.9, 0.1, 0.5]))
    assert torch.allclose(view[:, 56, 5], torch.full((3,), 0.2))


def test_seen_words_need_most_of_the_object() -> None:
    thing = Thing(2, 40.0, 40.0, 20.0, (1.0, 1.0, 1.0))
    scene = Scene((224, 224), (0.1,) * 75, (thing,))
    pad = (0.0, 0.0, 0.0)
    assert seen_words(scene, Window(0.0, 0.0, 60.0, pad)) == [2]
    assert seen_words(scene, Window(0.0, 0.0, 50.0, pad)) == []
    assert seen_words(scene, Window(47.0, 40.0, 50.0, pad)) == [2]


@pytest.mark.parametrize("split", SPLITS)
def test_pope_files_are_balanced_and_true(data: Path, split: str) -> None:
    lines = questions(data, split)
    known = words_in(data)
    assert [line["question_id"] for line in lines] == list(range(1, 6 * TEST + 1))
    for name, group in _by_image(lines).items():
        assert name.startswith("test_")
        assert Counter(line["label"] for line in group) == {"yes": 3, "no": 3}
        assert len({line["text"] for line in group}) == 6
        for line in group:
            word = word_of(line["text"])
            assert line["text"] == exist_question(word)
            assert (word in known[name]) == (line["label"] == "yes")


def _by_image(lines: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(line["image"], []).append(line)
    assert len(groups) == TEST
    return groups


def test_negatives_follow_their_strategy(data: Path) -> None:
    known = words_in(data)
    train = [set(words) for name, words in known.items() if name.startswith("train")]
    frequency = Counter(word for words in train for word in words)

    def together(word: str, present: list[str]) -> int:
        return sum(word in words and other in words for words in train for other in present)

    for split in ("popular", "adversarial"):
        for name, group in _by_image(questions(data, split)).items():
            asked = [word_of(line["text"]) for line in group if line["label"] == "no"]
            others = [word for word in WORDS if word not in [*known[name], *asked]]
            if split == "popular":
                worst, best = (
                    f([frequency[w] for w in g]) for f, g in ((min, asked), (max, others))
                )
            else:
                worst = min(together(word, known[name]) for word in asked)
                best = max(together(word, known[name]) for word in others)
            assert worst >= best, (split, name)


def test_llava_records_are_true_to_the_boxes(data: Path) -> None:
    known = words_in(data)
    tag = "<image>\n"
    for file, part in (("pretrain.json", "caption"), ("finetune.json", "train")):
        records = json.loads((data / file).read_text(encoding="utf-8"))
        assert len(records) == TRAIN
        assert {record["image"].partition("_")[0] for record in records} == {part}
        for record in records:
            turns = record["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith(tag)
            assert sum(turn["value"].count("<image>") for turn in turns) == 1
            words = known[record["image"]]
            for human, gpt in zip(turns[::2], turns[1::2], strict=True):
                question = human["value"].removeprefix(tag).removesuffix(RESPONSE_PROMPT)
                if question == LIST_QUESTION:
                    assert gpt["value"] == enumeration(words)
                elif question.startswith("Is there"):
                    assert gpt["value"] == ("Yes" if word_of(question) in words else "No")
                else:
                    assert gpt["value"] in (enumeration(words), checklist(words, WORDS))


def test_images_load_at_their_written_size(data: Path) -> None:
    table = json.loads((data / "boxes.json").read_text(encoding="utf-8"))
    for name in ("caption_000001.png", "train_000000.png", "test_000003.png"):
        assert list(image_size(load_image(data / "images" / name))) == table[name]["size"]


def test_frequencies_differ_and_themes_keep_together() -> None:
    scenes = [dataset_scene(0, "train", index) for index in range(600)]
    frequency = Counter(word for scene in scenes for word in scene.words)
    assert frequency["boat"] > 1.5 * frequency["cross"]
    pairs = Counter(pair for scene in scenes for pair in combinations(sorted(scene.words), 2))
    assert pairs["boat", "fish"] > 2 * pairs["fish", "house"]


def test_questions_are_half_yes_and_sentences_use_the_right_article() -> None:
    asked = choose_asked(random.Random(0), ["boat", "star", "key"], 12)
    assert len(asked) == 6 and sum(word in ("boat", "star", "key") for word in asked) == 3
    assert enumeration(["star", "anchor", "boat"]) == "A boat, an anchor and a star."
    assert enumeration(["arrow"]) == "An arrow." and enumeration([]) == "Nothing."
    assert exist_question("anchor") == "Is there an anchor in the image?"
    first = conversation(random.Random(1), ["cup", "key", "moon"], 4)[0][0]
    assert first.endswith(RESPONSE_PROMPT)
