"""Answers: prefill and greedy decoding, one question, a mixed batch, or all about an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..hd.errors import BatchItemError
from ..hd.image import as_rgb, load_image
from .llava_hd import LlavaHD
from .packing import Sample, pack
from .prefix import generate_shared
from .processor import Cut, Processor
from .prompt import SampleError

if TYPE_CHECKING:
    from PIL.Image import Image

Key = tuple[int, str]  # which image (the id of its Cut), which question


def answer(
    model: LlavaHD,
    processor: Processor,
    image: Image | str | Path | None,
    question: str,
    max_new_tokens: int = 128,
) -> str:
    """The greedy answer to a question about an image, or about none."""
    return answer_batch(model, processor, [image], [question], max_new_tokens)[0]


def answer_batch(
    model: LlavaHD,
    processor: Processor,
    images: Sequence[Image | str | Path | None],
    questions: Sequence[str],
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers, in the order of the questions; images and text-only rows may mix.

    An image that several questions share (the same object or path) is read, cut, encoded and
    prefilled once (model/prefix.py), and the same question about it is answered once (POPE asks its
    positive questions in all three splits). Questions that share no image go through one padded
    batch. Images in memory may have any mode. An answer ends where the language model's context
    does. Raises ImageError for a file that cannot be read, BatchItemError for a question that
    cannot be asked, or leaves no room for an answer.
    """
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions")
    if not questions:
        return []
    cuts = _cut_once(processor, images)
    asked = [(id(cut), question) for cut, question in zip(cuts, questions, strict=True)]
    samples: dict[Key, Sample] = {}
    for number, (key, cut) in enumerate(zip(asked, cuts, strict=True)):
        if key not in samples:
            samples[key] = _sample(processor, number, key[1], cut)
    rooms = answer_rooms(model, [samples[key] for key in asked])
    tokens = _generate_by_image(model, samples, max_new_tokens, processor.tokenizer)
    room = dict(zip(asked, rooms, strict=True))
    texts = processor.tokenizer.batch_decode(
        [tokens[key][: room[key]] for key in samples], skip_special_tokens=True
    )
    answers = dict(zip(samples, texts, strict=True))
    return [answers[key].strip() for key in asked]


def _sample(processor: Processor, number: int, question: str, cut: Cut | None) -> Sample:
    try:
        return processor.question(question, [] if cut is None else [cut])
    except SampleError as error:
        raise BatchItemError(number, str(error)) from error


def _generate_by_image(
    model: LlavaHD, samples: Mapping[Key, Sample], max_new_tokens: int, tokenizer: Any
) -> dict[Key, list[int]]:
    """The continuation of each prompt; several about one image share what they begin with."""
    by_image: dict[int, list[Key]] = {}
    for key, sample in samples.items():
        if sample.tiles:
            by_image.setdefault(key[0], []).append(key)
    tokens: dict[Key, list[int]] = {}
    for keys in by_image.values():
        if len(keys) > 1:
            same = [samples[key] for key in keys]
            found = generate_shared(model, same, max_new_tokens, end_tokens(model, tokenizer))
            tokens |= {} if found is None else dict(zip(keys, found, strict=True))
    others = [key for key in samples if key not in tokens]
    if others:
        rows = generate(model, [samples[key] for key in others], max_new_tokens, tokenizer)
        tokens |= dict(zip(others, rows, strict=True))
    return tokens


@torch.inference_mode()
def generate(
    model: LlavaHD, samples: Sequence[Sample], max_new_tokens: int, tokenizer: Any
) -> list[list[int]]:
    """Greedy continuation of each prompt, up to and without the end token.

    The prompts are embedded as one pack, then laid out with padding on the left, where
    transformers' `generate` continues them.
    """
    batch = pack(samples, model.config).to(model.device)
    packed = model.embeddings(batch)
    lengths = [len(sample.ids) for sample in samples]
    x, mask = pad_left(packed, lengths)
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
        bos_token_id=tokenizer.bos_token_id,
    )
    out = model.language.causal_lm.generate(
        inputs_embeds=x, attention_mask=mask, generation_config=config
    )
    return [list(takewhile(lambda token: token not in ends, row)) for row in out.tolist()]


def context_length(model: LlavaHD) -> int | None:
    """Tokens that the language model was made for, prompt and answer; None where it says none."""
    return model.config.text.get("max_position_embeddings")


def answer_rooms(model: LlavaHD, samples: Sequence[Sample]) -> list[int | None]:
    """How many tokens the answer to each prompt may have in the language model's context, None
    without a limit. Raises BatchItemError for a prompt that fills it."""
    limit = context_length(model)
    if limit is None:
        return [None] * len(samples)
    for number, sample in enumerate(samples):
        if len(sample.ids) >= limit:
            raise BatchItemError(
                number,
                f"{len(sample.ids)} tokens of text and image, but the language model reads "
                f"{limit}; shorten the question or leave it out",
            )
    return [limit - len(sample.ids) for sample in samples]


def end_tokens(model: LlavaHD, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's, and those of the language model's config."""
    own = model.config.text.get("eos_token_id")
    others = own if isinstance(own, list) else [own]
    ends = [tokenizer.eos_token_id, *others]
    return list(dict.fromkeys(end for end in ends if end is not None))


def pad_left(packed: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """packed `[T H]` -> `[S longest H]`, zeros on the left, and its mask int64 `[S longest]`."""
    longest = max(lengths)
    x = packed.new_zeros(len(lengths), longest, packed.shape[1])
    mask = torch.zeros(len(lengths), longest, dtype=torch.int64, device=packed.device)
    for number, part in enumerate(packed.split(list(lengths))):
        x[number, longest - len(part) :] = part
        mask[number, longest - len(part) :] = 1
    return x, mask


def _cut_once(
    processor: Processor, images: Sequence[Image | str | Path | None]
) -> list[Cut | None]:
    seen: dict[str | int, Cut] = {}
    cuts: list[Cut | None] = []
    for image in images:
        if image is None:
            cuts.append(None)
            continue
        key = str(image) if isinstance(image, (str, Path)) else id(image)
        if key not in seen:
            loaded = load_image(image) if isinstance(image, (str, Path)) else as_rgb(image)
            seen[key] = processor.cut(loaded)
        cuts.append(seen[key])
    return cuts
