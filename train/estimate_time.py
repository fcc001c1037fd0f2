"""Operations of a step, and what they cost at a given or measured speed; no speed is invented.

A matrix product of m x k by k x n is 2mkn operations. For a weight of P numbers and T rows: 2PT
forward, 2PT for the gradient of its input wherever something before it learns, 2PT for its own
where it learns, and 2PT once more where gradient checkpointing computes the forward again (of a
layer all but its last linear, whose output nobody needs). So a trained weight costs 6PT, a frozen
one that gradients pass through 4PT, a frozen tower 2PT.

Attention over a sequence of t tokens is 4 t² heads·d forward, half of it if causal, and 2.5 times
that backward (Dao, FlashAttention-2, arXiv 2307.08691, sec. 3). The head and the last layer's MLP
see label rows only. The tower's rows are patches and CLS of every tile. Norms, activations and the
optimizer are left out: they are bound by memory, and a measured speed has them in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch import nn

from ..hd.errors import UsageError
from ..model.last_layer import LastLayer
from ..model.llava_hd import LlavaHD
from ..model.needs import head_width
from .checkpoint_state import STATE_FILE, read_state
from .config import METRICS_FILE
from .estimate_model import outline_run
from .metrics import read_metrics
from .recipe import config_from

BACKWARD_OF_ATTENTION = 2.5  # times forward


@dataclass(frozen=True)
class Work:
    """What is computed: tokens, the sum of the squared sequence lengths, tiles, visual rows,
    learned tokens. Sums over many samples are fine: everything is linear in these."""

    tokens: float
    squares: float
    tiles: float
    rows: float
    labels: float

    @classmethod
    def of_samples(cls, total: np.ndarray, visual: np.ndarray, tiles: np.ndarray) -> Work:
        """Of samples int64 `[n]`; all their words count as learned, which is an upper bound."""
        words = np.maximum(total - visual, 0)
        squares = (total.astype(np.float64) ** 2).sum()
        sums = (array.sum() for array in (tiles, visual, words))
        return cls(float(total.sum()), float(squares), *map(float, sums))

    def __mul__(self, factor: float) -> Work:
        return Work(**{name: value * factor for name, value in vars(self).items()})


@dataclass(frozen=True)
class Operations:
    """Floating-point operations by part; `again` are those that checkpointing repeats."""

    tower: float
    projector: float
    language: float
    attention: float
    head: float
    again: float

    @property
    def total(self) -> float:
        """All that is computed."""
        return sum(vars(self).values())


def count_operations(model: LlavaHD, work: Work, checkpointing: bool) -> Operations:
    """The operations of forward and backward over so much work, in a model whose `requires_grad`
    says what learns (on the meta device or not)."""
    tower, tower_again = _tower(model, work.tiles, checkpointing)
    projector, projector_again = _projector(model, work.rows, checkpointing)
    decoder = model.language.causal_lm.get_decoder()
    forward, backward, ends = _decoder(decoder, work)
    config = model.language.causal_lm.config
    heads_width = config.num_attention_heads * head_width(config)
    attention = 2.0 * work.squares * heads_width * config.num_hidden_layers
    head = model.language.head.weight
    head_products = 3 if head.requires_grad else 2  # logits, and both gradients at once
    again = forward + attention - ends if checkpointing else 0.0
    return Operations(
        tower=tower,
        projector=projector,
        language=forward + backward,
        attention=attention * (1 + BACKWARD_OF_ATTENTION),
        head=2.0 * head_products * head.numel() * work.labels,
        again=again + tower_again + projector_again,
    )


def _decoder(decoder: Any, work: Work) -> tuple[float, float, float]:
    """(forward, backward) of the linears of all layers, and forward of each layer's last one."""
    forward, backward = _linears(decoder, work.tokens)
    layers: list[nn.Module] = list(decoder.layers)
    ends = sum(_last(layer, work.tokens) for layer in layers)
    last = layers[-1]
    if not isinstance(last, LastLayer):
        return forward, backward, ends
    spared = work.tokens - work.labels  # rows that its MLP does not see
    less_forward, less_backward = _linears(last.mlp, spared)
    return forward - less_forward, backward - less_backward, ends - _last(last.mlp, spared)


def _linears(module: nn.Module, rows: float) -> tuple[float, float]:
    """(forward, backward) of the linears below a module that something before learns."""
    matrices = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    forward = 2.0 * rows * sum(weight.numel() for weight in matrices)
    learned = 2.0 * rows * sum(weight.numel() for weight in matrices if weight.requires_grad)
    return forward, forward + learned


def _last(layer: nn.Module, rows: float) -> float:
    """Forward of a layer's last linear."""
    *_, linear = (m for m in layer.modules() if isinstance(m, nn.Linear))
    return 2.0 * rows * linear.weight.numel()


def _projector(model: LlavaHD, rows: float, checkpointing: bool) -> tuple[float, float]:
    matrices = [p.numel() for p in model.projector.parameters() if p.dim() == 2]
    forward = 2.0 * rows * sum(matrices)
    # The first matrix passes no gradient on to a frozen tower.
    passed = forward if model.vision.num_frozen is not None else 2.0 * rows * sum(matrices[1:])
    return 2 * forward + passed, 2.0 * rows * matrices[0] if checkpointing and matrices[1:] else 0.0


def _tower(model: LlavaHD, tiles: float, checkpointing: bool) -> tuple[float, float]:
    clip, vision = model.vision.clip, model.vision
    rows = clip.embeddings.num_positions
    first = vision.num_layers if vision.num_frozen is None else vision.num_frozen
    forward = 2.0 * tiles * (rows - 1) * clip.embeddings.patch_embedding.weight.numel()
    backward = again = 0.0
    if clip.embeddings.patch_embedding.weight.requires_grad:
        backward += forward
    for number, layer in enumerate(clip.encoder.layers[: vision.num_layers]):
        ahead, behind = _linears(layer, tiles * rows)
        attention = 4.0 * tiles * rows**2 * clip.config.hidden_size
        forward += ahead + attention
        if number >= first:
            backward += behind + BACKWARD_OF_ATTENTION * attention
            if checkpointing:
                again += ahead + attention - _last(layer, tiles * rows)
    return forward + backward, again


@dataclass(frozen=True)
class Speed:
    """Operations per second and rank, recomputation included, and where the figure is from."""

    tflops: float
    source: str


def measured_speed(folder: Path) -> Speed:
    """The speed of a run of ours: the median over its logged steps but the first.

    Its metrics do not tell how long each sample was; all of a step are taken to be equally long,
    which counts attention low. Raises UsageError for a folder that holds no finished run or
    checkpointed one.
    """
    if not (folder / METRICS_FILE).is_file():
        raise UsageError(f"--measured {folder}: no {METRICS_FILE}; give the output folder of a run")
    states = [folder, *sorted(folder.glob("checkpoint-*"))]
    with_state = next((path for path in states if (path / STATE_FILE).is_file()), None)
    if with_state is None:
        raise UsageError(
            f"--measured {folder}: no {STATE_FILE} tells how many ranks it had; give --tflops"
        )
    state = read_state(with_state)
    config = config_from(state.config, str(with_state / STATE_FILE))
    model = outline_run(config).model
    steps = read_metrics(folder)[1:]  # the first one warms up
    if not steps:
        raise UsageError(f"--measured {folder}: needs two logged steps or more; give --tflops")
    speeds = []
    for step in steps:
        samples = max(1, step.samples)
        work = Work(
            tokens=step.tokens,
            squares=step.tokens**2 / samples,
            tiles=step.images,
            rows=step.images * model.config.hd.patches_per_tile,
            labels=step.label_tokens,
        )
        done = count_operations(model, work, config.gradient_checkpointing is True).total
        speeds.append(done / step.seconds / state.world_size / 1e12)
    return Speed(median(speeds), f"measured: {len(steps)} steps of {folder}")


@dataclass(frozen=True)
class Cost:
    """A run at some speed. step_seconds: (if all communication is hidden, if none is)."""

    step_seconds: tuple[float, float]
    hours: tuple[float, float] | None
    price: tuple[float, float] | None


def run_cost(
    step_operations: float,
    traffic_seconds: float,
    speed: Speed,
    world_size: int,
    num_steps: int | None,
    price_per_gpu_hour: float | None,
) -> Cost:
    """Time and price of a run of so many steps, each of `step_operations` over all ranks."""
    compute = step_operations / world_size / (speed.tflops * 1e12)
    step = max(compute, traffic_seconds), compute + traffic_seconds
    if num_steps is None:
        return Cost(step, None, None)
    hours = step[0] * num_steps / 3600, step[1] * num_steps / 3600
    if price_per_gpu_hour is None:
        return Cost(step, hours, None)
    factor = world_size * price_per_gpu_hour
    return Cost(step, hours, (hours[0] * factor, hours[1] * factor))
