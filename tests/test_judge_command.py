"""`llava-hd judge` against a local server: all pairs once, resumed, bounded; refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_files import CATEGORIES, make, write_lines
from openai_server import Asked, OpenAIServer, Say, failing
from tiny import random_image, save_llava_next, tiny_tokenizer

from llava_hd.cli.main import main

KEY = "sk-test-judge-0123456789"


def judged(number: int, asked: Asked) -> Say:
    """8 for the reference, 6 for the model, whatever the order."""
    text = asked.body["messages"][-1]["content"]
    scores = "6 8" if "[Assistant 1]\nanswers" in text else "8 6"
    return Say(f"{scores}\nThe one is better.")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return make(tmp_path)


def words_of(folder: Path, server: OpenAIServer, *more: object) -> list[str]:
    files = [f"--{name}={folder / name}.jsonl" for name in
             ("questions", "context", "reference", "answers")]  # fmt: skip
    options = ["--model", "judge", "--endpoint", server.url, "--out", folder / "out", *more]
    return [str(word) for word in ("judge", *files, *options)]


def files_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "out").iterdir()))


def test_all_pairs_are_judged_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with OpenAIServer(judged) as server:
        assert main(words_of(folder, server, "--json")) == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["categories"]["all"]["relative_score"] == 75
        assert set(scores["categories"]) == {"all", *CATEGORIES}
        assert (scores["judge"], scores["rejected"]) == ("judge", 0)
        assert len(server.asked) == 12 and {asked.key for asked in server.asked} == {KEY}
        assert main(words_of(folder, server)) == 0  # all is there: nothing is asked
        assert len(server.asked) == 12
    out = capsys.readouterr().out
    assert "75.0" in out and "our own" in out
    lines = [json.loads(x) for x in (folder / "out" / "reviews.jsonl").read_text().splitlines()]
    assert [line["tuple"] for line in lines] == [[8, 6]] * 12
    assert KEY not in files_of(folder)


def test_both_orders_give_the_same_where_the_judge_does_not_care(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer(judged) as server:
        assert main(words_of(folder, server, "--both-orders", "--json")) == 0
        assert len(server.asked) == 24
    assert json.loads(capsys.readouterr().out)["categories"]["all"]["relative_score"] == 75


def test_nonsense_is_asked_again_and_in_the_end_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(number: int, asked: Asked) -> Say:
        text = asked.body["messages"][-1]["content"]
        never = "What about 3?" in text
        first = sum(text == other.body["messages"][-1]["content"] for other in server.asked) == 1
        return Say("They are equally good.") if never or first else judged(number, asked)

    with OpenAIServer(script) as server:
        assert main(words_of(folder, server, "--tries", 2, "--json")) == 0
        assert len(server.asked) == 24
    scores = json.loads(capsys.readouterr().out)
    assert scores["rejected"] == 1
    assert scores["categories"]["all"]["judgements"] == 11
    assert scores["categories"]["all"]["relative_score"] == 75
    [rejected] = (folder / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["key"] == "3"
    assert json.loads(rejected)["reason"] == "no two scores on the first line"


def test_a_judge_that_only_talks_nonsense_is_a_failure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer(lambda number, asked: Say("Nice.")) as server:
        assert main(words_of(folder, server, "--tries", 1)) == 1
    assert "no judgement can be read" in capsys.readouterr().err
    assert not (folder / "out" / "scores.json").exists()


def test_a_judge_that_times_out_loses_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = {"What about 5?", "What about 6?"}

    def script(number: int, asked: Asked) -> Say | None:
        text = asked.body["messages"][-1]["content"]
        if any(question in text for question in slow):
            return Say("8 6", seconds=6.0)
        return judged(number, asked)

    with OpenAIServer(script) as server:
        patience = ["--timeout", 3.0, "--retries", 0]
        assert main(words_of(folder, server, *patience)) == 1
        err = capsys.readouterr().err
        assert "2 requests got no answer" in err and "within 3 s" in err
        assert "10 of 12 are done" in err and "start the same command again" in err
        before = len(server.asked)
        slow.clear()
        assert main(words_of(folder, server, *patience)) == 0
        assert len(server.asked) == before + 2
    assert KEY not in files_of(folder) + err


def test_requests_at_a_time_are_bounded(folder: Path) -> None:
    now, most = [0], [0]

    def script(number: int, asked: Asked) -> Say:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.05)
        now[0] -= 1
        return judged(number, asked)

    with OpenAIServer(script) as server:
        assert main(words_of(folder, server, "--concurrency", 3)) == 0
    assert 1 < most[0] <= 3


def test_a_wrong_key_is_told_without_the_key(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer(lambda number, asked: failing(401, f"bad key {KEY}")) as server:
        assert main(words_of(folder, server, "--debug")) == 2
    done = capsys.readouterr()
    assert "OPENAI_API_KEY" in done.err
    assert KEY not in done.err + done.out + files_of(folder)


def test_an_interrupted_run_goes_on(folder: Path) -> None:
    def script(number: int, asked: Asked) -> Say:
        return Say("8 6", seconds=0.0 if number < 4 else 0.6)

    with OpenAIServer(script) as server:
        words = words_of(folder, server, "--concurrency", 1)
        process = subprocess.Popen(
            [sys.executable, "-m", "llava_hd.cli.main", *words], stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "OPENAI_API_KEY": KEY},
        )  # fmt: skip
        while len(server.asked) < 5 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
        asked = len(server.asked)
        assert main(words) == 0
        assert len(server.asked) == 12  # nothing twice
        assert asked < 12


@pytest.mark.parametrize("other", ["--seed=1", "--both-orders", "--model=another"])
def test_another_setting_does_not_go_into_the_same_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    with OpenAIServer(judged) as server:
        assert main(words_of(folder, server)) == 0
        assert main(words_of(folder, server, other)) == 2
    assert " was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (["--answers="], 2, "--answers is missing"),
        (["--tries=0"], 2, "--tries 0"),
        (["--temperature=3"], 2, "--temperature 3"),
        (["--seed=-1"], 2, "--seed -1"),
        (["--endpoint=ftp://x"], 2, "--endpoint"),
        (["--answers=short.jsonl"], 3, "11 of 12 questions have no answer"),
        (["--reference=strange.jsonl"], 3, "question_id 99 is not among"),
    ],
)
def test_bad_usage_and_data_are_one_line_and_ask_nothing(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    code: int,
    said: str,
) -> None:
    write_lines(folder / "short.jsonl", [{"question_id": 0, "text": "x"}])
    write_lines(folder / "strange.jsonl", [{"question_id": 99, "text": "x"}])
    monkeypatch.chdir(folder)
    with OpenAIServer(judged) as server:
        assert main([*words_of(folder, server), *change]) == code
        assert not server.asked
    err = capsys.readouterr().err
    assert (said in err, err.count("\n")) == (True, 1)
    assert not (folder / "out").exists()


def test_a_missing_key_is_told_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with OpenAIServer(judged) as server:
        assert main(words_of(folder, server)) == 2
        assert main(words_of(folder, server, "--no-key")) == 0
    assert "holds no key" in capsys.readouterr().err


def test_a_model_answers_the_bench_and_is_judged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder / "model"
    save_llava_next(model, "hd448")
    tiny_tokenizer().save_pretrained(model)
    (folder / "images").mkdir()
    for number in range(4):
        random_image((40, 50), number).save(folder / "images" / f"{number:03}.png")
    words = ["eval", "llava-bench", "--model", model, "--questions", folder / "questions.jsonl"]
    words += ["--images", folder / "images", "--out", folder / "asked", "--device", "cpu"]
    words += ["--max-new-tokens", 4, "--batch-size", 5, "--json"]
    assert main([str(word) for word in words]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 12
    with OpenAIServer(lambda number, asked: Say("8 6")) as server:
        assert main(words_of(folder, server, "--answers", folder / "asked")) == 0
        texts = [asked.body["messages"][-1]["content"] for asked in server.asked]
    answers = (folder / "asked" / "answers.jsonl").read_text().splitlines()
    for line in map(json.loads, answers):
        assert any(f"[Assistant 2]\n{line['text']}\n" in text for text in texts)
