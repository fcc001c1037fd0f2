"""LlavaHD: a CLIP tower, a projector, a row-end token and a causal LM; one forward for all uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel

from .adapter_config import AdapterConfig
from .config import LlavaHDConfig
from .language import LanguageModel
from .packing import PackedBatch
from .projector import MLPProjector, build_projector
from .vision import VisionTower, with_cached


@dataclass(frozen=True)
class Output:
    """loss_sum: scalar fp32, the summed cross entropy of `num_label_tokens` tokens, each by its
    weight. loss_units: what that is the sum of, label tokens or samples' means; divide by it.
    features: the tower's, where the pack holds rows that a cache wants (`fresh`)."""

    loss_sum: Tensor
    num_label_tokens: int
    loss_units: int
    features: Tensor | None = None


class LlavaHD(nn.Module):
    """The model. `forward` reads a pack and returns its loss; `hidden` and `logits` stop earlier.

    Parts: `vision`, `projector` (holds the row-end), `language`. Build it with
    `from_pretrained`, or from a tower and a language model with model/assemble.py.
    """

    def __init__(
        self, config: LlavaHDConfig, clip: CLIPVisionModel, causal_lm: PreTrainedModel
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(clip, config.vision_layer)
        self.language = LanguageModel(causal_lm)
        self.projector = build_projector(
            config.projector, clip.config.hidden_size, self.language.width, config.hd.row_end
        )
        self.adapter: AdapterConfig | None = None  # of a model with LoRA (model/adapter.py)

    @property
    def row_end(self) -> Tensor | None:
        """The learned row-end `[H]`, or None."""
        return self.projector.row_end

    def checkpoint_gradients(self) -> None:
        """Keep fewer activations for backward and compute them again: the language model's and the
        tower's layers, and the projector's hidden rows."""
        self.vision.checkpoint_gradients()
        self.language.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        if isinstance(self.projector, MLPProjector):
            self.projector.recompute = True

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def features(self, batch: PackedBatch) -> Tensor:
        """The tower's features `[N P+1 D]`; with cached rows behind them, `[1 1+N·P+C D]`."""
        features = self.vision(batch.tiles)
        return features if batch.features is None else with_cached(features, batch.features)

    def embeddings(self, batch: PackedBatch, features: Tensor | None = None) -> Tensor:
        """The packed embedding sequence `[T H]`: text, visual rows and row-ends in their places.
        features: of the batch, where they have been computed already."""
        if features is None:
            features = self.features(batch)
        text = self.language.embed(batch.ids)  # [T H]
        return self.projector(text, features, batch.rows, batch.source)  # [T H]

    def hidden(
        self, batch: PackedBatch, features: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Last hidden states `[T H]`; of int64 rows `[L]` alone, `[L H]`."""
        x = self.embeddings(batch, features)
        return self.language.read(x, batch.positions, batch.cu_seqlens, batch.max_seqlen, rows)

    def forward(self, batch: PackedBatch) -> Output:
        """The summed loss of a pack.

        A pack without images reads one zero tile whose row is placed nowhere: its gradient is
        zero, but every rank runs the same modules (no hang under ZeRO).
        """
        features = self.features(batch)
        hidden = self.hidden(batch, features, batch.label_rows)
        loss_sum = self.language.head(hidden, batch.targets, batch.weights)
        wanted = features if batch.fresh else None
        return Output(loss_sum, batch.num_label_tokens, batch.loss_units, wanted)

    def logits(self, batch: PackedBatch) -> Tensor:
        """`[T V]` for every place; for comparison and scoring, not for training."""
        return self.language.head(self.hidden(batch))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: str = "auto",
    ) -> LlavaHD:
        """The model of a folder: one of ours, an adapter of ours with the base that it names, or
        transformers' `llava_next` or `llava`.

        Raises UsageError where the folder holds no model, DataError where tensors are missing.
        """
        from .weights import load_model  # weights builds LlavaHD, so it cannot be imported above

        return load_model(path, dtype=dtype, attention=attention).to(device).eval()

    def save_pretrained(
        self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write config.json and safetensors, or an adapter folder. `state_dict` replaces the
        model's own tensors (a trainer that holds them in partitions gathers `saved_names`)."""
        from .weights import save_model

        save_model(self, path, state_dict)

    def saved_names(self) -> list[str]:
        """Names of the tensors of the state that `save_pretrained` writes."""
        from .adapter import saved_names

        return list(self.state_dict()) if self.adapter is None else saved_names(self)
