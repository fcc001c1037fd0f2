"""Answers as they are made: conversations of several turns, greedy or drawn, text piece by piece.

For servers and chat. A greedy answer has the tokens of `generate.answer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..hd.image import as_rgb
from .generate import end_tokens
from .llava_hd import LlavaHD
from .packing import Sample, pack
from .processor import Cut, Processor
from .prompt import IGNORE, Turn, encode_question

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Cache

COLD = 1e-6  # below this temperature the likeliest token is certain, and logits would overflow
UNFINISHED = "\ufffd"  # what half of a character's bytes decodes to


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0 (below COLD), else drawn among
    the likeliest that together have probability top_p. The same seed draws the same on the same
    machine."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


@dataclass(frozen=True)
class Piece:
    """New text of an answer; num_tokens: made until now; finish: only of the last piece, "stop"
    (end token or stop text), "length", or "cancelled" (chat sessions alone)."""

    text: str
    num_tokens: int
    finish: Literal["stop", "length", "cancelled"] | None = None


def chat_sample(
    processor: Processor,
    turns: Sequence[Turn],
    images: Sequence[Image | Cut],
    system: str | None = None,
    name: str = "",
) -> Sample:
    """A conversation that waits for its next answer; `<image>` tags in its human turns stand for
    the images (of any mode, or cut already), in order. system: instead of the template's. Raises
    SampleError."""
    cuts = [image if isinstance(image, Cut) else processor.cut(as_rgb(image)) for image in images]
    config = processor.config
    counts = [cut.plan.num_tokens for cut in cuts]
    ids = encode_question(
        processor.tokenizer, turns, counts, config.template, config.image_token_id, system
    )
    plans, tiles = tuple(cut.plan for cut in cuts), tuple(cut.tiles for cut in cuts)
    return Sample(ids, [IGNORE] * len(ids), plans, tiles, name)


def token_stream(
    model: LlavaHD,
    sample: Sample,
    max_new_tokens: int,
    ends: Sequence[int],
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """The answer's tokens one by one, up to and without the end token."""
    with torch.inference_mode():
        x = model.embeddings(pack([sample], model.config).to(model.device))
    for token in continued(model, x, max_new_tokens, sampling):
        if token in ends:
            return
        yield token


def text_stream(
    model: LlavaHD,
    tokenizer: Any,
    sample: Sample,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling = GREEDY,
) -> Iterator[Piece]:
    """The answer's text in pieces, the last one with `finish`; without white space at its ends, and
    without the first of the `stops` and what follows it."""
    ends = end_tokens(model, tokenizer)
    tokens = token_stream(model, sample, max_new_tokens, ends, sampling)
    return text_pieces(tokens, tokenizer, max_new_tokens, stops)


def text_pieces(
    tokens: Iterable[int], tokenizer: Any, max_new_tokens: int, stops: Sequence[str] = ()
) -> Iterator[Piece]:
    """The text of an answer's tokens (at most max_new_tokens, no end token), as `text_stream`."""
    ids: list[int] = []
    sent = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        stopped = cut_at(text, stops)
        if stopped is not None:
            yield Piece(stopped.rstrip()[len(sent) :], len(ids), "stop")
            return
        safe = text[: len(text) - _held_back(text, stops)]
        if len(safe) > len(sent):
            yield Piece(safe[len(sent) :], len(ids))
            sent = safe
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    yield Piece(text[len(sent) :], len(ids), "length" if len(ids) == max_new_tokens else "stop")


def cut_at(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stops in it; None where there is none."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that may yet change or turn out to be the beginning of a stop."""
    held = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:length]):
                held = length
                break
    kept = text[: len(text) - held]
    return held + len(kept) - len(kept.rstrip().rstrip(UNFINISHED).rstrip())


@torch.inference_mode()
def continued(
    model: LlavaHD,
    x: Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    cache: Cache | None = None,
    num_cached: int = 0,
) -> Iterator[int]:
    """What the model writes behind a prompt, token by token and without an end: prefill of its
    embeddings `[t H]`, then one token at a time on the cache of keys and values.

    cache: holds the num_cached tokens that stand before x, and is given what is read here; before
    a token is yielded, all tokens but that one are in it.
    """
    generator = _generator(model, sampling)
    causal_lm = model.language.causal_lm
    x = x[None]  # [1 t H]
    mask = torch.ones(1, num_cached + x.shape[1], dtype=torch.int64, device=x.device)
    for _ in range(max_new_tokens):
        out = causal_lm(
            inputs_embeds=x,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        token = choose(out.logits[0, -1].float(), sampling, generator)
        yield token
        x = model.language.embed(torch.tensor([token], device=x.device))[None]  # [1 1 H]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """The next token from its logits `[V]`."""
    if sampling.temperature < COLD:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True)
    # A token stays while those before it have less than top_p, so the first one always does.
    ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])


def _generator(model: LlavaHD, sampling: Sampling) -> torch.Generator | None:
    if sampling.temperature < COLD or sampling.seed is None:
        return None
    return torch.Generator(model.device).manual_seed(sampling.seed)
