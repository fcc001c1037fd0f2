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
from functools import partial
from pathlib import Path

from torch import Tensor

from ..hd.errors import DataError, LlavaHDError
from ..model.llava_hd import LlavaHD
from ..model.processor import Processor
from .checkpoint_state import TrainerState, write_state
from .manifest import (
    OPTIMIZER,
    QUARANTINE,
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
from .together import on_all, on_main
from .zero import Engine, World, barrier, gather_objects, gathered_state
from .zero_state import WRITE_FAULTS, load_fragments, save_fragments

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
    in between leaves none that is half there. The newest is the one just saved: what a run that
    was given up had further on is put aside when a run begins (`put_later_aside`)."""
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
    same answer on all ranks. None if nothing is.

    Raises LlavaHDError, on all ranks, where one cannot read it: a disk that is away is no reason
    to give a checkpoint up.
    """

    def read() -> str | None:
        try:
            return fault_in(folder, world.rank, world.size)
        except OSError as error:
            raise LlavaHDError(
                f"{folder} cannot be read by rank {world.rank} ({error.strerror}); mend that and "
                "start again"
            ) from error

    faults = [fault for fault in gather_objects(on_all(world, read)) if fault]
    return faults[0] if faults else None


def newest_whole(output_dir: Path, world: World, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that verifies; None where there is none at all. A collective.

    A broken one is moved to `quarantine/`, `say` tells which and why, and the one before it is
    tried. Raises DataError where all are broken: to begin anew is not for us to decide.
    """
    while candidates := on_main(world, lambda: checkpoints(output_dir)):
        newest = candidates[-1]
        fault = verified(newest, world)
        if fault is None:
            return newest
        aside = on_main(world, partial(put_aside, newest))
        say(f"BROKEN CHECKPOINT: {fault}; moved to {aside}, trying the one before it")
    if on_main(world, lambda: (output_dir / QUARANTINE).is_dir()):
        raise DataError(
            f"{output_dir} holds no whole checkpoint any more (see {output_dir / QUARANTINE}); "
            "give a new output_dir to begin anew"
        )
    return None


def put_later_aside(output_dir: Path, step: int, world: World, say: Callable[[str], None]) -> None:
    """Move checkpoints of later steps than a run begins with to `quarantine/`: of a run that was
    given up, they would be taken for the newest. A collective."""

    def move() -> list[tuple[Path, Path]]:
        later = [p for p in checkpoints(output_dir) if int(p.name.rpartition("-")[2]) > step]
        return [(path, put_aside(path)) for path in later]

    for path, aside in on_main(world, move):
        say(f"{path} is later than step {step}, where this run goes on; moved to {aside}")


def check_whole(folder: Path, world: World) -> None:
    """DataError, on all ranks alike, unless a checkpoint that the user named verifies."""
    fault = verified(folder, world)
    if fault is not None:
        raise DataError(f"resume {folder}: {fault}; give another checkpoint, or --resume auto")
