"""The form of a task of `bench tune`: one kernel at one size, its rival and the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..kernels.backend import Blocks


@dataclass
class Task:
    """One kernel at one size.

    ours(blocks) and rival() return the tensors to compare, exact() the same in fp64. `restore` puts
    back what a call overwrites (the hidden rows)."""

    ours: Callable[[Blocks], tuple[Tensor, ...]]
    rival: Callable[[], tuple[Tensor, ...]]
    exact: Callable[[], tuple[Tensor, ...]]
    restore: Callable[[], None]

    def fresh(self, call: Callable[[Task], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The results of a call, as they were before anything else was overwritten."""
        self.restore()
        results = tuple(tensor.clone() for tensor in call(self))
        self.restore()
        return results
