"""train/feature_cache.py: the same run with and without it, and entries that are never wrong."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import random_image, tiny_hd
from train_data import tiny_config, write_data

from llava_hd.cli.train import _summary
from llava_hd.hd.errors import UsageError
from llava_hd.hd.image import ImageError, png_bytes
from llava_hd.model.assemble import assemble
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import Sample, pack
from llava_hd.model.prompt import Turn
from llava_hd.train import feature_cache
from llava_hd.train.config import TrainConfig
from llava_hd.train.feature_cache import CacheWriter, FeatureCache
from llava_hd.train.launch import run_workers
from llava_hd.train.metrics import StepMetrics, read_metrics
from llava_hd.train.recipe import config_yaml
from llava_hd.train.run import Silence, train

CPU = torch.device("cpu")
WORKER = Path(__file__).with_name("train_worker.py")
TURNS = (Turn("human", "<image>\nwhat is it?"), Turn("gpt", "the mat is red"))


@pytest.fixture(scope="module")
def made(parts):
    return assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex"))


@pytest.fixture
def cache(made, tmp_path):
    return FeatureCache.of(tmp_path / "cache", made[0].vision, CPU)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


class Told(Silence):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def picture(seed: int, size: tuple[int, int] = (70, 130)) -> bytes:
    return png_bytes(random_image(size, seed))


def sample_of(made, cache: FeatureCache | None, data: bytes, name: str = "s") -> Sample:
    _, processor = made
    image = processor.load(data) if cache is None else cache.cut(data, name, processor)
    return processor.conversation(TURNS, [image], name=name)


def filled(made, cache: FeatureCache, *pictures: bytes) -> None:
    """Encode pictures as one pack and store what the tower makes of them."""
    model, processor = made
    batch = pack([sample_of(made, cache, one) for one in pictures], processor.config)
    with torch.no_grad():
        CacheWriter(cache, None, print).store(batch, model(batch).features)


def logged(config: TrainConfig) -> list[StepMetrics]:
    return read_metrics(Path(config.output_dir))


def same_run(ours: TrainConfig, theirs: TrainConfig) -> None:
    """Equal to the last bit: losses, gradient norms, weights."""
    for name in ("loss", "grad_norm"):
        values = [[getattr(m, name) for m in logged(config)] for config in (ours, theirs)]
        assert values[0] == values[1]
    a, b = (LlavaHD.from_pretrained(c.output_dir).state_dict() for c in (ours, theirs))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_is_the_same_to_the_last_bit_without_cache_filling_and_reading_one(
    data, parts, tmp_path
):
    # One epoch, so that every image is new to the filling run and known to the reading one.
    settings = {"stage": "pretrain", "max_steps": 3, "precision": "bf16"}
    without = tiny_config(data, parts, tmp_path / "without", **settings)
    cached = {"data__feature_cache": str(tmp_path / "cache")}
    fill = tiny_config(data, parts, tmp_path / "fill", **settings, **cached)
    read = tiny_config(
        data, parts, tmp_path / "read", **settings, **cached, data__num_workers=2
    )  # fmt: skip
    for config in (without, fill):
        result = train(config)
    assert result.cache.read == 0 and result.cache.stored == result.cache.images > 0
    result = train(read)
    assert result.cache.read == result.cache.images and result.cache.stored == 0
    assert f"{result.cache.read} of {result.cache.read} images (100%)" in _summary(result)
    same_run(without, fill)
    same_run(without, read)
    assert [m.cached_images for m in logged(read)] == [m.images for m in logged(without)]


def test_two_ranks_under_zero_3_share_a_cache(data, parts, tmp_path):
    stage_1 = tiny_config(data, parts, tmp_path / "stage1", stage="pretrain", max_steps=1)
    base = tiny_config(
        data, parts, tmp_path / "without", zero__stage=3, max_steps=3,
        model__projector_from=stage_1.output_dir,
    )  # fmt: skip
    cached = replace(base.data, feature_cache=str(tmp_path / "cache"))
    fill = replace(base, output_dir=str(tmp_path / "fill"), data=cached)
    read = replace(base, output_dir=str(tmp_path / "read"), data=cached)
    files = []
    for config in (stage_1, base, fill, read):
        files.append(tmp_path / f"{Path(config.output_dir).name}.yaml")
        files[-1].write_text(config_yaml(config), encoding="utf-8")
    assert run_workers([sys.executable, str(WORKER), *map(str, files)], 2) == 0
    same_run(base, fill)
    same_run(base, read)
    assert sum(m.cached_images for m in logged(fill)) == 0
    assert all(m.cached_images == m.images for m in logged(read))


def test_damaged_entries_are_said_and_made_again(data, parts, tmp_path):
    cached = {"data__feature_cache": str(tmp_path / "cache"), "stage": "pretrain", "max_steps": 3}
    fill = tiny_config(data, parts, tmp_path / "fill", **cached)
    read = tiny_config(data, parts, tmp_path / "read", **cached)
    train(fill)
    entries = sorted((tmp_path / "cache").rglob("*.features"))
    whole = {entry: entry.read_bytes() for entry in entries}
    flipped = bytearray(whole[entries[0]])
    flipped[-1] ^= 1
    entries[0].write_bytes(flipped)
    entries[1].write_bytes(whole[entries[1]][:-4])
    entries[2].write_bytes(b"")
    entries[3].write_bytes(whole[entries[4]])  # a whole entry under another's name
    told = Told()
    result = train(read, told)
    assert result.cache.damaged == 4 and result.cache.read == result.cache.images - 4
    assert any("feature cache" in line and "damaged" in line for line in told.lines)
    assert "4 damaged ones made again" in _summary(result)
    losses = [[m.loss for m in logged(config)] for config in (fill, read)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # other tiles in the tower's products
    for entry in entries[:4]:
        assert len(entry.read_bytes()) == len(whole[entry])
    told = Told()
    again = replace(read, output_dir=str(tmp_path / "again"))
    assert train(again, told).cache.damaged == 0
    assert not any(": damaged" in line for line in told.lines)


def test_packs_of_known_and_new_images_and_text_have_the_same_loss(made, cache):
    model, processor = made
    pictures = [picture(i, size) for i, size in enumerate([(70, 130), (50, 50), (200, 60)])]
    filled(made, cache, pictures[1])
    words = processor.conversation((Turn("human", "is it?"), Turn("gpt", "Yes")), [])
    for chosen in ([0, 1, 2], [1], [1, 0, 1], [2, 0]):
        plain = [sample_of(made, None, pictures[i]) for i in chosen]
        mixed = [sample_of(made, cache, pictures[i]) for i in chosen]
        a, b = pack([words, *plain], processor.config), pack([words, *mixed], processor.config)
        assert b.num_cached == chosen.count(1) and len(b.fresh) == len(chosen) - b.num_cached
        assert b.num_images == a.num_images == len(chosen)
        assert b.has_dummy == (set(chosen) == {1})
        with torch.no_grad():
            assert float(model(b).loss_sum) == pytest.approx(float(model(a).loss_sum), rel=1e-6)


def test_a_read_entry_is_what_the_tower_made_of_the_kept_rows(made, cache):
    model, processor = made
    data = picture(5)
    filled(made, cache, data)
    sample, known = sample_of(made, None, data), sample_of(made, cache, data)
    batch = pack([sample], processor.config)
    expected = model.vision(batch.tiles)[:, 1:].flatten(0, 1)[batch.rows]
    assert torch.equal(known.features[0], expected)
    assert len(known.tiles[0]) == 0 and known.ids == sample.ids


def test_another_image_geometry_tower_or_type_has_another_entry(made, cache, parts, tmp_path):
    model, processor = made
    keys = {cache.cut(picture(1), "a", processor).key, cache.cut(picture(2), "b", processor).key}
    hd = replace(tiny_hd("hdflex"), keep="all")
    _, other = assemble(vision=parts / "vision", language=parts / "language", hd=hd)
    keys.add(cache.cut(picture(1), "a", other).key)
    bf16 = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex"),
        dtype=torch.bfloat16,
    )[0]  # fmt: skip
    layer = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex"), vision_layer=-1
    )[0]
    changed = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )[0]  # fmt: skip
    with torch.no_grad():
        changed.vision.clip.encoder.layers[0].mlp.fc1.bias[3] += 1e-6
    for tower in (bf16.vision, layer.vision, changed.vision):
        keys.add(FeatureCache.of(tmp_path, tower, CPU).cut(picture(1), "a", processor).key)
    keys.add(
        FeatureCache.of(tmp_path, model.vision, torch.device("cuda")).cut(
            picture(1), "a", processor
        ).key
    )  # fmt: skip
    assert len(keys) == 7
    with torch.no_grad():  # what lies behind the layer that is read does not matter
        changed.vision.clip.encoder.layers[0].mlp.fc1.bias.copy_(
            model.vision.clip.encoder.layers[0].mlp.fc1.bias
        )
        changed.vision.clip.encoder.layers[-1].mlp.fc1.bias += 1
    assert FeatureCache.of(cache.folder, changed.vision, CPU) == cache


def test_a_tower_saved_again_has_the_same_entries(made, tmp_path):
    """Stage 2 reads the tower from stage 1's output, not from the folder that stage 1 read."""
    model, processor = made
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = LlavaHD.from_pretrained(tmp_path / "again")
    assert FeatureCache.of(tmp_path, again.vision, CPU) == FeatureCache.of(
        tmp_path, model.vision, CPU
    )


def test_entries_that_go_away_while_they_are_counted_are_not_counted(cache, monkeypatch):
    for name in ("ab", "cd"):
        cache.write(name * 32, torch.zeros(2, cache.width))
    cache.file("ab" * 32).with_name(".x.unfinished").write_text("")
    listed = feature_cache._listed

    def and_gone(folder: Path) -> list:
        found = listed(folder)
        for entry in found if folder.name == "ab" else []:
            Path(entry.path).unlink()
        return found

    monkeypatch.setattr(feature_cache, "_listed", and_gone)
    assert cache.held() == (1, cache.file("cd" * 32).stat().st_size)


def _store(cache: FeatureCache, key: str, rows: torch.Tensor) -> None:
    for _ in range(20):
        cache.write(key, rows)
        cache.file(key).unlink(missing_ok=True)
    cache.write(key, rows)


def test_processes_that_store_the_same_entry_leave_a_whole_one(cache):
    rows = torch.arange(30 * cache.width, dtype=torch.float32).view(30, -1)
    many = multiprocessing.get_context("fork")
    processes = [many.Process(target=_store, args=(cache, "ab" * 32, rows)) for _ in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    assert all(one.exitcode == 0 for one in processes)
    found, fault = cache.read("ab" * 32, 30)
    assert fault is None and torch.equal(found, rows)
    assert len(list(cache.folder.rglob("*"))) == 2  # the entry and its folder, nothing unfinished
    assert cache.held() == (1, cache.file("ab" * 32).stat().st_size)


def test_a_limit_and_a_disk_that_cannot_be_written_end_the_storing_with_a_line(
    made, cache, monkeypatch
):
    model, processor = made
    batch = pack([sample_of(made, cache, picture(i)) for i in range(3)], processor.config)
    with torch.no_grad():
        features = model(batch).features
    told: list[str] = []
    one = 32 + 4 * cache.width * (batch.fresh[0].last - batch.fresh[0].first)
    writer = CacheWriter(cache, 2 * one, told.append)
    writer.store(batch, features)
    writer.store(batch, features)
    assert (writer.entries, writer.size, writer.stopped) == (2, 2 * one, True)
    assert len(told) == 1 and "data.feature_cache_gib is reached" in told[0]
    shutil.rmtree(cache.folder)
    cache.folder.write_text("")  # a file where the folder should be
    writer = CacheWriter(cache, None, told.append)
    writer.store(batch, features)
    assert writer.stopped and "cannot be written" in told[1]


def test_what_a_killed_run_left_unfinished_is_removed_after_a_day(cache):
    cache.write("cd" * 32, torch.zeros(2, cache.width))
    part = cache.file("cd" * 32).parent
    old, new = part / ".a.unfinished", part / ".b.unfinished"
    for file, age in ((old, 100_000), (new, 10)):
        file.write_text("")
        time = part.stat().st_mtime - age
        os.utime(file, (time, time))
    assert cache.held()[0] == 1
    assert not old.exists() and new.exists()


def test_an_image_that_cannot_be_read_is_an_error_with_its_name(made, cache, tmp_path):
    processor = made[1]
    (tmp_path / "cut.png").write_bytes(picture(1)[:-40])
    for source, name in ((tmp_path / "cut.png", "cut.png"), (tmp_path / "none.png", "none.png")):
        with pytest.raises(ImageError, match=name):
            cache.cut(source, str(source), processor)


def test_wrong_settings_are_refused(data, parts, tmp_path):
    def config(**settings):
        return tiny_config(data, parts, tmp_path / "o", stage="pretrain", **settings)

    with pytest.raises(UsageError, match=r"data\.feature_cache .*train_vision"):
        config(data__feature_cache="c", train_vision=True)
    with pytest.raises(UsageError, match=r"feature_cache_gib needs data\.feature_cache"):
        config(data__feature_cache_gib=1.0)
    with pytest.raises(UsageError, match="must be above 0"):
        config(data__feature_cache="c", data__feature_cache_gib=0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.feature_cache .*file is a file"):
        train(config(data__feature_cache=str(tmp_path / "file")))
