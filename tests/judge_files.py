"""LLaVA-Bench's files, small, as the judge reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CATEGORIES = ("conv", "detail", "complex")


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make(folder: Path, num_images: int = 4) -> Path:
    """LLaVA-Bench's files: three questions about each image; answers of two sides."""
    questions, context = [], []
    for image in range(num_images):
        name = f"{image:03}.png"
        context.append({"image": name, "caption": [f"A scene {image}.", "It is calm."]})
        for category in CATEGORIES:
            number = len(questions)
            text = f"What about {number}?"
            line = {"question_id": number, "image": name, "text": text, "category": category}
            questions.append(line)
    write_lines(folder / "questions.jsonl", questions)
    write_lines(folder / "context.jsonl", context)
    for side in ("reference", "answers"):
        lines = [{"question_id": q["question_id"], "text": f"{side} {i}"} for i, q in
                 enumerate(questions)]  # fmt: skip
        write_lines(folder / f"{side}.jsonl", lines)
    return folder
