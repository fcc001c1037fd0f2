"""The contrastive training of the nano CLIP towers.

Both towers see the same stream of scenes through the same windows, the same number of steps and
images, the same optimiser; only the pixel size of a view differs (56 or 84). The recipe:

- InfoNCE between views and captions (the set of the objects in view, in any order); views of one
  batch with equal captions count as positives of each other.
- For the first third of the steps windows open slowly from one object to the whole scene. Then a
  third of the views show a whole scene, a third a quarter of it, a third any part.
- Muon for the image tower's matrices, AdamW for the rest. With AdamW alone the loss stayed at its
  start for 125 steps of 256, with Muon it fell at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hd.tiler import CLIP_MEAN, CLIP_STD
from ..model.nano import (
    CAPTION_BEGIN,
    CAPTION_END,
    CAPTION_FIRST_WORD,
    CAPTION_PAD,
    new_clip,
)
from .drawing import (
    MAX_OBJECTS,
    WORDS,
    Scene,
    Window,
    draw_scene,
    render,
    seen_words,
    whole,
)
from .nano_loop import Progress, Recipe, train

PADS = ((0.0, 0.0, 0.0), CLIP_MEAN)  # black and CLIP's mean, the two pad colours of hd/


@dataclass(frozen=True)
class TowerRecipe(Recipe):
    """Everything that decides a tower's weights."""

    tile_px: int = 56
    steps: int = 3000
    batch: int = 128
    muon_lr: float = 4e-3
    adamw_lr: float = 1e-3
    weight_decay: float = 0.05
    decay_share: float = 0.3
    opening_share: float = 7 / 15  # of the steps, until windows are fully open


def draw_window(rng: random.Random, scene: Scene, opening: float) -> Window:
    """A training window; `opening` 0..1 widens it from one object to the whole scene."""
    pad = rng.choice(PADS)
    frame = whole(scene, pad)
    kind = rng.random() if opening >= 1 else 1.0
    if kind < 1 / 3:
        return frame
    if kind < 2 / 3:
        half = frame.side / 2
        top = frame.top + half * rng.randrange(2)
        return Window(top, frame.left + half * rng.randrange(2), half, pad)
    thing = rng.choice(scene.things)
    narrow = thing.side * 1.15
    wide = narrow + 8 + min(1.0, opening) * max(0.0, frame.side - narrow)
    side = narrow * (wide / narrow) ** rng.random()
    top = thing.top - rng.uniform(0, side - thing.side)
    return Window(top, thing.left - rng.uniform(0, side - thing.side), side, pad)


def normalise_views(views: Tensor) -> Tensor:
    """CLIP's normalisation of float views 0..1."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (views - mean) / std


def draw_batch(recipe: TowerRecipe, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The views `[n 3 t t]`, caption ids `[n words]` and word sets `[n words]` of one step."""
    rng = random.Random(f"tower/{recipe.seed}/{step}")
    opening = step / (recipe.opening_share * recipe.steps)
    scenes = [draw_scene(rng) for _ in range(recipe.batch)]
    windows = [draw_window(rng, scene, opening) for scene in scenes]
    ids = torch.full((recipe.batch, MAX_OBJECTS + 2), CAPTION_PAD)
    sets = torch.zeros(recipe.batch, len(WORDS))
    for i, (scene, window) in enumerate(zip(scenes, windows, strict=True)):
        words = seen_words(scene, window)
        rng.shuffle(words)
        caption = [CAPTION_BEGIN, *(CAPTION_FIRST_WORD + word for word in words), CAPTION_END]
        ids[i, : len(caption)] = torch.tensor(caption)
        sets[i, words] = 1
    views = render(scenes, windows, (recipe.tile_px, recipe.tile_px))
    return normalise_views(views), ids, sets


def contrastive_loss(clip: Any, views: Tensor, ids: Tensor, sets: Tensor) -> Tensor:
    """InfoNCE in both directions; equal word sets share the target. Zero is the best value."""
    image = clip.visual_projection(clip.vision_model(pixel_values=views).pooler_output)
    mask = (ids != CAPTION_PAD).long()
    text = clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
    text = F.normalize(clip.text_projection(text), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=50) * F.normalize(image, dim=-1) @ text.T
    same = (torch.cdist(sets, sets, p=1) < 0.5).float()
    target = same / same.sum(1, keepdim=True)
    floor = same.sum(1).log().mean()  # the entropy of the targets
    rows = -(target * F.log_softmax(logits, 1)).sum(1).mean()
    columns = -(target * F.log_softmax(logits.T, 1)).sum(1).mean()
    return (rows + columns) / 2 - floor


def train_tower(recipe: TowerRecipe, checkpoint: Path, progress: Progress) -> tuple[Any, float]:
    """The trained CLIP model (both towers), and the seconds it took."""
    torch.manual_seed(recipe.seed)
    clip = new_clip(recipe.tile_px, len(WORDS), MAX_OBJECTS)
    seconds = train(
        f"tower{recipe.tile_px}",
        clip,
        recipe,
        lambda name: "vision" in name and "layers" in name,
        lambda step: contrastive_loss(clip, *draw_batch(recipe, step)),
        checkpoint,
        progress,
    )
    return clip.eval(), seconds
