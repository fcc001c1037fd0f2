"""What passes between the run of `data generate` and the client that asks the language model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

Messages = tuple[tuple[str, str], ...]  # (role, text); role is system, user or assistant


@dataclass(frozen=True)
class Request:
    """One question to the model. max_tokens: of the answer. None leaves the field out."""

    messages: Messages
    max_tokens: int
    temperature: float | None
    seed: int | None


@dataclass(frozen=True)
class Usage:
    """Tokens of one request or of many, as the server counted them."""

    prompt_tokens: int = 0
    answer_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens, self.answer_tokens + other.answer_tokens
        )


@dataclass(frozen=True)
class Reply:
    """What came back. fault: why the text is no whole answer; "" when it is one. usage: None where
    the server does not tell."""

    text: str
    fault: str = ""
    usage: Usage | None = None


Ask = Callable[[Request], Awaitable[Reply]]
OpenClient = Callable[[], AbstractAsyncContextManager[Ask]]


class Refused(Exception):
    """The server does not take this request (400, 413, 422); another one may be fine."""


class Invalid(Exception):
    """Why an answer is not taken, in few words; another one may be."""


class Unanswered(Exception):
    """No answer after all retries: rate limit, server error, timeout, no connection."""
