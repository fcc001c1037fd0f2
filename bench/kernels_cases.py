"""What the kernels' benchmark runs, as data: operations, shapes, random inputs, operations counted.

Letters: R feature rows kept, D vision width, F hidden width, H language width, T tokens, L label
rows, V vocabulary; b bytes of a number.

| operation | useful multiply-adds x 2: forward; backward | least bytes: forward; backward |
|---|---|---|
| gelu_mlp | 2R(DF + FH); 2R(DF + 2FH) | (RD + W + RH)b; (RD + RH + 2W)b |
| place_rows | 0; 0 | (RH + text H + TH)b + 8T; (2TH + RH + H)b + 8T |
| project_place | as gelu_mlp | (RD + W + text H + TH)b + t; (RD + 2W + 2TH + H)b + t |
| linear_loss | 2LHV; 4LHV | (LH + VH)b + 16L; (LH + TH + 2VH)b + 16L |
| attention_… | attention_shapes.py | attention_shapes.py |

W = FD + F + HF + H, the projector's parameters; t = 8(R + T), the tables. The features have no
gradient (CLIP is frozen in both stages), so backward has no product for it. "Useful" and "least"
belong to the task, not to a provider: one that projects rows only to drop them, or stores what it
need not, gets no credit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.place_rows import ROW_END, TEXT
from .attention_shapes import OPERATIONS as ATTENTION
from .attention_shapes import Shape, checked_shape, shapes_of
from .kernels_layout import Layout, place_layout, project_layout

Tensors = dict[str, Tensor]

WIDTHS = {"7B": (1024, 4096, 4096), "13B": (1024, 5120, 5120), "small": (256, 512, 512)}
VOCABULARY = {"7B": 32_000, "13B": 32_000, "small": 4_000}
ROWS = (576, 1024, 2880, 4096, 16384, 65536)
LOSS_ROWS = (1024, 4096, 16384)
QUICK_ROWS = (256, 1024)
MODES = ("forward", "backward", "both")
KEEPS = (1.0, 0.7)
LABEL_SHARE = 8  # one row in eight carries a label


@dataclass(frozen=True)
class Case:
    """One operation at one shape; letters as above. `all_rows`: feature rows before any is dropped.

    A letter that the operation does not have is 0. Attention has a shape of its own instead; its
    rows are explained there.
    """

    op: str
    size: str
    rows: int
    all_rows: int
    tokens: int
    text: int
    d: int
    f: int
    h: int
    labels: int = 0
    vocabulary: int = 0
    layout: Layout | None = None
    attention: Shape | None = None

    @property
    def keep(self) -> float:
        """Share of the feature rows that is kept."""
        return round(self.rows / self.all_rows, 4)

    @property
    def label(self) -> str:
        """The case in a few words, for progress lines."""
        keep = f" keep {self.keep:g}" if self.op == "project_place" else ""
        return f"{self.op} {self.size} R={self.rows}{keep}"

    @property
    def terms(self) -> int:
        """How many numbers its longest sum adds up, as far as rows and tokens tell."""
        if self.attention is not None:
            return max(self.attention.longest, self.attention.head_dim)
        return max(self.rows, self.tokens)

    @property
    def checked(self) -> Case:
        """The case at which errors are measured: this one, or a smaller attention."""
        if self.attention is None or (shape := checked_shape(self.attention)) == self.attention:
            return self
        return replace(self, attention=shape, tokens=shape.tokens)

    @property
    def modes(self) -> tuple[str, ...]:
        """What is timed. Our loss makes its gradients in forward, so backward alone is no task."""
        return ("forward", "both") if self.op == "linear_loss" else MODES

    def work(self, mode: str, itemsize: int) -> tuple[float, float]:
        """(useful floating-point operations, least bytes) of forward, backward or both."""
        if self.attention is not None:
            forward, backward = self.attention.work(itemsize)
        else:
            forward, backward = COUNTS[self.op](self, itemsize)
        if mode == "forward":
            return forward
        if mode == "backward":
            return backward
        return forward[0] + backward[0], forward[1] + backward[1]


Work = tuple[float, float]


def _count_gelu_mlp(c: Case, b: int) -> tuple[Work, Work]:
    parameters = c.f * c.d + c.f + c.h * c.f + c.h
    ends = c.rows * (c.d + c.h)
    forward = 2 * c.rows * (c.d * c.f + c.f * c.h), (ends + parameters) * b
    return forward, (2 * c.rows * (c.d * c.f + 2 * c.f * c.h), (ends + 2 * parameters) * b)


def _count_place_rows(c: Case, b: int) -> tuple[Work, Work]:
    forward = (c.rows + c.text + c.tokens) * c.h * b + 8 * c.tokens
    backward = (2 * c.tokens + c.rows + 1) * c.h * b + 8 * c.tokens
    return (0.0, forward), (0.0, backward)


def _count_project_place(c: Case, b: int) -> tuple[Work, Work]:
    (flops, _), (flops_back, _) = _count_gelu_mlp(c, b)
    parameters = c.f * c.d + c.f + c.h * c.f + c.h
    tables = 8 * (c.rows + c.tokens)
    forward = (c.rows * c.d + parameters + (c.text + c.tokens) * c.h) * b + tables
    backward = (c.rows * c.d + 2 * parameters + (2 * c.tokens + 1) * c.h) * b + tables
    return (flops, forward), (flops_back, backward)


def _count_linear_loss(c: Case, b: int) -> tuple[Work, Work]:
    label_rows, head = c.labels * c.h, c.vocabulary * c.h
    product = 2 * label_rows * c.vocabulary
    forward = (label_rows + head) * b + 16 * c.labels
    backward = (label_rows + c.rows * c.h + 2 * head) * b + 16 * c.labels
    return (product, forward), (2 * product, backward)


COUNTS: dict[str, Callable[[Case, int], tuple[Work, Work]]] = {
    "gelu_mlp": _count_gelu_mlp,
    "place_rows": _count_place_rows,
    "project_place": _count_project_place,
    "linear_loss": _count_linear_loss,
}


def cases_of(op: str, rows: tuple[int, ...] | None, quick: bool) -> list[Case]:
    """The shapes of an operation, at the given feature rows or its own list.

    project_place works on whole images of five tiles: rows are rounded to a number of images.
    """
    if op in ATTENTION:
        return [
            Case(op, size, count, count, shape.tokens, 0, 0, 0, 0, attention=shape)
            for size, count, shape in shapes_of(op, rows, quick)
        ]
    sizes = ("small",) if quick else (("7B",) if op == "linear_loss" else ("7B", "13B"))
    own = QUICK_ROWS if quick else (LOSS_ROWS if op == "linear_loss" else ROWS)
    made = [
        case for size in sizes for count in rows or own for case in _cases(op, size, count, quick)
    ]
    return list(dict.fromkeys(made))


def _cases(op: str, size: str, rows: int, quick: bool) -> list[Case]:
    d, f, h = WIDTHS[size]
    if op == "gelu_mlp":
        return [Case(op, size, rows, rows, 0, 0, d, f, h)]
    if op == "linear_loss":
        labels = max(1, rows // LABEL_SHARE)
        return [Case(op, size, rows, rows, rows, 0, 0, 0, h, labels, VOCABULARY[size])]
    if op == "place_rows":
        layout = place_layout(rows)
        return [
            Case(op, size, rows, rows, layout.tokens, layout.text_tokens, 0, 0, h, 0, 0, layout)
        ]
    layouts = [project_layout(rows, keep, side=8 if quick else 16) for keep in KEEPS]
    return [
        Case(op, size, at.rows, at.all_rows, at.tokens, at.text_tokens, d, f, h, 0, 0, at)
        for at in layouts
    ]


@dataclass(frozen=True)
class Problem:
    """The inputs of a case.

    tensors: all floating-point inputs by name; tables: index tensors; learned: the names of the
    tensors that have a gradient; grad: the gradient of the output.
    """

    tensors: Tensors
    tables: Tensors
    learned: tuple[str, ...]
    grad: Tensor


def make_problem(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """Random inputs of a case: normal, weights scaled by their input width, the same for a seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return (values * scale).to(dtype)

    tensors: Tensors = {}
    if case.op in ("gelu_mlp", "project_place"):
        tensors["x"] = normal(case.all_rows, case.d)
        tensors["w1"] = normal(case.f, case.d, scale=case.d**-0.5)
        tensors["b1"] = normal(case.f, scale=0.1)
        tensors["w2"] = normal(case.h, case.f, scale=case.f**-0.5)
        tensors["b2"] = normal(case.h, scale=0.1)
    if case.op in ("place_rows", "project_place"):
        tensors["text"] = normal(case.tokens, case.h)
        tensors["row_end"] = normal(case.h)
    if case.op == "place_rows":
        tensors["rows"] = normal(case.rows, case.h)
    if case.op == "linear_loss":
        tensors["hidden"] = normal(case.rows, case.h)
        tensors["weight"] = normal(case.vocabulary, case.h, scale=case.h**-0.5)
        grad = torch.ones((), device=device)
    elif case.attention is not None:
        queries, keys = (
            case.attention.size(n) for n in (case.attention.heads, case.attention.kv_heads)
        )
        tensors |= {"q": normal(*queries), "k": normal(*keys), "v": normal(*keys)}
        grad = normal(*queries)
    else:
        grad = normal(case.tokens or case.rows, case.h)
    tables = _tables(case, device, seed)
    return Problem(tensors, tables, tuple(name for name in tensors if name != "x"), grad)


def _tables(case: Case, device: torch.device, seed: int) -> Tensors:
    """Index tensors; those of places are what eager torch and LLaVA's sequence need to be told."""
    arrays: dict[str, Any] = {}
    if case.op == "linear_loss":
        random = np.random.default_rng(seed)
        arrays["label_rows"] = np.sort(random.choice(case.rows, case.labels, replace=False))
        arrays["targets"] = random.integers(0, case.vocabulary, case.labels)
    elif case.attention is not None:
        arrays["cu_seqlens"] = np.array(case.attention.ends, dtype=np.int32)
    elif case.layout is not None:
        rows, source = case.layout.tables()
        arrays = {
            "rows": rows,
            "source": source,
            "row_places": np.flatnonzero(source >= 0),
            "row_end_places": np.flatnonzero(source == ROW_END),
            "text_places": np.flatnonzero(source == TEXT),
        }
    return {
        name: torch.from_numpy(np.ascontiguousarray(a)).to(device) for name, a in arrays.items()
    }
