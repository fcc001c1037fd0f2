"""Checkpoints that cannot be half-written: `output_dir/checkpoint-<step>/`.

    config.json, *.safetensors, tokenizer   a model folder, for LlavaHD.from_pretrained
    optimizer/rank-*.safetensors            fp32 weights and Adam's moments, by ranges
    trainer_state.json                      step, data position, the configuration
    MANIFEST.json                           size and hash of every file

Protocol: every rank writes its files to `.unfinished-checkpoint-<step>`, reads them back for the
hash and syncs them; all learn whether all succeeded; rank 0 writes the manifest and renames the
folder, which is the commit. A rank that fails (a full disk) stops no other one and harms no older
checkpoint. Older ones beyond `save_total_limit` go only after the commit. No file is a pickle.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..hd.errors import DataError, LlavaHDError
from ..model.llava_hd import LlavaHD
from ..model.processor import Processor
from .checkpoint_state import TrainerState, write_state
from .manifest import (
    FileEntry,
    Manifest,
    checkpoints,
    entries_of,
    fault_in,
    files_below,
    put_aside,
    sync_folder,
    write_manifest,
)
from .zero import Engine, World, barrier, gather_objects, gathered_state
from .zero_state import WRITE_FAULTS, load_fragments, save_fragments

OPTIMIZER = "optimizer"
UNFINISHED, REMOVED = ".unfinished-", ".removed-"


class SaveFailed(LlavaHDError):
    """A checkpoint could not be written; raised on all ranks alike, older ones are untouched."""


@dataclass(frozen=True)
class Written:
    """What one rank wrote, or why it could not."""

    files: dict[str, FileEntry]
    fault: str | None = None


def save_checkpoint(
    engine: Engine, processor: Processor, state: TrainerState, output_dir: Path, world: World
) -> Path:
    """Write `checkpoint-<step>`; a collective. Returns the folder; raises SaveFailed."""
    folder = output_dir / f"checkpoint-{state.step}"
    unfinished = output_dir / f"{UNFINISHED}{folder.name}"

    def begin() -> dict[str, FileEntry]:
        if world.is_main:
            clear_leftovers(output_dir)
            (unfinished / OPTIMIZER).mkdir(parents=True)
        return {}

    _together(begin, folder, world)
    weights = _gathered(engine, world)  # a collective: never inside a try of one rank

    def write() -> dict[str, FileEntry]:
        names = save_fragments(engine, unfinished / OPTIMIZER, world)
        mine = [f"{OPTIMIZER}/{name}" for name in names]
        if world.is_main:
            _write_model(engine, processor, unfinished, weights)
            write_state(unfinished, state)
            mine += [name for name in files_below(unfinished) if not name.startswith(OPTIMIZER)]
        return entries_of(unfinished, mine, sync=True)

    files = _together(write, folder, world)

    def commit() -> dict[str, FileEntry]:
        if world.is_main:
            write_manifest(unfinished, Manifest(state.step, world.size, files))
            if folder.exists():
                folder.replace(output_dir / f"{REMOVED}{folder.name}")
            unfinished.replace(folder)
            sync_folder(output_dir)
        return {}

    _together(commit, folder, world)
    return folder


def _together(
    work: Callable[[], dict[str, FileEntry]], folder: Path, world: World
) -> dict[str, FileEntry]:
    """Do a part of a save on every rank and tell all how it went; SaveFailed if any failed."""
    try:
        mine = Written(work())
    except WRITE_FAULTS as error:
        mine = Written({}, f"rank {world.rank}: {error}")
    everyone = gather_objects(mine)
    faults = [written.fault for written in everyone if written.fault is not None]
    if faults:
        if world.is_main:
            shutil.rmtree(folder.parent / f"{UNFINISHED}{folder.name}", ignore_errors=True)
        raise SaveFailed(f"{folder} was not saved ({faults[0]}); older checkpoints are untouched")
    return {name: entry for written in everyone for name, entry in written.files.items()}


def _gathered(engine: Engine, world: World) -> dict[str, Tensor]:
    """What a model folder of this run holds: all weights, or with LoRA the adapter's."""
    model = engine.module
    assert isinstance(model, LlavaHD)
    return gathered_state(model, model.saved_names(), world)


def _write_model(
    engine: Engine, processor: Processor, folder: Path, weights: dict[str, Tensor]
) -> None:
    model = engine.module
    assert isinstance(model, LlavaHD)
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def drop_oldest(output_dir: Path, limit: int | None, world: World) -> None:
    """Remove the oldest checkpoints beyond `limit` (rank 0), each renamed first, so that a kill
    in between leaves none that is half there."""
    if world.is_main and limit is not None:
        for old in checkpoints(output_dir)[:-limit]:
            removed = output_dir / f"{REMOVED}{old.name}"
            old.replace(removed)
            shutil.rmtree(removed)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what killed saves and removals left; none of it ever counted as a checkpoint."""
    for prefix in (UNFINISHED, REMOVED):
        for left in output_dir.glob(f"{prefix}*"):
            shutil.rmtree(left)


def save_model_folder(engine: Engine, processor: Processor, folder: Path, world: World) -> None:
    """Write model and tokenizer into `folder`, config.json last: without it the folder holds no
    model. A collective; raises SaveFailed on all ranks."""
    weights = _gathered(engine, world)
    unfinished = folder / f"{UNFINISHED}model"

    def write() -> dict[str, FileEntry]:
        if world.is_main:
            clear_leftovers(folder)
            unfinished.mkdir()
            _write_model(engine, processor, unfinished, weights)
            names = files_below(unfinished)
            entries_of(unfinished, names, sync=True)
            for name in sorted(names, key=lambda name: (name == "config.json", name)):
                (unfinished / name).replace(folder / name)
            unfinished.rmdir()
            sync_folder(folder)
        return {}

    _together(write, folder / "model", world)


def load_optimizer(engine: Engine, folder: Path, world: World) -> None:
    """Put fp32 weights and moments back; `folder` has been verified. The model has been read from
    the same folder already."""
    load_fragments(engine, folder / OPTIMIZER, world)
    barrier()


def verified(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, every byte read, the files shared out among the ranks; the
    same answer on all ranks. None if nothing is."""
    faults = [fault for fault in gather_objects(fault_in(folder, world.rank, world.size)) if fault]
    return faults[0] if faults else None


def newest_whole(output_dir: Path, world: World, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that verifies; a collective.

    A broken one is moved to `quarantine/`, `say` tells which and why, and the one before it is
    tried.
    """
    while True:
        candidates = gather_objects(checkpoints(output_dir))[0]
        if not candidates:
            return None
        fault = verified(candidates[-1], world)
        if fault is None:
            return candidates[-1]
        if world.is_main:
            aside = put_aside(candidates[-1])
            say(f"BROKEN CHECKPOINT: {fault}; moved to {aside}, trying the one before it")
        barrier()


def check_whole(folder: Path, world: World) -> None:
    """DataError, on all ranks alike, unless a checkpoint that the user named verifies."""
    fault = verified(folder, world)
    if fault is not None:
        raise DataError(f"resume {folder}: {fault}; give another checkpoint, or --resume auto")
