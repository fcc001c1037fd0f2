"""Which images are asked about, in which kinds: drawn by the seed, nested, the same on any machine.

The images of a kind are the first of one drawn order, so a larger number keeps those of a smaller
one, and answers that are there already serve it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..hd.errors import DataError
from ..model.prompt import IMAGE_TAG
from .generate_answers import Rounds, read_answer
from .generate_context import Context
from .generate_prompts import Prompt
from .generate_request import Request
from .generate_settings import Amount, GenerateSettings, Kind
from .mixture_fields import draw

SEEDS = 2**31  # some servers read the seed as a 32-bit number


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of answer about one image."""

    kind: Kind
    image: str

    @property
    def key(self) -> str:
        """Its name in the journal, and the id of its record."""
        return f"{self.kind}/{self.image}"


@dataclass(frozen=True)
class Work:
    """All that a run asks, and how. tasks: in the order in which they are asked."""

    settings: GenerateSettings
    prompts: Mapping[Kind, Prompt]
    contexts: Mapping[str, Context]
    tasks: tuple[Task, ...]

    def question(self, task: Task) -> str:
        return self.prompts[task.kind].question(self.settings.seed, task.image)

    def request(self, task: Task, attempt: int = 0) -> Request:
        """What is sent for the attempt, counted from 0: a new seed, a little hotter each time."""
        settings = self.settings
        seed = draw(settings.seed, "request", task.key, attempt) % SEEDS
        prompt = self.prompts[task.kind]
        return Request(
            messages=prompt.messages(self.contexts[task.image], self.question(task)),
            max_tokens=settings.max_tokens,
            temperature=settings.hotness(attempt),
            seed=seed if settings.send_seed else None,
        )

    def rounds(self, task: Task, text: str) -> Rounds:
        """The rounds of an answer; raises generate_answers.Invalid."""
        context, answers = self.contexts[task.image], self.prompts[task.kind].answers
        return read_answer(task.kind, text, self.question(task), context, answers)

    def record(self, task: Task, rounds: Rounds) -> dict[str, Any]:
        """LLaVA's form; the image tag stands in front of the first question."""
        turns: list[dict[str, str]] = []
        for question, answer in rounds:
            tag = "" if turns else f"{IMAGE_TAG}\n"
            turns.append({"from": "human", "value": tag + question})
            turns.append({"from": "gpt", "value": answer})
        image = str(PurePosixPath(self.settings.image_prefix) / task.image)
        return {"id": task.key, "image": image, "conversations": turns}

    @property
    def tries(self) -> int:
        return self.settings.tries

    def take(self, task: Task, text: str) -> dict[str, Any]:
        """The record of an answer; raises generate_request.Invalid."""
        return self.record(task, self.rounds(task, text))

    def in_order(self) -> list[Task]:
        """The tasks in the order of the written file: shuffled, whatever the order of asking."""
        seed = self.settings.seed
        return sorted(self.tasks, key=lambda task: (draw(seed, "order", task.key), task.key))


def plan(
    contexts: Mapping[str, Context], amounts: Mapping[Kind, Amount], seed: int
) -> tuple[Task, ...]:
    """The tasks, kinds evenly mixed, so that a run that stops early has some of each.

    Raises UsageError for more images than there are, DataError for no task at all.
    """
    ranked: list[tuple[float, Task]] = []
    for kind, amount in amounts.items():
        count = amount.of(len(contexts), kind)
        names = sorted(contexts, key=lambda name: (draw(seed, "image", kind, name), name))
        ranked += [((i + 0.5) / count, Task(kind, names[i])) for i in range(count)]
    if not ranked:
        raise DataError(f"--kinds asks for no answer about {len(contexts)} images; raise a share")
    return tuple(task for _, task in sorted(ranked, key=lambda pair: (pair[0], pair[1].key)))
