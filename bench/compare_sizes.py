"""F1 by the size of the object asked about, where boxes are known.

The questions whose label is yes fall into three groups of about equal number by the size of their
object: small, middle, large. A question whose label is no asks about nothing that is there, so it
has no size; each group is scored with its share of *all* false yes answers:

    F1 = 2 true / (true + missed + true + false x group / labelled yes)

which is the F1 of a test with the group's positives and as many negatives for each of them as in
the whole. Recall needs no such share. An object's size is the square root of its box's share of the
image, 1 for the whole image: all models scale images. Of several objects of the same name the
largest counts, because one is enough for a yes.

Boxes come from the drawn scenes' boxes.json or from COCO's instances_*.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..hd.errors import DataError
from ..train.generate_context import read_coco
from ..train.mixture_fields import Fields, kind_of, read_json
from .bootstrap import MIN_IMAGES, Estimate, estimate, resampled
from .compare import Readings, read_all
from .pope_data import Answered

BOXES = "boxes.json"  # beside the folder of the drawn images
GROUPS = ("small", "middle", "large")
ASKED = re.compile(r"Is there (?:an? )?(.+?) in the iman?ge\?")

Sizes = dict[str, dict[str, float]]  # image -> object -> size of its largest box, 0 to 1
TRUE, LABELLED, FALSE = range(3)


@dataclass(frozen=True)
class SizeGroup:
    """Objects from `low` to `high` (sizes, see the module): figures by model, and the differences
    of F1 from the first model's."""

    name: str
    low: float
    high: float
    questions: int
    images: int
    f1: dict[str, Estimate]
    recall: dict[str, Estimate]
    difference: dict[str, Estimate]


@dataclass(frozen=True)
class BySize:
    """The groups; boxes: their file; unknown: questions labelled yes whose object has no box."""

    boxes: str
    groups: tuple[SizeGroup, ...]
    unknown: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def read_sizes(path: Path) -> Sizes:
    """Sizes of the objects of all images, from boxes.json or COCO's instances.

    Raises UsageError for a file that cannot be read, DataError naming file, image and field.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: is {kind_of(values)}, not boxes by image; is it another file?")
    if "annotations" in values and "categories" in values:
        return _coco_sizes(path)
    sizes: Sizes = {}
    for image, value in values.items():
        entry = Fields(value, path, f"image {image!r:.80}")
        whole = entry.numbers("size", 2)
        if min(whole) <= 0:
            raise entry.fault("size", f"is {whole}", "give height and width in pixels")
        objects = sizes.setdefault(image, {})
        for thing in entry.objects("objects"):
            height, width = thing.numbers("box", 4)[2:]
            if min(height, width) <= 0:
                raise thing.fault("box", "has no area", "give top, left, height and width")
            share = min(1.0, height * width / (whole[0] * whole[1]))
            word = thing.text("word")
            objects[word] = max(objects.get(word, 0.0), math.sqrt(share))
    return sizes


def _coco_sizes(path: Path) -> Sizes:
    sizes: Sizes = {}
    for image, context in read_coco([], [path], skip_empty=True).contexts.items():
        objects = sizes.setdefault(image, {})
        for box in context.boxes:
            left, top, right, bottom = box.corners
            size = math.sqrt((right - left) * (bottom - top))
            objects[box.category] = max(objects.get(box.category, 0.0), size)
    return sizes


def size_asked(item: Answered, sizes: Sizes) -> float | None:
    """The size of the object that a question asks about; None where no box of it is known."""
    word = ASKED.fullmatch(item.question)
    return sizes.get(item.image, {}).get(word[1]) if word else None


def by_size(
    sides: Mapping[str, Sequence[Answered]],
    boxes: Path,
    parser: str = "original",
    resamples: int = 10_000,
    seed: int = 0,
    min_images: int = MIN_IMAGES,
) -> BySize:
    """F1 and recall of the models by the size of the object, over all splits together.

    Raises DataError for a file that has a box of none of the objects.
    """
    read = read_all(sides, parser)
    known = read_sizes(boxes)
    asked = [size_asked(item, known) for item in next(iter(sides.values()))]
    size = np.array([math.nan if value is None else value for value in asked])
    chosen = read.label & ~np.isnan(size)
    if not chosen.any():
        raise DataError(
            f"{boxes}: has no box of any object that is asked about and there; give the boxes of "
            "these images with --boxes"
        )
    edges = np.quantile(size[chosen], np.linspace(0, 1, len(GROUPS) + 1)[1:-1])
    group = np.where(chosen, np.searchsorted(edges, np.nan_to_num(size)), -1)
    sums = _sums(read, group)
    point, drawn = _scores(sums.sum(axis=0)), _scores(resampled(sums, resamples, seed))
    groups = []
    for place, name in enumerate(GROUPS):
        mask = group == place
        if mask.any():  # not, where all sizes are equal
            images = len(set(read.image[mask]))
            few = images < min_images
            f1, f1_drawn = point[0, :, place], drawn[:, 0, :, place]
            groups.append(
                SizeGroup(
                    name=name,
                    low=float(size[mask].min()),
                    high=float(size[mask].max()),
                    questions=int(mask.sum()),
                    images=images,
                    f1=_figures(list(sides), f1, f1_drawn, few),
                    recall=_figures(list(sides), point[1, :, place], drawn[:, 1, :, place], few),
                    difference=_figures(
                        list(sides)[1:],
                        f1[1:] - f1[0],
                        f1_drawn[:, 1:] - f1_drawn[:, :1],
                        few,
                        with_p=True,
                    ),
                )
            )
    unknown = int((read.label & np.isnan(size)).sum())
    return BySize(str(boxes), tuple(groups), unknown)


def _sums(read: Readings, group: np.ndarray) -> np.ndarray:
    """float64 `[images M groups 3]`: true yes and labelled yes of the group, and, the same in every
    group, false yes and labelled yes of all (as their own last "group": `[images M groups+1 3]`).
    """
    num_groups = len(GROUPS)
    found = np.zeros((len(read.images), len(read.said), num_groups + 1, 3))
    inside = group >= 0
    for m, said in enumerate(read.said == 1):
        for k, value in ((TRUE, said & read.label), (LABELLED, read.label)):
            np.add.at(found[:, m, :, k], (read.image[inside], group[inside]), value[inside])
        np.add.at(found[:, m, num_groups, LABELLED], read.image, read.label)
        np.add.at(found[:, m, num_groups, FALSE], read.image, said & ~read.label)
    return found


def _scores(sums: np.ndarray) -> np.ndarray:
    """Sums `[... M groups+1 3]` -> F1 and recall `[... 2 M groups]`; NaN for a group without
    questions."""
    true, labelled = sums[..., :-1, TRUE], sums[..., :-1, LABELLED]
    all_labelled, false = sums[..., -1:, LABELLED], sums[..., -1:, FALSE]
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = 2 * true / (true + labelled + false * labelled / all_labelled)
        return np.stack([f1, true / labelled], axis=-3)


def _figures(
    names: Sequence[str], point: np.ndarray, drawn: np.ndarray, few: bool, with_p: bool = False
) -> dict[str, Estimate]:
    """Point `[M]` and resamples `[r M]` -> estimates by model."""
    return {
        name: estimate(float(point[m]), drawn[:, m], with_p, few) for m, name in enumerate(names)
    }
