"""Where the images of questions are: below one folder, or an error before anything is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pope_files import image_name, write_pope

from llava_hd.bench.pope_data import Question, read_questions, split_files
from llava_hd.bench.pope_run import image_paths
from llava_hd.hd.errors import DataError, UsageError


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return read_questions(split_files(write_pope(tmp_path / "pope")))


def test_a_missing_image_is_named_with_its_question(
    tmp_path: Path, questions: list[Question]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (0, 2):
        (folder / image_name(number)).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        image_paths(questions, folder)
    message = str(caught.value)
    assert f"{folder / image_name(1)}: no such image" in message
    assert "question_id 7 of split random" in message
    assert "1 of 3 images are missing" in message
    (folder / image_name(1)).write_bytes(b"")
    assert image_paths(questions, folder) == {
        image_name(number): folder / image_name(number) for number in range(3)
    }


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/passwd"])
def test_an_image_outside_the_folder_is_refused(
    tmp_path: Path, questions: list[Question], name: str
) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"_random\.json:1: image .* (absolute path|leaves)"):
        image_paths([replace(questions[0], image=name)], tmp_path / "images")


def test_a_link_that_leaves_the_folder_is_refused(
    tmp_path: Path, questions: list[Question]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (folder / "inside.png").write_bytes(b"")
    (folder / "photo_0.png").symlink_to(folder / "inside.png")
    assert image_paths(questions[:1], folder)["photo_0.png"] == folder / "inside.png"
    (folder / "photo_0.png").unlink()
    (folder / "photo_0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"_random\.json:1: .*a link that leaves"):
        image_paths(questions[:1], folder)


def test_an_image_folder_that_is_none_is_a_usage_error(
    tmp_path: Path, questions: list[Question]
) -> None:
    with pytest.raises(UsageError, match="--images"):
        image_paths(questions, tmp_path / "nothing")
