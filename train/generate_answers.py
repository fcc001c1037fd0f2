"""Whether an answer of the language model may become training data, and its rounds.

The model reads text, but has to speak as one who sees the image. An answer in another form than the
prompt asks for, of an odd length, that repeats an example, or that speaks of captions, boxes or
their numbers is `Invalid`, with a reason of few words under which it is counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from .generate_context import Context
from .generate_request import Invalid
from .generate_settings import Kind
from .mixture_fields import unusable

Rounds = tuple[tuple[str, str], ...]  # (question, answer)


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest numbers of rounds, and of words."""

    rounds: tuple[int, int]
    question: tuple[int, int]
    answer: tuple[int, int]


# Wider than what the prompts ask for: models count badly, and the data is none the worse for it.
BOUNDS: dict[Kind, Bounds] = {
    "conversation": Bounds((3, 10), (2, 60), (1, 120)),
    "detail": Bounds((1, 1), (2, 60), (60, 350)),
    "reasoning": Bounds((1, 1), (4, 60), (40, 350)),
}

# What gives away that the image was not seen, that the model did not answer, or a broken template.
BANNED: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (reason, re.compile(pattern, re.IGNORECASE))
    for reason, pattern in (
        ("speaks of captions", r"\bcaption(s|ed|ing)?\b"),
        ("speaks of bounding boxes", r"\bbounding[\s-]*box(es)?\b|\bbboxe?s?\b"),
        ("speaks of coordinates", r"\bco-?ordinates?\b"),
        ("lists numbers like a box", r"[\[(]\s*\d*\.?\d+\s*,\s*\d*\.?\d+\s*[,\])]"),
        (
            "speaks of the notes",
            r"\b(the|these|those|given|provided) (notes|descriptions? (say|mention|state)s?)\b"
            r"|\b(given|provided) (text|context|information|sentences|description)s?\b"
            r"|\b(based on|according to) the (text|context|notes|sentences|descriptions?)\b"
            r"|\blist of objects\b",
        ),
        (
            "declines or speaks of itself",
            r"\bas an? (ai|language model)\b|\bi('m| am) sorry\b"
            r"|\bi (can'?t|cannot|can not|am unable to) (see|view|help|assist)\b",
        ),
        ("holds marks of a chat template", r"<\|.*?\|>|</?s>|\[/?INST\]|<start_of_turn>|```"),
    )
)
DECIMAL = re.compile(r"(?<![\d.])[01]?\.(\d{2,})(?![\d.]*\d)")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
LINE = re.compile(r"(?P<side>[QA]): *(?P<text>.*\S) *")


def read_answer(
    kind: Kind, text: str, question: str, context: Context, examples: Collection[str] = ()
) -> Rounds:
    """The rounds of an answer. Raises Invalid.

    question: what was asked for a detail; the other kinds hold their own questions. examples: the
    answers of the prompt's examples, which must not come back.
    """
    text = re.sub(r"[ \t\r]+$", "", text.strip(), flags=re.MULTILINE)
    reason = unusable(text) or ("a control character" if CONTROL.search(text) else None)
    if reason:
        raise Invalid(reason)
    rounds = READERS[kind](text, question)
    straight = text.replace("\u2019", "'")
    for reason, pattern in BANNED:
        if pattern.search(straight):
            raise Invalid(reason)
    if holds_numbers_of(context, text):
        raise Invalid("holds numbers of the boxes")
    _check_bounds(BOUNDS[kind], rounds)
    if any(_bare(text) == _bare(example) for example in examples):
        raise Invalid("repeats an example")
    return rounds


def holds_numbers_of(context: Context, text: str) -> bool:
    """Whether a decimal of two or more places equals a box's number, rounded or cut off there."""
    numbers = {value for box in context.boxes for value in box.corners}
    for found in DECIMAL.finditer(text):
        value, unit = float(found[0]), 10.0 ** -len(found[1])
        if any(abs(number - value) < unit * 0.999 for number in numbers):
            return True
    return False


def _conversation(text: str, question: str) -> Rounds:
    """Lines `Q: ...` and `A: ...` in turns, and no other but blank ones."""
    turns: list[str] = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise Invalid("a line that begins neither with Q: nor with A:")
        if found["side"] != "QA"[len(turns) % 2]:
            raise Invalid("questions and answers do not take turns")
        turns.append(found["text"].strip())
    if len(turns) % 2:
        raise Invalid("the last question has no answer")
    rounds = tuple(zip(turns[::2], turns[1::2], strict=True))
    if len({_bare(asked) for asked, _ in rounds}) < len(rounds):
        raise Invalid("a question is asked twice")
    return rounds


def _reasoning(text: str, question: str) -> Rounds:
    """A line `Q: ...`, then `A: ...` to the end."""
    first, _, rest = text.partition("\n")
    asked, answered = LINE.fullmatch(first), LINE.match(rest.lstrip())
    if asked is None or asked["side"] != "Q":
        raise Invalid("the first line does not begin with Q:")
    if answered is None or answered["side"] != "A":
        raise Invalid("no answer that begins with A: behind the question")
    answer = rest.lstrip()[2:].strip()
    if re.search(r"^[QA]:", answer, re.MULTILINE):
        raise Invalid("more than one question or answer")
    return ((asked["text"].strip(), answer),)


def _detail(text: str, question: str) -> Rounds:
    if re.search(r"^([QA]:|#|[-*•] |\d+\. )", text, re.MULTILINE):
        raise Invalid("headings, lists or questions in a description")
    return ((question, text),)


READERS = {"conversation": _conversation, "detail": _detail, "reasoning": _reasoning}


def _check_bounds(bounds: Bounds, rounds: Rounds) -> None:
    _within(len(rounds), bounds.rounds, "too few rounds", "too many rounds")
    for asked, answered in rounds:
        _within(len(asked.split()), bounds.question, "a question too short", "a question too long")
        _within(len(answered.split()), bounds.answer, "an answer too short", "an answer too long")


def _within(value: int, bounds: tuple[int, int], below: str, above: str) -> None:
    if value < bounds[0]:
        raise Invalid(below)
    if value > bounds[1]:
        raise Invalid(above)


def _bare(text: str) -> str:
    """Letters and digits alone, for comparisons."""
    return "".join(re.findall(r"\w+", text.casefold()))
