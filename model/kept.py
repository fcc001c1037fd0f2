"""What a language model has read of a conversation, kept for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache

from .packing import Sample
from .prefix import RoomyLayer

HEADROOM = 256  # tokens of an answer that fit behind a first prompt before its store grows


class KeptPrompt:
    """Token ids that were read, the images among them, and their keys and values in `cache`.

    `ids` are those of finished passes: where a pass broke off, its keys are cut away by the next
    `keep_common`. image_token_id: the id at the places of visual tokens. longest: tokens that will
    ever be read, if that is known.
    """

    def __init__(self, num_layers: int, image_token_id: int, longest: int | None) -> None:
        self.image_token_id = image_token_id
        self._num_layers, self._longest = num_layers, longest
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.ids: list[int] = []
        self.images: list[tuple[int, Tensor]] = []  # first place, tiles
        layers = [GrowingLayer(HEADROOM, self._longest) for _ in range(self._num_layers)]
        self.cache = Cache(layers=layers)

    def keep_common(self, sample: Sample) -> int:
        """Keep only what the sample begins with, at most all but its last token and no part of an
        image; how many tokens that is."""
        length = self._common(sample)
        if length == 0:
            self._begin_anew()
            return 0
        self.ids = self.ids[:length]
        self.images = [(first, tiles) for first, tiles in self.images if first < length]
        for layer in self.cache.layers:
            layer.keep(length)
        return length

    def has_read(self, sample: Sample) -> None:
        """The cache holds the whole sample now."""
        self.ids = list(sample.ids)
        self.images = [(first, tiles) for first, _, tiles in images_of(sample, self.image_token_id)]

    def has_read_token(self, token: int) -> None:
        """The cache holds one more token of text."""
        self.ids.append(token)

    def _common(self, sample: Sample) -> int:
        most = min(len(self.ids), len(sample.ids) - 1)
        pairs = zip(self.ids, sample.ids[:most], strict=False)
        length = next((i for i, (old, new) in enumerate(pairs) if old != new), most)
        here = dict(self.images)
        there = list(images_of(sample, self.image_token_id))
        for first, last, tiles in there:
            if first < length and (last > length or not _same(here.get(first), tiles)):
                return first
        # An image that was read where the sample has text is another id there, or ends the sample.
        return length


class GrowingLayer(RoomyLayer):
    """Keys and values `[1 Hkv n d]` in a store that doubles when it is full, up to `longest`."""

    def __init__(self, room: int, longest: int | None) -> None:
        super().__init__(room)
        self.longest = longest

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values behind those that are there; all of them."""
        needed = self.get_seq_length() + key_states.shape[2]
        if not self.is_initialized:
            self.room = self._roomy(needed, self.room + needed)
        elif needed > self.room:
            self.room = self._roomy(needed, 2 * self.room)
            length = self.get_seq_length()
            stores = [
                x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (self.keys, self.values)
            ]
            for store, old in zip(stores, (self.keys, self.values), strict=True):
                store[:, :, :length] = old
            self.stores = tuple(stores)
        return super().update(key_states, value_states, *args, **kwargs)

    def _roomy(self, needed: int, wanted: int) -> int:
        return max(needed, wanted if self.longest is None else min(wanted, self.longest))


def behind(sample: Sample, length: int, image_token_id: int) -> Sample:
    """What follows the first `length` tokens of a sample, which end outside its images."""
    later = [
        number
        for number, (first, _, _) in enumerate(images_of(sample, image_token_id))
        if first >= length
    ]
    return Sample(
        sample.ids[length:],
        sample.labels[length:],
        tuple(sample.plans[number] for number in later),
        tuple(sample.tiles[number] for number in later),
        sample.name,
    )


def images_of(sample: Sample, image_token_id: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first place, place behind the last, tiles) of each image."""
    places = [place for place, token in enumerate(sample.ids) if token == image_token_id]
    seen = 0
    for plan, tiles in zip(sample.plans, sample.tiles, strict=True):
        first = places[seen]
        yield first, first + plan.num_tokens, tiles
        seen += plan.num_tokens


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and (one is other or torch.equal(one, other))
