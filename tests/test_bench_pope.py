"""bench pope: everyone answers the same questions with the same tokens, and figures add up."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_hd.bench.bench_pope import RECORD, TABLE, load_models, targets_of
from llava_hd.bench.bench_pope_race import (
    ALONE,
    SHARED,
    Models,
    Request,
    ask,
    contestants,
    differing,
)
from llava_hd.bench.measure import result_folder
from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError

TINY = Request(questions=(4,), size="tiny", images=2, batch=3)


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models(TINY)


def test_both_models_have_the_same_weights(models: Models) -> None:
    ours = dict(models.ours.language.causal_lm.named_parameters())
    theirs = dict(models.theirs.model.language_model.named_parameters())
    for name, tensor in theirs.items():
        assert torch.equal(ours[f"model.{name}"], tensor)
    assert torch.equal(models.ours.row_end, models.theirs.model.image_newline)


def test_questions_of_an_image_differ_and_rounds_have_images_of_their_own(models: Models) -> None:
    groups = ask(models, TINY, 4, 0)
    assert [len(group) for group in groups] == [4, 4]
    for group in groups:
        assert len({tuple(sample.ids) for sample in group}) == 4
        assert len({id(sample.tiles[0]) for sample in group}) == 1
    again, later = ask(models, TINY, 4, 0), ask(models, TINY, 4, 1)
    assert [s.ids for s in again[0]] == [s.ids for s in groups[0]]
    pixels = [part[0].tiles[0] for part in (*groups, *later)]
    assert torch.equal(again[0][0].tiles[0], pixels[0])
    assert not any(torch.equal(pixels[0], other) for other in pixels[1:])


def test_everyone_answers_with_the_same_tokens(models: Models) -> None:
    groups = ask(models, TINY, 4, 0)
    answers = {name: call(10) for name, call in contestants(models, TINY, groups).items()}
    assert list(answers) == [SHARED, ALONE, "llava_next-1", "llava_next-3"]
    expected = answers["llava_next-1"]
    assert [len(found) for found in answers.values()] == [8] * 4
    assert all(found == expected for found in answers.values())
    assert len({tuple(row) for row in expected}) > 4  # the questions matter


def test_differing_answers_are_counted() -> None:
    assert differing([[1], [2], []], [[1], [3], [4]]) == 2
    with pytest.raises(ValueError, match="shorter"):
        differing([[1]], [])


@pytest.mark.parametrize(("ratio", "cpu", "reached"), [(7, 8, True), (7, 5, False), (5, 8, False)])
def test_a_goal_on_a_cpu_is_reached_by_both_clocks(ratio: int, cpu: int, reached: bool) -> None:
    shared = {"questions_per_image": 4}
    ratios = [
        {**shared, "rival": ALONE, "ratio": 1, "cpu_ratio": 1},
        {**shared, "rival": "llava_next-1", "ratio": ratio, "cpu_ratio": 9},
        {**shared, "rival": "llava_next-3", "ratio": 9, "cpu_ratio": cpu},
    ]
    [target] = targets_of(ratios, TINY)
    assert (target["ratio"], target["cpu_ratio"], target["reached"]) == (ratio, cpu, reached)
    [on_gpu] = targets_of(ratios, replace(TINY, device="cuda"))
    assert on_gpu["reached"] == (ratio >= 6)


def test_a_run_leaves_its_record_and_its_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    words = ["--size", "tiny", "--questions", "3", "5", "--rounds", "2", "--images", "2"]
    assert main(["bench", "pope", *words, "--json", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    shown = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    for name in ("rows", "ratios", "targets", "check", "model"):
        assert shown[name] == record[name]
    rows = {(row["questions_per_image"], row["contestant"]): row for row in record["rows"]}
    assert len(rows) == 8
    for (questions, _), row in rows.items():
        assert row["questions"] == questions * 4 and row["differing"] == 0
    for ratio in record["ratios"]:
        ours = rows[ratio["questions_per_image"], SHARED]
        rival = rows[ratio["questions_per_image"], ratio["rival"]]
        expected = ours["questions_per_second"] / rival["questions_per_second"]
        assert ratio["ratio"] == pytest.approx(expected, rel=0.05)
        assert ratio["differing"] == 0
    for check in record["check"]:
        assert check["differing"] == 0 and check["different_among_themselves"] > 1
    assert record["model"]["visual_tokens"] == 88  # 16 and 8 rows of 8 with their row-ends
    assert record["model"]["shared_tokens"] < record["model"]["prompt_tokens"]
    assert {"command", "device", "versions", "seed"} <= record["environment"].keys()
    with (tmp_path / TABLE).open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 8
    assert main(["bench", "pope", *words, "--out", str(tmp_path)]) == 2


def test_a_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "tiny", "--questions", "3", "--rounds", "1", "--out", str(tmp_path)]
    assert main(["bench", "pope", *words]) == 0
    out = capsys.readouterr().out
    assert "3 questions an image, 88 visual tokens, 2 layers of width 64" in out
    assert "0 of 3" in out and "goal: 6 times either batch of transformers" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--batch", "1"], "--batch 1: give 2 or more"),
        (["--questions", "1"], "--questions takes numbers from 2"),
        (["--seed", "-1"], "--seed -1: give a number from 0"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--size", "tiny", "--model", "x"], "leave it or --model out"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--dtype", "int8"], "'int8' is unknown"),
        (["--device", "moon"], "--device moon cannot be used"),
        (["--out", ""], "--out is empty"),
    ],
)
def test_bad_usage_is_told_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "pope", *words]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line


def test_a_folder_with_a_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(UsageError, match=r"holds pope\.json already"):
        result_folder(tmp_path, torch.device("cpu"), RECORD)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        result_folder(tmp_path / "file", torch.device("cpu"), RECORD)
