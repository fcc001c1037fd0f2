"""Attention over dense batches and over packs of sequences laid end to end.

    o = softmax(q kᵀ · scale + mask) v        per head; grouped queries share a key/value head

    dense    q [B S Hq d]   k, v [B L Hkv d]  ->  [B S Hq d]
    packed   q [T Hq d]     k, v [T Hkv d]    ->  [T Hq d]      cu_seqlens [S+1] int32, from 0 to T

Causal masks are aligned at the bottom right: with fewer queries than keys (a cached prefix) the
last query sees every key (the convention of FlashAttention-2). Sequences of a pack never see each
other: each is computed from its own rows alone.

FLOPs forward: 4·S·L·Hq·d per sequence, half of it when causal (Dao, FlashAttention-2, sec. 3).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """The definition, with every score written out; same signature as `flash_attention`."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        parts = [
            flash_attention_reference(
                q[None, a:b], k[None, a:b], v[None, a:b], causal=causal, scale=scale
            )[0]
            for a, b in pairwise(ends)
        ]
        return torch.cat(parts) if parts else torch.empty_like(q)
    groups = q.shape[2] // k.shape[2]
    k, v = (repeat(x, "b l h d -> b l (h g) d", g=groups) for x in (k, v))
    scores = torch.einsum("bshd,blhd->bhsl", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if causal:
        scores = scores.masked_fill(~causal_mask(q.shape[1], k.shape[1], q.device), float("-inf"))
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Exact attention; the shapes are in the module's docstring.

    Args:
        cu_seqlens: int32 `[S+1]`, rising from 0 to T: q, k and v are packed.
        causal: token t sees no later token of its sequence.
        scale: factor of the scores; 1/sqrt(d) by default.

    Returns:
        the shape and type of q.
    """
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"flash_attention: {q.shape[-2]} query heads over {k.shape[-2]} key heads")
    if cu_seqlens is None:
        return _dense(q, k, v, causal, scale)
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != q.shape[0]:
        raise ValueError(
            f"flash_attention: cu_seqlens end at {sum(lengths)}, q has {q.shape[0]} rows"
        )
    pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    done = [_dense(a[None], b[None], c[None], causal, scale)[0] for a, b, c in pieces]
    return torch.cat(done) if done else torch.empty_like(q)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    mask = causal_mask(queries, keys, q.device) if causal and 1 < queries < keys else None
    out = F.scaled_dot_product_attention(
        rearrange(q, "b s h d -> b h s d"),
        rearrange(k, "b l h d -> b h l d"),
        rearrange(v, "b l h d -> b h l d"),
        attn_mask=mask,
        is_causal=causal and queries == keys,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return rearrange(out, "b h s d -> b s h d")


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool `[queries keys]`, true where a query may look, aligned at the bottom right."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return mask.tril(diagonal=keys - queries)
