"""`llava-hd compare` on what it cannot compare or show: refusals, missing pictures, few images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from compare_runs import make_folder, make_run, run
from pope_files import image_name, write_lines
from tiny import random_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path, num_images=20)


def test_without_images_the_report_is_made_without_pictures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images").rename(folder / "moved")
    code, out, _ = run(capsys, folder / "base", folder / "hd", "--out", folder / "cmp")
    assert code == 0
    assert "without pictures: give their folder with --images" in out
    assert "<img" not in (folder / "cmp" / "report.html").read_text()
    code, out, _ = run(
        capsys,
        folder / "base",
        folder / "hd",
        "--out",
        folder / "cmp",
        "--images",
        folder / "moved",
    )
    assert code == 0
    assert "<img" in (folder / "cmp" / "report.html").read_text()


def test_differing_settings_are_pointed_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(folder, "other", wrong={1}, prompt="")
    _, out, _ = run(capsys, folder / "hd", folder / "other", "--out", folder / "cmp")
    assert 'The response prompt differs: "\\nAnswer the question' in " ".join(out.split())
    page = (folder / "cmp" / "report.html").read_text()
    assert "The response prompt differs" in page


def test_different_questions_are_refused_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (folder / "hd" / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "short.jsonl").write_text("".join(lines[3:]))
    code, out, err = run(capsys, folder / "base", folder / "short.jsonl", "--out", folder / "cmp")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert f"3 only in {folder / 'base' / 'answers.jsonl'}" in err
    assert f"0 only in {folder / 'short.jsonl'}" in err
    assert not (folder / "cmp").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base"], "two models or more"),
        (["base", "base"], "two models are called"),
        (["base", "nothing"], "nothing"),
        (["base", "images"], "no answers.jsonl"),
        (["base", "hd", "--parser", "loose"], "'loose'"),
        (["base", "hd", "--seed", "-1"], "--seed"),
        (["base", "hd", "--resamples", "99"], "--resamples 99: give a number from 100"),
        (["base", "hd", "--out", "images/photo_0.png/deep/x"], "images/photo_0.png is a file"),
        (["base", "hd", "--images", "pope"], "photo_0.png"),
        (["base", "hd", "--names", "m", "m"], "--names"),
        (["base", "hd", "--names", "m", "n", "o"], "--names gives 3 names for 2 models"),
        (["base", "hd", "--out", "images/photo_0.png"], "is a file"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not (folder / "comparison").exists()


def test_few_images_get_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path, num_images=1)
    code, out, _ = run(capsys, folder / "base", folder / "hd", "--out", folder / "cmp")
    assert code == 0
    assert "is better" not in out
    assert "bootstrap p" not in out
    assert "No verdict, the images are too few: mean F1" in out
    said = "Too few images for intervals and p by bootstrap: random has 1, popular has 1"
    assert said in " ".join(out.split())
    page = (folder / "cmp" / "report.html").read_text()
    assert said in page
    assert "is better" not in page
    report = json.loads((folder / "cmp" / "report.json").read_text())
    assert report["warnings"][0].startswith(said)
    [pair] = report["comparison"]["pairs"]
    assert pair["difference"]["mean"]["f1"]["p"] is None
    assert pair["mcnemar"]["all"]["only_b"] > 0
    assert pair["power"]["all"]["design_effect"] is None


def test_damaged_and_missing_images_leave_cards_without_pictures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images" / image_name(0)).write_bytes(b"no image")
    (folder / "images" / image_name(1)).unlink()
    code, _, _ = run(capsys, folder / "base", folder / "hd", "--out", folder / "cmp")
    assert code == 0
    page = (folder / "cmp" / "report.html").read_text()
    assert "2 images are missing, damaged or refused and not shown: " in page
    assert f"{folder / 'images' / image_name(0)}: not an image" in page
    assert page.count("<article>") > len(re.findall(r"<article>\s*<img", page)) > 0
    assert "photo_2.png as seen by hd" in page


@pytest.mark.parametrize("place", ["absolute", "above", "link"])
def test_an_image_outside_the_folder_is_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    secret = tmp_path / "secret.png"
    random_image((30, 30), seed=9).save(secret)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(secret)
    random_image((30, 30), seed=8).save(tmp_path / "images" / "plain.png")
    name = {"absolute": str(secret), "above": "../secret.png", "link": "link.png"}[place]
    for side, text in (("a", "Yes"), ("b", "No")):
        line = {"split": "random", "question": "Is it?", "label": "yes", "text": text}
        lines = [{**line, "question_id": n, "image": x} for n, x in enumerate((name, "plain.png"))]
        write_lines(tmp_path / f"{side}.jsonl", lines)
    words = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--images", tmp_path / "images"]
    code, _, _ = run(capsys, *words, "--out", tmp_path / "cmp")
    assert code == 0
    page = (tmp_path / "cmp" / "report.html").read_text()
    assert (page.count("<article>"), page.count("<img")) == (2, 1)
    assert "1 image is missing, damaged or refused and not shown: " in page


def test_nothing_is_written_when_the_report_cannot_be_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "hd" / "run.json"
    record = json.loads(path.read_text())
    record["model"]["hd"]["tile_pixels"] = 3  # drawing what the model sees fails on it
    path.write_text(json.dumps(record))
    code, _, err = run(capsys, folder / "base", folder / "hd", "--out", folder / "cmp")
    assert (code, err.count("\n")) == (2, 1)
    assert not (folder / "cmp").exists()
