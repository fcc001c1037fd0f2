"""Checkpoints: `output_dir/checkpoint-<step>/`, whole or absent, a model folder and more.

    config.json, *.safetensors, tokenizer   loads with LlavaHD.from_pretrained
    deepspeed/state/                        each rank's optimizer state, written by DeepSpeed
    trainer_state.json                      step, world size, the configuration

All is written to `.unfinished-checkpoint-<step>` and renamed by rank 0 when every rank is done: a
folder without the rename is never picked up. DeepSpeed's shards are pickle, so they are only read
from a folder that carries our own trainer_state.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..hd.errors import DataError
from ..model.llava_hd import LlavaHD
from ..model.processor import Processor
from .checkpoint_state import TrainerState, checkpoints, write_state
from .config import TrainConfig
from .zero import Engine, World, barrier, gathered_state

SHARDS, TAG = "deepspeed", "state"
UNFINISHED = ".unfinished-"


def save_model_folder(engine: Engine, processor: Processor, folder: Path, world: World) -> None:
    """Write model and tokenizer; a collective, rank 0 writes."""
    model = engine.module
    assert isinstance(model, LlavaHD)
    state = gathered_state(model, world)
    if world.is_main:
        model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)


def save_checkpoint(
    engine: Engine,
    processor: Processor,
    state: TrainerState,
    config: TrainConfig,
    world: World,
) -> Path:
    """Write `checkpoint-<step>` and drop the oldest ones beyond `save_total_limit`.

    A collective: all ranks call it. Returns the folder.
    """
    output_dir = Path(config.output_dir)
    folder = output_dir / f"checkpoint-{state.step}"
    unfinished = output_dir / f"{UNFINISHED}{folder.name}"
    if world.is_main:
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
    barrier()
    save_model_folder(engine, processor, unfinished, world)
    engine.save_checkpoint(
        str(unfinished / SHARDS), tag=TAG, save_latest=False, exclude_frozen_parameters=True
    )
    barrier()
    if world.is_main:
        write_state(unfinished, state)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.replace(folder)
        if config.save_total_limit is not None:
            for old in checkpoints(output_dir)[: -config.save_total_limit]:
                shutil.rmtree(old)
    barrier()
    return folder


def load_checkpoint(engine: Engine, folder: Path) -> None:
    """Put weights and optimizer back as they were; `folder` has passed `check_resumable`."""
    path, _ = engine.load_checkpoint(
        str(folder / SHARDS), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
    )
    if path is None:
        raise DataError(f"{folder} lacks the shards of this run; remove it and resume again")
