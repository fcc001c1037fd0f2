"""The one door to DeepSpeed: its configuration, the process group, the engine, gathered weights."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import TrainConfig

# DeepSpeed looks for an accelerator while it is imported, and warns where it finds none. (If
# transformers has started it before this file, there is one warning more.)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops

# On a CPU DeepSpeed would compile this op when the process group starts (55 s, and a crash without
# a compiler); gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

Engine: TypeAlias = deepspeed.DeepSpeedEngine
T = TypeVar("T")
NEVER = 2**31  # steps between DeepSpeed's own prints


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    local_rank: int  # among those of this machine
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def leave_world() -> None:
    """End the process group of several ranks: its threads must be gone before the process is. That
    of one alone stays, since DeepSpeed cannot begin again in the same process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def join_world(timeout_minutes: float) -> World:
    """Start or reuse the process group: RANK, WORLD_SIZE and MASTER_* say with whom (set by our
    launcher, torchrun or deepspeed); without them this process is a world of its own."""
    _quiet()
    on_gpu = torch.cuda.is_available()
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(minutes=timeout_minutes)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return World(dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size(), device)


def _quiet() -> None:
    """Two warnings that the user can do nothing about; all others stay.

    DeepSpeed 0.19.8 calls functions that torch 2.13 renamed; and it says that it cannot see into
    `Output`, which only matters for parameters of the outermost module (LlavaHD has none itself).
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return "unknown inputs or outputs type" not in record.getMessage()


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run; every value that changes the result is written out.

    `gradient_clipping` in particular: its default was 0 when LLaVA-1.5 was trained and is 1 today.
    """
    values: dict[str, Any] = {
        # Passes per step vary; the loop says where a step ends and divides the loss itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": _zero_section(config),
        "zero_allow_untested_optimizer": True,  # torch's AdamW: nothing is compiled
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return values


def _zero_section(config: TrainConfig) -> dict[str, Any]:
    zero = config.zero
    section: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": zero.reduce_bucket_size,
    }
    if zero.offload_optimizer == "cpu":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if zero.stage < 3:
        section["allgather_bucket_size"] = zero.allgather_bucket_size
        return section
    if zero.offload_param == "cpu":
        section["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return section | {
        "sub_group_size": zero.sub_group_size,
        "stage3_prefetch_bucket_size": zero.stage3_prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.stage3_param_persistence_threshold,
        "stage3_max_live_parameters": zero.stage3_max_live_parameters,
        "stage3_max_reuse_distance": zero.stage3_max_reuse_distance,
        "stage3_gather_16bit_weights_on_model_save": False,  # gathered_state does it
    }


def start_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, world: World
) -> Engine:
    """The engine around model and optimizer; under ZeRO-3 it partitions the weights here."""
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, world.size)
    )
    return engine


def all_sum(values: Tensor) -> Tensor:
    """`values` summed over all ranks, in place."""
    dist.all_reduce(values)
    return values


def gather_objects(value: T) -> list[T]:
    """The `value` of every rank, in order of the ranks; small things only."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def gathered_state(model: nn.Module, names: Iterable[str], world: World) -> dict[str, Tensor]:
    """The named weights whole, on the CPU, on rank 0; empty elsewhere.

    A collective under ZeRO-3. One tensor at a time is whole on a device, never the model.
    """
    state: dict[str, Tensor] = {}
    tensors = model.state_dict(keep_vars=True)
    for name in names:
        with _whole(tensors[name]):
            if world.is_main:
                state[name] = tensors[name].detach().to("cpu", copy=True)
    return state


@contextmanager
def _whole(tensor: Tensor) -> Iterator[None]:
    """Gather a tensor that ZeRO-3 has partitioned; others are whole already."""
    if hasattr(tensor, "ds_id"):
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=None):
            yield
    else:
        yield
