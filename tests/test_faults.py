"""The short version of `make faults`: real runs of two ranks broken in each way, a few of each.

It runs as a command of its own: its ranks are forks of a process that must not have threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_hd.bench.faults import BEGIN, END, page_with

COMMAND = [sys.executable, "-m", "llava_hd.cli.main", "bench", "faults", "--quick", "--json"]
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(900)  # one fixture makes all runs


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What the quick run of all parts found."""
    done = subprocess.run(
        COMMAND,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return json.loads(done.stdout)


def bad(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not row["ok"]]


def test_resumed_runs_have_the_same_bits_and_at_other_ranks_nearly_the_same_losses(record):
    rows = record["resume"]["rows"]
    assert not bad(rows)
    same = [row for row in rows if row["ranks"] == [2, 2]]
    assert {(row["stage"], row["precision"]) for row in same} == {
        (stage, precision) for stage in (2, 3) for precision in ("fp32", "bf16")
    }
    assert {row["place"] for row in same} == {"mid-epoch", "epoch end", "mid-accumulation"}
    assert all(row["bit_identical"] for row in same)
    assert {tuple(row["ranks"]) for row in rows} == {(2, 2), (2, 1), (1, 2)}


def test_killed_runs_go_on_and_end_with_the_same_bits(record):
    ours = [row for row in record["kill"]["rows"] if row["who"] == "llava-hd"]
    assert [row["stage"] for row in ours] == [2, 3] and not bad(ours)
    for row in ours:
        assert row["kills"] >= 2 and row["lost"] == 0 and row["equal"] == row["runs"] > 0


def test_every_broken_file_is_found_and_the_older_checkpoint_used(record):
    rows = record["torn"]["rows"]
    assert not bad(rows)
    files = {row["file"] for row in rows if "fault" in row}
    assert {"MANIFEST.json", "model.safetensors", "trainer_state.json"} < files
    assert sum(name.startswith("optimizer/") for name in files) == 2
    assert rows[-1]["ok"]  # a real run went on past a flipped bit


def test_a_save_that_fails_on_one_rank_stops_no_other(record):
    rows = record["save"]["rows"]
    assert {(row["rank"], row["stage"]) for row in rows} == {(0, 2), (1, 3)} and not bad(rows)


def test_no_mix_of_images_and_text_hangs(record):
    assert [(row["finished"], row["hangs"]) for row in record["modality"]["rows"]] == [
        (10, 0),
        (10, 0),
    ]


def test_steps_that_are_not_finite_are_skipped_written_down_and_bounded(record):
    rows = record["nonfinite"]["rows"]
    assert not bad(rows)
    assert {row["often"] for row in rows} == {"once", "forever"}
    assert {row["stage"] for row in rows} == {2, 3}


def test_bad_images_and_records_are_counted_exactly(record):
    assert record["data"]["rows"] and not bad(record["data"]["rows"])


def test_the_page_holds_the_figures_of_the_records(record):
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    written = page_with(page, record, Path("results"))
    figures = written.split(BEGIN)[1].split(END)[0]
    assert len(record) == 7 and all(part["text"] in figures for part in record.values())
    assert written.split(BEGIN)[0] == page.split(BEGIN)[0]
    assert page_with(written, record, Path("results")) == written
