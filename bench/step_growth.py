"""`llava-hd bench step --growth`: how time and memory of ours grow with the work.

Four curves, stage 2, each in a process of its own: tiles of an image (1 to 24), tokens of a sample,
tokens of a pack of equal samples, ranks that share one step's samples out. Time is that of forward
and backward (for ranks of the whole step with the sum of the gradients by gloo or nccl, without
ZeRO), the median of some repeats; memory is the most above what was held before. Both are fitted
with fixed + factor x ** exponent.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..hd.errors import Interrupted, LlavaHDError
from ..model.nano import SHIPPED
from ..model.processor import read_tokenizer
from ..model.rival import save_random
from ..train.launch import run_workers
from .files import read_json_lines
from .measure import device_name, json_text, result_folder, write_results
from .step_growth_points import AXES, geometry
from .step_options import DTYPES, Request
from .step_process import Job, write_job

RECORD = "step-growth.json"
# Measure -> its name and unit. The processor's own time hardly changes with other work.
MEASURES = {
    "seconds": ("time", "s"),
    "cpu_seconds": ("CPU time", "s"),
    "peak_mib": ("memory", "MiB"),
}
# Codes of a process that Ctrl-C has ended: by its own words, and before it could hear it.
STOPPED = (Interrupted.exit_code, 128 + signal.SIGINT)
EXPONENTS = np.arange(0.05, 3.0001, 0.01)
NOTES = (
    "time: forward and backward, median; ranks: the whole step, gradients summed without ZeRO",
    "memory: the most above weights, gradients and what the process held before; of one rank",
    "fit: fixed + factor x ** exponent, least squares of relative errors, neither below 0; "
    "ranks: the slope between the points",
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """fixed + factor x ** exponent; error: the root mean square of its relative errors."""

    fixed: float
    factor: float
    exponent: float
    error: float


def run_growth(request: Request, say: Say) -> tuple[dict[str, Any], Path]:
    """Measure, write step-growth.json, return the record and the folder.

    The record: environment, request, model, points (axis, x, tokens, seconds, cpu_seconds,
    peak_mib), curves (the fit of each axis and measure, and in words), notes, complete (False after
    Ctrl-C). UsageError for a folder with results, LlavaHDError where a process fails; the axes that
    were finished by then are written.
    """
    from .step import kept_words, sizes_of, step_environment

    device = torch.device(request.device)
    out = result_folder(request.out, device, RECORD)
    sizes = sizes_of(request)
    record: dict[str, Any] = {
        "environment": step_environment(request),
        "request": {**asdict(request), "out": str(out)},
        "model": asdict(sizes),
        "points": [],
        "curves": [],
        "notes": list(NOTES),
        "complete": True,
    }
    failure = None
    say(f"{device_name(device)}, {request.dtype}, growth of {request.geometry}")
    with TemporaryDirectory() as temporary:
        folder, dtype = Path(temporary), getattr(torch, DTYPES[request.dtype])
        tokenizer = read_tokenizer(SHIPPED / "lm")
        hd = geometry(request.tile_px)
        save_random(folder, sizes, hd, tokenizer, dtype, device, request.seed)
        try:
            for axis in AXES:
                points = _axis(axis, request, folder)
                record["points"] += points
                record["curves"] += curves_of(axis, points)
                found = [curve["words"] for curve in record["curves"] if curve["axis"] == axis]
                say(f"{axis}: {'; '.join(found)}")
        except KeyboardInterrupt:
            record["complete"] = False
        except LlavaHDError as error:
            record["complete"], failure = False, error
    if record["points"]:
        write_results(out, {RECORD: json_text(record)})
    if failure is not None:
        raise LlavaHDError(f"{failure}; {kept_words(out / RECORD)}") from failure
    return record, out


def _axis(axis: str, request: Request, folder: Path) -> list[dict[str, Any]]:
    """The points of an axis, from its processes. KeyboardInterrupt where they were told to stop:
    while they run, Ctrl-C reaches them alone."""
    counts = AXES[axis].values(request) if axis == "ranks" else (1,)
    points = []
    for count in counts:
        job, result = folder / "job.json", folder / f"{axis}-{count}.jsonl"
        write_job(Job(axis, request, folder, result), job)
        command = [sys.executable, "-m", "llava_hd.bench.step_growth_points", str(job)]
        code = run_workers(command, count)
        if code in STOPPED:
            raise KeyboardInterrupt
        if code:
            raise LlavaHDError(f"bench step --growth: {axis} ended with code {code}")
        points += [{"axis": axis, **point} for _, point in read_json_lines(result)]
    return points


def curves_of(axis: str, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fits of an axis: time and, where it was counted, memory."""
    made = []
    x = [float(point["x"]) for point in points]
    for measure, (name, unit) in MEASURES.items():
        y = [point[measure] for point in points]
        if any(value is None for value in y):
            continue
        found = slope(x, y) if len(x) < 4 else fit(x, y)
        words = (
            f"{name} = {found.fixed:.3g} + {found.factor:.3g} x^{found.exponent:.2f} "
            f"({unit}, error {found.error:.1%})"
        )
        made.append({"axis": axis, "measure": measure, "words": words, **asdict(found)})
    return made


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The best fixed + factor x ** exponent with neither below 0, by relative errors."""
    at, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    best: Fit | None = None
    for exponent in EXPONENTS:
        power = (at / at.max()) ** exponent
        for columns in ((np.ones_like(at), power), (power,)):
            table = np.stack(columns, axis=1) / values[:, None]
            found = np.linalg.lstsq(table, np.ones_like(values), rcond=None)[0]
            if (found < 0).any():
                continue
            error = float(np.sqrt(np.mean((table @ found - 1) ** 2)))
            if best is None or error < best.error:
                fixed = float(found[0]) if len(found) == 2 else 0.0
                factor = float(found[-1] / at.max() ** exponent)
                best = Fit(fixed, factor, float(exponent), error)
    if best is None:
        raise ValueError(f"nothing grows like a power here: {list(values)}")
    return best


def slope(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Without a fixed part: the straight line through the logarithms."""
    logs = np.log(np.maximum(np.asarray(y, dtype=float), 1e-12))
    exponent, start = np.polyfit(np.log(np.asarray(x, dtype=float)), logs, 1)
    line = np.exp(start) * np.asarray(x, dtype=float) ** exponent
    error = float(np.sqrt(np.mean((line / np.exp(logs) - 1) ** 2)))
    return Fit(0.0, float(np.exp(start)), float(exponent), error)
