"""Answers that begin with given words: the model carries them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .generate import answer_rooms, generate
from .llava_hd import LlavaHD
from .packing import Sample
from .processor import Processor
from .prompt import IMAGE_TAG, Turn

if TYPE_CHECKING:
    from PIL.Image import Image


def continue_batch(
    model: LlavaHD,
    processor: Processor,
    images: Sequence[Image | str | Path | None],
    questions: Sequence[str],
    beginnings: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """What the model writes greedily behind the beginning of each answer, in order.

    A beginning is tokenised as an answer of a training sample is. Images are RGB or paths. Raises
    ImageError for a file that cannot be read, SampleError for an empty beginning, BatchItemError
    for one that leaves no room in the language model's context.
    """
    samples = [
        begun(processor, image, question, beginning)
        for image, question, beginning in zip(images, questions, beginnings, strict=True)
    ]
    if not samples:
        return []
    rooms = answer_rooms(model, samples)
    tokens = generate(model, samples, max_new_tokens, processor.tokenizer)
    kept = [row[:room] for row, room in zip(tokens, rooms, strict=True)]
    texts = processor.tokenizer.batch_decode(kept, skip_special_tokens=True)
    return [text.strip() for text in texts]


def begun(
    processor: Processor, image: Image | str | Path | None, question: str, beginning: str
) -> Sample:
    """A question and the beginning of its answer: a conversation without its end token."""
    images = []
    if image is not None:
        images.append(processor.load(image) if isinstance(image, (str, Path)) else image)
    tags = f"{IMAGE_TAG}\n" * len(images)
    turns = [Turn("human", tags + question), Turn("gpt", beginning)]
    sample = processor.conversation(turns, images)
    if sample.ids[-1] != processor.tokenizer.eos_token_id:
        raise ValueError("the model's template has no end token behind an answer")
    return replace(sample, ids=sample.ids[:-1], labels=sample.labels[:-1])
