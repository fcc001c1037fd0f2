"""A server in a thread, asked by the real openai client or by hand; skips where one is missing."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the server's library is not installed (extra serve)")
uvicorn = pytest.importorskip("uvicorn", reason="the server is not installed (extra serve)")
openai = pytest.importorskip("openai", reason="the openai client is not installed (extra data)")

from llava_hd.cli.eval_serve import server_config  # noqa: E402
from llava_hd.cli.listening import listen  # noqa: E402
from llava_hd.cli.serve_engine import Engine  # noqa: E402
from llava_hd.cli.serve_request import ServeLimits  # noqa: E402

LIMITS = ServeLimits(max_body_bytes=400_000, max_images=2, max_pixels=90_000, max_new_tokens=24)
USER = {"role": "user", "content": "hi"}


class Running:
    """An engine behind a real server on a free port, in a thread."""

    def __init__(self, engine: Engine, token: str | None = None) -> None:
        self.engine = engine
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        config = server_config(engine, token)
        config.log_level = "critical"
        config.configure_logging()
        self.server = uvicorn.Server(config)
        run = {"target": self.server.run, "kwargs": {"sockets": [self.socket]}}
        self.thread = threading.Thread(**run, daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *what: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0
        )

    def post(
        self, body: Any, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions"
    ) -> tuple[int, dict[str, Any]]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {"Content-Type": "application/json", **(headers or {})}
        connection.request("POST", path, raw, sent)
        reply = connection.getresponse()
        found = json.loads(reply.read())
        connection.close()
        return reply.status, found


def url_of(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}"


def with_images(text: str, *urls: str) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def asked(running: Running, messages: Any, **more: Any) -> Any:
    more = {"max_tokens": 8, **more}
    return running.client().chat.completions.create(model="tiny", messages=messages, **more)
