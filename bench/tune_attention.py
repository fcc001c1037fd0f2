"""What `bench tune` times of the attention kernels.

Packs of causal sequences of 2,048 tokens (and one shorter), 32 heads over 32 key heads, head
dimension as the kernel's name says; the tower's 577 tokens, 16 heads of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention_launch
from ..kernels.attention_schedule import Schedule, dense_schedule
from ..kernels.backend import Blocks, Entry, Table
from ..kernels.flash_attention import (
    flash_attention,
    flash_attention_reference,
    flash_attention_torch,
    pack_schedule,
)
from .tune_options import Sizes
from .tune_task import Task

SEQUENCE, TOWER_TOKENS = 2048, 577
Triple = tuple[Tensor, Tensor, Tensor]


def attention_task(
    name: str, rows: int, table: Table, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Task:
    """The task of a kernel of backend.ATTENTION."""
    if name == "attention_tower_64":
        return _tower_task(rows, table, sizes, device, dtype)
    width = int(name.rsplit("_", 1)[1])
    q, k, v, dout = _normal(4, (rows, sizes.heads, width), sizes, device, dtype)
    schedule = _pack(rows, device)
    scale = width**-0.5

    def with_blocks(blocks: Blocks) -> Table:
        return replace(table, entries={**table.entries, name: Entry(0, blocks)})

    if name.startswith("attention_forward"):

        def ours(blocks: Blocks) -> tuple[Tensor, ...]:
            return attention_launch.forward(q, k, v, schedule, scale, with_blocks(blocks))[:1]

        def rival() -> tuple[Tensor, ...]:
            return (flash_attention_torch(q, k, v, schedule=schedule),)

        def exact() -> tuple[Tensor, ...]:
            return (_definition((q, k, v), schedule),)

        return Task(ours, rival, exact, _nothing)
    # Both backward kernels run: the other one keeps its blocks, so the faster sum is the better.
    out, lse = attention_launch.forward(q, k, v, schedule, scale, table)

    def gradients(blocks: Blocks) -> tuple[Tensor, ...]:
        chosen = with_blocks(blocks)
        return attention_launch.backward(dout, q, k, v, out, lse, schedule, scale, chosen)

    def torchs() -> tuple[Tensor, ...]:
        return _grads(
            lambda *args: flash_attention_torch(*args, schedule=schedule), (q, k, v), dout
        )

    def truth() -> tuple[Tensor, ...]:
        wide = (q.double(), k.double(), v.double())
        return _grads(lambda *args: _definition(args, schedule), wide, dout.double())

    return Task(gradients, torchs, truth, _nothing)


def _tower_task(
    rows: int, table: Table, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Task:
    q, k, v = _tower(rows, sizes, device, dtype)

    def ours(blocks: Blocks) -> tuple[Tensor, ...]:
        entries = {**table.entries, "attention_tower_64": Entry(0, blocks)}
        chosen = replace(table, entries=entries)
        return (flash_attention(q, k, v, causal=False, table=chosen),)

    return Task(
        ours,
        lambda: (flash_attention_torch(q, k, v, causal=False),),
        lambda: (flash_attention_reference(q.double(), k.double(), v.double(), causal=False),),
        _nothing,
    )


def attention_calls(
    name: str, rows: int, table: Table, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """An operation as a step calls it, "ours" and its rivals: packs and dense batches forward and
    backward with heads of 128, the frozen tower forward alone."""
    if name == "attention_tower":
        q, k, v = _tower(rows, sizes, device, dtype)
        return {
            "ours": lambda: flash_attention(q, k, v, causal=False, table=table),
            "torch": lambda: flash_attention_torch(q, k, v, causal=False),
        }
    q, k, v, dout = _normal(4, (rows, sizes.heads, 128), sizes, device, dtype)
    schedule = _pack(rows, device)
    if name == "attention_dense":
        batch = max(1, rows // SEQUENCE)
        q, k, v, dout = (
            x[: batch * (rows // batch)].unflatten(0, (batch, -1)) for x in (q, k, v, dout)
        )

        def ours(*args: Tensor) -> Tensor:
            return flash_attention(*args, table=table)

        def torchs(*args: Tensor) -> Tensor:
            return flash_attention_torch(*args)
    else:

        def ours(*args: Tensor) -> Tensor:
            ends = schedule.given[0]
            return flash_attention(*args, cu_seqlens=ends, schedule=schedule, table=table)

        def torchs(*args: Tensor) -> Tensor:
            return flash_attention_torch(*args, schedule=schedule)

    calls = {
        "ours": lambda: _grads(ours, (q, k, v), dout),
        "torch": lambda: _grads(torchs, (q, k, v), dout),
    }
    if name == "attention_packed" and find_spec("flash_attn") is not None:
        # What attention="auto" takes for packs where ours is off and flash-attn is installed.
        from flash_attn import flash_attn_varlen_func

        ends = schedule.given[0]

        def theirs(*args: Tensor) -> Tensor:
            return flash_attn_varlen_func(*args, ends, ends, SEQUENCE, SEQUENCE, causal=True)

        calls["flash-attn"] = lambda: _grads(theirs, (q, k, v), dout)
    return calls


def _normal(
    count: int, shape: tuple[int, ...], sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    made = torch.Generator(device).manual_seed(sizes.seed)
    drawn = (torch.randn(shape, generator=made, device=device) for _ in range(count))
    return [tensor.to(dtype) for tensor in drawn]


def _tower(rows: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Triple:
    tiles = max(1, rows // TOWER_TOKENS)
    shape = (tiles, TOWER_TOKENS, max(1, sizes.heads // 2), 64)
    q, k, v = _normal(3, shape, sizes, device, dtype)
    dense_schedule(tiles, TOWER_TOKENS, TOWER_TOKENS, False, device)  # outside the timing
    return q, k, v


def _pack(rows: int, device: torch.device) -> Schedule:
    ends = [*range(0, rows, SEQUENCE), rows]
    return pack_schedule(torch.tensor(ends, dtype=torch.int32, device=device), rows)


def _definition(args: tuple[Tensor, ...], schedule: Schedule) -> Tensor:
    q, k, v = args
    return flash_attention_reference(q, k, v, cu_seqlens=schedule.given[0])


def _grads(
    forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(forward(*leaves), leaves, dout)


def _nothing() -> None:
    """No call of these tasks overwrites its inputs."""
