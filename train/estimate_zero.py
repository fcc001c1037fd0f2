"""What ZeRO holds on one rank, and what it sends: DeepSpeed 0.19.8 as zero.py configures it.

Read from its source (runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py)
and held against runs on CPUs in fp32 (tests/test_estimate_memory.py). Numbers are bytes of one
rank, `learned` is the number of trained parameters, N the ranks:

                           ZeRO-2                        ZeRO-3
    weights                all, whole                    1/N of all; small ones whole too
    fp32 copy              4 learned/N                   the same
    AdamW's two moments    8 learned/N                   the same
    gradients              4 learned/N (fp32 sums)       4 learned/N
    gathered weights       none                          what is used soon (`gathered_elements`)

In fp32 both keep an fp32 copy as well, although the weights are fp32 themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .settings import ZeroConfig

FP32 = 4  # bytes
MOMENTS = 2 * FP32


@dataclass(frozen=True)
class Weights:
    """The weights of a model as ZeRO sees them.

    bytes: of all weights as they are held (quantised ones are small). width: bytes of a number in
    the run's precision. groups: sizes of the trained parameters of each optimizer group. frozen:
    sizes of the others. largest_module: parameters that the largest module holds itself. reused:
    parameters that backward needs again (all but a frozen tower's).
    """

    bytes: int
    width: int
    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]
    largest_module: int
    reused: int

    @property
    def learned(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def largest_learned(self) -> int:
        return max(max(group) for group in self.groups)

    @property
    def sizes(self) -> list[int]:
        return [*self.frozen, *(size for group in self.groups for size in group)]


@dataclass(frozen=True)
class States:
    """Bytes of one rank. The first four live from start to end on the device, or, if offloaded, in
    the machine's memory (`host`, the device has none of them).

    pass_buckets: while gradients are reduced. gathered: whole weights under ZeRO-3. update: beside
    the gradients while the optimizer works. start: most that lives while the engine is built.
    """

    weights: int
    master: int
    moments: int
    gradients: int
    kept_buckets: int
    pass_buckets: int
    gathered: int
    update: int
    start: int
    host: int


def model_states(
    weights: Weights, zero: ZeroConfig, world_size: int, passes: int, on_gpu: bool
) -> States:
    """What a rank holds. passes: of a step; from two on ZeRO-2 in fp32 holds gradients twice."""
    build = _stage_2 if zero.stage == 2 else _stage_3
    return build(weights, zero, world_size, passes, on_gpu)


def _adam_temporaries(elements: int, on_gpu: bool) -> int:
    """AdamW over one flat tensor: on a GPU (foreach) the root of the second moment; on a CPU one
    tensor after the other, with that root and its quotient."""
    return elements * FP32 * (1 if on_gpu else 2)


def _stage_2(
    weights: Weights, zero: ZeroConfig, world_size: int, passes: int, on_gpu: bool
) -> States:
    width, offload = weights.width, zero.offload_optimizer == "cpu"
    groups = [_share(sum(group), world_size) for group in weights.groups]
    share = sum(groups)
    bucket = _filled(zero.reduce_bucket_size, weights.learned, on_gpu) * width
    # The reduction flattens a bucket again; a tensor beyond the bucket's size goes alone.
    flattened = max(
        min(zero.reduce_bucket_size, weights.learned), weights.largest_learned
    ) * width  # fmt: skip
    gradients, reduced = share * FP32, 0
    update = _adam_temporaries(max(groups), on_gpu)
    if width == FP32:
        # Each pass's gradients are collected apart and then added up. (On a CPU the pages of the
        # new ones come into being while the activations go, so they are not there at the peak.)
        gradients = share * FP32 if on_gpu or passes > 1 else 0
        reduced = share * FP32 if on_gpu and passes > 1 else 0
        # The update flattens a group's gradients once more, while the other groups' views keep
        # all of them alive.
        update += max(groups) * FP32 + share * FP32 - gradients
    held = share * (FP32 + MOMENTS + FP32)
    if offload:
        # Two staging buffers of the largest tensor; in the machine also a copy in 16 bits.
        buckets = weights.largest_learned * width
        host, update = held + share * width + buckets, 0
    else:
        buckets, host = 0, 0
    return States(
        weights=weights.bytes,
        master=0 if offload else share * FP32,
        moments=0 if offload else share * MOMENTS,
        gradients=0 if offload else gradients,
        kept_buckets=buckets,
        pass_buckets=bucket * (2 if zero.overlap_comm else 1) + flattened + reduced,
        gathered=0,
        update=update,
        # Each group is copied into one flat tensor before its own tensors go.
        start=weights.bytes + max(map(sum, weights.groups)) * width + share * FP32,
        host=host,
    )


def _stage_3(
    weights: Weights, zero: ZeroConfig, world_size: int, passes: int, on_gpu: bool
) -> States:
    width, offload = weights.width, zero.offload_optimizer == "cpu"
    ratio = weights.bytes / max(1, sum(weights.sizes) * width)  # below 1 if quantised
    part = int(sum(_share(size, world_size) for size in weights.sizes) * width * ratio)
    small = [n for n in weights.sizes if n <= zero.stage3_param_persistence_threshold]
    # One rank has every weight whole: nothing is gathered then.
    whole = sum(small) * width if world_size > 1 else 0
    gathered = gathered_elements(weights, zero) * width if world_size > 1 else 0
    share = sum(_share(size, world_size) for group in weights.groups for size in group)
    group = max(sub_group_size(group, zero, world_size) for group in weights.groups)
    bucket = _filled(zero.reduce_bucket_size, weights.learned, on_gpu) * width
    scattered = min(zero.reduce_bucket_size, weights.learned) * width
    beyond = weights.largest_learned * width  # waits as a gradient if it does not fit a bucket
    if weights.largest_learned <= zero.reduce_bucket_size:
        beyond = 0
    held = share * (FP32 + MOMENTS + FP32)
    on_host = part if zero.offload_param == "cpu" else 0
    return States(
        weights=part - on_host + whole,
        master=0 if offload else share * FP32,
        moments=0 if offload else share * MOMENTS,
        gradients=0 if offload else share * FP32,
        kept_buckets=bucket,
        pass_buckets=scattered + beyond,
        gathered=gathered,
        # The gradients of a sub-group are flattened once more.
        update=0 if offload else group * FP32 + _adam_temporaries(group, on_gpu),
        # The whole model, part after part replaced by its share.
        start=(0 if on_gpu else weights.bytes) + part + weights.largest_module * width,
        # Offloaded: beside sums of gradients also those that the update reads.
        host=(held + share * FP32 if offload else 0) + on_host,
    )


def _share(size: int, world_size: int) -> int:
    return -(-size // world_size)


def _filled(bucket: int, learned: int, on_gpu: bool) -> int:
    """Elements of a bucket that take memory: on a CPU pages that are never written do not."""
    return bucket if on_gpu else min(bucket, learned)


def gathered_elements(weights: Weights, zero: ZeroConfig) -> int:
    """Most whole weights at one time under ZeRO-3, beside those that always are.

    At the end of forward a weight stays if it is used again within `stage3_max_reuse_distance`
    elements, rest of forward and backward together: the last half of that distance. To it come the
    module in use and what is fetched ahead. (The very first step keeps less.)
    """
    threshold = zero.stage3_param_persistence_threshold
    partitioned = sum(size for size in weights.sizes if size > threshold)
    soon = min(weights.reused, zero.stage3_max_reuse_distance // 2)
    return min(partitioned, soon + weights.largest_module + zero.stage3_prefetch_bucket_size)


def sub_group_size(group: Sequence[int], zero: ZeroConfig, world_size: int) -> int:
    """Elements that ZeRO-3 updates at once on a rank: tensors of a group up to its limit."""
    largest = current = 0
    for size in group:
        current += _share(size, world_size)
        largest = max(largest, current)
        if current >= zero.sub_group_size:
            current = 0
    return largest


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one step (and receives as many), by a ring over N ranks."""

    gradients: int
    weights: int

    @property
    def total(self) -> int:
        return self.gradients + self.weights

    def seconds(self, gbps: float) -> float:
        """At so many gigabits per second of each rank."""
        return self.total * 8 / (gbps * 1e9)


def step_traffic(weights: Weights, zero: ZeroConfig, world_size: int, passes: int) -> Traffic:
    """What a rank sends in a step; L and P are bytes of trained and of all weights.

    ZeRO-2 sums every pass's gradients by all-reduce (2L) and gathers the new weights once (L):
    (2 passes + 1) L. ZeRO-3 gathers weights for forward and for backward (a frozen tower's for
    forward only) and scatters gradients, in every pass: passes (2P + L). All times (N-1)/N.
    """
    ring = (world_size - 1) / world_size
    learned, whole = weights.learned * weights.width, sum(weights.sizes) * weights.width
    if zero.stage == 2:
        return Traffic(math.ceil(2 * passes * learned * ring), math.ceil(learned * ring))
    again = weights.reused * weights.width
    return Traffic(math.ceil(passes * learned * ring), math.ceil(passes * (whole + again) * ring))
