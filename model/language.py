"""The language model: any transformers causal LM, with a head that computes asked rows only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..hd.errors import UsageError
from ..kernels.flash_attention import pack_schedule
from ..kernels.linear_loss import linear_loss
from .attention import OURS, SCHEDULE
from .last_layer import ASKED_ROWS, LastLayer, last_layer, let_ask_rows

# Factors between the last hidden state and the logits, which LMHead does not apply.
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def check_supported(causal_lm: PreTrainedModel, attention: str) -> None:
    """Raise UsageError for a causal LM that would be computed wrongly under `attention`
    (transformers' name of it); its weights are not looked at, they may be on `meta`."""
    reason = _refusal(causal_lm, attention)
    if reason is not None:
        kind = causal_lm.config.model_type
        raise UsageError(f"language model of type {kind!r} cannot be used: {reason}")


def _refusal(causal_lm: PreTrainedModel, attention: str) -> str | None:
    config = causal_lm.config.to_dict()
    if not causal_lm._supports_attention_backend:
        return "its attention cannot be replaced, so packed samples would see each other"
    if not any(name.endswith("rotary_emb") for name, _ in causal_lm.named_modules()):
        return "its positions are not rotary, so packed samples would not restart at 0"
    head = causal_lm.get_output_embeddings()
    if head.bias is not None:
        return "its head has a bias"
    if config.get("tie_word_embeddings") and head.weight is not (
        causal_lm.get_input_embeddings().weight
    ):
        return "tie_word_embeddings is true, but its head is another; set it to false there"
    for name in LOGIT_SCALES:
        if config.get(name) not in (None, 1.0):
            return f"its logits are scaled ({name} {config[name]})"
    if config.get("attn_logit_softcapping") is not None:
        return "its attention scores are capped (attn_logit_softcapping)"
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and attention in OURS:
        return f"its attention has a sliding window of {window}; choose attention=sdpa"
    return None


class LMHead(nn.Linear):
    """The output embedding; with labels it returns the summed loss and never the logits.

    A module of its own because ZeRO-3 gathers a weight when its module is called.
    """

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`[… H]` -> `[… V]`; with targets and their weights (1 by default) `[L]`, `[L H]` or the
        rows `[L]` of `[T H]` -> scalar loss sum."""
        if targets is None:
            return super().forward(hidden)
        return linear_loss(hidden, self.weight, rows, targets, weights)


class LanguageModel(nn.Module):
    """A causal LM taken apart into embed, read and head, whole again for `generate`."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        check_supported(causal_lm, causal_lm.config._attn_implementation)
        # What a folder's generation_config.json asks for (sampling, penalties) is not ours.
        causal_lm.generation_config = GenerationConfig()
        old = causal_lm.get_output_embeddings()
        with torch.device("meta"):
            head = LMHead(old.in_features, old.out_features, bias=False)
        head.weight = old.weight  # the same Parameter: tied embeddings stay tied
        causal_lm.set_output_embeddings(head)
        let_ask_rows(causal_lm)
        self.causal_lm = causal_lm

    @property
    def head(self) -> LMHead:
        return self.causal_lm.get_output_embeddings()

    @property
    def width(self) -> int:
        return self.causal_lm.config.hidden_size

    def embed(self, ids: Tensor) -> Tensor:
        """ids `[T]` -> `[T H]`."""
        return self.causal_lm.get_input_embeddings()(ids)

    def read(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor | None = None,
    ) -> Tensor:
        """A pack of embeddings `[T H]` -> last hidden states `[T H]`; sequences stay apart.
        rows: int64 `[L]`, of whom alone they are asked -> `[L H]` (model/last_layer.py)."""
        more: dict[str, object] = {}
        if self.causal_lm.config._attn_implementation in OURS:  # others do not know the keyword
            more[SCHEDULE] = pack_schedule(cu_seqlens, len(x))
        # Every layer hands the rows on to its attention, which takes and ignores unknown keywords.
        left = rows  # to be taken here, from all: in other kinds of layers, and where there is none
        if rows is not None and len(rows) and isinstance(last_layer(self.causal_lm), LastLayer):
            more[ASKED_ROWS], left = rows, None
        hidden = self.causal_lm.get_decoder()(
            inputs_embeds=x[None],
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
            **more,
        ).last_hidden_state[0]
        return hidden if left is None else hidden.index_select(0, left)
