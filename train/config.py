"""A training run as a value: recipes (YAML) and flags fill these dataclasses, nothing else does.

The names are those of transformers' trainer and of LLaVA's scripts where these have one. Every
field carries its one line of help, which `llava-hd pretrain --help` prints. Nothing here imports
torch, so that help is instant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..hd.errors import UsageError
from ..hd.grid import HDConfig, get_preset

SHIPPED = "shipped:"
METRICS_FILE, BOARD_FOLDER = "metrics.jsonl", "runs"  # in output_dir
SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "model" / "shipped"


def setting(default: Any, help_text: str) -> Any:
    """A field with its line of help."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class ModelSource:
    """What the run starts from: a whole model (`path`), or parts (`vision` and `language`)."""

    path: str | None = setting(None, "folder of a whole model to go on from, instead of parts")
    vision: str | None = setting(None, "folder of the CLIP tower; shipped:NAME is a nano part")
    language: str | None = setting(None, "folder of the language model and its tokenizer")
    projector_from: str | None = setting(None, "stage 1's output: projector and row-end to go on")
    preset: str | None = setting(None, "geometry by name: hd448, hdflex, base336, ...")
    hd: HDConfig | None = setting(None, "geometry in full, instead of a preset")  # noqa: RUF009
    projector: Literal["mlp2x_gelu", "linear"] = setting("mlp2x_gelu", "kind of projector")
    vision_layer: int = setting(-2, "which hidden state of the tower; -2 is the last but one")
    template: str = setting("vicuna_v1", "conversation template that the model is asked with")
    attention: str = setting("auto", "attention implementation")

    def __post_init__(self) -> None:
        parts = [name for name in ("vision", "language") if getattr(self, name) is not None]
        geometry = [name for name in ("preset", "hd") if getattr(self, name) is not None]
        if self.path is not None:
            others = [*parts, *geometry, *(["projector_from"] if self.projector_from else [])]
            if others:
                raise UsageError(
                    f"model.path names a whole model, so model.{others[0]} has no place; "
                    "leave one of them out"
                )
        elif len(parts) != 2:
            missing = "language" if "vision" in parts else "vision"
            raise UsageError(
                f"model.{missing} is missing; give model.path, or model.vision and model.language"
            )
        elif len(geometry) != 1:
            raise UsageError("give the geometry of the images as model.preset or as model.hd")
        if self.preset is not None:
            get_preset(self.preset)

    @property
    def geometry(self) -> HDConfig | None:
        """The geometry of parts; None for a whole model, whose config.json has it."""
        return self.hd if self.preset is None else get_preset(self.preset)


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    path: tuple[str, ...] | str = setting("", "LLaVA JSON or JSON lines; several are joined")
    images: str = setting("", "folder that the image names of the records are relative to")
    template: str | None = setting(None, "template of the samples; plain in stage 1 by default")
    batching: Literal["plain", "modality"] = setting(
        "plain", "modality: no batch mixes samples with and without images"
    )
    num_workers: int = setting(4, "loader processes of each rank; 0 loads in the rank itself")

    def __post_init__(self) -> None:
        if not self.path:
            raise UsageError("data.path is missing; give a LLaVA JSON or JSON lines file")
        if not self.images:
            raise UsageError("data.images is missing; give the root folder of the images")
        _at_least("data.num_workers", self.num_workers, 0)

    @property
    def paths(self) -> tuple[str, ...]:
        """The record files."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate: linear warm-up, then half a cosine down to zero."""

    lr: float = setting(2e-5, "peak learning rate")
    projector_lr: float | None = setting(None, "that of projector and row-end, if another")
    betas: tuple[float, float] = setting((0.9, 0.999), "decay of AdamW's two moments")
    eps: float = setting(1e-8, "AdamW's epsilon")
    weight_decay: float = setting(0.0, "of matrices; norms, biases and row-end have none")
    warmup_ratio: float = setting(0.03, "share of the steps for warm-up, rounded up")
    schedule: Literal["cosine", "constant"] = setting("cosine", "after the warm-up")

    def __post_init__(self) -> None:
        _positive("optimizer.lr", self.lr)
        if self.projector_lr is not None:
            _positive("optimizer.projector_lr", self.projector_lr)
        _positive("optimizer.eps", self.eps)
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optimizer.betas must lie in [0, 1), not {list(self.betas)}")
        if not 0 <= self.warmup_ratio <= 1:
            raise UsageError(f"optimizer.warmup_ratio must lie in 0..1, not {self.warmup_ratio}")


# Counts of ZeroConfig that may be 0: keep no tensor whole, fetch or keep nothing ahead.
MAY_BE_ZERO = frozenset(
    {
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    }
)


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed's ZeRO: what the ranks share out, and in which portions (counts of elements)."""

    # No stage 1: with bf16 and several passes DeepSpeed 0.19.8 gives it wrong gradients.
    stage: Literal[2, 3] = setting(2, "2: optimizer and gradients, 3: and weights")
    offload_optimizer: Literal["none", "cpu"] = setting("none", "where optimizer states live")
    offload_param: Literal["none", "cpu"] = setting("none", "where idle weights live (stage 3)")
    overlap_comm: bool = setting(True, "communicate during the backward pass")
    reduce_bucket_size: int = setting(50_000_000, "gradients reduced at once")
    allgather_bucket_size: int = setting(50_000_000, "weights gathered at once (stage 2)")
    sub_group_size: int = setting(1_000_000_000, "weights updated at once (stage 3)")
    stage3_prefetch_bucket_size: int = setting(50_000_000, "weights fetched ahead")
    stage3_param_persistence_threshold: int = setting(50_000, "smaller tensors stay whole")
    stage3_max_live_parameters: int = setting(1_000_000_000, "weights whole at one time")
    stage3_max_reuse_distance: int = setting(1_000_000_000, "kept if used again within these")

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.type == "int":
                least = 0 if item.name in MAY_BE_ZERO else 1
                _at_least(f"zero.{item.name}", getattr(self, item.name), least)
        if self.offload_param == "cpu" and self.stage != 3:
            raise UsageError(
                "zero.offload_param cpu needs zero.stage 3; below it weights are whole"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One run of one stage. Stage 1 (pretrain) trains projector and row-end; stage 2 (finetune)
    these and the language model. The tower is frozen in both."""

    stage: Literal["pretrain", "finetune"]
    output_dir: str = field(metadata={"help": "new folder for model, checkpoints and metrics"})
    model: ModelSource
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    per_device_batch_size: int = setting(16, "samples of a rank in one pass (packed into one)")
    gradient_accumulation_steps: int | None = setting(None, "passes per step; 1 by default")
    global_batch_size: int | None = setting(
        None, "samples per step over all ranks; sets gradient_accumulation_steps"
    )
    epochs: float = setting(1.0, "times over the data; the last batch is filled from the next one")
    max_steps: int | None = setting(None, "number of steps, instead of epochs")
    precision: Literal["fp32", "bf16"] = setting("bf16", "of weights and activations in the model")
    gradient_clipping: float = setting(0.0, "largest gradient norm; 0.0 is off, as in LLaVA-1.5")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    max_length: int = setting(2048, "tokens of a sample; text behind is cut, visual tokens never")
    seed: int = setting(42, "of data order and of new weights")
    deterministic: bool = setting(False, "only deterministic kernels of torch")
    logging_steps: int = setting(1, "steps between two lines of metrics")
    save_steps: int = setting(0, "steps between two checkpoints; 0: only the model at the end")
    save_total_limit: int | None = setting(None, "checkpoints kept, the newest; all by default")
    resume: str = setting("none", "none, auto (the newest checkpoint) or a checkpoint's folder")
    timeout_minutes: float = setting(30.0, "after which a stuck collective ends the run")

    def __post_init__(self) -> None:
        for name in ("per_device_batch_size", "max_length", "logging_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("gradient_accumulation_steps", "global_batch_size", "max_steps"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("save_steps", "gradient_clipping", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.save_total_limit is not None:
            _at_least("save_total_limit", self.save_total_limit, 1)
        _positive("epochs", self.epochs)
        _positive("timeout_minutes", self.timeout_minutes)
        if not self.output_dir:
            raise UsageError("output_dir is missing; give a new folder")
        if self.stage == "finetune" and self.model.vision and not self.model.projector_from:
            raise UsageError(
                "model.projector_from is missing; finetune from parts goes on with the projector "
                "of a stage 1, give its output folder"
            )

    @property
    def sample_template(self) -> str | None:
        """The template of the samples; None is the model's own."""
        if self.data.template is None and self.stage == "pretrain":
            return "plain"
        return self.data.template

    def accumulation(self, world_size: int) -> int:
        """Passes of each rank per step. UsageError where the batch sizes do not divide."""
        given = self.gradient_accumulation_steps
        if self.global_batch_size is None:
            return given or 1
        per_pass = self.per_device_batch_size * world_size
        passes, rest = divmod(self.global_batch_size, per_pass)
        if rest or (given is not None and given != passes):
            raise UsageError(
                f"global_batch_size {self.global_batch_size} is not per_device_batch_size "
                f"{self.per_device_batch_size} x {world_size} ranks x gradient_accumulation_steps "
                f"{given or 'n'}; change one of them"
            )
        return passes

    def samples_per_step(self, world_size: int) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.per_device_batch_size * world_size * self.accumulation(world_size)


def part_folder(name: str) -> Path:
    """The folder of a model or part; `shipped:NAME` is one that came with llava-hd."""
    if name.startswith(SHIPPED):
        return SHIPPED_FOLDER / name.removeprefix(SHIPPED)
    return Path(name)


# What may change between a checkpoint and its resumption without changing the weights it leads to.
FREE_TO_CHANGE = frozenset(
    {
        "output_dir",
        "resume",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "timeout_minutes",
        "data.num_workers",
        "data.images",
        "model.attention",
    }
)


def leaves(cls: type, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, dataclass field) of every setting below a configuration class."""
    found = []
    for item in fields(cls):
        below = SECTIONS.get(item.name) if not prefix else None
        if below is None:
            found.append((prefix + item.name, item))
        else:
            found += leaves(below, f"{item.name}.")
    return found


SECTIONS: dict[str, type] = {
    "model": ModelSource,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "zero": ZeroConfig,
}


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least or math.isinf(value):
        raise UsageError(f"{name} must be {least} or more, not {value}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{name} must be above 0, not {value}")
