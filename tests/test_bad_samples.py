"""Bad samples are counted once each, written down whole, and bounded; a resumed run goes on with
the count of the step that it begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_hd.hd.errors import DataError
from llava_hd.train.bad_samples import BadSample, BadSamples, allowed_bad


def bad(*indices: int) -> list[BadSample]:
    return [BadSample(index, f"data.json: record {index}: café", False) for index in indices]


def started(folder: Path, first_step: int = 0, limit: float = 1.0) -> BadSamples:
    """Those of a run with 10 samples, on rank 0, with its output folder open."""
    samples = BadSamples(folder, 10, limit, first_step)
    samples.open()
    return samples


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(folder: Path) -> list[tuple[int, int]]:
    """(step, index) of each line."""
    return [(line["step"], line["index"]) for line in lines(folder)]


def test_a_share_of_the_samples_may_be_bad_rounded_up():
    assert [allowed_bad(0.001, n) for n in (1, 1000, 1001, 665_000)] == [1, 1, 2, 665]
    assert (allowed_bad(0.0, 1000), allowed_bad(1.0, 1000)) == (0, 1000)


def test_each_bad_sample_is_a_line_with_its_reason(tmp_path):
    samples = started(tmp_path)
    assert len(samples.add(1, [BadSample(7, "a.png: empty", True)], write=True)) == 1
    assert lines(tmp_path) == [
        {"step": 1, "index": 7, "reason": "a.png: empty", "kept_text": True},
    ]


def test_only_the_main_rank_writes_and_all_count(tmp_path):
    samples = BadSamples(tmp_path, 10, 1.0, 0)
    assert len(samples.add(1, bad(3, 4), write=False)) == 2
    assert samples.seen == {3, 4} and list(tmp_path.iterdir()) == []


def test_a_sample_that_comes_again_in_a_later_epoch_counts_once(tmp_path):
    samples = started(tmp_path, limit=0.2)
    assert len(samples.add(1, bad(3, 4), write=True)) == 2
    assert len(samples.add(9, bad(4, 3), write=True)) == 0
    assert written(tmp_path) == [(1, 3), (1, 4)]


def test_a_sample_that_stands_twice_in_a_step_counts_once(tmp_path):
    samples = started(tmp_path)
    assert len(samples.add(1, bad(3, 4, 3), write=True)) == 2
    assert written(tmp_path) == [(1, 3), (1, 4)]


def test_the_bad_samples_of_the_first_step_stay_when_the_output_is_opened(tmp_path):
    """A run reads its first step before it opens its output folder."""
    for first in (0, 1):
        samples = BadSamples(tmp_path, 10, 1.0, first_step=first)
        samples.add(first + 1, bad(3 + first), write=True)
        samples.open()
        samples.add(first + 2, bad(8), write=True)
    assert written(tmp_path) == [(1, 3), (2, 4), (3, 8)]


@pytest.mark.parametrize("is_main", [True, False])
def test_one_above_the_limit_stops_every_rank_with_one_line(tmp_path, is_main):
    samples = started(tmp_path, limit=0.2)
    samples.add(1, bad(3, 4), write=is_main)
    with pytest.raises(DataError) as caught:
        samples.add(2, bad(5), write=is_main)
    message = str(caught.value)
    assert "3 of 10 samples are bad, 2 are allowed (data.bad_sample_limit)" in message
    assert "record 5" in message and "data check" in message and "\n" not in message
    assert (tmp_path / "bad_samples.jsonl").exists() == is_main
    if is_main:
        assert written(tmp_path)[-1] == (2, 5)  # what broke the limit is told as well


def test_a_resumed_run_drops_the_lines_of_later_steps_and_counts_the_others(tmp_path):
    samples = started(tmp_path)
    for step in (1, 2, 3, 4):
        samples.add(step, bad(step, 9), write=True)
    resumed = started(tmp_path, first_step=2, limit=0.4)
    assert written(tmp_path) == [(1, 1), (1, 9), (2, 2)]
    assert len(resumed.add(3, bad(3, 9), write=True)) == 1
    assert written(tmp_path) == [(1, 1), (1, 9), (2, 2), (3, 3)]
    with pytest.raises(DataError, match="5 of 10"):
        resumed.add(4, bad(4), write=True)


@pytest.mark.parametrize("cut", ["in a word", "in a character", "before the line break"])
def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path, cut):
    samples = started(tmp_path)
    samples.add(1, bad(3), write=True)
    samples.add(2, bad(4), write=True)
    path = tmp_path / "bad_samples.jsonl"
    whole = path.read_bytes()
    ends = {
        "in a word": whole.rindex(b"record"),
        "in a character": whole.rindex(b"\xc3\xa9") + 1,
        "before the line break": len(whole) - 1,
    }
    path.write_bytes(whole[: ends[cut]])
    resumed = BadSamples(tmp_path, 10, 1.0, first_step=1)
    resumed.add(2, bad(4), write=True)  # read before the output folder is opened
    resumed.open()
    resumed.add(3, bad(5), write=True)
    assert written(tmp_path) == [(1, 3), (2, 4), (3, 5)]


def test_a_fresh_run_drops_what_a_run_before_it_left(tmp_path):
    started(tmp_path).add(1, bad(3), write=True)
    assert started(tmp_path, first_step=0).seen == set()
    assert written(tmp_path) == []
