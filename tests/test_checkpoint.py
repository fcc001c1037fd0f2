"""The state file of a run, and which checkpoints it may go on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.train.checkpoint_state import (
    STATE_FILE,
    TrainerState,
    check_resumable,
    data_digest,
    read_state,
    write_state,
)

STATE = TrainerState(
    step=3,
    num_steps=10,
    num_samples=40,
    data_digest="d1",
    samples_per_step=4,
    world_size=2,
    config={"seed": 1, "optimizer": {"lr": 0.1}, "output_dir": "a"},
)


def checkpoint(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    write_state(folder / name, STATE)
    return folder / name


def test_a_state_is_read_as_it_was_written(tmp_path):
    folder = checkpoint(tmp_path, "checkpoint-3")
    assert read_state(folder) == STATE
    assert not STATE.is_finished and replace(STATE, step=10).is_finished
    assert [path.name for path in folder.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "step": 3, "x": 1}']
)
def test_a_damaged_state_is_named(tmp_path, content):
    folder = checkpoint(tmp_path, "checkpoint-3")
    (folder / STATE_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"checkpoint-3/trainer_state\.json is damaged"):
        read_state(folder)


def test_a_folder_without_a_state_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="is not a checkpoint"):
        read_state(tmp_path)


def test_a_run_may_go_on_with_other_free_settings_and_another_number_of_ranks(tmp_path):
    folder = checkpoint(tmp_path, "checkpoint-3")
    config = {**STATE.config, "output_dir": "b", "save_steps": 5}
    fresh = replace(STATE, step=0, world_size=4, config=config)
    assert check_resumable(folder, fresh) == STATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {**STATE.config, "seed": 2}}, "another seed;"),
        ({"config": {"seed": 2, "optimizer": {"lr": 0.2}}}, r"optimizer.lr \(2 settings differ\)"),
        ({"data_digest": "d2"}, "with other contents of data.path"),
        ({"num_samples": 41}, "with 40 records, data.path has 41 now"),
    ],
)
def test_what_differs_from_the_checkpoint_is_named(tmp_path, changes, message):
    folder = checkpoint(tmp_path, "checkpoint-3")
    with pytest.raises(UsageError, match=message):
        check_resumable(folder, replace(STATE, step=0, **changes))


def test_the_digest_is_of_the_bytes_of_all_files_in_order(tmp_path):
    one, two, both = (tmp_path / name for name in "123")
    for path, content in ((one, b"a"), (two, b"b"), (both, b"ab")):
        path.write_bytes(content)
    lists = ([one], [two], [both], [one, two], [two, one])
    digests = {data_digest(paths) for paths in lists}
    one.write_bytes(b"c")
    assert len(digests | {data_digest([one, two])}) == 6
    two.write_bytes(b"b")
    one.write_bytes(b"a")
    assert data_digest([one, two]) in digests
