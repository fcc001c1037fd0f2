"""The CLIP tower: tiles to features of the chosen layer; the CLS stays, nobody reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from ..hd.tiler import normalise


class VisionTower(nn.Module):
    """transformers' CLIPVisionModel, read at `layer` of its hidden states (LLaVA-1.5: -2).

    Frozen in both stages, as in the paper: always in eval mode, without gradients.
    """

    def __init__(self, clip: CLIPVisionModel, layer: int) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        depth = len(clip.encoder.layers)
        self.num_layers = layer if layer >= 0 else depth + 1 + layer

    def train(self, mode: bool = True) -> VisionTower:
        """Stays in eval mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 `[N 3 px px]` -> `[N P+1 D]`, the CLS first; every tile is encoded alone, all in
        one call. Dropping the CLS here would copy every feature."""
        pixels = normalise(tiles, self.clip.embeddings.patch_embedding.weight.dtype)
        hidden = self.clip.pre_layrnorm(self.clip.embeddings(pixels))
        for layer in self.clip.encoder.layers[: self.num_layers]:
            hidden = layer(hidden, attention_mask=None)
        return hidden
