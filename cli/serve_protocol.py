"""The server's connections: how many there are and how long a request's head may take is limited,
and what goes wrong before the application is asked is told in JSON, too."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .serve_request import RequestRefused

HEAD_SECONDS = 10.0  # from a connection's beginning, or its last answer's end, to a whole head


async def busy(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers instead of the application where there are too many connections."""
    refused = RequestRefused("too many connections; ask again later", status=503, code="busy")
    headers = {"Retry-After": "1", "Connection": "close"}
    await JSONResponse(refused.body(), refused.status, headers)(scope, receive, send)


class Connection(H11Protocol):
    """uvicorn's connection; `limit_concurrency` of its configuration is the number of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most, self.limit_concurrency = self.limit_concurrency, None  # uvicorn's own is no JSON
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        if self.most is not None and len(self.connections) > self.most:
            self.app = busy
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._unwatch()

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """While no request is being answered, a head may take so long and no longer."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._unwatch()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def on_response_complete(self) -> None:
        """After an answer: the next head may take as long again."""
        self._unwatch()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets OpenAI's form of an error as well."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way
            self.transport.close()
            return
        body = JSONResponse(RequestRefused("this is not HTTP", code="invalid_http").body()).body
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
