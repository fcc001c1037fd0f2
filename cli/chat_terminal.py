"""A chat in a terminal: answers as they come, Ctrl-C for the answer alone, lines remembered."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from ..model.chat import ChatSession
from ..model.stream import Piece
from .chat_talk import Talk, printable

PROMPT = "> "
REMEMBERED = 1000  # lines of the history file
HISTORY_FILE = "chat_history"
ENDS = {"cancelled": ", stopped", "length": ", cut at its longest"}


class TerminalShow:
    """Answers word by word, a dim line of figures behind each."""

    def __init__(self, session: ChatSession, console: Console | None = None) -> None:
        self.session = session
        self.console = Console(highlight=False, soft_wrap=True) if console is None else console

    def answer(self, pieces: Generator[Piece], about: Callable[[], Mapping[str, Any]]) -> None:
        """Ctrl-C stops the answer; a second one does not wait for the token it is at."""
        start, first = time.monotonic(), None
        last = Piece("", 0)
        try:
            with self._stoppable(), self.console.status("reading", spinner="dots") as status:
                for last in pieces:
                    if first is None and (last.text or last.finish):
                        status.stop()
                        first = time.monotonic()
                    self._print(last.text, end="")
        except KeyboardInterrupt:
            pieces.close()
            last = Piece("", last.num_tokens, "cancelled")
        self._print("")
        seconds = time.monotonic() - start
        waited = 0.0 if first is None else first - start
        usage = self.session.usage
        kept = "" if usage is None else f", {usage.kept_tokens} of {usage.prompt_tokens} kept"
        how = ENDS.get(last.finish or "", "")
        self.told(
            {}, f"{last.num_tokens} tokens in {seconds:.1f} s{how}; read in {waited:.1f} s{kept}"
        )

    def told(self, values: Mapping[str, Any], text: str) -> None:
        self._print(text, style="dim")

    def error(self, text: str) -> None:
        self._print(text, style="red")

    def _print(self, text: str, **options: Any) -> None:
        self.console.print(printable(text), markup=False, emoji=False, **options)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first Ctrl-C ends the answer after its token, the second at once."""
        asked = False

        def stop(_: int, frame: FrameType | None) -> None:
            nonlocal asked
            if asked:
                raise KeyboardInterrupt
            asked = True
            self.session.cancel()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def converse(talk: Talk, keep_history: bool) -> None:
    """Read lines from the terminal until Ctrl-D or /quit."""
    talk.opens = open_picture
    talk.show.told({}, "/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
    with _remembered_lines(keep_history):
        while True:
            try:
                text = input(PROMPT).strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                talk.show.told({}, "Ctrl-D or /quit ends")
                continue
            except UnicodeDecodeError:
                talk.show.error("that line is not UTF-8 text; type it again")
                continue
            if text and not talk.line(text):
                return


def open_picture(path: Path) -> None:
    """Show a picture with the system's own program, where there is a display."""
    if sys.platform == "darwin":
        command = "open"
    elif os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        command = "xdg-open"
    else:
        return
    program = shutil.which(command)
    if program is not None:
        subprocess.Popen(
            [program, str(path.resolve())],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def history_path() -> Path:
    """Where typed lines are kept: the user's folder of state (XDG base directories)."""
    state = os.environ.get("XDG_STATE_HOME") or ""
    folder = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return folder / "llava-hd" / HISTORY_FILE


@contextmanager
def _remembered_lines(keep: bool) -> Iterator[None]:
    """Line editing, with the lines of earlier chats if they are kept; a file that cannot be used
    is told once and stops nothing."""
    try:
        import readline
    except ImportError:  # a system without it edits lines by itself
        yield
        return
    path = history_path()
    if keep:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600, exist_ok=True)
            readline.read_history_file(path)
        except OSError as error:
            _cannot(path, error)
            keep = False
    try:
        yield
    finally:
        if keep:
            readline.set_history_length(REMEMBERED)
            try:
                readline.write_history_file(path)
            except OSError as error:
                _cannot(path, error)
        readline.clear_history()


def _cannot(path: Path, error: OSError) -> None:
    print(f"llava-hd: {path}: cannot be used ({error.strerror}); --no-history", file=sys.stderr)
