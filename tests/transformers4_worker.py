"""Read exports with transformers 4 in a process of its own; prints what was found as JSON.

    python transformers4_worker.py PICTURE.png OUT MODEL... [--tower CLIP...]

The first model is written again by that version, to OUT.

Started by test_export_transformers4.py with that version first on the path; nothing of ours is
imported here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, CLIPVisionModel

QUESTION = "What is in the image?"


def report(folder: str, picture: str, out: str | None) -> dict[str, object]:
    """The four lists of wrong keys, the prompt, its ids and the logits of the last place."""
    config = json.loads((Path(folder) / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="sdpa"
    )
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    if out is not None:
        model.save_pretrained(out)
        processor.save_pretrained(out)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
    with torch.inference_mode():
        logits = model.eval()(**inputs).logits[0]
    return {
        "wrong": names_of(info),
        "prompt": text,
        "ids": inputs["input_ids"][0].tolist(),
        "logits": logits[-1].tolist(),
    }


def tower_report(folder: str) -> dict[str, object]:
    """Of the tower of an export in the original layout."""
    _, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    return {"wrong": names_of(info)}


def names_of(info: dict[str, object]) -> dict[str, list[str]]:
    return {kind: sorted(map(str, names)) for kind, names in info.items()}


if __name__ == "__main__":
    picture, out, *folders = sys.argv[1:]
    split = folders.index("--tower")
    models = enumerate(folders[:split])
    found = [report(folder, picture, None if i else out) for i, folder in models]
    found += [tower_report(folder) for folder in folders[split + 1 :]]
    print(json.dumps({"version": transformers.__version__, "found": found}))
