"""Records to packs: the same samples as the processor makes, and faults that stay one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_hd
from torch.utils.data import DataLoader
from train_data import write_data

from llava_hd.hd.errors import DataError
from llava_hd.hd.image import load_image
from llava_hd.model.assemble import assemble
from llava_hd.model.processor import Processor
from llava_hd.train import dataset, loader_workers
from llava_hd.train.batches import BatchOrder, PassSampler
from llava_hd.train.dataset import Passes, RecordReader, read_passes
from llava_hd.train.records import read_records


@pytest.fixture(scope="module")
def processor(parts) -> Processor:
    _, made = assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex"))
    return made


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path)


def reader(data: Path, processor: Processor, template=None, max_length=2048) -> RecordReader:
    records = read_records([data / "data.json"])
    return RecordReader(records, data / "images", processor, template, max_length)


def sampler(num_steps: int, first_step: int = 0) -> PassSampler:
    return PassSampler(BatchOrder(12, 4, 2, seed=0), 0, 1, first_step, num_steps)


def test_a_record_becomes_the_processors_sample(data, processor):
    read = reader(data, processor)
    for index in (0, 1, 5):
        record = read.records[index]
        images = [load_image(data / "images" / name) for name in record.images]
        sample, direct = read(index), processor.conversation(record.turns, images)
        assert (sample.ids, sample.labels, sample.plans) == (
            direct.ids,
            direct.labels,
            direct.plans,
        )
        assert sample.name == record.where and len(sample.tiles) == len(record.images)


def test_the_template_of_stage_1_leaves_images_and_captions_only(data, processor):
    text = processor.tokenizer.decode(reader(data, processor, "plain")(1).ids)
    assert "USER" not in text and "the mat is green" in text


def test_a_length_limit_cuts_text_but_no_visual_token(data, processor):
    whole = reader(data, processor)(1)
    cut = reader(data, processor, max_length=len(whole.ids) - 3)(1)
    assert cut.ids == whole.ids[:-3]
    with pytest.raises(DataError, match=r"data\.json: record 1 \(id 'r1'\): .*max_length 20"):
        reader(data, processor, max_length=20)(1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_passes_come_in_order_from_any_first_step(data, processor, num_workers):
    passes = Passes(reader(data, processor), processor)
    found = list(read_passes(passes, sampler(3), num_workers, pin_memory=False))
    packs = [one.batch for one in found]
    rest = read_passes(passes, sampler(3, first_step=1), num_workers, pin_memory=False)
    later = [one.batch for one in rest]
    assert [pack.names for pack in packs[2:]] == [pack.names for pack in later]
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(packs[2:], later, strict=True))
    assert sorted(name for pack in packs for name in pack.names) == sorted(
        record.where for record in passes.read.records
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_bad_image_is_one_line_that_names_record_and_image(data, processor, num_workers, damage):
    bad = data / "images" / "1-0.png"
    bad.unlink() if damage == "missing" else bad.write_bytes(bad.read_bytes()[:200])
    passes = Passes(reader(data, processor), processor)
    with pytest.raises(DataError) as caught:
        list(read_passes(passes, sampler(3), num_workers, pin_memory=False))
    message = str(caught.value)
    assert "\n" not in message
    assert (
        message.startswith(f"{data / 'data.json'}: record 1 (id 'r1'): ") and "1-0.png" in message
    )


@pytest.mark.parametrize("beginning", [False, True])
def test_loader_processes_go_on_when_all_processes_of_a_run_are_signalled(
    data, processor, monkeypatch, beginning
):
    """At work already, or only begun, when what they do at a signal is still torch's choice."""
    signalled: list = []
    if beginning:
        monkeypatch.setattr(dataset, "quiet_worker", begin_slowly)
        monkeypatch.setattr(dataset, "start", lambda loader: start_and_signal(loader, signalled))
    passes = Passes(reader(data, processor), processor)
    found = read_passes(passes, sampler(3), 2, pin_memory=False)
    names = [next(found).batch.names]
    signalled = signalled or signal_workers()
    names += [one.batch.names for one in found]
    alone = read_passes(passes, sampler(3), 0, pin_memory=False)
    assert names == [one.batch.names for one in alone]
    for worker in signalled:
        worker.join(10)
        assert not worker.is_alive()


def begin_slowly(worker: int) -> None:
    time.sleep(1)
    loader_workers.quiet_worker(worker)


def start_and_signal(loader: DataLoader, signalled: list) -> Iterator:
    batches = loader_workers.start(loader)
    if not signalled:
        signalled += signal_workers()
    return batches


def signal_workers() -> list:
    """The two loader processes, after the signals that a stopped job sends to all its processes."""
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    return workers
