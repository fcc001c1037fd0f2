"""A conversation with a model: answers in pieces, and what was read is kept between the turns.

The next prompt is the whole conversation, written and tokenised afresh from its texts. What it has
in common with what the model has read already (the same ids, the same images at the same places)
stays in the cache of keys and values (kept.py); only what follows is read:

    cost of the n-th turn:   afresh  all tokens until now      kept  its own question and images

An answer whose text is not tokenised as the model wrote it is read again from where they differ. So
a greedy answer has the tokens that answering the whole conversation afresh has.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..hd.errors import UsageError
from ..hd.image import as_rgb
from .generate import context_length, end_tokens
from .kept import KeptPrompt, behind
from .llava_hd import LlavaHD
from .packing import Sample, pack
from .prefix import PrefixNotSharedWarning, keeping_refusal
from .processor import Cut, Processor
from .prompt import IMAGE_TAG, Turn, refuse_tag
from .stream import (
    GREEDY,
    UNFINISHED,
    Piece,
    Sampling,
    chat_sample,
    continued,
    text_pieces,
)

if TYPE_CHECKING:
    from PIL.Image import Image

Finish = Literal["stop", "length", "cancelled"]
STILL_RUNNING = "an answer of this conversation is still running; cancel it first"


class ContextFull(UsageError):
    """The conversation would be longer than what the model reads; the session stays as it was."""


@dataclass(frozen=True)
class ChatImage:
    """An image of a conversation, ready for the model: what the user calls it, plan and tiles."""

    name: str
    cut: Cut


@dataclass(frozen=True)
class Exchange:
    """A question, the images given with it, and its answer. num_tokens: of the answer as it was
    made; finish: "stop", "length", or "cancelled" where the answer is what was said until then."""

    question: str
    images: tuple[ChatImage, ...]
    answer: str
    num_tokens: int
    finish: Finish


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt: all of them, and how many of these had been read before."""

    prompt_tokens: int
    kept_tokens: int


class ChatSession:
    """A conversation about any number of images, or about none.

    Errors leave it as it was. `history` is what has been said, `usage` what the last question
    cost; `system` replaces the template's own system text (SampleError for an image tag in it).
    One answer at a time; `cancel` may be called from any thread. Where the language model does
    not allow keeping what was read (model/prefix.py), the turns are read again, with a
    PrefixNotSharedWarning.
    """

    def __init__(self, model: LlavaHD, processor: Processor, system: str | None = None) -> None:
        refuse_tag(system or "", "the system text")
        self.model, self.processor, self.system = model, processor, system
        self.usage: Usage | None = None
        self._history: tuple[Exchange, ...] = ()
        self._kept: KeptPrompt | None = None
        self._running = threading.Lock()
        self._cancelled = threading.Event()
        reason = keeping_refusal(model.language.causal_lm)
        self._keeps = reason is None
        if reason is not None:
            warnings.warn(
                f"earlier turns are read again for each question: {reason}",
                PrefixNotSharedWarning,
                stacklevel=2,
            )

    @property
    def history(self) -> tuple[Exchange, ...]:
        return self._history

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as JSON-able values, user and assistant in turns."""
        return [message for exchange in self._history for message in _messages(exchange)]

    def image(self, source: Image | Cut, name: str = "image") -> ChatImage:
        """An image for `ask`; in memory, of any mode (hd/image.py reads files)."""
        cut = source if isinstance(source, Cut) else self.processor.cut(as_rgb(source))
        return ChatImage(name, cut)

    def ask(
        self,
        text: str,
        images: Sequence[ChatImage] = (),
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
        stops: Sequence[str] = (),
    ) -> Generator[Piece]:
        """The answer in pieces, the last one with `finish`; the images stand before the text.

        Everything is checked at once, before the first piece is asked for. An answer that is
        cancelled, or whose iterator is closed, stays in the history as far as it was said; if
        nothing was, its question is withdrawn.
        Raises SampleError for a text with an image tag, ContextFull, and UsageError while another
        answer is running.
        """
        if self._running.locked():
            raise UsageError(STILL_RUNNING)
        sample = self._sample(text, images)
        most = min(max_new_tokens, self._room(sample))
        self._cancelled = threading.Event()
        tokens = self._tokens(sample, most, sampling, self._cancelled)
        pieces = text_pieces(tokens, self.processor.tokenizer, most, stops)
        asked = Exchange(text, tuple(images), "", 0, "cancelled")
        return self._answer(asked, self._history, tokens, pieces, self._cancelled)

    def cancel(self) -> None:
        """End the running answer after the token it is at."""
        self._cancelled.set()

    def reset(self) -> None:
        """Forget everything. Raises UsageError while an answer is running."""
        with self._alone():
            self._history, self._kept, self.usage = (), None, None

    def drop_cache(self) -> None:
        """Give the memory of what was read back; the next question reads the conversation again.
        Raises UsageError while an answer is running."""
        with self._alone():
            self._kept = None

    def _sample(self, text: str, images: Sequence[ChatImage]) -> Sample:
        """The conversation with its next question."""
        refuse_tag(text, "the text")
        turns, cuts = [], []
        for exchange in self._history:
            turns += [_human(exchange.question, exchange.images), Turn("gpt", exchange.answer)]
            cuts += [image.cut for image in exchange.images]
        turns.append(_human(text, images))
        cuts += [image.cut for image in images]
        return chat_sample(self.processor, turns, cuts, self.system)

    def _room(self, sample: Sample) -> int:
        """Tokens that an answer may have; raises ContextFull where that is none."""
        limit, length = context_length(self.model), len(sample.ids)
        if limit is None:
            return 2**31
        if length >= limit:
            visual = sum(plan.num_tokens for plan in sample.plans)
            raise ContextFull(
                f"the conversation has {length} tokens with this question ({visual} of them "
                f"visual), but the model reads {limit}; reset the conversation, ask for less, or "
                "give images with fewer tiles"
            )
        return limit - length

    def _answer(
        self,
        asked: Exchange,
        history: tuple[Exchange, ...],
        tokens: Generator[int],
        pieces: Iterator[Piece],
        cancelled: threading.Event,
    ) -> Generator[Piece]:
        """The pieces, written into the history that they were asked behind."""
        said = Piece("", 0)
        with self._alone():
            if self._history is not history:
                raise UsageError("the conversation has gone on since this was asked; ask it again")
            try:
                for piece in pieces:
                    if piece.finish is not None and cancelled.is_set():
                        text = piece.text.rstrip(UNFINISHED).rstrip()
                        piece = replace(piece, text=text, finish="cancelled")
                    said = replace(piece, text=said.text + piece.text)
                    if piece.finish is None:
                        yield piece
            except GeneratorExit:
                said = replace(said, finish="cancelled")
                raise
            finally:
                tokens.close()
                self._remember(asked, said)
        yield piece  # the next question may be asked now

    def _remember(self, asked: Exchange, said: Piece) -> None:
        """Write the whole answer into the history; not one that broke off by an error (its last
        piece is missing), nor one that was cancelled before anything was said."""
        if said.finish is None or (said.finish == "cancelled" and not said.text):
            return
        done = replace(asked, answer=said.text, num_tokens=said.num_tokens, finish=said.finish)
        self._history = (*self._history, done)

    @torch.inference_mode()
    def _tokens(
        self, sample: Sample, most: int, sampling: Sampling, cancelled: threading.Event
    ) -> Generator[int]:
        """The answer's tokens up to its end; what the model reads for them is kept."""
        model, image_token_id = self.model, self.model.config.image_token_id
        if self._kept is None and self._keeps:
            layers = model.language.causal_lm.config.num_hidden_layers
            self._kept = KeptPrompt(layers, image_token_id, context_length(model))
        kept = self._kept
        length = 0 if kept is None else kept.keep_common(sample)
        self.usage = Usage(len(sample.ids), length)
        x = self._embeddings(behind(sample, length, image_token_id))
        ends = end_tokens(model, self.processor.tokenizer)
        cache, last = (None if kept is None else kept.cache), None
        for token in continued(model, x, most, sampling, cache, length):
            if kept is not None:
                kept.has_read(sample) if last is None else kept.has_read_token(last)
            last = token
            if token in ends or cancelled.is_set():
                return
            yield token

    def _embeddings(self, sample: Sample) -> Tensor:
        """`[t H]`; the tower is asked only where there are tiles."""
        if sample.tiles:
            return self.model.embeddings(pack([sample], self.model.config).to(self.model.device))
        return self.model.language.embed(torch.tensor(sample.ids, device=self.model.device))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No answer runs beside what is done here."""
        if not self._running.acquire(blocking=False):
            raise UsageError(STILL_RUNNING)
        try:
            yield
        finally:
            self._running.release()


def _human(text: str, images: Sequence[ChatImage]) -> Turn:
    return Turn("human", f"{IMAGE_TAG}\n" * len(images) + text)


def _messages(exchange: Exchange) -> tuple[dict[str, Any], dict[str, Any]]:
    images = [
        {
            "name": image.name,
            "size": list(image.cut.plan.image_size),
            "grid": list(image.cut.plan.grid),
            "num_tokens": image.cut.plan.num_tokens,
        }
        for image in exchange.images
    ]
    question = {"role": "user", "text": exchange.question, "images": images}
    answer = {
        "role": "assistant",
        "text": exchange.answer,
        "num_tokens": exchange.num_tokens,
        "finish": exchange.finish,
    }
    return question, answer
