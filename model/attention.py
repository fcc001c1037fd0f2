"""Attention for the transformers modules: `flash_attention` of kernels/, by AttentionInterface.

`LLAVA_HD` is registered under its own name; nothing of transformers is patched. It serves three
callers: packs (cu_seq_lens given), the tower and plain causal batches (no mask), and padded
batches during generation (a mask is given, then torch's sdpa takes it).
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from ..hd.errors import UsageError
from ..hd.grid import suggest
from ..kernels.flash_attention import flash_attention

LLAVA_HD = "llava_hd"
# What `attention=` may name -> the implementation that transformers is told.
IMPLEMENTATIONS = {
    "auto": LLAVA_HD,
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash_attention_2",
}


def implementation(name: str) -> str:
    """The transformers name of an `attention=` choice; UsageError for one that cannot run."""
    if name not in IMPLEMENTATIONS:
        raise UsageError(f"attention {name!r} is unknown; {suggest(name, IMPLEMENTATIONS)}")
    reason = refusal(name)
    if reason is not None:
        raise UsageError(f"attention {name!r}: {reason}; choose attention=auto")
    return IMPLEMENTATIONS[name]


def refusal(name: str) -> str | None:
    """Why an `attention=` choice cannot run on this machine; None when it can."""
    if IMPLEMENTATIONS[name] == "flash_attention_2" and not is_flash_attn_2_available():
        return "flash-attn is not usable here (not installed, or no CUDA device)"
    return None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query `[B Hq S d]`, key and value `[B Hkv L d]` -> `[B S Hq d]`."""
    if attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    q, k, v = (rearrange(x, "b h s d -> b s h d") for x in (query, key, value))
    causal = bool(module.is_causal)
    if cu_seq_lens_q is None:
        return flash_attention(q, k, v, causal=causal, scale=scaling), None
    out = flash_attention(q[0], k[0], v[0], cu_seqlens=cu_seq_lens_q, causal=causal, scale=scaling)
    return out[None], None


def attention_mask(
    *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """A mask only where padding asks for one: packs and plain batches carry their own structure."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(LLAVA_HD, attention_forward)
AttentionMaskInterface.register(LLAVA_HD, attention_mask)
