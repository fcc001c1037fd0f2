"""The race of `llava-hd bench pope`: its settings, its questions, who takes part, their turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hd.errors import UsageError
from ..hd.image import from_array
from ..model.generate import end_tokens, generate
from ..model.llava_hd import LlavaHD
from ..model.packing import Sample
from ..model.prefix import generate_shared
from ..model.processor import Processor
from ..model.rival import RivalBatch, rival_answers, rival_batch
from .measure import rotated
from .pope import PROMPT

SHARED, ALONE = "shared", "one-by-one"
THINGS = """
    person dog snowboard car chair bottle handbag backpack bench umbrella bird cat horse sheep
    cow elephant bear zebra giraffe frisbee kite skateboard surfboard cup fork knife spoon bowl
    banana apple sandwich orange broccoli carrot pizza donut cake couch bed toilet laptop mouse
"""
THINGS_ASKED = tuple(THINGS.split())
Answers = list[list[int]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """One run. questions: of an image, one setting each; images: of a round; batch: transformers'
    larger one; new_tokens: longest answer (a word and the end, by default); check_: the untimed
    round's questions and their longest answer; threads: of the processor; model: a llava_next
    folder, None for random weights of `size`."""

    questions: tuple[int, ...] = (6, 18)
    images: int = 1
    rounds: int = 3
    batch: int = 8
    new_tokens: int = 2
    check_questions: int = 6
    check_tokens: int = 12
    threads: int = 1
    size: str = "small"
    model: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    out: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("images", "rounds", "new_tokens", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more")
        if self.batch < 2:
            raise UsageError(f"--batch {self.batch}: give 2 or more, a batch of 1 is always timed")
        if not all(2 <= number <= len(THINGS_ASKED) for number in self.questions):
            raise UsageError(f"--questions takes numbers from 2 to {len(THINGS_ASKED)}")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: give a number from 0")

    @property
    def rivals(self) -> tuple[str, ...]:
        """Who is compared with the shared prefix."""
        return (ALONE, "llava_next-1", f"llava_next-{self.batch}")


@dataclass(frozen=True)
class Models:
    """Both models, of the same weights, and what prompts need."""

    ours: LlavaHD
    theirs: Any
    processor: Processor
    device: torch.device
    dtype: torch.dtype

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        return end_tokens(self.ours, self.processor.tokenizer)


@dataclass
class Tally:
    """What a contestant's rounds took and gave."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    answers: Answers = field(default_factory=list)


def ask(models: Models, request: Request, questions: int, number: int) -> list[list[Sample]]:
    """The prompts of round `number`: so many different questions about each of its images."""
    made = np.random.default_rng((request.seed, questions, number))
    px = 2 * models.ours.config.hd.tile_px
    groups = []
    for _ in range(request.images):
        cut = models.processor.cut(from_array(made.integers(0, 256, (px, px, 3), dtype=np.uint8)))
        things = made.choice(THINGS_ASKED, questions, replace=False)
        words = [f"Is there {_article(thing)} in the image?{PROMPT}" for thing in things]
        groups.append([models.processor.question(text, [cut]) for text in words])
    return groups


def _article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


Contestant = Callable[[int], Answers]  # the longest answer -> all answers, in order


def contestants(
    models: Models, request: Request, groups: Sequence[Sequence[Sample]]
) -> dict[str, Contestant]:
    """Everyone, ready to answer these questions."""
    ours, tokenizer, ends = models.ours, models.processor.tokenizer, models.ends
    samples = [sample for group in groups for sample in group]

    def shared(steps: int) -> Answers:
        answers: Answers = []
        for group in groups:
            found = generate_shared(ours, group, steps, ends)
            if found is None:
                raise UsageError("this model's questions cannot share a prefix; see the warning")
            answers += found
        return answers

    def alone(steps: int) -> Answers:
        return [generate(ours, [sample], steps, tokenizer)[0] for sample in samples]

    def rival(size: int) -> Contestant:
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        pad = tokenizer.pad_token_id
        made = [rival_batch(part, pad, models.dtype, models.device) for part in parts]
        return lambda steps: _rivals(models, made, steps)

    found = {SHARED: shared, ALONE: alone}
    return found | {f"llava_next-{size}": rival(size) for size in (1, request.batch)}


def _rivals(models: Models, batches: Sequence[RivalBatch], steps: int) -> Answers:
    rows = [rival_answers(models.theirs, batch, steps, models.ends) for batch in batches]
    return [row for part in rows for row in part]


def race(
    models: Models, request: Request, questions: int, say: Say, check: list[dict[str, Any]]
) -> dict[str, Tally]:
    """All rounds of all contestants in turns; before them, untimed, longer answers to a few."""
    checked = list(check_answers(models, request, questions))
    check += checked
    wrong = sum(one["differing"] for one in checked)
    say(f"{questions} questions an image; {wrong} of the checked longer answers differ")
    found = {name: Tally() for name in (SHARED, *request.rivals)}
    for number in range(request.rounds):
        callers = contestants(models, request, ask(models, request, questions, number))
        for name in rotated(list(found), number):
            _time(found[name], callers[name], request.new_tokens, models.device)
        took = ", ".join(f"{name} {one.seconds[-1]:.2f} s" for name, one in found.items())
        say(f"[{number + 1}/{request.rounds}] {took}")
    return found


def _time(tally: Tally, call: Contestant, steps: int, device: torch.device) -> None:
    """One round of one contestant; the ids are on the host when it is over."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    tally.answers += call(steps)
    tally.seconds.append(time.perf_counter() - begin)
    tally.cpu_seconds.append(time.process_time() - cpu_begin)
    if on_cuda:
        tally.peak_bytes = max(tally.peak_bytes, torch.cuda.max_memory_allocated(device))


def check_answers(models: Models, request: Request, questions: int) -> Iterator[dict[str, Any]]:
    """How many longer answers of everyone differ from transformers' one by one; warms up."""
    group = ask(models, request, questions, request.rounds)[0][: request.check_questions]
    answers = {
        name: call(request.check_tokens)
        for name, call in contestants(models, request, [group]).items()
    }
    expected = answers["llava_next-1"]
    for name, found in answers.items():
        yield {
            "questions_per_image": questions,
            "contestant": name,
            "answers": len(found),
            "tokens": request.check_tokens,
            "differing": differing(found, expected),
            "different_among_themselves": len({tuple(row) for row in found}),
        }


def differing(found: Answers, expected: Answers) -> int:
    """How many answers are not the expected ones."""
    return sum(a != b for a, b in zip(found, expected, strict=True))
