"""Memory of one rank, part by part, in the three moments that can be the tightest."""

from __future__ import annotations

from dataclasses import dataclass

from .config import TrainConfig
from .estimate_model import Outline
from .estimate_trace import PassMemory, PassShape, batch_bytes, trace_pass
from .estimate_zero import States, model_states

START, PASS, UPDATE = "start", "pass", "update"
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    parts: part -> moment -> bytes on the device. The moments are the building of the engine, the
    largest pass, and the optimizer's update. host: in the machine's memory for each rank, while
    the weights are read or, with offloading, throughout; 0 where the machine is the device.
    """

    parts: dict[str, dict[str, int]]
    host: int

    @property
    def totals(self) -> dict[str, int]:
        """Of each moment."""
        return {
            moment: sum(part.get(moment, 0) for part in self.parts.values())
            for moment in (START, PASS, UPDATE)
        }

    @property
    def peak_moment(self) -> str:
        totals = self.totals
        return max(totals, key=lambda moment: totals[moment])

    @property
    def peak(self) -> int:
        return self.totals[self.peak_moment]

    @property
    def largest_part(self) -> str:
        """The part that takes most at the peak."""
        moment = self.peak_moment
        return max(self.parts, key=lambda part: self.parts[part].get(moment, 0))


def run_memory(
    run: Outline,
    config: TrainConfig,
    shape: PassShape,
    world_size: int,
    passes: int,
    on_gpu: bool = True,
) -> Memory:
    """The memory of a rank whose largest pass has that shape. passes: of a step. on_gpu: False
    for training on a CPU."""
    states = model_states(run.weights, config.zero, world_size, passes, on_gpu)
    batch = batch_bytes(shape, run.model.config.hd.tile_px)
    # A step's packs are read before its first pass; on a CPU all of them lie in the same memory.
    batches = batch * (1 if on_gpu else passes)
    traced = trace_pass(run.model, shape)
    host = states.host
    if on_gpu:  # weights are read there in the run's precision; a step's packs wait there too
        host += sum(run.weights.sizes) * run.weights.width + batch * passes
    return Memory(_parts(states, traced, batches, run.dequantised), host)


def _parts(
    states: States, traced: PassMemory, batches: int, dequantised: int
) -> dict[str, dict[str, int]]:
    def throughout(size: int) -> dict[str, int]:
        return {PASS: size, UPDATE: size}

    parts = {
        "weights": {START: states.start, **throughout(states.weights)},
        "fp32 copy of the weights": throughout(states.master),
        "gradients": throughout(states.gradients),
        "optimizer": {PASS: states.moments, UPDATE: states.moments + states.update},
        "communication buckets": {
            PASS: states.kept_buckets + states.pass_buckets,
            UPDATE: states.kept_buckets,
        },
        "gathered weights": {PASS: states.gathered},
        "batch": throughout(batches),
        "activations kept": {PASS: traced.kept},
        "activations in work": {PASS: traced.peak - traced.kept + dequantised},
    }
    return {name: part for name, part in parts.items() if any(part.values())}
