"""The one door to the `openai` client: any server that speaks POST /chat/completions.

The client retries rate limits (429), server errors (5xx), timeouts and lost connections on its own,
with backoff and as the server's Retry-After says. What is left over is told apart here: a refused
request, no answer, or a fault of the whole run, which stops it. The key goes into the request's
header and nowhere else: it is taken out of everything that the server sends back.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion

from ..hd.errors import LlavaHDError, UsageError
from .generate_request import Ask, Refused, Reply, Request, Unanswered, Usage
from .generate_settings import LimitField

REFUSALS = (400, 413, 422)
SHOWN = 200  # characters of a server's message
NO_KEY = "none"  # what a server without keys is sent, because the client wants one


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. timeout: seconds for one request; retries: after the first one. The key
    is not shown by repr."""

    url: str
    model: str
    key: str | None = field(repr=False)
    key_name: str = "OPENAI_API_KEY"
    retries: int = 5
    timeout: float = 120.0
    limit_field: LimitField = "max_tokens"


def read_key(name: str) -> str:
    """The key in an environment variable. UsageError, without its content, where it is unusable."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(
            f"the environment variable {name} holds no key; set it, name another one with "
            "--key-env, or give --no-key for a server that needs none"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UsageError(f"the environment variable {name} holds no key but other text; set it")
    return key


@asynccontextmanager
async def open_client(endpoint: Endpoint) -> AsyncIterator[Ask]:
    """A function that asks the endpoint; its connections are closed in the end."""
    client = openai.AsyncOpenAI(
        api_key=endpoint.key or NO_KEY,
        base_url=endpoint.url,
        max_retries=endpoint.retries,
        timeout=endpoint.timeout,
    )

    async def ask(request: Request) -> Reply:
        try:
            answer = await client.chat.completions.create(**_fields(request, endpoint))
        except openai.OpenAIError as error:
            # Without the chain: an exception of the client holds the request with its headers.
            raise _told(error, endpoint) from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            return Reply("", "the server's reply is not JSON")
        return _reply(answer, endpoint)

    try:
        yield ask
    finally:
        await client.close()


def _fields(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": role, "content": text} for role, text in request.messages],
        endpoint.limit_field: request.max_tokens,
    }
    if request.temperature is not None:
        fields["temperature"] = request.temperature
    if request.seed is not None:
        fields["seed"] = request.seed
    return fields


def _reply(answer: Any, endpoint: Endpoint) -> Reply:
    """The client does not check what it gets, so each field is looked at before it is used."""
    if not isinstance(answer, ChatCompletion):
        return Reply("", "the server's reply is no chat completion")
    usage = _usage(answer.usage)
    choices = answer.choices
    if not isinstance(choices, list) or not choices:
        return Reply("", "the server's reply has no choices", usage)
    message = getattr(choices[0], "message", None)
    text = getattr(message, "content", None)
    finish = getattr(choices[0], "finish_reason", None)
    if finish == "content_filter" or getattr(message, "refusal", None):
        return Reply("", "the server filtered the answer", usage)
    if not isinstance(text, str) or not text.strip():
        return Reply("", "the server's reply has no text", usage)
    text = _without_key(text, endpoint)
    return Reply(text, "cut off at max_tokens" if finish == "length" else "", usage)


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, CompletionUsage):
        return None
    counts = (value.prompt_tokens, value.completion_tokens)
    if not all(type(count) is int and count >= 0 for count in counts):
        return None
    return Usage(*counts)


def _told(error: openai.OpenAIError, endpoint: Endpoint) -> Exception:
    """The client's error as ours: for this request, for now, or for the whole run."""
    if isinstance(error, openai.APITimeoutError):
        return Unanswered(f"{endpoint.url} gave no answer within {endpoint.timeout:g} s")
    if isinstance(error, openai.APIConnectionError):
        return Unanswered(f"{endpoint.url} cannot be reached")
    if not isinstance(error, openai.APIStatusError):
        return Unanswered(f"{endpoint.url}: {type(error).__name__}")
    status, message = error.status_code, _message(error, endpoint)
    if status in (401, 403):  # their messages show parts of the key
        where = f"in {endpoint.key_name}" if endpoint.key else "(none was sent: --no-key)"
        return UsageError(f"{endpoint.url} does not take the key {where} ({status}); check it")
    if status == 404:
        return UsageError(
            f"{endpoint.url} does not know the model {endpoint.model!r}, or this is not its "
            f"address ({status}); check --model, and --endpoint, which mostly ends in /v1"
        )
    if status == 402 or error.code == "insufficient_quota":
        return LlavaHDError(
            f"{endpoint.url}: the account has no money or quota left ({status}); top it up and "
            "start the same command again"
        )
    if status in REFUSALS:
        return Refused(f"{status}{message}")
    if status in (408, 409, 429) or status >= 500:
        return Unanswered(f"{endpoint.url} answered {status}{message}")
    return UsageError(f"{endpoint.url} answered {status}{message}; check --endpoint")


def _message(error: openai.APIStatusError, endpoint: Endpoint) -> str:
    """What the server says, in one short line, after a colon."""
    body = error.body
    text = body.get("message") if isinstance(body, dict) else None
    if not isinstance(text, str) or not text.strip():
        return ""
    text = " ".join(_without_key(text, endpoint).split())
    return f": {text}" if len(text) <= SHOWN else f": {text[: SHOWN - 3]}..."


def _without_key(text: str, endpoint: Endpoint) -> str:
    return text.replace(endpoint.key, "[key]") if endpoint.key else text
