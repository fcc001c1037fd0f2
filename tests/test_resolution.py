"""Limits of resolution as options: in evaluations, pictures, the server; recorded and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pope_files import image_name, write_pope
from test_science_qa import make, words_of
from tiny import random_image, tiny_hd

from llava_hd.cli.main import main
from llava_hd.cli.resolution import amount
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.limits import ResolutionLimits, limited
from llava_hd.hd.plan import plan_image
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor

SIZES = [(60, 80), (112, 112), (90, 40)]


def folder_of(parts: Path, folder: Path, preset: str) -> Path:
    hd = tiny_hd(preset)
    model, processor = assemble(vision=parts / "vision", language=parts / "language", hd=hd)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(parts, tmp_path_factory.mktemp("model"), "hd448")


@pytest.fixture
def pope(tmp_path: Path, model_dir: Path) -> list[str]:
    """The words of an evaluation on images of several sizes."""
    write_pope(tmp_path / "pope")
    (tmp_path / "images").mkdir()
    for number, size in enumerate(SIZES):
        random_image(size, seed=number).save(tmp_path / "images" / image_name(number))
    words: dict[str, object] = {
        "model": model_dir,
        "questions": tmp_path / "pope",
        "images": tmp_path / "images",
        "out": tmp_path / "out",
        "device": "cpu",
        "max-new-tokens": 4,
        "limit": 6,
    }
    return ["eval", "pope", *(str(x) for pair in words.items() for x in (f"--{pair[0]}", pair[1]))]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_pope_is_asked_within_the_limits_which_are_told_and_recorded(
    pope: list[str], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ResolutionLimits(max_tiles=6, max_visual_tokens=80)
    flags = ["--max-tiles", 6, "--max-visual-tokens", 80, "--json"]
    code, _, err = run(capsys, *pope, *flags)
    assert code == 0
    hd = limited(tiny_hd("hd448"), limits)
    size = SIZES[0]  # the limit of questions reaches one image
    assert "used with at most 6 (13 new: 1x1, 1x2, 1x3, 1x4, ...)" in err
    plans = [plan_image(size, hd) for size in SIZES]
    assert f"images: 1, of {plans[0].num_tokens} visual tokens" in err
    assert f"{amount(384 * plans[0].num_tokens)} for the largest image (float32)" in err
    lines = [json.loads(x) for x in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    model = LlavaHD.from_pretrained(model_dir)
    processor = Processor.from_pretrained(model_dir, limits)
    record = json.loads((tmp_path / "out/run.json").read_text())
    image = tmp_path / "images" / lines[0]["image"]
    question = lines[0]["question"] + record["prompt"]
    assert plan_image(size, hd).num_tokens <= 80
    assert lines[0]["text"] == answer(model, processor, image, question, max_new_tokens=4)
    assert record["decoding"]["resolution"] == {"max_tiles": 6, "max_visual_tokens": 80}
    assert record["model"]["hd"] == hd.to_dict()
    # Answers made within other limits are those of another run.
    code, _, err = run(capsys, *pope, "--grid", "2x2")
    assert code == 2 and "its decoding is" in err and "max_tiles" in err


def test_an_image_that_fits_no_grid_is_named_before_anything_is_loaded(
    pope: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *pope, "--max-visual-tokens", 20)
    assert code == 3 and err.count("\n") == 1
    least = plan_image(SIZES[0], tiny_hd("hd448")).num_tokens
    assert f"{image_name(0)}: an image of 60x80 px needs at least {least} visual tokens" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tiles", 0], "--max-tiles must be a whole number from 1, not 0"),
        (["--max-visual-tokens", -3], "--max-visual-tokens must be a whole number from 1"),
        (["--grid", "2*2"], "--grid '2*2' is not ROWSxCOLS; give one such as 2x3"),
        (["--grid", "2x2", "--max-tiles", 4], "--grid 2x2 allows no other, so --max-tiles 4 has"),
        (["--max-tile", 4], "--max-tile is not an option; did you mean '--max-tiles'?"),
    ],
)
def test_conflicts_and_slips_are_one_line(
    pope: list[str], flags: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *pope, *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_scoring_alone_takes_no_limits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "pope", "--score-only", "--answers", "a.jsonl", "--max-tiles", 4]
    assert "--max-tiles has no meaning with --score-only" in run(capsys, *words)[2]


def test_a_model_of_one_view_takes_no_limit_of_tiles(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(parts, tmp_path / "base", "base224")
    words = ["chat", "--model", folder, "--prompt", "hi", "--max-tiles", 4]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "--max-tiles has no meaning for a model that sees one view of 56 px" in err


def test_free_questions_are_asked_within_the_limits(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make(tmp_path / "sqa"), tmp_path / "out"
    words = ["eval", "scienceqa", *words_of(folder, model_dir, out, "--max-new-tokens", 3)]
    code, _, err = run(capsys, *words, "--grid", "1x2", "--json")
    assert code == 0 and "used with at most 2 (1 new: 1x2)" in err and "images: " in err
    record = json.loads((out / "run.json").read_text())
    assert record["decoding"]["resolution"] == {"grid": [1, 2]}
    code, _, err = run(capsys, *words, "--json")
    assert code == 2 and "decoding was" in err


def test_tiles_are_drawn_within_the_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("wide", (300, 900)), ("small", (224, 224))):
        random_image(size).save(tmp_path / f"{name}.png")
    images = [tmp_path / "wide.png", tmp_path / "small.png"]
    words: list[Any] = ["tile", *images, "--out", tmp_path / "tiles", "--json", "--preset", "hd448"]
    code, out, err = run(capsys, *words, "--max-tiles", 9, "--max-visual-tokens", 900)
    assert code == 0 and err.count("\n") == 1 and "used with at most 9" in err
    limits = ResolutionLimits(max_tiles=9, max_visual_tokens=900)
    hd = limited(PRESETS["hd448"], limits)
    for entry in json.loads(out):
        plan = plan_image(tuple(entry["image_size"]), hd)
        assert (entry["grid"], entry["num_tokens"]) == (list(plan.grid), plan.num_tokens)
        assert entry["resolution"] == {"max_tiles": 9, "max_visual_tokens": 900}
    code, out, err = run(capsys, *words, "--max-visual-tokens", 800)
    assert code == 3 and [Path(entry["image"]).name for entry in json.loads(out)] == ["wide.png"]
    assert err.count("\n") == 1 and "small.png: an image of 224x224 px needs at least 1312" in err


def test_amounts_are_told_in_the_unit_that_fits() -> None:
    assert [amount(n) for n in (5, 2**19, 3 * 2**20, 2**30 + 2**29)] == [
        "5 bytes", "512.00 KiB", "3.00 MiB", "1.50 GiB"
    ]  # fmt: skip
