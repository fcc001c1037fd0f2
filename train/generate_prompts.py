"""The prompts of `data generate`: what each kind asks for, and examples of good answers.

They stand in examples/*.yaml, one file for each kind: `system`, `examples` (captions, boxes,
answer) and for detail `questions`. `--examples DIR` takes others. An example's answer has to pass
the same checks as the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..hd.errors import DataError, UsageError
from ..hd.grid import suggest
from .generate_answers import Invalid, read_answer
from .generate_context import Box, Context
from .generate_request import Messages
from .generate_settings import KINDS, Kind
from .mixture_fields import Fields, digest, draw

EXAMPLES = Path(__file__).resolve().parent / "examples"
STARTS = ("- ", "Q:", "A:")  # of lines that do not go on with the one above


@dataclass(frozen=True)
class Example:
    """An image's text and a good answer."""

    context: Context
    answer: str


@dataclass(frozen=True)
class Prompt:
    """questions: for detail, one is drawn for each image; the other kinds have none."""

    kind: Kind
    system: str
    examples: tuple[Example, ...]
    questions: tuple[str, ...] = ()

    def question(self, seed: int, image: str) -> str:
        """The question of an image; "" where the model thinks of its own."""
        if not self.questions:
            return ""
        return self.questions[draw(seed, "question", image) % len(self.questions)]

    def messages(self, context: Context, question: str) -> Messages:
        """System, the examples as earlier turns, and the image."""
        turns: list[tuple[str, str]] = [("system", self.system)]
        for i, example in enumerate(self.examples):
            asked = self.questions[i % len(self.questions)] if self.questions else ""
            turns += [("user", _asked(example.context, asked)), ("assistant", example.answer)]
        return (*turns, ("user", _asked(context, question)))

    @property
    def answers(self) -> tuple[str, ...]:
        """The examples' answers, which must not come back as the model's."""
        return tuple(example.answer for example in self.examples)


def _asked(context: Context, question: str) -> str:
    return f"{context.text()}\n\nQuestion: {question}" if question else context.text()


def load_prompts(folder: Path | None = None) -> dict[Kind, Prompt]:
    """The prompts of a folder, or the shipped ones. UsageError names file, field and remedy."""
    return {kind: _load((folder or EXAMPLES) / f"{kind}.yaml", kind) for kind in KINDS}


def prompts_digest(prompts: dict[Kind, Prompt]) -> str:
    """16 hex digits that change with anything that is sent."""
    texts = {
        kind: [prompt.messages(Context((), ()), ""), prompt.questions]
        for kind, prompt in prompts.items()
    }
    return digest(texts)


def flowed(text: str) -> str:
    """Text without its line breaks inside of paragraphs, items and turns."""
    lines: list[str] = []
    for line in text.strip().split("\n"):
        bare = line.strip()
        if lines and lines[-1] and bare and not bare.startswith(STARTS):
            lines[-1] += f" {bare}"
        else:
            lines.append(bare)
    return "\n".join(lines)


def _load(path: Path, kind: Kind) -> Prompt:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check --examples") from error
    try:
        return _prompt(Fields(values, path, ""), kind)
    except DataError as error:  # the same checks as those of annotation files, but settings here
        raise UsageError(str(error)) from error


def _prompt(fields: Fields, kind: Kind) -> Prompt:
    has_questions = kind == "detail"
    _only(fields, "system", "examples", *(["questions"] if has_questions else []))
    questions = tuple(fields.texts("questions")) if has_questions else ()
    if has_questions and not all(questions):
        raise fields.fault("questions", "holds an empty one", "write it")
    if has_questions and not questions:
        raise fields.fault("questions", "is empty", "write at least one")
    system = flowed(fields.text("system"))
    if not system:
        raise fields.fault("system", "is empty", "say what the model shall write")
    examples = tuple(_example(entry, kind) for entry in fields.objects("examples"))
    return Prompt(kind, system, examples, questions)


def _example(fields: Fields, kind: Kind) -> Example:
    _only(fields, "captions", "boxes", "answer")
    boxes = tuple(_box(fields, i, value) for i, value in enumerate(fields.value.get("boxes", [])))
    context = Context(tuple(fields.texts("captions")), boxes)
    answer = flowed(fields.text("answer"))
    try:
        read_answer(kind, answer, "What is to be seen?", context)
    except Invalid as error:
        raise fields.fault("answer", f"is not valid: {error}", "mend it") from error
    return Example(context, answer)


def _box(fields: Fields, place: int, value: Any) -> Box:
    """`[category, left, top, right, bottom]`"""
    name = f"boxes[{place}]"
    remedy = "write [category, left, top, right, bottom], shares from 0 to 1"
    if not isinstance(value, list) or len(value) != 5 or not isinstance(value[0], str):
        raise fields.fault(name, "is no box", remedy)
    corners = Fields({name: value[1:]}, fields.path, fields.place).numbers(name, 4)
    if not all(0 <= corner <= 1 for corner in corners):
        raise fields.fault(name, "leaves the image", remedy)
    left, top, right, bottom = corners
    return Box(value[0], (left, top, right, bottom))


def _only(fields: Fields, *names: str) -> None:
    for key in fields.value:
        if key not in names:
            raise fields.fault(str(key), "is not a field", suggest(str(key), names))
