"""Attention for transformers' modules, by AttentionInterface; nothing of theirs is patched.

Ours are registered under names of their own: `auto` decides at every call (`auto_choice`),
`triton` always takes the kernels of kernels/, `xformers` takes its block-diagonal masks. They serve
three callers: packs (cu_seq_lens given), the tower and plain causal batches (no mask), and padded
batches during generation (a mask is given, then torch's sdpa takes it). The other names are
transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..hd.errors import UsageError
from ..hd.grid import suggest
from ..kernels.backend import Table, choose, forced
from ..kernels.flash_attention import flash_attention, operation_of
from .attention_xformers import xformers_attention

# What `attention=` may name -> the implementation that transformers is told.
IMPLEMENTATIONS = {
    "auto": "llava_hd",
    "triton": "llava_hd_triton",
    "xformers": "llava_hd_xformers",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
    "sdpa": "sdpa",
    "eager": "eager",
}
OURS = tuple(name for name in IMPLEMENTATIONS.values() if name.startswith("llava_hd"))
SCHEDULE = "attention_schedule"  # the keyword under which a pack's Schedule reaches every layer


def implementation(name: str) -> str:
    """The transformers name of an `attention=` choice; UsageError for one that cannot run."""
    if name not in IMPLEMENTATIONS:
        raise UsageError(f"attention {name!r} is unknown; {suggest(name, IMPLEMENTATIONS)}")
    try:
        reason = refusal(name)
        forced(default_device())  # a bad switch or table is told here, not in the first forward
    except ValueError as error:
        raise UsageError(str(error)) from error
    if reason is not None:
        raise UsageError(f"attention {name!r}: {reason}; choose attention=auto")
    return IMPLEMENTATIONS[name]


def refusal(name: str) -> str | None:
    """Why an `attention=` choice cannot run on this machine; None when it can."""
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        return "flash-attn is not usable here (not installed, or no CUDA device)"
    if name == "flash_attention_3" and not is_flash_attn_3_available():
        return "flash-attn 3 is not usable here (not installed, or no CUDA device)"
    if name == "triton":
        choice = forced(default_device())
        return choice.reason if choice.table is None else None
    if name == "xformers":
        if find_spec("xformers") is None:
            return "xformers is not installed"
        if not torch.cuda.is_available():
            return "xformers' attention runs on CUDA, and torch finds no device"
    return None


def default_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True)
class Chosen:
    """What `auto` takes for one call: "triton", "flash_attention_2" or "sdpa", and why."""

    name: str
    reason: str


def auto_choice(
    operation: str, device: torch.device, dtype: torch.dtype, rows: int, packed: bool
) -> Chosen:
    """The policy of `attention="auto"` for an operation of the backend's table (or
    "attention_other"); packed: a causal pack, whatever its heads.

    Our kernels where they were measured to win on this kind of GPU; for packs else flash-attn,
    which takes a pack in one call; else torch's sdpa, for packs one sequence after the other.
    """
    ours = choose(operation, device, dtype, rows)
    if ours.table is not None:
        return Chosen("triton", ours.reason)
    narrow = dtype in (torch.float16, torch.bfloat16)
    if packed and device.type == "cuda" and narrow:
        other = refusal("flash_attention_2")
        if other is None:
            return Chosen("flash_attention_2", f"takes a pack in one call; {ours.reason}")
        return Chosen("sdpa", f"{ours.reason}; {other}")
    return Chosen("sdpa", ours.reason)


def auto_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query `[B Hq S d]`, key and value `[B Hkv L d]` -> `[B S Hq d]`."""
    inputs = (module, query, key, value, attention_mask)
    if attention_mask is not None:
        return sdpa_attention_forward(*inputs, scaling=scaling, **kwargs)
    packed = kwargs.get("cu_seq_lens_q") is not None
    q, k = (rearrange(x, "b h s d -> b s h d") for x in (query, key))
    operation, rows = operation_of(q[0] if packed else q, k, packed, bool(module.is_causal))
    pack = packed and bool(module.is_causal)
    if auto_choice(operation, q.device, q.dtype, rows, pack).name == "flash_attention_2":
        return _by_flash_attn(query, key, value, scaling, kwargs), None
    return _by_ours(*inputs[:4], scaling, None, kwargs), None


def triton_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The kernels of kernels/, whatever was measured; padded batches go to sdpa."""
    inputs = (module, query, key, value, attention_mask)
    if attention_mask is not None:
        return sdpa_attention_forward(*inputs, scaling=scaling, **kwargs)
    if query.is_cuda and query.dtype == torch.float32:
        raise UsageError("attention 'triton' needs fp16 or bf16 on a GPU, not fp32")
    choice = forced(query.device)
    if choice.table is None:
        raise UsageError(f"attention 'triton': {choice.reason}")
    return _by_ours(*inputs[:4], scaling, choice.table, kwargs), None


def _by_flash_attn(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, given: dict[str, Any]
) -> Tensor:
    """A causal pack in one call. flash-attn itself is called, because transformers' own function
    asks the model for the name of its attention, which is ours here."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    ends, longest = given["cu_seq_lens_q"], given["max_length_q"]
    out = flash_attn_varlen_func(
        q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True
    )
    return out[None]


def _by_ours(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    table: Table | None,
    given: dict[str, Any],
) -> Tensor:
    q, k, v = (rearrange(x, "b h s d -> b s h d") for x in (query, key, value))
    causal, ends = bool(module.is_causal), given.get("cu_seq_lens_q")
    if ends is None:
        return flash_attention(q, k, v, causal=causal, scale=scale, table=table)
    return flash_attention(
        q[0], k[0], v[0],
        cu_seqlens=ends, causal=causal, scale=scale, schedule=given.get(SCHEDULE), table=table,
    )[None]  # fmt: skip


def attention_mask(
    *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """A mask only where padding asks for one: packs and plain batches carry their own structure."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


REGISTERED: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "auto": auto_attention,
    "triton": triton_attention,
    "xformers": xformers_attention,
}
for _name, _function in REGISTERED.items():
    AttentionInterface.register(IMPLEMENTATIONS[_name], _function)
    AttentionMaskInterface.register(IMPLEMENTATIONS[_name], attention_mask)
