"""Others' attention: written-out scores, torch's backends, xformers, flash-attn.

Everyone gets q, k and v in our form, `[B S H d]` or packed `[T H d]`; a view in another order of
axes is made inside the call, where it costs nothing. What is built once for a batch (a block mask,
lengths as a list) is built beforehand. "padded" is what trainers without packs do: the samples of a
pack padded to the longest, as a dense causal batch under torch's own choice of a kernel; padding
lies behind the words, so that the causal mask alone hides it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from .attention_setting import Absent, Setting, built
from .attention_shapes import SCORES_TIMED
from .kernels_cases import Tensors
from .kernels_providers import Form, Provider

NO_PACKS = "not available: torch's scaled_dot_product_attention has no packs; see padded, varlen"
ONLY_PACKS = "not available: for packs only"
CUDA_ONLY = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """`[B S H d]`: the scores in the inputs' type, their softmax in fp32, as "eager" models do."""
    groups = q.shape[2] // k.shape[2]
    k, v = (repeat(x, "b l h d -> b l (h g) d", g=groups) for x in (k, v))
    scores = torch.einsum("bshd,blhd->bhsl", q, k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(q.dtype)
    return torch.einsum("bhsl,blhd->bshd", weights, v)


def eager_provider(s: Setting) -> Provider:
    """The yardstick of errors; packs one sequence after the other."""
    shape, lengths = s.shape, list(s.shape.lengths)

    def call(t: Tensors, tables: Tensors) -> Tensor:
        q, k, v = t["q"], t["k"], t["v"]
        if not shape.packed:
            return written_out(q, k, v, shape.causal)
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat(
            [written_out(a[None], b[None], c[None], shape.causal)[0] for a, b, c in parts]
        )

    return Provider("eager", call, "torch, scores written out", untimed=_too_many_scores(s))


def _too_many_scores(s: Setting) -> str:
    if s.timed.scores <= SCORES_TIMED:
        return ""
    return f"not timed: the scores are {s.timed.scores / 1e9:.1f}e9 numbers"


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's attention over `[B S H d]`."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (rearrange(x, "b s h d -> b h s d") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return rearrange(out, "b h s d -> b s h d")


def sdpa_provider(name: str, backend: SDPBackend) -> Callable[[Setting], Provider]:
    """torch's attention with one backend and no other."""

    def build(s: Setting) -> Provider:
        if s.shape.packed:
            raise Absent(NO_PACKS)
        if s.device.type == "cpu" and backend in CUDA_ONLY:
            raise Absent(f"not available: torch's {backend.name} backend needs CUDA")

        def call(t: Tensors, tables: Tensors) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(t["q"], t["k"], t["v"], s.shape.causal)

        untimed = _too_many_scores(s) if backend == SDPBackend.MATH else ""
        return Provider(name, call, f"torch, forced {backend.name}", untimed=untimed)

    return build


def padded_provider(s: Setting) -> Provider:
    if not s.shape.packed:
        raise Absent(ONLY_PACKS)
    lengths = list(s.shape.lengths)

    def pad(x: Tensor) -> Tensor:
        return pad_sequence(list(x.split(lengths)), batch_first=True)

    def unpad(x: Tensor) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])

    return Provider(
        "padded",
        lambda t, tables: sdpa(t["q"], t["k"], t["v"], s.shape.causal),
        "torch, dense batch",
        form=Form(
            prepare=lambda t, tables: {name: pad(x.detach()) for name, x in t.items()},
            packed=unpad,
            grad_of=pad,
            grads_of=lambda grads, tables: {name: unpad(x) for name, x in grads.items()},
        ),
    )


def flex_provider(s: Setting) -> Provider:
    if s.device.type == "cpu":
        raise Absent("not available: torch's flex_attention has no backward on a CPU")
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # else the shapes of earlier cases count towards the recompile limit
    return masked_flex(s, torch.compile(flex_attention, dynamic=False))


def masked_flex(s: Setting, function: Any) -> Provider:
    """flex_attention (compiled, to be of use) with the block mask of the shape."""
    from torch.nn.attention.flex_attention import create_block_mask

    shape = s.shape
    tokens = shape.tokens if shape.packed else shape.longest
    owner = torch.arange(len(shape.lengths), device=s.device)
    owner = owner.repeat_interleave(torch.tensor(shape.lengths, device=s.device))

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def causal_in_pack(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (owner[query] == owner[key])

    mask, ms = None, None
    if shape.causal:
        rule = causal_in_pack if shape.packed else causal
        mask, ms = built(
            lambda: create_block_mask(rule, None, None, tokens, tokens, device=s.device), s.device
        )
    grouped = shape.heads != shape.kv_heads

    def call(t: Tensors, tables: Tensors) -> Tensor:
        batch = (x[None] if shape.packed else x for x in (t["q"], t["k"], t["v"]))
        q, k, v = (rearrange(x, "b s h d -> b h s d") for x in batch)
        out = rearrange(
            function(q, k, v, block_mask=mask, enable_gqa=grouped), "b h s d -> b s h d"
        )
        return out[0] if shape.packed else out

    return Provider("flex", call, "torch.compile of flex_attention", setup_ms=ms)


def varlen_provider(s: Setting) -> Provider:
    """torch.nn.attention.varlen; its causal flag became a window between 2.10 and 2.11."""
    if not s.shape.packed:
        raise Absent(ONLY_PACKS)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Absent(f"not available: torch {torch.__version__} has no varlen_attn") from error
    if s.device.type == "cpu":
        raise Absent("not available: torch's varlen_attn needs CUDA")
    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if windowed else {"is_causal": True}
    longest = s.shape.longest

    def call(t: Tensors, tables: Tensors) -> Tensor:
        ends = tables["cu_seqlens"]
        out = varlen_attn(t["q"], t["k"], t["v"], ends, ends, longest, longest, **causal)
        assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
        return out

    return Provider("varlen", call, "torch.nn.attention.varlen")


# Others


def _module(name: str, package: str) -> Any:
    """A rival's module; Absent where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Absent(f"not installed: {package} ({error})") from error


def xformers_provider(s: Setting) -> Provider:
    """memory_efficient_attention under its own choice of a kernel; grouped queries as it wants
    them, `[B S G H/G d]` with keys that are expanded views."""
    ops = _module("xformers.ops", "xformers")
    biases = _module("xformers.ops.fmha.attn_bias", "xformers")
    shape, bias = s.shape, None
    if shape.packed:
        bias = biases.BlockDiagonalCausalMask.from_seqlens(list(shape.lengths))
    elif shape.causal:
        bias = biases.LowerTriangularMask()
    inside = shape.heads // shape.kv_heads

    def call(t: Tensors, tables: Tensors) -> Tensor:
        q, k, v = (x[None] if shape.packed else x for x in (t["q"], t["k"], t["v"]))
        if inside > 1:
            q = rearrange(q, "b s (g h) d -> b s g h d", h=inside)
            k, v = (x[:, :, :, None].expand(-1, -1, -1, inside, -1) for x in (k, v))
        out = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
        out = rearrange(out, "b s g h d -> b s (g h) d") if inside > 1 else out
        return out[0] if shape.packed else out

    return Provider("xformers", call, "memory_efficient_attention")


def flash_attn_provider(s: Setting) -> Provider:
    theirs = _module("flash_attn", "flash-attn")
    shape, longest = s.shape, s.shape.longest

    def call(t: Tensors, tables: Tensors) -> Tensor:
        q, k, v = t["q"], t["k"], t["v"]
        if not shape.packed:
            return theirs.flash_attn_func(q, k, v, causal=shape.causal)
        ends = tables["cu_seqlens"]
        return theirs.flash_attn_varlen_func(
            q, k, v, ends, ends, longest, longest, causal=shape.causal
        )

    return Provider("flash-attn", call, f"flash_attn {theirs.__version__}")
