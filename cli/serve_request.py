"""A request to /v1/chat/completions, checked: everything that a client can get wrong or misuse.

Nothing is fetched and no file is opened: an image is a data: URL in the request, or it is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..hd.image import ImageError, ImageLimits, image_size, load_image
from ..model.prompt import IMAGE_TAG, Turn
from ..model.stream import Sampling
from ..train.record_images import has_lone_surrogate

if TYPE_CHECKING:
    from PIL.Image import Image

DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
# Wishes that would change the answer and are not granted, with the value that wishes for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
ROLES = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class ServeLimits:
    """What a request may ask for, and how many at a time.

    max_pixels: of all images of a request together.
    max_new_tokens: an answer ends there whatever the request says. parallel: answers made at a
    time; queue: requests that may wait for them. seconds: of one request, waiting included.
    """

    max_body_bytes: int = 32 * 2**20
    max_images: int = 8
    max_pixels: int = 40_000_000
    max_messages: int = 64
    max_text_chars: int = 200_000
    max_stops: int = 16
    max_new_tokens: int = 1024
    parallel: int = 1
    queue: int = 64
    seconds: float = 300.0


class RequestRefused(Exception):
    """A request that gets an error: HTTP status, OpenAI's code and the field at fault."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class ChatRequest:
    """What is asked: turns with `<image>` tags where the images stand, and how to answer."""

    turns: tuple[Turn, ...]
    images: tuple[Image, ...]
    system: str | None
    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling
    stream: bool
    usage_in_stream: bool


def parse_json(raw: bytes) -> dict[str, Any]:
    """The body as an object. Raises RequestRefused."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise RequestRefused("the body is not JSON", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestRefused("the body must be a JSON object", code="invalid_json")
    return body


def parse_chat(body: Mapping[str, Any], model: str, limits: ServeLimits) -> ChatRequest:
    """The request of a JSON body; its images are decoded. Raises RequestRefused."""
    asked = body.get("model")
    if not isinstance(asked, str):
        raise RequestRefused("model must be the name of a model", "model")
    if asked != model:
        message = f"the model {_shown(asked)} does not exist here; there is {model!r}"
        raise RequestRefused(message, "model", status=404, code="model_not_found")
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise RequestRefused(f"{name} is not supported; leave it out", name)
    turns, images, system = _messages(body.get("messages"), limits)
    options = body.get("stream_options") or {}
    return ChatRequest(
        turns=turns,
        images=images,
        system=system,
        max_new_tokens=min(_max_tokens(body), limits.max_new_tokens),
        stops=_stops(body.get("stop"), limits),
        sampling=_sampling(body),
        stream=_flag(body, "stream"),
        usage_in_stream=isinstance(options, dict) and _flag(options, "include_usage"),
    )


def _messages(
    messages: Any, limits: ServeLimits
) -> tuple[tuple[Turn, ...], tuple[Image, ...], str | None]:
    """Turns, images in the order of their tags, and the system text."""
    if not isinstance(messages, list) or not messages:
        raise RequestRefused("messages must be a list of at least one message", "messages")
    if len(messages) > limits.max_messages:
        message = f"{len(messages)} messages, above the limit of {limits.max_messages}"
        raise RequestRefused(message, "messages")
    turns: list[Turn] = []
    urls: list[tuple[str, str]] = []
    system, chars = None, 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer") and number == 0:
            system, none = _content(message.get("content"), where)
            chars += len(system)
            if none:
                raise RequestRefused("the system message has an image", where)
            continue
        if role not in ROLES:
            said = "a system message must be the first" if role == "system" else "user or assistant"
            raise RequestRefused(f"{where}.role: {said}, not {_shown(role)}", f"{where}.role")
        text, own = _content(message.get("content"), where)
        chars += len(text)
        if own and role == "assistant":
            raise RequestRefused("an assistant message has an image", where)
        urls += own
        turns.append(Turn(ROLES[role], f"{IMAGE_TAG}\n" * len(own) + text))
        if chars > limits.max_text_chars:
            message = f"more than {limits.max_text_chars} characters of text"
            raise RequestRefused(message, "messages", code="context_length_exceeded")
    _check_order(turns)
    if len(urls) > limits.max_images:
        message = f"{len(urls)} images, above the limit of {limits.max_images}"
        raise RequestRefused(message, "messages", code="too_many_images")
    images: list[Image] = []
    left = limits.max_pixels
    for where, url in urls:
        images.append(_image(url, where, limits.max_body_bytes, left))
        height, width = image_size(images[-1])
        left -= height * width
    return tuple(turns), tuple(images), system


def _check_order(turns: list[Turn]) -> None:
    for number, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[number % 2]:
            raise RequestRefused(
                "messages alternate user, assistant, beginning with user", "messages"
            )
    if not turns or turns[-1].role != "human":
        raise RequestRefused("the last message must be from user", "messages")


def _content(content: Any, where: str) -> tuple[str, list[tuple[str, str]]]:
    """A message's text, and (where, URL) of each of its images."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestRefused(f"{where}.content must be text or a list of parts", f"{where}.content")
    texts: list[str] = []
    urls: list[tuple[str, str]] = []
    for number, part in enumerate(parts):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_plain_text(part.get("text"), place))
        elif kind == "image_url":
            urls.append((place, _url(part.get("image_url"), place)))
        else:
            message = f"{place}.type must be text or image_url, not {_shown(kind)}"
            raise RequestRefused(message, f"{place}.type")
    return "\n".join(texts), urls


def _plain_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RequestRefused(f"{where}.text must be text", where)
    if has_lone_surrogate(text):
        raise RequestRefused(f"{where}.text holds half of a character", where)
    if IMAGE_TAG in text:
        message = f"{where}.text holds {IMAGE_TAG}; give images as image_url parts"
        raise RequestRefused(message, where)
    return text


def _url(value: Any, where: str) -> str:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise RequestRefused(f"{where}.image_url.url must be text", where)
    if not DATA_URL.match(url):
        message = (
            f"{where}: only data:image/...;base64, URLs are taken; this server fetches no "
            "addresses and opens no files"
        )
        raise RequestRefused(message, where, code="invalid_image_url")
    return url


def _image(url: str, where: str, max_bytes: int, max_pixels: int) -> Image:
    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise RequestRefused(f"{where}: not base64", where, code="invalid_image") from None
    try:
        return load_image(data, ImageLimits(max_bytes=max_bytes, max_pixels=max_pixels))
    except ImageError as error:
        raise RequestRefused(f"{where}: {error.reason}", where, code="invalid_image") from None


def _max_tokens(body: Mapping[str, Any]) -> int:
    """OpenAI's new name or the old one; without either, as many as the server allows."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestRefused(f"{name} must be a whole number from 1", name)
            return value
    return 2**31


def _stops(value: Any, limits: ServeLimits) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise RequestRefused("stop must be text or a list of texts, none empty", "stop")
    if len(stops) > limits.max_stops or any(len(stop) > 1000 for stop in stops):
        raise RequestRefused(f"stop: at most {limits.max_stops} of 1000 characters", "stop")
    return tuple(stops)


def _sampling(body: Mapping[str, Any]) -> Sampling:
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise RequestRefused("seed must be a whole number from 0", "seed")
    top_p = _number(body, "top_p", 1.0, 1.0)
    if top_p == 0:
        raise RequestRefused("top_p must be above 0", "top_p")
    return Sampling(_number(body, "temperature", 0.0, 2.0), top_p, seed)


def _number(body: Mapping[str, Any], name: str, default: float, highest: float) -> float:
    value = default if body.get(name) is None else body[name]
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not 0 <= value <= highest:  # NaN is not
        raise RequestRefused(f"{name} must be a number from 0 to {highest:g}", name)
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise RequestRefused(f"{name} must be true or false", name)
    return bool(value)


def _shown(value: Any) -> str:
    """A client's value for a message, cut short."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
