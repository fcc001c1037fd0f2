"""What a nano tower's features know: a linear probe on patches, in the geometry of the real models.

The probe is one linear map per patch to the object words; a word's score is the log-sum-exp over
the patches. It is trained on scenes of its own and judged on others by the area under the ROC
curve: the chance that a present word scores above an absent one, for small to large objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hd.grid import HDConfig
from ..hd.image import from_array
from ..hd.plan import plan_image
from ..hd.tiler import normalise, tile_image
from .drawing import WORDS, Scene
from .scenes import dataset_scene, native_pixels

# The two models of the demo: one view of 1.5 tiles, and 2 x 2 tiles with a global view.
NANO_BASE = HDConfig(
    tile_px=84,
    patch_px=14,
    grids=(),
    global_view="pad",
    keep="all",
    row_end=False,
    pad_colour="mean",
)
NANO_HD = HDConfig(
    tile_px=56,
    patch_px=14,
    grids=((2, 2),),
    global_view="squash",
    keep="llava_next",
    row_end=True,
    pad_colour="black",
)
SIDES_PX = {"small": (0, 18), "middle": (18, 22), "large": (22, 1000)}  # native sides


@torch.inference_mode()
def scene_features(clip: Any, config: HDConfig, scenes: Sequence[Scene]) -> Tensor:
    """`[scenes patches D]`: the features a model would see, all tiles' patches in a row."""
    found = []
    for scene in scenes:
        image = from_array(native_pixels(scene))
        tiles = tile_image(image, plan_image(scene.size, config))
        states = clip.vision_model(pixel_values=normalise(tiles), output_hidden_states=True)
        found.append(states.hidden_states[-2][:, 1:].flatten(0, 1))
    return torch.stack(found)


def presence(scenes: Sequence[Scene]) -> Tensor:
    """`[scenes words]`: the native side of the word's object, 0 where it is absent."""
    sides = torch.zeros(len(scenes), len(WORDS))
    for row, scene in zip(sides, scenes, strict=True):
        for thing in scene.things:
            row[thing.word] = thing.side
    return sides


def probe_tower(
    clip: Any, config: HDConfig, train: int = 1000, test: int = 400
) -> dict[str, float]:
    """Areas under the ROC curve for all objects and by size, rounded to four places."""
    known = [dataset_scene(0, "probe", i) for i in range(train)]
    new = [dataset_scene(0, "probe", i) for i in range(train, train + test)]
    x, sides = scene_features(clip, config, known), presence(known)
    mean, spread = x.mean((0, 1)), x.std((0, 1)) + 1e-5
    weight, bias = fit_probe((x - mean) / spread, (sides > 0).float())
    scores = torch.logsumexp((scene_features(clip, config, new) - mean) / spread @ weight + bias, 1)
    sides = presence(new)
    absent = scores[sides == 0]
    areas = {"all": area(scores[sides > 0], absent)}
    for name, (low, high) in SIDES_PX.items():
        areas[name] = area(scores[(sides > low) & (sides <= high)], absent)
    return {name: round(value, 4) for name, value in areas.items()}


def fit_probe(x: Tensor, present: Tensor, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Weight `[D words]` and bias `[words]` fitted to `x` `[scenes patches D]`."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.01 * torch.randn(x.shape[-1], present.shape[1], generator=generator)
    weight.requires_grad_()
    bias = torch.full((present.shape[1],), -3.0, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=0.03)
    for _ in range(steps):
        chosen = torch.randint(len(x), (min(500, len(x)),), generator=generator)
        scores = torch.logsumexp(x[chosen] @ weight + bias, 1)
        loss = F.binary_cross_entropy_with_logits(
            scores, present[chosen], pos_weight=torch.tensor(3.0)
        )
        optimiser.zero_grad()
        (loss + 1e-4 * weight.square().sum()).backward()
        optimiser.step()
    return weight.detach(), bias.detach()


def area(present: Tensor, absent: Tensor) -> float:
    """The share of (present, absent) pairs in which the present one scores higher."""
    below = torch.searchsorted(absent.sort().values, present)
    return (below.float() / len(absent)).mean().item()
