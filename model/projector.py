"""The projector: kept feature rows of the tower, projected, to their places in the sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.place_rows import place_rows
from ..kernels.project_rows import project_rows


class MLPProjector(nn.Module):
    """LLaVA-1.5's "mlp2x_gelu" and the learned row-end.

    The parameters are its own, so that one forward gathers them all under ZeRO-3 and the kernel
    gets plain tensors. The row-end is a vector of language width, added behind the projection.
    recompute: keep no hidden rows for backward.
    """

    def __init__(self, vision_width: int, language_width: int, row_end: bool) -> None:
        super().__init__()
        self.weight_1 = nn.Parameter(_linear_init(language_width, vision_width))
        self.bias_1 = nn.Parameter(_bias_init(language_width, vision_width))
        self.weight_2 = nn.Parameter(_linear_init(language_width, language_width))
        self.bias_2 = nn.Parameter(_bias_init(language_width, language_width))
        self.recompute = False
        self.row_end = _row_end_init(language_width) if row_end else None

    def forward(self, text: Tensor, features: Tensor, rows: Tensor, source: Tensor) -> Tensor:
        """text `[T H]`, the tower's features `[N P+1 D]` with their CLS, kept rows int64 `[R]`
        among the N·P without it, source int64 `[T]` (kernels/place_rows.py) -> `[T H]`."""
        flat, rows = rows_with_cls(features, rows)
        weights = (self.weight_1, self.bias_1, self.weight_2, self.bias_2)
        return project_rows(
            flat, *weights, text, self.row_end, source, rows=rows, recompute=self.recompute
        )


class LinearProjector(nn.Module):
    """The original LLaVA's single linear layer, and the learned row-end."""

    def __init__(self, vision_width: int, language_width: int, row_end: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(_linear_init(language_width, vision_width))
        self.bias = nn.Parameter(_bias_init(language_width, vision_width))
        self.row_end = _row_end_init(language_width) if row_end else None

    def forward(self, text: Tensor, features: Tensor, rows: Tensor, source: Tensor) -> Tensor:
        """As MLPProjector.forward."""
        flat, rows = rows_with_cls(features, rows)
        projected = F.linear(flat.index_select(0, rows), self.weight, self.bias)
        return place_rows(text, projected, self.row_end, source)


def rows_with_cls(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[N P+1 D]` as `[N·(P+1) D]`, not copied, and rows numbered without the CLS as they
    stand there."""
    patches = features.shape[1] - 1
    return features.flatten(0, 1), rows + rows // patches + 1


def build_projector(
    kind: str, vision_width: int, language_width: int, row_end: bool
) -> MLPProjector | LinearProjector:
    """The projector named by `LlavaHDConfig.projector`."""
    kinds: dict[str, type[MLPProjector | LinearProjector]] = {
        "mlp2x_gelu": MLPProjector,
        "linear": LinearProjector,
    }
    return kinds[kind](vision_width, language_width, row_end)


def _row_end_init(width: int) -> nn.Parameter:
    """N(0, 1/sqrt(H)), as `image_newline` of LLaVA-1.6 and transformers starts."""
    return nn.Parameter(torch.randn(width) / math.sqrt(width))


def _linear_init(rows: int, cols: int) -> Tensor:
    """The start of `nn.Linear`: uniform in ±1/sqrt(fan-in), which is what LLaVA trains from."""
    return torch.empty(rows, cols).uniform_(-(cols**-0.5), cols**-0.5)


def _bias_init(size: int, fan_in: int) -> Tensor:
    return torch.empty(size).uniform_(-(fan_in**-0.5), fan_in**-0.5)
