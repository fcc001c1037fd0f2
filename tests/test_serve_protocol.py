"""The server's connections: JSON also where no application is asked, limits on number and time."""

from __future__ import annotations

import http.client
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from serve_running import LIMITS, USER, Running
from tiny import tiny_hd

from llava_hd.cli import eval_serve, serve_protocol
from llava_hd.cli.serve_engine import Engine
from llava_hd.model.assemble import assemble


@pytest.fixture(scope="module")
def engine(parts: Path) -> Engine:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hd448")
    )
    return Engine("tiny", model.eval(), processor, LIMITS)


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=20)


def said(raw: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of what comes on a connection."""
    reply = http.client.HTTPResponse(raw)
    reply.begin()
    headers = {name.lower(): value for name, value in reply.getheaders()}
    return reply.status, headers, json.loads(reply.read())


@pytest.mark.parametrize(
    "words",
    [
        b"RUBBISH\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_in_openais_form(engine: Engine, words: bytes) -> None:
    with Running(engine) as running, connect(running) as raw:
        raw.sendall(words)
        status, headers, found = said(raw)
        assert (status, headers["content-type"]) == (400, "application/json")
        assert found["error"]["code"] == "invalid_http"
        assert raw.recv(1) == b""  # closed
        assert running.post({"model": "tiny", "messages": [USER], "max_tokens": 1})[0] == 200


def test_rubbish_behind_a_request_does_not_disturb_its_answer(engine: Engine) -> None:
    with Running(engine) as running, connect(running) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nRUBBISH\r\n\r\n")
        assert said(raw)[2]["status"] == "ok"
        assert running.post({"model": "tiny", "messages": [USER], "max_tokens": 1})[0] == 200


def test_too_many_connections_get_json_and_those_that_say_nothing_are_closed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_serve, "CONNECTIONS", 3)
    monkeypatch.setattr(serve_protocol, "HEAD_SECONDS", 2.0)
    most = 3 + LIMITS.parallel + LIMITS.queue
    body = {"model": "tiny", "messages": [USER], "max_tokens": 1}
    with Running(engine) as running:
        silent = [connect(running) for _ in range(most)]
        silent[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")  # no end of head
        status, found = running.post(body)
        assert (status, found["error"]["code"]) == (503, "busy")
        for raw in silent:
            assert raw.recv(1) == b""
            raw.close()
        deadline = time.monotonic() + 10
        while running.post(body)[0] == 503 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running.post(body)[0] == 200


def test_a_request_may_take_longer_than_its_head(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_protocol, "HEAD_SECONDS", 0.5)
    body = json.dumps({"model": "tiny", "messages": [USER], "max_tokens": 1}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        f"\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with Running(engine) as running, connect(running) as raw:
        for _ in range(2):  # the second time on the same connection
            raw.sendall(head.encode())
            time.sleep(1.0)
            raw.sendall(body)
            assert said(raw)[0] == 200


def test_no_address_redirects(engine: Engine) -> None:
    with Running(engine) as running:
        for path in ("/v1/chat/completions/", "/health/", "//evil.example/"):
            assert running.post({}, {"Host": "evil.example"}, path)[0] in (403, 404)
