"""Everything that can be wrong before a run starts, found out before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..hd.errors import UsageError
from ..model.config import LlavaHDConfig, read_config_json
from ..model.prompt import get_template
from .batches import BatchOrder, order_of
from .checkpoint_state import (
    STATE_FILE,
    TrainerState,
    check_resumable,
    checkpoints,
    read_state,
)
from .config import ModelSource, TrainConfig, part_folder
from .recipe import config_values
from .records import Record, check_images, read_records

CONFIG_FILE = "train_config.yaml"


@dataclass(frozen=True)
class Job:
    """A run that may start.

    state: where it begins. checkpoint: the folder it goes on from, if any. num_images: different
    ones in the data.
    """

    config: TrainConfig
    records: Sequence[Record]
    num_images: int
    order: BatchOrder
    state: TrainerState
    checkpoint: Path | None


def prepare(config: TrainConfig, world_size: int) -> Job:
    """Check configuration, model folders, data and output folder; writes nothing.

    Raises UsageError or DataError, one line each.
    """
    check_model_source(config.model)
    if config.sample_template is not None:
        get_template(config.sample_template)
    samples_per_step = config.samples_per_step(world_size)
    _check_output_dir(config)
    records = read_records(config.data.paths)
    num_images = check_images(records, config.data.images)
    order = order_of(
        records, samples_per_step, config.per_device_batch_size, config.seed, config.data.batching
    )
    fresh = TrainerState(
        step=0,
        num_steps=config.max_steps or order.num_steps(config.epochs),
        num_samples=len(records),
        samples_per_step=samples_per_step,
        world_size=world_size,
        config=config_values(config),
    )
    checkpoint = find_checkpoint(config)
    state = fresh if checkpoint is None else check_resumable(checkpoint, fresh)
    return Job(config, records, num_images, order, state, checkpoint)


def check_model_source(source: ModelSource) -> None:
    """Make sure that the folders hold models, and that tower and geometry fit each other."""
    get_template(source.template)
    kinds = {}
    for field in ("path", "vision", "language", "projector_from"):
        folder = getattr(source, field)
        if folder is not None:
            try:
                kinds[field] = read_config_json(part_folder(folder))
            except UsageError as error:
                raise UsageError(f"model.{field}: {error}") from error
    hd = source.geometry
    if hd is None:
        return
    vision = kinds["vision"]
    # Raises when tile or patch differ from what the tower takes.
    LlavaHDConfig(
        hd=hd,
        vision=vision.get("vision_config", vision),
        text=kinds["language"],
        image_token_id=0,
        projector=source.projector,
        vision_layer=source.vision_layer,
    )


def _check_output_dir(config: TrainConfig) -> None:
    """A run begins in an empty folder, or goes on in its own."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir {folder} is a file; give a new folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if config.resume == "none":
        raise UsageError(
            f"output_dir {folder} is not empty; go on with --resume auto, or give a new folder"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(
            f"output_dir {folder} is not empty and holds no run ({CONFIG_FILE}); give a new folder"
        )


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The folder that `resume` asks for; None to begin at the start.

    A run that is finished is found as its output folder.
    """
    output_dir = Path(config.output_dir)
    if config.resume == "none":
        return None
    if config.resume == "auto":
        if (output_dir / STATE_FILE).is_file():
            return output_dir
        return next(reversed(checkpoints(output_dir)), None)
    read_state(Path(config.resume))
    return Path(config.resume)
