"""The memory of one pass, traced: its forward and backward run on shapes, without numbers.

torch's meta device runs the same modules and the same autograd as training, but its tensors have
no storage. Every operation's outputs are counted while they live, so what is kept for backward,
what gradient checkpointing computes again and what a layer needs for a moment are not formulas
that may age but the program itself. Not seen: workspaces inside of library kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.llava_hd import LlavaHD
from ..model.packing import PackedBatch


@dataclass(frozen=True)
class PassShape:
    """One forward of a rank.

    lengths: tokens of its sequences. tiles: at least 1, a dummy. rows: visual tokens. labels:
    tokens that are learned.
    """

    lengths: tuple[int, ...]
    tiles: int
    rows: int
    labels: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a pass beside weights and their gradients: kept from forward for backward, and the
    most that lives at one time (in forward or backward), kept ones included."""

    kept: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside make, as long as they live.

    known: tensors that are there before; their storages do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def trace_pass(model: LlavaHD, shape: PassShape) -> PassMemory:
    """The memory of a pass through a model on the meta device, in its own precision.

    A parameter's gradient lives until it is complete, as under ZeRO, which takes it then.
    """
    batch = shape_batch(shape, model.config.hd.tile_px)
    learning = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in learning]
    known = [*model.parameters(), *model.buffers(), batch.tiles]
    try:
        with LiveBytes(known) as count:
            output = model(batch)
            kept = count.live
            output.loss_sum.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return PassMemory(kept=kept, peak=count.peak)


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def shape_batch(shape: PassShape, tile_px: int) -> PackedBatch:
    """A pack of that shape on the meta device."""

    def empty(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    return PackedBatch(
        tiles=empty(shape.tiles, 3, tile_px, tile_px, dtype=torch.uint8),
        rows=empty(max(1, shape.rows)),
        source=empty(shape.tokens),
        ids=empty(shape.tokens),
        positions=empty(shape.tokens),
        cu_seqlens=empty(len(shape.lengths) + 1, dtype=torch.int32),
        label_rows=empty(shape.labels),
        targets=empty(shape.labels),
        weights=empty(shape.labels, dtype=torch.float32),
        loss_units=shape.labels,
        num_padding=0,
        max_seqlen=max(shape.lengths),
        num_images=shape.tiles,
        has_dummy=False,
        names=("",) * len(shape.lengths),
    )


def batch_bytes(shape: PassShape, tile_px: int) -> int:
    """Of the tensors of a pack."""
    batch = shape_batch(shape, tile_px)
    tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
