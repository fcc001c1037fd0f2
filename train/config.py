"""A training run as a value: recipes (YAML) and flags fill these dataclasses, nothing else does.

The names are those of transformers' trainer and of LLaVA's scripts where these have one. Every
field carries its one line of help, which `llava-hd pretrain --help` prints. Nothing here imports
torch, so that help is instant.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..hd.errors import UsageError
from .settings import (
    DataConfig,
    LoraConfig,
    ModelSource,
    OptimizerConfig,
    ZeroConfig,
    at_least,
    positive,
    setting,
)

SHIPPED = "shipped:"
METRICS_FILE, BOARD_FOLDER = "metrics.jsonl", "runs"  # in output_dir
BAD_SAMPLES_FILE, NONFINITE_FILE = "bad_samples.jsonl", "nonfinite.jsonl"
SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "model" / "shipped"


@dataclass(frozen=True)
class TrainConfig:
    """One run of one stage. Stage 1 (pretrain) trains projector and row-end; stage 2 (finetune)
    these and the language model, or adapters in it (`lora`). The tower is frozen in both, unless
    `train_vision` is set."""

    stage: Literal["pretrain", "finetune"]
    output_dir: str = field(metadata={"help": "new folder for model, checkpoints and metrics"})
    model: ModelSource
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    lora: LoraConfig | None = None
    train_vision: bool = setting(False, "train the tower too; frozen by default, as in the paper")
    vision_layers: int | None = setting(
        None, "only its last layers that are read; all of it by default"
    )
    per_device_batch_size: int = setting(16, "samples of a rank in one pass (packed into one)")
    gradient_accumulation_steps: int | None = setting(None, "passes per step; 1 by default")
    global_batch_size: int | None = setting(
        None, "samples per step over all ranks; sets gradient_accumulation_steps"
    )
    epochs: float = setting(1.0, "times over the data; the last batch is filled from the next one")
    max_steps: int | None = setting(None, "number of steps, instead of epochs")
    precision: Literal["fp32", "bf16"] = setting("bf16", "of weights and activations in the model")
    gradient_clipping: float = setting(0.0, "largest gradient norm; 0.0 is off, as in LLaVA-1.5")
    gradient_checkpointing: bool | Literal["auto"] = setting(
        False, "recompute activations: less memory, more time; auto: only if memory needs it"
    )
    max_length: int = setting(2048, "tokens of a sample; text behind is cut, visual tokens never")
    loss: Literal["token", "sample"] = setting(
        "token", "mean over the step's label tokens, or over its samples' own means"
    )
    on_nonfinite: Literal["skip", "stop"] = setting("skip", "a step whose loss or gradient is NaN")
    nonfinite_limit: int = setting(5, "steps skipped one after another before the run stops")
    seed: int = setting(42, "of data order and of new weights")
    deterministic: bool = setting(False, "only deterministic kernels of torch")
    logging_steps: int = setting(1, "steps between two lines of metrics")
    save_steps: int = setting(0, "steps between two checkpoints; 0: only the model at the end")
    save_total_limit: int | None = setting(None, "checkpoints kept, the newest; all by default")
    resume: str = setting("none", "none, auto (the newest checkpoint) or a checkpoint's folder")
    timeout_minutes: float = setting(30.0, "after which a stuck collective ends the run")

    def __post_init__(self) -> None:
        for name in ("per_device_batch_size", "max_length", "logging_steps", "nonfinite_limit"):
            at_least(name, getattr(self, name), 1)
        for name in ("gradient_accumulation_steps", "global_batch_size", "max_steps"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        for name in ("save_steps", "gradient_clipping", "seed"):
            at_least(name, getattr(self, name), 0)
        if self.save_total_limit is not None:
            at_least("save_total_limit", self.save_total_limit, 1)
        positive("epochs", self.epochs)
        positive("timeout_minutes", self.timeout_minutes)
        if self.vision_layers is not None:
            at_least("vision_layers", self.vision_layers, 1)
        self._check_what_trains()
        if not self.output_dir:
            raise UsageError("output_dir is missing; give a new folder")
        if self.stage == "finetune" and self.model.vision and not self.model.projector_from:
            raise UsageError(
                "model.projector_from is missing; finetune from parts goes on with the projector "
                "of a stage 1, give its output folder"
            )

    def _check_what_trains(self) -> None:
        for name, value in (
            ("vision_layers", self.vision_layers),
            ("optimizer.vision_lr", self.optimizer.vision_lr),
        ):
            if value is not None and not self.train_vision:
                raise UsageError(f"{name} needs train_vision; set it, or leave {name} out")
        if self.model.compile and self.zero.stage == 3:
            raise UsageError(
                "model.compile needs zero.stage 2; stage 3 fetches weights inside of each layer, "
                "which cannot be compiled as one"
            )
        if self.train_vision and self.data.feature_cache is not None:
            raise UsageError(
                "data.feature_cache keeps what a frozen tower says, and train_vision changes the "
                "tower; leave one of them out"
            )
        if self.lora is None:
            return
        if self.stage == "pretrain":
            raise UsageError("lora has no place in pretrain, which trains the projector only")
        if self.lora.bits < 16 and self.zero.stage == 3:
            raise UsageError(
                f"lora.bits {self.lora.bits} needs zero.stage 2; stage 3 would partition the "
                "weights that bitsandbytes holds"
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
        "nonfinite_limit",
        "data.num_workers",
        "data.resizing",
        "data.feature_cache",
        "data.feature_cache_gib",
        "data.bad_sample_limit",
        *(f"zero.{item.name}" for item in fields(ZeroConfig)),
        "data.images",
        "model.attention",
        "model.fused",
        "model.compile",
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
    "lora": LoraConfig,
}
