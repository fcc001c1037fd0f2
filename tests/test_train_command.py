"""`llava-hd pretrain` and `finetune` as a user calls them: faults, dry run, workers, launchers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from processes import wait_for
from train_data import tiny_config, write_data

from llava_hd.cli.main import main
from llava_hd.cli.train import ALIASES, SWITCHES, build_parser
from llava_hd.train.checkpoint_state import write_state
from llava_hd.train.config import TrainConfig, leaves
from llava_hd.train.manifest import Manifest, quick_fault, write_manifest
from llava_hd.train.metrics import read_metrics
from llava_hd.train.prepare import is_fresh, prepare
from llava_hd.train.recipe import config_yaml, load_config

COMMAND = [sys.executable, "-m", "llava_hd.cli.main"]


@pytest.fixture
def recipe(tmp_path, parts) -> Path:
    """A recipe of stage 1 that works; its output folder does not exist yet."""
    config = tiny_config(write_data(tmp_path / "d"), parts, tmp_path / "out", stage="pretrain")
    path = tmp_path / "recipe.yaml"
    path.write_text(config_yaml(config), encoding="utf-8")
    return path


def fails(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command; it must end with `code` and one line of error, which is returned."""
    assert main(words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("llava-hd: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--optimizer.lrr", "1"], 2, "did you mean '--optimizer.lr'?"),
        (["--optimizer.lr", "fast"], 2, "--optimizer.lr must be a number, not 'fast'"),
        (["--learning_rat", "1"], 2, "did you mean '--learning_rate'?"),
        (["--model.preset", "hd48"], 2, "did you mean 'hd448'?"),
        (["--model.preset", "hd448"], 2, "hd.tile_px is 224, but"),
        (["--model.hd", '{"tile_px": 56}'], 2, "hd.patch_px is missing"),
        (["--model.vision", "nowhere"], 2, "model.vision: model folder nowhere is not a folder"),
        (["--model.template", "vicuna"], 2, "did you mean 'vicuna_v1'?"),
        (["--data.path", "nowhere.json"], 2, "data.path nowhere.json: no such file"),
        (["--data.images", "nowhere"], 2, "data.images nowhere is not a folder"),
        (["--global_batch_size", "3"], 2, "global_batch_size 3 is not per_device_batch_size 2"),
        (["--num-processes", "0"], 2, "--num-processes must be 1 or more"),
        (["--resume", "nowhere"], 2, "nowhere is not a checkpoint"),
        (["--model.attention", "eagr"], 2, "attention 'eagr' is unknown; did you mean 'eager'?"),
        (["--zero.sub_group_size", "-1", "--dry-run"], 2, "zero.sub_group_size must be 1 or more"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(recipe, capsys, words, code, message):
    assert message in fails(["pretrain", "--config", str(recipe), *words], code, capsys)
    assert not (recipe.parent / "out").exists()


def test_a_model_folder_without_configuration_is_named(recipe, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = ["pretrain", "--config", str(recipe), "--model.language", str(tmp_path / "empty")]
    assert "model.language: model folder" in fails(words, 2, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_processes", [[], ["--num-processes", "2"]])
def test_bad_data_ends_with_code_3_before_anything_is_written(
    recipe, tmp_path, capsys, num_processes
):
    data = tmp_path / "d/data.json"
    words = ["pretrain", "--config", str(recipe), *num_processes]
    records = json.loads(data.read_text(encoding="utf-8"))
    records[4]["conversations"].reverse()
    data.write_text(json.dumps(records), encoding="utf-8")
    message = fails(words, 3, capsys)
    assert f"{data}: record 4 (id 'r4'): conversations[0].from" in message
    records[4]["conversations"].reverse()
    data.write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "d/images/4-0.png").unlink()
    assert "record 4 (id 'r4'): image '4-0.png' is not below" in fails(words, 3, capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine", encoding="utf-8")
    words = ["pretrain", "--config", str(recipe)]
    assert "is not empty; go on with --resume auto" in fails(words, 2, capsys)
    assert "holds no run" in fails([*words, "--resume", "auto"], 2, capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_output_folder_below_a_file_is_refused(recipe, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = ["pretrain", "--config", str(recipe), "--output_dir", str(tmp_path / "file/a/b")]
    assert f"output_dir {tmp_path / 'file'} (in " in fails(words, 2, capsys)


def test_an_error_of_the_system_is_one_line_with_the_path(recipe, tmp_path, capsys):
    words = ["pretrain", "--config", str(recipe), "--output_dir", str(tmp_path / ("x" * 300))]
    assert "xxx: File name too long" in fails(words, 1, capsys)
    assert main([*words, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bad_first_step_leaves_nothing_and_the_same_command_works_once_it_is_mended(
    recipe, tmp_path, capsys
):
    images = {path: path.read_bytes() for path in (tmp_path / "d/images").iterdir()}
    for path in images:
        path.write_bytes(b"no image")
    words = ["pretrain", "--config", str(recipe), "--max_steps", "1"]
    assert main(words) == 3
    assert not (tmp_path / "out").exists()
    for path, content in images.items():
        path.write_bytes(content)
    assert main(words) == 0


@pytest.mark.parametrize("foreign", [None, "thesis.txt", "runs/mine.txt", "checkpoint-1/x"])
def test_only_what_a_run_without_a_step_left_counts_as_fresh(tmp_path, foreign):
    (tmp_path / "runs").mkdir()
    for name in ("train_config.yaml", "metrics.jsonl", "runs/events.out.tfevents.1"):
        (tmp_path / name).touch()
    assert is_fresh(tmp_path) and is_fresh(tmp_path / "new")
    if foreign is None:
        (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    else:
        (tmp_path / foreign).parent.mkdir(exist_ok=True)
        (tmp_path / foreign).touch()
    assert not is_fresh(tmp_path)


def test_a_finished_run_cannot_be_gone_on_from_in_another_folder(recipe, tmp_path, capsys):
    config = load_config(recipe, "pretrain")
    state = prepare(config, 1, None).state
    (tmp_path / "done").mkdir()
    write_state(tmp_path / "done", replace(state, step=state.num_steps))
    words = ["pretrain", "--config", str(recipe), "--resume", str(tmp_path / "done")]
    assert "done: that run is finished" in fails(words, 2, capsys)
    assert main([*words, "--output_dir", str(tmp_path / "done"), "--dry-run"]) == 2
    (tmp_path / "done/train_config.yaml").touch()
    assert main([*words, "--output_dir", str(tmp_path / "done"), "--dry-run"]) == 0


def test_the_word_of_the_deepspeed_launcher_is_dropped(monkeypatch, capsys):
    words = ["--local_rank=0", "pretrain", "--config", "nano-hd", "--print-config"]
    assert "'--local_rank=0' is not a command" in fails(words, 2, capsys)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(words) == 0
    assert yaml.safe_load(capsys.readouterr().out)["stage"] == "pretrain"


def test_debug_reaches_the_workers(recipe, monkeypatch):
    commands = []
    monkeypatch.setattr(
        "llava_hd.cli.train.run_workers", lambda command, workers: commands.append(command) or 0
    )
    words = ["pretrain", "--config", str(recipe), "--num-processes", "2"]
    assert main(words) == main(["--debug", *words]) == 0
    assert ["--debug" in command for command in commands] == [False, True]


@pytest.mark.parametrize(
    ("left", "advice"),
    [
        ((), "no step was logged; start the same command again"),
        (("train_config.yaml", "metrics.jsonl"), "holds no checkpoint (save_steps is 0)"),
        (("metrics.jsonl", "checkpoint-2", "checkpoint-10"), "checkpoint-10 with --resume auto"),
    ],
)
def test_ctrl_c_says_how_to_go_on(recipe, tmp_path, monkeypatch, capsys, left, advice):
    def interrupted(*args: object) -> None:
        for name in left:
            path = tmp_path / "out" / name
            if name.startswith("checkpoint"):
                path.mkdir(parents=True)
                step = int(name.rpartition("-")[2])
                write_manifest(path, Manifest(step, 1, {}))
                continue
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}\n", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_hd.train.run.train", interrupted)
    assert main(["pretrain", "--config", str(recipe)]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llava-hd: interrupted; ") and advice in line


def test_a_dry_run_says_what_would_run_and_writes_nothing(recipe, tmp_path, capsys):
    words = ["pretrain", "--config", str(recipe), "--dry-run", "--num-processes", "2"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "12 records with 10 images; steps 0..5 of 4 samples on 2 ranks" in text
    assert not (tmp_path / "out").exists()


def resolved(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*words, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_flags_come_after_the_recipe_and_other_projects_names_work(capsys):
    words = ["finetune", "--config", "vicuna-7b-hd448"]
    ours = ["--optimizer.lr", "1e-5", "--epochs", "2", "--data.batching", "plain"]
    theirs = ["--learning_rate", "1e-5", "--num_train_epochs", "2"]
    theirs += ["--group_by_modality_length", "False"]
    values = resolved([*words, *ours], capsys)
    assert values == resolved([*words, *theirs], capsys)
    assert (values["optimizer"]["lr"], values["epochs"]) == (1e-5, 2.0)
    assert values["optimizer"]["warmup_ratio"] == 0.03
    assert resolved([*words, "--bf16", "False"], capsys)["precision"] == "fp32"
    assert resolved([*words, "--save_total_limit", "null"], capsys)["save_total_limit"] is None


def test_the_flags_are_the_settings_and_their_aliases_and_no_others():
    names = {name for name, _ in leaves(TrainConfig)} - {"stage"}
    assert set(ALIASES) <= names
    flags = names | {alias for aliases in ALIASES.values() for alias in aliases} | set(SWITCHES)
    own = {"help", "debug", "config", "num-processes", "dry-run", "print-config", "stage"}
    for command in ("pretrain", "finetune"):
        found = {option.removeprefix("--") for option in build_parser(command).long_options}
        assert found == flags | own


def test_help_is_there_without_torch():
    code = (
        "import sys; from llava_hd.cli.main import main\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--optimizer.lr X, --learning_rate X" in done.stdout
    assert "vicuna-7b-hd448-finetune" in done.stdout


def test_two_local_workers_train_and_say_it_once(recipe, tmp_path):
    words = ["pretrain", "--config", str(recipe), "--num-processes", "2", "--max_steps", "2"]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, loss ") == 1
    assert done.stderr.count("step 2/2  loss ") == 1
    assert "Traceback" not in done.stderr and "WARNING" not in done.stdout
    state = json.loads((tmp_path / "out/trainer_state.json").read_text(encoding="utf-8"))
    assert state["world_size"] == 2


def test_torchrun_is_joined_and_a_fault_of_one_rank_stops_all_with_its_line(recipe, tmp_path):
    (tmp_path / "d/images/1-0.png").write_bytes(b"no image")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no-python"]
    words += [*COMMAND, "pretrain", "--config", str(recipe), "--max_steps", "6"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("llava-hd: error: ")]
    assert len(lines) == 1 and "record 1 (id 'r1')" in lines[0] and "1-0.png" in lines[0]
    assert "exitcode  : 3" in done.stderr


def test_ctrl_c_stops_all_workers_and_says_that_the_run_can_go_on(recipe, tmp_path):
    words = ["pretrain", "--config", str(recipe), "--num-processes", "2", "--max_steps", "100000"]
    run = subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 75, errors
    assert errors.count("interrupted") == 1 and "Traceback" not in errors
    assert "llava-hd: SIGINT: the step is finished and saved first" in errors
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"saved {saved}, go on with --resume auto" in errors
    assert quick_fault(saved) is None
    assert len(read_metrics(tmp_path / "out")) >= 1
