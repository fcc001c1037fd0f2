"""`llava-hd eval serve`, asked by the real openai client: answers, load, the command."""

from __future__ import annotations

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

import pytest
from serve_running import LIMITS, USER, Running, asked, openai, url_of, with_images
from tiny import random_image, tiny_hd

from llava_hd.cli.listening import is_loopback, listen
from llava_hd.cli.main import main
from llava_hd.cli.serve_engine import Engine
from llava_hd.hd.limits import ResolutionLimits
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer


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


def test_the_server_keeps_to_the_limits_of_its_processor(pair) -> None:
    model, processor = pair
    limits = ResolutionLimits(max_visual_tokens=40)
    engine = Engine("tiny", model, processor.limited(limits), LIMITS)
    with Running(engine) as server:
        image = random_image((60, 90), 3)
        found = asked(server, with_images("what is on the mat?", url_of(image)))
        prompt = len(processor.limited(limits).question("what is on the mat?", [image]).ids)
        assert found.usage.prompt_tokens == prompt
        engine.processor = processor.limited(ResolutionLimits(max_visual_tokens=20))
        with pytest.raises(openai.BadRequestError, match="needs at least 26 visual tokens"):
            asked(server, with_images("what is on the mat?", url_of(image)))
