"""What the web page lets in: a list of what a browser needs, and nothing else of Gradio's routes.

Gradio answers many addresses beside the page's own: it fetches other hosts' files on request, calls
functions by name, lists its API. None of that is needed here. The guard stands before Gradio and

- answers to loopback names only, where the page listens on loopback (no name of another's);
- takes POSTs of the page itself only (Origin), so another page in the browser cannot ask;
- knows the routes below, refuses all others, and paths with `..`, `%`, `\\` or NUL in them;
- serves files of the private folder only, links resolved;
- bounds every body, and refuses one whose files are not in the private folder;
- tells the browser to load nothing from elsewhere (Content-Security-Policy).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .listening import called_name

API = "/gradio_api"
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", f"{API}/theme.css")
STREAMS = (f"{API}/queue/data", f"{API}/upload_progress", f"{API}/app_id", f"{API}/info")
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}/heartbeat/")
CALLS = (f"{API}/queue/join", f"{API}/run/predict", f"{API}/cancel", f"{API}/reset")
UPLOAD, FILE = f"{API}/upload", f"{API}/file="
# What no path of ours holds: ways up, a second decoding, Windows' separators, ends of C strings.
NEVER = ("..", "%", "\\", "\0")

MAX_CALL_BYTES = 2 * 2**20
FORM_BYTES = 64 * 2**10  # of an upload's form around its file

HEADERS = {
    # Gradio's page writes scripts and styles into itself, and its parts start workers from blobs.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' blob: data:; worker-src 'self' blob:; object-src 'none'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}


class Refused(Exception):
    """A request that is not let in: HTTP status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Guard:
    """ASGI middleware. folder: the private folder, the only one whose files are served.

    names: the host names that are answered to (lower case, without port); None: any.
    max_upload_bytes: of the file of one upload.
    ended: once set, the streams of open pages end, which never would by themselves.
    """

    app: ASGIApp
    folder: Path
    max_upload_bytes: int
    names: tuple[str, ...] | None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        unfinished = False

        async def answer(message: Message) -> None:
            nonlocal unfinished
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            unfinished = message["type"] != "http.response.body" or message.get("more_body", False)
            await send(message)

        try:
            check_caller(Headers(scope=scope), scope["method"], self.names)
            limit = self.check_route(scope["method"], scope["path"], Headers(scope=scope))
            if limit is not None and scope["path"] != UPLOAD:
                receive = self.checked(await whole_body(receive, limit), receive)
            elif limit is not None:
                receive = bounded(receive, limit)
            else:
                receive = self.until_end(receive)
        except Refused as refused:
            plain = PlainTextResponse(refused.message, refused.status)
            await plain(scope, receive, answer)
            return
        await self.app(scope, receive, answer)
        if unfinished and self.ended.is_set():
            await answer({"type": "http.response.body", "body": b""})

    def until_end(self, receive: Receive) -> Receive:
        """A `receive` to which the client has gone when the server ends."""

        async def watch() -> Message:
            message = asyncio.ensure_future(receive())
            end = asyncio.ensure_future(self.ended.wait())
            try:
                await asyncio.wait((message, end), return_when=asyncio.FIRST_COMPLETED)
                return {"type": "http.disconnect"} if end.done() else await message
            finally:
                message.cancel()
                end.cancel()

        return watch

    def check_route(self, method: str, path: str, headers: Headers) -> int | None:
        """How many bytes the body may have, None where there is none. Raises Refused."""
        if any(part in path for part in NEVER):
            raise Refused(404, "no such page")
        if method in ("GET", "HEAD"):
            if path.startswith(FILE):
                self.check_file(path.removeprefix(FILE))
            elif path not in PAGES and path not in STREAMS and not path.startswith(FOLDERS):
                raise Refused(404, "no such page")
            return None
        if method != "POST" or path not in (*CALLS, UPLOAD):
            raise Refused(404, "no such page")
        limit = MAX_CALL_BYTES if path != UPLOAD else self.max_upload_bytes + FORM_BYTES
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > limit:
            raise Refused(413, f"too large; at most {limit} bytes")
        return limit

    def check_file(self, name: str) -> None:
        """Raise Refused unless the name is that of a file in the private folder."""
        if not is_inside(name, self.folder):
            raise Refused(404, "no such file")

    def checked(self, body: bytes, receive: Receive) -> Receive:
        """A `receive` that gives a body whose files are all in the private folder, or Refused."""
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        for name in named_files(told):
            if not isinstance(name, str) or not is_inside(name, self.folder):
                raise Refused(403, "the body names a file that was not uploaded")
        return once(body, receive)


def check_caller(headers: Headers, method: str, names: tuple[str, ...] | None) -> None:
    """Raise Refused for a host name that is not ours and for a POST of another page."""
    host = headers.get("host", "").lower()
    if names is not None and called_name(host) not in names:
        raise Refused(403, "this page answers to localhost only")
    origin = headers.get("origin")
    foreign = origin is not None and origin.lower().partition("://")[2] != host
    if foreign and method not in ("GET", "HEAD"):
        raise Refused(403, "asked by another page")


def is_inside(name: str, folder: Path) -> bool:
    """Whether the path is that of a regular file below the folder once its links are resolved."""
    try:
        path = Path(name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        return False
    return path.is_file() and path.is_relative_to(folder.resolve())


def may_become_inside(name: str, folder: Path) -> bool:
    """Whether the path is below the folder and nothing is there yet."""
    try:
        path = Path(name).resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return path.is_relative_to(folder.resolve()) and not os.path.lexists(path)


def named_files(value: Any) -> Iterator[Any]:
    """Every path in a body's JSON, however deep it lies: Gradio takes an object with one for a
    file, and fetches it where the path is an address."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if item.get("path") is not None:
                yield item["path"]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


async def whole_body(receive: Receive, limit: int) -> bytes:
    """The body, never more of it than allowed. Raises Refused."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the body ended early")
        body += message.get("body", b"")
        if len(body) > limit:
            raise Refused(413, f"too large; at most {limit} bytes")
        if not message.get("more_body", False):
            return bytes(body)


def once(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, and then what `receive` gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def bounded(receive: Receive, limit: int) -> Receive:
    """A `receive` that ends the request when more arrives than its head declared to be allowed."""
    seen = 0

    async def count() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return message if seen <= limit else {"type": "http.disconnect"}

    return count
