"""cli/web_pictures.py: uploads with every fault, what is shown of a picture, geometries."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny import random_image, tiny_hd

from llava_hd.bench.faults_images import fine_images, image_faults, write_content
from llava_hd.cli.web_pictures import (
    AS_BEGUN,
    THUMBNAIL_PX,
    chosen_geometry,
    counts_html,
    draw_examples,
    draw_tiles,
    fitting_presets,
    read_picture,
)
from llava_hd.hd.errors import UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.image import ImageError, ImageLimits
from llava_hd.hd.plan import plan_image

LIMITS = ImageLimits(max_bytes=2**20, max_pixels=1_000_000, max_aspect=200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    return tmp_path / "private"


@pytest.mark.parametrize("fault", image_faults(), ids=lambda fault: fault.file)
def test_every_bad_image_is_told_in_a_line_with_the_users_name_for_it(
    folder: Path, tmp_path: Path, fault
) -> None:
    uploaded = tmp_path / "0123abcd.bin"
    write_content(uploaded, fault.content)
    with pytest.raises(ImageError) as caught:
        read_picture(uploaded, fault.file, ImageLimits(), folder)
    message = str(caught.value)
    assert message.startswith(f"{fault.file}: ") and "\n" not in message
    if fault.seen != "file":  # those are told in the words of data sets
        assert fault.says in message
    assert str(tmp_path) not in message and "raise max" not in message
    assert not list(folder.iterdir())


@pytest.mark.parametrize("fine", fine_images(), ids=lambda fine: fine.file)
def test_odd_images_that_are_fine_are_taken(folder: Path, tmp_path: Path, fine) -> None:
    path = tmp_path / fine.file
    path.write_bytes(fine.content)
    picture = read_picture(path, fine.file, ImageLimits(), folder)
    with Image.open(picture.thumbnail) as thumbnail:
        assert thumbnail.format == "PNG" and max(thumbnail.size) <= THUMBNAIL_PX
    assert picture.image.mode == "RGB"


@pytest.mark.parametrize(
    ("size", "says"),
    [((1200, 900), "above the limit of 1000000"), ((1, 201), "longer than 200 to 1")],
)
def test_uploads_above_the_limits_are_refused_with_a_remedy_that_a_user_has(
    folder: Path, tmp_path: Path, size: tuple[int, int], says: str
) -> None:
    path = tmp_path / "large.png"
    Image.new("1", size[::-1]).save(path)
    with pytest.raises(ImageError, match=says) as caught:
        read_picture(path, "large.png", LIMITS, folder)
    assert re.search(r"; (make it smaller|crop it)$", str(caught.value))
    path.write_bytes(bytes(2**20 + 1))
    with pytest.raises(ImageError, match="1048577 bytes, above the limit of 1048576"):
        read_picture(path, "large.png", LIMITS, folder)


def test_names_of_uploads_are_shown_short_and_without_their_folder(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    random_image((20, 30)).save(path)

    def shown(name: str) -> str:
        return read_picture(path, name, LIMITS, folder).name

    assert shown("C/fakepath/cat.png") == "cat.png"
    assert shown("two\nlines.png") == r"'two\nlines.png'"
    assert len(shown("x" * 500)) < 90
    assert shown("") == "upload"


def test_the_picture_of_the_tiles_and_the_words_are_those_of_the_plan(folder: Path) -> None:
    image = random_image((60, 130))
    for preset in ("hd448", "hdflex", "base336"):
        hd = replace(PRESETS[preset], tile_px=56, patch_px=14)
        plan, path = draw_tiles(image, hd, folder)
        assert plan == plan_image((60, 130), hd)
        with Image.open(path) as drawn:
            assert drawn.format == "PNG" and min(drawn.size) > 500
        words = re.sub("<[^>]*>", " ", counts_html("a<b", plan, "a note & more"))
        assert f"a&lt;b sees: {plan.num_tokens} visual tokens" in words and "&amp; more" in words
        numbers = [int(n) for n in re.findall(r"(\d+) (?:global view|map|row-ends)", words)]
        assert sum(numbers) == plan.num_tokens
        assert "60 x 130 px" in words


def test_the_presets_are_those_that_the_model_reads() -> None:
    assert fitting_presets(tiny_hd("hd448")) == ["hd448", "hdflex"]
    assert fitting_presets(tiny_hd("hdflex-paper")) == ["hd448-paper", "hdflex-paper"]
    assert fitting_presets(tiny_hd("base336")) == ["base336", "base224"]


def test_the_controls_choose_grids_in_the_models_own_tiles() -> None:
    trained, base = tiny_hd("hd448"), tiny_hd("base336")
    assert chosen_geometry(trained, AS_BEGUN, None) == trained
    assert chosen_geometry(trained, "hdflex", None) == tiny_hd("hdflex")
    three = chosen_geometry(trained, AS_BEGUN, 3)
    assert {rows * cols for rows, cols in three.grids} == {1, 2, 3} and three.tile_px == 56
    assert chosen_geometry(trained, "base336", None) == trained
    assert chosen_geometry(base, "hdflex", 3) == base
    for preset, most in (("hd9", None), (AS_BEGUN, -1), (AS_BEGUN, 10_000)):
        with pytest.raises(UsageError):
            chosen_geometry(trained, preset, most)


def test_the_examples_are_drawn_scenes_always_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, again = draw_examples(tmp_path / "a"), draw_examples(tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert len({p.read_bytes() for p in first}) == len(first) == 8
