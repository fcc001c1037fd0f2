"""`llava-hd bench step --profile`: what the device spends one step of ours on, by torch.profiler.

The step comes after the warm-up, in a process of its own, so that no timed step is watched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .packing_passes import train_step
from .step_competitors import Runner

TABLE = "step-profile.csv"
LARGEST = 10
REST = "(all others)"


def profile_step(runner: Runner, warm_up: int, device: torch.device) -> list[dict[str, Any]]:
    """The kernels of one step that take most time, largest first (on a CPU torch's operations, each
    without those that it calls), and all others together: name, calls, ms, share of the whole."""
    for _ in range(warm_up):
        train_step(runner.model, runner.optimizer, next(runner.steps))
    passes = next(runner.steps)
    on_gpu = device.type == "cuda"
    watched = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=watched) as seen:
        train_step(runner.model, runner.optimizer, passes)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        (one.key, one.count, one.self_device_time_total if on_gpu else one.self_cpu_time_total)
        for one in seen.key_averages()
        if one.device_type == kind
    ]
    found.sort(key=lambda one: -one[2])
    rest = found[LARGEST:]
    rows = [*found[:LARGEST], (REST, sum(one[1] for one in rest), sum(one[2] for one in rest))]
    total = sum(spent for _, _, spent in rows)
    return [
        {
            "name": name,
            "calls": calls,
            "ms": round(spent / 1e3, 4),
            "share": round(spent / total, 4),
        }
        for name, calls, spent in rows
    ]
