"""Folders of evaluations: unfinished ones, two runs at once, questions that cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pope_files import image_name, write_lines, write_pope
from tiny import random_image, tiny_hd

from llava_hd.cli.main import main
from llava_hd.model.assemble import assemble
from llava_hd.train.output_lock import only_run

IMAGES = 3


@pytest.fixture(scope="module")
def model(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    made, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hd448")
    )
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Questions, images and LLaVA-Bench's questions about the same."""
    write_pope(tmp_path / "pope", IMAGES)
    (tmp_path / "images").mkdir()
    for number in range(IMAGES):
        random_image((40, 40), seed=number).save(tmp_path / "images" / image_name(number))
    lines = [
        {"question_id": n, "image": image_name(n), "text": f"what of {n}?", "category": "conv"}
        for n in range(IMAGES)
    ]
    write_lines(tmp_path / "bench.jsonl", lines)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    done = capsys.readouterr()
    return code, done.out, done.err


def pope(folder: Path, model: Path, out: str, *more: object) -> list[object]:
    words = ["eval", "pope", "--model", model, "--questions", folder / "pope", "--device", "cpu"]
    return [*words, "--images", folder / "images", "--max-new-tokens", 2, "--out", folder / out,
            *more]  # fmt: skip


def bench(folder: Path, model: Path, *more: object) -> list[object]:
    words = ["eval", "llava-bench", "--model", model, "--questions", folder / "bench.jsonl"]
    return [*words, "--images", folder / "images", "--max-new-tokens", 2, "--device", "cpu",
            "--out", folder / "bench", *more]  # fmt: skip


def test_an_unfinished_run_is_neither_scored_nor_compared(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        assert run(capsys, *pope(folder, model, name, "--limit", 6))[0] == 0
        whole = (folder / name / "answers.jsonl").read_text()
        (folder / name / "answers.jsonl").write_text("".join(whole.splitlines(True)[:9]))
    score = ("eval", "pope", "--score-only", "--answers", folder / "a")
    compare = ("compare", folder / "a", folder / "b", "--out", folder / "comparison")
    for words in (score, compare):
        code, out, err = run(capsys, *words)
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert f"{folder / 'a'}: 9 answers, but scores.json is of 18; start its `eval pope`" in err
    for name in ("a", "b"):
        (folder / name / "scores.json").unlink()
    for words in (score, compare):
        code, out, err = run(capsys, *words)
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert f"{folder / 'a'}: not finished, 9 answers and no scores.json; start its" in err
    assert not (folder / "comparison").exists()
    for name in ("a", "b"):
        assert run(capsys, *pope(folder, model, name, "--limit", 6))[0] == 0
    assert [run(capsys, *words)[0] for words in (score, compare)] == [0, 0]


def test_damaged_scores_are_named(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *pope(folder, model, "a", "--limit", 1))[0] == 0
    for text in ("[1]", '{"random": 3}', "{", "\u00ff"):
        (folder / "a" / "scores.json").write_text(text, encoding="latin-1")
        code, _, err = run(capsys, "eval", "pope", "--score-only", "--answers", folder / "a")
        assert (code, err.count("\n")) == (3, 1)
        assert "scores.json: not the scores of an evaluation" in err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", 7),
        ("prompt", None),
        ("decoding", []),
        ("device", {}),
        ("model", {"path": "x", "fingerprint": 3}),
        ("model", {"path": "x", "fingerprint": "f", "hd": 3}),
    ],
)
def test_a_damaged_record_is_named(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], field: str, value: object
) -> None:
    assert run(capsys, *pope(folder, model, "a", "--limit", 1))[0] == 0
    record = json.loads((folder / "a" / "run.json").read_text())
    (folder / "a" / "run.json").write_text(json.dumps({**record, field: value}))
    for words in (
        ["compare", folder / "a", folder / "a", "--names", "x", "y", "--out", folder / "c"],
        pope(folder, model, "a", "--limit", 1),
    ):
        code, _, err = run(capsys, *words)
        assert (code, err.count("\n")) == (3, 1)
        assert "run.json: not the record of an evaluation" in err


def test_a_second_run_in_the_same_folder_is_refused(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, out in ((pope(folder, model, "a"), "a"), (bench(folder, model), "bench")):
        with only_run(folder / out, print):
            code, _, err = run(capsys, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert f"--out {folder / out}: another run is writing there" in err
        assert not (folder / out).exists()  # nothing was written
        assert run(capsys, *words)[0] == 0


def test_a_question_that_cannot_be_asked_is_named_and_the_answers_stay(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = json.loads((model / "config.json").read_text())["text"]["max_position_embeddings"]
    file = folder / "bench.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for text, said in (
        ("cat " * limit, f"tokens of text and image, but the language model reads {limit}"),
        ("<image> or <image>?", "2 <image> tags"),
    ):
        write_lines(file, [*lines[:2], {**lines[2], "text": text}])
        words = bench(folder, model, "--batch-size", 2, "--out", folder / text[:3])
        code, _, err = run(capsys, *words)
        [line] = [line for line in err.splitlines() if line.startswith("llava-hd: error")]
        assert code == 3
        assert f"{file}:3: " in line and said in line and "the answers so far are kept" in line
        assert len((folder / text[:3] / "answers.jsonl").read_text().splitlines()) == 2


def test_a_damaged_image_is_told_with_its_question(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = folder / "images" / image_name(2)
    whole = photo.read_bytes()
    photo.write_bytes(whole[:200])
    code, _, err = run(capsys, *bench(folder, model, "--batch-size", 1))
    [line] = [line for line in err.splitlines() if line.startswith("llava-hd: error")]
    assert code == 3
    assert f"bench.jsonl:3: {photo}: damaged image" in line
    photo.write_bytes(whole)
    code, _, err = run(capsys, *bench(folder, model))
    assert (code, "2 of 3 questions are answered already" in err) == (0, True)
