"""Records of every format: the same samples, at any place, in any process, in the same order."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from source_files import FORMATS, Contents, contents, write_formats
from tiny import tiny_hd
from torch.utils.data import DataLoader

from llava_hd.cli.main import main
from llava_hd.hd.errors import DataError, UsageError
from llava_hd.model.assemble import assemble
from llava_hd.model.processor import Processor
from llava_hd.train.batches import BatchOrder, PassSampler
from llava_hd.train.checkpoint_state import data_digest
from llava_hd.train.data_check import check_data
from llava_hd.train.data_check_report import is_clean
from llava_hd.train.data_check_tokens import CheckSettings
from llava_hd.train.dataset import Passes, RecordReader, read_passes
from llava_hd.train.record import BadRecord
from llava_hd.train.records import read_records
from llava_hd.train.sources import RecordSet, check_images, open_records
from llava_hd.train.sources_paths import expand


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_formats(tmp_path_factory.mktemp("formats"))


@pytest.fixture(scope="module")
def processor(parts: Path) -> Processor:
    _, made = assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex"))
    return made


def opened(folder: Path, kind: str) -> RecordSet:
    inside = kind.startswith("tar") or kind in ("parquet bytes", "parquet messages")
    return open_records([folder / FORMATS[kind]], None if inside else folder / "images")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_samples(folder: Path, processor: Processor, kind: str) -> None:
    expected = read_records([folder / "data.json"])
    direct = RecordReader(expected, folder / "images", processor, None, 2048)
    records = opened(folder, kind)
    read = RecordReader(records, None, processor, None, 2048)
    assert len(records) == len(expected) == 12
    for index in reversed(range(12)):
        found, right = read(index), direct(index)
        assert (found.ids, found.labels, found.plans) == (right.ids, right.labels, right.plans)
        assert len(found.tiles) == len(right.tiles)
        assert all(map(torch.equal, found.tiles, right.tiles))
        assert records.has_image(index) == bool(right.tiles)
        assert records[index].index == (index if kind[:3] != "tar" else index % 7)
    used = [name for record in expected for name in record.images]
    assert check_images(records) == len(used) == 10


@pytest.mark.parametrize("kind", FORMATS)
def test_loader_processes_read_the_same_in_any_order(folder: Path, kind: str) -> None:
    records = opened(folder, kind)
    right = {i: ([t.text for t in records[i].turns], contents(records, i)) for i in range(12)}
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 4)).tolist()
    loader = DataLoader(Contents(records), batch_size=None, sampler=order, num_workers=2)
    found = list(loader)
    assert [index for index, _, _ in found] == order
    assert all((words, images) == right[index] for index, words, images in found)


def test_processes_that_share_nothing_read_the_same(folder: Path) -> None:
    records = open_records([folder / FORMATS[kind] for kind in ("parquet bytes", "tar")], None)
    right = [contents(records, i) for i in range(24)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for index in (23, 1, 13, 11, 5):
            record = pool.submit(records.__getitem__, index).result()
            found = [pool.submit(records.image, record, k) for k in range(len(record.images))]
            assert record == records[index] and [f.result() for f in found] == right[index]


def test_several_files_of_all_kinds_are_one_sequence(folder: Path) -> None:
    paths = [folder / name for name in FORMATS.values()]
    records = open_records(paths, folder / "images")
    assert len(records) == 12 * len(FORMATS) and check_images(records) == 10 * 4 + 10
    words = [[turn.text for turn in record.turns] for record in records]
    assert all(words[i] == words[i % 12] for i in range(len(records)))
    assert records[-1].place == "sample '000011'" and len(records[3:7]) == 4
    with pytest.raises(IndexError):
        records[len(records)]
    twice = open_records([paths[-1], paths[-1]], None)
    assert len(twice) == 24 and contents(twice, 23) == contents(twice, 11)


@pytest.mark.parametrize("kind", ["parquet bytes", "tar messages"])
def test_streamed_formats_go_on_at_any_step_exactly(
    folder: Path, processor: Processor, kind: str
) -> None:
    passes = Passes(RecordReader(opened(folder, kind), None, processor, None, 2048), processor)

    def batches(first_step: int, num_workers: int) -> list:
        sampler = PassSampler(BatchOrder(12, 4, 2, seed=3), 0, 1, first_step, 5)
        return [one.batch for one in read_passes(passes, sampler, num_workers, pin_memory=False)]

    whole, later = batches(0, 2), batches(2, 0)
    assert [pack.names for pack in whole[4:]] == [pack.names for pack in later] and later
    for one, other in zip(whole[4:], later, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.tiles, other.tiles)


def test_the_digest_changes_with_the_data_and_with_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    json_files = [folder / "data.json", folder / "data.jsonl"]
    assert open_records(json_files, folder / "images").digest() == data_digest(json_files)
    digests = {kind: opened(folder, kind).digest() for kind in FORMATS}
    assert len(set(digests.values())) == len(FORMATS)
    for kind in FORMATS:
        assert opened(folder, kind).digest() == digests[kind]
        copied = pickle.loads(pickle.dumps(opened(folder, kind)))
        assert copied.digest() == digests[kind]
    fewer = write_formats(tmp_path, num_records=11)
    for kind in FORMATS:
        assert opened(fewer, kind).digest() != digests[kind]


def test_bad_records_of_json_stop_all_or_are_told_by_index(folder: Path, tmp_path: Path) -> None:
    good = (folder / "data.jsonl").read_text().splitlines()[:2]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join([good[0], '{"id": ', good[1], '{"id": "x", "conversations": []}']))
    first = tmp_path / "first.json"
    first.write_text(f"[{good[0]}]")
    with pytest.raises(DataError, match=r"some\.jsonl: line 2, .*\(2 faulty records"):
        open_records([first, path], folder / "images")
    records = open_records([first, path], folder / "images", tolerant=True)
    assert len(records) == 5 and sorted(records.faults) == [2, 4]
    assert "line 2" in records.faults[2] and "record 3 (id 'x')" in records.faults[4]
    assert [record.id for record in (records[0], records[1], records[3])] == ["r0", "r0", "r1"]
    with pytest.raises(BadRecord, match="conversations is empty"):
        records[4]
    assert not records.has_image(4) and check_images(records) == 1
    assert str(pickle.loads(pickle.dumps(BadRecord("a", "b")))) == "a: b"


def test_the_data_check_reads_every_format(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CheckSettings(tiny_hd("hdflex"))
    right = check_data([folder / "data.json"], folder / "images", settings)
    for kind, workers in (("tar messages", 2), ("parquet bytes", 2), ("parquet names", 0)):
        found = check_data([folder / FORMATS[kind]], folder / "images", settings, workers)
        assert is_clean(found) and found.measures == right.measures
        assert sorted(found.sizes.values()) == sorted(right.sizes.values())
    both = [str(folder / FORMATS[kind]) for kind in ("tar", "parquet messages")]
    words = ["data", "check", *both, "--out", str(tmp_path / "o"), "--workers", "0", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["images"], report["faults"]) == (24, 20, [])
    assert report["duplicates"]["same_image_and_first_question"]["records"] == 0
    assert main(["data", "check", str(folder / "names.parquet"), "--out", str(tmp_path / "p")]) == 2
    assert "--images is missing" in capsys.readouterr().err and not (tmp_path / "p").exists()


def test_names_without_a_folder_are_a_usage_error(folder: Path) -> None:
    records = open_records([folder / "names.parquet"], None)
    with pytest.raises(UsageError, match=r"data\.images is missing; .*row 1"):
        check_images(records)
    with pytest.raises(UsageError, match=r"data\.images is missing"):
        records.image(records[1], 0)
    with pytest.raises(DataError, match=r"row 1 .*1-0\.png.*not below"):
        check_images(open_records([folder / "names.parquet"], folder))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,yy}/{0..1}.json", ["x/0.json", "x/1.json", "yy/0.json", "yy/1.json"]),
        ("a{}b{1}.json", ["a{}b{1}.json"]),
        ("{a,}b", ["ab", "b"]),
    ],
)
def test_braces_are_written_out(name: str, found: list[str]) -> None:
    assert [str(path) for path in expand([name])] == found


def test_braces_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    for name, reason in (("{3..1}.tar", "counts down"), ("{0..9999999}.tar", "more than")):
        with pytest.raises(UsageError, match=reason):
            expand([name])
    literal = tmp_path / "{0..1}.json"
    literal.touch()
    assert expand([literal]) == [literal]


@pytest.mark.parametrize(
    ("name", "head", "reason"),
    [
        ("a.tar", b"\x1f\x8b123", "gzip"),
        ("a.json", b"PK\x03\x04", "zip file"),
        ("a.parquet", b"ARROW1\0\0", "Arrow file"),
        ("a.parquet", b"[1]", "not a Parquet file"),
        ("a.tar", b"[1]", "not a tar file"),
        ("a.json", b"PAR1", "not a Parquet file"),
    ],
)
def test_a_file_is_told_by_its_first_bytes(
    tmp_path: Path, name: str, head: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(head)
    with pytest.raises(DataError, match=reason) as caught:
        open_records([tmp_path / name], None)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_the_content_counts_and_not_the_suffix(folder: Path, tmp_path: Path) -> None:
    for source, name in (("bytes.parquet", "a.json"), ("shard-0000.tar", "b.parquet.x")):
        (tmp_path / name).write_bytes((folder / source).read_bytes())
        records = open_records([tmp_path / name], None)
        assert [t.text for t in records[1].turns] == [
            turn["value"]
            for turn in json.loads((folder / "data.json").read_text())[1]["conversations"]
        ]
    with pytest.raises(UsageError, match="no such file"):
        open_records([tmp_path / "none-{0..1}.tar"], None)
    with pytest.raises(UsageError, match="is a folder"):
        open_records([tmp_path], None)


def test_a_share_of_the_records_is_drawn_by_the_seed_and_keeps_their_order(folder: Path) -> None:
    whole = opened(folder, "json")
    assert whole.share(1.0, 3) is whole
    half, third = whole.share(0.5, 3), whole.share(0.3, 3)
    assert (len(half), len(third), len(whole.share(0.01, 3))) == (6, 4, 1)
    wheres = [record.where for record in whole]
    found = [record.where for record in half]
    assert found == sorted(found, key=wheres.index) and len(set(found)) == 6
    assert {record.where for record in third} < set(found)
    assert found == [record.where for record in whole.share(0.5, 3)]
    assert any(found != [r.where for r in whole.share(0.5, seed)] for seed in range(4, 8))
    digests = {x.digest() for x in (whole, half, third, whole.share(0.5, 4))}
    assert len(digests) >= 3 and half.digest() == pickle.loads(pickle.dumps(half)).digest()
    assert [half.has_image(i) for i in range(6)] == [bool(r.images) for r in half]
    with pytest.raises(IndexError):
        half[6]


def test_only_the_images_of_the_share_are_looked_for(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image> where?"}, TURNS[1]]
    records = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(10)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    half = open_records([tmp_path / "data.json"], tmp_path).share(0.5, 0)
    for record in half:
        (tmp_path / record.images[0]).write_bytes(b"")
    assert check_images(half) == 5
    with pytest.raises(DataError):
        check_images(open_records([tmp_path / "data.json"], tmp_path))


def test_the_faults_of_a_share_have_its_places(tmp_path: Path) -> None:
    records = [{"id": str(i), "conversations": TURNS if i % 2 else []} for i in range(10)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    half = open_records([tmp_path / "data.json"], None, tolerant=True).share(0.5, 1)
    bad = set()
    for place in range(len(half)):
        try:
            half[place]
        except BadRecord as fault:
            assert half.faults[place] == str(fault)
            bad.add(place)
    assert set(half.faults) == bad and 0 < len(bad) < 10


TURNS = [{"from": "human", "value": "where?"}, {"from": "gpt", "value": "there"}]
