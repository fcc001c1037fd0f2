"""The training of the nano language model on scenes written as text.

A training text is a conversation in a template's form (vicuna_v1, or plain with a caption) whose
image is replaced by a map of words: a small map alone, or a small map followed by a larger one, as
an HD model will see its global view and its tiles. In the first phase the embeddings of the map's
words are blurred; in the second, shorter one they are made like the rows of a projector that
knows nothing yet: a common offset, and noise where there is no object. Without it a fresh model
spends its first hundred steps on learning that such rows mean nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.nano import new_language, new_tokenizer
from ..model.prompt import IGNORE, get_template
from .nano_loop import Progress, Recipe, train
from .scene_text import GROUND_WORDS, caption, conversation, map_pieces, map_words, tokenizer_corpus

BLUR_FROM = 0.5  # the opening from which on maps are blurred


@dataclass(frozen=True)
class LanguageRecipe(Recipe):
    """Everything that decides the language model's weights."""

    steps: int = 900
    batch: int = 32
    muon_lr: float = 5e-3
    adamw_lr: float = 2e-3
    weight_decay: float = 0.02
    decay_share: float = 0.4
    opening_share: float = 0.4  # of the steps, until maps have grown to HD size
    pairs: int = 12  # at most so many questions in a conversation
    plain_share: float = 0.4  # of the texts are a map with a caption
    projected: bool = False  # the map's rows look like a projector's, not like blurred words


def second_phase(recipe: LanguageRecipe) -> LanguageRecipe:
    """The shorter phase that follows: full-size maps from its second step, half the rates."""
    return replace(
        recipe,
        steps=max(1, round(recipe.steps / 6)),
        muon_lr=recipe.muon_lr / 2,
        adamw_lr=recipe.adamw_lr / 2,
        warmup_steps=10,
        opening_share=1e-6,
        projected=True,
    )


@dataclass(frozen=True)
class Text:
    """One training text: ids, labels of equal length, and the half-open range of its map."""

    ids: list[int]
    labels: list[int]
    map_range: tuple[int, int]


class Encoder:
    """Text to ids, remembering the pieces it has seen (the sentences are few)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, *pieces: str) -> list[int]:
        """Ids of the pieces one after the other, each tokenised alone."""
        ids: list[int] = []
        for piece in pieces:
            if piece not in self.known:
                self.known[piece] = self.tokenizer(piece, add_special_tokens=False).input_ids
            ids += self.known[piece]
        return ids


def draw_map(rng: random.Random, opening: float) -> tuple[list[str], list[str]]:
    """A map as pieces of text and its object words; `opening` 0..1 lets maps grow to HD size."""
    longest = 4 + round(6 * min(1.0, opening))
    height, width = rng.randint(3, longest), rng.randint(3, longest)
    rows, words = map_words(rng, height, width, rng.randint(1, 5))
    pieces = map_pieces(rows, row_end=rng.random() < 0.6)
    if rng.random() < 0.5:  # a small view of the same objects stands before the map
        size = rng.choice((9, 16))
        small = [rng.choice(GROUND_WORDS) for _ in range(size)]
        seen = [word for word in words if rng.random() < 0.6]
        for place, word in zip(rng.sample(range(size), len(seen)), seen, strict=True):
            small[place] = word
        pieces = map_pieces([small], row_end=False) + pieces
    return pieces, words


def draw_text(rng: random.Random, encode: Encoder, recipe: LanguageRecipe, opening: float) -> Text:
    """One conversation or caption over a text map."""
    begin, end = encode.tokenizer.bos_token_id, encode.tokenizer.eos_token_id
    scene, words = draw_map(rng, opening)
    plain = rng.random() < recipe.plain_share
    template = get_template("plain" if plain else "vicuna_v1")
    ids = [begin, *encode(template.system + template.user)]
    start = len(ids)
    ids += encode(*scene)
    stop = len(ids)
    labels = [IGNORE] * stop
    if plain:
        answer = encode.tokenizer(
            caption(rng, words) + template.answer_end, add_special_tokens=False
        ).input_ids
        return Text(ids + answer, labels + answer, (start, stop))
    before = "\n"
    for question, reply in conversation(rng, words, recipe.pairs):
        asked = encode(before + question + template.user_end + template.assistant)
        answer = [*encode(" " + reply), end]
        ids += asked + answer
        labels += [IGNORE] * len(asked) + answer
        before = template.user
    return Text(ids, labels, (start, stop))


def collate(texts: Sequence[Text], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids and labels `[n longest]` and the mask of map places."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), longest), pad)
    labels = torch.full((len(texts), longest), IGNORE)
    places = torch.zeros(len(texts), longest, dtype=torch.bool)
    for i, text in enumerate(texts):
        ids[i, : len(text.ids)] = torch.tensor(text.ids)
        labels[i, : len(text.labels)] = torch.tensor(text.labels)
        places[i, slice(*text.map_range)] = True
    return ids, labels, places


def blur_words(x: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
    """In half of the texts: mix the map's rows of `x` `[n t H]` with the row before (up to 40 %)
    and add noise (up to 0.6 of the embeddings' standard deviation)."""
    n, t, _ = x.shape
    chosen = places & (torch.rand(n, 1, generator=generator) < 0.5)
    other = x.roll(1, dims=1)
    mix = 0.4 * torch.rand(n, t, 1, generator=generator)
    noise = torch.randn(x.shape, generator=generator) * x.detach().std()
    level = 0.6 * torch.rand(n, 1, 1, generator=generator)
    return torch.where(chosen[..., None], (1 - mix) * x + mix * other + level * noise, x)


def like_projected(
    x: Tensor, places: Tensor, grounds: Tensor, generator: torch.Generator
) -> Tensor:
    """Make the map's rows of `x` `[n t H]` like those of a fresh projector instead of words.

    In half of the texts all rows get one common offset (up to 3 times the words' own size), and
    three of four texts among them lose the words of the ground (`grounds` `[n t]`), so that
    anything unknown means "nothing here"; all rows are scaled (0.5 to 1.5) and get noise (up to
    0.6 of the words' size for objects, up to 1.5 for grounds).
    """
    n, t, width = x.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    size = x.detach()[places & ~grounds].std()
    chosen = places & (uniform(n, 1) < 0.5)
    offset = torch.randn(n, 1, width, generator=generator) * 3 * uniform(n, 1, 1)
    level = uniform(n, 1, 1) * torch.where(grounds, 1.5, 0.6)[..., None]
    noise = torch.randn(n, t, width, generator=generator) * level
    word = x * (0.5 + uniform(n, t, 1)) * ~(grounds & (uniform(n, 1) < 0.75))[..., None]
    return torch.where(chosen[..., None], word + size * (offset + noise), x)


def text_loss(language: Any, labels: Tensor, x: Tensor) -> Tensor:
    """Mean cross entropy of the labels `[n t]` behind the embeddings `[n t H]`."""
    hidden = language.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, :-1]
    target = labels[:, 1:]
    rows = target != IGNORE
    return F.cross_entropy(language.lm_head(hidden[rows]), target[rows])


def train_language(
    recipe: LanguageRecipe, checkpoints: Path, progress: Progress
) -> tuple[Any, Any, float]:
    """The language model trained in both phases, its tokenizer, and the seconds it took."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(f"corpus/{recipe.seed}")
    tokenizer = new_tokenizer(tokenizer_corpus(rng, get_template("vicuna_v1").system))
    language = new_language(tokenizer)
    seconds = 0.0
    for name, phase in (("lm", recipe), ("lm_projected", second_phase(recipe))):
        seconds += train(
            name,
            language,
            phase,
            lambda name: ".layers." in name,
            _phase_loss(language, tokenizer, phase),
            checkpoints / f"{name}.pt",
            progress,
        )
    return language.eval(), tokenizer, seconds


def _phase_loss(language: Any, tokenizer: Any, recipe: LanguageRecipe) -> Callable[[int], Tensor]:
    """The loss of one phase as a function of the step."""
    encode = Encoder(tokenizer)
    ground_ids = torch.tensor([encode(f" {word}")[0] for word in GROUND_WORDS])

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"lm/{recipe.seed}/{step}")
        opening = step / (recipe.opening_share * recipe.steps)
        texts = [draw_text(rng, encode, recipe, opening) for _ in range(recipe.batch)]
        ids, labels, places = collate(texts, tokenizer.pad_token_id)
        generator = torch.Generator().manual_seed(step + recipe.seed * 1_000_003)
        x = language.get_input_embeddings()(ids)
        if opening > BLUR_FROM:
            if recipe.projected:
                x = like_projected(x, places, torch.isin(ids, ground_ids) & places, generator)
            else:
                x = blur_words(x, places, generator)
        return text_loss(language, labels, x)

    return loss_of
