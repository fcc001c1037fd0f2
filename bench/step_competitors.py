"""Who takes part in `bench step`: a model, its optimizer and the passes of its steps.

Ours is computed by the training's own parts (train/dataset.py, model/llava_hd.py); each of its
variants leaves one of them out. All have torch's fused AdamW with the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.backend import choose
from ..kernels.gelu_mlp import gelu_mlp, gelu_mlp_torch
from ..kernels.place_rows import place_rows, place_rows_torch
from ..model.fused import apply_published_liger, compile_layers, fuse_layers, liger_refusal
from ..model.last_layer import compute_every_row
from ..model.llava_hd import LlavaHD
from ..model.processor import Processor
from ..model.projector import MLPProjector, rows_with_cls
from ..model.rival_training import RivalCollator, load_trainee
from ..train.batches import PassSampler
from ..train.dataset import read_passes
from ..train.optimizer import freeze
from ..train.packs import ROUND_TO
from .packing_passes import AllLogitsPass, AnyPass, BatchPass, DensePass, PackedPass
from .step_data import StepData, our_passes, rival_loader
from .step_options import DTYPES, LEARNING_RATES, RIVALS, Request

STAGES = {1: "pretrain", 2: "finetune"}


@dataclass(frozen=True)
class Runner:
    """steps: the passes of each step, read from the loader when they are asked for, which is
    waiting for data; notes: what only it can tell (which processor)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: Generator[list[AnyPass], None, None]
    notes: dict[str, str]


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a competitor cannot take part here; None when it can."""
    if name.endswith("-liger"):
        return liger_refusal(device.type)
    if name == "no-fused-norms" and liger_refusal(device.type) is not None:
        return "transformers' norms, rope and SwiGLU are what ours runs here too"
    if name == "no-fused-projector" and choose("gelu_mlp", device, dtype, ROUND_TO).table is None:
        return "torch's projector is what ours runs here too"
    return None


def build(name: str, request: Request, stage: int, folder: Path, data: StepData) -> Runner:
    """A competitor with fresh weights of the folder, about to take its first step."""
    torch.manual_seed(request.seed)
    make = _theirs if name in RIVALS else _ours
    return make(name, request, stage, folder, data)


def adamw(model: nn.Module, stage: int) -> torch.optim.AdamW:
    """Over what trains; fused, as transformers' Trainer takes it by itself."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, LEARNING_RATES[stage], weight_decay=0.0, fused=True)


def _theirs(name: str, request: Request, stage: int, folder: Path, data: StepData) -> Runner:
    device, dtype = torch.device(request.device), getattr(torch, DTYPES[request.dtype])
    collator = RivalCollator.from_pretrained(folder)
    loader = rival_loader(data, request, collator)
    model = load_trainee(folder, stage, dtype, device, checkpointing=name.endswith("checkpointing"))
    if name.endswith("-liger"):
        apply_published_liger(model.model.language_model)
    count = request.step_samples // request.batch
    steps = _grouped(loader, (count for _ in range(request.num_steps)), device, lambda made: made)
    attention = str(model.config.text_config._attn_implementation)
    return Runner(
        model, adamw(model, stage), steps, {"processor": collator.kind, "attention": attention}
    )


# Variant -> how its passes are computed; the packs of PackedPass where it is not here.
PASSES: dict[str, type[BatchPass]] = {"no-packing": DensePass, "no-label-rows": AllLogitsPass}


def _ours(name: str, request: Request, stage: int, folder: Path, data: StepData) -> Runner:
    device, dtype = torch.device(request.device), getattr(torch, DTYPES[request.dtype])
    attention = "sdpa" if name == "no-attention" else "auto"
    order = data.order(request, packs=name != "no-packing")
    passes = our_passes(data, request, Processor.from_pretrained(folder))
    workers = 0 if name == "no-overlap" else request.workers
    sampler = PassSampler(order, 0, 1, 0, request.num_steps)
    loader = read_passes(passes, sampler, workers, pin_memory=device.type == "cuda")
    model = LlavaHD.from_pretrained(folder, dtype, device, attention)
    freeze(model, STAGES[stage])
    model.train()
    fused = name != "no-fused-norms" and liger_refusal(device.type) is None
    if fused:
        fuse_layers(model.language.causal_lm)
    change = MODEL_CHANGES.get(name)
    if change is not None:
        change(model)
    kind = PASSES.get(name, PackedPass)
    counts = (order.num_passes(step, 1) for step in range(request.num_steps))
    steps = _grouped(loader, counts, device, lambda made: kind(made.batch))
    notes = {"attention": attention, "layers": "Liger's" if fused else "transformers'"}
    return Runner(model, adamw(model, stage), steps, notes)


def _grouped(
    loader: Iterable[Any],
    counts: Iterable[int],
    device: torch.device,
    made: Callable[[Any], Any],
) -> Generator[list[AnyPass], None, None]:
    """The passes of each step, on the device. Closing it ends the loader processes."""
    rest = iter(loader)
    for count in counts:
        yield [made(one).to(device) for one in islice(rest, count)]


class EveryRowProjector(nn.Module):
    """Projects every feature row, padding too, and takes the kept ones afterwards; by the kernels
    that ours takes."""

    def __init__(self, inner: MLPProjector) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, text: Tensor, features: Tensor, rows: Tensor, source: Tensor) -> Tensor:
        """As MLPProjector.forward."""
        own, flat = self.inner, features[:, 1:].flatten(0, 1)
        weights = (own.weight_1, own.bias_1, own.weight_2, own.bias_2)
        projected = gelu_mlp(flat, *weights).index_select(0, rows)
        return place_rows(text, projected, own.row_end, source)


class TorchProjector(nn.Module):
    """The projector and the placing by torch's own operations."""

    def __init__(self, inner: MLPProjector) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, text: Tensor, features: Tensor, rows: Tensor, source: Tensor) -> Tensor:
        """As MLPProjector.forward."""
        own = self.inner
        flat, rows = rows_with_cls(features, rows)
        weights = (own.weight_1, own.bias_1, own.weight_2, own.bias_2)
        return place_rows_torch(text, gelu_mlp_torch(flat, *weights, rows), own.row_end, source)


def _set_projector(kind: type[nn.Module]) -> Callable[[LlavaHD], None]:
    def change(model: LlavaHD) -> None:
        model.projector = kind(model.projector)  # type: ignore[assignment]

    return change


MODEL_CHANGES: dict[str, Callable[[LlavaHD], object]] = {
    "no-kept-rows": _set_projector(EveryRowProjector),
    "no-fused-projector": _set_projector(TorchProjector),
    "no-label-layer": lambda model: compute_every_row(model.language.causal_lm),
    "compile": lambda model: compile_layers(model.language.causal_lm),
}
