"""The benchmark of attention: shapes and work by hand, who agrees, who is wrong and has no time."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import CPU, RUN_ON_CPU, SHAPES, case_of, problem_of, setting
from torch import Tensor

from llava_hd.bench import (
    kernels_trial,
)
from llava_hd.bench.attention_providers import BUILDERS, attention_providers
from llava_hd.bench.attention_rivals import masked_flex
from llava_hd.bench.attention_setting import Setting
from llava_hd.bench.attention_shapes import (
    OPERATIONS,
    PACK_TOKENS,
    PHOTO_TOKENS,
    PHOTOS,
    SCORES_CHECKED,
    SCORES_TIMED,
    Shape,
    checked_shape,
    pack,
    shapes_of,
)
from llava_hd.bench.kernels_cases import cases_of
from llava_hd.bench.kernels_errors import OUTPUT, exact_results, results_of
from llava_hd.bench.kernels_options import PROVIDERS, add_options, request_of
from llava_hd.bench.kernels_rows import Row
from llava_hd.cli.main import main
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.plan import plan_image
from llava_hd.kernels.flash_attention import flash_attention_reference, operation_of

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest rounds: tests ask whether there is a time, not which."""
    monkeypatch.setitem(kernels_trial.BUDGET_S, "cpu", 0.0)


# Shapes and work


def test_work_of_a_causal_batch_by_hand() -> None:
    case = case_of(Shape(32, 8, 128, True, False, (2048, 2048)))
    forward, backward = case.work("forward", 2), case.work("backward", 2)
    assert forward[0] == 2 * (4 * 2048 * 2048 * 32 * 128) / 2
    assert backward[0] == 2.5 * forward[0]
    queries, keys = 4096 * 32 * 128 * 2, 4096 * 8 * 128 * 2  # bytes of q and of k
    assert forward[1] == 2 * queries + 2 * keys  # q and the output, k and v
    assert backward[1] == 4 * queries + 4 * keys + 4096 * 32 * 4  # and gradients, and the logs
    assert case.work("both", 2)[0] == 3.5 * forward[0]


def test_work_of_the_tower_is_not_halved_and_that_of_a_pack_is_its_sequences() -> None:
    tower = case_of(Shape(16, 16, 64, False, False, (577,) * 64))
    assert tower.work("forward", 2)[0] == 64 * 4 * 577**2 * 16 * 64
    packed = case_of(Shape(4, 4, 128, True, True, (100, 300)))
    assert packed.work("forward", 2)[0] == (100**2 + 300**2) * 4 * 4 * 128 / 2


def test_photo_tokens_are_those_of_the_plans() -> None:
    counted = {
        name: tuple(plan_image(size, PRESETS[name]).num_tokens for size in PHOTOS)
        for name in PHOTO_TOKENS
    }
    assert counted == PHOTO_TOKENS


@pytest.mark.parametrize("preset", PHOTO_TOKENS)
def test_a_pack_is_full_and_of_hd_samples(preset: str) -> None:
    lengths = pack(preset, PACK_TOKENS)
    assert sum(lengths) == PACK_TOKENS and lengths == pack(preset, PACK_TOKENS)
    assert all(600 <= length <= 3200 for length in lengths[:-1])
    assert max(lengths) / min(lengths[:-1]) > 1.5  # a mixture
    assert sum(pack(preset, 1024, shrinks=8)) == 1024


def test_full_shapes_are_those_of_the_two_models() -> None:
    dense = [(size, rows, shape) for size, rows, shape in shapes_of("attention_dense", None, False)]
    assert [rows for size, rows, _ in dense if size == "32 heads"] == [
        1024,
        2048,
        4096,
        8192,
        16384,
    ]
    assert [rows for size, rows, s in dense if s.kv_heads == 8] == [4096]
    assert {(s.tokens, s.head_dim, s.causal) for _, _, s in dense} == {(16384, 128, True)}
    tower = shapes_of("attention_tower", None, False)
    assert {(s.longest, len(s.lengths)) for _, _, s in tower} == {
        (n, tiles) for n in (257, 577) for tiles in (64, 160, 320)
    }
    assert {(s.heads, s.head_dim, s.causal) for _, _, s in tower} == {(16, 64, False)}
    packs = shapes_of("attention_packed", None, False)
    assert {(s.tokens, s.heads, s.head_dim, s.packed) for _, _, s in packs} == {
        (32768, 32, 128, True)
    }


@pytest.mark.parametrize("op", OPERATIONS)
def test_operations_are_what_the_backend_calls_them(op: str) -> None:
    for _, _, shape in shapes_of(op, None, quick=False):
        q, k = (torch.empty(shape.size(n), device="meta") for n in (shape.heads, shape.kv_heads))
        assert operation_of(q, k, shape.packed, shape.causal) == (shape.operation, shape.tokens)
        assert shape.operation == op


@pytest.mark.parametrize("op", OPERATIONS)
def test_errors_are_measured_where_fp64_fits(op: str) -> None:
    for _, _, shape in shapes_of(op, None, quick=False):
        at = checked_shape(shape)
        assert at.scores <= SCORES_CHECKED and at.longest <= 2048
        assert replace(at, lengths=shape.lengths) == shape  # the same kind
        assert at.longest == min(shape.longest, 2048) or shape.packed
        assert len(set(at.lengths)) > 1 or not shape.packed  # several samples, of several lengths
    for _, _, shape in shapes_of(op, None, quick=True):
        assert checked_shape(shape) == shape


def test_the_word_attention_means_three_operations() -> None:
    parser = ArgumentParser()
    add_options(parser)
    for option in ("--op", "--ops"):
        assert request_of(parser.parse_args([option, "attention"]), "").ops == OPERATIONS
    asked = request_of(parser.parse_args(["--op", "attention_tower", "gelu_mlp"]), "")
    assert asked.ops == ("gelu_mlp", "attention_tower")
    assert set(BUILDERS) <= set(PROVIDERS)


# Everyone's answer


@pytest.mark.parametrize("kind", SHAPES)
def test_providers_agree_in_fp64(kind: str) -> None:
    shape = SHAPES[kind]
    problem = problem_of(shape)
    exact = exact_results(case_of(shape), problem)
    assert set(exact) == {OUTPUT, "output without graph", "d q", "d k", "d v"}
    found = attention_providers(setting(shape), PROVIDERS)
    assert found[0].name == "eager" and [p.name for p in found] == list(BUILDERS)
    assert {p.name for p in found if p.call is not None} == RUN_ON_CPU[kind]
    assert all(p.reason.startswith("not ") for p in found if p.call is None)
    for provider in (p for p in found if p.call is not None):
        for name, value in results_of(provider, problem).items():
            torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-9, msg=provider.name)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", SHAPES)
def test_block_masks_hide_what_the_definition_hides(kind: str) -> None:
    """Not compiled, and without gradients, which flex_attention has not on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    shape = SHAPES[kind]
    problem = problem_of(shape)
    provider = masked_flex(setting(shape), flex_attention)
    with torch.no_grad():
        found = provider.run(problem.tensors, problem.tables)
    exact = exact_results(case_of(shape), problem)[OUTPUT]
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    assert (provider.setup_ms is None) == (kind == "tower")


def test_building_times_stand_beside_what_is_built_once() -> None:
    by_name = {p.name: p for p in attention_providers(setting(SHAPES["pack"]), PROVIDERS)}
    assert by_name["ours"].setup_ms is not None and by_name["ours"].setup_ms > 0
    assert by_name["padded"].setup_ms is None
    dense = attention_providers(setting(SHAPES["dense"]), ("ours",))
    assert dense[0].setup_ms is None


def test_written_out_scores_are_not_timed_where_they_are_too_many() -> None:
    long = Shape(32, 32, 128, True, False, (4096,) * 4)
    assert long.scores > SCORES_TIMED
    for name in ("eager", "sdpa-math"):
        made = attention_providers(Setting(SHAPES["dense"], long, torch.float32, CPU), (name,))
        assert made[0].untimed == "not timed: the scores are 2.1e9 numbers"
        assert attention_providers(setting(SHAPES["dense"]), (name,))[0].untimed == ""


def reference(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, causal: bool) -> Tensor:
    return flash_attention_reference(q, k, v, cu_seqlens=ends, causal=causal)


@pytest.mark.parametrize("windowed", [False, True])
def test_varlen_is_called_as_its_version_wants(
    windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.10 has is_causal, later versions a window of (-1, 0)."""

    def old(q: Any, k: Any, v: Any, a: Any, b: Any, m: int, n: int, is_causal: bool = False) -> Any:
        return reference(q, k, v, a, is_causal)

    def new(q: Any, k: Any, v: Any, a: Any, b: Any, m: int, n: int, *, window_size: Any) -> Any:
        assert m == n == 20
        return reference(q, k, v, b, window_size == (-1, 0))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new if windowed else old)
    agrees("varlen", SHAPES["pack"])


@pytest.mark.parametrize("kind", SHAPES)
def test_xformers_and_flash_attn_get_what_they_ask_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        shape = q.shape
        if q.ndim == 5:  # [B M G H K]: equal shapes, keys expanded within a group
            assert k.shape == q.shape and k.stride(3) == 0
            q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        if isinstance(attn_bias, list):
            ends = torch.tensor([0, *attn_bias]).cumsum(0)
            return reference(q[0], k[0], v[0], ends, True)[None].reshape(shape)
        out = flash_attention_reference(q, k, v, causal=attn_bias == "lower")
        return out.reshape(shape)

    biases = SimpleNamespace(
        BlockDiagonalCausalMask=SimpleNamespace(from_seqlens=lambda lengths: lengths),
        LowerTriangularMask=lambda: "lower",
    )
    ops = SimpleNamespace(memory_efficient_attention=efficient)
    flash = SimpleNamespace(
        __version__="2",
        flash_attn_func=lambda q, k, v, causal: flash_attention_reference(q, k, v, causal=causal),
        flash_attn_varlen_func=lambda q, k, v, a, b, m, n, causal: reference(q, k, v, a, causal),
    )
    for name, module in (
        ("xformers.ops", ops),
        ("xformers.ops.fmha.attn_bias", biases),
        ("flash_attn", flash),
    ):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    agrees("xformers", SHAPES[kind])
    agrees("flash-attn", SHAPES[kind])


def agrees(name: str, shape: Shape) -> None:
    (provider,) = attention_providers(setting(shape, device=CUDA), (name,))
    assert provider.call is not None, provider.reason
    problem = problem_of(shape)
    exact = exact_results(case_of(shape), problem)
    for tensor, value in results_of(provider, problem).items():
        torch.testing.assert_close(value, exact[tensor], rtol=1e-9, atol=1e-9)


def test_command_measures_every_operation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "kernels", "--quick", "--op", "attention", "--rows", "2", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "attention_packed" in printed.out and "not installed: xformers" in printed.out
    record = json.loads((tmp_path / "out" / "kernels.json").read_text())
    rows = [Row(**row) for row in record["rows"]]
    assert tuple(dict.fromkeys(row.op for row in rows)) == OPERATIONS
    timed = {(row.op, row.provider) for row in rows if row.ms is not None}
    assert {name for op, name in timed if op == "attention_packed"} == {"ours", "eager", "padded"}
    assert ("attention_tower", "sdpa-flash") in timed
    assert all(row.error_output is not None and row.heads for row in rows if row.ms is not None)


def test_quick_cases_are_small() -> None:
    for op in OPERATIONS:
        for case in cases_of(op, None, quick=True):
            assert case.work("both", 4)[0] < 2e9, case.label
