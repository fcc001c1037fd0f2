"""The project's goals for its kernels, and what results have reached of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kernels_rows import Row, ratios_of

BEST_RIVAL = "the best rival"


@dataclass(frozen=True)
class Result:
    """One kernels.json: its folder, everything but the rows, the rows."""

    folder: Path
    record: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def environment(self) -> dict[str, Any]:
        """Device, versions, command, seed."""
        return self.record["environment"]

    @property
    def on_gpu(self) -> bool:
        """Whether the figures are a GPU's."""
        return self.environment["device_type"] == "cuda"


@dataclass(frozen=True)
class Target:
    """A goal of the project: the least ratio to a rival among the rows that `applies` picks.

    kind: "time", the rival's time over ours; "saved", the most saved memory as a share of the
    rival's; "rate", our TFLOP/s in packs over those in dense batches. rival: a provider, or
    BEST_RIVAL for whoever is fastest in a case.
    """

    text: str
    goal: float
    rival: str
    applies: Callable[[Row], bool]
    kind: str = "time"


def _at(op: str, mode: str, low: int, high: int, keep: float = 1.0) -> Callable[[Row], bool]:
    return lambda row: (
        (row.op, row.mode, row.size) == (op, mode, "7B")
        and low <= row.rows <= high
        and row.keep == keep
    )


def _attention(op: str, mode: str, low: int, high: int, size: str = "") -> Callable[[Row], bool]:
    return lambda row: (
        (row.op, row.mode) == (op, mode) and low <= row.rows <= high and size in ("", row.size)
    )


def _pack_or_dense(row: Row) -> bool:
    """Packs, and the dense batch of the length nearest to their samples' (weighted by work)."""
    dense = row.op == "attention_dense" and row.rows == 2048 and row.heads == row.kv_heads
    return row.mode != "both" and (row.op == "attention_packed" or dense)


TARGETS = (
    Target(
        "projector, forward and backward, R = 16k and 65k",
        1.06,
        "eager",
        _at("gelu_mlp", "both", 16384, 65536),
    ),
    Target(
        "projector, activations saved for backward, R = 16k and 65k",
        0.5,
        "eager",
        _at("gelu_mlp", "both", 16384, 65536),
        kind="saved",
    ),
    Target(
        "projector, forward, R = 1k to 3k", 1.3, "eager", _at("gelu_mlp", "forward", 1000, 3000)
    ),
    Target(
        "gather, project, row-ends, place: forward, all rows kept, R from 16k",
        1.18,
        "llava",
        _at("project_place", "forward", 16000, 70000),
    ),
    Target(
        "the same at keep ratio 0.7",
        1.6,
        "llava",
        _at("project_place", "forward", 11000, 50000, keep=0.7),
    ),
    *(
        Target(
            f"causal attention, head dim 128, 2k to 8k tokens: {mode}",
            goal,
            rival,
            _attention("attention_dense", mode, 2048, 8192, "32 heads"),
        )
        for mode, goal, rival in (
            ("forward", 1.7, "sdpa-flash"),
            ("forward", 0.97, BEST_RIVAL),
            ("backward", 1.6, "sdpa-flash"),
            ("backward", 1.0, "sdpa-cudnn"),
        )
    ),
    Target(
        "packs, forward and backward each: TFLOP/s",
        0.95,
        "ours, dense 2k",
        _pack_or_dense,
        kind="rate",
    ),
    *(
        Target(f"packs: {mode}", goal, "varlen", _attention("attention_packed", mode, 2**15, 2**16))
        for mode, goal in (("forward", 1.7), ("backward", 1.5))
    ),
    *(
        Target(
            f"tower, {tokens} tokens, 64 to 320 tiles: forward",
            goal,
            BEST_RIVAL,
            _attention("attention_tower", "forward", 64, 320, f"{tokens} tokens"),
        )
        for tokens, goal in ((577, 1.25), (257, 1.6))
    ),
    Target("never slower than eager, at any size", 1.0, "eager", lambda row: True),
)


def targets_table(results: Sequence[Result]) -> str:
    """Each target and what the newest full GPU result (bf16) has reached: the worst of its rows."""
    lines = ["| what | against | target | measured |", "|---|---|---|---|"]
    for target in TARGETS:
        sign = "<=" if target.kind == "saved" else ">="
        goal = f"{sign} {target.goal:g}x"
        lines.append(f"| {target.text} | {target.rival} | {goal} | {_reached(target, results)} |")
    return "\n".join(lines)


def _reached(target: Target, results: Sequence[Result]) -> str:
    for result in results:
        if not result.on_gpu or result.record["quick"]:
            continue
        rows = [row for row in result.rows if row.dtype == "bf16" and target.applies(row)]
        values = VALUES[target.kind](rows, target.rival)
        if values:
            most = target.kind == "saved"
            worst = max(values) if most else min(values)
            met = worst <= target.goal if most else worst >= target.goal
            return f"{worst:.3f}x, {'met' if met else 'not met'} ({result.environment['device']})"
    return "not measured"


def _ratios(rows: Sequence[Row], rival: str) -> list[float]:
    if rival != BEST_RIVAL:
        return [ratio.ratio for ratio in ratios_of(rows) if ratio.rival == rival]
    best: dict[tuple[Any, ...], float] = {}
    for ratio in ratios_of(rows):
        if ratio.rival != "ours-triton":
            best[ratio.case] = min(ratio.ratio, best.get(ratio.case, ratio.ratio))
    return list(best.values())


def _saved_shares(rows: Sequence[Row], rival: str) -> list[float]:
    theirs = {row.case: row.saved_mib for row in rows if row.provider == rival}
    return [
        row.saved_mib / other
        for row in rows
        if row.provider == "ours" and row.saved_mib is not None and (other := theirs.get(row.case))
    ]


def _rate_shares(rows: Sequence[Row], rival: str) -> list[float]:
    """Our TFLOP/s in each pack over those of the dense batch, in the same mode."""
    ours = [row for row in rows if row.provider == "ours" and row.tflops is not None]
    dense = {row.mode: row.tflops for row in ours if row.op == "attention_dense"}
    return [
        row.tflops / other
        for row in ours
        if row.op == "attention_packed" and row.tflops and (other := dense.get(row.mode))
    ]


VALUES: dict[str, Callable[[Sequence[Row], str], list[float]]] = {
    "time": _ratios,
    "saved": _saved_shares,
    "rate": _rate_shares,
}
