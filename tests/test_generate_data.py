"""`llava-hd data generate` with the real client and a local server: answers, faults, cost, key."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from generate_command import KEY, NUM_TASKS, Bench, one_line
from openai_server import Asked, OpenAIServer, Say, failing, good_answer, tokens

from llava_hd.train.records import read_records


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_three_kinds_of_answers_become_records_that_the_trainer_reads(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer() as server:
        assert bench.run(server, "--image-prefix", "coco/train2017", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    records = read_records([bench.out / "data.json"])
    kinds = Counter(str(record.id).partition("/")[0] for record in records)
    assert kinds == {"conversation": 5, "detail": 4, "reasoning": 6} == summary["kinds"]
    assert len({record.id for record in records}) == NUM_TASKS == len(server.asked)
    for record in records:
        kind, _, name = str(record.id).partition("/")
        assert record.images == (f"coco/train2017/{name}",)
        assert record.turns[0].text.startswith("<image>\n")
        assert len(record.turns) == (6 if kind == "conversation" else 2)
        assert not any(turn.text.startswith(("Q:", "A:")) for turn in record.turns)
    assert summary["rejected"] == 0 and bench.rejected() == {}


def test_the_model_reads_captions_and_boxes_and_the_key_is_sent(bench: Bench) -> None:
    with OpenAIServer() as server:
        assert bench.run(server) == 0
    assert {asked.key for asked in server.asked} == {KEY}
    told = {asked.body["messages"][-1]["content"].partition("\n\nQuestion: ")[0]
            for asked in server.asked}  # fmt: skip
    assert "A boat number 2 in a quiet place.\n\ndog: [0.103, 0.100, 0.603, 0.601]" in told
    for asked in server.asked:
        roles = [message["role"] for message in asked.body["messages"]]
        assert roles == ["system", *["user", "assistant"] * 2, "user"]
        assert asked.body["model"] == "small" and asked.body["max_tokens"] == 1024


def test_the_order_of_the_answers_does_not_matter(bench: Bench) -> None:
    """Slow and invalid answers, one request at a time and eight."""

    def script(number: int, asked: Asked) -> Say | None:
        seed = asked.body["seed"]
        slow = (seed % 7) / 200
        return (
            Say("no", seconds=slow) if seed % 3 == 0 else Say(good_answer(asked.body), seconds=slow)
        )

    found = []
    for concurrency in ("1", "8"):
        bench.out = bench.folder / concurrency
        with OpenAIServer(script) as server:
            assert bench.run(server, "--concurrency", concurrency, "--tries", "4") == 0
        found.append((bench.data(), (bench.out / "rejected.jsonl").read_bytes(), server.counts))
    assert found[0] == found[1]
    assert max(found[0][2].values()) > 1


def test_rate_limits_and_server_errors_are_retried_by_the_client(bench: Bench) -> None:
    faults = {0: 429, 1: 500, 2: 503, 5: 429, 6: 502, 9: 408}

    def script(number: int, asked: Asked) -> Say | None:
        return failing(faults[number]) if number in faults else None

    with OpenAIServer(script) as server:
        assert bench.run(server) == 0
    assert len(server.asked) == NUM_TASKS + len(faults)
    assert len(bench.journal()) == NUM_TASKS == len(read_records([bench.out / "data.json"]))


def test_timeouts_and_lost_connections_are_retried(bench: Bench) -> None:
    def script(number: int, asked: Asked) -> Say | None:
        if number == 0:
            return Say(good_answer(asked.body), seconds=3.0)
        return Say(hang_up=True) if number == 1 else None

    with OpenAIServer(script) as server:
        assert bench.run(server, "--timeout", "2") == 0
    assert sorted(server.counts.values())[-2:] == [2, 2] and len(server.counts) == NUM_TASKS
    assert len(read_records([bench.out / "data.json"])) == NUM_TASKS


def test_requests_without_an_answer_are_left_for_the_next_run(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer(lambda n, asked: failing(500) if n == 3 else None) as server:
        assert bench.run(server, "--retries", "0", "--concurrency", "1") == 1
        error = one_line(capsys.readouterr().err)
        assert "1 requests got no answer" in error and "500: not now" in error
        assert "start the same command again" in error and f"14 of {NUM_TASKS} are done" in error
        assert not (bench.out / "data.json").exists()
        assert bench.run(server) == 0
    assert len(server.asked) == NUM_TASKS + 1
    assert len(read_records([bench.out / "data.json"])) == NUM_TASKS


def test_a_server_that_always_fails_stops_the_run_soon(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer(lambda n, asked: failing(429, "slow down")) as server:
        assert bench.run(server, "--retries", "1", "--concurrency", "2") == 1
    assert "429: slow down; 5 requests in a row" in one_line(capsys.readouterr().err)
    assert len(server.asked) <= 2 * (5 + 1)


def test_no_server_at_all_is_told_in_one_line(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer() as server:
        pass
    assert bench.run(server, "--retries", "0") == 1
    assert f"{server.url} cannot be reached" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("reply", "code", "message"),
    [
        (failing(401, f"Incorrect API key {KEY}"), 2, "does not take the key in OPENAI_API_KEY"),
        (failing(403, f"Not for {KEY}"), 2, "does not take the key in OPENAI_API_KEY (403)"),
        (failing(404, "no such model"), 2, "does not know the model 'small'"),
        (failing(429, "used up", "insufficient_quota"), 1, "no money or quota left (429)"),
        (failing(405, "no"), 2, "answered 405: no; check --endpoint"),
    ],
)
def test_faults_of_the_whole_run_stop_it_at_once(
    bench: Bench, capsys: pytest.CaptureFixture[str], reply: Say, code: int, message: str
) -> None:
    with OpenAIServer(lambda n, asked: reply) as server:
        assert bench.run(server, "--concurrency", "2", "--retries", "1") == code
    assert message in one_line(capsys.readouterr().err)
    assert len(server.asked) <= 4  # two on their way, each retried once at most
    assert bench.journal() == []


def test_refused_requests_are_rejected_and_a_server_that_refuses_all_stops_the_run(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer(lambda n, asked: failing(400, "no field seed")) as server:
        assert bench.run(server, "--concurrency", "1") == 2
        assert "400: no field seed" in one_line(capsys.readouterr().err)
        assert len(server.asked) == 5 and bench.journal() == []
        server.script = lambda n, asked: failing(400, "filtered") if n == 5 else None
        assert bench.run(server, "--concurrency", "1") == 0
    [reason] = bench.rejected().values()
    assert reason == "refused by the server (400: filtered)"
    assert len(read_records([bench.out / "data.json"])) == NUM_TASKS - 1


MALFORMED = [
    Say(body="<html>busy</html>"),
    Say(body="{"),
    Say(body="[]"),
    Say(body="null"),
    Say(body={}),
    Say(body={"choices": []}),
    Say(body={"choices": None}),
    Say(body={"choices": "none"}),
    Say(body={"choices": [{}]}),
    Say(body={"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}),
    Say(text=None),
    Say(text=""),
    Say(text="half of it", finish="length"),
    Say(text="no", finish="content_filter"),
]


@pytest.mark.parametrize("reply", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_replies_are_asked_for_again(bench: Bench, reply: Say) -> None:
    with OpenAIServer(lambda n, asked: reply if n == 0 else None) as server:
        assert bench.run(server, "--kinds", "detail=2") == 0
    assert len(server.asked) == 3
    faults = [line["fault"] for line in bench.journal() if "fault" in line]
    assert len(faults) == 1 and ("server" in faults[0] or faults[0] == "cut off at max_tokens")
    assert len(read_records([bench.out / "data.json"])) == 2


def test_invalid_answers_are_asked_for_again_hotter_and_rejected_in_the_end(bench: Bench) -> None:
    def script(number: int, asked: Asked) -> Say | None:
        told = asked.body["messages"][-1]["content"]
        return Say("Q: What?\nA: A caption says it.") if "boat" in told else None

    with OpenAIServer(script) as server:
        assert bench.run(server, "--kinds", "reasoning=100%") == 0
    [(key, reason)] = bench.rejected().items()
    assert key == "reasoning/000000000012.jpg" and reason == "speaks of captions"
    tried = [
        asked.body for asked in server.asked if "boat" in asked.body["messages"][-1]["content"]
    ]
    assert sorted(body["temperature"] for body in tried) == [0.7, 0.9, 1.0]
    assert len({body["seed"] for body in tried}) == 3
    summary = json.loads((bench.out / "summary.json").read_text())
    assert summary["invalid"] == {"speaks of captions": 3} and summary["rejected"] == 1
    assert len(read_records([bench.out / "data.json"])) == 7


def test_nothing_valid_is_an_error(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with OpenAIServer(lambda n, asked: Say("no")) as server:
        assert bench.run(server, "--tries", "1") == 1
    assert "no answer is valid" in one_line(capsys.readouterr().err)
    assert len(bench.rejected()) == NUM_TASKS and not (bench.out / "data.json").exists()


def test_the_key_is_in_no_file_and_in_no_output(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even where the server sends it back in its errors and answers."""

    def script(number: int, asked: Asked) -> Say | None:
        if number < 4:
            return failing((400, 429, 500, 503)[number], f"with {asked.key}")
        if number == 5:
            return Say(f"your key is {asked.key}")
        return failing(401, f"not {asked.key}") if number == 12 else None

    with OpenAIServer(script) as server:
        assert bench.run(server, "--retries", "0", "--concurrency", "1", "--debug") == 2
        server.script = lambda n, asked: None
        assert bench.run(server, "--json") == 0
    told = capsys.readouterr()
    assert "not take the key" in told.err and "Traceback" in told.err
    assert "[key]" in bench.files()
    for text in (bench.files(), told.out, told.err):
        assert KEY not in text


def test_the_estimate_counts_the_requests_and_asks_nothing(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    prices = ("--price-in", "2", "--price-out", "8")
    with OpenAIServer() as server:
        assert bench.run(server, "--estimate", "--json", *prices) == 0
        assert not server.asked and not bench.out.exists()
        values = json.loads(capsys.readouterr().out)
        monkeypatch.setenv("OTHER", KEY)
        assert bench.run(server, *prices, "--key-env", "OTHER") == 0
    told = capsys.readouterr()
    assert values["requests"] == len(server.asked) == NUM_TASKS
    assert values["most_requests"] == 3 * NUM_TASKS
    sent = [message["content"] for asked in server.asked for message in asked.body["messages"]]
    assert values["prompt_tokens"] == sum(-(-len(text) // 4) + 4 for text in sent)
    assert values["cost"] == pytest.approx(
        (2 * values["prompt_tokens"] + 8 * values["answer_tokens"]) / 1e6
    )
    assert values["cost"] < values["most_cost"]
    assert "estimate; tokens by characters / 4" in told.err
    # Afterwards the server's own counts.
    summary = json.loads((bench.out / "summary.json").read_text())
    answers = [good_answer(asked.body) for asked in server.asked]
    assert summary["prompt_tokens"] == sum(map(tokens, sent))
    assert summary["answer_tokens"] == sum(map(tokens, answers))
    assert summary["cost"] == pytest.approx(
        (2 * summary["prompt_tokens"] + 8 * summary["answer_tokens"]) / 1e6
    )
    assert summary["requests_counted_by_rule"] == 0


def test_a_tokenizer_counts_instead_of_the_rule(
    bench: Bench, capsys: pytest.CaptureFixture[str], parts: Path
) -> None:
    assert bench.run(None, "--estimate", "--json") == 0
    by_rule = json.loads(capsys.readouterr().out)
    assert bench.run(None, "--estimate", "--json", "--tokenizer", str(parts / "language")) == 0
    exact = json.loads(capsys.readouterr().out)
    assert exact["requests"] == by_rule["requests"]
    assert exact["prompt_tokens"] != by_rule["prompt_tokens"] > 0
    assert "tokenizer" in exact["tokens_counted_by"]


def test_the_cost_never_passes_its_limit_and_a_higher_one_goes_on(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = ("--price-in", "100", "--price-out", "100")
    with OpenAIServer() as server:
        assert bench.run(server, *prices, "--max-cost", "1.2") == 75
        told = capsys.readouterr().err
        assert "might pass --max-cost 1.2" in one_line(told)
        assert "above --max-cost 1.2: the run will stop" in told
        used = [line["prompt_tokens"] + line["answer_tokens"] for line in bench.journal()]
        assert 0.3 < sum(used) / 1e4 <= 1.2
        before = len(server.asked)
        assert 0 < before < NUM_TASKS
        assert bench.run(server, *prices, "--finish") == 0
        assert len(read_records([bench.out / "data.json"])) == before == len(server.asked)
        assert bench.run(server, *prices, "--max-cost", "50") == 0
    assert len(server.asked) == NUM_TASKS
    assert set(server.counts.values()) == {1}


def test_usage_that_the_server_does_not_tell_is_counted_by_the_rule(bench: Bench) -> None:
    with OpenAIServer(lambda n, asked: Say(good_answer(asked.body), usage=False)) as server:
        assert bench.run(server, "--price-in", "1", "--price-out", "1") == 0
    summary = json.loads((bench.out / "summary.json").read_text())
    assert summary["requests_counted_by_rule"] == NUM_TASKS and summary["cost"] > 0


def test_fields_that_a_server_does_not_know_can_be_left_out(bench: Bench) -> None:
    more = ("--no-seed", "--temperature", "null", "--limit-field", "max_completion_tokens")
    with OpenAIServer() as server:
        assert bench.run(server, *more, "--max-tokens", "500", "--no-key") == 0
    assert {tuple(sorted(asked.body)) for asked in server.asked} == {
        ("max_completion_tokens", "messages", "model")
    }
    assert server.asked[0].body["max_completion_tokens"] == 500
    assert {asked.key for asked in server.asked} == {"none"}
