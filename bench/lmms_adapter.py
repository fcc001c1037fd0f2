"""Our models in lmms-eval: `lmms-eval --model llava_hd --model_args pretrained=DIR --tasks pope`.

lmms-eval's contract, as its version 0.7.3 keeps it:

- a request's arguments are (text, generation settings or continuation, function from a document
  to its images, document number, task, split); documents are in `task_dict[task][split]`;
- answers come back in the order of the requests; cutting them at `until` is the model's work;
- "log-likelihoods" are mean losses: its multiple choice takes the smallest, its own adapters
  return the loss, and so does this one;
- it makes text of a bare pair (loss, greedy), on which its multiple choice then fails; a pair
  inside a GenerationResult arrives as it is.

Decoding is greedy. What a request asks for beyond that (drawing, beams) is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..hd.errors import DataError, UsageError
from ..hd.image import as_rgb, image_size, is_image
from ..hd.limits import beyond_training
from ..hd.plan import TooManyTokens, plan_image
from ..model.generate import answer_batch, context_length
from ..model.llava_hd import LlavaHD
from ..model.processor import Processor
from ..model.prompt import IMAGE_TAG, Turn
from ..model.scores import score_answers
from ..model.stream import chat_sample, cut_at, text_stream
from .lmms_options import parse_options, place
from .lmms_prompts import paper_text

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One request: its text, its images, and "task TASK, row N" for messages."""

    text: str
    images: tuple[Image, ...]
    where: str


@dataclass(frozen=True)
class Decoding:
    """What a request's generation settings come to."""

    max_new_tokens: int
    until: tuple[str, ...]


class LlavaHDAdapter(lmms):
    """The adapter; options in bench/lmms_options.py."""

    is_simple = True

    def __init__(self, max_batch_size: Any = None, **given: Any) -> None:
        # max_batch_size: of lmms-eval's automatic batch sizes, which nobody uses here.
        super().__init__()
        self.options = parse_options(given)
        self._device, dtype = place(self.options)
        self.model = LlavaHD.from_pretrained(
            self.options.pretrained, dtype, self._device, self.options.attention
        )
        self.processor = Processor.from_pretrained(self.options.pretrained, self.options.limits())
        warning = beyond_training(self.model.config.hd, self.processor.config.hd)
        if warning is not None:
            tqdm.write(f"llava_hd: warning: {warning}", file=sys.stderr)
        self.told: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers the ranks' counts."""
        return self._device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy answer to each request, in their order, cut at the first of its `until`."""
        wanted = [
            decoding(request.args[1], self.options.max_new_tokens, _where(request))
            for request in requests
        ]
        answers: list[str | None] = [None] * len(requests)
        with self._progress(len(requests)) as bar:
            for chosen in dict.fromkeys(wanted):
                alike = [number for number, one in enumerate(wanted) if one == chosen]
                for batch in in_batches(alike, self.options.batch_size):
                    rows = self._rows([requests[number] for number in batch])
                    texts = self._answers(rows, chosen)
                    for number, text in zip(batch, texts, strict=True):
                        answers[number] = text
                    bar.update(len(batch))
        return [answer for answer in answers if answer is not None]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The mean loss of each continuation and its end token, and whether it is the greedy one:
        GenerationResults whose text is the pair (see above)."""
        scores: list[GenerationResult] = []
        with self._progress(len(requests)) as bar:
            for batch in in_batches(requests, self.options.batch_size):
                rows = self._rows(batch)
                answers = [self._continuation(request).strip() for request in batch]
                scores += [
                    GenerationResult((score.mean_loss, score.greedy))
                    for score in score_answers(
                        self.model,
                        self.processor,
                        [row.images for row in rows],
                        [row.text for row in rows],
                        answers,
                    )
                ]
                bar.update(len(batch))
        return scores

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: raises UsageError."""
        raise UsageError(
            f"{_where(requests[0]) if requests else 'this task'}: tasks of several rounds are "
            "not supported by llava_hd; leave the task out"
        )

    def _answers(self, rows: Sequence[Row], chosen: Decoding) -> list[str]:
        """Rows with one image or none as a batch, those with several one by one."""
        few = [row for row in rows if len(row.images) < 2]
        together = iter(
            answer_batch(
                self.model,
                self.processor,
                [row.images[0] if row.images else None for row in few],
                [row.text for row in few],
                chosen.max_new_tokens,
            )
        )
        texts = [
            next(together) if len(row.images) < 2 else self._answer_alone(row, chosen)
            for row in rows
        ]
        stopped = [cut_at(text, chosen.until) for text in texts]
        return [
            text if cut is None else cut.rstrip() for text, cut in zip(texts, stopped, strict=True)
        ]

    def _answer_alone(self, row: Row, chosen: Decoding) -> str:
        tags = "" if IMAGE_TAG in row.text else f"{IMAGE_TAG}\n" * len(row.images)
        sample = chat_sample(self.processor, [Turn("human", tags + row.text)], row.images)
        tokenizer = self.processor.tokenizer
        pieces = text_stream(self.model, tokenizer, sample, chosen.max_new_tokens, chosen.until)
        return "".join(piece.text for piece in pieces)

    def _rows(self, requests: Sequence[Instance]) -> list[Row]:
        """The rows of a batch; equal images become one object, which is cut and read once."""
        seen: dict[tuple[tuple[int, int], bytes], Image] = {}
        rows = []
        for request in requests:
            where = _where(request)
            text, images = self._text(request), []
            for image in self._images(request):
                rgb = as_rgb(image)
                images.append(seen.setdefault((image_size(rgb), rgb.tobytes()), rgb))
            row = Row(text, tuple(images), where)
            self._check(row)
            rows.append(row)
        return rows

    def _text(self, request: Instance) -> str:
        text = request.args[0]
        if not isinstance(text, str):
            raise DataError(f"{_where(request)}: its question is a {type(text).__name__}, not text")
        return paper_text(request.args[4], text) if self.options.prompts == "paper" else text

    def _images(self, request: Instance) -> list[Image]:
        """A row's images; of several the middle one, if the options say so, told once a task."""
        doc_to_visual, task = request.args[2], request.args[4]
        found = flat(doc_to_visual(self._document(request)) if doc_to_visual else [])
        for visual in found:
            if not is_image(visual):
                raise DataError(
                    f"{_where(request)}: a visual is a {type(visual).__name__}, not an image; "
                    "llava_hd reads images only, leave the task out"
                )
        if len(found) < 2 or self.options.many_images == "all":
            return found
        if task not in self.told:
            self.told.add(task)
            tqdm.write(
                f"llava_hd: task {task} has rows with several images; the middle one is taken, "
                "as in LLaVA's evaluation (many_images=all takes all)"
            )
        return [found[len(found) // 2]]

    def _continuation(self, request: Instance) -> str:
        wanted = request.args[1]
        return wanted if isinstance(wanted, str) else str(wanted(self._document(request)))

    def _document(self, request: Instance) -> Any:
        _, _, _, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _check(self, row: Row) -> None:
        """Raise DataError for tags that are not the images, and for a prompt beyond the language
        model's context, which would be answered with nonsense."""
        tags = row.text.count(IMAGE_TAG)
        if tags not in (0, len(row.images)):
            raise DataError(
                f"{row.where}: {tags} {IMAGE_TAG} tags in its text but {len(row.images)} images; "
                "leave the task out, or try many_images=all"
            )
        limit = context_length(self.model)
        hd = self.processor.config.hd
        try:
            tokens = sum(plan_image(image_size(image), hd).num_tokens for image in row.images)
        except TooManyTokens as error:
            raise DataError(f"{row.where}: {error}") from error
        tokens += len(self.processor.tokenizer(row.text).input_ids)
        if limit is not None and tokens >= limit:
            raise DataError(
                f"{row.where}: {tokens} tokens of {len(row.images)} images and text, but the "
                f"language model reads {limit}; use many_images=middle or leave the task out"
            )

    def _progress(self, total: int) -> tqdm:
        return tqdm(total=total, desc="llava_hd", disable=self.rank != 0)


def _where(request: Instance) -> str:
    if len(request.args) != 6:
        raise UsageError(
            f"a request with {len(request.args)} arguments (scores without a question, as of "
            "acc_mutual_info) is not supported by llava_hd; choose another metric"
        )
    return f"task {request.args[4]}, row {request.args[3]}"


def decoding(settings: Mapping[str, Any] | None, max_new_tokens: int, where: str) -> Decoding:
    """The generation settings of a request. Raises UsageError for what is not greedy decoding.

    A temperature counts only where nothing says do_sample: false. `image_aspect_ratio`, top_p and
    the like are for other models.
    """
    given = dict(settings or {})
    drawn = given.get("do_sample", bool(given.get("temperature")))
    if drawn or (given.get("num_beams") or 1) != 1:
        raise UsageError(
            f"{where}: asks for drawn or beam-searched answers ({given}); llava_hd decodes "
            "greedily: --gen_kwargs temperature=0,do_sample=False,num_beams=1"
        )
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    limit = given.get("max_new_tokens") or given.get("max_gen_toks") or max_new_tokens
    return Decoding(int(limit), tuple(stop for stop in until if stop))


def flat(visuals: Any) -> list[Any]:
    """A task's visuals, which may be None, one, a list, or lists of lists, as one list."""
    if visuals is None:
        return []
    if isinstance(visuals, (list, tuple)):
        return [one for part in visuals for one in flat(part)]
    return [visuals]


def in_batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """The items, `size` at a time."""
    for first in range(0, len(items), size):
        yield list(items[first : first + size])
