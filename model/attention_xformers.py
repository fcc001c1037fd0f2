"""xformers' memory-efficient attention behind transformers' signature, packs by its masks."""

from __future__ import annotations

from typing import Any

from einops import rearrange, repeat
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def xformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    attention_schedule: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query `[B Hq S d]`, key and value `[B Hkv L d]` -> `[B S Hq d]`; padded batches go to sdpa.

    Query heads that share a key head take xformers' five-axis form, in which key and value are
    repeated without a copy.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    from xformers.ops import memory_efficient_attention

    lengths = None
    if cu_seq_lens_q is not None:
        # The schedule remembers the lengths, so that the device is waited for once in a batch.
        known = attention_schedule
        lengths = cu_seq_lens_q.diff().tolist() if known is None else known.lengths()[0]
    bias = mask_for(query.shape[2], key.shape[2], lengths, bool(module.is_causal))
    group = query.shape[1] // key.shape[1]
    q = rearrange(query, "b (h g) s d -> b s h g d", g=group)
    k, v = (repeat(x, "b h l d -> b l h g d", g=group) for x in (key, value))
    if group == 1:
        q, k, v = (x[:, :, :, 0] for x in (q, k, v))
    out = memory_efficient_attention(q, k, v, attn_bias=bias, scale=scaling)
    return (out if group == 1 else rearrange(out, "b s h g d -> b s (h g) d")), None


def mask_for(queries: int, keys: int, lengths: list[int] | None, causal: bool) -> Any:
    """xformers' mask of a pack (`lengths`) or of a dense batch, or None for none.

    Causal masks are aligned at the bottom right, as in kernels/flash_attention.py.
    """
    from xformers.ops.fmha import attn_bias

    if lengths is not None:
        kind = attn_bias.BlockDiagonalCausalMask if causal else attn_bias.BlockDiagonalMask
        rest = queries - sum(lengths)
        return kind.from_seqlens([*lengths, rest] if rest else lengths)
    if not causal:
        return None
    if queries == keys:
        return attn_bias.LowerTriangularMask()
    return attn_bias.LowerTriangularFromBottomRightMask()
