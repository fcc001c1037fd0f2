"""Every bad image and record under every policy: what is counted is what was put in, exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_hd
from train_data import tiny_config

from llava_hd.bench.faults_data import POLICIES, read_alone
from llava_hd.bench.faults_images import fine_images, image_faults
from llava_hd.bench.faults_records import (
    KINDS,
    FaultyData,
    file_faults,
    record_faults,
    write_image_data,
    write_record_data,
)
from llava_hd.hd.errors import DataError
from llava_hd.model.assemble import assemble
from llava_hd.model.processor import Processor
from llava_hd.train.metrics import read_metrics
from llava_hd.train.run import train
from llava_hd.train.sources import open_records

NAMES = ("images", *KINDS)


@pytest.fixture(scope="module")
def processor(parts: Path) -> Processor:
    _, made = assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex"))
    return made


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FaultyData]:
    """A data set of each kind, with one folder of images."""
    folder = tmp_path_factory.mktemp("faults")
    found = {"images": write_image_data(folder, image_faults())}
    return found | {kind: write_record_data(folder, kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def mixed(sets: dict[str, FaultyData]) -> dict[int, Any]:
    """The faults of all data sets laid end to end, by index."""
    due, start = {}, 0
    for name in NAMES:
        due.update({start + index: fault for index, fault in sets[name].due.items()})
        start += sets[name].count
    return due


def mixed_config(sets: dict[str, FaultyData], parts: Path, out: Path, policy: str, **more: Any):
    due, count = mixed(sets), sum(data.count for data in sets.values())
    settings = sets["images"].settings(policy) | {
        "data__path": [str(sets[name].path) for name in NAMES],
        "data__bad_sample_limit": (len(due) - 0.5) / count,
        "data__template": "vicuna_v1",
        "stage": "pretrain",
        "per_device_batch_size": 4,
        "global_batch_size": 16,
        "max_steps": None,
    }
    return tiny_config(sets["images"].path.parent, parts, out, **settings | more)


def told(out: Path) -> list[dict[str, Any]]:
    text = (out / "bad_samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def test_there_are_as_many_faults_as_promised_and_each_once():
    images, records = image_faults(), record_faults()
    assert len(images) == 40 and len(records) >= 30
    assert len({one.file for one in (*images, *fine_images())}) == 40 + len(fine_images())
    assert len({(one.kind, one.name) for one in records}) == len(records)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_each_record_alone_is_what_it_should_be(sets, processor, name, policy):
    """One line that names file, record and reason for a fault; nothing for a good or odd one."""
    assert read_alone(sets[name], processor, policy) == []


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("file", file_faults(), ids=lambda file: file.name)
def test_a_file_that_cannot_be_read_stops_every_policy(tmp_path, file, tolerant):
    path = tmp_path / file.file
    path.write_bytes(file.content)
    with pytest.raises(DataError) as caught:
        open_records([path], tmp_path, tolerant)
    message = str(caught.value)
    assert message.startswith(str(path)) and file.says in message and "\n" not in message


def test_one_good_record_is_enough_for_a_file_to_be_the_right_one(tmp_path, sets):
    records = open_records([sets["array"].path], sets["array"].images, tolerant=True)
    assert 0 < len(records.faults) < len(records)


def test_a_damaged_part_of_a_parquet_file_is_left_out_of_a_run_by_modality(parts, tmp_path):
    """Which samples have images is asked before any policy: a part that cannot be read has none."""
    turns = [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "Yes"}]
    table = pa.table({"id": [str(i) for i in range(12)], "conversations": [turns] * 12})
    path = tmp_path / "d.parquet"
    pq.write_table(table, path, row_group_size=4, compression=None, write_page_checksum=True)
    second = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[second + 30 : second + 40] = b"\xff" * 10
    path.write_bytes(content)
    data = FaultyData(path, tmp_path, 12, dict.fromkeys(range(4, 8)))
    more = data.settings("skip") | {"stage": "pretrain", "data__template": "vicuna_v1"}
    more |= {"data__batching": "modality", "max_steps": None, "global_batch_size": 2}
    train(tiny_config(tmp_path, parts, tmp_path / "out", **more))
    assert {line["index"] for line in told(tmp_path / "out")} <= {4, 5, 6, 7}
    assert sum(one.samples for one in read_metrics(tmp_path / "out")) == 8


@pytest.mark.parametrize(
    ("policy", "batching"),
    [("skip", "packs"), ("text_only", "plain"), ("text_only", "packs"), ("text_only", "modality")],
)
def test_a_run_counts_exactly_what_was_put_in(sets, parts, tmp_path, policy, batching):
    config = mixed_config(sets, parts, tmp_path / "out", policy, data__batching=batching)
    train(config)
    due, found = mixed(sets), told(tmp_path / "out")
    assert sorted(line["index"] for line in found) == sorted(due)
    for line in found:
        assert line["kept_text"] == (policy == "text_only" and due[line["index"]].keeps_text)
        assert due[line["index"]].says in line["reason"]
    metrics = read_metrics(tmp_path / "out")
    assert all(math.isfinite(one.loss) for one in metrics)
    left_out = sum(not line["kept_text"] for line in found)
    assert metrics and sum(one.samples for one in metrics) <= 16 * len(metrics) - left_out


def test_one_bad_sample_above_the_limit_stops_the_run(sets, parts, tmp_path):
    due, count = mixed(sets), sum(data.count for data in sets.values())
    limit = (len(due) - 1.5) / count
    more = {"data__batching": "plain", "data__bad_sample_limit": limit}
    config = mixed_config(sets, parts, tmp_path / "out", "skip", **more)
    with pytest.raises(DataError) as caught:
        train(config)
    words = f"{len(due)} of {count} samples are bad, {len(due) - 1} are allowed"
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("seen", ["file", "header", "pixels"])
def test_policy_error_stops_at_once_at_what_headers_show(sets, parts, tmp_path, seen):
    """Faults of files and headers are all known before the first step; those of pixels are not."""
    faults = [one for one in image_faults() if one.seen == seen]
    data = write_image_data(tmp_path / "data", faults)
    more = {**data.settings("error"), "data__batching": "packs", "max_steps": None}
    more |= {"stage": "pretrain", "data__template": "vicuna_v1"}
    with pytest.raises(DataError) as caught:
        train(tiny_config(tmp_path / "data", parts, tmp_path / "out", **more))
    message = str(caught.value)
    counts = {
        "file": f"({len(faults)} of {len(faults) + len(fine_images())} images are missing",
        "header": f"({len(faults)} of {data.count} samples are bad)",
        "pixels": "damaged image",
    }
    assert counts[seen] in message and str(data.path) in message and "\n" not in message
    assert (tmp_path / "out").exists() <= (seen == "pixels")
