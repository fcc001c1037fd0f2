"""The language model: any transformers causal LM, with a head that computes labelled rows only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.linear_loss import linear_loss


class LMHead(nn.Linear):
    """The output embedding; with labels it returns the summed loss and never the logits.

    A module of its own because ZeRO-3 gathers a weight when its module is called.
    """

    def forward(
        self, hidden: Tensor, label_rows: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """`[… H]` -> `[… V]`; with label_rows and targets `[L]`, `[T H]` -> scalar loss sum."""
        if label_rows is None or targets is None:
            return super().forward(hidden)
        return linear_loss(hidden, self.weight, label_rows, targets)


class LanguageModel(nn.Module):
    """A causal LM taken apart into embed, read and head, whole again for `generate`."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        old = causal_lm.get_output_embeddings()
        if old.bias is not None:
            raise ValueError("a language model whose head has a bias is not supported")
        with torch.device("meta"):
            head = LMHead(old.in_features, old.out_features, bias=False)
        head.weight = old.weight  # the same Parameter: tied embeddings stay tied
        causal_lm.set_output_embeddings(head)
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

    def read(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """A pack of embeddings `[T H]` -> last hidden states `[T H]`; sequences stay apart."""
        return self.causal_lm.get_decoder()(
            inputs_embeds=x[None],
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
        ).last_hidden_state[0]
