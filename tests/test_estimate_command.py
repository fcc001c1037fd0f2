"""`llava-hd estimate` and `--dry-run` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from estimate_data import measured, small_run
from train_data import changed, write_data

from llava_hd.cli.main import main
from llava_hd.train.batches import BatchOrder
from llava_hd.train.config import TrainConfig
from llava_hd.train.estimate_samples import (
    heaviest_passes,
)
from llava_hd.train.recipe import config_yaml


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> TrainConfig:
    return small_run(tmp_path_factory.mktemp("estimate"), parts)


@pytest.fixture
def recipe(config, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(config_yaml(changed(config, output_dir=str(tmp_path / "run"))))
    return path


def test_the_command_measures_the_data_and_writes_what_it_is_asked_for(recipe, tmp_path, capsys):
    words = ["estimate", "--config", str(recipe), "--cpu", "--gpus", "2", "--out"]
    assert main([*words, str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"]["source"].startswith("measured: 12 records")
    assert report["steps"] == 5 and report["memory_bytes"]["host"] == 0
    assert json.loads((tmp_path / "out/estimate.json").read_text()) == report
    assert (tmp_path / "out/tokens.png").read_bytes().startswith(b"\x89PNG")
    assert main(["estimate", "--config", str(recipe), "--memory-gib", "1"]) == 0
    text = capsys.readouterr().out
    assert "fits: " in text and "not said, because not given: --tflops" in text


def test_the_command_says_what_it_assumes(capsys):
    words = ["estimate", "--config", "nano-hd-finetune", "--sizes", "224x224", "--text-tokens"]
    assert main([*words, "30"]) == 0
    text = capsys.readouterr().out
    assert "samples assumed (" in text and "224x224 px" in text and "30 tokens of text" in text
    assert main(["estimate", "--config", "vicuna-13b-hdflex", "--gpus", "8"]) == 0
    assert "models/vicuna-13b-v1.5 is not there" in capsys.readouterr().out


OPEN = ["--gradient_checkpointing", "auto", "--data.pack_tokens", "auto"]


def test_what_a_recipe_leaves_to_the_memory_is_said_to_be_assumed(recipe, config, capsys):
    notes = ["gradient_checkpointing auto counts as false", "data.pack_tokens auto counts as its"]
    words = ["--config", str(recipe), "--data.batching", "packs"]
    assert main(["estimate", *words]) == 0
    assert "auto counts as" not in capsys.readouterr().out
    for command in (["estimate"], [config.stage, "--dry-run"]):
        assert main([*command, *words, *OPEN]) == 0
        text = capsys.readouterr().out
        assert all(f"note: {note}" in text for note in notes)
    assert main(["estimate", *words, *OPEN, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["assumed"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus must be above 0"),
        (["--gpus", "7"], "global_batch_size 128 is not"),
        (["--sizes", "640"], "--sizes 640: give height x width"),
        (["--tflops", "1", "--measured", "x"], "leave one of them out"),
        (["--measured", "nowhere"], "--measured nowhere: no metrics.jsonl"),
        (["--model.language", "nowhere"], "model.language: model folder nowhere is not a folder"),
    ],
)
def test_bad_questions_are_one_line(words, message, capsys):
    assert main(["estimate", "--config", "vicuna-7b-hd448", "--gpus", "8", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_dry_run_reads_the_heaviest_passes_and_writes_nothing(recipe, config, tmp_path, capsys):
    words = ["pretrain", "--config", str(recipe), "--dry-run", "--data.batching", "plain"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "passes of each rank on average" in text and "read and packed: 2 samples" in text
    assert not (tmp_path / "run").exists()
    samples = measured(config)
    tokens, _ = heaviest_passes(BatchOrder(12, 4, 2, seed=42), samples, 1, range(5))
    assert f"{tokens.tokens:,} tokens" in text


def test_a_dry_run_finds_a_damaged_image_of_its_heaviest_pass(config, tmp_path, capsys):
    data = write_data(tmp_path / "data")
    for image in (data / "images").iterdir():  # whole headers, cut pixels
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    damaged = changed(
        config,
        data__path=str(data / "data.json"),
        data__images=str(data / "images"),
        output_dir=str(tmp_path / "run"),
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(config_yaml(damaged))
    assert main(["pretrain", "--config", str(path), "--dry-run"]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "data.json: record" in line and "truncated" in line
