"""Images as text: COCO's captions and boxes, in the form of LLaVA's paper (arXiv 2304.08485).

An image becomes its captions, one a line, an empty line, and one line for each box:
`category: [x1, y1, x2, y2]`, shares of width and height with three decimals. Neither the order of
the files nor that of their records matters.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from .mixture_fields import Fields, read_json, unusable
from .record_images import path_fault
from .records import without_collection

HEAVY = ("segmentation", "area", "license", "coco_url", "flickr_url", "date_captured")


@dataclass(frozen=True, slots=True)
class Box:
    """An object: left, top, right, bottom as shares of width and height. group: one box for many
    (COCO's iscrowd)."""

    category: str
    corners: tuple[float, float, float, float]
    group: bool = False

    def line(self) -> str:
        """As the model reads it."""
        kind = f"{self.category} (group)" if self.group else self.category
        return f"{kind}: [{', '.join(f'{value:.3f}' for value in self.corners)}]"

    @property
    def rank(self) -> tuple[float, str]:
        """Sorts large boxes first."""
        left, top, right, bottom = self.corners
        return -(right - left) * (bottom - top), self.line()


@dataclass(frozen=True, slots=True)
class Context:
    """What is known of an image."""

    captions: tuple[str, ...]
    boxes: tuple[Box, ...]

    def text(self) -> str:
        """What the language model reads."""
        blocks = [self.captions, [box.line() for box in self.boxes]]
        return "\n\n".join("\n".join(lines) for lines in blocks if lines)


@dataclass
class Annotations:
    """Contexts by the image's file name; what was left out, by reason."""

    contexts: dict[str, Context] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class _Reading:
    """The files while they are read; images are known by their id."""

    names: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    captions: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    boxes: defaultdict[str, set[Box]] = field(default_factory=lambda: defaultdict(set))
    skipped: Counter[str] = field(default_factory=Counter)


def read_coco(
    captions: Sequence[Path], instances: Sequence[Path], skip_empty: bool = False
) -> Annotations:
    """The images of `captions_*.json` and `instances_*.json` files, brought together by their id.

    An image may lack captions or boxes, but not both: that is a DataError naming it, or with
    `skip_empty` it is left out and counted. Captions without text and boxes without area in the
    image are left out and counted. Raises UsageError, DataError (file, record, field, remedy).
    """
    files = [*captions, *instances]
    if not files:
        raise UsageError("no annotations; give --captions, --instances or both")
    for i, path in enumerate(files):
        if path.resolve() in {other.resolve() for other in files[:i]}:
            raise UsageError(f"{path} is given twice; give each annotation file once")
    reading = _Reading()
    with without_collection():
        for path in captions:
            _read_captions(path, reading)
        for path in instances:
            _read_instances(path, reading)
        return _brought_together(reading, bool(captions), bool(instances), skip_empty)


def _slim(value: dict[str, Any]) -> dict[str, Any]:
    """Outlines and addresses take most of the memory and are not needed."""
    for name in HEAVY:
        value.pop(name, None)
    return value


def _images(whole: Fields, reading: _Reading) -> dict[str, Fields]:
    """The file's images by id; a name that another file knows otherwise is a fault."""
    images = {}
    for entry in whole.objects("images"):
        key, name = entry.name("id"), entry.text("file_name")
        fault = path_fault(name)
        if fault:
            raise entry.fault("file_name", f"{name!r} {fault}", "mend it")
        if reading.names.setdefault(key, name) != name:
            raise entry.fault(
                "file_name",
                f"is {name!r}, but image {key} is {reading.names[key]!r} in {reading.places[key]}",
                "give files of one COCO year",
            )
        reading.places.setdefault(key, entry.where.rstrip(": "))
        images[key] = entry
    return images


def _image_of(entry: Fields, images: dict[str, Fields]) -> str:
    key = entry.name("image_id")
    if key not in images:
        raise entry.fault("image_id", f"{key} is not among the file's images", "is it complete?")
    return key


def _read_captions(path: Path, reading: _Reading) -> None:
    whole = Fields(read_json(path, _slim), path, "")
    images = _images(whole, reading)
    for entry in whole.objects("annotations"):
        key, text = _image_of(entry, images), " ".join(entry.text("caption").split())
        reason = unusable(text)
        if reason:
            reading.skipped[f"caption: {reason}"] += 1
        else:
            reading.captions[key].add(text)


def _read_instances(path: Path, reading: _Reading) -> None:
    whole = Fields(read_json(path, _slim), path, "")
    images = _images(whole, reading)
    sizes = {key: _size(entry) for key, entry in images.items()}
    names = {}
    for entry in whole.objects("categories"):
        name = " ".join(entry.text("name").split())
        if unusable(name):
            raise entry.fault("name", f"is {unusable(name)}", "write the category")
        names[entry.name("id")] = name
    for entry in whole.objects("annotations"):
        key, category = _image_of(entry, images), entry.name("category_id")
        if category not in names:
            raise entry.fault("category_id", f"{category} is no category of the file", "mend it")
        corners = _corners(entry.numbers("bbox", 4), sizes[key])
        if corners is None:
            reading.skipped["box: no area in the image"] += 1
        else:
            group = entry.value.get("iscrowd") in (1, True)
            reading.boxes[key].add(Box(names[category], corners, group))


def _size(entry: Fields) -> tuple[int, int]:
    """(height, width)"""
    height, width = entry.whole("height"), entry.whole("width")
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise entry.fault(name, f"is {value}", "give the pixels, 1 or more")
    return height, width


def _corners(bbox: list[float], size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """COCO's [x, y, width, height] in pixels -> shares within the image; None without area."""
    left, top, wide, high = bbox
    height, width = size

    def share(value: float, whole: int) -> float:
        return round(min(max(value / whole, 0.0), 1.0), 3)

    corners = (
        share(left, width),
        share(top, height),
        share(left + wide, width),
        share(top + high, height),
    )
    has_area = wide > 0 and high > 0 and left < width and top < height
    return corners if has_area and left + wide > 0 and top + high > 0 else None


def _brought_together(
    reading: _Reading, has_captions: bool, has_boxes: bool, skip_empty: bool
) -> Annotations:
    found = Annotations(skipped=reading.skipped)
    owners: dict[str, str] = {}
    for key, name in reading.names.items():
        if owners.setdefault(name, key) != key:
            raise DataError(
                f"{reading.places[key]}: file_name {name!r} belongs to image {owners[name]} too; "
                "give each image its own"
            )
        captions, boxes = reading.captions.get(key, set()), reading.boxes.get(key, set())
        if captions or boxes:
            ordered = sorted(boxes, key=lambda box: box.rank)
            found.contexts[name] = Context(tuple(sorted(captions)), tuple(ordered))
        elif skip_empty:
            found.skipped["image: neither captions nor boxes"] += 1
        else:
            other = "--instances" if not has_boxes else "--captions"
            more = "" if has_captions and has_boxes else f"give {other} too, or "
            raise DataError(
                f"{reading.places[key]}: image {name!r} (id {key}) has neither captions nor boxes; "
                f"{more}leave such images out with --skip-empty"
            )
    if not found.contexts:
        raise DataError("images: the annotation files have none to ask about; give other files")
    return found
