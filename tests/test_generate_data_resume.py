"""`llava-hd data generate` stopped and started again: nothing is asked twice, nothing is mixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from generate_command import NUM_TASKS, Bench, one_line
from openai_server import Asked, OpenAIServer, Say, good_answer

from llava_hd.train.records import read_records


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def slowly(number: int, asked: Asked) -> Say | None:
    """Some answers are invalid at first; the later half leaves time for a signal."""
    seconds = 0.05 if number < NUM_TASKS // 2 else 0.5
    if asked.body["seed"] % 4 == 0:
        return Say("no", seconds=seconds)
    return Say(good_answer(asked.body), seconds=seconds)


def stopped(
    bench: Bench, server: OpenAIServer, number: int, *more: str
) -> subprocess.CompletedProcess:
    """The command in a process of its own that gets a signal in the middle."""
    words = bench.words(server, "--tries", "5", *more)
    code = "import sys; from llava_hd.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    limit = time.monotonic() + 60
    while server.answered < NUM_TASKS // 2:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, "", errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_answers_come_in_and_nothing_is_asked_twice(
    bench: Bench, number: int
) -> None:
    with OpenAIServer(slowly) as server:
        done = stopped(bench, server, number, "--concurrency", "3")
        assert done.returncode == 75, done.stderr
        assert "answers are on their way" in done.stderr
        assert f"of {NUM_TASKS} are done; start the same command again" in one_line(done.stderr)
        assert len(server.asked) == len(bench.journal()) < NUM_TASKS + 5
        assert not (bench.out / "data.json").exists()
        assert bench.run(server, "--tries", "5") == 0
        asked = [(a.name, a.body["seed"]) for a in server.asked]
    assert len(set(asked)) == len(asked) == len(bench.journal())
    assert len(read_records([bench.out / "data.json"])) == NUM_TASKS
    resumed = bench.data()
    bench.out = bench.folder / "undisturbed"
    with OpenAIServer(slowly) as server:
        assert bench.run(server, "--tries", "5") == 0
    assert bench.data() == resumed


def test_after_a_kill_only_what_was_on_its_way_is_asked_again(bench: Bench) -> None:
    with OpenAIServer(slowly) as server:
        done = stopped(bench, server, signal.SIGKILL, "--concurrency", "3")
        assert done.returncode == -signal.SIGKILL
        kept = {line["key"] for line in bench.journal() if "record" in line}
        assert kept
        before = len(server.asked)
        assert bench.run(server, "--tries", "5") == 0
        asked = [(a.name, a.body["seed"]) for a in server.asked]
    assert len(asked) - len(set(asked)) <= 3
    lines = bench.journal()
    assert [line["key"] for line in lines[: len(kept)] if "record" in line]
    assert len({line["key"] for line in lines if "record" in line}) == NUM_TASKS
    assert len(server.asked) - before <= len(lines) - len(kept) + 3
    assert len(read_records([bench.out / "data.json"])) == NUM_TASKS


def test_a_finished_run_asks_nothing_more_and_writes_the_same(bench: Bench) -> None:
    with OpenAIServer() as server:
        assert bench.run(server) == 0
        first = bench.data()
        assert bench.run(server) == 0 and bench.run(None, "--finish") == 0
    assert bench.data() == first and len(server.asked) == NUM_TASKS


def test_more_samples_later_keep_the_earlier_ones(bench: Bench) -> None:
    with OpenAIServer() as server:
        assert bench.run(server, "--kinds", "detail=3") == 0
        first = json.loads(bench.data())
        assert bench.run(server, "--kinds", "detail=6,reasoning=2") == 0
        more = json.loads(bench.data())
        assert bench.run(server, "--kinds", "detail=3") == 0
    assert [record for record in more if record in first] == first and len(more) == 8
    assert json.loads(bench.data()) == first
    assert set(server.counts.values()) == {1} and len(server.asked) == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], "seed was 0 and is now 1"),
        (["--temperature", "0.2"], "temperature was 0.7 and is now 0.2"),
        (["--model", "large"], 'model was "small" and is now "large"'),
        (["--image-prefix", "coco"], 'image_prefix was "" and is now "coco"'),
    ],
)
def test_a_changed_setting_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with OpenAIServer() as server:
        assert bench.run(server, "--kinds", "detail=2") == 0
        capsys.readouterr()
        assert bench.run(server, *more) == 2
        error = one_line(capsys.readouterr().err)
        assert message in error and "run.json" in error
        assert len(server.asked) == 2


def test_changed_annotations_are_refused_and_a_moved_server_is_not(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer() as server:
        assert bench.run(server, "--kinds", "detail=2") == 0
    with OpenAIServer() as server:
        assert bench.run(server, "--kinds", "detail=3", "--concurrency", "1") == 0
        assert len(server.asked) == 1
        bench.captions.write_text(bench.captions.read_text().replace("quiet", "loud"))
        assert bench.run(server) == 2
        assert "captions was" in one_line(capsys.readouterr().err)


def test_a_half_written_last_line_is_asked_again(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench.out / "journal.jsonl"
    with OpenAIServer() as server:
        assert bench.run(server) == 0
        first, lines = bench.data(), path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
        assert bench.run(server) == 0
        assert "dropped a half-written last line" in capsys.readouterr().err
        assert bench.data() == first and len(server.asked) == NUM_TASKS + 1
        path.write_bytes(lines[0][:40] + b"\n" + b"".join(lines[1:]))
        assert bench.run(server) == 3
    assert "journal.jsonl:1: is no line of a journal" in one_line(capsys.readouterr().err)
    assert len(server.asked) == NUM_TASKS + 1


def test_two_runs_do_not_share_a_folder(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    codes = []

    def script(number: int, asked: Asked) -> Say | None:
        if number == 0:
            words = bench.words(server)
            code = "import sys; from llava_hd.cli.main import main; sys.exit(main(sys.argv[1:]))"
            second = subprocess.run(
                [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
            )
            codes.append((second.returncode, one_line(second.stderr)))
        return None

    with OpenAIServer(script) as server:
        assert bench.run(server) == 0
    [(code, error)] = codes
    assert code == 2 and "in use by another run" in error
    assert len(server.asked) == NUM_TASKS


def test_answers_of_unknown_settings_are_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer() as server:
        assert bench.run(server) == 0
        (bench.out / "run.json").unlink()
        assert bench.run(server) == 2
    assert "holds journal.jsonl but no run.json" in one_line(capsys.readouterr().err)
