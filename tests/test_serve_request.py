"""Requests that are refused: addresses, images, fields, bodies, host names."""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serve_running import LIMITS, USER, Running, asked, openai, url_of, with_images
from tiny import random_image, tiny_hd

from llava_hd.cli.serve_engine import Engine
from llava_hd.model.assemble import assemble

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def pair(parts: Path):
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    return model.eval(), processor


@pytest.fixture(scope="module")
def running(pair) -> Iterator[Running]:
    with Running(Engine("tiny", *pair, LIMITS)) as server:
        yield server


ADDRESSES = (
    "http://127.0.0.1/a.png",
    "https://example.org/a.png",
    "http://169.254.169.254/latest",
    "http://2130706433/",
    "http://[::ffff:127.0.0.1]/",
    "HTTP://localhost/",
    "ftp://host/a.png",
    "file:///etc/passwd",
    "/etc/passwd",
    "../../etc/passwd",
    "C:\\a.png",
    "photo.png",
    "data:text/html;base64,PGI+",
    "data:image/png,abc",
    "data:image/png;base64",
    "blob:1",
    "",
    " ",
)


@pytest.mark.parametrize("url", ADDRESSES)
def test_no_address_is_fetched_and_no_file_opened(running: Running, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        asked(running, with_images("what?", url))
    assert caught.value.code == "invalid_image_url"
    assert caught.value.param == "messages[0].content[0]"


def bad_images() -> dict[str, str]:
    good = base64.b64decode(url_of(random_image((40, 40))).partition(",")[2])

    def url(data: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(data).decode()

    def blank(side: int) -> str:
        return url_of(Image.new("1", (side, side)))

    return {
        "not base64": "data:image/png;base64,@@@@",
        "the file is empty": url(b""),
        "not an image": url(b"<html>"),
        "damaged": url(good[: len(good) // 2]),
        "above the limit of 89919": blank(400),
        "decompression bomb": blank(10_000),
    }


@pytest.mark.parametrize("reason", list(bad_images()))
def test_an_image_that_cannot_be_read_is_named(running: Running, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        asked(running, with_images("what?", url_of(random_image((9, 9))), bad_images()[reason]))
    assert caught.value.code == "invalid_image"
    assert caught.value.param == "messages[0].content[1]"


BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages must be a list"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": ["hi"]}, r"messages\[0\].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "not 'tool'"),
    ({"messages": [USER, {"role": "system", "content": "x"}]}, "must be the first"),
    ({"messages": [{"role": "system", "content": "x"}]}, "the last message must be from user"),
    ({"messages": [USER, USER]}, "alternate"),
    ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "must be from user"),
    ({"messages": [USER] * 99}, "99 messages, above the limit of 64"),
    ({"messages": [{"role": "user"}]}, "content must be text or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "not 'audio'"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "must be text"),
    ({"messages": [{"role": "user", "content": "a <image> b"}]}, "holds <image>"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a character"),
    ({"messages": [{"role": "user", "content": "a " * 3000}]}, "tokens of text"),
    ({"messages": [{"role": "user", "content": "a" * 200_001}]}, "200000 characters"),
    ({"max_tokens": 0}, "max_tokens must be"),
    ({"max_tokens": True}, "max_tokens must be"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens must be"),
    ({"temperature": -1}, "temperature must be"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"temperature": 10**400}, "temperature must be"),
    ({"top_p": 0}, "top_p must be"),
    ({"seed": 1.5}, "seed must be"),
    ({"seed": 2**64}, "seed must be"),
    ({"stop": ""}, "stop must be"),
    ({"stop": ["a"] * 17}, "stop: at most 16"),
    ({"stream": "yes"}, "stream must be"),
    ({"n": 2}, "n is not supported"),
    ({"logprobs": True}, "logprobs is not supported"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"model": 7}, "model must be"),
]


@pytest.mark.parametrize(("change", "message"), BAD_BODIES, ids=[m for _, m in BAD_BODIES])
def test_a_bad_request_is_told_in_openais_form(
    running: Running, change: dict[str, Any], message: str
) -> None:
    status, found = running.post({"model": "tiny", "messages": [USER], **change})
    assert status == 400, found
    assert re.search(message, found["error"]["message"])
    assert found["error"]["type"] == "invalid_request_error"
    assert set(found["error"]) == {"message", "type", "param", "code"}


def test_bodies_that_are_no_requests(running: Running) -> None:
    for raw in (b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"model": ' + b"9" * 9999):
        status, found = running.post(raw)
        assert status == 400 and found["error"]["code"] == "invalid_json", raw[:20]
    status, found = running.post(b"x" * 400_001)
    assert status == 413 and "larger than 400000" in found["error"]["message"]
    status, found = running.post({"model": "gpt", "messages": [USER]})
    assert status == 404 and found["error"]["code"] == "model_not_found"
    status, found = running.post({}, {"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in found["error"]["message"]
    assert running.post({}, path="/v1/embeddings")[0] == 404
    assert running.post({}, path="/v1/models")[0] == 405


def test_a_body_without_a_length_is_cut_off_at_the_limit(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(60):
                raw.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert raw.recv(200).startswith(b"HTTP/1.1 413")


def test_too_many_images_are_refused(running: Running) -> None:
    urls = [url_of(random_image((9, 9)))] * 3
    with pytest.raises(openai.BadRequestError, match="3 images, above the limit of 2"):
        asked(running, with_images("what?", *urls))


def test_the_pixels_of_all_images_are_limited_together(running: Running) -> None:
    urls = [url_of(Image.new("1", (250, 250)))] * 2
    assert asked(running, with_images("what?", urls[0])).usage.completion_tokens == 8
    with pytest.raises(openai.BadRequestError, match="above the limit of 27500") as caught:
        asked(running, with_images("what?", *urls))
    assert caught.value.param == "messages[0].content[1]"


def test_without_a_token_only_localhost_is_answered(running: Running) -> None:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 1}
    assert running.post(body, {"Host": "evil.example"})[0] == 403
    assert running.post(body, {"Host": "127.0.0.1.evil.example:80"})[0] == 403
    assert running.post(body, {"Host": "localhost:9"})[0] == 200


def test_a_token_is_asked_for_where_one_is_set(pair) -> None:
    with Running(Engine("tiny", *pair, LIMITS), TOKEN) as running:
        for key in ("wrong", TOKEN + "x", TOKEN[:-1]):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                running.client(key).models.list()
        assert running.post({"model": "tiny", "messages": [USER]})[0] == 401
        assert [model.id for model in running.client(TOKEN).models.list()] == ["tiny"]
