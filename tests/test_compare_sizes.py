"""F1 by the size of objects: boxes read, groups formed, figures against counting by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_hd.bench.compare_sizes import GROUPS, BySize, by_size, read_sizes, size_asked
from llava_hd.bench.pope import score
from llava_hd.bench.pope_data import Answered
from llava_hd.bench.scenes import draw_dataset
from llava_hd.hd.errors import DataError, UsageError

THINGS = ("ant", "bus", "cow")
FLIP = {"yes": "no", "no": "yes"}


def make(folder: Path, num_images: int = 30) -> tuple[Path, list[Answered]]:
    """Images of 100 px with three objects of sides 10, 20 and 40, and three that are not there."""
    boxes: dict[str, Any] = {}
    items = []
    for image in range(num_images):
        name = f"{image}.png"
        objects = []
        for place, word in enumerate(THINGS):
            side = (10, 20, 40)[(place + image) % 3]
            objects.append({"word": word, "box": [1, 2, side, side]})
            items.append((name, word, "yes"))
            items.append((name, f"no {word}", "no"))
        boxes[name] = {"size": [100, 100], "objects": objects}
    path = folder / "boxes.json"
    path.write_text(json.dumps(boxes))
    return path, [
        Answered("random", n, image, f"Is there a {word} in the image?", label, label)
        for n, (image, word, label) in enumerate(items)
    ]


def wrong(items: list[Answered], rate: float, seed: int) -> list[Answered]:
    rng = random.Random(seed)
    return [replace(x, text=FLIP[x.label]) if rng.random() < rate else x for x in items]


def group_of(found: BySize, name: str) -> Any:
    return {group.name: group for group in found.groups}[name]


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    path, items = make(tmp_path)
    a, b = wrong(items, 0.3, 1), wrong(items, 0.1, 2)
    found = by_size({"a": a, "b": b}, path, resamples=300)
    sizes = read_sizes(path)
    false = {name: sum(x.text == "yes" != x.label for x in s) for name, s in (("a", a), ("b", b))}
    for name, side in zip(GROUPS, (0.1, 0.2, 0.4), strict=True):
        group = group_of(found, name)
        assert (group.low, group.high, group.questions) == (side, side, 30)
        for model, answers in (("a", a), ("b", b)):
            of = [x for x in answers if size_asked(x, sizes) == side]
            true = sum(x.text == "yes" for x in of)
            missed = len(of) - true
            f1 = 2 * true / (2 * true + missed + false[model] * 30 / 90)
            assert group.f1[model].value == pytest.approx(f1)
            assert group.recall[model].value == pytest.approx(true / 30)
            assert group.f1[model].low <= f1 <= group.f1[model].high
        gap = group.difference["b"]
        assert gap.value == pytest.approx(group.f1["b"].value - group.f1["a"].value)
        assert gap.low <= gap.value <= gap.high and gap.p is not None
        assert set(group.difference) == {"b"}


def test_with_equal_recall_every_group_has_the_f1_of_the_whole(tmp_path: Path) -> None:
    path, items = make(tmp_path)
    a = [replace(x, text=FLIP[x.label]) if int(x.image[:-4]) % 5 == 0 else x for x in items]
    found = by_size({"a": a, "b": items}, path, resamples=100)
    for group in found.groups:
        assert group.f1["a"].value == pytest.approx(score(a).f1)


def test_a_model_that_misses_small_objects_shows_it(tmp_path: Path) -> None:
    path, items = make(tmp_path)
    sizes = read_sizes(path)
    blind = [
        replace(x, text="no") if size_asked(x, sizes) == 0.1 and int(x.image[:-4]) % 2 else x
        for x in items
    ]
    found = by_size({"blind": blind, "good": items}, path, resamples=300)
    assert group_of(found, "small").difference["good"].clear
    for name in GROUPS[1:]:
        assert group_of(found, name).difference["good"].value == 0


def test_objects_without_a_box_are_counted_and_left_out(tmp_path: Path) -> None:
    path, items = make(tmp_path)
    stranger = replace(items[0], question_id="x", question="Is there a yak in the image?")
    other = replace(items[0], question_id="y", question="What is it?")
    sides = {"a": [*items, stranger, other], "b": [*items, stranger, other]}
    assert by_size(sides, path, resamples=10).unknown == 2


def test_few_images_show_no_interval(tmp_path: Path) -> None:
    path, items = make(tmp_path, num_images=5)
    found = by_size({"a": items, "b": items}, path, resamples=50)
    assert all(group.f1["a"].few_images for group in found.groups)


def test_the_largest_of_several_objects_counts(tmp_path: Path) -> None:
    objects = [{"word": "ant", "box": [0, 0, side, side]} for side in (5, 30, 10)]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"a.png": {"size": [60, 60], "objects": objects}}))
    assert read_sizes(path) == {"a.png": {"ant": 0.5}}


def test_drawn_scenes_know_every_object_that_is_asked_about(tmp_path: Path) -> None:
    draw_dataset(tmp_path, train=2, test=3, seed=0)
    sizes = read_sizes(tmp_path / "boxes.json")
    lines = (tmp_path / "pope" / "nano_pope_random.json").read_text().splitlines()
    for line in map(json.loads, lines):
        item = Answered("random", line["question_id"], line["image"], line["text"], "yes", "")
        assert (size_asked(item, sizes) is not None) == (line["label"] == "yes")


def test_cocos_instances_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "x.jpg", "height": 100, "width": 200}],
                "categories": [{"id": 1, "name": "dining table"}],
                "annotations": [
                    {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 100, 50]},
                    {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 20, 10]},
                ],
            }
        )
    )
    assert read_sizes(path)["x.jpg"] == {"dining table": pytest.approx(math.sqrt(0.25))}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not boxes by image"),
        ("{", "not JSON"),
        ('{"a": {"size": [0, 5], "objects": []}}', "size is"),
        ('{"a": {"size": [5, 5], "objects": [{"word": "x", "box": [1, 2, 3]}]}}', "box has 3"),
        ('{"a": {"size": [5, 5], "objects": [{"word": "x", "box": [1, 2, 0, 3]}]}}', "no area"),
        ('{"a": {"size": [5, 5]}}', "objects is missing"),
        ('{"a": {"size": [5, 5], "objects": []}}', "no box of any object"),
    ],
)
def test_bad_boxes_are_told_by_file_and_field(tmp_path: Path, content: str, said: str) -> None:
    path, items = make(tmp_path)
    path.write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        by_size({"a": items, "b": items}, path, resamples=10)
    assert str(path) in str(caught.value)


def test_a_missing_file_of_boxes_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_sizes(tmp_path / "none.json")
