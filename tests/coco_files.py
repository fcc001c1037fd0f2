"""Small COCO annotation files, written for the tests: each image has a caption of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

THINGS = ("dog", "cat", "boat", "lamp", "tree", "kite", "horse", "chair")


def coco_values(num_images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(captions, instances) of so many images; the last one has no box, the first no caption."""
    images = [
        {"id": 10 + i, "file_name": f"{10 + i:012}.jpg", "height": 480, "width": 640}
        for i in range(num_images)
    ]
    captions = [
        {"id": 100 + i, "image_id": 10 + i, "caption": f"A {thing} number {i}\n in a quiet place."}
        for i, thing in enumerate(THINGS[i % len(THINGS)] for i in range(num_images))
        if i > 0
    ]
    boxes = [
        {
            "id": 500 + i,
            "image_id": 10 + i,
            "category_id": 1 + i % 2,
            "bbox": [64.0 + i, 48.0, 320.0, 240.5],
            "segmentation": [[0.0, 1.0, 2.0, 3.0]],
            "iscrowd": int(i == 1),
        }
        for i in range(num_images - 1)
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "traffic light"}]
    return (
        {"images": images, "annotations": captions},
        {"images": images, "annotations": boxes, "categories": categories},
    )


def write_coco(folder: Path, num_images: int = 8) -> tuple[Path, Path]:
    """The two files in the folder."""
    paths = folder / "captions_small.json", folder / "instances_small.json"
    for path, values in zip(paths, coco_values(num_images), strict=True):
        path.write_text(json.dumps(values))
    return paths
