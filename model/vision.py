"""The CLIP tower: tiles to features of the chosen layer; the CLS stays, nobody reads it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from ..hd.errors import UsageError
from ..hd.tiler import normalise
from .config import PASSING
from .projector import rows_with_cls


class VisionTower(nn.Module):
    """transformers' CLIPVisionModel, read at `layer` of its hidden states (LLaVA-1.5: -2).

    Frozen unless `unfreeze` is called, as in the paper: always in eval mode, without gradients.
    """

    def __init__(self, clip: CLIPVisionModel, layer: int) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        depth = len(clip.encoder.layers)
        self.num_layers = layer if layer >= 0 else depth + 1 + layer
        self.num_frozen: int | None = None  # None: all of it, and the embeddings

    def freeze(self) -> None:
        """Train nothing of the tower."""
        self.num_frozen = None
        self.requires_grad_(False).eval()

    def unfreeze(self, last_layers: int | None = None) -> None:
        """Train the last layers of those that are read; None is all of them and the embeddings.

        Layers behind the one that is read stay frozen: they never get a gradient, for which a
        sharded optimizer would wait. Raises UsageError for more layers than are read.
        """
        if last_layers is not None and last_layers > self.num_layers:
            raise UsageError(
                f"vision_layers {last_layers} is more than the {self.num_layers} layers of the "
                "tower that are read; give fewer, or leave it out to train all of it"
            )
        self.freeze()
        self.num_frozen = 0 if last_layers is None else self.num_layers - last_layers
        for layer in self.clip.encoder.layers[self.num_frozen : self.num_layers]:
            layer.requires_grad_(True)
        if last_layers is None:
            self.clip.embeddings.requires_grad_(True)
            self.clip.pre_layrnorm.requires_grad_(True)

    def train(self, mode: bool = True) -> VisionTower:
        """Stays in eval mode while it is frozen."""
        return super().train(mode and self.num_frozen is not None)

    def checkpoint_gradients(self) -> None:
        """Keep fewer activations for backward, where there is one."""
        self.clip.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 `[N 3 px px]` -> `[N P+1 D]`, the CLS first; every tile is encoded alone, all in
        one call. Dropping the CLS here would copy every feature."""
        layers = self.clip.encoder.layers[: self.num_layers]
        frozen = len(layers) if self.num_frozen is None else self.num_frozen
        learns = torch.is_grad_enabled()
        learns_embeddings = learns and self.clip.embeddings.class_embedding.requires_grad
        with torch.set_grad_enabled(learns_embeddings):
            pixels = normalise(tiles, self.clip.embeddings.patch_embedding.weight.dtype)
            hidden = self.clip.pre_layrnorm(self.clip.embeddings(pixels))
            for layer in layers[:frozen]:
                hidden = layer(hidden, attention_mask=None)
        for layer in layers[frozen:]:
            hidden = layer(hidden, attention_mask=None)
        return hidden

    def digest(self) -> str:
        """Hex digest of all that a tile's features depend on: the weights that are read, their
        type, how they are computed, and the versions of who computes them. Before ZeRO-3."""
        config = self.clip.config.to_dict()
        about = {
            "config": {k: v for k, v in config.items() if k not in PASSING},
            "attention": self.clip.config._attn_implementation,
            "layers": self.num_layers,
            "versions": {name: version(name) for name in ("pillow", "torch", "transformers")},
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        layers = self.clip.encoder.layers[: self.num_layers]
        for part in (self.clip.embeddings, self.clip.pre_layrnorm, layers):
            for name, tensor in part.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(data.numpy().data)
        return digest.hexdigest()


def with_cached(features: Tensor, cached: Tensor) -> Tensor:
    """The features `[N P+1 D]` of tiles and rows `[C D]` of a cache as those of one tile of N·P + C
    patches, `[1 1+N·P+C D]`, for the same projector."""
    rows = [features[0, :1], features[:, 1:].flatten(0, 1), cached.to(features.dtype)]
    return torch.cat(rows)[None]


def kept_rows(features: Tensor, rows: Tensor) -> Tensor:
    """Rows int64 `[r]`, numbered as in a pack, of the features of `LlavaHD.features` -> `[r D]`."""
    flat, rows = rows_with_cls(features, rows)
    return flat.index_select(0, rows)
