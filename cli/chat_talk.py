"""What a chat does with a line: a question is asked, a command carried out; errors are one line.

How it is shown is the business of a `Show`: in a terminal, as plain text, or as JSON lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from unicodedata import category

import torch

from ..hd.errors import DataError, LlavaHDError, UsageError
from ..hd.grid import suggest
from ..hd.image import load_image, save_png
from ..hd.plan import TilePlan, TooManyTokens
from ..hd.preview import draw_plan
from ..model.chat import ChatImage, ChatSession, ContextFull
from ..model.stream import UNFINISHED, Piece, Sampling
from ..train.record_images import has_lone_surrogate

if TYPE_CHECKING:
    from PIL.Image import Image

HELP = {
    "/image FILE": "add an image to the next question",
    "/tiles [FILE]": "picture of what the model sees of the last image (default: tiles/NAME)",
    "/reset": "forget the conversation and its images",
    "/history": "what has been said",
    "/help": "this list",
    "/quit": "end (or Ctrl-D)",
    "//...": "a question that begins with /",
}
TILES_FOLDER = Path("tiles")


@dataclass(frozen=True)
class Picture:
    """An image file that was read, upright and RGB."""

    path: str
    image: Image


class Show(Protocol):
    """How a chat is shown."""

    def answer(self, pieces: Generator[Piece], about: Callable[[], Mapping[str, Any]]) -> None:
        """Show an answer as it comes; about: what is known of it at its end."""

    def told(self, values: Mapping[str, Any], text: str) -> None:
        """Show what a command found out."""

    def error(self, text: str) -> None:
        """Show what went wrong."""


class Talk:
    """A conversation led by lines. `code` is the worst exit code of what went wrong until now."""

    def __init__(
        self, session: ChatSession, show: Show, max_new_tokens: int, sampling: Sampling
    ) -> None:
        self.session, self.show = session, show
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.code = 0
        self.opens: Callable[[Path], None] = lambda path: None  # shows a picture that was saved
        self._waiting: list[ChatImage] = []  # for the next question
        self._last: tuple[Picture, TilePlan] | None = None

    def read(self, lines: Iterable[bytes]) -> None:
        """Every line of a file that is not blank, until /quit."""
        for line in lines:
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError:
                self._failed(DataError("a line of the input is not UTF-8 text; it is left out"))
                continue
            if text and not self.line(text):
                return

    def line(self, text: str) -> bool:
        """A question or a command; whether the conversation goes on."""
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text)
        self.ask(text.removeprefix("/"))
        return True

    def ask(self, text: str) -> None:
        """Ask about what has been said, and the images that wait."""
        before = len(self.session.history)
        try:
            if has_lone_surrogate(text):
                raise UsageError("the text holds half of a character; type it again")
            pieces = self.session.ask(text, self._waiting, self.max_new_tokens, self.sampling)
            self.show.answer(pieces, self._about)
        except ContextFull as error:
            dropped = "" if not self._waiting else " (its images are put aside)"
            self._waiting = []
            self._failed(UsageError(f"{error}{dropped}"))
        except LlavaHDError as error:
            self._failed(error)
        except (torch.OutOfMemoryError, MemoryError):
            self.session.drop_cache()
            self._failed(
                LlavaHDError(
                    "not enough memory for this conversation; reset it, or give images with fewer "
                    "tiles (--max-tiles, --max-visual-tokens)"
                )
            )
        finally:
            if len(self.session.history) > before:
                self._waiting = []

    def add(self, picture: Picture, tell: bool = True) -> None:
        """An image for the next question. Raises DataError where no grid fits it."""
        try:
            image = self.session.image(picture.image, picture.path)
        except TooManyTokens as error:
            raise DataError(f"{picture.path}: {error}") from error
        self._waiting.append(image)
        self._last = picture, image.cut.plan
        if tell:
            self.show.told(*_sizes(picture.path, image.cut.plan, "goes with the next question"))

    def _about(self) -> dict[str, Any]:
        """The last exchange as values."""
        question, answer = self.session.messages()[-2:]
        usage = self.session.usage
        assert usage is not None
        return {
            "question": question["text"],
            "images": question["images"],
            "answer": answer["text"],
            "num_tokens": answer["num_tokens"],
            "finish": answer["finish"],
            "prompt_tokens": usage.prompt_tokens,
            "kept_tokens": usage.kept_tokens,
        }

    def _command(self, text: str) -> bool:
        word, _, rest = text.partition(" ")
        rest = _unquoted(rest.strip())
        if word == "/quit":
            return False
        known: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/tiles": self._tiles,
            "/reset": self._reset,
            "/history": self._history,
            "/help": self._help,
        }
        try:
            if word not in known:
                hint = suggest(word, [*known, "/quit"])
                raise UsageError(f"{word} is not a command; {hint} (a question may begin with //)")
            if rest and word not in ("/image", "/tiles"):
                raise UsageError(f"{word} takes nothing behind it, not {rest!r}")
            known[word](rest)
        except LlavaHDError as error:
            self._failed(error)
        return True

    def _image(self, name: str) -> None:
        if not name:
            raise UsageError("/image needs a file; give one, such as /image photo.jpg")
        self.add(load_picture(name))

    def _tiles(self, name: str) -> None:
        if self._last is None:
            raise UsageError("there is no image yet; give one with /image FILE")
        picture, plan = self._last
        try:
            target = _target(name, picture.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            save_png(draw_plan(picture.image, plan), target)
        except OSError as error:
            raise UsageError(
                f"{name or TILES_FOLDER}: cannot be written ({error.strerror}); "
                "give another file to /tiles"
            ) from error
        values, words = _sizes(picture.path, plan, f"picture in {target}")
        self.show.told({**values, "picture": str(target)}, words)
        self.opens(target)

    def _reset(self, _: str) -> None:
        self.session.reset()
        self._waiting, self._last = [], None
        self.show.told({"reset": True}, "the conversation begins anew")

    def _history(self, _: str) -> None:
        messages = self.session.messages()
        lines = []
        for message in messages:
            names = "".join(f"[{image['name']}] " for image in message.get("images", ()))
            lines.append(f"{message['role']}: {names}{message['text']}")
        self.show.told({"history": messages}, "\n".join(lines) or "nothing has been said yet")

    def _help(self, _: str) -> None:
        width = max(map(len, HELP))
        lines = [f"{word:<{width}}  {what}" for word, what in HELP.items()]
        self.show.told({"help": HELP}, "\n".join(lines))

    def _failed(self, error: LlavaHDError) -> None:
        self.code = max(self.code, error.exit_code)
        self.show.error(str(error))


class PlainShow:
    """Answers alone on stdout, everything else on stderr; for pipes and single questions."""

    def answer(self, pieces: Generator[Piece], about: Callable[[], Mapping[str, Any]]) -> None:
        for piece in pieces:
            print(printable(piece.text), end="", flush=True)
        print(flush=True)

    def told(self, values: Mapping[str, Any], text: str) -> None:
        print(printable(text), file=sys.stderr)

    def error(self, text: str) -> None:
        print(f"llava-hd: error: {printable(text)}", file=sys.stderr)


class JsonShow:
    """A JSON object per line on stdout; of an error its one line, as "error"."""

    def answer(self, pieces: Generator[Piece], about: Callable[[], Mapping[str, Any]]) -> None:
        for _ in pieces:
            pass
        self._print(about())

    def told(self, values: Mapping[str, Any], text: str) -> None:
        self._print(values)

    def error(self, text: str) -> None:
        self._print({"error": text})

    @staticmethod
    def _print(values: Mapping[str, Any]) -> None:
        print(json.dumps(values, ensure_ascii=False), flush=True)


def load_picture(name: str) -> Picture:
    """The image of a file; `~` is the home folder. Raises ImageError, and UsageError for a name
    that no file has."""
    path = _path(name)
    return Picture(str(path), load_image(path))


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters are replaced, but for line breaks and
    tabs."""
    return "".join(c if c in "\n\t" or category(c) != "Cc" else UNFINISHED for c in text)


def _sizes(name: str, plan: TilePlan, more: str) -> tuple[dict[str, Any], str]:
    """An image and its plan, as values and in words."""
    height, width = plan.image_size
    grid = f"grid {plan.grid[0]}x{plan.grid[1]}" if plan.config.grids else "one view"
    values = {
        "image": name,
        "size": [height, width],
        "grid": list(plan.grid),
        "num_tokens": plan.num_tokens,
    }
    words = f"{name}: {height}x{width} px, {grid}, {plan.num_tokens} visual tokens; {more}"
    return values, words


def _target(name: str, source: str) -> Path:
    """The file of a picture: the named one, which must be new, or a new one in the folder of tile
    pictures."""
    if name:
        path = _path(name)
        if path.suffix.lower() != ".png":
            raise UsageError(f"{name}: the picture is a PNG; give a file that ends with .png")
        if path.exists():
            raise UsageError(f"{name} is there already; give another file to /tiles")
        return path
    stem = Path(source).stem
    path, number = TILES_FOLDER / f"{stem}.tiles.png", 1
    while path.exists():
        number += 1
        path = TILES_FOLDER / f"{stem}-{number}.tiles.png"
    return path


def _path(name: str) -> Path:
    """The path of a name that was typed. Raises UsageError where there can be none."""
    if "\0" in name:
        raise UsageError(f"{name!r} is not a file's name; give one without NUL")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{name}: there is no such home folder; write the path out") from error


def _unquoted(name: str) -> str:
    """A file's name without the quotes that a file manager puts around it."""
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"" else name
