"""The projector: y = gelu(x W1ᵀ + b1) W2ᵀ + b2 with the exact (erf) GELU.

    x [R D]   w1 [F D]  b1 [F]   w2 [H F]  b2 [H]   ->   y [R H]

`R` visual rows, `D` vision width, `F` hidden width (LLaVA-1.5: F = H), `H` language width.
Exact erf, not the tanh approximation: LLaVA-1.5 trains `nn.GELU()` ("mlp2x_gelu"), and
transformers' `projector_hidden_act="gelu"` is the same function.

Bytes (16-bit): reads R·D + F·D + H·F, writes R·H, and in torch also writes and reads the hidden
rows R·F twice (before and after the GELU).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: Tensor | None = None
) -> Tensor:
    """The definition, written out with erf; same signature as `gelu_mlp`."""
    if rows is not None:
        x = x[rows]
    hidden = x @ w1.T + b1
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ w2.T + b2


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Two linear layers with an exact GELU between, over the chosen rows of x.

    Args:
        x: `[R0 D]` feature rows, any float type.
        w1, b1, w2, b2: `[F D]`, `[F]`, `[H F]`, `[H]` (the layout of `nn.Linear`).
        rows: optional int64 `[R]`: take x[rows] first; what is not named is never computed.

    Returns:
        `[R H]` in the type of x (`R = R0` without `rows`).
    """
    if x.ndim != 2 or x.shape[1] != w1.shape[1] or w2.shape[1] != w1.shape[0]:
        raise ValueError(
            f"gelu_mlp: shapes do not chain: x {tuple(x.shape)}, w1 {tuple(w1.shape)}, "
            f"w2 {tuple(w2.shape)}; need x [R D], w1 [F D], w2 [H F]"
        )
    if rows is not None:
        x = x.index_select(0, rows)
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
