"""A small server that speaks POST /v1/chat/completions, with faults by script.

It answers on 127.0.0.1 from threads of its own. What it says depends on the request alone (the
messages and the seed), so the same questions get the same answers in any order.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

WORDS = "The scene looks calm and bright, with many things in their places near the middle of it. "


@dataclass(frozen=True)
class Say:
    """What the server does with a request: sends a text, or another body, after a while.

    body: instead of a chat completion; a dict is sent as JSON, a str as it is. status and headers:
    of the reply. usage: whether it tells the tokens. hang_up: closes the connection instead.
    """

    text: str | None = None
    status: int = 200
    body: dict[str, Any] | str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    finish: str = "stop"
    seconds: float = 0.0
    usage: bool = True
    hang_up: bool = False


QUICK = (("retry-after-ms", "1"),)  # the client's own backoff begins at half a second


def failing(status: int, message: str = "not now", code: str | None = None) -> Say:
    """An error in OpenAI's form; the client may ask again at once."""
    error = {"message": message, "type": "error", "code": code}
    return Say(status=status, body={"error": error}, headers=QUICK)


@dataclass
class Asked:
    """One request as it came."""

    body: dict[str, Any]
    key: str

    @property
    def name(self) -> str:
        """What tells the requests apart: the kind's prompt, the image's text."""
        messages = self.body["messages"]
        return f"{messages[0]['content'][-80:]}\n{messages[-1]['content']}"


def good_answer(body: dict[str, Any]) -> str:
    """A valid answer of the kind that the system message asks for."""
    system, told = body["messages"][0]["content"], body["messages"][-1]["content"]
    first = told.split("\n")[0].partition(":")[0].rstrip(".")
    tail = f"The number drawn for it is {body.get('seed', 0) % 1000}."
    if "Four to eight questions" in system:
        return (
            f"Q: What can be seen here?\nA: {first}.\n\nQ: Does it look calm?\nA: Yes, it does.\n"
            f"Q: Is there anything else?\nA: {tail}"
        )
    if "full description" in system:
        return f"{first}. {WORDS * 4}\n\n{tail}"
    if "takes thought" in system:
        return f"Q: Why might this have come about here?\nA: {first}. {WORDS * 3}\n\n{tail}"
    raise AssertionError(f"no kind of ours: {system}")


Script = Callable[[int, Asked], Say | None]  # number from 0, request -> None for a good answer


@dataclass
class OpenAIServer:
    """Use it as a context manager. asked: all requests in the order in which they came."""

    script: Script = lambda number, asked: None
    asked: list[Asked] = field(default_factory=list)
    answered: int = 0

    def __enter__(self) -> OpenAIServer:
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    @property
    def counts(self) -> Counter[str]:
        """How often each image was asked about, for each kind."""
        with self._lock:
            return Counter(asked.name for asked in self.asked)

    def take(self, asked: Asked) -> Say:
        with self._lock:
            number = len(self.asked)
            self.asked.append(asked)
        return self.script(number, asked) or Say(good_answer(asked.body))


def tokens(text: str) -> int:
    """The server's own count: words."""
    return len(text.split())


def _completion(say: Say, body: dict[str, Any]) -> dict[str, Any]:
    prompt = sum(tokens(message["content"]) for message in body["messages"])
    answer = tokens(say.text or "")
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }
    message = {"role": "assistant", "content": say.text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": say.finish}],
        **({"usage": usage} if say.usage else {}),
    }


def _handler(server: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            if self.path != "/v1/chat/completions":
                self._send(failing(404, f"no such path: {self.path}"), body)
                return
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            say = server.take(Asked(body, key))
            time.sleep(say.seconds)
            if say.hang_up:
                self.close_connection = True
                return
            self._send(say, body)
            server.answered += say.status == 200

        def _send(self, say: Say, body: dict[str, Any]) -> None:
            content = _completion(say, body) if say.body is None else say.body
            text = content if isinstance(content, str) else json.dumps(content)
            try:
                self.send_response(say.status)
                for name, value in say.headers:
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client was killed or gave up

    return Handler
