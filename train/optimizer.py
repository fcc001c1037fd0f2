"""What trains, in which groups, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..model.llava_hd import LlavaHD
from .settings import OptimizerConfig

PROJECTOR = "projector."  # the row-end is one of its parameters


def freeze(model: LlavaHD, stage: str) -> None:
    """Leave only the stage's parameters to be trained: the tower never is."""
    for name, parameter in model.named_parameters():
        is_projector = name.startswith(PROJECTOR)
        is_language = name.startswith("language.")
        parameter.requires_grad_(is_projector or (is_language and stage == "finetune"))


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW over up to four groups: projector and row-end, or language model; with weight
    decay (matrices) or without (everything of one dimension, as transformers' trainer does)."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "projector" if name.startswith(PROJECTOR) else "language"
            groups.setdefault((part, parameter.dim() > 1), []).append(parameter)
    projector_lr = config.lr if config.projector_lr is None else config.projector_lr
    return torch.optim.AdamW(
        [
            {
                "name": part + ("" if decays else " (no decay)"),
                "params": parameters,
                "lr": projector_lr if part == "projector" else config.lr,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (part, decays), parameters in groups.items()
        ],
        betas=config.betas,
        eps=config.eps,
    )


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

    def set(self, step: int, num_steps: int) -> float:
        """Set the rates of step `step` (from 0); returns that of the last group."""
        factor = lr_factor(step, num_steps, self.config)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[-1] * factor
