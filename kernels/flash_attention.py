"""Attention over dense batches and over packs of sequences laid end to end.

    o = softmax(q kᵀ · scale + mask) v        per head; grouped queries share a key/value head

    dense    q [B S Hq d]   k, v [B L Hkv d]  ->  [B S Hq d]
    packed   q [T Hq d]     k, v [T Hkv d]    ->  [T Hq d]      cu_seqlens [S+1] int32, from 0 on

Causal masks are aligned at the bottom right: with fewer queries than keys (a cached prefix) the
last query sees every key (the convention of FlashAttention-2); a query without keys gives 0.
Sequences of a pack never see each other, and rows behind the last end belong to none: they give 0.

On a GPU the Triton kernels of attention_kernels.py serve fp16 and bf16 where the table of block
sizes says so (backend.py), else torch's scaled_dot_product_attention, for packs one sequence after
the other. Neither adds up with atomics: results are the same bit for bit from run to run on the
Triton path.

FLOPs forward: 4·S·L·Hq·d per sequence, half of it when causal (Dao, FlashAttention-2, sec. 3).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .attention_schedule import Schedule, dense_schedule
from .backend import Table, choose

LARGEST_HEAD = 256  # that the kernels serve
TOWER_BLOCK, TOWER_HEAD, MEASURED_HEAD = 64, 64, 128


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
        return torch.cat([*parts, torch.zeros_like(q[ends[-1] :])])
    groups = q.shape[2] // k.shape[2]
    k, v = (repeat(x, "b l h d -> b l (h g) d", g=groups) for x in (k, v))
    scores = torch.einsum("bshd,blhd->bhsl", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if causal:
        scores = scores.masked_fill(~causal_mask(q.shape[1], k.shape[1], q.device), float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # a query without keys gives 0
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("bhsl,blhd->bshd", weights, v)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    schedule: Schedule | None = None,
    table: Table | None = None,
) -> Tensor:
    """Exact attention; the shapes are in the module's docstring.

    Args:
        cu_seqlens: int32 `[S+1]`, rising from 0: q, k and v are packed. Checked where they are on
            the CPU (ValueError); on a GPU ends beyond the rows count as the last row.
        causal: token t sees no later token of its sequence.
        scale: factor of the scores; 1/sqrt(d) by default.
        schedule: of the same cu_seqlens and causal, made once by `pack_schedule` for all layers.
        table: use the Triton kernels with these blocks; by default the backend decides.

    Returns:
        the shape and type of q.
    """
    return _attend(q, k, v, cu_seqlens, causal, scale, schedule, table, False)[0]


def flash_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    schedule: Schedule | None = None,
    table: Table | None = None,
) -> tuple[Tensor, Tensor]:
    """As `flash_attention`, and the natural log of the sum of each query's exponentials: fp32
    (fp64 for fp64), `[B Hq S]` or packed `[Hq T]`, -inf for a query without keys; no gradient."""
    out, lse = _attend(q, k, v, cu_seqlens, causal, scale, schedule, table, True)
    assert lse is not None
    return out, lse


def pack_schedule(cu_seqlens: Tensor, num_tokens: int, causal: bool = True) -> Schedule:
    """What `flash_attention` works out for a pack of `num_tokens` rows, to be shared by layers."""
    return Schedule(cu_seqlens, cu_seqlens, num_tokens, num_tokens, causal)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float | None,
    schedule: Schedule | None,
    table: Table | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    _check(q, k, v, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if table is None and q.shape[-1] <= LARGEST_HEAD:
        operation, rows = operation_of(q, k, cu_seqlens is not None, causal)
        table = choose(operation, q.device, q.dtype, rows).table
    if cu_seqlens is not None:
        if schedule is None:
            schedule = pack_schedule(cu_seqlens, q.shape[0], causal)
        elif schedule.causal != causal or schedule.num_rows != (q.shape[0], k.shape[0]):
            raise ValueError(
                f"flash_attention: the schedule is for {schedule.num_rows} rows, causal "
                f"{schedule.causal}; the call for {(q.shape[0], k.shape[0])}, causal {causal}"
            )
    if table is None or not (q.numel() and k.numel()):
        return _by_torch(q, k, v, schedule, causal, scale, with_lse)
    if schedule is None:
        return _dense_triton(q, k, v, causal, scale, table, with_lse)
    from .attention_launch import Attention  # Triton is imported only where it runs

    with torch.cuda.device_of(q):
        out, lse = Attention.apply(q, k, v, schedule, scale, table, False)
    return out, lse * math.log(2) if with_lse else None


def flash_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention, over packs (`schedule`) one sequence at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _by_torch(q, k, v, schedule, causal, scale, False)[0]


def _by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule | None,
    causal: bool,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if schedule is not None:
        return _packed(q, k, v, schedule, scale, with_lse)
    return _dense(q, k, v, causal, scale), _lse(q, k, causal, scale) if with_lse else None


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"flash_attention: {q.shape[-2]} query heads over {k.shape[-2]} key heads")
    same = q.shape[-1] == k.shape[-1] and (cu_seqlens is not None or q.shape[0] == k.shape[0])
    if (
        k.shape != v.shape
        or q.ndim != (4 if cu_seqlens is None else 3)
        or q.ndim != k.ndim
        or not same
    ):
        raise ValueError(
            f"flash_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; need "
            "[B S H d], or [T H d] with cu_seqlens"
        )
    if cu_seqlens is not None and q.shape[0] != k.shape[0]:
        raise ValueError(f"flash_attention: {q.shape[0]} packed queries, {k.shape[0]} keys")


def operation_of(q: Tensor, k: Tensor, packed: bool, causal: bool) -> tuple[str, int]:
    """The backend's name of the operation, and its rows (tokens).

    `bench tune` measures three classes: causal packs and causal dense batches with heads beyond 64
    and up to 128, and the tower's (full attention over one token more than blocks of 64, such as
    257 and 577, heads up to 64). All else is "attention_other", which stays with torch."""
    rows = q.shape[0] if packed else q.shape[0] * q.shape[1]
    if causal and TOWER_HEAD < q.shape[-1] <= MEASURED_HEAD:
        return ("attention_packed" if packed else "attention_dense"), rows
    if packed:
        return "attention_other", rows
    tower = not causal and q.shape[1] == k.shape[1] and q.shape[1] % TOWER_BLOCK == 1 < q.shape[1]
    return ("attention_tower" if tower and q.shape[-1] <= TOWER_HEAD else "attention_other"), rows


def _dense_triton(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, table: Table, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    from .attention_launch import Attention  # Triton is imported only where it runs

    batch, queries = q.shape[:2]
    schedule = dense_schedule(batch, queries, k.shape[1], causal, q.device)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    apart = not causal and operation_of(q, k, False, causal)[0] == "attention_tower"
    with torch.cuda.device_of(q):
        out, lse = Attention.apply(*flat, schedule, scale, table, apart)
    out = out.unflatten(0, (batch, queries))
    if not with_lse:
        return out, None
    return out, rearrange(lse, "h (b s) -> b h s", b=batch) * math.log(2)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """torch's path for packs: one sequence after the other."""
    lengths = schedule.lengths()[0]
    rest = q.shape[0] - sum(lengths)
    pieces = [x.split([*lengths, rest])[:-1] for x in (q, k, v)]
    done, logs = [q.new_zeros(0, *q.shape[1:])], []
    for a, b, c in zip(*pieces, strict=True):
        done.append(_dense(a[None], b[None], c[None], schedule.causal, scale)[0])
        if with_lse:
            logs.append(_lse(a[None], b[None], schedule.causal, scale)[0])
    out = torch.cat([*done, _zeros_of(q[q.shape[0] - rest :])])
    if not with_lse:
        return out, None
    none = torch.full((q.shape[1], rest), float("-inf"), device=q.device)
    return out, torch.cat([*logs, none], 1)


@torch.no_grad()
def _lse(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """`[B Hq S]`; torch does not return it, so the scores are written out."""
    wide = torch.promote_types(q.dtype, torch.float32)
    key = repeat(k, "b l h d -> b l (h g) d", g=q.shape[2] // k.shape[2]).to(wide)
    scores = torch.einsum("bshd,blhd->bhsl", q.to(wide), key) * scale
    if causal:
        mask = causal_mask(q.shape[1], k.shape[1], q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.logsumexp(-1)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    if keys < queries and causal and keys:  # the first queries see no key
        blind = _zeros_of(q[:, : queries - keys])
        return torch.cat([blind, _dense(q[:, queries - keys :], k, v, True, scale)], 1)
    if keys == 0:
        return _zeros_of(q)
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


def _zeros_of(q: Tensor) -> Tensor:
    """Zeros in q's shape that still have a (zero) gradient for q; NaN in q stays out."""
    return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool `[queries keys]`, true where a query may look, aligned at the bottom right."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return mask.tril(diagonal=keys - queries)
