"""The tables of a run's configuration: what model, what data, which optimizer, how ZeRO shares.

Every field carries its one line of help, which `llava-hd pretrain --help` prints. Nothing here
imports torch, so that help is instant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..hd.errors import UsageError
from ..hd.grid import HDConfig, get_preset
from ..hd.limits import ResolutionLimits, limited, parse_grid


def setting(default: Any, help_text: str) -> Any:
    """A field with its line of help."""
    return field(default=default, metadata={"help": help_text})


def at_least(name: str, value: float, least: int) -> None:
    """Raise UsageError unless a setting is a number of `least` or more."""
    if not value >= least or math.isinf(value):
        raise UsageError(f"{name} must be {least} or more, not {value}")


def positive(name: str, value: float) -> None:
    """Raise UsageError unless a setting is above 0 and finite."""
    if not 0 < value < math.inf:
        raise UsageError(f"{name} must be above 0, not {value}")


@dataclass(frozen=True)
class ModelSource:
    """What the run starts from: a whole model (`path`), or parts (`vision` and `language`)."""

    path: str | None = setting(None, "folder of a whole model to go on from, instead of parts")
    vision: str | None = setting(None, "folder of the CLIP tower; shipped:NAME is a nano part")
    language: str | None = setting(None, "folder of the language model and its tokenizer")
    projector_from: str | None = setting(None, "stage 1's output: projector and row-end to go on")
    preset: str | None = setting(None, "geometry by name: hd448, hdflex, base336, ...")
    hd: HDConfig | None = setting(None, "geometry in full, instead of a preset")  # noqa: RUF009
    max_tiles: int | None = setting(None, "all grids of at most so many tiles, instead of its own")
    max_visual_tokens: int | None = setting(
        None, "of an image; it gets the best grid within that, or is a bad sample"
    )
    grid: str | None = setting(None, "ROWSxCOLS: this grid for every image, instead of its own")
    projector: Literal["mlp2x_gelu", "linear"] = setting("mlp2x_gelu", "kind of projector")
    vision_layer: int = setting(-2, "which hidden state of the tower; -2 is the last but one")
    template: str = setting("vicuna_v1", "conversation template that the model is asked with")
    attention: str = setting("auto", "attention implementation")
    fused: Literal["none", "liger"] = setting(
        "none", "liger: norms, rotary positions and SwiGLU as Liger Kernel's (CUDA)"
    )
    compile: bool = setting(False, "compile the decoder layers; minutes at the start (not ZeRO-3)")

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
        try:
            self.geometry  # noqa: B018 (what does not fit is told here)
        except UsageError as error:
            raise UsageError(f"model.{error}") from error

    @property
    def limits(self) -> ResolutionLimits:
        """Which grids its images may have, other than the geometry's own."""
        grid = None if self.grid is None else parse_grid(self.grid)
        return ResolutionLimits(self.max_tiles, self.max_visual_tokens, grid)

    @property
    def geometry(self) -> HDConfig | None:
        """The geometry of parts, within the limits; None for a whole model, whose config.json has
        it (`limits` apply to that)."""
        limits = self.limits
        found = self.hd if self.preset is None else get_preset(self.preset)
        return None if found is None else limited(found, limits)


INSIDE = (".parquet", ".tar")  # kinds of files that may hold the images themselves


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    path: tuple[str, ...] | str = setting("", "JSON, JSON lines, Parquet, tar; several are joined")
    images: str = setting("", "folder of the images that records name; none if all stand in path")
    share: float = setting(1.0, "of the records that are trained on, drawn by the run's seed")
    template: str | None = setting(None, "template of the samples; plain in stage 1 by default")
    batching: Literal["packs", "modality", "padded", "plain"] = setting(
        "packs",
        "packs of at most pack_tokens; modality: with and without images apart, as LLaVA; padded "
        "to the longest of a pass; plain: so many samples laid end to end",
    )
    pack_tokens: int | Literal["auto"] | None = setting(
        None,
        "tokens of a pack (batching packs); per_device_batch_size mean samples by default; auto: "
        "as many as the memory holds",
    )
    bad_samples: Literal["error", "skip", "text_only"] = setting(
        "error", "an unreadable one: stop, leave it out, or keep its text without the image"
    )
    bad_sample_limit: float = setting(0.001, "share of the data that may be bad before it stops")
    resizing: Literal["auto", "pillow", "numba"] = setting(
        "auto", "what resizes images, all to the same bytes; auto: numba where it is installed"
    )
    feature_cache: str | None = setting(
        None, "folder that keeps a frozen tower's features of each image, for later runs"
    )
    feature_cache_gib: float | None = setting(None, "size up to which that folder is filled")
    num_workers: int = setting(4, "loader processes of each rank; 0 loads in the rank itself")

    def __post_init__(self) -> None:
        if not self.path:
            raise UsageError("data.path is missing; give a LLaVA JSON or JSON lines file")
        if not self.images and not all(path.endswith(INSIDE) for path in self.paths):
            raise UsageError("data.images is missing; give the root folder of the images")
        at_least("data.num_workers", self.num_workers, 0)
        if not 0 < self.share <= 1:
            raise UsageError(f"data.share must be above 0 and at most 1, not {self.share:g}")
        if self.feature_cache == "":
            raise UsageError("data.feature_cache is empty; give a folder, or leave it out")
        if self.feature_cache_gib is not None:
            positive("data.feature_cache_gib", self.feature_cache_gib)
            if self.feature_cache is None:
                raise UsageError("data.feature_cache_gib needs data.feature_cache; give its folder")
        if isinstance(self.pack_tokens, int):
            at_least("data.pack_tokens", self.pack_tokens, 1)
        elif self.pack_tokens == "auto" and self.batching != "packs":
            raise UsageError(
                f"data.pack_tokens auto needs data.batching packs, not {self.batching}"
            )
        if not 0 <= self.bad_sample_limit <= 1:
            raise UsageError(f"data.bad_sample_limit must lie in 0..1, not {self.bad_sample_limit}")

    @property
    def paths(self) -> tuple[str, ...]:
        """The record files."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate: linear warm-up, then half a cosine down to zero."""

    lr: float = setting(2e-5, "peak learning rate")
    projector_lr: float | None = setting(None, "that of projector and row-end, if another")
    vision_lr: float | None = setting(None, "that of the tower (train_vision), if another")
    betas: tuple[float, float] = setting((0.9, 0.999), "decay of AdamW's two moments")
    eps: float = setting(1e-8, "AdamW's epsilon")
    weight_decay: float = setting(0.0, "of matrices; norms, biases and row-end have none")
    warmup_ratio: float = setting(0.03, "share of the steps for warm-up, rounded up")
    schedule: Literal["cosine", "constant"] = setting("cosine", "after the warm-up")

    def __post_init__(self) -> None:
        positive("optimizer.lr", self.lr)
        for name in ("projector_lr", "vision_lr"):
            if getattr(self, name) is not None:
                positive(f"optimizer.{name}", getattr(self, name))
        positive("optimizer.eps", self.eps)
        at_least("optimizer.weight_decay", self.weight_decay, 0)
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
                at_least(f"zero.{item.name}", getattr(self, item.name), least)
        if self.offload_param == "cpu" and self.stage != 3:
            raise UsageError(
                "zero.offload_param cpu needs zero.stage 3; below it weights are whole"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of the language model's weights; the defaults are LLaVA-1.5's.

    With this table in a recipe (or one of its settings as a flag) the adapters are trained, the
    language model is not.
    """

    r: int = setting(128, "rank of the adapters")
    alpha: int = setting(256, "their scale is alpha / r")
    dropout: float = setting(0.05, "of what goes into an adapter, in training")
    target_modules: tuple[str, ...] | None = setting(
        None, "last names of the adapted linears; all of the decoder layers by default"
    )
    bits: Literal[16, 8, 4] = setting(16, "of the frozen linears; 4 is QLoRA; 16: as precision")
    quant_type: Literal["nf4", "fp4"] = setting("nf4", "numbers of 4 bits")
    double_quant: bool = setting(True, "their scales in fewer bits too")

    def __post_init__(self) -> None:
        at_least("lora.r", self.r, 1)
        at_least("lora.alpha", self.alpha, 1)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"lora.dropout must lie in [0, 1), not {self.dropout}")
        if self.target_modules is not None and not self.target_modules:
            raise UsageError("lora.target_modules is empty; name a linear, or leave it out")
