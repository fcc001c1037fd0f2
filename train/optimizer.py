"""What trains, in which groups, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..model.llava_hd import LlavaHD
from .settings import OptimizerConfig

PROJECTOR, VISION, LANGUAGE = "projector.", "vision.", "language."  # row-end: projector


def freeze(
    model: LlavaHD, stage: str, train_vision: bool = False, vision_layers: int | None = None
) -> None:
    """Leave only what the stage trains: projector and row-end; in stage 2 the language model too,
    or its adapter where it has one; the tower if it is asked for (all that is read of it, or its
    last `vision_layers` layers). Raises UsageError for more layers than the tower has."""
    adapters_only = model.adapter is not None
    for name, parameter in model.named_parameters():
        learns = name.startswith(PROJECTOR)
        if name.startswith(LANGUAGE) and stage == "finetune":
            learns = not adapters_only or ".lora_" in name
        parameter.requires_grad_(learns)
    model.vision.freeze()
    if train_vision:
        model.vision.unfreeze(vision_layers)


def trained_words(model: nn.Module) -> str:
    """What trains, in words for the user; before ZeRO-3 has partitioned the weights."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    learned, whole = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
    return f"training {learned:,} of {whole:,} parameters ({learned / whole:.2%})"


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW over up to six groups: tower, language model (or its adapter), projector and
    row-end; with weight decay (matrices) or without (everything of one dimension, as transformers'
    trainer does)."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((_part(name), parameter.dim() > 1), []).append(parameter)
    own_rates = {"projector": config.projector_lr, "vision": config.vision_lr}
    return torch.optim.AdamW(
        [
            {
                "name": part + ("" if decays else " (no decay)"),
                "params": parameters,
                "lr": own_rates.get(part) or config.lr,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (part, decays), parameters in groups.items()
        ],
        betas=config.betas,
        eps=config.eps,
    )


def _part(name: str) -> str:
    for prefix in (PROJECTOR, VISION):
        if name.startswith(prefix):
            return prefix.rstrip(".")
    return "language"


def warmup_steps(num_steps: int, ratio: float) -> int:
    """Steps of warm-up, rounded up as in transformers' trainer."""
    return math.ceil(num_steps * ratio)


def lr_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step `step` (from 0) as a share of the peak.

    The same numbers as transformers' cosine schedule; its first step of a warm-up has rate 0.
    """
    warmup = warmup_steps(num_steps, config.warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


class LearningRates:
    """Sets the rates of an optimizer's groups from their peaks, which it remembers.

    Make it before a checkpoint is loaded: that puts the rates of its step in place of the peaks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        self.optimizer = optimizer
        self.config = config
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        names = [str(group["name"]).partition(" ")[0] for group in optimizer.param_groups]
        main = names.index("language") if "language" in names else len(names) - 1
        self.main_peak = self.peaks[main]

    def set(self, step: int, num_steps: int) -> float:
        """Set the rates of step `step` (from 0); returns that of the language model where it is
        trained, else of the last group."""
        factor = lr_factor(step, num_steps, self.config)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.main_peak * factor
