"""What `bench tune` times: each kernel as it is called in a step, and its rival.

Random data of a seed; a fifth of the feature rows is dropped, as padding would be, and the visual
rows stand in the sequence as maps with row-ends between text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import launch, place_kernels
from ..kernels.backend import ATTENTION, Blocks, Table
from ..kernels.gelu_mlp import (
    column_sums,
    gelu_mlp_torch,
    gelu_mlp_triton,
    library_weight_grad,
)
from ..kernels.place_rows import ROW_END, TEXT, Places, place_rows_torch, place_rows_triton
from .tune_attention import attention_calls, attention_task
from .tune_options import Sizes
from .tune_task import Task

MAP_WIDTH, TEXT_TOKENS = 32, 96  # rows in a map row before its row-end; text behind each 1,024 rows


def task(
    name: str, rows: int, table: Table, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Task:
    """The task of a kernel (PRODUCTS or ELEMENTWISE); `table` has the blocks of what it needs
    beside."""
    if name in ATTENTION:
        return attention_task(name, rows, table, sizes, device, dtype)
    return TASKS[name](_data(rows, sizes, device, dtype), table)


def source_of(rows: int, device: torch.device) -> Tensor:
    """int64 `[T]`: maps of MAP_WIDTH columns with row-ends, text behind each 1,024 rows."""
    parts = []
    for start in range(0, rows, MAP_WIDTH):
        parts += [torch.arange(start, min(rows, start + MAP_WIDTH)), torch.tensor([ROW_END])]
        if (start + MAP_WIDTH) % 1024 == 0:
            parts.append(torch.full((TEXT_TOKENS,), TEXT))
    return torch.cat([torch.full((TEXT_TOKENS,), TEXT), *parts]).to(device)


def _data(rows: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    made = torch.Generator(device).manual_seed(sizes.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=made, device=device, dtype=torch.float32)
        return (drawn * scale).to(dtype)

    vision, hidden, language = sizes.widths
    features = rows + rows // 4
    source = source_of(rows, device)
    return {
        "x": normal(features, vision),
        "rows": torch.randperm(features, generator=made, device=device)[:rows].sort().values,
        "w1": normal(hidden, vision, scale=vision**-0.5),
        "b1": normal(hidden),
        "w2": normal(language, hidden, scale=hidden**-0.5),
        "b2": normal(language),
        "pre": normal(rows, hidden),
        "wide": normal(rows, hidden),
        "dy": normal(rows, language),
        "text": normal(len(source), language),
        "row_end": normal(language),
        "source": source,
    }


def _wide(data: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    return [data[name].double() for name in names]


def _nothing() -> None:
    """No call of this task overwrites its inputs."""


def _up(data: dict[str, Tensor], table: Table) -> Task:
    x, rows, w1, b1 = (data[name] for name in ("x", "rows", "w1", "b1"))
    kept = torch.empty_like(data["pre"])

    def ours(blocks: Blocks) -> tuple[Tensor, ...]:
        return launch.linear_rows(x, w1, b1, blocks, rows=rows, gelu=True, pre=kept), kept

    def rival() -> tuple[Tensor, ...]:
        hidden = F.linear(x.index_select(0, rows), w1, b1)
        return F.gelu(hidden), hidden

    def exact() -> tuple[Tensor, ...]:
        wide = _wide(data, "x", "w1", "b1")
        hidden = F.linear(wide[0][rows], wide[1], wide[2])
        return F.gelu(hidden), hidden

    return Task(ours, rival, exact, _nothing)


def _down(data: dict[str, Tensor], table: Table) -> Task:
    """The second product together with the places of its rows."""
    text, end, source = (data[name] for name in ("text", "row_end", "source"))
    to = Places(source, len(data["wide"])).first()
    place = table.blocks("place")

    def ours(blocks: Blocks) -> tuple[Tensor, ...]:
        out = torch.empty_like(text)
        launch.linear_rows(data["wide"], data["w2"], data["b2"], blocks, out=out, to=to)
        place_kernels.fill(text, end, source, to, out, place)
        return (out,)

    def rival() -> tuple[Tensor, ...]:
        rows = F.linear(data["wide"], data["w2"], data["b2"])
        return (place_kernels.place(text, rows, end, source, place),)

    def exact() -> tuple[Tensor, ...]:
        wide = _wide(data, "text", "wide", "w2", "b2", "row_end")
        return (place_rows_torch(wide[0], F.linear(*wide[1:4]), wide[4], source),)

    return Task(ours, rival, exact, _nothing)


def _hidden_grads(dg: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
    """dh, gelu(pre) and the column sums of dh, by autograd."""
    leaf = pre.detach().requires_grad_()
    activated = F.gelu(leaf)
    (dh,) = torch.autograd.grad(activated, leaf, dg)
    return dh, activated.detach(), dh.sum(0)


def _hidden_grad(data: dict[str, Tensor], table: Table) -> Task:
    pre, before = data["pre"], data["pre"].clone()
    dy, w2 = data["dy"], data["w2"]

    def ours(blocks: Blocks) -> tuple[Tensor, ...]:
        dh, sums = launch.hidden_grad(dy, w2, pre, blocks)
        return dh, pre, sums.to(pre.dtype)

    def rival() -> tuple[Tensor, ...]:
        dg = dy @ w2
        sums = launch.gelu_grad(dg, pre, table.blocks("gelu_grad"))
        return dg, pre, sums.to(pre.dtype)

    def exact() -> tuple[Tensor, ...]:
        return _hidden_grads(dy.double() @ w2.double(), before.double())

    def restore() -> None:
        pre.copy_(before)

    return Task(ours, rival, exact, restore)


def _gelu_grad(data: dict[str, Tensor], table: Table) -> Task:
    """In place over dG and the hidden rows; the rival is autograd's GELU."""
    pre, dg = data["pre"], data["wide"]
    before = pre.clone(), dg.clone()

    def ours(blocks: Blocks) -> tuple[Tensor, ...]:
        sums = launch.gelu_grad(dg, pre, blocks)
        return dg, pre, sums.to(pre.dtype)

    def restore() -> None:
        pre.copy_(before[0])
        dg.copy_(before[1])

    return Task(
        ours,
        lambda: _hidden_grads(before[1], before[0]),
        lambda: _hidden_grads(before[1].double(), before[0].double()),
        restore,
    )


def _weight_grad(data: dict[str, Tensor], table: Table) -> Task:
    """Both weight gradients of a step: dW2 with db2, and dW1 over gathered rows."""
    dy, activated, dh = data["dy"], data["wide"], data["pre"]
    x, rows = data["x"], data["rows"]

    def ours(blocks: Blocks) -> tuple[Tensor, ...]:
        dw2, db2 = launch.weight_grad(dy, activated, blocks, sums=True)
        dw1, _ = launch.weight_grad(dh, x, blocks, rows=rows)
        assert db2 is not None
        return dw2, db2.to(dy.dtype), dw1

    def rival() -> tuple[Tensor, ...]:
        dw1 = library_weight_grad(dh, x.index_select(0, rows))
        return library_weight_grad(dy, activated), column_sums(dy), dw1

    def exact() -> tuple[Tensor, ...]:
        y, g, h, wide = _wide(data, "dy", "wide", "pre", "x")
        return y.T @ g, y.sum(0), h.T @ wide[rows]

    return Task(ours, rival, exact, _nothing)


def _place(data: dict[str, Tensor], table: Table) -> Task:
    """Placing and, with the same blocks, collecting the rows' gradients (one place for each)."""
    text, rows, end, source = (data[name] for name in ("text", "dy", "row_end", "source"))
    dout, places = text, Places(source, len(rows))
    first = places.first()

    def ours(blocks: Blocks) -> tuple[Tensor, ...]:
        drows = torch.empty_like(rows)
        place_kernels.rows_grad(dout, places.order, places.starts, drows, blocks)
        return place_kernels.place(text, rows, end, source, blocks), drows

    def rival() -> tuple[Tensor, ...]:
        return place_rows_torch(text, rows, end, source), dout.index_select(0, first)

    return Task(ours, rival, lambda: tuple(result.double() for result in rival()), _nothing)


def _place_grad(data: dict[str, Tensor], table: Table) -> Task:
    dout, source = data["text"], data["source"]
    places = Places(source, len(data["dy"]))
    ends = source == ROW_END

    def ours(blocks: Blocks) -> tuple[Tensor, ...]:
        total = place_kernels.row_end_grad(dout, places.order, places.starts, blocks)
        return (total.to(dout.dtype),)

    return Task(
        ours,
        lambda: (dout[ends].sum(0),),
        lambda: (dout[ends].double().sum(0),),
        _nothing,
    )


TASKS: dict[str, Callable[[dict[str, Tensor], Table], Task]] = {
    "up": _up,
    "down": _down,
    "hidden_grad": _hidden_grad,
    "weight_grad": _weight_grad,
    "gelu_grad": _gelu_grad,
    "place": _place,
    "place_grad": _place_grad,
}


def operation_calls(
    name: str, rows: int, table: Table, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """Forward and backward of an operation: "ours" and "torch"."""
    if name.startswith("attention"):
        return attention_calls(name, rows, table, sizes, device, dtype)
    data = _data(rows, sizes, device, dtype)
    if name == "gelu_mlp":
        learned = [data[key].requires_grad_() for key in ("w1", "b1", "w2", "b2")]
        w1, b1, w2, b2 = learned
        x, index, dout = data["x"], data["rows"], data["dy"]
        forwards: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: gelu_mlp_triton(x, w1, b1, w2, b2, index, table=table),
            "torch": lambda: gelu_mlp_torch(x, w1, b1, w2, b2, index),
        }
    else:
        learned = [data["dy"].requires_grad_(), data["row_end"].requires_grad_()]
        dout = torch.randn_like(data["text"])
        inputs = (data["text"], *learned, data["source"])
        forwards = {
            "ours": lambda: place_rows_triton(*inputs, table=table),
            "torch": lambda: place_rows_torch(*inputs),
        }

    def both(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), learned, dout)

    return {key: both(forward) for key, forward in forwards.items()}
