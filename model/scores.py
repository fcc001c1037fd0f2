"""How likely given answers are: log-probabilities, a mixed batch in one pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..hd.image import as_rgb
from .llava_hd import LlavaHD
from .packing import Sample, pack
from .processor import Cut, Processor
from .prompt import IGNORE, IMAGE_TAG, Turn, encode_conversation

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class AnswerScore:
    """log_probability: summed over the answer's tokens and its end token, num_tokens of them;
    greedy: whether each of them is the likeliest one, so that the model would answer just that."""

    log_probability: float
    num_tokens: int
    greedy: bool

    @property
    def mean_loss(self) -> float:
        """The cross entropy of a token."""
        return -self.log_probability / self.num_tokens


@torch.inference_mode()
def score_answers(
    model: LlavaHD,
    processor: Processor,
    images: Sequence[Sequence[Image]],
    questions: Sequence[str],
    answers: Sequence[str],
) -> list[AnswerScore]:
    """The score of each answer to its question about its images (none, one or several), in order.

    An image object that several rows share is cut once. The template writes the space before an
    answer, so an answer comes without. Raises SampleError for an empty one.
    """
    if not len(images) == len(questions) == len(answers):
        raise ValueError(
            f"{len(images)} images, {len(questions)} questions, {len(answers)} answers"
        )
    if not questions:
        return []
    cuts: dict[int, Cut] = {}
    for image in (image for row in images for image in row):
        if id(image) not in cuts:
            cuts[id(image)] = processor.cut(as_rgb(image))
    samples = [
        _sample(processor, [cuts[id(image)] for image in row], question, answer)
        for row, question, answer in zip(images, questions, answers, strict=True)
    ]
    batch = pack(samples, model.config).to(model.device)
    hidden = model.hidden(batch, rows=batch.label_rows)  # [L H]
    logits = model.language.head(hidden).float()  # [L V]
    wanted = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]  # [L]
    right = logits.argmax(-1) == batch.targets
    counts = [sum(label != IGNORE for label in sample.labels) for sample in samples]
    return [
        AnswerScore(float(own.double().sum()), len(own), bool(hits.all()))
        for own, hits in zip(wanted.split(counts), right.split(counts), strict=True)
    ]


def _sample(processor: Processor, cuts: Sequence[Cut], question: str, answer: str) -> Sample:
    tags = "" if IMAGE_TAG in question else f"{IMAGE_TAG}\n" * len(cuts)
    encoded = encode_conversation(
        processor.tokenizer,
        [Turn("human", tags + question), Turn("gpt", answer)],
        [cut.plan.num_tokens for cut in cuts],
        processor.config.template,
        processor.config.image_token_id,
    )
    plans, tiles = tuple(cut.plan for cut in cuts), tuple(cut.tiles for cut in cuts)
    return Sample(encoded.ids, encoded.labels, plans, tiles)
