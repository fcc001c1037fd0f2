"""Regions and their descriptions: RefCOCO and Visual Genome to conversations.

A round asks for one of the two: the words for a box, or the box for some words. Boxes are written
[left, top, right, bottom] with two decimals, as shares of the image or of its padded square.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath

from .mixture_fields import Conversation, Fields, Reading, listed, only, unusable
from .mixture_fields import read_json as _json
from .mixture_kinds import RefCocoOptions, RegionOptions, VgOptions
from .mixture_qa import COCO_NAMES

Region = tuple[str, tuple[float, float, float, float]]  # words, box


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as an annotation file describes it; sizes in pixels."""

    name: str
    height: float
    width: float


def read_refcoco(reading: Reading) -> list[Conversation]:
    """RefCOCO, RefCOCO+ and RefCOCOg as MDETR's `finetune_refcoco*_train.json`.

    (The original `refs(unc).p` are pickles, which are not read.) An entry of `images` is one
    expression: caption, file_name, height, width, id; `annotations` hold its box by image_id as
    [left, top, width, height] in pixels. Expressions of one image are put together over all files
    in an order drawn by the seed and cut into segments of `max_turns` rounds.
    """
    options: RefCocoOptions = reading.source.options
    regions: dict[Picture, set[Region]] = defaultdict(set)
    pictures: dict[str, Picture] = {}
    for path in reading.files["expressions"]:
        hook = only("image_id", "bbox")
        whole = Fields(_json(path, hook), path, "")
        boxes = defaultdict(list)
        for fields in whole.objects("annotations"):
            boxes[fields.name("image_id")].append(fields.numbers("bbox", 4))
        for fields in whole.objects("images"):
            key = fields.name("id")
            if key not in boxes:
                raise fields.fault("id", f"{key} has no box in annotations", "give the whole file")
            if len(boxes[key]) > 1:
                reading.skipped["expression: of several boxes"] += 1
                continue
            picture = _picture(fields, _coco_name(fields, options.coco_names), "file_name", reading)
            if pictures.setdefault(picture.name, picture) != picture:
                raise fields.fault("height and width", "differ between records", "mend one of them")
            left, top, width, height = boxes[key][0]
            box = (left, top, left + width, top + height)
            _add(regions[picture], fields.text("caption"), box, picture, reading, "expression")
    conversations = []
    for picture, found in regions.items():
        chosen = reading.drawn(found, len(found), "order", picture.name)
        for start in range(0, len(chosen), options.max_turns):
            part = chosen[start : start + options.max_turns]
            key = f"{picture.name}#{start // options.max_turns}"
            conversations.append(_conversation(key, part, picture, reading))
    return conversations


def _coco_name(fields: Fields, names: str) -> str:
    """The image's name in COCO 2017 or 2014 out of `COCO_train2014_000000000001.jpg`."""
    number = re.search(r"(\d{1,12})\.jpg$", fields.text("file_name"))
    if number is None:
        raise fields.fault("file_name", "ends in no COCO number", "give COCO's own names")
    return COCO_NAMES[names].format(int(number[1]))


def read_vg(reading: Reading) -> list[Conversation]:
    """Visual Genome's region_descriptions.json (`regions`) and image_data.json (`images`).

    Of each image at most `max_regions`, drawn by the seed. The folder, VG_100K or VG_100K_2, is
    that of the image's url.
    """
    options: VgOptions = reading.source.options
    pictures: dict[int, Picture] = {}
    for path in reading.files["images"]:
        for fields in listed(path):
            url = PurePosixPath(fields.text("url"))
            name = f"{url.parent.name}/{url.name}"
            pictures[fields.whole("image_id")] = _picture(fields, name, "url", reading)
    hook = only("phrase", "x", "y", "width", "height")
    conversations: dict[str, Conversation] = {}
    for path in reading.files["regions"]:
        for image in listed(path, hook):
            key = image.whole("id")
            if key not in pictures:
                raise image.fault("id", f"{key} is not in the image file", "give all of it")
            picture, found = pictures[key], set[Region]()
            for fields in image.objects("regions"):
                left, top = fields.number("x"), fields.number("y")
                box = (left, top, left + fields.number("width"), top + fields.number("height"))
                _add(found, fields.text("phrase"), box, picture, reading, "region")
            if picture.name in conversations:
                raise image.fault("id", f"{key} is there twice", "keep one of them")
            chosen = reading.drawn(found, options.max_regions, "regions", picture.name)
            if chosen:
                conversations[picture.name] = _conversation(picture.name, chosen, picture, reading)
            else:
                reading.skipped["image: no region"] += 1
    return list(conversations.values())


def _picture(fields: Fields, name: str, field: str, reading: Reading) -> Picture:
    height, width = fields.whole("height"), fields.whole("width")
    if height < 1 or width < 1:
        raise fields.fault("height and width", f"are {height} and {width}", "give pixels from 1")
    return Picture(reading.image(name, fields, field), height, width)


def _add(
    regions: set[Region],
    words: str,
    box: tuple[float, float, float, float],
    picture: Picture,
    reading: Reading,
    what: str,
) -> None:
    """Add a region, its box cut at the image's edges; what cannot be learned from is counted."""
    left, top, right, bottom = box
    left, right = max(0.0, left), min(picture.width, right)
    top, bottom = max(0.0, top), min(picture.height, bottom)
    words = " ".join(words.split())
    reason = unusable(words)
    if reason:
        reading.skipped[f"{what}: {reason}"] += 1
    elif right <= left or bottom <= top:
        reading.skipped[f"{what}: no area in the image"] += 1
    elif (words, (left, top, right, bottom)) in regions:
        reading.skipped[f"{what}: there twice"] += 1
    else:
        regions.add((words, (left, top, right, bottom)))


def _conversation(
    key: str, regions: list[Region], picture: Picture, reading: Reading
) -> Conversation:
    options: RegionOptions = reading.source.options
    rounds = []
    for words, box in regions:
        place = box_text(box, picture, options.boxes == "square")
        if reading.draw("form", picture.name, words, box) % 2:
            rounds.append((options.describe.replace("{box}", place), words))
        else:
            rounds.append((options.locate.replace("{phrase}", words), place))
    return Conversation(key, picture.name, tuple(rounds))


def box_text(box: tuple[float, float, float, float], picture: Picture, square: bool) -> str:
    """A box in pixels as [left, top, right, bottom] in shares of the image, or of the square that
    it is centred in."""
    height, width = picture.height, picture.width
    side = max(height, width)
    down, across = ((side - height) // 2, (side - width) // 2) if square else (0, 0)
    if square:
        height = width = side
    left, top, right, bottom = box
    shares = (
        (left + across) / width,
        (top + down) / height,
        (right + across) / width,
        (bottom + down) / height,
    )
    return "[" + ", ".join(f"{share:.2f}" for share in shares) + "]"
