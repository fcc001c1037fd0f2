"""Names of tensors: ours, and those of every layout that is read or written.

| layout | language model | tower | projector | row-end |
|---|---|---|---|---|
| ours | language.causal_lm.* | vision.clip.* | projector.weight_1, … | projector.row_end |
| transformers 4.47 | language_model.model.*, language_model.lm_head | vision_tower.vision_model.* |
  multi_modal_projector.linear_1.*, … | image_newline |
| transformers 4.52 | model.language_model.*, lm_head | model.vision_tower.vision_model.* |
  model.multi_modal_projector.* | model.image_newline |
| transformers 5.x | as 4.47 | vision_tower.* | as 4.47 | as 4.47 |
| original LLaVA | model.*, lm_head | model.vision_tower.vision_tower.vision_model.* |
  model.mm_projector.0, .2 | model.image_newline |
"""

from __future__ import annotations

import re

VISION, LANGUAGE, PROJECTOR = "vision.clip.", "language.causal_lm.", "projector."
ROW_END = "projector.row_end"
HEAD = LANGUAGE + "lm_head.weight"
EMBEDDING = LANGUAGE + "model.embed_tokens.weight"
# The halves of a whole CLIP that nobody here reads.
NOT_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")

# Buffers that older versions wrote; they are computed, not learned.
COMPUTED = re.compile(r"(^|\.)(embeddings\.position_ids|rotary_emb\.inv_freq)$")

MLP = {
    "weight_1": ("linear_1.weight", "0.weight"),
    "bias_1": ("linear_1.bias", "0.bias"),
    "weight_2": ("linear_2.weight", "2.weight"),
    "bias_2": ("linear_2.bias", "2.bias"),
}
LINEAR = {"weight": "weight", "bias": "bias"}


def is_computed(name: str) -> bool:
    """Whether a stored tensor is a buffer that every version computes for itself."""
    return COMPUTED.search(name) is not None


def from_transformers(name: str) -> str | None:
    """Our name of a tensor of transformers' llava or llava_next, in any of the three layouts; None
    for a name that belongs to none of them."""
    inner = name.removeprefix("model.")
    if inner == "image_newline":
        return ROW_END
    if inner.startswith("multi_modal_projector."):
        part = inner.removeprefix("multi_modal_projector.")
        return next((PROJECTOR + ours for ours, (theirs, _) in MLP.items() if theirs == part), None)
    if inner.startswith("vision_tower."):
        return VISION + inner.removeprefix("vision_tower.").removeprefix("vision_model.")
    if name.startswith(("language_model.model.", "language_model.lm_head.")):
        return LANGUAGE + name.removeprefix("language_model.")
    if name.startswith("model.language_model."):
        return LANGUAGE + "model." + name.removeprefix("model.language_model.")
    if name.startswith("lm_head."):
        return LANGUAGE + name
    return None


def from_original(name: str) -> str | None:
    """Our name of a tensor of the original LLaVA; None for a name that is not of that layout."""
    if name == "model.image_newline":
        return ROW_END
    if name.startswith("model.mm_projector."):
        part = name.removeprefix("model.mm_projector.")
        table = {theirs: ours for ours, (_, theirs) in MLP.items()} | LINEAR
        return PROJECTOR + table[part] if part in table else None
    if name.startswith("model.vision_tower."):
        part = name.removeprefix("model.vision_tower.").removeprefix("vision_tower.")
        return VISION + part.removeprefix("vision_model.")
    if name.startswith(("model.", "lm_head.")):
        return LANGUAGE + name
    return None


def from_clip(name: str) -> str | None:
    """Our name of a tensor of a CLIP folder: a whole CLIP, its tower alone, or flattened; None for
    what is not of the image tower."""
    if name.startswith("vision_model."):
        return VISION + name.removeprefix("vision_model.")
    if name.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")):
        return VISION + name
    return None


def to_transformers(name: str) -> str:
    """The 4.47 name of one of our tensors, which every reader knows."""
    if name == ROW_END:
        return "image_newline"
    if name.startswith(PROJECTOR):
        return "multi_modal_projector." + MLP[name.removeprefix(PROJECTOR)][0]
    if name.startswith(VISION):
        return "vision_tower.vision_model." + name.removeprefix(VISION)
    return "language_model." + name.removeprefix(LANGUAGE)


def to_original(name: str) -> str:
    """The original LLaVA's name of one of our tensors; the tower has a folder of its own there
    (`to_clip`)."""
    if name == ROW_END:
        return "model.image_newline"
    if name.startswith(PROJECTOR):
        part = name.removeprefix(PROJECTOR)
        return "model.mm_projector." + (LINEAR[part] if part in LINEAR else MLP[part][1])
    return name.removeprefix(LANGUAGE)


def to_clip(name: str) -> str:
    """The name of one of our tower's tensors in a CLIPVisionModel folder, as 4.x has it."""
    return "vision_model." + name.removeprefix(VISION)
