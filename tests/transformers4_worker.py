"""Read an export with transformers 4 in a process of its own; prints what was found as JSON.

    python transformers4_worker.py FOLDER PICTURE.png

Started by test_interop_transformers4.py with that version first on the path; nothing of ours is
imported here.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, CLIPVisionModel

QUESTION = "What is in the image?"


def report(folder: str, picture: str) -> dict[str, object]:
    architecture = json.load(open(f"{folder}/config.json"))["architectures"][0]  # noqa: SIM115, PTH123
    model_class = getattr(transformers, architecture)
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="sdpa"
    )
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
    with torch.inference_mode():
        logits = model.eval()(**inputs).logits[0]
    return {
        "version": transformers.__version__,
        "wrong": {name: sorted(map(str, keys)) for name, keys in info.items()},
        "prompt": text,
        "ids": inputs["input_ids"][0].tolist(),
        "logits": logits[-1].tolist(),
    }


def tower_report(folder: str) -> dict[str, object]:
    """Of the tower of an export in the original layout."""
    _, tower = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    return {"wrong": {name: sorted(map(str, keys)) for name, keys in tower.items()}}


if __name__ == "__main__":
    found = tower_report(sys.argv[1]) if len(sys.argv) == 2 else report(*sys.argv[1:])
    print(json.dumps(found))
