"""`llava-hd eval serve`, asked by the real openai client and by clients that mean no good."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import random_image, tiny_hd

from llava_hd.cli.main import main
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer

pytest.importorskip("starlette", reason="the server's library is not installed (extra serve)")
uvicorn = pytest.importorskip("uvicorn", reason="the server is not installed (extra serve)")
openai = pytest.importorskip("openai", reason="the openai client is not installed (extra data)")

from llava_hd.cli.eval_serve import is_loopback, listen  # noqa: E402
from llava_hd.cli.serve_app import build_app  # noqa: E402
from llava_hd.cli.serve_engine import Engine  # noqa: E402
from llava_hd.cli.serve_request import ServeLimits  # noqa: E402

LIMITS = ServeLimits(max_body_bytes=400_000, max_images=2, max_pixels=90_000, max_new_tokens=24)
TOKEN = "a-token-of-the-tests"


class Running:
    """An engine behind a real server on a free port, in a thread."""

    def __init__(self, engine: Engine, token: str | None = None) -> None:
        self.engine = engine
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(build_app(engine, token), lifespan="off", log_level="critical")
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


# --- answers -----------------------------------------------------------------------------------


def test_the_client_gets_the_answer_that_the_model_gives(running: Running, pair) -> None:
    image = random_image((60, 90), 3)
    found = asked(running, with_images("what is on the mat?", url_of(image)))
    assert found.choices[0].message.content == answer(*pair, image, "what is on the mat?", 8)
    assert found.choices[0].finish_reason == "length"
    assert found.object == "chat.completion" and found.model == "tiny"
    prompt = len(pair[1].question("what is on the mat?", [image]).ids)
    assert found.usage.prompt_tokens == prompt and found.usage.completion_tokens == 8
    plain = asked(running, [{"role": "user", "content": "the dog"}])
    assert plain.choices[0].message.content == answer(*pair, None, "the dog", 8)


def test_a_stream_brings_the_same_answer_in_pieces(running: Running, pair) -> None:
    messages = with_images("is it red?", url_of(random_image((60, 60))))
    chunks = list(
        asked(running, messages, stream=True, stream_options={"include_usage": True}, max_tokens=12)
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == answer(*pair, random_image((60, 60)), "is it red?", 12)
    assert len([text for text in texts if text]) > 2
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finishes[-1] == "length" and set(finishes[:-1]) == {None}
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices


def test_the_models_are_listed(running: Running) -> None:
    assert [model.id for model in running.client().models.list()] == ["tiny"]
    assert running.client().models.retrieve("tiny").owned_by == "llava-hd"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        running.client().models.retrieve("gpt")


def test_several_turns_and_a_system_text_reach_the_prompt(running: Running, pair) -> None:
    first = [{"role": "user", "content": "the dog"}]
    talk = [*first, {"role": "assistant", "content": "is on"}, {"role": "user", "content": "cat"}]
    told = [{"role": "system", "content": "the mat is red"}, *first]
    usage = [asked(running, messages).usage.prompt_tokens for messages in (first, talk, told)]
    tokenizer = pair[1].tokenizer
    more = tokenizer(" is on</s>USER: cat ASSISTANT:", add_special_tokens=False).input_ids
    assert usage[1] == usage[0] + len(more)
    assert usage[2] < usage[0]  # in place of the template's long one


def test_stop_ends_an_answer_before_it(running: Running) -> None:
    messages = [{"role": "user", "content": "the dog"}]
    whole = asked(running, messages, max_tokens=24).choices[0].message.content
    stopped = asked(running, messages, max_tokens=24, stop=[whole[4:7]]).choices[0]
    assert stopped.message.content == whole[: whole.index(whole[4:7])].rstrip()
    assert stopped.finish_reason == "stop"


def test_a_seed_makes_drawn_answers_repeatable(running: Running) -> None:
    def drawn(seed: int) -> str:
        messages = [{"role": "user", "content": "the dog"}]
        more = {"temperature": 2, "top_p": 0.9, "seed": seed, "max_tokens": 16}
        return asked(running, messages, **more).choices[0].message.content

    assert drawn(5) == drawn(5)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_no_answer_is_longer_than_the_server_allows(running: Running) -> None:
    found = asked(running, [{"role": "user", "content": "the dog"}], max_tokens=100_000)
    assert found.usage.completion_tokens == LIMITS.max_new_tokens
    assert found.choices[0].finish_reason == "length"


def test_requests_at_the_same_time_get_each_their_own_answer(running: Running, pair) -> None:
    words = ["the dog", "the cat", "is it red?", "Yes"]
    found: dict[str, str] = {}

    def ask(text: str) -> None:
        reply = asked(running, [{"role": "user", "content": text}])
        found[text] = reply.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(text,)) for text in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: answer(*pair, None, text, 8) for text in words}


# --- refusals ----------------------------------------------------------------------------------

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
        "above the limit of 90000": blank(400),
        "decompression bomb": blank(10_000),
    }


@pytest.mark.parametrize("reason", list(bad_images()))
def test_an_image_that_cannot_be_read_is_named(running: Running, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        asked(running, with_images("what?", url_of(random_image((9, 9))), bad_images()[reason]))
    assert caught.value.code == "invalid_image"
    assert caught.value.param == "messages[0].content[1]"


USER = {"role": "user", "content": "hi"}
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


# --- load --------------------------------------------------------------------------------------


class Slow(Engine):
    """An engine that takes its time for each piece, and counts them."""

    made = 0

    async def pieces(self, asked):
        import anyio

        async with aclosing(super().pieces(asked)) as pieces:
            async for piece in pieces:
                self.made += 1
                yield piece
                await anyio.sleep(0.2)


def test_more_requests_than_may_wait_get_429(pair) -> None:
    engine = Slow("tiny", *pair, replace(LIMITS, queue=1))
    with Running(engine) as running:
        streams = [asked(running, [USER], stream=True, max_tokens=24) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            asked(running, [USER])
        assert caught.value.code == "queue_full"
        for stream in streams:
            stream.close()
        while engine.present:  # the clients are gone, so the model stops
            time.sleep(0.05)
        assert asked(running, [USER], max_tokens=1).usage.completion_tokens == 1


def test_a_client_that_goes_away_does_not_keep_the_model(pair) -> None:
    engine = Slow("tiny", *pair, LIMITS)
    with Running(engine) as running:
        body = json.dumps({"model": "tiny", "messages": [USER], "max_tokens": 24}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(("127.0.0.1", running.port)) as raw:
            raw.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + body)
            while not engine.made:
                time.sleep(0.01)
        while engine.present:
            time.sleep(0.01)
        assert 0 < engine.made < 12


def test_a_request_ends_when_its_time_is_over(pair) -> None:
    engine = Slow("tiny", *pair, replace(LIMITS, seconds=0.5))
    with Running(engine) as running:
        with pytest.raises(openai.APIStatusError) as caught:
            asked(running, [USER], max_tokens=24)
        assert caught.value.status_code == 408 and caught.value.code == "timeout"
        with pytest.raises(openai.APIError, match=r"not done within 0\.5 seconds"):
            list(asked(running, [USER], max_tokens=24, stream=True))
        assert engine.present == 0


def test_a_fault_of_the_server_tells_the_client_nothing_of_its_inside(pair) -> None:
    class Broken(Engine):
        async def pieces(self, asked):
            raise RuntimeError("a secret")
            yield

    with Running(Broken("tiny", *pair, LIMITS)) as running:
        with pytest.raises(openai.InternalServerError) as caught:
            asked(running, [USER])
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.APIError) as caught:
            list(asked(running, [USER], stream=True))
        assert "secret" not in str(caught.value)


# --- the command -------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_told_to_stop(pair, tmp_path: Path) -> None:
    model, processor = pair
    model.save_pretrained(tmp_path / "my-model")
    processor.save_pretrained(tmp_path / "my-model")
    words = ["eval", "serve", "--model", str(tmp_path / "my-model"), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_hd.cli.main", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(
            r"serving my-model at (http://127\.0\.0\.1:\d+/v1) \(no token is asked for\)\n", line
        )
        assert found, line
        client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=3)
        reply = client.chat.completions.create(model="my-model", messages=[USER], max_tokens=2)
        assert reply.usage.completion_tokens == 2
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn hands the signal on when it is done


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["eval", "serve", "--model", "none", *words]) == 2
    return capsys.readouterr().err


def test_the_command_refuses_what_is_not_safe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAVA_HD_TOKEN", raising=False)
    assert "put a token" in refusal(capsys, "--host", "0.0.0.0")
    assert "put a token" in refusal(capsys, "--host", "example.org")
    monkeypatch.setenv("LLAVA_HD_TOKEN", "short")
    assert "at least 16" in refusal(capsys, "--host", "0.0.0.0")
    monkeypatch.delenv("LLAVA_HD_TOKEN")
    assert "65535" in refusal(capsys, "--port", "99999")
    assert "give a number from 1" in refusal(capsys, "--port", "0", "--parallel", "0")
    with listen("127.0.0.1", 0) as taken:
        assert "cannot be had" in refusal(capsys, "--port", str(taken.getsockname()[1]))
    local = ("localhost", "127.0.0.1", "127.1.2.3", "::1")
    assert all(map(is_loopback, local))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil", "")))
    assert os.environ.get("LLAVA_HD_TOKEN") is None
