"""How long a record becomes: its visual tokens and its text, by tokenizer or by estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..hd.errors import UsageError
from ..hd.grid import HDConfig
from ..hd.plan import TooManyTokens, plan_image
from ..model.prompt import IMAGE_TAG, SampleError, Turn, encode_conversation, get_template

CHARACTERS_PER_TOKEN = 4  # of English in Vicuna's vocabulary, roughly


@dataclass(frozen=True)
class CheckSettings:
    """What records are checked against.

    tokenizer: folder of a model whose tokenizer counts; None estimates the text's tokens at
    CHARACTERS_PER_TOKEN. max_length: the trainer's limit in tokens.
    """

    hd: HDConfig
    template: str = "vicuna_v1"
    max_length: int = 2048
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        get_template(self.template)
        if self.max_length < 1:
            raise UsageError(f"max_length must be 1 or more, not {self.max_length}")


@dataclass(frozen=True)
class Measure:
    """Tokens of one sample without any limit; visual ones among them; why it cannot be trained on
    within the limit, if so."""

    tokens: int
    visual: int
    reason: str | None = None


@lru_cache(maxsize=2)
def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder with `<image>` in it, as a saved model has it.

    Raises UsageError for a folder without one.
    """
    # transformers takes seconds to import, which an estimate does not need.
    from ..model.assemble import as_saved
    from ..model.processor import read_tokenizer

    if not Path(folder).is_dir():
        raise UsageError(f"tokenizer {folder} is not a folder; give that of a language model")
    tokenizer = read_tokenizer(folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [IMAGE_TAG]}, replace_extra_special_tokens=False
    )
    return as_saved(tokenizer)


def measure(
    settings: CheckSettings, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]]
) -> Measure:
    """The lengths of a checked record with images of these (height, width)."""
    try:
        counts = [plan_image(size, settings.hd).num_tokens for size in sizes]
    except TooManyTokens as error:
        return Measure(0, 0, str(error))
    visual = sum(counts)
    if settings.tokenizer is None:
        tokens = visual + _estimate(turns, settings.template)
        reason = None
        if visual >= settings.max_length:
            reason = f"{visual} visual tokens fill max_length {settings.max_length}; raise it"
        return Measure(tokens, visual, reason)
    tokenizer = load_tokenizer(settings.tokenizer)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    return measure_conversation(
        tokenizer, turns, counts, settings.template, image_id, settings.max_length
    )


def measure_conversation(
    tokenizer: Any,
    turns: Sequence[Turn],
    image_tokens: Sequence[int],
    template: str,
    image_token_id: int,
    max_length: int,
) -> Measure:
    """The lengths of a conversation as `encode_conversation` writes it; same arguments."""
    visual = sum(image_tokens)
    prompt = (tokenizer, turns, image_tokens, template, image_token_id)
    try:
        tokens = len(encode_conversation(*prompt).ids)
    except SampleError as error:
        return Measure(0, visual, str(error))
    if tokens > max_length:
        try:
            encode_conversation(*prompt, max_length)
        except SampleError as error:
            return Measure(tokens, visual, str(error))
    return Measure(tokens, visual)


def _estimate(turns: Sequence[Turn], name: str) -> int:
    template = get_template(name)
    characters = len(template.system)
    for turn in turns:
        if turn.role == "gpt":
            characters += len(turn.text) + len(template.assistant)
        elif not template.only_answers:
            characters += len(turn.text.replace(IMAGE_TAG, "")) + len(template.user)
    return -(-characters // CHARACTERS_PER_TOKEN)
