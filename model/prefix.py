"""Questions that share an image: what they share is read once, and its keys and values stand once.

All questions about an image begin alike: the template's opening, the visual tokens, a newline and
often some words ("Is there a"). That prefix `[P]` is encoded and read in one causal pass. Then the
questions' own tokens, laid end to end `[T]`, are read in one pass over `[prefix | own tokens]`,
under a mask that shows each token the prefix and what stands before it in its own question; each
further step reads one token of every question that is not finished. Positions go on from P in each
question.

    cost of Q questions of length P + t:   one by one  Q (P + t)        shared  P + Q t   tokens

Nothing is asked of the prefix's last hidden states: its pass ends as soon as the last layer's keys
and values are stored, without that layer's attention and MLP (of L layers, about 1 / L of it).

The keys and values are a sequence of one, with room for all tokens from the start: the prefix is
stored once and never copied. What is copied: each own token's key and value into its place (once),
and, where several query heads share a key head, torch's sdpa is given the keys repeated per head,
as transformers does for any masked attention (one temporary per layer, not one per question).

Nothing is tokenised in parts. The prompts are the processor's, whole, and the split is made in
their ids, so that prefix + rest is the prompt by construction.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .llava_hd import LlavaHD
from .packing import Sample, pack

MOST_QUESTIONS = 64  # of a pass: its mask has (their tokens) x (prefix and their tokens) places
SHARED = -1  # the owner of a token of the prefix
# Rotary frequencies that follow from the place alone; others follow the length of what is read.
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
MASKED = ("llava_hd", "llava_hd_triton", "llava_hd_xformers", "sdpa", "eager")


class PrefixNotSharedWarning(UserWarning):
    """Questions of one image are read as whole prompts; the message says why."""


def sharing_refusal(causal_lm: PreTrainedModel) -> str | None:
    """Why questions cannot share a prefix in this language model; None when they can."""
    attention = causal_lm.config._attn_implementation
    if attention not in MASKED:
        return f"attention {attention} takes no mask of our own; choose attention=auto"
    return keeping_refusal(causal_lm)


def keeping_refusal(causal_lm: PreTrainedModel) -> str | None:
    """Why what this language model has read cannot be kept for another prompt that begins alike;
    None when it can."""
    config = causal_lm.config.to_dict()
    layers = set(config.get("layer_types") or []) - {"full_attention"}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if layers or window is not None:
        kinds = ", ".join(sorted(layers)) or f"sliding window of {window}"
        return f"not all of its layers see the whole prompt ({kinds})"
    rotation = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rotation not in FIXED_ROTATIONS:
        return f"its rotary frequencies depend on the length of the prompt ({rotation})"
    return None


def shared_length(samples: Sequence[Sample], image_token_id: int) -> int:
    """How many tokens of their prompts the samples share, at least one of each left over.

    Raises ValueError where that does not reach behind the last visual token, or where the samples
    show different images.
    """
    first = samples[0]
    for sample in samples[1:]:
        same = len(sample.tiles) == len(first.tiles)
        if not same or any(a is not b for a, b in zip(sample.tiles, first.tiles, strict=True)):
            raise ValueError("the questions are not about the same image")
    most = min(len(sample.ids) for sample in samples) - 1
    ids = np.array([list(sample.ids[:most]) for sample in samples])
    differs = np.flatnonzero((ids != ids[0]).any(axis=0))
    length = int(differs[0]) if len(differs) else most
    if length == 0:
        raise ValueError("the prompts differ from their first token on")
    for sample in samples:
        if image_token_id in sample.ids[length:]:
            raise ValueError("the prompts differ before the end of the image")
    return length


def generate_shared(
    model: LlavaHD, samples: Sequence[Sample], max_new_tokens: int, ends: Sequence[int]
) -> list[list[int]] | None:
    """Greedy continuation of prompts about one image (the same tile tensors), up to and without an
    end token; what is shared is computed once.

    None, with a PrefixNotSharedWarning, where it cannot be shared in this model.
    """
    reason, length = sharing_refusal(model.language.causal_lm), 0
    if reason is None:
        try:
            length = shared_length(samples, model.config.image_token_id)
        except ValueError as error:
            reason = str(error)
    if reason is not None:
        warnings.warn(
            f"the image's prefix is read again for each question: {reason}",
            PrefixNotSharedWarning,
            stacklevel=3,
        )
        return None
    return _generate(model, samples, length, max_new_tokens, ends)


@torch.inference_mode()
def _generate(
    model: LlavaHD, samples: Sequence[Sample], length: int, steps: int, ends: Sequence[int]
) -> list[list[int]]:
    first = samples[0]
    prefix = replace(first, ids=first.ids[:length], labels=first.labels[:length])
    parts = [samples[i : i + MOST_QUESTIONS] for i in range(0, len(samples), MOST_QUESTIONS)]
    own = max(sum(len(sample.ids) - length + steps for sample in part) for part in parts)
    reader = SharedReader(model, prefix, room=length + own)
    answers: list[list[int]] = []
    for part in parts:
        reader.rewind()
        answers += reader.answer([sample.ids[length:] for sample in part], steps, set(ends))
    return answers


class SharedReader:
    """A prefix that has been read, and room behind it for the tokens of questions."""

    def __init__(self, model: LlavaHD, prefix: Sample, room: int) -> None:
        self.model = model
        batch = pack([prefix], model.config).to(model.device)
        last = model.language.causal_lm.config.num_hidden_layers - 1
        self.cache = Cache(layers=[RoomyLayer(room, layer == last) for layer in range(last + 1)])
        self.length = len(prefix.ids)
        self.seen = Places.of(SHARED, range(self.length), model.device)
        self.prefix = self.seen
        try:
            self._read(model.embeddings(batch), batch.positions, None)
        except PrefixStored:
            return
        raise RuntimeError("the last layer stored no keys")  # not a decoder as we know them

    def rewind(self) -> None:
        """Forget everything behind the prefix."""
        self.seen = self.prefix
        for layer in self.cache.layers:
            layer.keep(self.length)

    def answer(
        self, questions: Sequence[Sequence[int]], steps: int, ends: set[int]
    ) -> list[list[int]]:
        """The greedy continuation of each question's own tokens, without the end token."""
        device = self.model.device
        lengths = [len(ids) for ids in questions]
        places = [
            Places.of(number, range(self.length, self.length + n), device)
            for number, n in enumerate(lengths)
        ]
        tokens = torch.tensor([token for ids in questions for token in ids], device=device)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        answers: list[list[int]] = [[] for _ in questions]
        going, at = list(range(len(questions))), [self.length + n for n in lengths]
        new = Places.joined(places)
        for step in range(steps):
            hidden = self._step(tokens, new)[last]
            tokens = self.model.language.head(hidden).float().argmax(-1)
            kept = []
            for row, (number, token) in enumerate(zip(going, tokens.tolist(), strict=True)):
                if token not in ends:
                    answers[number].append(token)
                    kept.append(row)
            if not kept or step + 1 == steps:
                break
            tokens, going = tokens[kept], [going[row] for row in kept]
            new = Places(
                torch.tensor(going, device=device),
                torch.tensor([at[number] + step for number in going], device=device),
            )
            last = torch.arange(len(going), device=device)
        return answers

    def _step(self, tokens: Tensor, new: Places) -> Tensor:
        """Read tokens `[n]` at their places; their hidden states `[n H]`."""
        self.seen = Places.joined([self.seen, new])
        mask = new.sees(self.seen)[None, None]
        return self._read(self.model.language.embed(tokens), new.positions, mask)

    def _read(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        causal_lm = self.model.language.causal_lm
        if mask is not None and causal_lm.config._attn_implementation == "eager":
            lowest = torch.finfo(x.dtype).min  # eager attention adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, lowest)
        return causal_lm.get_decoder()(
            inputs_embeds=x[None],
            position_ids=positions[None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[0]


@dataclass(frozen=True)
class Places:
    """Tokens: whose they are (a question's number, or SHARED) and their positions, int64 `[n]`."""

    owners: Tensor
    positions: Tensor

    @classmethod
    def of(cls, owner: int, positions: range, device: torch.device) -> Places:
        """Tokens of one owner."""
        at = torch.arange(positions.start, positions.stop, device=device)
        return cls(torch.full_like(at, owner), at)

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """Parts end to end."""
        return cls(
            torch.cat([part.owners for part in parts]),
            torch.cat([part.positions for part in parts]),
        )

    def sees(self, keys: Places) -> Tensor:
        """bool `[n keys]`: the prefix, and the question's own tokens up to this one."""
        own = self.owners[:, None] == keys.owners[None]
        before = keys.positions[None] <= self.positions[:, None]
        return (keys.owners[None] == SHARED) | (own & before)


class PrefixStored(Exception):
    """The last layer has stored the prefix; nothing that its pass would still compute is read."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values `[1 Hkv n d]`, views of a store that has room for all tokens.

    transformers' own layer joins old and new tensors at each step, which would copy the prefix.
    last: of the decoder; it raises PrefixStored when it has stored its first tokens, the prefix.
    """

    def __init__(self, room: int, last: bool = False) -> None:
        super().__init__()
        self.room, self.last = room, last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the store when the first keys tell its type."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stores = tuple(
            x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True
        self.keep(0)

    def keep(self, length: int) -> None:
        """Keep the first tokens only."""
        self.keys, self.values = (store[:, :, :length] for store in self.stores)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values `[1 Hkv n d]` behind those that are there; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if end > self.room:
            raise ValueError(f"{end} tokens in a store for {self.room}")
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, begin:end] = new
        self.keep(end)
        if self.last and begin == 0:
            raise PrefixStored
        # The first pass is causal over dense tensors; kernels read them as they are.
        return (key_states, value_states) if begin == 0 else (self.keys, self.values)
