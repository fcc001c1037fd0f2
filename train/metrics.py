"""The numbers of a run: metrics.jsonl and TensorBoard as it goes, loss_curve.png at its end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from ..model.packing import PackedBatch
from .config import BOARD_FOLDER, METRICS_FILE
from .journal import append_journal, cut_journal, read_journal


@dataclass(frozen=True)
class StepCounts:
    """What a rank computes in a step; `+` adds up, and so does a sum over ranks of `values()`.

    tokens: of samples, without padding. padding: tokens that belong to no sample, those of dummy
    packs included. packs: with samples in them. loss_units: what the summed loss is divided by.
    images: of the samples. cached_images: those among them whose features the cache had.
    """

    samples: int = 0
    tokens: int = 0
    padding: int = 0
    packs: int = 0
    label_tokens: int = 0
    loss_units: int = 0
    images: int = 0
    cached_images: int = 0

    @classmethod
    def of(cls, batches: Iterable[PackedBatch]) -> StepCounts:
        """The counts of some passes."""
        total = cls()
        for batch in batches:
            total += cls(
                samples=batch.num_samples,
                tokens=batch.num_useful_tokens,
                padding=batch.num_padding,
                packs=int(batch.num_samples > 0),
                label_tokens=batch.num_label_tokens,
                loss_units=batch.loss_units,
                images=batch.num_images,
                cached_images=batch.num_cached,
            )
        return total

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> list[int]:
        """The counts in the order of the fields; `StepCounts(*values)` reads them back."""
        return list(astuple(self))

    @property
    def padding_share(self) -> float:
        """Padding among all tokens that are computed."""
        return self.padding / max(1, self.tokens + self.padding)

    def fill(self, pack_tokens: int | None) -> float | None:
        """How full packs of that limit are on average; None without a limit."""
        if pack_tokens is None or not self.packs:
            return None
        return self.tokens / (self.packs * pack_tokens)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all ranks.

    loss: mean cross entropy, over its label tokens or its samples' means. grad_norm: before
    clipping. tokens, images: of the step's samples, so useful ones, padding not counted. seconds:
    from asking for its samples to its update, without saving; both are given per second of that.
    padding: share of the computed tokens that belong to no sample. pack_fill: useful tokens in
    packs by their limit, null where they have none. cached_images: those that the feature cache
    had, so that they were neither decoded nor encoded.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    samples: int
    tokens: int
    label_tokens: int
    images: int
    seconds: float
    tokens_per_second: float
    images_per_second: float
    padding: float = 0.0
    pack_fill: float | None = None
    cached_images: int = 0


class MetricsWriter:
    """Appends to `output_dir/metrics.jsonl` and `output_dir/runs`; only rank 0 has one."""

    def __init__(self, output_dir: Path, first_step: int) -> None:
        """Lines behind `first_step` belong to a run that was cut off there; they are dropped."""
        self.path = output_dir / METRICS_FILE
        cut_journal(self.path, first_step)
        self.path.touch()
        self.board = SummaryWriter(str(output_dir / BOARD_FOLDER), purge_step=first_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Log one step; what is not finite becomes null. Raises OSError with the file's name."""
        values = {k: v if _is_number(v) else None for k, v in asdict(metrics).items()}
        for name, value in values.items():
            if name != "step" and value is not None:
                self.board.add_scalar(f"train/{name}", value, metrics.step)
        append_journal(self.path, [values], sync=False)

    def close(self) -> None:
        self.board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def read_metrics(output_dir: Path) -> list[StepMetrics]:
    """The logged steps of a run, in order; a null loss or norm was not finite."""
    found = read_journal(output_dir / METRICS_FILE)
    return [StepMetrics(**{**line, **_not_finite(line)}) for line in found]


def _not_finite(line: dict[str, Any]) -> dict[str, float]:
    return {name: math.nan for name in ("loss", "grad_norm") if line[name] is None}


def draw_loss_curve(metrics: list[StepMetrics], path: Path, title: str) -> None:
    """A PNG: the loss of each logged step, its running mean, and the learning rate below."""
    metrics = [entry for entry in metrics if math.isfinite(entry.loss)]
    steps = [entry.step for entry in metrics]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    loss.plot(steps, [entry.loss for entry in metrics], color="0.75", linewidth=1, label="step")
    smooth = running_mean([entry.loss for entry in metrics], max(1, len(metrics) // 20))
    loss.plot(steps, smooth, color="tab:blue", linewidth=1.8, label="running mean")
    loss.set(ylabel="loss (nats per label token)", title=title)
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    rate.plot(steps, [entry.lr for entry in metrics], color="tab:orange", linewidth=1.5)
    rate.set(xlabel="step", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def running_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and the up to `width - 1` before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
