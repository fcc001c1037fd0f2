"""`llava-hd eval pope` as a user calls it: scoring, asking a tiny model, resuming, refusing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pope_files import (
    SPLITS,
    image_name,
    llava_records,
    pope_records,
    true_label,
    write_lines,
    write_pope,
)
from tiny import random_image, tiny_hd

from llava_hd.bench.pope import PROMPT
from llava_hd.cli.main import main
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor


def answer_lines(num_images: int = 3, wrong: int = 0) -> list[dict[str, Any]]:
    """Right answers to every question, but the first `wrong` of each split."""
    flip = {"yes": "No", "no": "Yes"}
    return [
        {
            "split": split,
            "question_id": record["question_id"],
            "text": flip[record["label"]] if place < wrong else record["label"].title(),
        }
        for split in SPLITS
        for place, record in enumerate(pope_records(split, num_images))
    ]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in ("eval", "pope", *words)])
    done = capsys.readouterr()
    return code, done.out, done.err


# --- scoring -----------------------------------------------------------------------------------


def test_score_only_prints_every_figure_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_pope(tmp_path)
    answers = write_lines(tmp_path / "a.jsonl", answer_lines(wrong=9))
    code, out, _ = run(
        capsys, "--score-only", "--answers", answers, "--questions", *files, "--json"
    )
    assert code == 0
    table = json.loads(out)
    assert list(table) == [*SPLITS, "mean", "strict"]
    # Nine of eighteen wrong, five of them labelled yes: 4 hits, 4 false alarms, 5 misses.
    assert table["random"] == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 4 / 9,
        "f1": 8 / 17,
        "yes_ratio": 8 / 18,
        "unparsable": 0,
        "questions": 18,
    }
    assert table["strict"] == {split: table[split] for split in (*SPLITS, "mean")}


def test_score_only_prints_a_table_of_both_parsers_within_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write_lines(tmp_path / "a.jsonl", answer_lines(wrong=9))
    write_pope(tmp_path / "pope")
    code, out, _ = run(
        capsys, "--score-only", "--answers", answers, "--questions", tmp_path / "pope"
    )
    assert code == 0
    assert "…" not in out
    for word in ("original", "strict", "adversarial", "unparsable", "0.4706", "mean"):
        assert word in out


def test_score_only_reads_llavas_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pope(tmp_path / "labels")
    questions = write_lines(tmp_path / "llava_pope_test.jsonl", llava_records())
    answers = write_lines(
        tmp_path / "llava-v1.5-13b.jsonl",
        [
            {"question_id": r["question_id"], "prompt": r["text"], "text": true_label(r["text"])}
            for r in llava_records()
        ],
    )
    code, out, _ = run(
        capsys, "--score-only", "--answers", answers, "--questions", questions,
        "--labels", tmp_path / "labels", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["mean"]["f1"] == 1.0


def test_scoring_starts_without_torch(tmp_path: Path) -> None:
    files = [str(path) for path in write_pope(tmp_path)]
    answers = write_lines(tmp_path / "a.jsonl", answer_lines())
    words = ["eval", "pope", "--score-only", "--answers", str(answers), "--questions", *files]
    code = (
        "import sys; from llava_hd.cli.main import main; "
        f"code = main({words!r}); "
        "print(code, [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_mismatch_is_one_line_and_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_pope(tmp_path)
    answers = write_lines(tmp_path / "a.jsonl", answer_lines()[1:])
    code, out, err = run(capsys, "--score-only", "--answers", answers, "--questions", *files)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "1 of 54 questions have no answer" in err
    assert "0 of 53 answers have no question" in err


def test_an_unknown_label_is_one_line_and_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = pope_records("random")
    records[4]["label"] = "maybe"
    questions = write_lines(tmp_path / "pope_random.json", records)
    answers = write_lines(tmp_path / "a.jsonl", answer_lines()[:18])
    code, _, err = run(capsys, "--score-only", "--answers", answers, "--questions", questions)
    assert (code, err.count("\n")) == (3, 1)
    assert f"{questions}:5: label 'maybe'" in err


# --- asking ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny HD model as it is saved by a training."""
    folder = tmp_path_factory.mktemp("model")
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hd448")
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Path]:
    """Question files and their images, of several sizes."""
    write_pope(tmp_path / "pope")
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(60, 80), (112, 112), (90, 40)]):
        random_image(size, seed=number).save(tmp_path / "images" / image_name(number))
    return {"questions": tmp_path / "pope", "images": tmp_path / "images", "out": tmp_path / "out"}


def options(asked: dict[str, Path], model: Path, *more: object) -> list[object]:
    words: list[object] = ["--model", model, "--max-new-tokens", 4, "--device", "cpu", *more]
    for name, path in asked.items():
        words += [f"--{name}", path]
    return words


def test_a_tiny_model_is_asked_and_scored(
    asked: dict[str, Path], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, *options(asked, model_dir, "--batch-size", 7, "--json"))
    assert code == 0
    assert json.loads(out) == json.loads((asked["out"] / "scores.json").read_text())
    lines = [json.loads(x) for x in (asked["out"] / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 54
    model, processor = LlavaHD.from_pretrained(model_dir), Processor.from_pretrained(model_dir)
    for line in lines[::9]:
        image, question = asked["images"] / line["image"], line["question"] + PROMPT
        assert line["text"] == answer(model, processor, image, question, max_new_tokens=4)
    record = json.loads((asked["out"] / "run.json").read_text())
    assert record["prompt"] == PROMPT
    assert record["decoding"] == {"max_new_tokens": 4, "greedy": True, "dtype": "float32"}
    assert record["model"]["hd"]["grids"] == [[2, 2]]


def test_an_interrupted_run_goes_on_where_it_stopped(
    asked: dict[str, Path],
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = options(asked, model_dir, "--batch-size", 6, "--limit", 6)
    calls: list[int] = []

    def ask(stop_after: int) -> tuple[int, str, str]:
        def answer_batch(
            model: Any, processor: Any, images: list[Path], questions: list[str], **_: Any
        ) -> list[str]:
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(len(questions))
            return [true_label(text) for text in questions]

        monkeypatch.setattr("llava_hd.model.generate.answer_batch", answer_batch)
        return run(capsys, *words)

    code, _, err = ask(stop_after=2)
    assert (code, calls) == (75, [6, 6])
    assert "start the same command again" in err
    code, out, err = ask(stop_after=99)
    assert (code, calls) == (0, [6, 6, 6])
    assert "12 of 18 questions are answered already" in err
    assert "1.0000" in out
    code, again, _ = ask(stop_after=0)  # nothing is left to ask
    assert (code, again) == (0, out)


def test_a_damaged_image_ends_the_run_and_the_mended_one_finishes_it(
    asked: dict[str, Path], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(asked, model_dir, "--batch-size", 6, "--limit", 12)
    photo = asked["images"] / image_name(1)
    whole = photo.read_bytes()
    photo.write_bytes(whole[:200])
    code, _, err = run(capsys, *words)
    assert code == 3
    [line] = [line for line in err.splitlines() if line.startswith("llava-hd: error")]
    assert "coco_pope_random.json:7: question_id 7 of split random: " in line
    assert f"{photo}: " in line
    assert len((asked["out"] / "answers.jsonl").read_text().splitlines()) == 18
    assert not (asked["out"] / "scores.json").exists()
    photo.write_bytes(whole)
    code, _, err = run(capsys, *words)
    assert (code, "18 of 36 questions are answered already" in err) == (0, True)


def test_label_files_are_recorded_as_such(
    asked: dict[str, Path], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = asked["questions"]
    asked["questions"] = write_lines(tmp_path / "llava.jsonl", llava_records())
    words = options(asked, model_dir, "--limit", 1, "--labels", labels)
    assert run(capsys, *words)[0] == 0
    record = json.loads((asked["out"] / "run.json").read_text())
    assert [entry["questions"] for entry in record["questions"]] == [54]
    assert [entry["questions"] for entry in record["labels"]] == [18, 18, 18]
    assert run(capsys, *words)[0] == 0


def test_an_out_inside_a_file_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["--model", "m", "--questions", "q", "--images", "i", "--out", tmp_path / "file/x"]
    code, _, err = run(capsys, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path}/file is a file" in err


def test_another_prompt_is_asked_and_recorded_and_does_not_resume(
    asked: dict[str, Path], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(asked, model_dir, "--limit", 1)
    assert run(capsys, *words, "--prompt", "Yes or no?")[0] == 0
    assert json.loads((asked["out"] / "run.json").read_text())["prompt"] == "\nYes or no?"
    before = (asked["out"] / "answers.jsonl").read_bytes()
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "prompt is '\\nYes or no?'" in err
    assert (asked["out"] / "answers.jsonl").read_bytes() == before


def test_a_missing_image_is_found_before_the_model_is_loaded(
    asked: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "model"
    empty.mkdir()
    (empty / "config.json").write_text("{}")  # loading it would be exit code 2
    (asked["images"] / image_name(2)).unlink()
    code, _, err = run(capsys, *options(asked, empty))
    assert (code, err.count("\n")) == (3, 1)
    assert image_name(2) in err
    assert "question_id 13 of split random" in err
    assert not asked["out"].exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_model_is_refused_before_anything_is_written(
    asked: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    if exists:
        (tmp_path / "model").mkdir()
    code, _, err = run(capsys, *options(asked, tmp_path / "model"))
    assert (code, err.count("\n")) == (2, 1)
    assert str(tmp_path / "model") in err
    assert not asked["out"].exists()


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(
    asked: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run(capsys, *options(asked, tmp_path / "model"))
    assert (code, err.count("\n")) == (2, 1)
    assert not asked["out"].exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--model is missing"),
        (["--score-only"], "--answers"),
        (["--score-only", "--answers", "a", "--model", "m"], "--model has no meaning"),
        (["--answers", "a"], "--score-only"),
        (["--model", "m", "--questions", "q", "--images", "i"], "--out is missing"),
        (["--model", "m", "--questions", "q", "--images", "i", "--out", "o", "--dtype", "int8"],
         "'int8'"),
        (["--limit", "few"], "limit"),
        (["--model", "m", "--questions", "q", "--images", "i", "--out", "o", "--limit", "0"],
         "--limit 0"),
        (["--batch-sise", "3"], "batch-sise"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_device_that_is_not_there_is_bad_usage(
    asked: dict[str, Path], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *options(asked, model_dir), "--device", "nonsense")
    assert (code, err.count("\n")) == (2, 1)
    assert "--device nonsense" in err
