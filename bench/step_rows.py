"""The figures of `bench step`: a row for each stage and competitor, ratios, losses, targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .measure import quantiles
from .step_flops import Work
from .step_options import OURS, RIVAL
from .step_process import Taken

# Stage -> useful tokens/s of ours over transformers', its memory as a share of theirs.
TARGETS = {1: 2.2, 2: 2.0}
MOST_MEMORY = 0.6
LEAST_MFU = 0.54  # of stage 2, on a GPU
LOSS_TOLERANCE = 1e-3
LOSSES_SHOWN = 20


@dataclass(frozen=True)
class Totals:
    """What the timed steps of a stage hold: samples, images, useful tokens, operations."""

    samples: int
    images: int
    tokens: int
    work: Work


Found = dict[str, list[Taken]]  # competitor -> its rounds; a competitor that did not run is absent


def rows_of(
    stage: int, found: Found, reasons: Mapping[str, str], totals: Totals, peak_tflops: float
) -> Iterator[dict[str, Any]]:
    """A row for each competitor, in the order of `reasons` and `found`; a reason instead of
    figures for one that did not run."""
    for name, rounds in found.items():
        times = len(rounds)
        seconds = sum(sum(one.seconds) for one in rounds)
        computed = sum(one.computed_tokens for one in rounds)
        peaks = [one.peak_bytes for one in rounds if one.peak_bytes is not None]
        yield {
            "stage": stage,
            "competitor": name,
            "useful_tokens_per_second": round(times * totals.tokens / seconds, 2),
            "images_per_second": round(times * totals.images / seconds, 4),
            "samples_per_second": round(times * totals.samples / seconds, 4),
            "mfu": round(times * totals.work.needed / seconds / peak_tflops / 1e12, 4),
            "mfu_every_head": round(
                times * totals.work.every_token / seconds / peak_tflops / 1e12, 4
            ),
            "peak_mib": round(max(peaks) / 2**20, 1) if peaks else None,
            "loading_share": round(sum(sum(one.waited) for one in rounds) / seconds, 4),
            "padding": round(1 - times * totals.tokens / computed, 4),
            "passes": sum(one.passes for one in rounds),
            "seconds": round(seconds, 3),
            "cpu_seconds": round(sum(sum(one.cpu_seconds) for one in rounds), 3),
            "largest_loss_difference": loss_difference(rounds[0].losses, found[OURS][0].losses),
            "reason": "",
        }
    for name, reason in reasons.items():
        yield {"stage": stage, "competitor": name, "reason": reason}


def loss_difference(losses: Sequence[float], ours: Sequence[float]) -> float:
    """The largest difference of a step's loss, relative to ours."""
    pairs = zip(losses, ours, strict=True)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def ratios_of(stage: int, found: Found) -> Iterator[dict[str, Any]]:
    """Useful tokens/s of ours over everyone's: of all steps by the clock and by the processor's
    time, and quantiles over the steps. Rounds that only one of two has finished are left out."""
    for name, all_rounds in found.items():
        if name == OURS:
            continue
        both = min(len(all_rounds), len(found[OURS]))
        ours, rounds = found[OURS][:both], all_rounds[:both]
        mine = [second for one in ours for second in one.seconds]
        theirs = [second for one in rounds for second in one.seconds]
        median, low, high = quantiles([a / b for a, b in zip(theirs, mine, strict=True)])
        cpu = [sum(sum(one.cpu_seconds) for one in side) for side in (rounds, ours)]
        peaks = [[one.peak_bytes for one in side if one.peak_bytes] for side in (ours, rounds)]
        yield {
            "stage": stage,
            "rival": name,
            "ratio": round(sum(theirs) / sum(mine), 4),
            "cpu_ratio": round(cpu[0] / cpu[1], 4),
            "median": round(median, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "memory_share": round(max(peaks[0]) / max(peaks[1]), 4) if all(peaks) else None,
        }


def losses_of(stage: int, found: Found) -> dict[str, Any]:
    """The losses of the first steps, side by side."""
    losses = {name: rounds[0].losses[:LOSSES_SHOWN] for name, rounds in found.items()}
    return {"stage": stage, "losses": losses}


def targets_of(
    rows: Sequence[Mapping[str, Any]],
    ratios: Sequence[Mapping[str, Any]],
    on_gpu: bool,
    geometry: str,
) -> list[dict[str, Any]]:
    """What the run says of the project's goals: speed, memory and utilisation, equal losses. A
    nano model has the last one alone."""
    found = []
    for ratio in ratios:
        if ratio["rival"] != RIVAL or geometry == "nano":
            continue
        stage, goal = ratio["stage"], TARGETS[ratio["stage"]]
        # On a CPU by the clock and by the processor's time, which other work hardly changes.
        value = ratio["ratio"] if on_gpu else min(ratio["ratio"], ratio["cpu_ratio"])
        found.append(_target(f"stage {stage}: useful tokens/s over {RIVAL}'s", value, goal, True))
        share = ratio["memory_share"]
        if on_gpu and share is not None:
            what = f"stage {stage}: peak memory, share of {RIVAL}'s"
            found.append(_target(what, share, MOST_MEMORY, False))
    for row in rows:
        is_ours = row["competitor"] == OURS and row["stage"] == 2
        if on_gpu and is_ours and geometry != "nano":
            found.append(_target("stage 2: model FLOP utilisation", row["mfu"], LEAST_MFU, True))
    differences = [row["largest_loss_difference"] for row in rows if not row["reason"]]
    if differences:
        what = "largest difference of a loss, relative to ours"
        found.append(_target(what, max(differences), LOSS_TOLERANCE, False))
    return found


def _target(what: str, value: float, goal: float, at_least: bool) -> dict[str, Any]:
    reached = value >= goal if at_least else value <= goal
    sign = ">=" if at_least else "<="
    return {"what": what, "value": value, "goal": f"{sign} {goal:g}", "reached": reached}


def taken_record(stage: int, name: str, number: int, taken: Taken) -> dict[str, Any]:
    """One process as it is kept in the record, step by step."""
    return {"stage": stage, "competitor": name, "round": number, **asdict(taken)}
