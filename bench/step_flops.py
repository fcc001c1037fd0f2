"""Floating-point operations that a training step needs, whoever computes it.

Multiply and add count as two. Only what the samples need: no padding, no recomputation, the last
layer's MLP and the logits of learned tokens alone. Per layer of the language model of width H, with
K for the width of keys and values and M for that of the MLP, and for samples of s tokens:

    products   2 (2 H H + 2 H K + 3 H M) s            attention   2 s s H (causal: half of 4 s s H)
    last MLP   2 (3 H M) for each learned token       head        2 H V for each learned token
    projector  2 (D H + H H) for each kept row
    tower      2 (12 D D) + 4 (P+1) D for each of P+1 patches of a tile and each layer that is
               read, 2 (3 px px D) for each patch, forward only

Backward, stage 2: twice the products, the last MLP, the head and the attention; of the projector
all but the gradient of the features. Stage 1: products, last MLP and head once, because the
language model's weights have no gradient; the rest as in stage 2. `every_token` counts the last MLP
and the head for every useful token, as the usual 6 N per token does (Chowdhery et al. 2022, PaLM,
appendix B).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..hd.grid import HDConfig
from ..model.rival import Sizes
from .step_data import Facts

FORMULA = (
    "model FLOPs: per layer 2 (2 H H + 2 H K + 3 H M) a token and 2 s s H a sample, the last MLP "
    "2 (3 H M) and the head 2 H V a learned token, projector 2 (D H + H H) a kept row, tower "
    "24 D D + 4 (P+1) D a patch and layer; backward twice that (stage 1: products and head once), "
    "none of the tower"
)
# Dense 16-bit TFLOP/s of the data sheets, by what a device's name contains.
DATASHEET = {"H200": 989.0, "H100": 989.0, "A100": 312.0}


@dataclass(frozen=True)
class Work:
    """Operations of some samples, forward and backward. every_token: with the last MLP and the
    head of every token."""

    needed: float
    every_token: float


def work_of(
    samples: Iterable[Facts], sizes: Sizes, hd: HDConfig, stage: int, vision_layer: int = -2
) -> Work:
    """The operations of a stage's steps over the samples."""
    width, vision = sizes.width, sizes.vision_width
    key_width = width * (sizes.kv_heads or sizes.heads) // sizes.heads
    mlp = 2 * 3 * width * sizes.mlp
    layer = 2 * (2 * width * width + 2 * width * key_width) + mlp
    layers_read = sizes.vision_layers + 1 + vision_layer
    places = hd.patches_per_tile + 1
    tile = layers_read * places * (24 * vision * vision + 4 * places * vision)
    tile += 2 * 3 * hd.patch_px**2 * vision * hd.patches_per_tile
    head = 2 * width * sizes.vocabulary
    products = attention = asked = every_asked = projector = tower = 0.0
    for one in samples:
        products += (sizes.layers * layer - mlp) * one.length
        attention += sizes.layers * 2.0 * one.length**2 * width
        asked += (mlp + head) * one.labels
        every_asked += (mlp + head) * one.length
        # Forward both products; backward both weights' gradients and that of the hidden rows.
        projector += 2 * one.rows * (2 * vision * width + 3 * width * width)
        tower += tile * one.tiles
    times = 2 if stage == 1 else 3  # products with weights: forward, inputs' and weights' gradients
    shared = times * products + 3 * attention + projector + tower
    return Work(shared + times * asked, shared + times * every_asked)


def datasheet_tflops(device_name: str, dtype: str) -> float | None:
    """The data sheet's rate of a GPU in 16 bits; None where it is not known."""
    if dtype == "fp32":
        return None
    return next((rate for name, rate in DATASHEET.items() if name in device_name), None)
