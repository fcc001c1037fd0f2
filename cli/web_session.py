"""The conversations of the web page: one for each open page and model, bounded, with one lock.

Nothing here knows of Gradio. A `Tab` is what one open page holds; the `Hall` holds the models and
the tabs. What a tab shows is worked out from its chat sessions each time, so the page and what the
model has read cannot come apart.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from ..hd.errors import UsageError
from ..hd.grid import HDConfig
from ..hd.image import ImageLimits
from ..model.chat import ChatSession
from ..model.llava_hd import LlavaHD
from ..model.processor import Processor
from ..model.stream import Piece
from ..train.record_images import has_lone_surrogate
from .web_pictures import AS_TRAINED, Picture, preset_geometry

FINISHES = {"stop": "", "length": "cut off at the longest answer", "cancelled": "stopped"}


@dataclass(frozen=True)
class Entrant:
    """A model that the page asks, under its name."""

    name: str
    model: LlavaHD
    processor: Processor


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
    waiting: int = 16


@dataclass(frozen=True)
class Geometry:
    """What the page's controls say: a preset or "as trained", and the most tiles of a grid (None:
    as many as the preset has)."""

    preset: str = AS_TRAINED
    max_tiles: int | None = None


class Tab:
    """One open page: a picture, and a conversation with each model.

    Questions are answered one at a time; `stop` may be called from any thread. Another geometry
    begins the conversations anew, and the picture goes with the next question again.
    """

    def __init__(self, hall: Hall) -> None:
        self.hall = hall
        self.geometry = Geometry()
        self.picture: Picture | None = None
        self.chats: list[ChatSession] = hall.chats(self.geometry)
        self._alone = threading.Lock()
        self._stopped = threading.Event()
        self._expected = ""  # a question on its way
        self._question = ""  # the one that is being answered
        self._said: dict[int, str] = {}  # number of the model -> its answer so far
        self._given: dict[str, Picture] = {}  # pictures of the conversations, by their image's name

    @property
    def geometries(self) -> list[HDConfig]:
        """How each model sees an image."""
        return [chat.model.config.hd for chat in self.chats]

    def note(self, number: int) -> str:
        """A word where a model is asked with a geometry that it was not trained with."""
        trained = self.hall.entrants[number].model.config.hd
        return "" if self.geometries[number] == trained else "not the geometry it was trained with"

    def place(self, picture: Picture | None) -> None:
        """Put a picture beside the conversations; it goes with the next question."""
        self.picture = picture

    def set_geometry(self, geometry: Geometry) -> None:
        """Ask with another geometry from now on. Raises UsageError while an answer is made, and for
        a geometry that cannot be."""
        with self._held():
            if geometry != self.geometry:
                self.chats = self.hall.chats(geometry)
                self.geometry = geometry
                self._given.clear()

    def clear(self) -> None:
        """Forget the conversations, keep the picture. Raises UsageError while an answer is made."""
        with self._held():
            for chat in self.chats:
                chat.reset()
            self._given.clear()

    def stop(self) -> None:
        """End the answers after the token they are at, or before their first one."""
        self._stopped.set()

    def expect(self, question: str) -> None:
        """A question is on its way: an earlier `stop` is not meant for it. Raises UsageError for
        one that cannot be asked whatever has been said before, and while an answer is made."""
        check_question(question, self.hall.limits)
        with self._held():
            self._stopped.clear()
            self._expected = question.strip()

    def give_up(self) -> str:
        """The question that was expected and not asked; it is not expected any more."""
        question, self._expected = self._expected, ""
        return question

    def answer(self) -> Iterator[None]:
        """Ask all models what is expected; yields whenever there is more to show (`messages`).

        Raises UsageError (ContextFull among them) or DataError for what cannot be asked; then
        nothing has changed.
        """
        with self._held():
            if self._stopped.is_set() or not self._expected:
                return
            answers = self._ask(self._expected)
            self._question, self._expected = self._expected, ""
            self._said = dict.fromkeys(range(len(answers)), "")
            try:
                yield
                yield from self._pieces(answers)
            finally:
                for answer in answers:
                    answer.close()  # what was said until now stays in the conversation
                self._said = {}

    def _ask(self, question: str) -> list[Generator[Piece]]:
        """The models' answers, not begun yet."""
        answers = []
        for number, chat in enumerate(self.chats):
            images = []
            if self.picture is not None and self.is_waiting(number):
                self._given[str(self.picture.thumbnail)] = self.picture
                images = [chat.image(self.picture.image, str(self.picture.thumbnail))]
            answer = chat.ask(question, images, self.hall.limits.max_new_tokens)
            answers.append(cast("Generator[Piece]", answer))
        return answers

    def _pieces(self, answers: Sequence[Generator[Piece]]) -> Iterator[None]:
        """A piece of each answer in turn until all are at their end, or stopped."""
        while self._said and not self._stopped.is_set():
            for number in list(self._said):
                with self.hall.lock:
                    piece = next(answers[number])
                self._said[number] += piece.text
                if piece.finish is not None:
                    del self._said[number]
            yield

    def messages(self, number: int) -> list[Message]:
        """The conversation with a model, with as much of a running answer as there is."""
        found: list[Message] = []
        for exchange in self.chats[number].history:
            thumbnails = [self._given[image.name].thumbnail for image in exchange.images]
            found += [Message("user", picture=thumbnail) for thumbnail in thumbnails]
            found.append(Message("user", exchange.question))
            found.append(Message("assistant", exchange.answer, FINISHES[exchange.finish]))
        if number in self._said:
            if self.picture is not None and self.is_waiting(number):
                found.append(Message("user", picture=self.picture.thumbnail))
            found.append(Message("user", self._question))
            found.append(Message("assistant", self._said[number]))
        return found

    def is_waiting(self, number: int) -> bool:
        """Whether there is a picture that the model has not been given in its conversation."""
        images = [image for said in self.chats[number].history for image in said.images]
        given = [self._given[image.name] for image in images]
        return self.picture is not None and all(picture is not self.picture for picture in given)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """No answer is made beside what is done here."""
        if not self._alone.acquire(blocking=False):
            raise UsageError("an answer is being made; stop it, or wait for its end")
        try:
            yield
        finally:
            self._alone.release()


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


def with_geometry(model: LlavaHD, processor: Processor, hd: HDConfig) -> tuple[LlavaHD, Processor]:
    """The same weights, asked with another geometry of the same tiles."""
    if hd == model.config.hd:
        return model, processor
    view = copy(model)  # another configuration over the same modules
    view.config = replace(model.config, hd=hd)
    return view, Processor(processor.tokenizer, view.config)


class Hall:
    """The models, one lock for their work, and the tabs of the open pages."""

    def __init__(self, entrants: Sequence[Entrant], limits: WebLimits = WebLimits()) -> None:
        self.entrants, self.limits = tuple(entrants), limits
        self.lock = threading.Lock()  # held for a token of one model at a time
        self._tabs: OrderedDict[str, Tab] = OrderedDict()
        self._door = threading.Lock()

    def chats(self, geometry: Geometry) -> list[ChatSession]:
        """New conversations with all models, which see images in this geometry."""
        chats = []
        for entrant in self.entrants:
            hd = preset_geometry(entrant.model.config.hd, geometry.preset)
            chats.append(ChatSession(*with_geometry(entrant.model, entrant.processor, hd)))
        return chats

    def enter(self, key: str) -> Tab:
        """A new tab; the one that was quiet longest is put away when there are too many."""
        with self._door:
            self._leave(key)
            while len(self._tabs) >= self.limits.max_tabs:
                self._leave(next(iter(self._tabs)))
            self._tabs[key] = Tab(self)
            return self._tabs[key]

    def find(self, key: str) -> Tab:
        """The tab of that key. Raises UsageError where it was put away."""
        with self._door:
            if key not in self._tabs:
                raise UsageError(
                    "this page was put away, because too many are open or the server was started "
                    "again; reload it"
                )
            self._tabs.move_to_end(key)
            return self._tabs[key]

    def leave(self, key: str) -> None:
        """Put a tab away, if it is there; its answers end."""
        with self._door:
            self._leave(key)

    def close(self) -> None:
        """Put all tabs away."""
        with self._door:
            for key in list(self._tabs):
                self._leave(key)

    def _leave(self, key: str) -> None:
        tab = self._tabs.pop(key, None)
        if tab is not None:
            tab.stop()
