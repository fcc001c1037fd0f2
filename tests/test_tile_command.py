"""`llava-hd tile`: pictures and counts of good images, one line and exit code 3 for bad ones."""

import json

import numpy as np
import pytest
from PIL import Image

from llava_hd.cli.main import main
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.image import load_image, save_png
from llava_hd.hd.plan import plan_image
from llava_hd.hd.preview import draw_plan


@pytest.fixture
def photo(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "photo.png"
    save_png(generator.integers(0, 256, (60, 90, 3), dtype=np.uint8), path)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "tiles"


def test_an_image_gets_its_picture_and_one_line(photo, out, capsys):
    assert main(["tile", str(photo), "--preset", "hd448", "--out", str(out)]) == 0
    picture = out / "photo.tiles.png"
    expected = draw_plan(load_image(photo), plan_image((60, 90), PRESETS["hd448"]))
    assert np.array_equal(np.asarray(load_image(picture)), np.asarray(expected))
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.count("\n") == 1
    for part in (
        "photo.png: 60x90 px",
        "grid 2x2",
        "canvas 448x448 px",
        "982 tokens",
        "256 global view + 704 map + 22 row-ends",
        str(picture),
    ):
        assert part in printed.out


def test_json_is_all_that_is_printed_and_tells_the_plan(photo, out, capsys):
    assert main(["tile", str(photo), str(photo), "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)
    plan = plan_image((60, 90), PRESETS["hdflex"])
    assert first["image"] == str(photo) and first["preset"] == "hdflex"
    assert first["grid"] == list(plan.grid) and first["canvas_size"] == list(plan.canvas_size)
    assert first["num_tokens"] == plan.num_tokens == sum(first["tokens"].values())
    assert first["picture"] != second["picture"]
    assert printed.err == ""


def test_a_preset_without_a_grid_is_reported_as_such(photo, out, capsys):
    assert main(["tile", str(photo), "--preset", "base336", "--out", str(out)]) == 0
    assert "no grid, 576 tokens = 576 global view" in capsys.readouterr().out


def test_bad_images_get_one_line_each_and_the_others_are_done(photo, out, tmp_path, capsys):
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:-100])
    bomb = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(bomb)
    missing = tmp_path / "missing.png"
    images = [text, cut, photo, bomb, missing, tmp_path]
    assert main(["tile", *map(str, images), "--out", str(out), "--json"]) == 3
    printed = capsys.readouterr()
    assert [entry["image"] for entry in json.loads(printed.out)] == [str(photo)]
    lines = printed.err.splitlines()
    assert len(lines) == 5
    for line, path in zip(lines, (text, cut, bomb, missing, tmp_path), strict=True):
        assert line.startswith(f"llava-hd: error: {path}: ") and ";" in line
    assert [file.name for file in out.iterdir()] == ["photo.tiles.png"]


def test_equal_names_do_not_overwrite_each_other(photo, out, tmp_path):
    other = tmp_path / "other" / "photo.jpg"
    other.parent.mkdir()
    Image.new("RGB", (40, 80), "red").save(other)
    third = tmp_path / "photo-2.png"  # takes the name that a second "photo" would like
    save_png(np.zeros((9, 9, 3), dtype=np.uint8), third)
    assert main(["tile", str(photo), str(third), str(other), "--out", str(out)]) == 0
    names = sorted(file.name for file in out.iterdir())
    assert names == ["photo-2.tiles.png", "photo-3.tiles.png", "photo.tiles.png"]


def test_an_input_is_never_overwritten(photo, tmp_path):
    trap = tmp_path / "photo.tiles.png"
    save_png(np.zeros((9, 9, 3), dtype=np.uint8), trap)
    before = photo.read_bytes(), trap.read_bytes()
    assert main(["tile", str(photo), str(trap), "--out", str(tmp_path)]) == 0
    assert (photo.read_bytes(), trap.read_bytes()) == before
    assert (tmp_path / "photo-2.tiles.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "hd44"], "preset 'hd44' is unknown; did you mean 'hd448'?"),
        (["--presett", "hd448"], "--presett"),
        ([], "images"),
    ],
)
def test_bad_usage_is_one_line_and_code_2_and_makes_nothing(arguments, message, photo, out, capsys):
    images = [str(photo)] if arguments else []
    assert main(["tile", *images, *arguments, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_bad_usage(photo, capsys):
    assert main(["tile", str(photo), "--out", str(photo / "below")]) == 2
    assert "--out" in capsys.readouterr().err


def test_help_shows_the_presets(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["tile", "--help"])
    assert caught.value.code == 0 and "hdflex-paper" in capsys.readouterr().out
