"""What a provider of attention is built for, and what it builds beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .attention_shapes import Shape
from .measure import quantiles

BUILDS = 5  # of what is built once for a batch; the median is told
Made = TypeVar("Made")


class Absent(Exception):
    """A provider that cannot be; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """What a provider is built for. `timed`: the shape at which times are taken, which decides the
    path of ours; `shape` is that one, or the smaller one at which errors are measured."""

    shape: Shape
    timed: Shape
    dtype: torch.dtype
    device: torch.device

    def ends(self) -> Tensor:
        """cu_seqlens."""
        return torch.tensor(self.shape.ends, dtype=torch.int32, device=self.device)


def built(make: Callable[[], Made], device: torch.device) -> tuple[Made, float]:
    """What `make` makes, and the median milliseconds until the device has it."""
    made, spent = make(), []
    for _ in range(BUILDS):
        _wait(device)
        start = time.perf_counter()
        made = make()
        _wait(device)
        spent.append((time.perf_counter() - start) * 1e3)
    return made, quantiles(spent)[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
