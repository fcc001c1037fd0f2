"""transformers' own LlavaNext as its users train it, to be measured against.

Its own processor cuts and normalises the images and pads the texts to the longest; the tower is
frozen; attention is the one that transformers takes by itself (sdpa); the loss is the model's own,
over labels in which padding and image tokens are masked, as in the collators of transformers' and
TRL's examples. As with its Trainer, no cache is kept and the loss of a step is a mean over the
labels of all its batches (`num_items_in_batch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from .export_files import write_processor
from .foreign import read_config
from .prompt import IGNORE, IMAGE_TAG
from .rival import load_rival

if TYPE_CHECKING:
    from PIL.Image import Image


def add_processor(folder: Path) -> None:
    """Write the files of transformers' processor beside a llava_next model of ours."""
    write_processor(folder, read_config(folder), "LlavaNext")


def load_trainee(
    folder: Path, stage: int, dtype: torch.dtype, device: torch.device, checkpointing: bool = False
) -> LlavaNextForConditionalGeneration:
    """A llava_next folder, ready to be trained: in stage 1 projector and row-end learn, in stage 2
    the language model too. checkpointing: by `gradient_checkpointing_enable`."""
    model = load_rival(folder, dtype, device).train()
    learning: tuple[nn.Module, ...] = (model.model.multi_modal_projector,)
    if stage == 2:
        learning += (model.model.language_model, model.lm_head)
    model.requires_grad_(False)
    model.model.image_newline.requires_grad_(True)
    for part in learning:
        part.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@dataclass(frozen=True)
class RivalPass:
    """A batch as transformers' processor makes it. inputs: by name, ids and mask `[S longest]`,
    pixels `[images n 3 px px]`, sizes `[images 2]`; labels `[S longest]`, of which `loss_units` are
    predicted."""

    inputs: dict[str, Tensor]
    labels: Tensor
    loss_units: int
    num_useful_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.labels.numel()

    def to(self, device: torch.device) -> RivalPass:
        """The same pass with its tensors on `device`."""
        inputs = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> RivalPass:
        """The same pass in page-locked memory (called by torch's DataLoader)."""
        inputs = {k: v.pin_memory() for k, v in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels.pin_memory())

    def loss_sum(self, model: Any) -> Tensor:
        """The summed loss: the model's own, "divided by" 1."""
        dtype = model.dtype
        inputs = {k: v.to(dtype) if k == "pixel_values" else v for k, v in self.inputs.items()}
        return model(**inputs, labels=self.labels, num_items_in_batch=1, use_cache=False).loss


@dataclass(frozen=True)
class RivalCollator:
    """(images, text) of each sample, one image or none, an `<image>` tag for it -> a pass."""

    processor: Any

    @classmethod
    def from_pretrained(cls, folder: Path) -> RivalCollator:
        """With the processor that transformers makes of a folder (`add_processor`)."""
        return cls(AutoProcessor.from_pretrained(folder))

    @property
    def kind(self) -> str:
        """The class of its image processor, which depends on what is installed."""
        return type(self.processor.image_processor).__name__

    def __call__(self, samples: Sequence[tuple[Sequence[Image], str]]) -> RivalPass:
        images = [image for own, _ in samples for image in own]
        texts = [text for _, text in samples]
        made = self.processor(images=images or None, text=texts, padding=True, return_tensors="pt")
        image_id = self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TAG)
        mask, labels = made["attention_mask"], made["input_ids"].clone()
        labels[(mask == 0) | (labels == image_id)] = IGNORE
        predicted = int((labels[:, 1:] != IGNORE).sum())
        return RivalPass(dict(made), labels, predicted, int(mask.sum()))
