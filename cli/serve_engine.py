"""The model behind the server: a few answers at a time, the others wait, none holds for ever."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import anyio
from anyio import to_thread

from ..hd.plan import TooManyTokens
from ..model.generate import context_length
from ..model.llava_hd import LlavaHD
from ..model.packing import Sample
from ..model.processor import Processor
from ..model.prompt import SampleError
from ..model.stream import Piece, chat_sample, text_stream
from .serve_request import ChatRequest, RequestRefused, ServeLimits, parse_chat, parse_json


@dataclass(frozen=True)
class Prepared:
    """A checked request as the model takes it; its answer must end by `deadline` (monotonic)."""

    chat: ChatRequest
    sample: Sample
    max_new_tokens: int
    deadline: float


class Engine:
    """Makes answers token by token in threads; other requests are served between the tokens."""

    def __init__(
        self, name: str, model: LlavaHD, processor: Processor, limits: ServeLimits
    ) -> None:
        self.name, self.limits = name, limits
        self.model, self.processor = model, processor
        self.present = 0
        self._turn = anyio.Semaphore(limits.parallel)
        self._threads = anyio.CapacityLimiter(limits.parallel + 1)  # one prepares

    def check_room(self) -> None:
        """Raise RequestRefused (429) when as many requests are here as may be."""
        if self.present >= self.limits.parallel + self.limits.queue:
            raise RequestRefused(
                "too many requests at a time; ask again later", status=429, code="queue_full"
            )

    @contextmanager
    def seat(self) -> Iterator[None]:
        """Counts a request as present."""
        self.present += 1
        try:
            yield
        finally:
            self.present -= 1

    async def prepare(self, raw: bytes, deadline: float) -> Prepared:
        """Check and decode a request's body, beside the event loop. Raises RequestRefused."""
        return await to_thread.run_sync(self._prepare, raw, deadline, limiter=self._threads)

    def _prepare(self, raw: bytes, deadline: float) -> Prepared:
        chat = parse_chat(parse_json(raw), self.name, self.limits)
        try:
            sample = chat_sample(self.processor, chat.turns, chat.images, chat.system)
        except (SampleError, TooManyTokens) as error:
            raise RequestRefused(str(error), "messages") from None
        chat = replace(chat, images=())  # cut already; waiting requests do not hold their pixels
        limit, length = context_length(self.model), len(sample.ids)
        if limit is None:
            return Prepared(chat, sample, chat.max_new_tokens, deadline)
        if length >= limit:
            raise RequestRefused(
                f"{length} tokens of text and images, but the model reads {limit}",
                "messages",
                code="context_length_exceeded",
            )
        return Prepared(chat, sample, min(chat.max_new_tokens, limit - length), deadline)

    async def pieces(self, asked: Prepared) -> AsyncGenerator[Piece]:
        """The answer in pieces. Raises RequestRefused (408) when its time is over.

        A client that goes away cancels this; the model stops after the token it is at.
        """
        with self.seat():
            async with self._my_turn(asked.deadline):
                answer = text_stream(
                    self.model,
                    self.processor.tokenizer,
                    asked.sample,
                    asked.max_new_tokens,
                    asked.chat.stops,
                    asked.chat.sampling,
                )
                while True:
                    piece = await to_thread.run_sync(next, answer, limiter=self._threads)
                    yield piece
                    if piece.finish is not None:
                        return
                    if time.monotonic() > asked.deadline:
                        raise self._late()

    @asynccontextmanager
    async def _my_turn(self, deadline: float) -> AsyncIterator[None]:
        with anyio.move_on_after(deadline - time.monotonic()) as waiting:
            await self._turn.acquire()
        if waiting.cancelled_caught:
            raise self._late()
        try:
            yield
        finally:
            self._turn.release()

    def _late(self) -> RequestRefused:
        message = f"not done within {self.limits.seconds:g} seconds; ask for fewer tokens"
        return RequestRefused(message, status=408, code="timeout")
