"""The HTTP side of the server: OpenAI's chat completions and models, errors as JSON.

Without a token only loopback names are answered, and only JSON bodies are read: a web page in a
browser can then neither reach the server under a name of its own nor post to it unasked.
"""

from __future__ import annotations

import hmac
import json
import math
import sys
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from ..model.stream import Piece
from .listening import LOOPBACK_NAMES, called_name
from .serve_engine import Engine, Prepared
from .serve_request import RequestRefused

GONE = 499  # nobody is there to read it
Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(engine: Engine, token: str | None, started: float | None = None) -> Starlette:
    """The application. token: what a client must send as `Authorization: Bearer TOKEN`; None asks
    for none and answers to loopback names only."""
    created = int(time.time() if started is None else started)
    card = {"id": engine.name, "object": "model", "created": created, "owned_by": "llava-hd"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != engine.name:
            message = f"no such model; there is {engine.name!r}"
            raise RequestRefused(message, status=404, code="model_not_found")
        return JSONResponse(card)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "requests": engine.present})

    async def completions(request: Request) -> Response:
        return await _complete(engine, request)

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def call(request: Request) -> Response:
            _check_caller(request, token)
            return await endpoint(request)

        return call

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(completions), methods=["POST"]),
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{name:path}", guarded(one_model)),
            Route("/health", guarded(health)),
        ],
        exception_handlers={
            RequestRefused: _refused,
            HTTPException: _not_found,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False  # it would answer before the caller is checked
    return app


def _check_caller(request: Request, token: str | None) -> None:
    """Raise RequestRefused for a wrong token, or without one for a name that is no loopback."""
    if token is None:
        if called_name(request.headers.get("host", "")) not in LOOPBACK_NAMES:
            raise RequestRefused("this server answers to localhost only", status=403)
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        message = "wrong or missing API key (Authorization: Bearer ...)"
        raise RequestRefused(message, status=401, code="invalid_api_key")


async def _complete(engine: Engine, request: Request) -> Response:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestRefused("the content type must be application/json", status=415)
    engine.check_room()
    deadline = time.monotonic() + engine.limits.seconds
    with engine.seat():
        raw = await _read(request, engine.limits.max_body_bytes, engine.limits.seconds)
        asked = await engine.prepare(raw, deadline)
    if asked.chat.stream:
        return EventResponse(_events(engine, asked))
    return await _whole_or_gone(engine, asked, request)


async def _read(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The body, never more of it than allowed, in no more time than allowed."""
    too_large = RequestRefused(
        f"the body is larger than {max_bytes} bytes", status=413, code="request_too_large"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    raw = bytearray()
    with anyio.move_on_after(min(seconds, 60)) as reading:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > max_bytes:
                raise too_large
    if reading.cancelled_caught:
        raise RequestRefused("the body did not arrive in time", status=408, code="timeout")
    return bytes(raw)


async def _whole_or_gone(engine: Engine, asked: Prepared, request: Request) -> Response:
    """The whole answer; a client that goes away before it is made stops the model."""
    answer: list[Response | RequestRefused] = []

    async def make(scope: anyio.CancelScope) -> None:
        try:
            answer.append(await _whole(engine, asked))
        except RequestRefused as refused:  # an exception here would arrive as a group of them
            answer.append(refused)
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(make, tasks.cancel_scope)
        while (await request.receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()
    if not answer:
        return Response(status_code=GONE)
    if isinstance(answer[0], RequestRefused):
        raise answer[0]
    return answer[0]


class EventResponse(StreamingResponse):
    """Events that are made ahead of their sending: a client that reads slowly, or not at all, does
    not hold the model. (An answer's events are few; its length has a limit.)"""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, 200, headers, "text/event-stream")
        self.events = events

    async def stream_response(self, send: Send) -> None:
        """Called by starlette, which cancels it when the client goes away."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        put, take = anyio.create_memory_object_stream[Any](math.inf)

        async def make() -> None:
            # Closed at once when it is cancelled: what is collected late would hold the model.
            async with put, aclosing(self.events) as events:
                async for event in events:
                    await put.send(event)

        async with anyio.create_task_group() as tasks, take:
            tasks.start_soon(make)
            async for event in take:
                body = {"type": "http.response.body", "body": event.encode(), "more_body": True}
                await send(body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _whole(engine: Engine, asked: Prepared) -> Response:
    pieces = [piece async for piece in engine.pieces(asked)]
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
    choice = {"index": 0, "message": message, "finish_reason": pieces[-1].finish}
    body = {
        **_head(engine, "chat.completion"),
        "choices": [{**choice, "logprobs": None}],
        "usage": _usage(asked, pieces[-1]),
    }
    return JSONResponse(body)


async def _events(engine: Engine, asked: Prepared) -> AsyncGenerator[str]:
    """The answer as server-sent events; a fault on the way is an event as well."""
    head = _head(engine, "chat.completion.chunk")

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield event({"role": "assistant", "content": ""})
    try:
        async with aclosing(engine.pieces(asked)) as pieces:
            async for piece in pieces:
                if piece.text:
                    yield event({"content": piece.text})
                if piece.finish is not None:
                    yield event({}, piece.finish)
                    if asked.chat.usage_in_stream:
                        yield _event({**head, "choices": [], "usage": _usage(asked, piece)})
    except RequestRefused as error:
        yield _event(error.body())
        return
    except (
        Exception
    ) as error:  # the status is sent already; the client must learn of it all the same
        traceback.print_exception(error, file=sys.stderr)
        yield _event(_internal().body())
        return
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _head(engine: Engine, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": engine.name,
    }


def _usage(asked: Prepared, last: Piece) -> dict[str, int]:
    prompt = len(asked.sample.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": last.num_tokens,
        "total_tokens": prompt + last.num_tokens,
    }


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestRefused)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = RequestRefused(f"{request.method} here: {error.detail}", status=error.status_code)
    return JSONResponse(refused.body(), status_code=error.status_code, headers=error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _failed(request: Request, error: Exception) -> Response:
    """A fault of ours: the trace goes to stderr (starlette raises it again), not to the client."""
    return JSONResponse(_internal().body(), status_code=500)


def _internal() -> RequestRefused:
    return RequestRefused("the server failed; its log tells more", status=500, code="internal")
