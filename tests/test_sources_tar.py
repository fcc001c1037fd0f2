"""Tar shards: WebDataset's samples in its own order, nothing unpacked, every fault named."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds
from source_files import contents

from llava_hd.hd.errors import DataError
from llava_hd.hd.grid import PRESETS
from llava_hd.train import sources_tar, sources_tar_index
from llava_hd.train.data_check import check_data
from llava_hd.train.data_check_tokens import CheckSettings
from llava_hd.train.record import BadRecord
from llava_hd.train.sources import RecordSet, check_images, open_records
from llava_hd.train.sources_base import open_image

RECORD = {
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A mat"},
    ]
}
TEXT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
GOOD = [("0.json", json.dumps(RECORD).encode()), ("0.jpg", b"first"), ("1.json", b"{}")]


def write(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def opened(path: Path) -> RecordSet:
    return open_records([path], None)


def random_members(rng: random.Random, count: int, long: bool) -> list[tuple[str, bytes]]:
    """Samples below folders, with long and foreign names and members of no use, in any order."""
    folders = ["", "train/", "./a b/", "x.y/" * (30 if long else 3), "gemälde/"]
    members = []
    for number in range(count):
        key = f"{rng.choice(folders)}{number:03d}{rng.choice(['', '-é', '_' * 90 * long])}"
        images = rng.randrange(4)
        suffixes = ["JPG"] if images == 1 else [f"{k}.jpeg" for k in range(images)]
        record = {"n": number, "conversations": TEXT["conversations"]}
        record["conversations"] = json.loads(json.dumps(TEXT["conversations"]))
        record["conversations"][0]["value"] = "<image>" * images + f"{number}"
        files = [(f"{key}.json", json.dumps(record).encode())]
        files += [(f"{key}.{suffix}", rng.randbytes(rng.randrange(1500))) for suffix in suffixes]
        files += [(f"{key}.txt", b"words"), (f"{key}.cls", b"3")][: rng.randrange(3)]
        rng.shuffle(files)
        members += files
        if rng.random() < 0.2:
            members.append((rng.choice(["__meta__/a.json", ".hidden.jpg", "README"]), b"x"))
    return members


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(5))
def test_samples_are_those_of_webdataset_in_its_order(
    tmp_path: Path, seed: int, format: int
) -> None:
    long = format != tarfile.USTAR_FORMAT  # which has no room for such names
    path = write(tmp_path / "a.tar", random_members(random.Random(seed), 40, long), format)
    records = opened(path)
    expected = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [record.place for record in records] == [f"sample {s['__key__']!r}" for s in expected]
    for index in random.Random(seed).sample(range(len(records)), len(records)):
        images = {k: v for k, v in expected[index].items() if k.endswith(("jpg", "jpeg"))}
        assert contents(records, index) == [images[key] for key in sorted(images)]
        assert json.loads(expected[index]["json"])["conversations"][0]["value"] == (
            records[index].turns[0].text
        )


def test_more_than_ten_images_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    record = json.loads(json.dumps(RECORD).replace("<image>", "<image>" * 12))
    order = random.Random(0).sample(range(12), 12)
    images = [(f"a.{k}.png", f"{k}".encode()) for k in order]
    path = write(tmp_path / "a.tar", [*images, ("a.json", json.dumps(record).encode())])
    assert contents(opened(path), 0) == [f"{k}".encode() for k in range(12)]


def test_a_shard_of_the_tar_command_is_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, data in GOOD[:2]:
        (folder / "sub" / name).write_bytes(data)
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", folder, "."], check=True)
    records = opened(tmp_path / "a.tar")
    assert len(records) == 1 and contents(records, 0) == [b"first"]


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a tar file, or a damaged one"),
    "no samples": (lambda path: write(path, [("README", b"a")]), "holds no sample"),
    "no members": (lambda path: write(path, []), "holds no sample"),
    "twice": (lambda path: write(path, [GOOD[0], GOOD[0]]), "'0.json' stands in it twice"),
    "apart": (
        lambda path: write(path, [GOOD[0], GOOD[2], GOOD[1]]),
        "members of sample '0' do not stand next to each other",
    ),
    "a pickle": (lambda path: write(path, [*GOOD, ("1.pyd", b"x")]), "'1.pyd' is a pickle"),
    "another": (lambda path: write(path, [("1.a.PICKLE", b"x")]), "is a pickle, which is never"),
    "a torch file": (lambda path: write(path, [("1.pth", b"x")]), "is a pickle"),
    "upwards": (lambda path: write(path, [("../1.json", b"x")]), "leaves the image folder"),
    "absolute": (lambda path: write(path, [("/tmp/1.json", b"x")]), "is an absolute path"),
    "a long name": (lambda path: write(path, [("a" * 600 + ".json", b"")]), "over 512 bytes"),
}


@pytest.mark.parametrize("fault", SHARDS)
def test_a_bad_shard_is_named_with_its_member(tmp_path: Path, fault: str) -> None:
    make, reason = SHARDS[fault]
    path = tmp_path / "a.tar"
    make(path)
    with pytest.raises(DataError) as caught:
        opened(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and reason in message and "\n" not in message


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("0.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"member '0\.jpg' is a link or a device"):
        opened(path)


def test_damage_anywhere_is_found_and_never_taken_for_the_end(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tar", GOOD).read_bytes()
    assert len(opened(tmp_path / "a.tar")) == 2
    bad = tmp_path / "bad.tar"
    ends = [0, 100, 511, 512, 700, 1024, 1500, 2048, 2500, 3000]
    cases = [whole[:end] for end in ends]
    for header in (0, 1024, 2048):
        for place in (0, 130, 150, 260):  # name, size, checksum, magic
            cases.append(bytearray(whole))
            cases[-1][header + place] ^= 0x15
    cases += [whole + whole, whole + b"more" * 512]
    for case in cases:
        bad.write_bytes(case)
        with pytest.raises(DataError, match=r"bad\.tar: "):
            opened(bad)


SAMPLES = {
    "no record": ([("a.jpg", b"x")], "has no member 'a.json'"),
    "no JSON": ([("a.json", b"{")], "member 'a.json': line 1, column 2: the JSON ends too early"),
    "no UTF-8": ([("a.json", b"\xff")], "member 'a.json': byte 0 is not UTF-8"),
    "no object": ([("a.json", b"[1]")], "is a list, not an object"),
    "no conversation": ([("a.json", b'{"text": "a"}')], "conversations is missing"),
    "no image": (
        [("a.json", json.dumps(RECORD).encode())],
        "1 <image> tags in the human turns but 0 images beside the record",
    ),
    "an image too many": (
        [("a.json", json.dumps(TEXT).encode()), ("a.jpg", b"x")],
        "0 <image> tags in the human turns but 1 images beside the record",
    ),
    "names without members": (
        [("a.json", json.dumps({**RECORD, "image": ["b", "c"]}).encode()), ("a.jpg", b"x")],
        "image names 2 images but 1 stand beside the record",
    ),
    "no order": (
        [("a.json", json.dumps(RECORD).encode()), ("a.jpg", b"x"), ("a.png", b"y")],
        "its images .jpg, .png have no order; name them KEY.0.jpg",
    ),
    "a gap": (
        [("a.json", json.dumps(RECORD).encode()), ("a.1.jpg", b"x")],
        "its images .1.jpg have no order",
    ),
}


@pytest.mark.parametrize("fault", SAMPLES)
def test_a_bad_sample_is_named_and_the_others_are_read(tmp_path: Path, fault: str) -> None:
    members, reason = SAMPLES[fault]
    path = write(tmp_path / "a.tar", [*GOOD[:2], *members])
    records = opened(path)
    assert len(records) == 2 and contents(records, 0) == [b"first"]
    with pytest.raises(BadRecord) as caught:
        records[1]
    message = str(caught.value)
    assert message.startswith(f"{path}: sample 'a'") and reason in message and "\n" not in message


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", [GOOD[0], ("0.jpg", b"x" * 2000)])
    monkeypatch.setattr(sources_tar, "MAX_IMAGE_BYTES", 1999)
    records = opened(path)
    with pytest.raises(DataError, match=r"member '0\.jpg': 2000 bytes, above the limit of 1999"):
        records.image(records[0], 0)
    monkeypatch.setattr(sources_tar, "MAX_JSON_BYTES", 10)
    with pytest.raises(BadRecord, match="above the limit of 10"):
        records[0]


def test_a_damaged_image_is_named_by_its_member(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", GOOD[:2])
    records = opened(path)
    with pytest.raises(DataError, match=r"^member '0\.jpg': not an image"):
        open_image(records.locate(records[0], 0))
    checked = check_data([path], None, CheckSettings(PRESETS["hdflex"]))
    [fault] = checked.faults
    assert (fault.kind, fault.image) == ("image", f"{path}: member '0.jpg'")


def test_a_shard_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", GOOD)
    records = pickle.loads(pickle.dumps(opened(path)))
    write(path, [("9.json", b"{}"), *GOOD])
    with pytest.raises(DataError, match="was changed after it was opened"):
        records[0]


def test_an_index_is_kept_until_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = tmp_path / "cache", write(tmp_path / "a.tar", GOOD)
    told: list[tuple[str, int, int]] = []

    def digest() -> str:
        told.clear()
        return open_records(
            [path], None, cache=cache, done=lambda *words: told.append(words)
        ).digest()

    first = digest()
    assert not cache.exists()  # too small to be worth it
    monkeypatch.setattr(sources_tar_index, "KEEP_FROM_BYTES", 1)
    assert digest() == first and ("tar shards", 1, 1) in told
    [kept] = cache.iterdir()
    assert digest() == first and told == [("files", 1, 1)]  # read from the cache
    kept.write_bytes(kept.read_bytes()[:100])
    assert digest() == first and ("tar shards", 1, 1) in told  # damaged, so made again
    assert digest() == first and told == [("files", 1, 1)]
    os.utime(path, ns=(1, 1))
    assert digest() == first and ("tar shards", 1, 1) in told
    cache_file = tmp_path / "no folder"
    cache_file.touch()
    assert len(open_records([path], None, cache=cache_file)) == 2


def test_shards_are_indexed_in_parallel_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.tar", GOOD[: 2 + number % 2])
    paths = [tmp_path / "{0..2}.tar"]
    alone = open_records(paths, None)
    monkeypatch.setattr(sources_tar_index, "PARALLEL_FROM_BYTES", 0)
    told: list[tuple[str, int, int]] = []
    together = open_records(paths, None, done=lambda *words: told.append(words))
    assert together.digest() == alone.digest() and len(together) == 4
    assert told[:3] == [("tar shards", count, 3) for count in (1, 2, 3)]
    (tmp_path / "1.tar").write_bytes(b"x" * 3000)
    with pytest.raises(DataError, match=r"1\.tar: not a tar file"):
        open_records(paths, None)
    checked = check_data(paths, None, CheckSettings(PRESETS["hdflex"]))
    assert [fault.kind for fault in checked.faults] == ["file", "image", "image"]
    assert check_images(alone) == 3
