"""Passes of training steps as benchmarks compute them, and who takes part in `bench packing`.

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
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.last_layer import ASKED_ROWS
from ..model.llava_hd import LlavaHD
from ..model.packing import PackedBatch, Sample, pack
from ..model.prompt import IGNORE
from ..train.batches import BatchOrder

RIVALS = ("padded", "modality", "padded-rows")
CONTESTANTS = ("packs", *RIVALS)
Self = TypeVar("Self", bound="BatchPass")


class AnyPass(Protocol):
    """A pass: its loss, what that is the sum of, and its tokens, with padding and without."""

    @property
    def loss_units(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_useful_tokens(self) -> int: ...

    def loss_sum(self, model: Any) -> Tensor: ...


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, passes: Sequence[AnyPass]
) -> float:
    """Forward and backward of all passes of a step, and the update; returns the mean loss.

    The loss is a mean over what all passes together have, so how samples fall into passes does
    not change it."""
    units = sum(one.loss_units for one in passes)
    loss = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for one in passes:
        part = one.loss_sum(model)
        (part / units).backward()
        loss += part.detach()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss) / units


@dataclass(frozen=True)
class BatchPass:
    """A pass of ours. Sub-classes compute it in different ways."""

    batch: PackedBatch

    @property
    def loss_units(self) -> int:
        """What the loss is the sum of."""
        return self.batch.loss_units

    @property
    def num_useful_tokens(self) -> int:
        """Tokens of the samples."""
        return self.batch.num_useful_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.batch.num_tokens

    def to(self: Self, device: torch.device) -> Self:
        """The same pass with its tensors on `device`."""
        return type(self)(self.batch.to(device, non_blocking=True))


class DensePass(BatchPass):
    """A pass to be computed as a dense batch `[S longest]`, padding behind each sample."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.batch.num_samples * self.batch.max_seqlen

    def loss_sum(self, model: LlavaHD) -> Tensor:
        """The summed loss, by the model's decoder as transformers calls it for padded batches."""
        batch, longest = self.batch, self.batch.max_seqlen
        device = batch.ids.device
        lengths = batch.cu_seqlens.diff()
        numbers = torch.arange(len(lengths), device=device)
        row = torch.repeat_interleave(numbers, lengths, output_size=batch.num_tokens)
        places = row * longest + batch.positions  # of each token in the dense batch
        x = model.embeddings(batch)
        dense = x.new_zeros(len(lengths) * longest, x.shape[1]).index_copy(0, places, x)
        mask = (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
        hidden = model.language.causal_lm.get_decoder()(
            inputs_embeds=dense.view(len(lengths), longest, -1),
            attention_mask=mask,
            use_cache=False,
            **{ASKED_ROWS: places[batch.label_rows]},
        ).last_hidden_state[0]
        return model.language.head(hidden, batch.targets, batch.weights)


class PackedPass(BatchPass):
    """A pass that the model's own forward computes."""

    def loss_sum(self, model: LlavaHD) -> Tensor:
        """The summed loss."""
        return model(self.batch).loss_sum


class AllLogitsPass(BatchPass):
    """A pass whose logits are all computed and stored, as causal LMs do by themselves."""

    def loss_sum(self, model: LlavaHD) -> Tensor:
        """The summed loss, by torch's cross entropy over every place."""
        batch = self.batch
        labels = torch.full_like(batch.ids, IGNORE).index_copy(0, batch.label_rows, batch.targets)
        return F.cross_entropy(
            model.logits(batch).float(), labels, ignore_index=IGNORE, reduction="sum"
        )


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
