"""The kernels of attention_kernels.py as functions of tensors, and their autograd function."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import attention_kernels as kernels
from .attention_schedule import Schedule
from .backend import Blocks, Table

LOG2_E = math.log2(math.e)
SMALLEST_D = 16  # of a tensor-core product


def blocks_name(kernel: str, head_dim: int) -> str:
    """The table's name for `kernel` ("forward", "query_grad", "key_grad") at a head dimension."""
    width = next((width for width in (64, 128, 256) if head_dim <= width), None)
    if width is None:
        raise ValueError(f"flash_attention: head dimension {head_dim}; the kernels serve up to 256")
    return f"attention_{kernel}_{width}"


def _side_by_side(x: Tensor) -> Tensor:
    """x `[T H d]` with its columns side by side; rows and heads may stand anywhere."""
    return x if x.stride(-1) == 1 and x.stride(0) > 0 and x.stride(1) > 0 else x.contiguous()


def _constants(head_dim: int, dtype: torch.dtype, blocks: Blocks) -> dict[str, Any]:
    width = max(SMALLEST_D, triton.next_power_of_2(head_dim))
    return {
        "D": head_dim,
        "FULL_D": width == head_dim,
        "PRECISION": "ieee" if dtype == torch.float32 else None,
        "BM": blocks.rows,
        "BN": blocks.cols,
        "BD": width,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule,
    scale: float,
    table: Table,
    first_apart: bool = False,
) -> tuple[Tensor, Tensor]:
    """out `[T Hq d]` and the base-2 log-sum-exp, fp32 `[Hq T]`.

    first_apart: serve the first token of each sequence on its own (kernels' FIRST_APART); full
    attention over sequences of at least one token only.
    """
    total, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, total, dtype=torch.float32, device=q.device)
    name = "attention_tower_64" if first_apart else blocks_name("forward", head_dim)
    blocks = table.blocks(name)
    entries = schedule.query_blocks(blocks.rows, skip=int(first_apart))
    group = heads // k.shape[1]
    places = (
        total, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
    )  # fmt: skip
    constants = _constants(head_dim, q.dtype, blocks)
    kernels.forward_kernel[(len(entries), heads)](
        q, k, v, out, lse, schedule.cu_q, schedule.cu_k, entries, scale * LOG2_E, *places,
        GROUP=group, CAUSAL=schedule.causal, FIRST_APART=first_apart, **constants,
    )  # fmt: skip
    if first_apart:
        kernels.first_query_kernel[(schedule.num_sequences, heads)](
            q, k, v, out, lse, schedule.cu_q, schedule.cu_k, scale * LOG2_E, *places,
            GROUP=group, D=head_dim, BN=blocks.cols, BD=constants["BD"], num_warps=4,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: Schedule,
    scale: float,
    table: Table,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes and types; the same bit for bit each time."""
    dout = _side_by_side(dout)
    total, heads, head_dim = q.shape
    group = heads // k.shape[1]
    delta = torch.empty_like(lse)
    own = table.blocks(blocks_name("query_grad", head_dim))
    constants = _constants(head_dim, q.dtype, own)
    kernels.delta_kernel[(triton.cdiv(total, own.rows), heads)](
        out, dout, delta, total, *out.stride()[:2], *dout.stride()[:2],
        D=head_dim, FULL_D=constants["FULL_D"], BM=own.rows, BD=constants["BD"], num_warps=4,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inputs = (q, k, v, dout, lse, delta)
    ends = (schedule.cu_q, schedule.cu_k)
    scales = (scale, scale * LOG2_E)
    places = (total, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    entries = schedule.query_blocks(own.rows)
    kernels.query_grad_kernel[(len(entries), heads)](
        *inputs, dq, *ends, entries, *scales, *places, *dq.stride()[:2],
        GROUP=group, CAUSAL=schedule.causal, **constants,
    )  # fmt: skip
    own = table.blocks(blocks_name("key_grad", head_dim))
    entries = schedule.key_blocks(own.cols)
    kernels.key_grad_kernel[(len(entries), k.shape[1])](
        *inputs, dk, dv, *ends, entries, *scales, *places, *dk.stride()[:2], *dv.stride()[:2],
        GROUP=group, CAUSAL=schedule.causal, **_constants(head_dim, q.dtype, own),
    )  # fmt: skip
    return dq, dk, dv


class Attention(torch.autograd.Function):
    """q, k, v, schedule, scale, table, first_apart -> out, lse (base 2, without a gradient)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        schedule: Schedule,
        scale: float,
        table: Table,
        first_apart: bool,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_side_by_side(x) for x in (q, k, v))
        out, lse = forward(q, k, v, schedule, scale, table, first_apart)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = schedule, scale, table
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(dout, *ctx.saved_tensors, *ctx.settings), None, None, None, None)
