"""cli/chat_talk.py: what a line does; every fault is one line, and the talk goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_image, tiny_hd

from llava_hd.bench.faults_images import image_faults, write_content
from llava_hd.cli.chat_talk import PlainShow, Talk, load_picture, printable
from llava_hd.hd.image import load_image
from llava_hd.hd.limits import ResolutionLimits
from llava_hd.hd.plan import plan_image
from llava_hd.hd.preview import draw_plan
from llava_hd.model.assemble import assemble
from llava_hd.model.chat import ChatSession
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor
from llava_hd.model.stream import Sampling

HD = tiny_hd("hdflex")


@pytest.fixture(scope="module")
def pair(parts: Path) -> tuple[LlavaHD, Processor]:
    model, processor = assemble(vision=parts / "vision", language=parts / "language", hd=HD)
    return model.eval(), processor


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with an image."""
    monkeypatch.chdir(tmp_path)
    random_image((60, 90)).save(tmp_path / "a b.png")
    return tmp_path


@pytest.fixture
def talk(pair) -> Talk:
    return Talk(ChatSession(*pair), PlainShow(), 4, Sampling())


def test_every_fault_of_an_image_is_one_line_and_the_talk_goes_on(
    talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk.line("hello")
    faults = image_faults()
    for number, fault in enumerate(faults):
        path = tmp_path / f"{number}-{fault.file}"
        write_content(path, fault.content)
        capsys.readouterr()
        assert talk.line(f"/image {path}")
        found = capsys.readouterr()
        assert found.err.count("\n") == 1 and found.out == ""
        assert found.err.startswith(f"llava-hd: error: {path}")
        assert fault.says in found.err or fault.seen == "file"
    assert talk.code == 3
    assert talk.line("still there?")
    assert [exchange.images for exchange in talk.session.history] == [(), ()]


def test_tiles_saves_the_picture_of_the_last_image_and_opens_it(
    talk: Talk, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Path] = []
    talk.opens = opened.append
    talk.line("/tiles")
    assert "there is no image yet" in capsys.readouterr().err
    talk.line("/image 'a b.png'")  # as a file manager drops it
    talk.line("/tiles")
    talk.line("/tiles")
    talk.line("/tiles deep/er/mine.png")
    assert opened == [
        Path("tiles/a b.tiles.png"), Path("tiles/a b-2.tiles.png"), Path("deep/er/mine.png")
    ]  # fmt: skip
    picture = draw_plan(load_image("a b.png"), plan_image((60, 90), HD))
    for path in opened:
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(picture))
    assert "70 visual tokens; picture in deep/er/mine.png" in capsys.readouterr().err
    before = (here / "a b.png").read_bytes()
    for wrong, message in (
        ("a b.png", "is there already"),
        ("mine.jpg", "ends with .png"),
        ("a b.png/x.png", "cannot be written"),
    ):
        talk.line(f"/tiles {wrong}")
        assert message in capsys.readouterr().err
    assert (here / "a b.png").read_bytes() == before and len(opened) == 3


def test_images_wait_for_the_next_question_that_is_answered(
    talk: Talk, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.line("/image a b.png")
    talk.line("what is <image>?")  # refused: the image goes on waiting
    talk.line("\ud800?")
    assert "half of a character" in capsys.readouterr().err
    talk.line("/image a b.png")
    talk.line("and these?")
    talk.line("and without?")
    assert [len(exchange.images) for exchange in talk.session.history] == [2, 0]
    talk.line("/image a b.png")
    talk.line("/reset")
    talk.line("anew")
    assert [exchange.images for exchange in talk.session.history] == [()]


def test_a_full_context_is_told_and_the_talk_goes_on(
    pair, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = pair
    text = {**model.config.text, "max_position_embeddings": 190}
    small = LlavaHD(
        type(model.config)(**{**vars(model.config), "text": text}),
        model.vision.clip,
        model.language.causal_lm,
    )
    talk = Talk(ChatSession(small.eval(), processor), PlainShow(), 4, Sampling())
    talk.line("/image a b.png")
    talk.line("what is in this image, and where is it, and why?")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "but the model reads 190; reset the conversation" in error and "put aside" in error
    talk.line("hi")
    assert len(talk.session.history) == 1 and talk.code == 2


def test_memory_that_runs_out_is_told_and_the_talk_goes_on(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = talk.session.model.language.causal_lm.register_forward_pre_hook(fail)
    talk.line("hi")
    hook.remove()
    assert "not enough memory for this conversation; reset it" in capsys.readouterr().err
    talk.line("hi")
    assert len(talk.session.history) == 1 and talk.code == 1


def test_lines_that_are_not_utf_8_are_left_out(talk: Talk, capsys) -> None:
    talk.read([b"\xff\xfe\n", "grün?\r\n".encode(), b"/help\n"])
    found = capsys.readouterr()
    assert "not UTF-8" in found.err and "/tiles [FILE]" in found.err
    assert [exchange.question for exchange in talk.session.history] == ["grün?"]


def test_no_answer_can_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\n\tc\x9bd 猫 👩‍🚀") == "a\ufffd[31mb\ufffd\n\tc\ufffdd 猫 👩‍🚀"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image ~no-such-user/a.png", "~no-such-user/a.png: there is no such home folder"),
        ("/tiles ~no-such-user/a.png", "~no-such-user/a.png: there is no such home folder"),
        ("/image a\0.png", "'a\\x00.png' is not a file's name"),
        ("/tiles a\0.png", "'a\\x00.png' is not a file's name"),
        (f"/image {'a' * 300}.png", "cannot be read (File name too long)"),
        (f"/tiles {'a' * 300}.png", "cannot be written (File name too long); give another file"),
        ("/tiles a b.png/c.png", "a b.png/c.png: cannot be written"),
    ],
)
def test_names_that_no_file_can_have_are_one_line(
    line: str, message: str, talk: Talk, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.add(load_picture("a b.png"), tell=False)
    assert talk.line(line) and talk.line("red")
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert len(talk.session.history) == 1 and [p.name for p in here.iterdir()] == ["a b.png"]


def test_an_image_that_fits_no_grid_is_named(pair, here: Path, capsys) -> None:
    model, processor = pair
    session = ChatSession(model, processor.limited(ResolutionLimits(max_visual_tokens=3)))
    talk = Talk(session, PlainShow(), 4, Sampling())
    assert talk.line("/image a b.png") and talk.code == 3
    assert "error: a b.png: an image of 60x90 px needs at least" in capsys.readouterr().err
