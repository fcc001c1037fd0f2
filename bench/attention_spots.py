"""Attention at the full size, where fp64 scores of everything would fill the memory: some rows.

Errors of long sequences are measured at a smaller shape (attention_shapes.checked_shape); offsets
beyond 2^31, a wrong sequence, a block left out would not show there. So a provider also has to
answer at the full size, gradients finite, and these rows of its output are compared with fp64:
the first and the last of some sequences, and some between.
"""

from __future__ import annotations

import random
from bisect import bisect_right

import torch
from torch import Tensor

from .attention_shapes import Shape
from .kernels_cases import Tensors

SEQUENCES, BETWEEN = 6, 20


def spots(shape: Shape) -> list[int]:
    """Rows of the output, counted through the whole batch; always the same for a shape."""
    ends, drawn = shape.ends, random.Random(0)
    chosen = range(0, len(shape.lengths), max(1, len(shape.lengths) // SEQUENCES))
    edges = {row for n in [*chosen, len(shape.lengths) - 1] for row in (ends[n], ends[n + 1] - 1)}
    return sorted(edges | {drawn.randrange(shape.tokens) for _ in range(BETWEEN)})


def exact_rows(shape: Shape, tensors: Tensors, rows: list[int]) -> Tensor:
    """The output of these rows in fp64, `[rows Hq d]`."""
    flat = {name: x.reshape(-1, *x.shape[-2:]) for name, x in tensors.items()}
    groups = shape.heads // shape.kv_heads
    made = []
    for row in rows:
        n = bisect_right(shape.ends, row) - 1
        keys = slice(shape.ends[n], row + 1 if shape.causal else shape.ends[n + 1])
        k, v = (flat[name][keys].double().repeat_interleave(groups, 1) for name in ("k", "v"))
        scores = torch.einsum("hd,lhd->hl", flat["q"][row].double(), k) * shape.head_dim**-0.5
        made.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v))
    return torch.stack(made)


def error_of_rows(output: Tensor, rows: list[int], exact: Tensor) -> float:
    """max |output - exact| over these rows; infinite where one is not a number."""
    found = output.reshape(-1, *output.shape[-2:])[rows].double()
    error = float((found - exact).abs().max())
    return error if error == error else float("inf")
