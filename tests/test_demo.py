"""The demo runs the real commands from drawing to report, and goes on where it was stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava_hd.bench.demo import MODELS, DemoSettings, chain, check_folder
from llava_hd.bench.nano_steps import Step, read_seconds, run_steps
from llava_hd.cli.main import main
from llava_hd.hd.errors import LlavaHDError, UsageError

SMALL = ["--train-scenes", "40", "--test-scenes", "4", "--steps-1", "2", "--steps-2", "2"]


@pytest.mark.timeout(600)
def test_a_small_demo_makes_everything_and_is_not_run_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *SMALL]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert set(report["models"]) == set(MODELS)
    for scores in report["models"].values():
        assert {"random", "popular", "adversarial", "mean"} <= set(scores)
        assert 0 <= scores["mean"]["f1"] <= 1
    assert report["paired_p"]["mean_f1_bootstrap"] is None  # four scenes are too few
    assert 0 < report["paired_p"]["mcnemar_all"] <= 1
    for model in MODELS:
        assert f"{report['models'][model]['mean']['f1']:.4f}" in printed
        assert (out / model / "stage2" / "config.json").is_file()
        for stage, name in ((1, "pretrain"), (2, "finetune")):
            metrics = (out / model / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
            assert len(metrics) == 2
            assert f"llava-hd {name}" in (out / "logs" / f"{model}-{name}.log").read_text()
    page = (out / "report.html").read_text()
    assert "Stage 1: captions" in page and "<svg" in page and "data:image/png" in page
    assert not re.search(r"<script|(src|href|url\()\W*https?:|@import", page)  # nothing is fetched

    logs = {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()}
    assert main(["demo", "--out", str(out), *SMALL, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["models"] == report["models"] and again["demo"] == report["demo"]
    assert {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()} == logs

    assert main(["demo", "--out", str(out), *SMALL, "--seed", "1"]) == 2


def test_both_models_get_the_same_data_steps_and_seed(tmp_path: Path) -> None:
    chains = {model: chain(model, tmp_path, DemoSettings(seed=3)) for model in MODELS}
    for base, hd in zip(*chains.values(), strict=True):
        assert [str(w).replace("base", "hd") for w in base.words] == list(hd.words)
        assert base.total == hd.total


def test_a_failing_step_stops_the_demo_and_names_its_log(tmp_path: Path) -> None:
    bad = Step("tile", ["tile", "none.jpg"], tmp_path / "done", tmp_path / "l", tmp_path / "p", 1)
    times = tmp_path / "seconds.json"
    with pytest.raises(LlavaHDError, match=r"demo: base tile ended with code 3: .*none\.jpg"):
        run_steps({"base": [bad]}, 1, times, lambda *_: None, "demo")
    assert read_seconds(times)["base"]["tile"] > 0


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not empty and holds no demo"):
        check_folder(tmp_path, DemoSettings())


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="--test-scenes must be 1 or more"):
        DemoSettings(test_scenes=0)
