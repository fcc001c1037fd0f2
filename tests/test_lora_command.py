"""`llava-hd merge-lora`, and the LoRA flags of `llava-hd finetune`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lora_models import built, give_adapter

from llava_hd.cli.main import main
from llava_hd.model.adapter_config import BaseFolders
from llava_hd.model.llava_hd import LlavaHD


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, parts) -> Path:
    folder = tmp_path_factory.mktemp("command") / "adapter"
    model, processor = built(parts)
    give_adapter(model, BaseFolders(vision=f"{parts}/vision", language=f"{parts}/language"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_and_the_difference_is_told(adapter, tmp_path, capsys):
    assert main(["merge-lora", str(adapter), "--out", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'm'}: 14 linears merged, float32; largest difference of logits" in out
    assert LlavaHD.from_pretrained(tmp_path / "m").adapter is None
    assert main(["merge-lora", str(adapter), "--out", str(tmp_path / "m")]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err


def test_the_figures_come_as_json_too(adapter, tmp_path, capsys):
    words = ["--out", str(tmp_path / "m"), "--dtype", "bf16", "--json"]
    assert main(["merge-lora", str(adapter), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["linears"] == 14 and report["packs"] == 2 and report["dtype"] == "bfloat16"
    assert 0 <= report["max_relative"] < 1e-4 < report["rounded"] < 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere"], "model folder /nowhere is not a folder"),
        (["ADAPTER", "--base", "/nowhere"], "model folder /nowhere is not a folder"),
        (["ADAPTER", "--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["ADAPTER", "--dtype", "fp8"], "--dtype must be"),
    ],
)
def test_faults_are_one_line_and_code_2(adapter, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = [str(adapter) if word == "ADAPTER" else word for word in words]
    assert main(["merge-lora", *words, "--out", str(tmp_path / "m")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_the_help_shows_examples_without_torch(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["merge-lora", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:" in out and "--base" in out


RUN = ["--data.path", "d.json", "--data.images", "i", "--output_dir", "o", "--print-config"]


def resolved(capsys, recipe: str, *words: str) -> dict:
    assert main(["finetune", "--config", recipe, *RUN, *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_llavas_own_flags_make_a_lora_run(capsys):
    words = [
        "--lora_enable",
        "True",
        "--lora_r",
        "64",
        "--lora_alpha",
        "16",
        "--mm_projector_lr",
        "2e-5",
    ]
    config = resolved(capsys, "vicuna-7b-hd448", *words)
    assert (config["lora"]["r"], config["lora"]["alpha"], config["lora"]["dropout"]) == (
        64,
        16,
        0.05,
    )
    assert config["optimizer"]["projector_lr"] == 2e-5
    assert resolved(capsys, "vicuna-7b-hd448")["lora"] is None  # nothing is left of the first


def test_a_recipe_with_lora_keeps_its_values_under_flags(capsys, tmp_path):
    config = resolved(capsys, "vicuna-7b-hd448-lora", "--lora_enable", "True", "--lora.r", "8")
    assert (config["lora"]["r"], config["lora"]["alpha"]) == (8, 256)
    assert resolved(capsys, "vicuna-7b-hd448-lora", "--lora_enable", "False")["lora"] is None
    words = ["--bits", "4", "--zero.stage", "2", "--lora.target_modules", "[q_proj,v_proj]"]
    config = resolved(capsys, "vicuna-7b-hd448-lora", *words)
    assert config["lora"]["bits"] == 4 and config["lora"]["target_modules"] == ["q_proj", "v_proj"]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert resolved(capsys, str(again)) == config


def test_what_contradicts_itself_is_refused(capsys):
    base = ["finetune", "--config", "vicuna-7b-hd448", *RUN]
    assert main([*base, "--lora_enable", "False", "--lora_r", "8"]) == 2
    assert "--lora_enable false, but --lora.r is given" in capsys.readouterr().err
    assert main([*base, "--bits", "4"]) == 2
    assert "lora.bits 4 needs zero.stage 2" in capsys.readouterr().err


def test_the_tower_is_trained_by_flags(capsys):
    words = [
        "--unfreeze_mm_vision_tower",
        "True",
        "--vision_layers",
        "4",
        "--mm_vision_tower_lr",
        "2e-6",
    ]
    config = resolved(capsys, "vicuna-7b-hd448", *words)
    assert (config["train_vision"], config["vision_layers"]) == (True, 4)
    assert config["optimizer"]["vision_lr"] == 2e-6
