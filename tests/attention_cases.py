"""Small shapes of every kind for the tests of the attention benchmark."""

from __future__ import annotations

from typing import Any

import torch

from llava_hd.bench.attention_setting import Setting
from llava_hd.bench.attention_shapes import (
    Shape,
)
from llava_hd.bench.kernels_cases import Case, Problem, make_problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = {
    "dense": Shape(4, 4, 16, True, False, (17, 17)),
    "grouped": Shape(4, 2, 16, True, False, (9, 9, 9)),
    "tower": Shape(2, 2, 8, False, False, (33, 33)),
    "pack": Shape(4, 4, 16, True, True, (5, 1, 20, 7)),
}
RUN_ON_CPU = {
    "dense": {"eager", "ours", "sdpa-flash", "sdpa-math"},
    "grouped": {"eager", "ours", "sdpa-flash", "sdpa-math"},
    "tower": {"eager", "ours", "sdpa-flash", "sdpa-math"},
    "pack": {"eager", "ours", "padded"},
}


def setting(shape: Shape, dtype: torch.dtype = torch.float64, device: Any = CPU) -> Setting:
    return Setting(shape, shape, dtype, device)


def case_of(shape: Shape) -> Case:
    rows = shape.tokens
    return Case(shape.operation, "test", rows, rows, rows, 0, 0, 0, 0, attention=shape)


def problem_of(shape: Shape, dtype: torch.dtype = torch.float64) -> Problem:
    return make_problem(case_of(shape), dtype, CPU, seed=1)
