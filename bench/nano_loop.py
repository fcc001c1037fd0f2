"""The training loop of the nano parts: Muon and AdamW, one schedule, checkpoints, resumption."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hd.errors import UsageError

Progress = Callable[[str], None]
REPORT_EVERY = 25  # steps between two lines of progress
SAVE_EVERY = 200


@dataclass(frozen=True)
class Recipe:
    """What both kinds of training decide; Muon's rate is for the matrices of the layers."""

    steps: int
    batch: int
    muon_lr: float
    adamw_lr: float
    weight_decay: float
    seed: int = 0
    warmup_steps: int = 50
    decay_share: float = 0.35  # of the steps, at the end, over which the rates fall to zero

    def rate(self, step: int) -> float:
        """Warm-up, constant, linear decay: a factor 0..1 for both rates."""
        left = (self.steps - step) / (self.decay_share * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps, left)


def build_optimisers(
    module: nn.Module, recipe: Recipe, is_matrix: Callable[[str], bool]
) -> list[torch.optim.Optimizer]:
    """Muon for the two-dimensional parameters that `is_matrix` names, AdamW for all others."""
    matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and is_matrix(name)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in module.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.muon_lr,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def train(
    name: str,
    module: nn.Module,
    recipe: Recipe,
    is_matrix: Callable[[str], bool],
    loss_of: Callable[[int], Tensor],
    checkpoint: Path,
    progress: Progress,
    save_every: int = SAVE_EVERY,
) -> float:
    """Train `module` in place to the end of the recipe; returns the seconds it took.

    `loss_of(step)` draws the step's batch and computes its loss, from the step's number alone, so
    a run that goes on from its checkpoint is the run that was never cut.
    """
    optimisers = build_optimisers(module, recipe, is_matrix)
    first, seconds = _resume(checkpoint, module, optimisers, recipe)
    if first:
        progress(f"{name}: going on from step {first} of {recipe.steps}")
    start, losses = time.monotonic() - seconds, []
    for step in range(first, recipe.steps):
        for optimiser, rate in zip(optimisers, (recipe.muon_lr, recipe.adamw_lr), strict=True):
            optimiser.param_groups[0]["lr"] = rate * recipe.rate(step)
        losses.append(_step(module, optimisers, loss_of(step)))
        seconds, done = time.monotonic() - start, step + 1
        if done % REPORT_EVERY == 0 or done == recipe.steps:
            mean = sum(losses) / len(losses)
            progress(f"{name}: step {done} of {recipe.steps}, loss {mean:.3f}, {seconds:.0f} s")
            losses = []
        if done % save_every == 0 or done == recipe.steps:
            _save(checkpoint, module, optimisers, recipe, done, seconds)
    return seconds


def _step(module: nn.Module, optimisers: list[torch.optim.Optimizer], loss: Tensor) -> float:
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
    return loss.item()


def _save(
    path: Path,
    module: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    recipe: Recipe,
    step: int,
    seconds: float,
) -> None:
    """Write the checkpoint beside its place, then move it there in one go."""
    state = {
        "model": module.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "recipe": asdict(recipe),
        "step": step,
        "seconds": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _resume(
    path: Path, module: nn.Module, optimisers: list[torch.optim.Optimizer], recipe: Recipe
) -> tuple[int, float]:
    """Load the checkpoint, if any: (its step, its seconds). UsageError when its recipe differs."""
    if not path.exists():
        return 0, 0.0
    state: dict[str, Any] = torch.load(path, weights_only=True)
    differs = [key for key, value in asdict(recipe).items() if state["recipe"].get(key) != value]
    if differs:
        raise UsageError(
            f"{path}: made with another {', '.join(differs)}; delete it or give the same options"
        )
    module.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return state["step"], state["seconds"]


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of giving it back after each large tensor.

    Handing pages back and forth costs these small models about a tenth of a step on Linux;
    elsewhere nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX in malloc.h
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
