"""Who does an operation: ours, eager torch, torch.compile, LLaVA's own sequence.

Eager torch is what a careful user writes: cuBLAS and `F.gelu`, the kept rows gathered before they
are projected, `index_copy` into the text. LLaVA's sequence is written from the known algorithm of
its multimodal input preparation: project every feature row, then image by image merge the tiles
into a map, unpad it by slicing, append the newline column, flatten; then sample by sample split
the text, concatenate, and pad the samples to the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..kernels.backend import choose
from ..kernels.gelu_mlp import gelu_mlp
from ..kernels.linear_loss import linear_loss
from ..kernels.place_rows import place_rows
from ..kernels.project_rows import project_rows
from .kernels_cases import Case, Tensors
from .kernels_layout import GRID, Layout

Call = Callable[[Tensors, Tensors], Tensor]  # (tensors, tables) -> output
ABSENT = {
    "liger": "not available: Liger Kernel has no two-layer GELU projector with bias and no "
    "placement of rows (its MLP is SwiGLU)",
    "xformers": "not available: xformers has no two-layer GELU projector and no placement of rows",
}
ABSENT_LOSS = {
    "liger": "not compared: Liger Kernel's fused linear cross entropy is not wired in",
    "xformers": "not available: xformers has no fused linear cross entropy",
}
NOT_LLAVAS = "not available: LLaVA has no such step of its own; see project_place"


@dataclass(frozen=True)
class Form:
    """How a provider's inputs and outputs differ from ours; conversions are never timed.

    prepare: its tensors from ours. packed: its output as `[T H]`. grad_of: the gradient of its
    output from that of `[T H]`. grads_of: gradients of our tensors from those of its own.
    """

    prepare: Callable[[Tensors, Tensors], Tensors]
    packed: Callable[[Tensor], Tensor]
    grad_of: Callable[[Tensor], Tensor]
    grads_of: Callable[[Tensors, Tensors], Tensors]


SAME = Form(
    prepare=lambda tensors, tables: tensors,
    packed=lambda output: output,
    grad_of=lambda grad: grad,
    grads_of=lambda grads, tables: grads,
)


@dataclass(frozen=True)
class Provider:
    """A name with its call; without one, the reason. path: what runs behind the name.

    untimed: why it is checked but not timed. setup_ms: what `call` had built for it beforehand,
    once for a batch.
    """

    name: str
    call: Call | None
    path: str = ""
    reason: str = ""
    form: Form = SAME
    untimed: str = ""
    setup_ms: float | None = None

    def run(self, tensors: Tensors, tables: Tensors) -> Tensor:
        """Call it, on tensors in its own form."""
        if self.call is None:
            raise ValueError(f"{self.name}: {self.reason}")
        return self.call(tensors, tables)


def kernel_path(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Which path our operation takes for these inputs, for the record: "torch", "triton", for an
    operation of two parts both, or "triton, fused" where the second product places its rows."""
    table = choose("gelu_mlp", device, dtype, case.rows).table
    if case.op == "project_place" and table is not None and table.uses("down", case.rows):
        return "triton, fused"
    parts = {
        "gelu_mlp": [("gelu_mlp", case.rows)],
        "place_rows": [("place_rows", case.tokens)],
        "project_place": [("gelu_mlp", case.rows), ("place_rows", case.tokens)],
        "linear_loss": [],
    }
    paths = [choose(name, device, dtype, count).path for name, count in parts[case.op]]
    return " + ".join(dict.fromkeys(paths)) or "torch"


def compiled(op: str, dynamic: bool) -> Call:
    """torch.compile of eager, from an empty cache; `dynamic`: one compilation for all shapes."""
    torch.compiler.reset()
    return torch.compile(EAGER[op], dynamic=dynamic)


def providers_of(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    compile_call: Call | None,
    compile_path: str,
) -> list[Provider]:
    """Everyone who was asked for the operation of a case, eager first: it is the yardstick."""
    found = [
        Provider("eager", EAGER[case.op], "torch"),
        Provider("ours", OURS[case.op], kernel_path(case, dtype, device)),
        Provider("compile", compile_call, compile_path),
    ]
    if case.op == "project_place" and case.layout is not None:
        found.append(llava_provider(case.layout))
    else:
        found.append(Provider("llava", None, reason=NOT_LLAVAS))
    absent = ABSENT_LOSS if case.op == "linear_loss" else ABSENT
    return found + [Provider(name, None, reason=reason) for name, reason in absent.items()]


def mlp_weights(t: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return t["w1"], t["b1"], t["w2"], t["b2"]


OURS: dict[str, Call] = {
    "gelu_mlp": lambda t, tables: gelu_mlp(t["x"], *mlp_weights(t)),
    "place_rows": lambda t, tables: place_rows(
        t["text"], t["rows"], t["row_end"], tables["source"]
    ),
    "project_place": lambda t, tables: project_rows(
        t["x"], *mlp_weights(t), t["text"], t["row_end"], tables["source"], tables["rows"]
    ),
    "linear_loss": lambda t, tables: linear_loss(
        t["hidden"], t["weight"], tables["label_rows"], tables["targets"]
    ),
}


def _eager_mlp(x: Tensor, t: Tensors) -> Tensor:
    return F.linear(F.gelu(F.linear(x, t["w1"], t["b1"])), t["w2"], t["b2"])


def eager_place(rows: Tensor, t: Tensors, tables: Tensors) -> Tensor:
    """Rows are numbered in the order of their places, so no gather is needed."""
    ends = tables["row_end_places"]
    out = t["text"].index_copy(0, tables["row_places"], rows)
    return out.index_copy(0, ends, t["row_end"].expand(ends.shape[0], -1))


def _eager_project_place(t: Tensors, tables: Tensors) -> Tensor:
    return eager_place(_eager_mlp(t["x"].index_select(0, tables["rows"]), t), t, tables)


def _eager_linear_loss(t: Tensors, tables: Tensors) -> Tensor:
    logits = F.linear(t["hidden"].index_select(0, tables["label_rows"]), t["weight"])
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), tables["targets"], reduction="sum")


EAGER: dict[str, Call] = {
    "gelu_mlp": lambda t, tables: _eager_mlp(t["x"], t),
    "place_rows": lambda t, tables: eager_place(t["rows"], t, tables),
    "project_place": _eager_project_place,
    "linear_loss": _eager_linear_loss,
}


def llava_sequence(t: Tensors, layout: Layout) -> Tensor:
    """LLaVA's own order of operations.

    t: x `[all_rows D]`, the projector's weights, row_end `[H]`, text `[text_tokens H]` (the words
    of all samples end to end, as its embedding layer gives them). Returns `[S longest H]`, padded
    with zeros.
    """
    tiles = 1 + GRID[0] * GRID[1]
    projected = _eager_mlp(t["x"], t)
    features = projected.view(layout.images * tiles, layout.side**2, -1)
    images = [_llava_image(part, t["row_end"], layout) for part in features.split(tiles)]
    pieces = t["text"].split([length for sample in layout.text for length in sample])
    samples = [
        torch.cat([pieces[2 * number], image, pieces[2 * number + 1]])
        for number, image in enumerate(images)
    ]
    return pad_sequence(samples, batch_first=True)


def _llava_image(features: Tensor, newline: Tensor, layout: Layout) -> Tensor:
    """`[tiles P H]` -> the image's tokens `[n H]`: global view, unpadded map with newlines."""
    side, width = layout.side, features.shape[-1]
    base, tiles = features[0], features[1:]
    grid = tiles.view(GRID[0], GRID[1], side, side, width).permute(4, 0, 2, 1, 3).contiguous()
    merged = grid.flatten(1, 2).flatten(2, 3)  # [H map_height map_width]
    unpadded = merged[:, layout.kept[0] : layout.kept[1], :]
    column = newline[:, None, None].expand(*unpadded.shape[:-1], 1)
    flat = torch.cat([unpadded, column], dim=-1).flatten(1, 2).transpose(0, 1)
    return torch.cat([base, flat])


def llava_provider(layout: Layout) -> Provider:
    """LLaVA's sequence, with the conversions that make it comparable with a pack."""
    visual = layout.tokens - layout.text_tokens
    per_image = visual // layout.images
    lengths = [before + per_image + after for before, after in layout.text]

    def prepare(tensors: Tensors, tables: Tensors) -> Tensors:
        words = tensors["text"].detach()[tables["text_places"]].clone()
        return {**tensors, "text": words}

    def packed(output: Tensor) -> Tensor:
        return torch.cat([output[i, :length] for i, length in enumerate(lengths)])

    def grads_of(grads: Tensors, tables: Tensors) -> Tensors:
        words = grads["text"]
        whole = words.new_zeros(layout.tokens, words.shape[1])
        return {**grads, "text": whole.index_copy(0, tables["text_places"], words)}

    return Provider(
        "llava",
        lambda t, tables: llava_sequence(t, layout),
        "torch, LLaVA's sequence",
        form=Form(
            prepare=prepare,
            packed=packed,
            grad_of=lambda grad: pad_sequence(list(grad.split(lengths)), batch_first=True),
            grads_of=grads_of,
        ),
    )
