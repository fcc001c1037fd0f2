"""Cross entropy from hidden states, on label rows only; the logits are never stored whole.

    loss = Σ_i  -weights[i] · log softmax(hidden[rows[i]] Wᵀ)[targets[i]]

    hidden [T H]  weight [V H]  rows, targets [L] int64  weights [L], or 1  ->  scalar fp32 (a sum)

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


def linear_loss_reference(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The definition by torch's own cross entropy; same signature as `linear_loss`."""
    logits = (hidden[rows] @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses if weights is None else losses * weights).sum()


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the cross entropies of the label rows.

    Args:
        hidden: `[T H]` last hidden states.
        weight: `[V H]`, the language model's head.
        rows: int64 `[L]`, the places that carry a label; may be empty. None: hidden is `[L H]`.
        targets: int64 `[L]`, the token that each of them must predict.
        weights: `[L]`, the factor of each row's loss, a constant; 1 by default.

    Returns:
        scalar sum, fp32 (fp64 for fp64 inputs); 0 that still reaches `hidden` when L is 0.
    """
    shape = hidden.shape[:1] if rows is None else rows.shape
    if shape != targets.shape or (weights is not None and weights.shape != shape):
        given = "" if weights is None else f", {tuple(weights.shape)} weights"
        raise ValueError(f"linear_loss: {tuple(shape)} rows, {tuple(targets.shape)} targets{given}")
    asked = hidden if rows is None else hidden.index_select(0, rows)
    return _LinearLoss.apply(asked, weight, targets, weights)


class _LinearLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = None

        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            piece, target = hidden[chunk], targets[chunk]
            factor = None if weights is None else weights[chunk, None].to(wide)
            log_probs = (piece @ weight.T).to(wide).log_softmax(-1)
            chosen = log_probs.gather(1, target[:, None])
            loss -= (chosen if factor is None else chosen * factor).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(
                1, target[:, None], -torch.ones_like(target[:, None], dtype=wide)
            )
            if factor is not None:
                grad_logits *= factor
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ weight
            if needs_weight:
                part = (grad_logits.T @ piece).to(wide)
                grad_weight = part if grad_weight is None else grad_weight.add_(part)

        if needs_weight and grad_weight is None:  # no labelled row at all
            grad_weight = torch.zeros_like(weight, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            # In the wide type: a loss scale of 2^16 is not a finite fp16 number.
            None if grad_hidden is None else (grad_hidden.to(grad.dtype) * grad).to(ctx.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None,
            None,
        )
