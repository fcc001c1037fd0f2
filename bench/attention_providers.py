"""Who computes attention in the benchmark: ours, and everyone of attention_rivals.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ..kernels.backend import Table, architecture, choose, everywhere, load_table
from ..kernels.flash_attention import flash_attention, pack_schedule
from .attention_rivals import (
    eager_provider,
    flash_attn_provider,
    flex_provider,
    padded_provider,
    sdpa_provider,
    varlen_provider,
    xformers_provider,
)
from .attention_setting import Absent, Setting, built
from .kernels_providers import Provider
from .measure import short_error


def attention_providers(setting: Setting, names: tuple[str, ...]) -> list[Provider]:
    """Everyone of `names` who was asked for attention, eager first; those who cannot run here have
    a reason instead of a call."""
    found = []
    for name in (name for name in BUILDERS if name in names):
        try:
            found.append(BUILDERS[name](setting))
        except Absent as reason:
            found.append(Provider(name, None, reason=str(reason)))
        except Exception as error:  # a rival may fail in any way; its row says which
            found.append(Provider(name, None, reason=f"does not run here: {short_error(error)}"))
    return found


def _ours(s: Setting) -> Provider:
    choice = choose(s.shape.operation, s.device, s.dtype, s.timed.tokens)
    return _own("ours", s, choice.table)


def _ours_triton(s: Setting) -> Provider:
    """The Triton kernels whatever the table says of their use."""
    if s.device.type != "cuda":
        raise Absent(f"not available: Triton kernels run on CUDA, not on {s.device.type}")
    if s.dtype == torch.float32:
        raise Absent("not available: the attention kernels serve 16 bits on a GPU")
    if choose(s.shape.operation, s.device, s.dtype, s.timed.tokens).table is not None:
        raise Absent("not timed apart: ours takes the Triton kernels here")
    name = architecture(*torch.cuda.get_device_capability(s.device))
    if name is None:
        raise Absent("not available: compute capability below 8.0")
    return _own("ours-triton", s, everywhere(load_table(name)))


def _own(name: str, s: Setting, table: Table | None) -> Provider:
    path = "torch" if table is None else "triton"
    causal = s.shape.causal
    if not s.shape.packed:
        return Provider(
            name,
            lambda t, tables: flash_attention(t["q"], t["k"], t["v"], causal=causal, table=table),
            path,
        )
    schedule, ms = built(lambda: _schedule(s, table), s.device)
    return Provider(
        name,
        lambda t, tables: flash_attention(
            t["q"],
            t["k"],
            t["v"],
            cu_seqlens=tables["cu_seqlens"],
            causal=causal,
            schedule=schedule,
            table=table,
        ),
        path,
        setup_ms=ms,
    )


def _schedule(s: Setting, table: Table | None) -> Any:
    """The schedule with all that its first use would add."""
    schedule = pack_schedule(s.ends(), s.shape.tokens, s.shape.causal)
    if table is None:
        schedule.lengths()
        return schedule
    from ..kernels.attention_launch import blocks_name  # Triton is imported only where it runs

    for kernel in ("forward", "query_grad"):
        schedule.query_blocks(table.blocks(blocks_name(kernel, s.shape.head_dim)).rows)
    schedule.key_blocks(table.blocks(blocks_name("key_grad", s.shape.head_dim)).cols)
    return schedule


BUILDERS: dict[str, Callable[[Setting], Provider]] = {
    "eager": eager_provider,
    "ours": _ours,
    "ours-triton": _ours_triton,
    "sdpa-flash": sdpa_provider("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": sdpa_provider("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": sdpa_provider("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-math": sdpa_provider("sdpa-math", SDPBackend.MATH),
    "padded": padded_provider,
    "flex": flex_provider,
    "varlen": varlen_provider,
    "xformers": xformers_provider,
    "flash-attn": flash_attn_provider,
}
