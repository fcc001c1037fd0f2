"""The optimizer's state of a ZeRO-2 or ZeRO-3 engine as safetensors, for any number of ranks.

DeepSpeed holds fp32 weights and Adam's moments as flat partitions, one per rank. Here every rank
writes its fragment of every parameter under the parameter's name, with the range it covers; a
rank that loads takes the ranges that it holds now, from whichever files have them. So a run may
go on with another number of ranks, or under the other stage, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..hd.errors import DataError
from .zero import Engine, World

WEIGHT, STEP = "fp32", "step"
WRITE_FAULTS = (OSError, SafetensorError)  # a full disk, a folder that may not be written
FILE_BYTES = 2 << 30  # of one file, about: its tensors are copied before they are written


@dataclass(frozen=True)
class Fragment:
    """What a rank holds of a parameter: elements `[start, stop)` of it laid flat, which stand at
    `[offset, offset + stop - start)` of the flat partition `flat`."""

    name: str
    start: int
    stop: int
    numel: int
    flat: nn.Parameter
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's part of a tensor laid out as `flat`."""
        return tensor.narrow(0, self.offset, self.stop - self.start)


def fragments(engine: Engine, world: World) -> Iterator[Fragment]:
    """This rank's fragments of all parameters that are trained."""
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):  # stage 3: every rank has a slice of every parameter
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            numel = parameter.ds_numel
            start = min(world.rank * size, numel)
            stop, flat = min(start + size, numel), zero.fp32_partitioned_groups_flat[group]
        else:  # stage 2: a rank has a stretch of the parameters laid end to end
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            numel, start, stop = parameter.numel(), here.start, here.start + here.numel
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            offset = there.start
        if stop > start:
            yield Fragment(name, start, stop, numel, flat, offset)


def save_fragments(engine: Engine, folder: Path, world: World) -> list[str]:
    """Write this rank's fragments to `folder`; returns the names of the files."""
    states = engine.optimizer.optimizer.state
    written: list[str] = []
    tensors: dict[str, Tensor] = {}
    ranges: dict[str, list[float]] = {}

    def flush() -> None:
        name = f"rank-{world.rank:05}-of-{world.size:05}-part-{len(written):04}.safetensors"
        save_file(tensors, folder / name, metadata={"ranges": json.dumps(ranges)})
        written.append(name)
        tensors.clear()
        ranges.clear()

    size = 0
    for fragment in fragments(engine, world):
        state = states.get(fragment.flat, {})
        step = float(state[STEP]) if STEP in state else 0.0
        ranges[fragment.name] = [fragment.start, fragment.stop, fragment.numel, step]
        for key, tensor in _flat_states(fragment.flat, state).items():
            tensors[f"{key}.{fragment.name}"] = fragment.of(tensor).detach().to("cpu", copy=True)
            size += 4 * (fragment.stop - fragment.start)
        if size >= FILE_BYTES:
            flush()
            size = 0
    flush()
    return written


def _flat_states(flat: nn.Parameter, state: dict[str, Any]) -> dict[str, Tensor]:
    """The fp32 weights and the optimizer's tensors of the same layout (Adam's two moments)."""
    same = {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape}
    return {WEIGHT: flat.data, **same}


@dataclass(frozen=True)
class Piece:
    """Elements `[start, stop)` of a parameter in one file, with Adam's count of steps."""

    start: int
    stop: int
    step: float
    file: Any  # an open safetensors file
    keys: frozenset[str]


def load_fragments(engine: Engine, folder: Path, world: World) -> None:
    """Fill this rank's partitions from the files of any number of ranks.

    Raises DataError where they do not cover what this rank holds.
    """
    states = engine.optimizer.optimizer.state
    with ExitStack() as stack:
        pieces = _pieces(folder, stack)
        for fragment in fragments(engine, world):
            found = pieces.get(fragment.name, {}).get(fragment.numel, [])
            covered = 0
            for piece in found:
                start, stop = max(piece.start, fragment.start), min(piece.stop, fragment.stop)
                if start < stop:
                    _take(fragment, piece, start, stop, states)
                    covered += stop - start
            if covered != fragment.stop - fragment.start:
                raise DataError(
                    f"{folder} holds {covered} of the {fragment.stop - fragment.start} values of "
                    f"{fragment.name} that rank {world.rank} needs; it is of another model"
                )


def _pieces(folder: Path, stack: ExitStack) -> dict[str, dict[int, list[Piece]]]:
    """What the files hold: parameter name -> its size -> pieces."""
    pieces: dict[str, dict[int, list[Piece]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        keys = frozenset(file.keys())
        for name, (start, stop, numel, step) in json.loads(file.metadata()["ranges"]).items():
            piece = Piece(start, stop, step, file, keys)
            pieces.setdefault(name, {}).setdefault(numel, []).append(piece)
    return pieces


def _take(fragment: Fragment, piece: Piece, start: int, stop: int, states: Any) -> None:
    """Copy elements `[start, stop)` of a parameter from a file into the flat partition."""
    state = states[fragment.flat]
    place = slice(start - fragment.start, stop - fragment.start)
    for key in (WEIGHT, "exp_avg", "exp_avg_sq"):
        if f"{key}.{fragment.name}" not in piece.keys:
            continue  # no step has been taken yet: Adam has no moments
        if key != WEIGHT and key not in state:
            state[key] = torch.zeros_like(fragment.flat.data)
            state[STEP] = torch.tensor(piece.step, dtype=torch.float32)
        target = fragment.flat.data if key == WEIGHT else state[key]
        values = piece.file.get_slice(f"{key}.{fragment.name}")
        part = values[start - piece.start : stop - piece.start]
        fragment.of(target)[place].copy_(part)
