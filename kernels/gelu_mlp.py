"""The projector: y = gelu(x W1ᵀ + b1) W2ᵀ + b2 with the exact (erf) GELU.

    x [R D]   w1 [F D]  b1 [F]   w2 [H F]  b2 [H]   ->   y [R H]

`R` visual rows, `D` vision width, `F` hidden width (LLaVA-1.5: F = H), `H` language width.
Exact erf, not the tanh approximation: LLaVA-1.5 trains `nn.GELU()` ("mlp2x_gelu"), and
transformers' `projector_hidden_act="gelu"` is the same function.

Forward, with h = x W1ᵀ + b1 and g = gelu(h):    y = g W2ᵀ + b2
Backward:    dg = dy W2,  dh = dg ⊙ gelu'(h),  dW2 = dyᵀ g,  db2 = Σ dy,  dW1 = dhᵀ x,  db1 = Σ dh,
             dx = dh W1 only where x asks for it (the tower is frozen in both stages)

Memory between forward and backward: autograd keeps x[rows], h and g; ours keeps h alone (R·F), and
backward writes g over it. With `recompute` it keeps nothing and computes h again.

Bytes (16-bit), beside the weights: reads R·D, writes R·H; h and g each make one trip through
memory where a library's product is used, and h alone (none without gradients) where ours is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .backend import Table, choose


def gelu_mlp_reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    rows: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """The definition, written out with erf; same signature as `gelu_mlp`."""
    if rows is not None:
        x = x[rows]
    hidden = x @ w1.T + b1
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ w2.T + b2


def gelu_mlp_torch(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Plain torch: two library products and a GELU, under autograd."""
    if rows is not None:
        x = x.index_select(0, rows)
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    rows: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Two linear layers with an exact GELU between, over the chosen rows of x.

    Args:
        x: `[R0 D]` feature rows, fp32, fp16 or bf16 (torch's path: any float type).
        w1, b1, w2, b2: `[F D]`, `[F]`, `[H F]`, `[H]` (the layout of `nn.Linear`), x's type.
        rows: optional int64 `[R]`: take x[rows] first; what is not named is never computed.
        recompute: keep nothing for backward but the inputs, and compute the hidden rows again.

    Returns:
        `[R H]` in the type of x (`R = R0` without `rows`).

    On the Triton path backward can run once: it uses up the hidden rows that forward kept
    (RuntimeError on a second pass through a retained graph; `recompute=True` allows it).
    """
    check_shapes(x, w1, b1, w2, b2)
    count = x.shape[0] if rows is None else rows.shape[0]
    table = choose("gelu_mlp", x.device, x.dtype, count).table
    if table is not None:
        return gelu_mlp_triton(x, w1, b1, w2, b2, rows, recompute=recompute, table=table)
    if recompute and torch.is_grad_enabled():
        again = checkpoint(gelu_mlp_torch, x, w1, b1, w2, b2, rows, use_reentrant=False)
        assert isinstance(again, Tensor)
        return again
    return gelu_mlp_torch(x, w1, b1, w2, b2, rows)


def check_shapes(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    """ValueError where the shapes do not chain."""
    chained = x.ndim == 2 and x.shape[1] == w1.shape[1] and w2.shape[1] == w1.shape[0]
    if not chained or b1.shape != w1.shape[:1] or b2.shape != w2.shape[:1]:
        shapes = ", ".join(
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in zip(("x", "w1", "b1", "w2", "b2"), (x, w1, b1, w2, b2), strict=True)
        )
        raise ValueError(
            f"gelu_mlp: shapes do not chain: {shapes}; need x [R D], w1 [F D], b1 [F], w2 [H F], "
            "b2 [H]"
        )


def gelu_mlp_triton(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    rows: Tensor | None = None,
    *,
    table: Table,
    recompute: bool = False,
) -> Tensor:
    """Our autograd function with the kernels that `table` asks for; at least one row."""
    inputs = (x, w1, b1, w2, b2)
    if any(tensor.dtype != x.dtype for tensor in inputs):
        raise ValueError(f"gelu_mlp: one type for all inputs, not {[t.dtype for t in inputs]}")
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    with torch.cuda.device_of(x):
        y = _GeluMLP.apply(x, w1, b1, w2, b2, rows, table, keep and not recompute)
    assert isinstance(y, Tensor)
    return y


class _GeluMLP(torch.autograd.Function):
    """x, w1, b1, w2, b2, rows, table, keep (whether forward saves the hidden rows)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        rows: Tensor | None,
        table: Table,
        keep: bool,
    ) -> Tensor:
        hidden, activated = up(x, w1, b1, rows, table, keep)
        remember(ctx, x, w1, b1, w2, rows, hidden if keep else None, table)
        if table.uses("down", activated.shape[0]):
            from .launch import linear_rows

            return linear_rows(activated, w2, b2, table.blocks("down"))
        return F.linear(activated, w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, dy), None, None, None)


def remember(
    ctx: Any,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    rows: Tensor | None,
    hidden: Tensor | None,
    table: Table,
) -> None:
    """Keep in an autograd context what `gradients` needs; hidden: None to compute it again."""
    ctx.save_for_backward(x, w1, b1, w2, rows, hidden)
    ctx.table, ctx.spent = table, False


def gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """Those of x, w1, b1, w2, b2 (the first five inputs of the function that `ctx` belongs to),
    None where none is asked for. Uses up the hidden rows: RuntimeError the second time."""
    x, w1, b1, w2, rows, hidden = ctx.saved_tensors
    if ctx.spent:
        raise RuntimeError(
            "gelu_mlp: backward ran a second time, but the first one used up the hidden rows; "
            "call gelu_mlp or project_rows with recompute=True to go through a graph more than once"
        )
    ctx.spent = hidden is not None
    if hidden is None:
        hidden, _ = up(x, w1, b1, rows, ctx.table, True)
    need = ctx.needs_input_grad
    dx = dw1 = db1 = dw2 = db2 = None
    if any(need[:3]):
        dh, sums = _hidden_grad(dy, w2, hidden, ctx.table, keep_gelu=need[3])
        db1 = sums.to(b1.dtype) if need[2] else None
        dw1 = _weight_grad(dh, x, rows, ctx.table)[0] if need[1] else None
        dx = _input_grad(dh, w1, x, rows) if need[0] else None
    elif need[3]:
        hidden = F.gelu(hidden)
    if need[3]:
        dw2, db2 = _weight_grad(dy, hidden, None, ctx.table, sums=need[4])
    elif need[4]:
        db2 = column_sums(dy)
    return [dx, dw1, db1, dw2, db2]


def up(
    x: Tensor, w1: Tensor, b1: Tensor, rows: Tensor | None, table: Table, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """The hidden rows before (None unless `keep`) and after the GELU."""
    from .launch import linear_rows  # Triton is imported only where it runs

    count = x.shape[0] if rows is None else rows.shape[0]
    if table.uses("up", count):
        hidden = x.new_empty(count, w1.shape[0]) if keep else None
        blocks = table.blocks("up")
        return hidden, linear_rows(x, w1, b1, blocks, rows=rows, gelu=True, pre=hidden)
    hidden = F.linear(x if rows is None else x.index_select(0, rows), w1, b1)
    return hidden, F.gelu(hidden)


def _hidden_grad(
    dy: Tensor, w2: Tensor, hidden: Tensor, table: Table, keep_gelu: bool
) -> tuple[Tensor, Tensor]:
    """dh and its fp32 column sums; `hidden` becomes gelu(hidden) where `keep_gelu`."""
    from .launch import gelu_grad, hidden_grad

    if table.uses("hidden_grad", hidden.shape[0]):
        blocks = table.blocks("hidden_grad")
        return hidden_grad(dy, w2, hidden, blocks, keep_gelu=keep_gelu)
    dg = dy @ w2
    return dg, gelu_grad(dg, hidden, table.blocks("gelu_grad"), keep_gelu=keep_gelu)


def _weight_grad(
    a: Tensor, b: Tensor, rows: Tensor | None, table: Table, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """aᵀ b[rows], summed in fp32, and where asked the column sums of a, both in a's type."""
    from .launch import weight_grad

    if table.uses("weight_grad", a.shape[0]):
        dw, db = weight_grad(a, b, table.blocks("weight_grad"), rows=rows, sums=sums)
        return dw, None if db is None else db.to(a.dtype)
    dw = library_weight_grad(a, b if rows is None else b.index_select(0, rows))
    return dw, column_sums(a) if sums else None


def library_weight_grad(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b by the library, summed in fp32, in a's type."""
    if a.is_cuda and a.dtype != torch.float32:
        # cuBLAS may add up the parts of a split sum in 16 bits, unless the result has 32.
        return torch.mm(a.T, b, out_dtype=torch.float32).to(a.dtype)
    return a.T @ b


def column_sums(a: Tensor) -> Tensor:
    """Σ over the rows of a, in fp32, in a's type."""
    return a.sum(0, dtype=torch.float32).to(a.dtype)


def _input_grad(dh: Tensor, w1: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    dx = dh @ w1
    if rows is None:
        return dx
    # In a fixed order also where a row is named twice, unlike index_add on a GPU.
    return torch.zeros_like(x).index_put_((rows,), dx, accumulate=True)
