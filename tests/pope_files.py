"""Small POPE files for the tests: three splits, a few images, six questions about each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_hd.bench.pope import PROMPT

SPLITS = ("random", "popular", "adversarial")
OBJECTS = ("apple", "boat", "cup", "dog", "eel", "fork")


def image_name(number: int) -> str:
    return f"photo_{number}.png"


def pope_records(split: str, num_images: int = 3) -> list[dict[str, Any]]:
    """POPE's own records; the objects of the `no` questions differ between the splits."""
    records = []
    for image in range(num_images):
        for place, thing in enumerate(OBJECTS):
            label = "yes" if place % 2 == 0 else "no"
            name = thing if label == "yes" else f"{split} {thing}"
            article = "an" if name[0] in "aeiou" else "a"
            records.append(
                {
                    "question_id": len(records) + 1,
                    "image": image_name(image),
                    "text": f"Is there {article} {name} in the image?",
                    "label": label,
                }
            )
    return records


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_pope(folder: Path, num_images: int = 3) -> list[Path]:
    """POPE's three files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_lines(folder / f"coco_pope_{split}.json", pope_records(split, num_images))
        for split in SPLITS
    ]


def llava_records(num_images: int = 3, misprint: bool = True) -> list[dict[str, Any]]:
    """LLaVA's question file: one list, own ids, no labels, the prompt in the text, misprints."""
    records = []
    for start, split in ((1, "adversarial"), (10_000_001, "random"), (20_000_001, "popular")):
        for number, record in enumerate(reversed(pope_records(split, num_images))):
            text = record["text"]
            if misprint and text.startswith("Is there an "):
                text = text.replace("image", "imange")
            records.append(
                {
                    "question_id": start + number,
                    "image": record["image"],
                    "text": text + PROMPT,
                    "category": split,
                }
            )
    return records


def true_label(text: str) -> str:
    """The label of any question of these files: the added objects carry a split's name."""
    return "no" if any(split in text for split in SPLITS) else "yes"
