"""Who takes part in `bench packing`: ways to make passes of a step's samples, and to compute them.

packs: ours, by the training's own code (train/batches.py, model/packing.py). padded: passes of a
fixed number of samples as they come, each as a dense batch padded to its longest sample, as
transformers' trainers compute it. modality: the same, but samples with and without images in
passes of their own and lengths dealt evenly among these, LLaVA's group_by_modality_length within
the step. padded-rows: `data.batching: padded`, the same passes as padded with the padding computed
as sequences of its own, so that it costs everything but attention between padding and words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.llava_hd import LlavaHD
from ..model.packing import PackedBatch, Sample, pack
from ..train.batches import BatchOrder

RIVALS = ("padded", "modality", "padded-rows")
CONTESTANTS = ("packs", *RIVALS)


@dataclass(frozen=True)
class DensePass:
    """A pass to be computed as a dense batch `[S longest]`, padding behind each sample."""

    batch: PackedBatch

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.batch.num_samples * self.batch.max_seqlen

    def loss_sum(self, model: LlavaHD) -> Tensor:
        """The summed loss, by the model's decoder as transformers calls it for padded batches."""
        batch, longest = self.batch, self.batch.max_seqlen
        lengths = batch.cu_seqlens.diff()
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        places = row * longest + batch.positions  # of each token in the dense batch
        x = model.embeddings(batch)
        dense = x.new_zeros(len(lengths) * longest, x.shape[1]).index_copy(0, places, x)
        mask = (torch.arange(longest)[None] < lengths[:, None]).long()
        hidden = model.language.causal_lm.get_decoder()(
            inputs_embeds=dense.view(len(lengths), longest, -1),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        rows = places[batch.label_rows]
        return model.language.head(hidden.flatten(0, 1), rows, batch.targets, batch.weights)


@dataclass(frozen=True)
class PackedPass:
    """A pass that the model's own forward computes."""

    batch: PackedBatch

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.batch.num_tokens

    def loss_sum(self, model: LlavaHD) -> Tensor:
        """The summed loss."""
        return model(self.batch).loss_sum


Pass = DensePass | PackedPass
Read = Callable[[int], Sample]


def make_passes(
    contestant: str, packs: BatchOrder, step: int, read: Read, model: LlavaHD
) -> list[Pass]:
    """A contestant's passes of the same samples, those of a step of the order of packs."""
    parts = packs.step(step) if contestant == "packs" else _fixed(contestant, packs, step)
    made: list[Pass] = []
    for part in parts:
        samples = [read(int(index)) for index in part]
        if contestant in ("packs", "padded-rows"):
            padded = contestant == "padded-rows"
            made.append(PackedPass(pack(samples, model.config, padded=padded)))
        else:
            made.append(DensePass(pack(samples, model.config)))
    return made


def _fixed(contestant: str, packs: BatchOrder, step: int) -> Sequence[np.ndarray]:
    """Passes of `samples_per_pass` samples (by modality: at most so many)."""
    samples = packs.samples(step)
    if contestant != "modality":
        return list(samples.reshape(-1, packs.samples_per_pass))
    assert packs.lengths is not None and packs.has_image is not None
    parts = []
    for kind in (True, False):
        own = samples[packs.has_image[samples] == kind]
        longest_first = own[np.argsort(-packs.lengths[own], kind="stable")]
        count = -(-len(own) // packs.samples_per_pass)
        parts += [longest_first[number::count] for number in range(count)]
    return parts
