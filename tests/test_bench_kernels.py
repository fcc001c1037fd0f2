"""The kernels' benchmark: figures by hand, who is wrong gets no time, LLaVA's sequence."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_hd.bench import kernels_trial
from llava_hd.bench.kernels_cases import Case, Problem, cases_of, make_problem
from llava_hd.bench.kernels_errors import allowed, exact_results, leaves, results_of
from llava_hd.bench.kernels_layout import Layout, project_layout
from llava_hd.bench.kernels_providers import EAGER, OURS, Provider, llava_provider
from llava_hd.bench.kernels_rows import (
    COLUMNS,
    Row,
    blank_row,
    figures,
    ratios_of,
    row_cells,
    row_from_text,
    row_record,
)
from llava_hd.bench.kernels_trial import try_case
from llava_hd.bench.measure import (
    Roofline,
    Times,
    csv_text,
    json_text,
    quantiles,
    saved_bytes,
    time_interleaved,
)
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.merge import visual_source
from llava_hd.hd.plan import plan_image
from llava_hd.kernels.place_rows import place_rows, place_rows_reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest rounds: tests ask whether there is a time, not which."""
    monkeypatch.setitem(kernels_trial.BUDGET_S, "cpu", 0.0)


def case_of(op: str, rows: int = 64, keep: float = 1.0) -> Case:
    return next(case for case in cases_of(op, (rows,), quick=True) if case.keep == keep)


def test_quantiles_are_linear_between_neighbours() -> None:
    assert quantiles([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no samples"):
        quantiles([])


def test_work_of_the_projector_is_that_of_its_five_products() -> None:
    case = Case("gelu_mlp", "7B", 16384, 16384, 0, 0, 1024, 4096, 4096)
    forward, backward, both = (case.work(mode, 2) for mode in ("forward", "backward", "both"))
    assert forward[0] == pytest.approx(0.687e12, rel=1e-3)
    assert backward[0] == pytest.approx(1.237e12, rel=1e-3)  # no product for the frozen features
    parameters = 4096 * 1024 + 4096 + 4096 * 4096 + 4096
    assert forward[1] == 2 * (16384 * (1024 + 4096) + parameters)
    assert both == (forward[0] + backward[0], forward[1] + backward[1])


def test_work_of_placing_counts_each_number_once() -> None:
    case = Case("place_rows", "small", 10, 10, 15, 4, 0, 0, 3)
    assert case.work("forward", 4) == (0, 4 * 3 * (10 + 4 + 15) + 8 * 15)
    assert case.work("backward", 4) == (0, 4 * 3 * (15 + 15 + 10 + 1) + 8 * 15)


def test_figures_of_both_and_backward_come_from_the_same_rounds() -> None:
    case = Case("gelu_mlp", "7B", 1000, 1000, 0, 0, 1000, 1000, 1000)  # forward 4 GFLOP
    times = Times([[2.0, 6.0], [4.0, 8.0], [3.0, 7.0]], [[0.1, 0.2]] * 3)
    roof = Roofline(tflops=2.0, gbps=1e9, product="", copy="")
    both = figures(case, "both", 2, times, roof)
    assert (both["ms"], both["rounds"], both["host_ms"]) == (10.0, 3, 0.3)
    assert both["ms_p20"] == pytest.approx(8.8)
    assert both["tflops"] == pytest.approx(1.0)  # 10 GFLOP in 10 ms
    assert both["roofline"] == pytest.approx(0.5)
    backward = figures(case, "backward", 2, times, roof)
    assert (backward["ms"], backward["host_ms"]) == (7.0, 0.2)
    forward = figures(case, "forward", 2, Times([[4.0]], [[4.0]]), roof)
    assert forward["tflops"] == pytest.approx(1.0)
    assert forward["gbps"] == pytest.approx(case.work("forward", 2)[1] / 4e-3 / 1e9, rel=1e-4)


def rows_by_hand() -> list[Row]:
    case = case_of("gelu_mlp")
    ours, eager, wrong, other = (
        blank_row(case, "fp32", name, mode)
        for name, mode in (
            ("ours", "both"),
            ("eager", "both"),
            ("compile", "both"),
            ("eager", "forward"),
        )
    )
    return [
        replace(ours, ms=2.0, ms_p20=1.9, ms_p80=2.5, error_vs_eager=1.5, saved_mib=0.25),
        replace(eager, ms=3.0, saved_mib=0.5),
        replace(wrong, reason="wrong: error of d b1 1.00e+00, allowed 1.00e-03", error_output=3e-7),
        replace(other, ms=1.0),
    ]


def test_ratios_are_the_rivals_time_over_ours_in_the_same_mode() -> None:
    found = [(r.rival, r.mode, r.ratio) for r in ratios_of(rows_by_hand())]
    assert found == [("eager", "both", 1.5)]  # no time: no ratio; no time of ours: no ratio


def test_rows_come_back_from_csv_and_json() -> None:
    rows = rows_by_hand()
    text = csv_text([row_cells(row) for row in rows], COLUMNS)
    assert [row_from_text(record) for record in csv.DictReader(io.StringIO(text))] == rows
    record = json.loads(json_text({"rows": [row_record(row) for row in rows]}))
    assert [Row(**row) for row in record["rows"]] == rows
    with pytest.raises(ValueError, match="expected op"):
        row_from_text({"op": "gelu_mlp"})


def test_rivals_take_turns_in_a_rotating_order() -> None:
    order: list[str] = []
    calls: dict[str, Any] = {name: (lambda _, n=name: order.append(n),) for name in "abc"}
    times = time_interleaved(calls, CPU, budget_s=0.0)
    timed = "".join(order[-15:])
    assert timed == "abcbcacababcbca"
    assert {len(t.device_ms) for t in times.values()} == {5}


def test_eager_projector_saves_both_hidden_tensors_and_not_its_inputs() -> None:
    problem = make_problem(case_of("gelu_mlp", rows=48), torch.float32, CPU, seed=0)
    inputs = leaves(problem.tensors, problem.learned)
    saved = saved_bytes(
        lambda: EAGER["gelu_mlp"](inputs, problem.tables), list(inputs.values()), CPU
    )
    assert saved == 2 * 48 * 512 * 4


# Who is wrong gets no time


def tried(call: Any, op: str = "gelu_mlp", dtype: torch.dtype = torch.float32) -> list[Row]:
    case = case_of(op)
    providers = [Provider("eager", EAGER[op]), Provider("rival", call)]
    roof = Roofline(1.0, 1.0, "", "")
    rows, _ = try_case(case, dtype, CPU, providers, roof, seed=0)
    assert all(row.ms is not None for row in rows if row.provider == "eager")
    return [row for row in rows if row.provider == "rival"]


class _GradientOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01


def _bad_output(t: dict[str, Tensor], tables: dict[str, Tensor]) -> Tensor:
    out = EAGER["gelu_mlp"](t, tables)
    return out + out.detach() / 1000  # its gradients are right


def _bad_gradient(t: dict[str, Tensor], tables: dict[str, Tensor]) -> Tensor:
    return EAGER["gelu_mlp"]({**t, "b1": _GradientOff.apply(t["b1"])}, tables)


def _bad_answer(t: dict[str, Tensor], tables: dict[str, Tensor]) -> Tensor:
    out = EAGER["gelu_mlp"](t, tables)
    return out if torch.is_grad_enabled() else out.roll(1, 0)


def _not_a_number(t: dict[str, Tensor], tables: dict[str, Tensor]) -> Tensor:
    return EAGER["gelu_mlp"](t, tables).index_fill(0, torch.tensor([3]), float("nan"))


@pytest.mark.parametrize(
    ("call", "tensor"),
    [
        (_bad_output, "output"),
        (_bad_gradient, "d b1"),
        (_bad_answer, "output without graph"),
        (_not_a_number, "output"),
    ],
)
def test_a_provider_that_is_wrong_gets_no_time(call: Any, tensor: str) -> None:
    rows = tried(call)
    assert [row.mode for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert row.ms is None and row.tflops is None and row.roofline is None
        assert row.reason.startswith(f"wrong: error of {tensor}"), row.reason
    json_text({"rows": [row_record(row) for row in rows]})  # NaN would be refused


def test_a_provider_that_fails_says_how_and_gets_no_time() -> None:
    def broken(t: dict[str, Tensor], tables: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError("no such kernel\nand a second line")

    rows = tried(broken)
    assert {row.reason for row in rows} == {
        "does not run here: NotImplementedError: no such kernel"
    }
    assert all(row.ms is None and row.error_output is None for row in rows)


@pytest.mark.parametrize("op", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ours_is_right_in_every_type(op: str, dtype: torch.dtype) -> None:
    for row in tried(OURS[op], op, dtype):
        assert row.ms is not None and row.ms > 0, row.reason
        assert row.error_output is not None and row.error_gradients is not None


def test_the_limit_is_twice_eagers_error_and_a_floor() -> None:
    assert allowed(0.5, 8.0, torch.bfloat16, 10_000) == 1.0 + 2**-7 / 4 * 8
    assert allowed(0.0, 1.0, torch.float32, 10_000) == pytest.approx(100 * 2**-23)


# LLaVA's own sequence and the layouts


@pytest.mark.parametrize("seed", range(6))
def test_llavas_sequence_equals_projecting_kept_rows_and_placing_them(seed: int) -> None:
    """Outputs and gradients in fp64; the text's only where words stand."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    side, images = draw(1, 5), draw(1, 5)
    top = draw(0, side)
    kept = (top, draw(top + 1, 2 * side + 1))
    text = tuple((draw(0, 4), draw(0, 9)) for _ in range(images))
    layout = Layout(images, side, kept, text)
    sizes = (draw(1, 9), draw(1, 9), draw(1, 9))
    case = Case(
        "project_place",
        "",
        layout.rows,
        layout.all_rows,
        layout.tokens,
        layout.text_tokens,
        *sizes,
        layout=layout,
    )
    problem = make_problem(case, torch.float64, CPU, seed)
    theirs = results_of(llava_provider(layout), problem)
    ours = results_of(Provider("ours", OURS["project_place"]), problem)
    assert set(theirs) == set(ours)
    for name, expected in ours.items():
        torch.testing.assert_close(theirs[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["place_rows", "project_place"])
def test_eager_placing_equals_the_definition(op: str) -> None:
    problem = make_problem(case_of(op), torch.float64, CPU, seed=3)
    rows = problem.tensors["rows"] if op == "place_rows" else None
    if rows is None:
        rows = torch.randn(len(problem.tables["rows"]), problem.grad.shape[1], dtype=torch.float64)
    t, tables = {**problem.tensors, "rows": rows}, problem.tables
    expected = place_rows_reference(t["text"], rows, t["row_end"], tables["source"])
    assert torch.equal(EAGER["place_rows"](t, tables), expected)
    assert torch.equal(place_rows(t["text"], rows, t["row_end"], tables["source"]), expected)


@pytest.mark.parametrize(("keep", "size"), [(1.0, (448, 448)), (0.7, (280, 448))])
def test_layout_is_the_geometry_of_an_hd_image(keep: float, size: tuple[int, int]) -> None:
    layout = project_layout(2560, keep, side=16)
    rows, source = layout.tables()
    assert layout.images == 2 and layout.rows / layout.all_rows == pytest.approx(keep)
    assert len(rows) == layout.rows and len(source) == layout.tokens
    before, after = layout.text[1]
    second = source[-after - (len(source) - sum(layout.text[0])) // 2 :]
    visual = visual_source(plan_image(size, PRESETS["hd448"]))
    first = source[layout.text[0][0] :][: len(visual)]
    assert [rows[n] if n >= 0 else n for n in first] == visual.tolist()
    last = source[len(source) - after - len(visual) : len(source) - after]
    assert [rows[n] - 1280 if n >= 0 else n for n in last] == visual.tolist()
    assert (second[-after:] == -1).all() and before == layout.text[0][0]


def test_tokens_are_somewhat_more_than_rows() -> None:
    for case in cases_of("place_rows", None, quick=False):
        assert 1.1 < case.tokens / case.rows < 1.3, case.label
        assert len(case.layout.tables()[1]) == case.tokens  # type: ignore[union-attr]


def test_full_cases_hold_the_sizes_of_both_models() -> None:
    cases = cases_of("gelu_mlp", None, quick=False)
    assert {(c.d, c.f, c.h) for c in cases} == {(1024, 4096, 4096), (1024, 5120, 5120)}
    assert {c.rows for c in cases} == {576, 1024, 2880, 4096, 16384, 65536}
    keeps = {c.keep for c in cases_of("project_place", None, quick=False)}
    assert keeps == {1.0, 0.7}


def test_the_same_seed_gives_the_same_data() -> None:
    def problem(seed: int) -> Problem:
        return make_problem(case_of("project_place"), torch.float32, CPU, seed)

    one, same, other = problem(4), problem(4), problem(5)
    assert torch.equal(one.tensors["w1"], same.tensors["w1"])
    assert not torch.equal(one.tensors["w1"], other.tensors["w1"])
    assert exact_results(case_of("project_place"), one)["output"].dtype == torch.float64
