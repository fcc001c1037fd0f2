"""The projector: kept feature rows of the tower to rows of the language model's width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.gelu_mlp import gelu_mlp
from ..kernels.place_rows import place_rows


class MLPProjector(nn.Module):
    """LLaVA-1.5's "mlp2x_gelu". Its parameters are its own, so that one forward gathers them all
    under ZeRO-3 and the kernel gets plain tensors."""

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.weight_1 = nn.Parameter(_linear_init(language_width, vision_width))
        self.bias_1 = nn.Parameter(_bias_init(language_width, vision_width))
        self.weight_2 = nn.Parameter(_linear_init(language_width, language_width))
        self.bias_2 = nn.Parameter(_bias_init(language_width, language_width))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """`[N P D]`, kept rows int64 `[R]` among N·P -> `[R H]`."""
        flat = rearrange(features, "n p d -> (n p) d")
        return gelu_mlp(flat, self.weight_1, self.bias_1, self.weight_2, self.bias_2, rows=rows)


class LinearProjector(nn.Module):
    """The original LLaVA's single linear layer."""

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_linear_init(language_width, vision_width))
        self.bias = nn.Parameter(_bias_init(language_width, vision_width))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """`[N P D]`, kept rows int64 `[R]` among N·P -> `[R H]`."""
        flat = rearrange(features, "n p d -> (n p) d")
        return F.linear(flat.index_select(0, rows), self.weight, self.bias)


class Placer(nn.Module):
    """Writes visual rows and the learned row-end into the embedding sequence.

    The row-end is a vector of language width, added behind the projector; it starts as
    N(0, 1/sqrt(H)), as `image_newline` of LLaVA-1.6 and transformers does.
    """

    def __init__(self, language_width: int, row_end: bool) -> None:
        super().__init__()
        start = torch.randn(language_width) / math.sqrt(language_width)
        self.row_end = nn.Parameter(start) if row_end else None

    def forward(self, text: Tensor, rows: Tensor, source: Tensor) -> Tensor:
        """text `[T H]`, rows `[R H]`, source `[T]` -> `[T H]`."""
        return place_rows(text, rows, self.row_end, source)


def build_projector(kind: str, vision_width: int, language_width: int) -> nn.Module:
    """The projector named by `LlavaHDConfig.projector`."""
    kinds = {"mlp2x_gelu": MLPProjector, "linear": LinearProjector}
    return kinds[kind](vision_width, language_width)


def _linear_init(rows: int, cols: int) -> Tensor:
    """The start of `nn.Linear`: uniform in ±1/sqrt(fan-in), which is what LLaVA trains from."""
    return torch.empty(rows, cols).uniform_(-(cols**-0.5), cols**-0.5)


def _bias_init(size: int, fan_in: int) -> Tensor:
    return torch.empty(size).uniform_(-(fan_in**-0.5), fan_in**-0.5)
