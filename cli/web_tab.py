"""What one open page of the web page holds: a picture, and a conversation with each model.

What a page shows is worked out from its chat sessions each time, so the page and what the models
have read cannot come apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..hd.errors import DataError, LlavaHDError, UsageError
from ..hd.grid import HDConfig
from ..hd.image import ImageLimits, image_size
from ..hd.limits import beyond_training
from ..hd.plan import TilePlan, TooManyTokens, plan_image
from ..model.chat import ChatSession
from ..model.stream import Piece
from ..train.record_images import has_lone_surrogate
from .web_pictures import AS_BEGUN, Picture, draw_tiles, remove

if TYPE_CHECKING:
    from .web_session import Hall

NO_MEMORY = (
    "not enough memory for this conversation; clear it, or choose fewer tiles or a smaller picture"
)
FINISHES = {"stop": "", "length": "cut off at the longest answer", "cancelled": "stopped"}


@dataclass(frozen=True)
class Message:
    """What stands in a conversation: text or a picture, of "user" or "assistant"; note: how an
    answer ended, where that is worth a word."""

    role: str
    text: str = ""
    note: str = ""
    picture: Path | None = None


@dataclass(frozen=True)
class WebLimits:
    """What the page allows. images: of one upload; max_tabs: conversations held at a time, the one
    that was quiet longest goes first; waiting: questions that may wait for the model."""

    images: ImageLimits = field(
        default_factory=lambda: ImageLimits(
            max_bytes=20 * 2**20, max_pixels=40_000_000, max_aspect=200
        )
    )
    max_question_chars: int = 20_000
    max_new_tokens: int = 512
    max_tabs: int = 16
    max_caches: int = 4
    waiting: int = 16
    seconds_kept: float = 10.0


@dataclass(frozen=True)
class Geometry:
    """What the page's controls say: a preset or AS_BEGUN, and the most tiles of a grid (None: the
    preset's grids)."""

    preset: str = AS_BEGUN
    max_tiles: int | None = None


@dataclass
class Running:
    """A question that is being answered: the picture that goes with it, if one does, and what each
    model has said; a model that is done is not there any more."""

    question: str
    picture: Picture | None
    said: dict[int, str]


class Tab:
    """One open page: a picture, and a conversation with each model.

    Questions are answered one at a time; `stop` may be called from any thread. Another geometry
    begins the conversations anew, and the picture goes with the next question again. `left`: the
    page was closed, nobody reads any more what is said.
    """

    def __init__(self, hall: Hall) -> None:
        self.hall = hall
        self.geometry = Geometry()
        self.picture: Picture | None = None
        self.chats: list[ChatSession] = hall.chats(self.geometry)
        self.left = False
        self._alone = threading.Lock()
        self._stopped = threading.Event()
        self._expected = ""  # a question on its way
        self._running: Running | None = None
        self._placed: dict[str, Picture] = {}  # by their thumbnails, the names of the chats' images
        self._drawn: list[Path] = []
        self._gone: list[tuple[float, Path]] = []  # files to be deleted, and since when

    @property
    def geometries(self) -> list[HDConfig]:
        """How each model sees an image."""
        return [chat.processor.config.hd for chat in self.chats]

    def note(self, number: int) -> str:
        """A word where a model is asked with grids that it was not trained on."""
        trained = self.hall.entrants[number].model.config.hd
        return beyond_training(trained, self.geometries[number]) or ""

    def place(self, picture: Picture | None) -> None:
        """Put a picture beside the conversations; it goes with the next question. Raises DataError
        for one that a model cannot be given; then nothing has changed."""
        if picture is not None:
            check_picture(picture, self.geometries)
        self.picture = picture
        if picture is not None:
            self._placed[str(picture.thumbnail)] = picture
        self._tidy()

    def seen(self) -> list[tuple[TilePlan, Path]]:
        """What each model sees of the picture; nothing where there is none. The files are deleted
        after this is called again."""
        self.discard(self._drawn)
        self._drawn = []
        if self.picture is None:
            return []
        found = [draw_tiles(self.picture.image, hd, self.hall.folder) for hd in self.geometries]
        self._drawn = [path for _, path in found]
        return found

    def set_geometry(self, geometry: Geometry) -> None:
        """Ask with another geometry from now on. Raises UsageError while an answer is made, and for
        a geometry that cannot be; DataError where the picture has too many tokens in it. Then
        nothing has changed."""
        with self._held():
            if geometry != self.geometry:
                chats = self.hall.chats(geometry)
                if self.picture is not None:
                    check_picture(self.picture, [chat.processor.config.hd for chat in chats])
                self.chats = chats
                self.geometry = geometry
                self._tidy()

    def clear(self) -> None:
        """Forget the conversations, keep the picture. Raises UsageError while an answer is made."""
        with self._held():
            for chat in self.chats:
                chat.reset()
            self._tidy()

    def stop(self) -> None:
        """End the answers after the token they are at, or before their first one."""
        self._stopped.set()

    def leave(self) -> None:
        """The page is closed: its answers end, its files go."""
        self.left = True
        self.stop()
        if not self._alone.locked():
            thumbnails = [picture.thumbnail for picture in self._placed.values()]
            remove([*(path for _, path in self._gone), *self._drawn, *thumbnails])

    def discard(self, paths: Sequence[Path]) -> None:
        """Delete files soon: just now the browser may be fetching them."""
        now = time.monotonic()
        self._gone += [(now, path) for path in paths]
        old = [one for one in self._gone if now - one[0] >= self.hall.limits.seconds_kept]
        self._gone = [one for one in self._gone if one not in old]
        remove(path for _, path in old)

    def expect(self, question: str) -> None:
        """A question is on its way: an earlier `stop` is not meant for it. Raises UsageError for
        one that cannot be asked whatever has been said before, while an answer is made, and where
        too many questions wait already."""
        check_question(question, self.hall.limits)
        with self._held():
            self._stopped.clear()
            self.hall.check_room()
            self._expected = question.strip()

    @property
    def is_expecting(self) -> bool:
        """Whether a question of this page waits for the models."""
        return bool(self._expected)

    @property
    def is_answering(self) -> bool:
        return self._running is not None

    def give_up(self) -> str:
        """The question that was expected and not asked; it is not expected any more."""
        question, self._expected = self._expected, ""
        return question

    def answer(self) -> Iterator[None]:
        """Ask all models what is expected; yields whenever there is more to show (`messages`).

        Raises UsageError (ContextFull among them) or SampleError for what cannot be asked; then
        nothing has changed. LlavaHDError where memory runs out; then the question is expected yet.
        """
        with self._held():
            if self._stopped.is_set() or not self._expected:
                return
            picture = self.picture
            answers = [self._ask(number, picture) for number in range(len(self.chats))]
            self._running = Running(self.give_up(), picture, dict.fromkeys(range(len(answers)), ""))
            running = self._running
            try:
                yield
                yield from self._pieces(answers, running.said)
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._expected = running.question  # given back to the page
                self._free(answers)
                raise LlavaHDError(NO_MEMORY) from error
            finally:
                for answer in answers:
                    answer.close()  # what was said until now stays in the conversation
                self._running = None
        if self.left:
            self.leave()
        self.hall.free_memory()

    def _free(self, answers: Sequence[Generator[Piece]]) -> None:
        """End the answers and let go what the models have read for any page."""
        for answer, chat in zip(answers, self.chats, strict=True):
            answer.close()
            chat.drop_cache()
        self.hall.free_memory(keep=0)

    def drop_caches(self) -> None:
        """Let go what the models have read of the conversations, unless they are read just now."""
        if self._alone.acquire(blocking=False):
            for chat in self.chats:
                chat.drop_cache()
            self._alone.release()

    def _ask(self, number: int, picture: Picture | None) -> Generator[Piece]:
        """A model's answer to what is expected, not begun yet."""
        chat, images = self.chats[number], []
        if picture is not None and not self._knows(number, picture):
            images = [chat.image(picture.image, str(picture.thumbnail))]
        return chat.ask(self._expected, images, self.hall.limits.max_new_tokens)

    def _pieces(self, answers: Sequence[Generator[Piece]], said: dict[int, str]) -> Iterator[None]:
        """A piece of each answer in turn until all are at their end, or stopped."""
        while said and not self._stopped.is_set():
            for number in list(said):
                with self.hall.lock:
                    piece = next(answers[number])
                said[number] += piece.text
                if piece.finish is not None:
                    del said[number]
            yield

    def messages(self, number: int) -> list[Message]:
        """The conversation with a model, with as much of a running answer as there is."""
        found: list[Message] = []
        for exchange in self.chats[number].history:
            thumbnails = [self._placed[image.name].thumbnail for image in exchange.images]
            found += [Message("user", picture=thumbnail) for thumbnail in thumbnails]
            found.append(Message("user", exchange.question))
            found.append(Message("assistant", exchange.answer, FINISHES[exchange.finish]))
        running = self._running
        said = None if running is None else running.said.get(number)
        if running is not None and said is not None:
            if running.picture is not None and not self._knows(number, running.picture):
                found.append(Message("user", picture=running.picture.thumbnail))
            found.append(Message("user", running.question))
            found.append(Message("assistant", said))
        return found

    def _knows(self, number: int, picture: Picture) -> bool:
        """Whether the model was given the picture in its conversation."""
        return str(picture.thumbnail) in self._given(number)

    def _given(self, number: int) -> set[str]:
        return {image.name for said in self.chats[number].history for image in said.images}

    def _tidy(self) -> None:
        """Forget the pictures that stand in no conversation, nor beside them or a question."""
        used = set().union(*map(self._given, range(len(self.chats))))
        running = None if self._running is None else self._running.picture
        used |= {str(p.thumbnail) for p in (self.picture, running) if p is not None}
        gone = [name for name in self._placed if name not in used]
        self.discard([self._placed.pop(name).thumbnail for name in gone])

    @contextmanager
    def _held(self) -> Iterator[None]:
        """No answer is made beside what is done here."""
        if not self._alone.acquire(blocking=False):
            raise UsageError("an answer is being made; stop it, or wait for its end")
        try:
            yield
        finally:
            self._alone.release()


def check_picture(picture: Picture, geometries: Sequence[HDConfig]) -> None:
    """Raise DataError, with its name, for a picture that has too many tokens in a geometry."""
    for hd in geometries:
        try:
            plan_image(image_size(picture.image), hd)
        except TooManyTokens as error:
            raise DataError(f"{picture.name}: {error}") from error


def check_question(question: str, limits: WebLimits) -> None:
    """Raise UsageError for a question that no model can be asked."""
    if not question.strip():
        raise UsageError("the question is empty; write one")
    if len(question) > limits.max_question_chars:
        raise UsageError(
            f"the question has {len(question)} characters, above the limit of "
            f"{limits.max_question_chars}; make it shorter"
        )
    if has_lone_surrogate(question):
        raise UsageError("the question holds half of a character; write it again")
