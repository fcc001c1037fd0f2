"""`llava-hd chat`: pipes, JSON, single questions, a real terminal; faults are one line each."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import random_image, tiny_hd

from llava_hd.cli import chat_terminal
from llava_hd.cli.chat_talk import Talk, printable
from llava_hd.cli.chat_terminal import TerminalShow, history_path, open_picture
from llava_hd.cli.main import main
from llava_hd.hd.image import load_image
from llava_hd.hd.limits import ResolutionLimits, limited
from llava_hd.hd.plan import plan_image
from llava_hd.model.assemble import assemble
from llava_hd.model.chat import ChatSession
from llava_hd.model.generate import answer
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor
from llava_hd.model.stream import Sampling

HD = tiny_hd("hdflex")


@pytest.fixture(scope="module")
def model_dir(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model, processor = assemble(vision=parts / "vision", language=parts / "language", hd=HD)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(model_dir: Path) -> tuple[LlavaHD, Processor]:
    return LlavaHD.from_pretrained(model_dir), Processor.from_pretrained(model_dir)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with an image."""
    monkeypatch.chdir(tmp_path)
    random_image((60, 90)).save(tmp_path / "a b.png")
    return tmp_path


def chat(monkeypatch: pytest.MonkeyPatch, model: Path, lines: str | bytes, *more: object) -> int:
    """The command's exit code with these lines in a pipe."""
    raw = lines if isinstance(lines, bytes) else lines.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    words = ["--model", model, "--device", "cpu", "--max-new-tokens", 5, *more]
    return main(["chat", *map(str, words)])


def test_a_pipe_has_a_question_a_line_and_answers_alone_on_stdout(
    here: Path, model_dir: Path, pair, monkeypatch, capsys
) -> None:
    lines = "is there a cat?\n\n/image a b.png\nwhat is on the mat?\n/quit\nnever asked\n"
    assert chat(monkeypatch, model_dir, lines) == 0
    found = capsys.readouterr()
    session = ChatSession(*pair)
    expected = []
    for question, names in (("is there a cat?", []), ("what is on the mat?", ["a b.png"])):
        images = [session.image(load_image(name)) for name in names]
        expected.append("".join(p.text for p in session.ask(question, images, 5)))
    assert found.out == "".join(f"{printable(text)}\n" for text in expected)
    assert "\x1b" not in found.out + found.err
    assert "a b.png: 60x90 px, grid 2x2, 70 visual tokens; goes with the next" in found.err
    assert re.search(r"memory: weights [\d.]+ KiB, keys and values 384 bytes a token", found.err)


def test_json_is_an_object_a_line_and_errors_are_among_them(
    here: Path, model_dir: Path, pair, monkeypatch, capsys
) -> None:
    lines = "red?\n/image none.png\nin <image>?\n/imag x\n/reset now\n/reset\n//red?\n/history"
    assert chat(monkeypatch, model_dir, lines, "--json", "--image", "a b.png") == 3
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first, missing, tag, unknown, behind, reset, slash, history = objects
    image = load_image("a b.png")
    assert first["answer"] == answer(*pair, image, "red?", max_new_tokens=5)
    assert (first["num_tokens"], first["finish"], first["kept_tokens"]) == (5, "length", 0)
    assert first["images"] == [
        {"name": "a b.png", "size": [60, 90], "grid": [2, 2], "num_tokens": 70}
    ]
    assert missing["error"] == "none.png: no such file; check the path"
    assert "holds <image>" in tag["error"] and "leave it out" in tag["error"]
    assert "did you mean '/image'?" in unknown["error"]
    assert "/reset takes nothing behind it" in behind["error"]
    assert reset == {"reset": True}
    assert slash["question"] == "/red?" and slash["images"] == []
    assert [message["text"] for message in history["history"]] == ["/red?", slash["answer"]]


def test_one_question_is_answered_and_that_is_all(
    here: Path, model_dir: Path, pair, monkeypatch, capsys
) -> None:
    words = ["--image", "a b.png", "--prompt", "red?", "--system", "Be brief."]
    assert chat(monkeypatch, model_dir, "not read", *words) == 0
    session = ChatSession(*pair, system="Be brief.")
    image = session.image(load_image("a b.png"))
    said = "".join(piece.text for piece in session.ask("red?", [image], 5))
    found = capsys.readouterr()
    assert found.out == f"{printable(said)}\n"
    assert "images: 1, of 70 visual tokens, at most 5 tiles with the global view" in found.err
    assert f"{70 * 384 / 1024:.2f} KiB for the largest image" in found.err
    drawn = [*words, "--temperature", "1.5", "--json"]
    assert chat(monkeypatch, model_dir, "", *drawn) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] <= 5


def test_images_of_options_given_again_are_added(
    monkeypatch, here: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_image((90, 60)).save("c.png")
    random_image((50, 50)).save("d.png")
    words = ["--image", "a b.png", "--image", "c.png", "d.png", "--json", "--prompt", "red"]
    assert chat(monkeypatch, model_dir, "", *words) == 0
    (told,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert [image["name"] for image in told["images"]] == ["a b.png", "c.png", "d.png"]


def test_limits_of_resolution_are_those_of_the_plan(
    here: Path, model_dir: Path, monkeypatch, capsys
) -> None:
    words = ["--image", "a b.png", "--prompt", "red?", "--json"]
    for flags, limits in (
        (["--max-tiles", 2], ResolutionLimits(max_tiles=2)),
        (["--max-visual-tokens", 40], ResolutionLimits(max_visual_tokens=40)),
        (["--grid", "3x3"], ResolutionLimits(grid=(3, 3))),
    ):
        assert chat(monkeypatch, model_dir, "", *words, *flags) == 0
        found = capsys.readouterr()
        plan = plan_image((60, 90), limited(HD, limits))
        [image] = json.loads(found.out)["images"]
        assert (image["grid"], image["num_tokens"]) == (list(plan.grid), plan.num_tokens)
        warned = "used with at most 9 (1 new: 3x3)" in found.err
        assert warned == (limits.grid == (3, 3))
    assert chat(monkeypatch, model_dir, "", *words, "--max-visual-tokens", 20) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a b.png: an image of 60x90 px needs at least 26 visual tokens (grid 1x1)" in error
    assert chat(monkeypatch, model_dir, "/image a b.png\nhi", "--max-visual-tokens", 20) == 3
    found = capsys.readouterr()
    assert "raise it to 26" in found.err and found.out.count("\n") == 1  # "hi" was answered


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--max-new-tokens", 0], 2, "--max-new-tokens 0: give a number from 1"),
        (["--temperature", "2.1"], 2, "--temperature 2.1: give a number from 0 to 2"),
        (["--dtype", "int8"], 2, "--dtype 'int8' is unknown"),
        (["--prompt", " "], 2, "--prompt is empty"),
        (["--max-tiles", 0], 2, "--max-tiles must be a whole number from 1, not 0"),
        (["--grid", "2"], 2, "--grid '2' is not ROWSxCOLS"),
        (["--grid", "2x2", "--max-tiles", 4], 2, "--grid 2x2 allows no other, so --max-tiles 4"),
        (["--image", "none.png"], 3, "none.png: no such file"),
        (
            ["--image", "~no-such-user/a.png"],
            2,
            "~no-such-user/a.png: there is no such home folder",
        ),
        (["--system", "be \udcff"], 2, "--system holds half of a character"),
        (["--prompt", "be \udcff"], 2, "--prompt holds half of a character"),
        (["--system", "see <image>"], 3, "--system holds <image>"),
    ],
)
def test_bad_usage_is_one_line_before_a_model_is_loaded(
    words: list[object], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--model", "no-such-model", *map(str, words)]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_without_a_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--model", "no-such-model", "--prompt", "hi"]) == 2
    assert "model folder no-such-model is not a folder" in capsys.readouterr().err


# --- a terminal ----------------------------------------------------------------------------------


def test_what_is_shown_is_text_not_markup(pair) -> None:
    session = ChatSession(*pair)
    output = io.StringIO()
    show = TerminalShow(session, Console(file=output, force_terminal=False, soft_wrap=True))
    show.error("[red]not markup[/red] :cat:")
    talk = Talk(session, show, 6, Sampling())
    talk.line("the cat")
    said = session.history[0].answer
    lines = output.getvalue()
    assert lines.startswith("[red]not markup[/red] :cat:\n")
    assert printable(said) in lines
    assert re.search(r"6 tokens in [\d.]+ s, cut at its longest; read in .* 0 of \d+ kept", lines)


def test_a_picture_is_opened_only_where_there_is_a_display(monkeypatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: started.append(words))
    monkeypatch.setattr(chat_terminal.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    open_picture(Path("x.png"))
    assert started == []
    monkeypatch.setenv("DISPLAY", ":0")
    open_picture(Path("x.png"))
    assert started == [["/bin/xdg-open", str(Path("x.png").resolve())]]


def test_history_stands_in_the_users_state_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert history_path() == tmp_path / ".local/state/llava-hd/chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # the standard: such a path is ignored
    assert history_path() == tmp_path / ".local/state/llava-hd/chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert history_path() == tmp_path / "state/llava-hd/chat_history"


class Terminal:
    """A chat behind a pseudo-terminal."""

    def __init__(self, *words: object, **environment: str) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "llava_hd.cli.main", "chat", *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm", **environment},
            preexec_fn=lambda: _take_terminal(),
        )  # fmt: skip
        os.close(theirs)
        self.file, self.seen = ours, ""

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C until it is heard: Python misses one that comes just before readline waits."""
        for _ in range(30):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, 2)
        return self.wait_for(pattern, 2)

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What is shown up to the first match, which is taken away."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.seen!r}"
            if select.select([self.file], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.file, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert re.search(pattern, self.seen), self.seen
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.file)


def _take_terminal() -> None:
    """Make the pseudo-terminal the one whose Ctrl-C reaches the process, which hears it, even where
    the tests themselves ignore it (started in the background of a shell)."""
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_session(here: Path, model_dir: Path) -> None:
    state = here / "state"
    terminal = Terminal(
        "--model", model_dir, "--device", "cpu", "--max-new-tokens", 1800, "--image", "a b.png",
        XDG_STATE_HOME=str(state), DISPLAY="", WAYLAND_DISPLAY="",
    )  # fmt: skip
    try:
        terminal.wait_for(r"goes with the next question")
        terminal.wait_for(r"> ")
        terminal.type("the cat is on the mat\n")
        terminal.wait_for(r"mat\r\n")
        terminal.wait_for(r"\x1b\[2K.*\S")  # "reading" is wiped away: the answer has begun
        terminal.type("\x03")
        terminal.wait_for(r"[1-9]\d* tokens in [\d.]+ s, stopped; read in")
        terminal.wait_for(r"> ")
        terminal.interrupt(r"Ctrl-D or /quit ends")
        terminal.wait_for(r"> ")
        terminal.type("/image none.png\n")
        terminal.wait_for(r"none.png: no such file; check the path")
        terminal.wait_for(r"> ")
        terminal.type("/tiles\n")
        terminal.wait_for(r"picture in tiles/a b.tiles.png")
        terminal.wait_for(r"> ")
        terminal.type("\x04")
        assert terminal.process.wait(120) == 0
    finally:
        terminal.close()
    kept = state / "llava-hd" / "chat_history"
    assert kept.read_text().splitlines()[-3:] == [
        "the cat is on the mat", "/image none.png", "/tiles"
    ]  # fmt: skip
    assert kept.stat().st_mode & 0o077 == 0
    assert load_image("tiles/a b.tiles.png") is not None
