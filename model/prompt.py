"""Conversations to token ids and labels, turn by turn.

Templates are data. A conversation becomes a list of pieces, each with its ids and whether it is
to be learned, so the label mask falls out of the construction: nothing is tokenised twice to find
where an answer begins (the cause of LLaVA's "tokenization mismatch").

A piece is tokenised in the context that stands before it in the prompt (start, image, end token,
or the colon of "ASSISTANT:"), because SentencePiece tokenizers treat the first word of a text
apart; `_ids_after` cuts that context off again and checks that it could.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..hd.errors import DataError, UsageError
from ..hd.grid import suggest

IGNORE = -100
IMAGE_TAG = "<image>"


class SampleError(DataError):
    """A conversation that cannot be trained on or asked; the caller adds file and record."""


@dataclass(frozen=True)
class Turn:
    """One turn: role "human" or "gpt" (LLaVA's words), and its text."""

    role: str
    text: str


@dataclass(frozen=True)
class Template:
    """How turns become text.

    system stands first; a human turn is `user + text + user_end`, an answer
    `assistant + " " + text` followed by the end token if `end_token`, else by `answer_end`.
    With `only_answers` (stage 1) the human text is dropped: images, then the caption.
    """

    system: str
    user: str
    user_end: str
    assistant: str
    answer_end: str
    end_token: bool
    only_answers: bool


TEMPLATES: dict[str, Template] = {
    # Vicuna v1.1, in LLaVA's conversation.py as conv_vicuna_v1.
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user="USER: ",
        user_end=" ",
        assistant="ASSISTANT:",
        answer_end="",
        end_token=True,
        only_answers=False,
    ),
    # Stage 1 of LLaVA: image, caption, newline; no end token is learned.
    "plain": Template(
        system="",
        user="",
        user_end="",
        assistant="",
        answer_end="\n",
        end_token=False,
        only_answers=True,
    ),
}


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of equal length; a label is its token's id, or IGNORE (-100)."""

    ids: list[int]
    labels: list[int]
    truncated: bool = False


def refuse_tag(text: str, what: str) -> None:
    """Raise SampleError for a text of a user's that has an image tag; what: the text's name."""
    if IMAGE_TAG in text:
        raise SampleError(
            f"{what} holds {IMAGE_TAG}, which marks an image's place in the prompt; "
            "leave it out, images are given beside the text"
        )


def get_template(name: str) -> Template:
    """The template of that name; UsageError with the nearest name otherwise."""
    if name not in TEMPLATES:
        raise UsageError(f"template {name!r} is unknown; {suggest(name, TEMPLATES)}")
    return TEMPLATES[name]


def encode_conversation(
    tokenizer: Any,
    turns: Sequence[Turn],
    image_tokens: Sequence[int],
    template: str,
    image_token_id: int,
    max_length: int | None = None,
) -> Encoded:
    """A training sample's ids and labels.

    Args:
        turns: alternating, human first, ending with an answer.
        image_tokens: visual tokens of each image, in the order of the `<image>` tags.
        max_length: text behind it is cut off; visual tokens never are.

    Labels cover the answers and their end tokens, nothing else. As in LLaVA, the images of a turn
    stand in front of it, each followed by a newline, wherever in the text its tag was.
    Raises SampleError: turns out of order, tags that differ from the images, visual tokens that
    do not fit, no label left.
    """
    check_turns(turns)
    pieces = _Pieces(tokenizer, image_token_id)
    _write_turns(pieces, turns, list(image_tokens), get_template(template))
    return _cut(pieces, max_length, image_token_id)


def encode_question(
    tokenizer: Any,
    turns: Sequence[Turn],
    image_tokens: Sequence[int],
    template: str,
    image_token_id: int,
    system: str | None = None,
) -> list[int]:
    """Ids of a prompt that waits for the answer to its last (human) turn. Raises SampleError.

    system: stands in place of the template's own system text, a space behind it.
    """
    _check_roles(turns)
    if len(turns) % 2 == 0:
        raise SampleError(f"{len(turns)} turns; a question ends with a turn from human")
    chosen = get_template(template)
    if system is not None:
        chosen = replace(chosen, system=f"{system} " if system else "")
    pieces = _Pieces(tokenizer, image_token_id)
    _write_turns(pieces, turns, list(image_tokens), chosen)
    return pieces.ids


def prompt_text(turns: Sequence[Turn], template: str, end_token: str) -> str:
    """What a conversation, or a question that waits for its answer, reads like: the same pieces as
    text, with a tag for each image and without the token that begins every prompt."""
    _check_roles(turns)
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    pieces = _Words(end_token)
    _write_turns(pieces, turns, [1] * tags, get_template(template))
    return "".join(pieces.words)


def check_turns(turns: Sequence[Turn]) -> None:
    """Raise SampleError unless the turns are a conversation that ends with an answer.

    Roles alternate from human to gpt and no answer is empty.
    """
    _check_roles(turns)
    for number, turn in enumerate(turns):
        if turn.role == "gpt" and not turn.text.strip():
            raise SampleError(f"turn {number} is an empty answer; drop it with its question")
    if len(turns) < 2 or len(turns) % 2:
        raise SampleError(f"{len(turns)} turns; a conversation ends with an answer from gpt")


def _check_roles(turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns):
        expected = ("human", "gpt")[number % 2]
        if turn.role != expected:
            raise SampleError(
                f"turn {number} is from {turn.role!r}, expected {expected!r}; "
                "turns alternate human, gpt, beginning with human"
            )


def _write_turns(
    pieces: _Pieces | _Words, turns: Sequence[Turn], image_tokens: list[int], template: Template
) -> None:
    """Write all turns; an unanswered last one is followed by the assistant's opening words."""
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    if tags != len(image_tokens):
        raise SampleError(
            f"{tags} {IMAGE_TAG} tags in the human turns but {len(image_tokens)} images; "
            "write one tag per image"
        )
    pieces.begin()
    waiting = template.system
    for turn in turns:
        if turn.role == "human":
            count = turn.text.count(IMAGE_TAG)
            text = turn.text.replace(IMAGE_TAG, "").strip() if count else turn.text
            waiting = _write_human(pieces, template, waiting, text, image_tokens[:count])
            del image_tokens[:count]
        else:
            pieces.text(waiting)
            space = " " if template.assistant else ""
            pieces.text(space + turn.text + template.answer_end, learned=True)
            if template.end_token:
                pieces.end()
            waiting = ""
    pieces.text(waiting)


def _write_human(
    pieces: _Pieces | _Words, template: Template, waiting: str, text: str, counts: Sequence[int]
) -> str:
    """Write a human turn up to its last image; returns the text that still waits to be written."""
    waiting += template.user
    for count in counts:
        pieces.text(waiting)
        pieces.image(count)
        waiting = "" if template.only_answers else "\n"
    if template.only_answers:
        return waiting
    return waiting + text + template.user_end + template.assistant


class _Words:
    """The text of a prompt that grows piece by piece."""

    def __init__(self, end_token: str) -> None:
        self.end_token = end_token
        self.words: list[str] = []

    def begin(self) -> None:
        self.words = []

    def text(self, text: str, learned: bool = False) -> None:
        self.words.append(text)

    def image(self, count: int) -> None:
        self.words.append(IMAGE_TAG)

    def end(self) -> None:
        self.words.append(self.end_token)


class _Pieces:
    """Ids and labels of a prompt that grows piece by piece."""

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.before = ""  # text of the context that the next piece is tokenised in

    def begin(self) -> None:
        if self.tokenizer.bos_token_id is not None:
            self._add([self.tokenizer.bos_token_id], learned=False)
        self.before = ""

    def text(self, text: str, learned: bool = False) -> None:
        if text:
            self._add(_ids_after(self.tokenizer, self.before, text), learned)
            self.before = ":"

    def image(self, count: int) -> None:
        self._add([self.image_token_id] * count, learned=False)
        self.before = self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    def end(self) -> None:
        self._add([self.tokenizer.eos_token_id], learned=True)
        self.before = self.tokenizer.eos_token

    def _add(self, ids: list[int], learned: bool) -> None:
        self.ids += ids
        self.labels += ids if learned else [IGNORE] * len(ids)


def _ids_after(tokenizer: Any, before: str, text: str) -> list[int]:
    """Ids of `text` as it is tokenised behind `before`.

    Text that spells a special token (a user may write "</s>" or "<image>") is tokenised as plain
    characters, behind a newline instead of the special token that stands before it.
    """
    options: dict[str, Any] = {"add_special_tokens": False}
    if any(token in text for token in tokenizer.all_special_tokens):
        options["split_special_tokens"] = True
        before = "\n" if before in tokenizer.all_special_tokens else before
    context = tokenizer(before, **options).input_ids if before else []
    ids = tokenizer(before + text, **options).input_ids
    if ids[: len(context)] != context:
        raise UsageError(
            f"tokenizer {type(tokenizer).__name__} merges {before!r} with the text behind it; "
            "prompts cannot be built turn by turn with it"
        )
    return ids[len(context) :]


def _cut(pieces: _Pieces, max_length: int | None, image_token_id: int) -> Encoded:
    """Apply the length limit; visual tokens must survive it, and at least one label."""
    ids, labels = pieces.ids, pieces.labels
    truncated = max_length is not None and len(ids) > max_length
    if truncated:
        last_visual = max((i for i, x in enumerate(ids) if x == image_token_id), default=-1)
        if max_length is not None and last_visual >= max_length:
            raise SampleError(
                f"its visual tokens reach place {last_visual + 1}, beyond max_length {max_length}; "
                "raise max_length or use a preset with fewer tiles"
            )
        ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORE for label in labels):
        raise SampleError(
            f"max_length {max_length} cuts every answer off, no label is left; "
            "raise max_length or drop the record"
        )
    return Encoded(ids, labels, truncated)
