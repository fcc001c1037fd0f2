"""A checkpoint that differs in one byte from what was written is never taken for whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llava_hd.train import manifest as module
from llava_hd.train.manifest import (
    MANIFEST_FILE,
    Manifest,
    checkpoints,
    entries_of,
    fault_in,
    files_below,
    put_aside,
    quick_fault,
    read_manifest,
    write_manifest,
)


def write_checkpoint(output_dir: Path, step: int) -> Path:
    """A folder like a checkpoint's, of three files with contents of their own."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"step": {step}}}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(range(200)) + bytes([step]))
    (folder / "optimizer/rank-0.safetensors").write_bytes(bytes([step] * 100))
    files = entries_of(folder, files_below(folder), sync=True)
    write_manifest(folder, Manifest(step, 1, files))
    return folder


def test_a_whole_checkpoint_has_no_fault_whoever_reads_it(tmp_path):
    folder = write_checkpoint(tmp_path, 7)
    assert fault_in(folder) is None and quick_fault(folder) is None
    assert [fault_in(folder, share, 5) for share in range(5)] == [None] * 5
    assert read_manifest(folder).step == 7


def faults(folder: Path, other: Path, name: str) -> dict[str, str]:
    """Ways to break a file in place; each leaves it broken when the next begins (see below)."""
    content = (folder / name).read_bytes()
    size = len(content)
    broken = {f"cut to {n}": content[:n] for n in (0, 1, size // 2, size - 1)}
    for byte in {0, 1, size // 3, size // 2, size - 2, size - 1}:
        for bit in (0, 5):
            flipped = bytearray(content)
            flipped[byte] ^= 1 << bit
            broken[f"byte {byte} bit {bit}"] = bytes(flipped)
    broken["one byte more"] = content + b"\n"
    broken["of the other"] = (other / name).read_bytes()
    return broken


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "optimizer/rank-0.safetensors", MANIFEST_FILE],
)
def test_every_change_of_every_file_is_found(tmp_path, name):
    older, folder = write_checkpoint(tmp_path, 6), write_checkpoint(tmp_path, 7)
    content = (folder / name).read_bytes()
    for what, broken in faults(folder, older, name).items():
        assert broken != content, what
        (folder / name).write_bytes(broken)
        found = [fault_in(folder, share, 2) for share in range(2)]
        assert any(found), f"{name}: {what}"
    (folder / name).unlink()
    assert Path(name).name in str(fault_in(folder)) and "missing" in str(fault_in(folder))
    (folder / name).write_bytes(content)
    assert fault_in(folder) is None


def test_files_that_changed_places_or_do_not_belong_there_are_found(tmp_path):
    folder = write_checkpoint(tmp_path, 7)
    one, two = folder / "model.safetensors", folder / "optimizer/rank-0.safetensors"
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    assert fault_in(folder) is not None
    shutil.rmtree(folder)
    folder = write_checkpoint(tmp_path, 7)
    for name in ("pytorch_model.bin", "optimizer/rank-1.safetensors"):
        (folder / name).write_bytes(b"")
        assert "does not belong there" in str(fault_in(folder))
        (folder / name).unlink()
    for name in (".nfs0001", "optimizer/.DS_Store", "pope.html"):  # no loader looks at these
        (folder / name).write_bytes(b"")
    assert fault_in(folder) is None


def test_a_folder_that_cannot_be_read_is_not_called_broken(tmp_path):
    with pytest.raises(FileNotFoundError):
        fault_in(tmp_path / "checkpoint-7")


def test_a_checkpoint_under_another_name_is_found(tmp_path):
    folder = write_checkpoint(tmp_path, 7)
    folder.rename(tmp_path / "checkpoint-9")
    assert "is that of checkpoint-7" in str(fault_in(tmp_path / "checkpoint-9"))


def test_broken_ones_are_put_aside_and_none_is_overwritten(tmp_path):
    for expected in ("checkpoint-7", "checkpoint-7.2", "checkpoint-7.3"):
        assert put_aside(write_checkpoint(tmp_path, 7)) == tmp_path / "quarantine" / expected
    assert len(list((tmp_path / "quarantine").iterdir())) == 3


def test_checkpoints_are_ordered_by_step_and_nothing_else_counts(tmp_path):
    for name in ("checkpoint-10", "checkpoint-2", ".unfinished-checkpoint-12", "checkpoint-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file", encoding="utf-8")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_what_was_written_is_put_on_the_disk_before_the_manifest(tmp_path, monkeypatch):
    """Every file and every folder of the checkpoint is synced."""
    synced = set()
    real = module.os.fsync

    def fsync(handle: int) -> None:
        synced.add(Path(f"/proc/self/fd/{handle}").resolve())
        real(handle)

    monkeypatch.setattr(module.os, "fsync", fsync)
    folder = write_checkpoint(tmp_path, 7)
    assert synced == {path.resolve() for path in (folder, *folder.rglob("*"))}
