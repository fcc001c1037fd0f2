"""Everything that can be wrong before a run starts, found out before anything is written."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..hd.errors import UsageError
from ..hd.limits import beyond_training, limited
from ..hd.tiler import find_resizer
from ..model.attention import implementation
from ..model.config import LlavaHDConfig, read_config_json
from ..model.foreign import read_config
from ..model.fused import check_liger
from ..model.prompt import get_template
from .checkpoint_state import (
    STATE_FILE,
    TrainerState,
    check_resumable,
    read_state,
)
from .config import (
    BAD_SAMPLES_FILE,
    BOARD_FOLDER,
    METRICS_FILE,
    NONFINITE_FILE,
    TrainConfig,
    part_folder,
)
from .lora import check_lora
from .manifest import checkpoints, quick_fault
from .ordering import run_order
from .recipe import config_values
from .settings import ModelSource
from .sources import RecordSet, check_images, open_records

CONFIG_FILE = "train_config.yaml"


@dataclass(frozen=True)
class Job:
    """A run that may start.

    state: where it begins. checkpoint: the folder it goes on from, if any. num_images: different
    ones in the data; None where bad ones are allowed, so that none was looked for.
    """

    config: TrainConfig
    records: RecordSet
    num_images: int | None
    state: TrainerState
    checkpoint: Path | None

    @property
    def data_words(self) -> str:
        """How much data there is, in words."""
        images = "" if self.num_images is None else f" with {self.num_images:,} images"
        return f"{len(self.records):,} records{images}"


def prepare(config: TrainConfig, world_size: int, checkpoint: Path | None) -> Job:
    """Check configuration, model folders, data and output folder; writes nothing.

    checkpoint: what `resume` comes to, see `find_checkpoint`. Raises UsageError or DataError, one
    line each.
    """
    check_model_source(config.model)
    check_lora(config)
    if config.model.fused == "liger":
        check_liger("cuda" if torch.cuda.is_available() else "cpu")
    if config.sample_template is not None:
        get_template(config.sample_template)
    find_resizer(config.data.resizing)
    _check_output_dir(config)
    if config.data.feature_cache is not None:
        _check_writable("data.feature_cache", Path(config.data.feature_cache))
    tolerant = config.data.bad_samples != "error"
    records = open_records(config.data.paths, config.data.images or None, tolerant)
    records = records.share(config.data.share, config.seed)
    num_images = None if tolerant else check_images(records)
    state = _state(config, world_size, records, checkpoint)
    if state.is_finished and not _is_same(checkpoint, config.output_dir):
        raise UsageError(
            f"resume {checkpoint}: that run is finished, nothing of it is left to do; give one of "
            "its checkpoints, or train on from it with model.path"
        )
    return Job(config, records, num_images, state, checkpoint)


def _state(
    config: TrainConfig, world_size: int, records: RecordSet, checkpoint: Path | None
) -> TrainerState:
    """Where the run begins: at the start, or where its checkpoint was written. The samples of a
    step stay those that it began with, even if the number of ranks changes."""
    before = None if checkpoint is None else read_state(checkpoint)
    fresh = TrainerState(
        step=0,
        num_steps=0,
        num_samples=len(records),
        data_digest=records.digest(),
        samples_per_step=before.samples_per_step if before else config.samples_per_step(world_size),
        world_size=world_size,
        config=config_values(config),
    )
    if checkpoint is not None:
        return check_resumable(checkpoint, fresh)
    order = run_order(config, records, fresh.samples_per_step)
    return replace(fresh, num_steps=config.max_steps or order.num_steps(config.epochs))


def check_model_source(source: ModelSource) -> None:
    """Make sure that the folders hold models, and that tower and geometry fit each other."""
    get_template(source.template)
    implementation(source.attention)
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
        resolution_words(source)  # the limits must fit the whole model's geometry
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


def resolution_words(source: ModelSource) -> str | None:
    """A warning where a whole model goes on with grids that it was not trained on until now.

    Raises UsageError for limits that make no sense with its geometry.
    """
    if source.path is None or not source.limits:
        return None
    folder = part_folder(source.path)
    trained = read_config(folder).hd
    try:
        used = limited(trained, source.limits)
    except UsageError as error:
        raise UsageError(f"model.{error}") from error
    line = beyond_training(trained, used)
    return None if line is None else f"warning: model.path {source.path}: {line}"


def _check_output_dir(config: TrainConfig) -> None:
    """A run begins in an empty folder, or goes on in its own."""
    folder = Path(config.output_dir)
    _check_writable("output_dir", folder)
    if is_fresh(folder):
        return
    if config.resume == "none":
        raise UsageError(
            f"output_dir {folder} is not empty; go on with --resume auto, or give a new folder"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(
            f"output_dir {folder} is not empty and holds no run ({CONFIG_FILE}); give a new folder"
        )


def _check_writable(field: str, folder: Path) -> None:
    """UsageError where a folder could not be made or written."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        of = "" if nearest == folder else f" (in {folder})"
        raise UsageError(f"{field} {nearest}{of} is a file; give a new folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{field} {folder}: {nearest} cannot be written; give another folder")


def is_fresh(folder: Path) -> bool:
    """Whether a folder is not there, empty, or left by a run that has not logged a step."""
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    found -= {BAD_SAMPLES_FILE, NONFINITE_FILE}
    if not found:
        return True
    if CONFIG_FILE not in found or not found <= {CONFIG_FILE, METRICS_FILE, BOARD_FOLDER}:
        return False
    metrics, board = folder / METRICS_FILE, folder / BOARD_FOLDER
    if metrics.exists() and metrics.stat().st_size:
        return False
    return all(path.name.startswith("events.out.tfevents.") for path in board.glob("*"))


def _is_same(checkpoint: Path | None, output_dir: str) -> bool:
    return checkpoint is not None and checkpoint.resolve() == Path(output_dir).resolve()


def is_finished(folder: Path) -> bool:
    """Whether a folder is the output of a run that has come to its end."""
    return (folder / STATE_FILE).is_file() and read_state(folder).is_finished


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The folder that `resume` asks for as far as names and sizes tell; None to begin at the start.

    What this finds is for checks and messages before the ranks start: they read every byte.
    """
    output_dir = Path(config.output_dir)
    if config.resume == "none":
        return None
    if config.resume == "auto":
        if is_finished(output_dir):
            return output_dir
        whole = (path for path in reversed(checkpoints(output_dir)) if quick_fault(path) is None)
        return next(whole, None)
    read_state(Path(config.resume))
    return Path(config.resume)
