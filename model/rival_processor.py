"""transformers' own processors of LlavaNext and Llava, to be measured against: image files and
prompts to a padded batch of floats, as its users' collators make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.image_utils import load_image

from ..hd.errors import UsageError
from ..hd.grid import HDConfig
from .prompt import IGNORE


def has_rival(hd: HDConfig) -> bool:
    """Whether transformers has a processor that cuts images in that geometry."""
    if hd.grids:
        return (hd.global_view, hd.keep, hd.pad_colour) == ("squash", "llava_next", "black")
    return (hd.global_view, hd.keep, hd.pad_colour) == ("pad", "all", "mean") and not hd.row_end


def rival_processor(hd: HDConfig, tokenizer: Any) -> Any:
    """transformers' processor of a geometry, with its PIL image processor (torchvision's resizes
    differently in the last bits). Raises UsageError where it has none."""
    if not has_rival(hd):
        raise UsageError("transformers has no processor of that geometry; choose another preset")
    side = hd.tile_px
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    words = {
        "tokenizer": tokenizer,
        "patch_size": hd.patch_px,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the CLS token, which never becomes a token
    }
    if not hd.grids:
        return LlavaProcessor(LlavaImageProcessorPil(do_pad=True, **sizes), **words)
    grids = [[rows * side, cols * side] for rows, cols in hd.grids]
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(image_grid_pinpoints=grids, **sizes), **words
    )


@dataclass(frozen=True)
class RivalReader:
    """Files and prompts with one image tag each -> what a training step of transformers is given:
    ids, mask and labels `[S longest]`, pixels fp32 `[S n 3 px px]`, normalised."""

    processor: Any

    def __call__(self, files: Sequence[Path], prompts: Sequence[str]) -> dict[str, Tensor]:
        images = [load_image(str(file)) for file in files]
        made = self.processor(images=images, text=list(prompts), padding=True, return_tensors="pt")
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, IGNORE)
        return {**made, "labels": labels}
