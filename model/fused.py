"""Decoder layers computed in fewer kernels: the one door to Liger Kernel, and torch.compile.

Liger Kernel (Hsu et al., arXiv 2410.10989) has RMSNorm, rotary positions and SwiGLU as one Triton
kernel each, forward and backward. They stand here as modules of their own with the weights and
names of Llama's, so nothing of transformers is changed for anybody else. A GPU is needed; the
library is optional (`pip install 'llava-hd[gpu]'`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from ..hd.errors import UsageError

LIBRARY = "liger_kernel"


def liger_refusal(device_type: str) -> str | None:
    """Why Liger's kernels cannot run; None where they can."""
    if device_type != "cuda":
        return "needs a CUDA GPU, its kernels are Triton's; on a CPU leave it out"
    if importlib.util.find_spec(LIBRARY) is None:
        return "liger-kernel is not installed; pip install 'llava-hd[gpu]', or leave it out"
    return None


def check_liger(device_type: str) -> None:
    """Raise UsageError where Liger's kernels cannot run."""
    refusal = liger_refusal(device_type)
    if refusal is not None:
        raise UsageError(f"model.fused liger: {refusal}")


def apply_published_liger(language_model: PreTrainedModel) -> None:
    """Liger's own change of a Llama, for a rival: norms, rope, SwiGLU and cross entropy. It changes
    transformers' modules for the whole process, as it does for its users."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        cross_entropy=True, fused_linear_cross_entropy=False, model=language_model
    )


class FusedNorm(nn.Module):
    """LlamaRMSNorm in one kernel: the mean of squares in fp32, its result in the type of x."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`[… H]` -> `[… H]`."""
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # 0.0: the weight is used as it is; not in place: backward of others may need x.
        return LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "llama", False)


class FusedMLP(nn.Module):
    """LlamaMLP with silu(gate) * up in one kernel, which keeps neither for backward twice."""

    def __init__(self, mlp: LlamaMLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """`[… H]` -> `[… H]`."""
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class FusedAttention(LlamaAttention):
    """LlamaAttention with queries and keys turned in one kernel; attention is the model's own."""

    @classmethod
    def of(cls, old: LlamaAttention) -> FusedAttention:
        """The same linears in a new module."""
        with torch.device("meta"):
            new = cls(old.config, old.layer_idx)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(new, name, getattr(old, name))
        return new.train(old.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As LlamaAttention.forward, with attention of a registered name."""
        from liger_kernel.ops.rope import LigerRopeFunction

        assert position_embeddings is not None
        shape = hidden_states.shape[:-1]
        q, k, v = (
            linear(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = LigerRopeFunction.apply(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights


def fuse_layers(causal_lm: PreTrainedModel) -> int:
    """Put the fused modules in place of a Llama's own; returns how many. The names and values of
    its parameters stay. Raises UsageError for another kind of language model."""
    config = causal_lm.config
    if config.model_type != "llama" or config.hidden_act != "silu":
        raise UsageError(
            f"model.fused liger knows the layers of Llama with silu, not of {config.model_type} "
            f"with {config.hidden_act}; leave it out"
        )
    if config._attn_implementation == "eager":
        raise UsageError("model.fused liger has no eager attention; choose another model.attention")
    makers: tuple[tuple[type[nn.Module], Callable[[Any], nn.Module]], ...] = (
        (LlamaRMSNorm, FusedNorm),
        (LlamaMLP, FusedMLP),
        (LlamaAttention, FusedAttention.of),
    )
    count = 0
    for module in list(causal_lm.get_decoder().modules()):
        for name, child in list(module.named_children()):
            for old, make in makers:
                if type(child) is old:
                    setattr(module, name, make(child))
                    count += 1
    return count


def compile_layers(causal_lm: PreTrainedModel) -> int:
    """Have torch.compile compile each decoder layer when it is first run, for packs of any length;
    returns how many. Layers of one kind share what is compiled."""
    layers = causal_lm.get_decoder().layers
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
