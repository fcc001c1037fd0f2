"""Attention at full size in the benchmark: who is wrong somewhere gets no time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CPU, SHAPES, case_of, problem_of
from torch import Tensor

from llava_hd.bench import (
    attention_rivals,
    attention_shapes,
    attention_spots,
    kernels_trial,
)
from llava_hd.bench.attention_providers import attention_providers
from llava_hd.bench.attention_rivals import written_out
from llava_hd.bench.attention_setting import Setting
from llava_hd.bench.attention_shapes import (
    Shape,
)
from llava_hd.bench.attention_spots import (
    BAND,
    error_of_rows,
    exact_rows,
    fault_of_gradients,
    gradient_spots,
    gradients_of,
    pieces,
    spots,
)
from llava_hd.bench.kernels_errors import EXACT, OUTPUT, exact_results
from llava_hd.bench.kernels_providers import Provider
from llava_hd.bench.kernels_rows import Row
from llava_hd.bench.kernels_trial import try_case
from llava_hd.bench.measure import Roofline

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest rounds: tests ask whether there is a time, not which."""
    monkeypatch.setitem(kernels_trial.BUDGET_S, "cpu", 0.0)


# Who is wrong gets no time


def tried(shape: Shape, call: Any, dtype: torch.dtype = torch.float32) -> dict[str, list[Row]]:
    """Rows by provider; `call` as the rival of eager and ours."""
    case = case_of(shape)
    asked, checkers = (
        [
            *attention_providers(Setting(at, shape, dtype, CPU), ("eager", "ours")),
            Provider("rival", call),
        ]
        for at in (shape, case.checked.attention or shape)
    )
    roof = Roofline(1.0, 1.0, "", "")
    rows, _ = try_case(case, dtype, CPU, asked, roof, 0, checkers)
    return {name: [r for r in rows if r.provider == name] for name in ("eager", "ours", "rival")}


def test_who_looks_into_another_sequence_is_wrong() -> None:
    rows = tried(
        SHAPES["pack"],
        lambda t, tables: written_out(*(t[name][None] for name in "qkv"), causal=True)[0],
    )
    assert all(row.ms is None and row.reason.startswith("wrong: ") for row in rows["rival"])
    for name in ("eager", "ours"):
        assert all(row.ms and row.tflops and row.checked == "" for row in rows[name]), name
        assert [row.mode for row in rows[name]] == ["forward", "backward", "both"]


def test_who_is_wrong_only_at_the_full_size_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_shapes, "LONGEST_CHECKED", 24)

    def short_sighted(t: dict[str, Tensor], tables: dict[str, Tensor]) -> Tensor:
        """Queries behind the 32nd see no key before the 16th."""
        right = EXACT["attention_dense"](t, tables)
        if t["q"].shape[1] <= 32:
            return right
        late = EXACT["attention_dense"]({name: x[:, 16:] for name, x in t.items()}, tables)
        return torch.cat([right[:, :32], late[:, 16:]], 1)

    def raises(t: dict[str, Tensor], tables: dict[str, Tensor]) -> Tensor:
        if t["q"].shape[1] > 32:
            raise RuntimeError("no kernel for so many")
        return EXACT["attention_dense"](t, tables)

    shape = Shape(2, 2, 16, True, False, (64, 64))
    rows = tried(shape, short_sighted)
    assert all(r.reason.startswith("wrong: error of output rows") for r in rows["rival"])
    assert all(r.ms is None and r.error_output is not None for r in rows["rival"])
    assert all(r.ms and r.checked == "2 x up to 24 tokens" for r in rows["ours"])
    assert all(r.reason == "does not run here: RuntimeError: no kernel for so many"
               for r in tried(shape, raises)["rival"])  # fmt: skip


class _SmallerAtOneKey(torch.autograd.Function):
    """The identity of k or v; its gradient is too small at one late key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[-1, LATE] *= ctx.share
        return grad, None


LATE = 480  # of 512


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.95), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("name", ["k", "v"])
def test_who_is_wrong_at_one_late_key_gets_no_time(
    name: str, dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_shapes, "LONGEST_CHECKED", 24)

    def wrong(t: dict[str, Tensor], tables: dict[str, Tensor]) -> Tensor:
        if t["q"].shape[1] > 24:
            t = t | {name: _SmallerAtOneKey.apply(t[name], share)}
        return written_out(t["q"], t["k"], t["v"], causal=True)

    rows = tried(Shape(4, 2, 16, True, False, (512, 512)), wrong, dtype)
    for row in rows["rival"]:
        assert row.ms is None and row.error_gradients is not None
        assert row.reason.startswith(f"wrong: error of d {name} at this size")
        assert "(sequence 1, key head 1, from token 448)" in row.reason
    assert all(row.ms for row in rows["ours"])


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_at_the_full_size_are_those_of_the_definition(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_spots, "SCORES_AT_ONCE", 64)  # a few queries at a time
    monkeypatch.setattr(attention_spots, "BAND", 1)  # else short sequences are passed over
    shape = SHAPES[kind]
    problem = problem_of(shape)
    whole = exact_results(case_of(shape), problem)
    chosen = pieces(shape)
    assert (chosen[0].sequence, chosen[0].head) == (0, 0)
    assert (chosen[-1].sequence, chosen[-1].head) == (len(shape.lengths) - 1, shape.kv_heads - 1)
    for piece in chosen:
        for name, value in gradients_of(shape, problem, piece, torch.float64).items():
            torch.testing.assert_close(value, piece.of(name, whole[name]), rtol=1e-9, atol=1e-9)
    wanted = gradient_spots(case_of(shape), problem)
    grads = {name: whole[f"d {name}"] for name in "qkv"}
    assert fault_of_gradients(grads, wanted) is None
    for name in "qkv":
        broken = grads[name].clone(memory_format=torch.contiguous_format)
        broken.view(-1, *broken.shape[-2:])[-1, -1, 0] = float("nan")
        assert "error of d " + name in str(fault_of_gradients(grads | {name: broken}, wanted))


def test_short_sequences_of_a_pack_are_passed_over() -> None:
    chosen = pieces(Shape(4, 4, 16, True, True, (5, 300, 90, 70, 2)))
    assert [(p.sequence, p.head) for p in chosen] == [(1, 0), (2, 3), (3, 0), (3, 3)]
    assert chosen[-1].tokens == slice(395, 465) and chosen[-1].heads == slice(3, 4)
    grouped = pieces(Shape(8, 2, 16, True, False, (512,)))
    assert [(p.tokens, p.heads) for p in grouped] == [
        (slice(0, 512), slice(0, 4)),
        (slice(0, 512), slice(4, 8)),
    ]


def test_every_token_is_in_one_band() -> None:
    for length in (1, BAND - 1, BAND, 2 * BAND - 1, 5 * BAND + 3):
        rows = torch.arange(length, dtype=torch.float64)[:, None, None]
        found = attention_spots._bands(rows)
        starts = [BAND * n for n in range(1, max(1, length // BAND))]
        assert found == [*(start - 1.0 for start in starts), length - 1.0]


def test_who_writes_too_many_scores_is_checked_and_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_rivals, "SCORES_TIMED", 100)
    rows = tried(SHAPES["pack"], EXACT["attention_packed"])
    for row in rows["eager"]:
        assert row.ms is None and row.reason.startswith("not timed: the scores are")
        assert row.error_output is not None and row.error_vs_eager == 1
    assert all(row.ms for name in ("ours", "rival") for row in rows[name])


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_at_the_full_size_are_those_of_the_definition(kind: str) -> None:
    shape = SHAPES[kind]
    problem = problem_of(shape)
    whole = exact_results(case_of(shape), problem)[OUTPUT]
    rows = spots(shape)
    assert {0, shape.tokens - 1} <= set(rows) and rows == spots(shape)
    exact = exact_rows(shape, problem.tensors, rows)
    assert error_of_rows(whole, rows, exact) < 1e-12
    broken = whole.clone().reshape(-1, *whole.shape[-2:])
    broken[rows[1]] = float("nan")
    assert error_of_rows(broken, rows, exact) == float("inf")
