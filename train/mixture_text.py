"""Sets of free text: LLaVA's own records, ShareGPT's conversations, TextCaps' captions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from ..model.prompt import IGNORE, IMAGE_TAG, Turn, encode_conversation
from .mixture_fields import Conversation, Fields, Reading, digest, listed, only, unusable
from .mixture_fields import read_json as _json
from .mixture_kinds import ShareGptOptions, TextCapsOptions

Rounds = tuple[tuple[str, str], ...]  # (question, answer)

# ShareGPT's words for the two sides, as its collectors wrote them.
HUMAN = frozenset({"human", "user"})
MACHINE = frozenset({"gpt", "chatgpt", "bing", "bard", "assistant"})


def read_llava(reading: Reading) -> list[Conversation]:
    """LLaVA-Instruct and any other LLaVA JSON: one image or none, rounds of human and gpt.

    Where the tag stood in the first question does not matter: it is written in front again.
    """
    conversations = []
    for path in reading.files["records"]:
        for fields in listed(path):
            image = fields.value.get("image")
            if image is not None:
                image = reading.image(fields.text("image"), fields, "image")
            rounds = _rounds(fields, 0 if image is None else 1)
            reason = next((r for pair in rounds for text in pair if (r := unusable(text))), None)
            if reason:
                reading.skipped[f"conversation: {reason}"] += 1
            else:
                conversations.append(Conversation(_key(fields, rounds), image, rounds))
    return conversations


def _rounds(fields: Fields, images: int) -> Rounds:
    turns = []
    for i, turn in enumerate(fields.objects("conversations")):
        role, due = turn.text("from"), ("human", "gpt")[i % 2]
        if role != due:
            raise turn.fault("from", f"is {role!r} where {due!r} is due", "mend the order")
        turns.append(turn.text("value"))
    if not turns or len(turns) % 2:
        raise fields.fault("conversations", f"has {len(turns)} turns", "end with an answer")
    if sum(text.count(IMAGE_TAG) for text in turns[::2]) != images:
        raise fields.fault(
            "conversations", f"has not {images} {IMAGE_TAG} tags", "write one for each image"
        )
    questions = [text.replace(IMAGE_TAG, "").strip() for text in turns[::2]]
    return tuple(zip(questions, turns[1::2], strict=True))


def _key(fields: Fields, rounds: Rounds) -> str:
    """LLaVA's ids are not unique (three records of each image in LLaVA-Instruct)."""
    return f"{fields.value.get('id', '')}-{digest([fields.value.get('image'), rounds])}"


def read_sharegpt(reading: Reading) -> list[Conversation]:
    """ShareGPT's JSON: text alone. Invalid conversations are left out and counted by reason.

    Answers before the first question and a last question without an answer are cut off; what is
    left must alternate, hold no empty turn and no image tag.
    """
    options: ShareGptOptions = reading.source.options
    starts = _starts(options)
    conversations = []
    for path in reading.files["records"]:
        for fields in listed(path):
            turns = [(t.text("from"), t.text("value")) for t in fields.objects("conversations")]
            rounds, reason = _valid(turns)
            if not reason and starts is not None and options.max_tokens is not None:
                # The trainer cuts the end of the last answer that is kept.
                rounds = rounds[: sum(start < options.max_tokens for start in starts(rounds))]
                reason = "" if rounds else f"no answer within {options.max_tokens} tokens"
            if reason:
                reading.skipped[f"conversation: {reason}"] += 1
            else:
                conversations.append(Conversation(_key(fields, rounds), None, rounds))
    return conversations


def _valid(turns: list[tuple[str, str]]) -> tuple[Rounds, str]:
    """(rounds, "") or ((), why there are none)."""
    if any(role not in HUMAN | MACHINE for role, _ in turns):
        return (), "a turn of neither side"
    sides = [role in HUMAN for role, _ in turns]
    while sides and not sides[0]:
        turns, sides = turns[1:], sides[1:]
    if sides and sides[-1]:
        turns, sides = turns[:-1], sides[:-1]
    if not sides:
        return (), "no question with an answer"
    if sides != [i % 2 == 0 for i in range(len(sides))]:
        return (), "turns out of order"
    for _, text in turns:
        reason = unusable(text)
        if reason:
            return (), reason
    texts = [text for _, text in turns]
    return tuple(zip(texts[::2], texts[1::2], strict=True)), ""


def _starts(options: ShareGptOptions) -> Callable[[Rounds], list[int]] | None:
    """Tells the place, in tokens of Vicuna's template, at which each answer begins."""
    if options.tokenizer is None:
        return None
    from .data_check_tokens import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TAG)

    def starts(rounds: Rounds) -> list[int]:
        turns = [Turn(*turn) for q, a in rounds for turn in (("human", q), ("gpt", a))]
        labels = encode_conversation(tokenizer, turns, [], "vicuna_v1", image_id).labels
        learned = [label != IGNORE for label in labels]
        return [i for i in range(1, len(learned)) if learned[i] and not learned[i - 1]]

    return starts


def read_textcaps(reading: Reading) -> list[Conversation]:
    """TextCaps' `TextCaps_0.1_*.json`: captions below `data`, several for each image.

    With TextVQA's Rosetta OCR file (`ocr`) the words read in the image follow the prompt, as in
    LLaVA's TextVQA prompts ("Reference OCR token: a, b").
    """
    options: TextCapsOptions = reading.source.options
    words = {}
    for path in reading.files.get("ocr", []):
        for fields in _data(path, "image_id", "ocr_tokens"):
            words[fields.name("image_id")] = fields.texts("ocr_tokens")
    captions: dict[str, set[str]] = defaultdict(set)
    names: dict[str, str] = {}
    for path in reading.files["captions"]:
        for fields in _data(path, "image_id", "caption_str"):
            key, text = fields.name("image_id"), fields.text("caption_str")
            if "ocr" in reading.files and key not in words:
                raise fields.fault("image_id", f"{key} is not in the OCR file", "give its split's")
            reason = unusable(text)
            if reason:
                reading.skipped[f"caption: {reason}"] += 1
                continue
            names[key] = reading.image(f"{key}.jpg", fields, "image_id")
            captions[key].add(text)
    conversations = []
    for key, texts in captions.items():
        tokens = ", ".join(word for word in words.get(key, []) if not unusable(word))
        question = options.prompt + (f"\nReference OCR token: {tokens}" if tokens else "")
        chosen = reading.drawn(texts, 1 if options.captions == "one" else len(texts), key)
        rounds = tuple((question, text) for text in chosen)
        conversations.append(Conversation(names[key], names[key], rounds))
    return conversations


def _data(path: Path, *keys: str) -> Iterator[Fields]:
    yield from Fields(_json(path, only(*keys)), path, "").objects("data")
