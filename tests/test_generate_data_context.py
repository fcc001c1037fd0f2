"""COCO's annotations as the text that `data generate` shows to the model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from coco_files import coco_values, write_coco

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.train.generate_context import read_coco


def written(folder: Path, captions: Any, instances: Any) -> tuple[list[Path], list[Path]]:
    for name, values in (("c.json", captions), ("i.json", instances)):
        (folder / name).write_text(json.dumps(values))
    return [folder / "c.json"], [folder / "i.json"]


def test_an_image_becomes_its_captions_and_its_boxes_as_shares(tmp_path: Path) -> None:
    captions, instances = coco_values(3)
    more = {"id": 9, "image_id": 11, "category_id": 2, "bbox": [0, 0, 640, 479.9], "iscrowd": 0}
    instances["annotations"].append(more)
    captions["annotations"].append({"id": 9, "image_id": 11, "caption": "A  big\tdog."})
    found = read_coco(*written(tmp_path, captions, instances))
    assert found.contexts["000000000011.jpg"].text() == (
        "A  big\tdog.\nA cat number 1 in a quiet place.\n\n".replace("  ", " ").replace("\t", " ")
        + "traffic light: [0.000, 0.000, 1.000, 1.000]\n"
        + "traffic light (group): [0.102, 0.100, 0.602, 0.601]"
    )
    assert found.contexts["000000000010.jpg"].text() == "dog: [0.100, 0.100, 0.600, 0.601]"
    assert found.contexts["000000000012.jpg"].text() == "A boat number 2 in a quiet place."
    assert not found.skipped


def test_the_order_of_the_records_does_not_matter(tmp_path: Path) -> None:
    values = coco_values(6)
    first = read_coco(*written(tmp_path, *values))
    for one in values:
        for name in one:
            random.Random(1).shuffle(one[name])
    assert read_coco(*written(tmp_path, *values)).contexts == first.contexts


def test_boxes_are_cut_at_the_image_and_those_without_area_left_out(tmp_path: Path) -> None:
    captions, instances = coco_values(2)
    boxes = ([-64, 240, 128, 480], [10, 10, 0, 5], [640, 0, 10, 10], [-20, 0, 10, 10])
    instances["annotations"] = [
        {"id": i, "image_id": 10, "category_id": 1, "bbox": bbox} for i, bbox in enumerate(boxes)
    ]
    found = read_coco(*written(tmp_path, captions, instances))
    assert found.contexts["000000000010.jpg"].text() == "dog: [0.000, 0.500, 0.100, 1.000]"
    assert found.skipped == {"box: no area in the image": 3}


def test_an_image_with_neither_captions_nor_boxes_is_named_or_left_out(tmp_path: Path) -> None:
    captions, instances = coco_values(4)
    captions["annotations"] = [one for one in captions["annotations"] if one["image_id"] != 13]
    files = written(tmp_path, captions, instances)
    with pytest.raises(DataError, match=r"'000000000013.jpg' \(id 13\) has neither.*--skip-empty"):
        read_coco(*files)
    found = read_coco(*files, skip_empty=True)
    assert found.skipped == {"image: neither captions nor boxes": 1} and len(found.contexts) == 3
    with pytest.raises(DataError, match=r"give --instances too, or leave"):
        read_coco(files[0], [])


def _spoil(values: Any, place: tuple[Any, ...], new: Any) -> None:
    for key in place[:-1]:
        values = values[key]
    values[place[-1]] = new


@pytest.mark.parametrize(
    ("file", "place", "new", "message"),
    [
        (
            0,
            ("images", 1, "file_name"),
            "/etc/a.jpg",
            r"c.json: images\[1\]: file_name .* absolute",
        ),
        (0, ("images", 1, "file_name"), "../a.jpg", r"leaves the image folder"),
        (0, ("images", 1, "file_name"), "b.jpg", r"i.json: images\[1\]: .* is 'b.jpg' in .*c.json"),
        (0, ("images", 1, "id"), 10, r"file_name .* give files of one COCO year"),
        (0, ("annotations", 0, "image_id"), 99, r"image_id 99 is not among"),
        (0, ("annotations", 0, "caption"), None, r"annotations\[0\]: caption is null; give text"),
        (0, ("annotations", 0), {"id": 1, "image_id": 11}, r"caption is missing"),
        (0, ("annotations",), {}, r"annotations is an object; give a list"),
        (1, ("images", 0, "height"), 0, r"height is 0; give the pixels"),
        (1, ("annotations", 0, "bbox"), [1, 2, 3], r"bbox has 3 values"),
        (1, ("annotations", 0, "bbox", 0), "a", r"bbox holds text; give a finite number"),
        (1, ("annotations", 0, "category_id"), 7, r"category_id 7 is no category"),
        (1, ("categories", 0, "name"), " ", r"name is empty text"),
    ],
)
def test_a_faulty_annotation_is_named(
    tmp_path: Path, file: int, place: tuple[Any, ...], new: Any, message: str
) -> None:
    values = coco_values(3)
    _spoil(json_values := json.loads(json.dumps(values)), (file, *place), new)
    with pytest.raises(DataError, match=message) as caught:
        read_coco(*written(tmp_path, *json_values))
    assert "\n" not in str(caught.value)


def test_the_wrong_files_are_told(tmp_path: Path) -> None:
    captions, instances = write_coco(tmp_path)
    with pytest.raises(DataError, match="caption is missing"):
        read_coco([instances], [])
    with pytest.raises(DataError, match=r"categories is missing"):
        read_coco([], [captions])
    with pytest.raises(UsageError, match="given twice"):
        read_coco([captions, captions], [])
    with pytest.raises(UsageError, match="give --captions, --instances or both"):
        read_coco([], [])
    with pytest.raises(UsageError, match="cannot be read"):
        read_coco([tmp_path / "none.json"], [])
