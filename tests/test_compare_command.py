"""`llava-hd compare` as a user calls it: tables, JSON, the report with its pictures."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from compare_runs import make_folder, make_run, run
from PIL import Image
from pope_files import image_name, write_lines

from llava_hd.bench.contestants import show_p
from llava_hd.bench.pope import PROMPT
from llava_hd.bench.pope_data import read_questions, split_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path, num_images=20)


def test_both_models_stand_side_by_side_with_what_was_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, folder / "base", folder / "hd", "--out", folder / "cmp")
    assert code == 0
    assert "…" not in out
    # 120 questions a split: 10 wrong against 3 wrong, of which one shared
    for pattern in (
        r"base \(A\) and hd \(B\)",
        r"accuracy\s+0\.9167\s+0\.9750\s+\+0\.0583",
        r"random\s+2\s+9\s+0\.065",
        r"all\s+6\s+27\s+0\.00032",
        r"hd is better: mean F1",
        r"original parser; 360 questions, 20 images; 10000 resamples, seed 0",
        r"coco_pope_popular\.json: 120 questions",
        r"base: model: /models/base \(bbbb",
        r'hd: response prompt: "\\nAnswer the question',
        r"hd: decoding: max_new_tokens 16, greedy True, dtype float32, batches of 6 on cpu",
    ):
        assert re.search(pattern, out), pattern


def test_the_report_shows_charts_examples_and_what_the_models_see(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, folder / "base", folder / "hd", "--out", folder / "cmp")
    page = (folder / "cmp" / "report.html").read_text()
    assert page.count("<svg ") == 3
    assert "Only hd is right: the first 8 of" in page
    assert "Only base is right: the first" in page
    assert "photo_0.png as seen by base: 1 tile, 16 visual tokens" in page
    assert "photo_0.png as seen by hd: 5 tiles" in page
    cards = page.count("<article>")
    assert page.count('src="data:image/png;base64,') == 2 * cards + 4  # as base and hd see them
    names = {"f1.png", "yes_ratio.png", "difference_2.png"}
    assert {path.name for path in (folder / "cmp" / "charts").iterdir()} == names
    for name in names:
        with Image.open(folder / "cmp" / "charts" / name) as chart:
            assert min(chart.size) > 300


def test_json_is_what_report_json_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, folder / "base", folder / "hd", "--out", folder / "cmp", "--json")
    assert code == 0
    report = json.loads(out)
    assert report == json.loads((folder / "cmp" / "report.json").read_text())
    base, hd = report["contestants"]
    assert (base["name"], hd["name"]) == ("base", "hd")
    assert base["scores"] == json.loads((folder / "base" / "scores.json").read_text())
    assert hd["run"]["prompt"] == PROMPT
    assert [entry["questions"] for entry in report["questions"]["splits"]] == [120] * 3
    assert report["by_size"] is None
    [pair] = report["comparison"]["pairs"]
    difference = pair["difference"]["mean"]["f1"]
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert 0 < difference["p"] <= 1
    assert pair["power"]["all"]["difference"] == pytest.approx(21 / 360)
    assert pair["mcnemar"]["all"] == {
        "only_a": 6, "only_b": 27, "p": pytest.approx(0.000324, rel=1e-2),
    }  # fmt: skip


def test_foreign_answers_are_compared_with_question_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = read_questions(split_files([folder / "pope"]))
    for name, text in (("a", "Yes"), ("b", "Yes, there is no doubt")):
        lines = [{"split": q.split, "question_id": q.question_id, "text": text} for q in questions]
        write_lines(folder / f"{name}.jsonl", lines)
    words = [folder / "a.jsonl", folder / "b.jsonl", "--questions", folder / "pope"]
    code, out, _ = run(capsys, *words, "--out", folder / "cmp")
    assert code == 0
    assert "No difference is shown" not in out  # the original parser takes B for a no
    assert "How a and b were run is not known" in out
    code, out, _ = run(capsys, *words, "--out", folder / "cmp", "--parser", "strict")
    assert code == 0
    assert "No difference is shown" in out
    assert "strict parser" in out


def test_folders_of_the_same_name_are_told_apart(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, name in (("x", "hd"), ("y", "base")):
        (folder / place).mkdir()
        (folder / name).rename(folder / place / "pope")
    words = [folder / "x" / "pope", folder / "y" / "pope", "--out", folder / "cmp"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "x (A) and y (B)" in out
    _, out, _ = run(capsys, *words, "--names", "HD [448]", "base")
    assert "HD [448] (A) and base (B)" in out


def test_a_question_of_several_splits_is_one_example(folder: Path) -> None:
    from llava_hd.bench.compare_gallery import discordant
    from llava_hd.bench.contestants import read_contestant

    sides = [read_contestant(name, folder / name) for name in ("base", "hd")]
    groups = discordant(sides, "original")
    for rows in groups.values():
        shown = [(row[0].image, row[0].question) for row in rows]
        assert len(set(shown)) == len(shown)
        assert all(x.key == y.key for x, y in rows)
    # ids of `yes` questions are the same in all splits, those of `no` questions are not
    assert list(groups) == [(False, True), (True, False)]  # the larger group first
    only_b = groups[False, True]
    assert len(only_b) == 5 + 4 * 3
    assert len(groups[True, False]) == 2
    assert {asdict(x)["split"] for x, _ in only_b[:3]} == {"random", "popular", "adversarial"}
    swapped = discordant(sides[::-1], "original")
    assert [y for _, y in swapped[True, False]] == [x for x, _ in only_b]


def test_three_models_are_set_against_the_first_and_against_each_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(folder, "flex", wrong={2, 5, 13, 20}, preset="hdflex")
    words = [folder / name for name in ("base", "hd", "flex")]
    code, out, _ = run(capsys, *words, "--out", folder / "cmp")
    assert code == 0
    assert "…" not in out
    for said in (
        "base (A) and hd (B)",
        "base (A) and flex (B)",
        "A hd, B flex",
        "pair, all questions",
        "Mean F1, highest first: hd 0.",
        "flex is better: mean F1",
    ):
        assert said in out, said
    page = (folder / "cmp" / "report.html").read_text()
    for said in ("Each model against base.", "All 3 pairs.", "Cohen&#39;s kappa", "hd: 5 tiles"):
        assert said in page, said
    assert "Only hd and flex are right: the first" in page
    assert {path.name for path in (folder / "cmp" / "charts").iterdir()} == {
        f"{name}.png" for name in ("f1", "yes_ratio", "difference_2", "difference_3", "agreement")
    }
    report = json.loads((folder / "cmp" / "report.json").read_text())
    pairs = [(pair["a"], pair["b"]) for pair in report["comparison"]["pairs"]]
    assert pairs == [("base", "hd"), ("base", "flex"), ("hd", "flex")]
    assert report["comparison"]["agreement"]["same"][0][0] == 1


def test_long_names_cut_no_figure_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(folder, "flex", wrong={2, 5, 13, 20}, preset="hdflex")
    words = [folder / name for name in ("base", "hd", "flex")]
    names = [f"{name}-a-model-with-quite-a-name" for name in ("base", "hd", "flex")]
    code, out, _ = run(capsys, *words, "--names", *names, "--out", folder / "cmp")
    assert (code, "…" in out) == (0, False)
    report = json.loads((folder / "cmp" / "report.json").read_text())
    for pair in report["comparison"]["pairs"]:
        assert show_p(pair["mcnemar_adjusted"]) in out.partition("McNemar: ")[2]


def test_boxes_beside_the_images_give_f1_by_size(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = {
        image_name(number): {
            "size": [60, 80],
            "objects": [
                {"word": word, "box": [0, 0, side, side]}
                for word, side in (("apple", 8), ("cup", 16), ("eel", 40))
            ],
        }
        for number in range(20)
    }
    path = folder / "boxes.json"
    path.write_text(json.dumps(boxes))
    words = [folder / "base", folder / "hd", "--out", folder / "cmp"]
    run(capsys, *words)
    report = json.loads((folder / "cmp" / "report.json").read_text())
    assert [group["questions"] for group in report["by_size"]["groups"]] == [60, 60, 60]
    assert report["by_size"]["boxes"] == str(path)
    page = (folder / "cmp" / "report.html").read_text()
    assert "F1 by the size of the object" in page
    assert (folder / "cmp" / "charts" / "sizes.png").is_file()
    path.rename(folder / "moved.json")
    code, out, _ = run(capsys, *words, "--boxes", folder / "moved.json", "--json")
    assert code == 0
    assert json.loads(out)["by_size"]["groups"] == report["by_size"]["groups"]
    code, _, err = run(capsys, *words, "--boxes", folder / "none.json")
    assert (code, err.count("\n")) == (2, 1)
    (folder / "moved.json").write_text(json.dumps({"other.png": {"size": [1, 1], "objects": []}}))
    code, _, err = run(capsys, *words, "--boxes", folder / "moved.json")
    assert (code, err.count("\n")) == (3, 1)
    assert "--boxes" in err


def test_the_report_loads_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, folder / "base", folder / "hd", "--out", folder / "cmp")
    page = (folder / "cmp" / "report.html").read_text()
    assert not re.search(r"<script|<link|@import|(src|href)=\W*https?:|url\(\W*https?:", page)
    for said in ("original (bench/pope.py)", "120 questions about 20 images, 60 yes: no published"):
        assert said in page
