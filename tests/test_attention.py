"""Which attention runs: the policy of `auto`, refusals, and xformers' masks."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from llava_hd.hd.errors import UsageError
from llava_hd.kernels import backend
from llava_hd.kernels.attention_schedule import Schedule
from llava_hd.kernels.backend import SWITCH, everywhere, load_shipped
from llava_hd.kernels.flash_attention import (
    flash_attention,
    flash_attention_reference,
    operation_of,
    pack_schedule,
)
from llava_hd.model import attention
from llava_hd.model.attention import (
    IMPLEMENTATIONS,
    SCHEDULE,
    Chosen,
    auto_attention,
    auto_choice,
    implementation,
    refusal,
)
from llava_hd.model.attention_xformers import mask_for, xformers_attention

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    backend._table_for.cache_clear()


def on_hopper(monkeypatch: pytest.MonkeyPatch, measured: bool, flash_attn: bool) -> None:
    table = load_shipped("sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(
        backend, "load_table", lambda name: everywhere(table) if measured else table
    )
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: flash_attn)


def test_auto_on_a_cpu_is_sdpa() -> None:
    for operation in ("attention_packed", "attention_dense", "attention_tower"):
        assert auto_choice(operation, CPU, torch.float32, 1000, True).name == "sdpa"


@pytest.mark.parametrize("flash_attn", [True, False])
def test_auto_takes_our_kernels_where_they_were_measured_to_win(
    monkeypatch: pytest.MonkeyPatch, flash_attn: bool
) -> None:
    on_hopper(monkeypatch, measured=True, flash_attn=flash_attn)
    for operation in ("attention_packed", "attention_dense", "attention_tower"):
        assert auto_choice(operation, GPU, torch.bfloat16, 1000, False).name == "triton"
    other = auto_choice("attention_other", GPU, torch.bfloat16, 1000, True)
    assert other.name == ("flash_attention_2" if flash_attn else "sdpa")


def test_auto_without_measurements_takes_flash_attn_for_packs_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_hopper(monkeypatch, measured=False, flash_attn=True)

    def chosen_for(kind: str, dtype: torch.dtype) -> Chosen:
        return auto_choice(f"attention_{kind}", GPU, dtype, 1000, kind == "packed")

    assert chosen_for("packed", torch.bfloat16).name == "flash_attention_2"
    assert chosen_for("dense", torch.bfloat16).name == "sdpa"
    assert chosen_for("packed", torch.float32).name == "sdpa"
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    chosen = chosen_for("packed", torch.bfloat16)
    assert chosen.name == "sdpa" and "off until measured" in chosen.reason


def test_the_operation_follows_from_the_shapes() -> None:
    def of(queries: int, keys: int, d: int, packed: bool, causal: bool) -> tuple[str, int]:
        q, k = torch.empty(2, queries, 3, d), torch.empty(2, keys, 3, d)
        return operation_of(q[0] if packed else q, k, packed, causal)

    assert of(9, 9, 128, True, True) == ("attention_packed", 9)
    assert of(9, 9, 80, False, True) == ("attention_dense", 18)
    for d, packed, causal in ((64, True, True), (256, False, True), (128, True, False)):
        assert of(9, 9, d, packed, causal)[0] == "attention_other"
    assert of(257, 257, 64, False, False) == ("attention_tower", 514)
    assert of(577, 577, 64, False, False) == ("attention_tower", 1154)
    for tokens, d in ((577, 80), (576, 64), (1, 64)):
        assert of(tokens, tokens, d, False, False)[0] == "attention_other"


def test_what_cannot_run_here_is_refused_with_the_reason() -> None:
    assert not torch.cuda.is_available()
    for name, reason in (("triton", "run on CUDA"), ("xformers", "xformers"),
                         ("flash_attention_3", "flash-attn 3")):  # fmt: skip
        with pytest.raises(UsageError, match=reason) as caught:
            implementation(name)
        assert "attention=auto" in str(caught.value)
    assert refusal("auto") is None and refusal("sdpa") is None
    assert set(IMPLEMENTATIONS) == {
        "auto", "triton", "xformers", "flash_attention_2", "flash_attention_3", "sdpa", "eager",
    }  # fmt: skip


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_auto_calls_flash_attn_itself(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int]
) -> None:
    """A stand-in with flash-attn's signature that computes by the definition."""

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == 7
        return flash_attention_reference(
            q, k, v, cu_seqlens=cu_seqlens_q, causal=causal, scale=softmax_scale
        )

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(
        attention, "auto_choice", lambda *args: Chosen("flash_attention_2", "the test says so")
    )
    layer = nn.Module()
    layer.is_causal = True
    q, k, v = (torch.randn(1, h, 12, 8) for h in (heads[0], heads[1], heads[1]))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    out, _ = auto_attention(
        layer, q, k, v, None, scaling=0.3, cu_seq_lens_q=cu, max_length_q=7, dropout=0.0
    )
    exact = flash_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), cu_seqlens=cu, scale=0.3)
    torch.testing.assert_close(out[0], exact)


def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A stand-in with xformers' shapes that computes by the definition; returns its calls."""
    calls: list[dict] = []

    class Pack:
        causal = False

        @classmethod
        def from_seqlens(cls, lengths: list[int]) -> Pack:
            made = cls()
            made.lengths = lengths
            return made

    class CausalPack(Pack):
        causal = True

    def memory_efficient_attention(q, k, v, attn_bias, scale):  # type: ignore[no-untyped-def]
        calls.append({"bias": attn_bias, "shape": q.shape})
        if q.ndim == 5:
            q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        if isinstance(attn_bias, Pack):
            cu = torch.tensor([0, *attn_bias.lengths]).cumsum(0).to(torch.int32)
            out = flash_attention(
                q[0], k[0], v[0], cu_seqlens=cu, causal=attn_bias.causal, scale=scale
            )[None]
        else:
            out = flash_attention(q, k, v, causal=attn_bias is not None, scale=scale)
        return out.unflatten(2, calls[-1]["shape"][2:4]) if len(calls[-1]["shape"]) == 5 else out

    masks = types.SimpleNamespace(
        BlockDiagonalMask=Pack,
        BlockDiagonalCausalMask=CausalPack,
        LowerTriangularMask=lambda: "triangle",
        LowerTriangularFromBottomRightMask=lambda: "bottom right",
    )
    ops = types.ModuleType("xformers.ops")
    fmha = types.ModuleType("xformers.ops.fmha")
    ops.memory_efficient_attention, fmha.attn_bias = memory_efficient_attention, masks
    for name, module in (("xformers.ops", ops), ("xformers.ops.fmha", fmha)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    return calls


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_xformers_gets_packs_and_shared_key_heads_in_its_own_form(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int]
) -> None:
    calls = fake_xformers(monkeypatch)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 8) for h in (heads[0], heads[1], heads[1]))
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)  # two rows belong to nobody
    module = nn.Module()
    module.is_causal = True
    schedule: Schedule = pack_schedule(cu, 12)
    for known in ({}, {SCHEDULE: schedule}):
        out, _ = xformers_attention(module, q, k, v, None, scaling=0.3, cu_seq_lens_q=cu, **known)
        exact = flash_attention(
            *(x[0].transpose(0, 1) for x in (q, k, v)), cu_seqlens=cu, scale=0.3
        )
        torch.testing.assert_close(out[0, :10], exact[:10])
    assert calls[0]["bias"].lengths == [5, 5, 2]
    assert calls[0]["shape"] == ((1, 12, 4, 8) if heads[1] == 4 else (1, 12, 2, 2, 8))
    module.is_causal = False
    out, _ = xformers_attention(module, q, k, v, None)
    dense = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=False)
    torch.testing.assert_close(out, dense)


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is optional")
def test_xformers_masks_are_those_of_a_pack() -> None:
    mask = mask_for(5, 5, [2, 3], causal=True).materialize((5, 5))
    seen = torch.zeros(5, 5, dtype=torch.bool)
    seen[:2, :2], seen[2:, 2:] = torch.ones(2, 2).tril().bool(), torch.ones(3, 3).tril().bool()
    assert torch.equal(mask == 0, seen)
    bottom = mask_for(2, 4, None, causal=True).materialize((2, 4))
    assert torch.equal(bottom == 0, torch.ones(2, 4).tril(2).bool())
