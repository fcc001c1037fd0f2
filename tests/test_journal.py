"""Journals of a run: whole lines only, cut back to a step, appended all or not at all."""

from __future__ import annotations

import errno
import json
import resource

import pytest

from llava_hd.train.journal import append_journal, cut_journal, read_journal

LINES = [{"step": step, "what": f"zwölf \u2028 {step}"} for step in (1, 2, 2, 3)]


def test_lines_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "j.jsonl"
    assert read_journal(path) == []
    append_journal(path, LINES[:2])
    append_journal(path, LINES[2:], sync=False)
    assert read_journal(path) == LINES


@pytest.mark.parametrize("cut", [1, 5, 20, 30])
def test_half_a_line_is_left_out_and_gone_before_the_next(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    append_journal(path, LINES)
    path.write_bytes(path.read_bytes()[:-cut])  # once in the middle of a character
    assert read_journal(path) == LINES[:3]
    assert cut_journal(path, 2) == LINES[:3]
    append_journal(path, [{"step": 3}])
    assert read_journal(path) == [*LINES[:3], {"step": 3}]


def test_lines_of_later_steps_are_dropped(tmp_path):
    path = tmp_path / "j.jsonl"
    assert cut_journal(path, 5) == [] and not path.exists()
    append_journal(path, LINES)
    assert cut_journal(path, 1) == LINES[:1] == read_journal(path)


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path):
    path = tmp_path / "j.jsonl"
    append_journal(path, LINES)
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"j\.jsonl") as error:
            append_journal(path, LINES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert path.stat().st_size == size and read_journal(path) == LINES


def test_what_is_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        append_journal(tmp_path / "j", [{"step": 1, "loss": float("nan")}])
    assert not (tmp_path / "j").exists() and json.dumps(LINES)
