"""What a run will cost, what it has cost, and the limit that it never passes.

Before a run the tokens of its requests are counted by a rule (characters / 4, rounded up for each
message) or by a tokenizer, and an answer is taken to be as long as the examples' on average. While
it runs the server's own counts are added up.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import UsageError
from .data_check_tokens import CHARACTERS_PER_TOKEN, load_tokenizer
from .generate_plan import Task, Work
from .generate_request import Messages, Reply, Request, Usage
from .generate_settings import Kind

CountTokens = Callable[[str], int]
TEMPLATE_TOKENS = 4  # around a message, by the chat templates in use
WORST_TEMPLATE_TOKENS = 16


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens of prompts and of answers; None where unknown."""

    prompt: float | None = None
    answer: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        given = [("--price-in", self.prompt), ("--price-out", self.answer)]
        for name, value in (*given, ("--max-cost", self.most)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} {value:g} is no price; give a number from 0")
        missing = [name for name, value in given if value is None]
        if len(missing) == 1:
            raise UsageError(f"{missing[0]} is missing; give both prices or none")
        if self.most is not None and missing:
            raise UsageError("--max-cost needs the prices; give --price-in and --price-out")

    def cost(self, usage: Usage) -> float | None:
        """Money for so many tokens."""
        if self.prompt is None or self.answer is None:
            return None
        return (usage.prompt_tokens * self.prompt + usage.answer_tokens * self.answer) / 1e6


def by_rule(text: str) -> int:
    """Tokens of a text, estimated."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def by_tokenizer(folder: str) -> CountTokens:
    """Counts with the tokenizer of a model folder. UsageError for a folder without one."""
    tokenizer = load_tokenizer(folder)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count


def counted(tokenizer: Path | None) -> tuple[CountTokens, str]:
    """How tokens are counted, and that in words."""
    if tokenizer is None:
        return by_rule, f"characters / {CHARACTERS_PER_TOKEN}"
    return by_tokenizer(str(tokenizer)), f"the tokenizer of {tokenizer}"


@dataclass(frozen=True)
class KindEstimate:
    """requests: one for each image. answer_tokens: as long as the examples' answers on average;
    most_answer_tokens: every answer as long as max_tokens allows."""

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    most_answer_tokens: int = 0

    def __add__(self, other: KindEstimate) -> KindEstimate:
        return KindEstimate(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
            self.most_answer_tokens + other.most_answer_tokens,
        )


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked, each image once; an invalid answer costs another request, at most
    `tries` in all."""

    kinds: dict[Kind, KindEstimate]
    counted_by: str
    tries: int
    prices: Prices

    @property
    def all(self) -> KindEstimate:
        return sum(self.kinds.values(), KindEstimate())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. cost: of the expected tokens; most_cost: every answer as long as it may be and
        invalid until the last try; both None without prices."""
        whole = self.all
        likely = Usage(whole.prompt_tokens, whole.answer_tokens)
        most = Usage(whole.prompt_tokens * self.tries, whole.most_answer_tokens * self.tries)
        return {
            "kinds": {kind: asdict(one) for kind, one in self.kinds.items()},
            **asdict(whole),
            "tokens_counted_by": self.counted_by,
            "most_requests": whole.requests * self.tries,
            "cost": self.prices.cost(likely),
            "most_cost": self.prices.cost(most),
        }


def estimate(
    work: Work, tasks: list[Task], count: CountTokens, counted_by: str, prices: Prices
) -> Estimate:
    """The estimate for these tasks; what all requests of a kind share is counted once."""
    texts: dict[str, int] = {}

    def tokens(messages: Messages) -> int:
        total = 0
        for place, (_, text) in enumerate(messages):
            if place == len(messages) - 1:
                total += count(text)
            else:
                if text not in texts:
                    texts[text] = count(text)
                total += texts[text]
        return total + TEMPLATE_TOKENS * len(messages)

    found: dict[Kind, KindEstimate] = {}
    for kind, prompt in work.prompts.items():
        lengths = [count(answer) for answer in prompt.answers] or [work.settings.max_tokens]
        expected = min(round(sum(lengths) / len(lengths)), work.settings.max_tokens)
        mine = [task for task in tasks if task.kind == kind]
        if mine:
            found[kind] = KindEstimate(
                requests=len(mine),
                prompt_tokens=sum(tokens(work.request(task).messages) for task in mine),
                answer_tokens=expected * len(mine),
                most_answer_tokens=work.settings.max_tokens * len(mine),
            )
    return Estimate(found, counted_by, work.settings.tries, prices)


def usage_of(request: Request, reply: Reply) -> tuple[Usage, bool]:
    """The tokens of an answered request, and whether the server has told them."""
    if reply.usage is not None:
        return reply.usage, True
    prompt = sum(by_rule(text) + TEMPLATE_TOKENS for _, text in request.messages)
    return Usage(prompt, by_rule(reply.text)), False


def worst(request: Request) -> Usage:
    """More tokens than a request can have: each stands for one byte or more."""
    prompt = sum(len(text.encode()) + WORST_TEMPLATE_TOKENS for _, text in request.messages)
    return Usage(prompt, request.max_tokens)


class Ledger:
    """Tokens so far, and the room below `prices.most` for what is on its way.

    A request is sent only while all on their way and it, at their worst, fit below the limit. When
    it does not fit it waits for the others, which mostly turn out cheaper.
    """

    def __init__(self, prices: Prices, used: Usage) -> None:
        self.prices = prices
        self.used = used
        self._on_their_way: list[Usage] = []
        self._changed = asyncio.Condition()

    @property
    def cost(self) -> float | None:
        return self.prices.cost(self.used)

    async def reserve(self, most: Usage) -> bool:
        """Make room for a request; False where there is none, even with nothing on its way."""
        async with self._changed:
            while not self._fits(most):
                if not self._on_their_way:
                    return False
                await self._changed.wait()
            self._on_their_way.append(most)
            return True

    async def settle(self, most: Usage, used: Usage) -> None:
        """The request is over and used so much."""
        async with self._changed:
            self._on_their_way.remove(most)
            self.used += used
            self._changed.notify_all()

    def _fits(self, most: Usage) -> bool:
        if self.prices.most is None:
            return True
        cost = self.prices.cost(sum(self._on_their_way, self.used) + most)
        return cost is not None and cost <= self.prices.most
