"""LLaVA-Bench with a judge: a language model rates two answers, the reference's and the model's.

As in LLaVA (llava/eval/eval_gpt_review_bench.py there): the judge reads a description of the image,
the question and both answers, and writes two scores from 1 to 10 on its first line. The relative
score is the model's mean score as a percentage of the reference's.

What differs from there. Answers are joined by question id, not by line. A first line without two
scores is asked for again and in the end left out and counted, instead of entering the means as -1.
The instructions to the judge are our own unless LLaVA's rule.json is given: judges are sensitive to
them, and to the order of the answers, so figures are comparable only under the same instructions,
order and judge, all of which the result names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..hd.errors import DataError
from ..train.generate_request import Invalid, Request
from ..train.mixture_fields import Fields, draw, read_json
from .bootstrap import MIN_IMAGES, estimate, resampled
from .files import read_json_lines
from .free_run import Item

CATEGORIES = ("conv", "detail", "complex")
RULE_PREFIX = "llava_bench_"
ALL = "all"
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
ROLE = "Assistant"
OWN_RULE = (
    "Two assistants have answered the question above, which a user asked about an image. The "
    "context describes that image in a few sentences; take it as the truth.\n"
    "Judge how helpful, relevant, accurate and detailed each answer is, and give each a score from "
    "1 to 10; a better answer has a higher score.\n"
    "Write the two scores on the first line, that of Assistant 1 and then that of Assistant 2, "
    "with a space between them and nothing else.\n"
    "Give your reasons below. Neither the order of the answers nor their length alone may count."
)
LOWEST, HIGHEST = 1.0, 10.0
SCORES = re.compile(r"\(?\s*(\d+(?:\.\d+)?)(?:/10)?[\s,;]+(\d+(?:\.\d+)?)(?:/10)?\s*\)?\.?")
SEEDS = 2**31
SWAPPED = "/swapped"


@dataclass(frozen=True)
class BenchQuestion:
    """A question of LLaVA-Bench."""

    key: str
    image: str
    text: str
    category: str
    where: str


def read_bench(path: Path) -> list[BenchQuestion]:
    """questions.jsonl: question_id, image, text, category. DataError by line and field."""
    found: dict[str, BenchQuestion] = {}
    for number, record in read_json_lines(path):
        fields = Fields(record, path, f"line {number}")
        key, category = fields.name("question_id"), fields.text("category")
        if category not in CATEGORIES:
            known = ", ".join(CATEGORIES)
            raise fields.fault("category", f"is {category!r}", f"there is {known}")
        if key in found:
            raise fields.fault("question_id", f"{key} stands twice", "remove one")
        question = BenchQuestion(
            key, fields.text("image"), fields.text("text"), category, f"{path}:{number}"
        )
        if not question.text or not question.image:
            raise fields.fault("text or image", "is empty", "write it")
        found[key] = question
    if not found:
        raise DataError(f"{path}: no question in it; give LLaVA-Bench's questions.jsonl")
    return list(found.values())


def bench_items(questions: Sequence[BenchQuestion]) -> list[Item]:
    """The questions as they are asked: bare, without a response prompt."""
    return [Item(q.key, q.image, q.text, q.where) for q in questions]


def read_contexts(path: Path, questions: Sequence[BenchQuestion]) -> dict[str, str]:
    """context.jsonl: image -> its description. DataError for an image without one."""
    found = {}
    for number, record in read_json_lines(path):
        fields = Fields(record, path, f"line {number}")
        caption = fields.get("caption")
        text = caption if isinstance(caption, str) else "\n".join(fields.texts("caption"))
        found[fields.text("image")] = text.strip()
    for question in questions:
        if not found.get(question.image):
            raise DataError(
                f"{path}: no caption of {question.image}, which {question.where} asks about; give "
                "LLaVA-Bench's context.jsonl"
            )
    return found


def read_rules(path: Path | None) -> dict[str, tuple[str, str]]:
    """Category -> (what an answerer is called, the instructions to the judge): from LLaVA's
    rule.json, or our own."""
    if path is None:
        return dict.fromkeys(CATEGORIES, (ROLE, OWN_RULE))
    whole = Fields(read_json(path), path, "")
    rules = {}
    for category in CATEGORIES:
        name = RULE_PREFIX + category
        rule = Fields(whole.get(name), path, name)
        rules[category] = (rule.text("role"), rule.text("prompt"))
    return rules


def rules_digest(rules: Mapping[str, tuple[str, str]]) -> str:
    """sha256 of the instructions."""
    text = json.dumps([SYSTEM, sorted(rules.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def read_scores(text: str) -> tuple[float, float]:
    """The two scores of a judgement's first line; raises Invalid."""
    lines = text.strip().splitlines()
    found = SCORES.fullmatch(lines[0].strip()) if lines else None
    if found is None:
        raise Invalid("no two scores on the first line")
    first, second = float(found[1]), float(found[2])
    if not all(LOWEST <= score <= HIGHEST for score in (first, second)):
        raise Invalid(f"a score outside {LOWEST:g} to {HIGHEST:g}")
    return first, second


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is asked; all of it must stay as it is when a run goes on.

    temperature: None leaves it to the server. tries: how often until the scores can be read.
    both_orders: every pair a second time with the answers swapped.
    """

    model: str
    seed: int = 0
    temperature: float | None = 0.2
    max_tokens: int = 1024
    tries: int = 3
    send_seed: bool = True
    both_orders: bool = False


@dataclass(frozen=True)
class JudgeTask:
    """One pair of answers in one order."""

    question: BenchQuestion
    swapped: bool

    @property
    def key(self) -> str:
        return self.question.key + (SWAPPED if self.swapped else "")


@dataclass(frozen=True)
class JudgeWork:
    """All judgements (train/asking.py asks for them). reference, answers: texts by question id."""

    settings: JudgeSettings
    questions: Sequence[BenchQuestion]
    contexts: Mapping[str, str]
    rules: Mapping[str, tuple[str, str]]
    reference: Mapping[str, str]
    answers: Mapping[str, str]

    @property
    def tasks(self) -> list[JudgeTask]:
        orders = (False, True) if self.settings.both_orders else (False,)
        return [JudgeTask(question, swapped) for swapped in orders for question in self.questions]

    @property
    def tries(self) -> int:
        return self.settings.tries

    def request(self, task: JudgeTask, attempt: int = 0) -> Request:
        """Another seed for each attempt."""
        settings, key = self.settings, task.question.key
        role, rule = self.rules[task.question.category]
        pair = [self.reference[key], self.answers[key]]
        first, second = pair[::-1] if task.swapped else pair
        text = (
            f"[Context]\n{self.contexts[task.question.image]}\n\n"
            f"[Question]\n{task.question.text}\n\n"
            f"[{role} 1]\n{first}\n\n[End of {role} 1]\n\n"
            f"[{role} 2]\n{second}\n\n[End of {role} 2]\n\n"
            f"[System]\n{rule}\n\n"
        )
        seed = draw(settings.seed, "judge", task.key, attempt) % SEEDS
        return Request(
            messages=(("system", SYSTEM), ("user", text)),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=seed if settings.send_seed else None,
        )

    def take(self, task: JudgeTask, text: str) -> dict[str, Any]:
        """LLaVA's review, `tuple` always reference first; raises Invalid."""
        scores = read_scores(text)
        return {
            "question_id": task.question.key,
            "category": RULE_PREFIX + task.question.category,
            "swapped": task.swapped,
            "content": text,
            "tuple": list(scores[::-1] if task.swapped else scores),
        }


def relative_scores(
    questions: Sequence[BenchQuestion],
    reviews: Sequence[Mapping[str, Any]],
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """JSON-able, by category and "all": relative score in per cent with its interval (bootstrap
    over images, None of fewer than MIN_IMAGES), both means, number of judgements."""
    image_of = {question.key: question.image for question in questions}
    found = {}
    for category in (ALL, *CATEGORIES):
        chosen = [r for r in reviews if category == ALL or r["category"] == RULE_PREFIX + category]
        if not chosen:
            continue
        names = sorted({image_of[review["question_id"]] for review in chosen})
        sums = np.zeros((len(names), 3))
        for review in chosen:
            sums[names.index(image_of[review["question_id"]])] += (*review["tuple"], 1)
        reference, own, number = sums.sum(axis=0)
        drawn = resampled(sums, resamples, seed)
        few = len(names) < MIN_IMAGES
        score = estimate(100 * own / reference, 100 * drawn[:, 1] / drawn[:, 0], False, few)
        found[category] = {
            "relative_score": float(score.value),
            "interval": None if few else [score.low, score.high],
            "reference_mean": float(reference / number),
            "model_mean": float(own / number),
            "judgements": int(number),
        }
    return found
