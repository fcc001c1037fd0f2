"""Lengths measured from headers and words are those of the samples that are read."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import random_image, tiny_hd, tiny_tokenizer
from train_data import write_data

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.image import load_image
from llava_hd.model.assemble import assemble
from llava_hd.model.processor import Processor
from llava_hd.train import lengths as module
from llava_hd.train.lengths import Length, LengthReader, token_lengths
from llava_hd.train.lengths_cache import cache_file, cache_key, tokenizer_digest
from llava_hd.train.record import Record
from llava_hd.train.record_images import image_path
from llava_hd.train.records import read_records


@pytest.fixture(scope="module")
def processor(parts) -> Processor:
    _, made = assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex"))
    return made


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch):
    """Chunks and checks so small that a few records need several."""
    monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(module, "SPOT_CHECKS", 6)


@dataclass(frozen=True)
class Images:
    """The image of a record as a file, or as its bytes."""

    root: Path
    as_bytes: bool = False

    def __call__(self, record: Record, number: int) -> Path | bytes:
        path = image_path(self.root, record.images[number])
        return path.read_bytes() if self.as_bytes else path


def reader(folder: Path, processor: Processor, template=None, max_length=2048) -> LengthReader:
    records = read_records([folder / "data.json"])
    return LengthReader(records, Images(folder / "images"), processor, template, max_length)


def sample_length(read: LengthReader, index: int) -> tuple[int, int]:
    """(total, visual) of the sample that training reads."""
    record = read.records[index]
    pictures = [load_image(read.image(record, k)) for k in range(len(record.images))]
    sample = read.processor.conversation(
        record.turns, pictures, max_length=read.max_length, template=read.template
    )
    return len(sample.ids), sum(plan.num_tokens for plan in sample.plans)


@pytest.mark.parametrize("template", [None, "plain"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_lengths_are_those_of_the_samples(template, cut, num_workers, processor, tmp_path):
    data = write_data(tmp_path, num_records=20)
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image((33, 200)).save(data / "images" / "1-0.png", exif=exif)  # lies on its side
    read = reader(data, processor, template)
    if cut:  # into the words of some, and of none into its image
        longest = [sample_length(read, i) for i in range(20)]
        read = replace(read, max_length=max(total for total, _ in longest) - 3)
    told: list[tuple[str, int, int]] = []
    found = token_lengths(
        read, "", num_workers=num_workers, done=lambda *numbers: told.append(numbers)
    )
    expected = [sample_length(read, i) for i in range(20)]
    assert list(zip(found.total.tolist(), found.visual.tolist(), strict=True)) == expected
    assert found.total.dtype == found.visual.dtype == np.int32 and not found.faults
    assert told[-1] == ("lengths", 20, 20) and [n for _, n, _ in told] == [8, 16, 20]
    assert len(set(expected)) >= 6


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_geometry_has_its_lengths(preset, processor, tmp_path):
    data = write_data(tmp_path, num_records=6)
    own = Processor(processor.tokenizer, replace(processor.config, hd=tiny_hd(preset)))
    read = reader(data, own)
    assert [read(i).total for i in range(6)] == [sample_length(read, i)[0] for i in range(6)]


def test_images_may_be_bytes(processor, tmp_path):
    data = write_data(tmp_path)
    read = reader(data, processor)
    inside = replace(read, image=Images(data / "images", as_bytes=True))
    assert [read(i) for i in range(12)] == [inside(i) for i in range(12)]


def test_a_sample_that_cannot_be_trained_on_has_the_length_of_its_words(processor, tmp_path):
    data = write_data(tmp_path)
    read = reader(data, processor)
    (data / "images" / "1-0.png").unlink()
    (data / "images" / "2-0.png").write_bytes(b"no image")
    words = read(3).total  # the same words, and no image in this record
    limit = words + 2
    found = token_lengths(replace(read, max_length=limit), "")
    assert found.total[3] == words and 3 not in found.faults
    for index, reason in ((1, r"1-0\.png.*No such file"), (2, "not an image"), (4, "max_length")):
        assert abs(int(found.total[index]) - words) <= 3 and found.visual[index] == 0
        with pytest.raises(DataError, match=rf"record {index} \(id 'r{index}'\): .*{reason}"):
            raise DataError(found.faults[index])
    assert found.total.max() <= limit


@dataclass(frozen=True)
class OneBad:
    """Records of which one cannot be read."""

    records: list[Record]
    bad: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        if index == self.bad:
            raise DataError(f"data.parquet: row {index}: no schema that is known")
        return self.records[index]


def test_a_record_that_cannot_be_read_has_no_length(processor, tmp_path):
    data = write_data(tmp_path)
    read = reader(data, processor)
    found = token_lengths(replace(read, records=OneBad(list(read.records), 5)), "")
    assert found.total[5] == 0 and (found.total > 0).sum() == 11
    assert found.faults == {5: "data.parquet: row 5: no schema that is known"}


def counted(read: LengthReader, monkeypatch) -> list[int]:
    """The indices that are measured from now on."""
    seen: list[int] = []
    real = LengthReader.__call__

    def call(self: LengthReader, index: int) -> Length:
        seen.append(index)
        return real(self, index)

    monkeypatch.setattr(LengthReader, "__call__", call)
    return seen


def test_lengths_are_measured_once_and_then_read(processor, tmp_path, monkeypatch):
    data = write_data(tmp_path, num_records=20)
    read, cache = reader(data, processor), tmp_path / "cache"
    first = token_lengths(read, "data", cache)
    seen = counted(read, monkeypatch)
    again = token_lengths(read, "data", cache)
    assert np.array_equal(first.total, again.total) and np.array_equal(first.visual, again.visual)
    assert len(seen) == 6 and seen[0] == 0 and seen[-1] == 19
    assert [path.name for path in cache.iterdir()] == [
        cache_file(cache, cache_key(processor, None, 2048, "data")).name
    ]


def test_the_key_holds_all_that_a_length_depends_on(processor, tmp_path):
    key = functools.partial(cache_key, template=None, max_length=99, source="data")
    same = Processor(processor.tokenizer, processor.config)
    assert key(processor) == key(same)
    assert key(processor, template="vicuna_v1") == key(processor)  # the model's own
    bigger = tiny_tokenizer()
    bigger.add_tokens(["mat"])
    others = [
        key(processor, template="plain"),
        key(processor, max_length=98),
        key(processor, source="other data"),
        key(Processor(processor.tokenizer, replace(processor.config, hd=tiny_hd("hd448")))),
        key(Processor(bigger, processor.config)),
    ]
    assert len({key(processor), *others}) == len(others) + 1
    assert tokenizer_digest(tiny_tokenizer()) == tokenizer_digest(tiny_tokenizer())


def test_images_that_were_changed_are_measured_again(processor, tmp_path):
    data, cache = write_data(tmp_path), tmp_path / "cache"
    read = reader(data, processor)
    before = token_lengths(read, "data", cache)
    random_image((30, 300)).save(data / "images" / "2-0.png")
    after = token_lengths(read, "data", cache)
    assert after.total[2] == sample_length(read, 2)[0] != before.total[2]


def test_a_mended_image_is_noticed(processor, tmp_path):
    data, cache = write_data(tmp_path, num_records=20), tmp_path / "cache"
    read = reader(data, processor)
    whole = token_lengths(read, "")
    picture = data / "images" / "13-0.png"
    good = picture.read_bytes()
    picture.write_bytes(b"")
    assert set(token_lengths(read, "data", cache).faults) == {13}
    assert set(token_lengths(read, "data", cache).faults) == {13}
    picture.write_bytes(good)
    for _ in range(2):
        found = token_lengths(read, "data", cache)
        assert not found.faults and np.array_equal(found.total, whole.total)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "other"])
def test_a_damaged_cache_is_measured_again(damage, processor, tmp_path):
    data, cache = write_data(tmp_path), tmp_path / "cache"
    read = reader(data, processor)
    whole = token_lengths(read, "data", cache)
    path = next(cache.iterdir())
    content = path.read_bytes()
    middle = content.index(b"total.npy") + 150
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "other": json.dumps({"key": 1}).encode(),
        }[damage]
    )
    assert np.array_equal(token_lengths(read, "data", cache).total, whole.total)
    assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_told(processor, tmp_path):
    data = write_data(tmp_path, num_records=2)
    (tmp_path / "file").write_text("")
    said: list[str] = []
    found = token_lengths(
        reader(data, processor), "data", tmp_path / "file" / "cache", say=said.append
    )
    assert len(found) == 2 and len(said) == 1
    assert "lengths cannot be saved" in said[0] and "counted again next time" in said[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_tokenizer_that_merges_turns_is_an_error_of_usage(
    num_workers, processor, tmp_path, monkeypatch
):
    data = write_data(tmp_path, num_records=20)

    def merged(*args):
        raise UsageError("tokenizer X merges ':' with the text behind it")

    monkeypatch.setattr(module, "measure_conversation", merged)
    with pytest.raises(UsageError, match=r"^tokenizer X merges ':' with the text behind it$"):
        token_lengths(reader(data, processor), "", num_workers=num_workers)
