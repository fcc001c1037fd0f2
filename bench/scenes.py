"""The nano data set on disk: scenes as PNG, captions, instructions, POPE questions, boxes.

    OUT/images/{caption,train,test}_000000.png
    OUT/pretrain.json                       captions of caption_*, LLaVA's JSON
    OUT/finetune.json                       questions and answers on train_*, LLaVA's JSON
    OUT/finetune_unprompted.json            the same without the response prompt, for the ablations
    OUT/pope/nano_pope_{random,popular,adversarial}.json    held-out scenes, POPE's JSON lines
    OUT/boxes.json                          image -> objects with their boxes

Everything follows from the seed; a scene does not depend on how many others are drawn.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hd.image import save_png
from .drawing import WORDS, Scene, SceneStyle, Window, draw_scene, render
from .scene_text import RESPONSE_PROMPT, caption, conversation, exist_question

SPLITS = ("random", "popular", "adversarial")
QUESTIONS_EACH = 3  # present and absent words asked of one image
UNPROMPTED = "finetune_unprompted.json"
PAIRS = 12  # at most so many questions in one instruction

# Smaller objects than in the towers' training (16 to 56 px): 14 px are 5 px in the base model's
# view and 7 px in the HD model's tiles.
STYLE = SceneStyle(min_side_px=14.0, max_side_px=36.0)
# Stage 1's scenes hold the same objects twice as large: HD's stage 1 sees the whole scene in one
# 56 px view, in which they are then as large as the small ones in stage 2's tiles.
CAPTION_STYLE = SceneStyle(min_side_px=28.0, max_side_px=72.0)

Progress = Callable[[int, int], None]


def scene_rng(seed: int, part: str, index: int, use: str) -> random.Random:
    """The random numbers of one use ("draw", "text", "pope") of one scene."""
    return random.Random(f"{part}/{seed}/{index}/{use}")


def dataset_scene(seed: int, part: str, index: int, style: SceneStyle = STYLE) -> Scene:
    """Scene `index` of "caption", "train" or "test"; at least `style.min_things` objects."""
    rng = scene_rng(seed, part, index, "draw")
    while True:
        scene = draw_scene(rng, style)
        if len(scene.things) >= style.min_things:
            return scene


def native_pixels(scene: Scene) -> np.ndarray:
    """The scene at its own size, uint8 `[height width 3]`."""
    window = Window(0.0, 0.0, scene.size[0], (0.0, 0.0, 0.0))
    pixels = render([scene], [window], scene.size)[0]
    return (pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def image_name(part: str, index: int) -> str:
    """The file name of a scene below images/."""
    return f"{part}_{index:06d}.png"


def draw_dataset(
    out: Path, train: int, test: int, seed: int, progress: Progress | None = None
) -> None:
    """Write the data set, `train` scenes for each of the two stages and `test` held-out ones;
    `progress(done, total)` is called after each image."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "pope").mkdir(exist_ok=True)
    scenes = {
        "caption": [dataset_scene(seed, "caption", i, CAPTION_STYLE) for i in range(train)],
        "train": [dataset_scene(seed, "train", i) for i in range(train)],
        "test": [dataset_scene(seed, "test", i) for i in range(test)],
    }
    _draw_images(scenes, out / "images", progress)
    _write_json(out / "pretrain.json", caption_records(scenes["caption"], seed))
    _write_json(out / "finetune.json", instruction_records(scenes["train"], seed))
    for split in SPLITS:
        questions = pope_questions(scenes["test"], scenes["train"], split, seed)
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        (out / "pope" / f"nano_pope_{split}.json").write_text(lines, encoding="utf-8")
    _write_json(out / "boxes.json", boxes(scenes))


def _draw_images(scenes: dict[str, list[Scene]], folder: Path, progress: Progress | None) -> None:
    """One thread per core draws and writes whole images: torch and zlib both release Python's
    lock, and a picture is too small to be shared out inside (two threads each took ten times as
    long on two busy cores)."""
    jobs = [(part, i, scene) for part, drawn in scenes.items() for i, scene in enumerate(drawn)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            done = pool.map(
                lambda job: save_png(native_pixels(job[2]), folder / image_name(job[0], job[1])),
                jobs,
            )
            for count, _ in enumerate(done, start=1):
                if progress is not None:
                    progress(count, len(jobs))
    finally:
        torch.set_num_threads(threads)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def caption_records(scenes: Sequence[Scene], seed: int) -> list[dict[str, Any]]:
    """Stage 1: one caption for each of the "caption" scenes, in LLaVA's JSON."""
    records = []
    for index, scene in enumerate(scenes):
        text = caption(scene_rng(seed, "caption", index, "text"), scene.words)
        records.append(_record("caption", index, [("Describe the image.", text)]))
    return records


def write_unprompted(out: Path, train: int, seed: int) -> None:
    """Write `out`/finetune_unprompted.json: finetune.json without the response format prompt."""
    scenes = [dataset_scene(seed, "train", i) for i in range(train)]
    _write_json(out / UNPROMPTED, instruction_records(scenes, seed, prompt=""))


def instruction_records(
    scenes: Sequence[Scene], seed: int, prompt: str = RESPONSE_PROMPT
) -> list[dict[str, Any]]:
    """Stage 2: some questions and answers on each of the "train" scenes, in LLaVA's JSON."""
    records = []
    for index, scene in enumerate(scenes):
        rng = scene_rng(seed, "train", index, "instruction")
        records.append(_record("train", index, conversation(rng, scene.words, PAIRS, prompt)))
    return records


def _record(part: str, index: int, rounds: Sequence[tuple[str, str]]) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(rounds):
        tag = "<image>\n" if number == 0 else ""
        turns.append({"from": "human", "value": tag + question})
        turns.append({"from": "gpt", "value": answer})
    name = image_name(part, index)
    return {"id": name.removesuffix(".png"), "image": name, "conversations": turns}


def pope_questions(
    scenes: Sequence[Scene], known: Sequence[Scene], split: str, seed: int
) -> list[dict[str, Any]]:
    """POPE's questions on `scenes`, yes and no in turn, six for each image.

    Absent words are drawn by chance (random), are the most frequent ones of `known` (popular), or
    those that most often keep company with the image's objects there (adversarial). The present
    words asked are the same in the three splits.
    """
    frequency = Counter(word for scene in known for word in scene.words)
    company = Counter(pair for scene in known for pair in combinations(sorted(scene.words), 2))
    questions: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        present = scene_rng(seed, "test", index, "present").sample(scene.words, QUESTIONS_EACH)
        absent = [word for word in WORDS if word not in scene.words]
        scene_rng(seed, "test", index, f"absent/{split}").shuffle(absent)  # ties fall by chance
        if split == "popular":
            absent.sort(key=lambda word: -frequency[word])
        if split == "adversarial":
            absent.sort(key=lambda word: -_together(company, word, scene.words))
        for yes, no in zip(present, absent[:QUESTIONS_EACH], strict=True):
            for word, label in ((yes, "yes"), (no, "no")):
                questions.append(
                    {
                        "question_id": len(questions) + 1,
                        "image": image_name("test", index),
                        "text": exist_question(word),
                        "label": label,
                    }
                )
    return questions


def _together(company: Counter[tuple[str, str]], word: str, others: Sequence[str]) -> int:
    return sum(company[min(word, other), max(word, other)] for other in others)


def boxes(scenes: dict[str, list[Scene]]) -> dict[str, Any]:
    """Image name -> its size (height, width) and objects with boxes (top, left, height, width)."""
    table = {}
    for part, drawn in scenes.items():
        for index, scene in enumerate(drawn):
            things = [
                {
                    "word": WORDS[thing.word],
                    "box": [round(x, 2) for x in (thing.top, thing.left, thing.side, thing.side)],
                }
                for thing in scene.things
            ]
            table[image_name(part, index)] = {"size": list(scene.size), "objects": things}
    return table
