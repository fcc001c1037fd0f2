"""The parts of `data generate`: settings, choice of images, cost, options, a full disk."""

from __future__ import annotations

import asyncio
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from generate_command import NUM_TASKS, Bench, one_line
from openai_server import OpenAIServer

from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError
from llava_hd.train.generate_context import Box, Context
from llava_hd.train.generate_cost import Ledger, Prices, worst
from llava_hd.train.generate_plan import Work, plan
from llava_hd.train.generate_prompts import load_prompts
from llava_hd.train.generate_request import Request, Usage
from llava_hd.train.generate_settings import (
    KINDS,
    Amount,
    GenerateSettings,
    Kind,
    check_endpoint,
    parse_kinds,
)

CONTEXT = Context(("A dog runs.",), (Box("dog", (0.125, 0.25, 0.681, 0.9)),))


def test_larger_amounts_hold_the_smaller_ones_and_kinds_are_mixed() -> None:
    contexts = {f"{i}.jpg": CONTEXT for i in range(200)}

    def chosen(seed: int, **counts: int) -> list[tuple[Kind, str]]:
        amounts = {kind: Amount(count=counts[kind]) for kind in KINDS if kind in counts}
        return [(task.kind, task.image) for task in plan(contexts, amounts, seed)]

    few = chosen(0, conversation=30, reasoning=60)
    many = chosen(0, conversation=90, detail=10, reasoning=61)
    assert set(few) < set(many) and len(set(many)) == 161
    first = [kind for kind, _ in few[:30]]
    assert 8 <= first.count("conversation") <= 12
    assert {name for kind, name in few if kind == "conversation"} != {
        name for kind, name in chosen(1, conversation=30)
    }
    shuffled = dict(random.Random(0).sample(list(contexts.items()), 200))
    assert [
        (task.kind, task.image) for task in plan(shuffled, {"detail": Amount(share=0.1)}, 0)
    ] == chosen(0, detail=20)


def test_the_written_order_keeps_earlier_records_in_theirs() -> None:
    contexts = {f"{i}.jpg": CONTEXT for i in range(50)}
    orders = []
    for count in (20, 50):
        tasks = plan(contexts, {"detail": Amount(count=count)}, 0)
        orders.append(Work(GenerateSettings("m"), load_prompts(), contexts, tasks).in_order())
    few, many = orders
    assert [task for task in many if task in few] == few and few != sorted(few, key=str)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xyz=3", "'xyz' is unknown; there is conversation, detail, reasoning"),
        ("detials=3", "did you mean 'detail'"),
        ("detail", "detail has no amount"),
        ("detail=x", "detail=x is no number"),
        ("detail=0", "is below 1"),
        ("detail=1.5", "no share above 0"),
        ("detail=120%", "no share above 0"),
        ("detail=1.nan", "no number"),
        ("detail=3,detail=4", "names detail twice"),
    ],
)
def test_wrong_amounts_are_told(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_kinds(text)


def test_amounts_are_counts_or_shares() -> None:
    found = parse_kinds("reasoning=7, conversation=0.5,detail=25%")
    assert list(found) == list(KINDS)
    assert [found[kind].of(40, kind) for kind in KINDS] == [20, 10, 7]
    with pytest.raises(UsageError, match="reasoning=7: there are only 6 images"):
        found["reasoning"].of(6, "reasoning")


@pytest.mark.parametrize("url", ["x", "ftp://a/v1", "http://", "http://u:secret@h/v1", "http://[",
                                 "http://h/v1?key=secret", "http://h/v1#secret"])  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_endpoint(url)
    assert "secret" not in str(caught.value)
    assert check_endpoint("http://localhost:8000/v1/") == "http://localhost:8000/v1"


def test_a_request_waits_for_room_below_the_limit() -> None:
    async def story() -> list[str]:
        ledger, told = Ledger(Prices(1e6, 1e6, 9.5), Usage(1, 0)), []
        most = Usage(3, 2)

        async def one(name: str, used: Usage) -> None:
            if not await ledger.reserve(most):
                told.append(f"{name} has no room")
                return
            told.append(f"{name} goes")
            await asyncio.sleep(0)
            await ledger.settle(most, used)

        await asyncio.gather(one("a", Usage(1, 1)), one("b", Usage(1, 1)), one("c", Usage(1, 0)))
        assert ledger.cost == 5.0
        return told

    assert asyncio.run(story()) == ["a goes", "b goes", "c has no room"]


def test_the_worst_case_is_above_any_count() -> None:
    texts = ("system text", "\u00e4\u00f6\u00fc \U0001f600")
    request = Request((("system", texts[0]), ("user", texts[1])), 50, None, None)
    assert worst(request) == Usage(len("".join(texts).encode()) + 32, 50)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0, None, None), "--price-out is missing"),
        ((None, None, 3.0), "--max-cost needs the prices"),
        ((-1.0, 1.0, None), "--price-in -1 is no price"),
        ((1.0, float("nan"), None), "--price-out nan is no price"),
    ],
)
def test_prices_are_checked(values: tuple[float | None, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Prices(*values)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kinds", "detail=9"], "there are only 8 images"),
        (["--concurrency", "0"], "--concurrency 0: give a number from 1"),
        (["--tries", "0"], "--tries 0"),
        (["--timeout", "0"], "--timeout 0"),
        (["--retries", "-1"], "--retries -1"),
        (["--temperature", "3"], "temperature must be from 0 to 2"),
        (["--limit-field", "tokens"], "--limit_field must be one of"),
        (["--image-prefix", "../x"], "leaves the image folder"),
        (["--key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE holds no key; set it"),
        (["--estimate", "--finish"], "do not go together"),
        (["--seed", "-1"], "seed must be 0 or more"),
    ],
)
def test_wrong_options_are_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], message: str,
) -> None:  # fmt: skip
    bench = Bench(tmp_path, monkeypatch)
    assert bench.run(None, *more) == 2
    assert message in one_line(capsys.readouterr().err) and not bench.out.exists()


def test_a_key_that_no_header_takes_is_refused_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nsecond line")
    assert bench.run(None) == 2
    error = one_line(capsys.readouterr().err)
    assert "holds no key but other text" in error and "secret" not in error


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file grows beyond 6,000 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    small_files: None,
) -> None:  # fmt: skip
    bench = Bench(tmp_path, monkeypatch)
    with OpenAIServer() as server:
        assert bench.run(server, "--concurrency", "3") == 1
        assert "journal.jsonl: File too large" in one_line(capsys.readouterr().err)
        kept = bench.journal()
        assert 0 < len(kept) < NUM_TASKS
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert bench.run(server) == 0
    assert bench.journal()[: len(kept)] == kept and len(bench.journal()) == NUM_TASKS
    assert len(server.asked) <= NUM_TASKS + 3


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "generate", "--help"])
    told = capsys.readouterr().out
    assert "--max-cost" in told and "llava-hd data generate --captions" in told
