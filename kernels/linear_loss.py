"""Cross entropy from hidden states, on label rows only; the logits are never stored whole.

    loss = Σ_i  -log softmax(hidden[rows[i]] Wᵀ)[targets[i]]

    hidden [T H]   weight [V H]   rows [L] int64   targets [L] int64   ->   scalar fp32 (a sum)

Only the L rows that carry a label are multiplied with the head (in stage 1 a caption of 20 tokens
stands beside 1,000 and more visual rows). The rows go through in chunks; both gradients are made
while a chunk's logits exist, so the peak is chunk·V instead of T·V (the idea of Liger Kernel's
fused linear cross entropy, Hsu et al. 2024, sec. 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 1024


def linear_loss_reference(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """The definition by torch's own cross entropy; same signature as `linear_loss`."""
    logits = (hidden[rows] @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum")


def linear_loss(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of the label rows.

    Args:
        hidden: `[T H]` last hidden states.
        weight: `[V H]`, the language model's head.
        rows: int64 `[L]`, the places that carry a label; may be empty.
        targets: int64 `[L]`, the token that each of them must predict.

    Returns:
        scalar sum, fp32 (fp64 for fp64 inputs); 0 that still reaches `hidden` when L is 0.
    """
    if rows.shape != targets.shape:
        raise ValueError(f"linear_loss: {tuple(rows.shape)} rows, {tuple(targets.shape)} targets")
    return _LinearLoss.apply(hidden.index_select(0, rows), weight, targets)


class _LinearLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None

        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            piece, target = hidden[start : start + CHUNK_ROWS], targets[start : start + CHUNK_ROWS]
            log_probs = (piece @ weight.T).to(wide).log_softmax(-1)
            loss -= log_probs.gather(1, target[:, None]).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(
                1, target[:, None], -torch.ones_like(target[:, None], dtype=wide)
            )
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + CHUNK_ROWS] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ piece

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            # In the wide type: a loss scale of 2^16 is not a finite fp16 number.
            None if grad_hidden is None else (grad_hidden.to(grad.dtype) * grad).to(ctx.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None,
        )
