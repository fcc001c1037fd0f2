"""Tuning with interpreted kernels and a clock that the test sets."""

from collections.abc import Callable, Mapping

import pytest
import torch
from kernel_checks import small_table

from llava_hd.bench import tune as tuning
from llava_hd.bench.tune import KERNELS, NEEDS, Race, Trial, candidates, first_win, tune, wrong
from llava_hd.bench.tune_options import Sizes
from llava_hd.bench.tune_tasks import task
from llava_hd.kernels.backend import ATTENTION, ELEMENTWISE, OPERATIONS, PRODUCTS, Blocks, Table

CPU = torch.device("cpu")
SIZES = Sizes((24, 40, 36), (20, 70), 0, heads=2)


@pytest.mark.parametrize("name", KERNELS)
def test_every_task_is_right_and_finds_a_wrong_result(name: str) -> None:
    table = small_table()
    made = task(name, 70, table, SIZES, CPU, torch.float16)
    assert wrong(made, table.blocks(name)) == ""
    results = made.fresh(lambda m: m.ours(table.blocks(name)))
    spoiled = [(results[0] + results[0].abs().max() / 4, *results[1:])]
    made.ours = lambda blocks: spoiled[0]
    assert wrong(made, table.blocks(name)).startswith("result 0: error")


def test_every_kernel_but_those_of_the_widest_heads_is_tuned() -> None:
    untuned = {name for name in ATTENTION if name.endswith("256")}
    assert set(KERNELS) == {*PRODUCTS, *ELEMENTWISE, *ATTENTION} - untuned
    assert set(NEEDS) == {*OPERATIONS, "down"}
    assert all(candidates(name, arch) for name in KERNELS for arch in ("sm_80", "sm_90"))


def test_an_operation_is_never_used_without_a_kernel_that_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "load_shipped", lambda arch: small_table())
    monkeypatch.setattr(tuning, "candidates", lambda name, arch: [small_table().blocks(name)])
    monkeypatch.setattr(tuning, "wrong", lambda made, blocks: "")
    monkeypatch.setattr(tuning, "KERNELS", ("place_grad", "gelu_grad", "down"))
    monkeypatch.setattr(
        tuning, "_try",
        lambda name, b, *rest: Trial(name, b, None, "wrong" if name == "place_grad" else ""),
    )  # fmt: skip
    faster = {"ours": 1.0, "torch": 2.0, "rival": 2.0, "0": 1.0}
    table, _, races = tune(
        "test", SIZES, CPU, torch.float16, lambda calls: {key: faster[key] for key in calls}, print
    )
    assert table.entries["place_rows"].from_rows is None
    assert table.entries["down"].from_rows is None
    assert table.entries["gelu_mlp"].from_rows == 20
    assert "place_rows" not in {race.name for race in races}


def race(rows: int, ratio: float) -> Race:
    return Race("up", rows, 1.0, ratio)


@pytest.mark.parametrize(
    ("ratios", "start"),
    [
        ([1.2, 1.1, 1.3], 10),
        ([1.2, 0.9, 1.3], 30),
        ([1.2, 1.1, 0.99], None),
        ([0.9, 1.1, 1.2], 20),
        ([1.0, 1.0, 1.0], None),
    ],
)
def test_a_kernel_is_used_from_its_last_defeat_on(ratios: list[float], start: int | None) -> None:
    races = [race(rows, ratio) for rows, ratio in zip((10, 20, 30), ratios, strict=True)]
    assert first_win(races) == start


def test_a_table_follows_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock likes the second candidates, our `up` at 70 rows only, and no `down` at all; one
    candidate of `weight_grad` is too wide to run."""
    shipped = small_table(used=())
    monkeypatch.setattr(tuning, "load_shipped", lambda arch: shipped)
    monkeypatch.setattr(tuning, "CHECK_ROWS", 33)
    second = Blocks(16, 32, 16)

    def tried(name: str, arch: str) -> list[Blocks]:
        first = shipped.blocks(name)
        if name not in PRODUCTS:
            return [first]
        odd = [Blocks(24, 32, 16)] if name == "weight_grad" else []
        return [first, second, *odd]

    monkeypatch.setattr(tuning, "candidates", tried)
    told: list[str] = []

    def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for call in calls.values():
            call()
        order = [line.split(":")[0] for line in told]
        doing = next(n for n in (*KERNELS, *OPERATIONS) if n not in order)
        if "rival" in calls:
            races.append(doing)
            lost = doing == "down" or (doing == "up" and races.count("up") == 1)
            return {"ours": 2.0 if lost else 1.0, "rival": 1.5}
        if "torch" in calls:
            return {"ours": 1.0, "torch": 1.25}
        return {name: 1.0 / (1 + int(name)) for name in calls}

    races: list[str] = []
    table, trials, raced = tune("test", SIZES, CPU, torch.float16, timer, told.append)
    assert isinstance(table, Table)
    starts = {name: table.entries[name].from_rows for name in (*PRODUCTS, *OPERATIONS)}
    assert starts == {
        "up": 70, "down": None, "hidden_grad": 20, "weight_grad": 20,
        **dict.fromkeys(OPERATIONS, 20),
    }  # fmt: skip
    assert all(table.blocks(name) == second for name in PRODUCTS)
    refused = [trial for trial in trials if trial.reason]
    assert [(trial.kernel, trial.blocks.rows) for trial in refused] == [("weight_grad", 24)]
    assert len(raced) == 2 * (len(PRODUCTS) + len(OPERATIONS))
