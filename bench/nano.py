"""`llava-hd nano build`: the shipped nano weights, made again from a seed.

The parts (two towers, one language model) do not depend on each other and can be built by separate
commands at the same time. Each leaves a checkpoint in OUT/work, its folder in OUT, its facts in
OUT/work/PART.json; OUT/nano.json holds the facts of all parts built so far.
"""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..hd.errors import UsageError
from ..model.nano import save_language, save_tower, scale_language, scale_tower
from ..model.prompt import IGNORE
from .drawing import WORDS, SceneStyle
from .nano_lm import Encoder, LanguageRecipe, collate, draw_text, second_phase, train_language
from .nano_loop import Progress, keep_freed_memory
from .nano_probe import NANO_BASE, NANO_HD, probe_tower, scene_features
from .nano_towers import TowerRecipe, train_tower
from .scenes import dataset_scene

TOWERS = {"tower56": NANO_HD, "tower84": NANO_BASE}
PARTS = (*TOWERS, "lm")

# Root mean squares of the towers' features and of the object words' embeddings. As trained they
# are about 7 and 0.05, and a fresh projector's rows would drown the language model's own signals;
# neither scale changes what a part computes (model/nano.py).
FEATURE_RMS = 1.0
WORD_RMS = 0.5


def build(
    out: Path,
    parts: Sequence[str],
    seed: int,
    tower_steps: int,
    lm_steps: int,
    progress: Progress,
    probe_scenes: tuple[int, int] = (1000, 400),
) -> None:
    """Build the parts one after the other, going on from their checkpoints.

    Both towers always get the same number of steps. Raises UsageError for an unknown part or a
    checkpoint of another recipe.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UsageError(f"part {unknown[0]!r} is unknown; there is: {', '.join(PARTS)}")
    keep_freed_memory()
    for part in parts:
        if part == "lm":
            facts = _build_language(out, LanguageRecipe(seed=seed, steps=lm_steps), progress)
        else:
            recipe = TowerRecipe(seed=seed, steps=tower_steps, tile_px=TOWERS[part].tile_px)
            facts = _build_tower(out, part, recipe, progress, probe_scenes)
        facts["versions"] = {name: version(name) for name in ("torch", "transformers")}
        facts["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
        _write_json(out / "work" / f"{part}.json", facts)
        _write_json(out / "nano.json", gather_facts(out))
        progress(f"{part}: written to {out / part}")


def gather_facts(out: Path) -> dict[str, Any]:
    """Part -> its facts, for the parts built so far."""
    files = {part: out / "work" / f"{part}.json" for part in PARTS}
    return {
        part: json.loads(path.read_text(encoding="utf-8"))
        for part, path in files.items()
        if path.exists()
    }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _build_tower(
    out: Path, part: str, recipe: TowerRecipe, progress: Progress, probe_scenes: tuple[int, int]
) -> dict[str, Any]:
    clip, seconds = train_tower(recipe, out / "work" / f"{part}.pt", progress)
    known = [dataset_scene(recipe.seed, "scale", i, SceneStyle()) for i in range(20)]
    features = scene_features(clip, TOWERS[part], known)
    scale_tower(clip, FEATURE_RMS / features.square().mean().sqrt().item())
    save_tower(clip, out / part)
    progress(f"{part}: probing its features")
    return {
        "recipe": asdict(recipe),
        "images_seen": recipe.steps * recipe.batch,
        "seconds": round(seconds),
        "probe_auc": probe_tower(clip, TOWERS[part], *probe_scenes),
    }


def _build_language(out: Path, recipe: LanguageRecipe, progress: Progress) -> dict[str, Any]:
    language, tokenizer, seconds = train_language(recipe, out / "work", progress)
    accuracy = text_accuracy(language, tokenizer, seed=recipe.seed + 1)
    words = [
        encode[0]
        for encode in tokenizer([f" {w}" for w in WORDS], add_special_tokens=False)["input_ids"]
    ]
    size = language.get_input_embeddings().weight[words].square().mean().sqrt().item()
    scale_language(language, WORD_RMS / size)
    save_language(language, tokenizer, out / "lm")
    return {
        "recipe": asdict(recipe),
        "texts_seen": (recipe.steps + second_phase(recipe).steps) * recipe.batch,
        "seconds": round(seconds),
        "yes_no_accuracy": round(accuracy, 4),
    }


@torch.inference_mode()
def text_accuracy(language: Any, tokenizer: Any, seed: int, texts: int = 200) -> float:
    """The share of "Is there a ..." questions over new text maps of all sizes answered rightly."""
    encode = Encoder(tokenizer)
    yes, no = encode(" Yes")[0], encode(" No")[0]
    rng = random.Random(f"lm/test/{seed}")
    recipe = LanguageRecipe(plain_share=0.0)
    right = asked = 0
    for _ in range(0, texts, 20):
        drawn = [draw_text(rng, encode, recipe, opening=1.0) for _ in range(20)]
        ids, labels, _ = collate(drawn, tokenizer.pad_token_id)
        logits = language(input_ids=ids).logits[:, :-1]
        target = labels[:, 1:]
        rows = (target != IGNORE) & ((target == yes) | (target == no))
        says_yes = logits[..., yes][rows] > logits[..., no][rows]
        right += int((says_yes == (target[rows] == yes)).sum())
        asked += int(rows.sum())
    return right / asked
