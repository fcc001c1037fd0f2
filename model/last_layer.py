"""The last decoder layer, for callers that ask for a few rows only.

A loss looks at the rows that carry a label. In every layer but the last one all rows are needed,
as keys and values of the next layer; behind the attention of the last one nobody reads the others.
So the layer goes on with the asked rows alone:

    x [B S H]  rows [L]  ->  a = (x + attention(norm(x)))[rows]  ->  a + mlp(norm(a)) [1 L H]

The same numbers for these rows, and the same gradients: what is left out has a gradient of zero.
With the share l of labels it saves (1 - l) of one MLP out of L layers, forward and backward (the
idea of computing the head on label rows, kernels/linear_loss.py, one step further back).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

ASKED_ROWS = "asked_rows"  # the keyword under which the rows reach the layer


class LastLayer(GradientCheckpointingLayer):
    """A layer with norms before attention and MLP, which can be asked for some of its rows."""

    def forward(
        self, hidden_states: Tensor, asked_rows: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """`[B S H]` -> `[B S H]`, as the layer that it is made of. asked_rows: int64 `[L]`, among
        the B·S rows -> `[1 L H]`."""
        if asked_rows is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        x = (hidden_states + attended).flatten(0, 1).index_select(0, asked_rows)[None]
        return x + self.mlp(self.post_attention_layernorm(x))


class LastLlamaLayer(LastLayer, LlamaDecoderLayer):
    """Of Llama and Vicuna."""


class LastMistralLayer(LastLayer, MistralDecoderLayer):
    """Of Mistral."""


class LastQwen2Layer(LastLayer, Qwen2DecoderLayer):
    """Of Qwen2."""


class LastQwen3Layer(LastLayer, Qwen3DecoderLayer):
    """Of Qwen3."""


KINDS: dict[type, type[LastLayer]] = {
    LlamaDecoderLayer: LastLlamaLayer,
    MistralDecoderLayer: LastMistralLayer,
    Qwen2DecoderLayer: LastQwen2Layer,
    Qwen3DecoderLayer: LastQwen3Layer,
}


PLAIN = {mine: kind for kind, mine in KINDS.items()}


def last_layer(causal_lm: PreTrainedModel) -> Any:
    """The layer that a decoder runs last."""
    return causal_lm.get_decoder().layers[: causal_lm.config.num_hidden_layers][-1]


def let_ask_rows(causal_lm: PreTrainedModel) -> bool:
    """Have the last layer take `asked_rows`, if it is of a kind that is known here; whether it is.
    Its class becomes a sub-class of what it was, so names, weights and hooks stay."""
    layer = last_layer(causal_lm)
    if type(layer) in KINDS:
        layer.__class__ = KINDS[type(layer)]
    return isinstance(layer, LastLayer)


def compute_every_row(causal_lm: PreTrainedModel) -> None:
    """Undo `let_ask_rows`; asked rows are then taken from what all of the layer computes."""
    layer = last_layer(causal_lm)
    layer.__class__ = PLAIN.get(type(layer), type(layer))
