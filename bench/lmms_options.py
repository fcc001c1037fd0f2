"""The options of the lmms-eval adapter (`--model_args`), checked before a model is loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..hd.errors import UsageError
from ..hd.limits import ResolutionLimits, parse_grid

DTYPES = ("auto", "float32", "bfloat16", "float16")
CHOICES = {
    "dtype": DTYPES,
    "prompts": ("task", "paper"),
    "many_images": ("middle", "all"),
}


@dataclass(frozen=True)
class AdapterOptions:
    """What `--model_args` may say.

    pretrained: a model folder. device: "auto", or torch's name; in a run of several ranks "auto"
    and "cuda" are the rank's own GPU. dtype: "auto" is bfloat16 on a GPU. batch_size: rows at a
    time. max_new_tokens: for tasks that set none. prompts: "task" takes the task's words, "paper"
    puts the paper's response prompts in their place (bench/lmms_prompts.py). many_images: of a row
    with several images (SEED's videos) the "middle" one, as LLaVA was evaluated, or "all" of them.
    max_tiles, max_visual_tokens, grid ("2x3"): of an image, instead of what the model was trained
    on (hd/limits.py).
    """

    pretrained: str
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    batch_size: int = 1
    max_new_tokens: int = 1024
    prompts: str = "task"
    many_images: str = "middle"
    max_tiles: int | None = None
    max_visual_tokens: int | None = None
    grid: str | None = None

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"{name}={value} is unknown; there is {', '.join(known)}")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: give a number from 1")
        self.limits()

    def limits(self) -> ResolutionLimits:
        """Of the images' resolution. Raises UsageError for what cannot be."""
        grid = None if self.grid is None else parse_grid(self.grid)
        return ResolutionLimits(self.max_tiles, self.max_visual_tokens, grid)


def parse_options(given: Mapping[str, Any]) -> AdapterOptions:
    """The options out of lmms-eval's words, which may be text or numbers; UsageError for what is
    unknown or of the wrong kind."""
    known = {field.name: field for field in fields(AdapterOptions)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}=?" if close else f"there is {', '.join(known)}"
            raise UsageError(f"--model_args: {name}= is not an option of llava_hd; {hint}")
        is_count = str(known[name].type).startswith("int")
        values[name] = _whole_number(name, value) if is_count else str(value)
    if "pretrained" not in values:
        raise UsageError("--model_args pretrained=DIR is missing; give the folder of a model")
    return AdapterOptions(**values)


def _whole_number(name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise UsageError(f"{name}={value}: give a whole number") from None


def place(options: AdapterOptions) -> tuple[torch.device, torch.dtype]:
    """The device and the type of the weights that "auto" stands for on this machine and rank."""
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device={name} cannot be used ({reason}); try device=cpu") from error
    if options.dtype != "auto":
        return device, getattr(torch, options.dtype)
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32
