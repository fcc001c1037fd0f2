"""Question answering sets: VQAv2, OKVQA, GQA, OCR-VQA and A-OKVQA to conversations.

All questions of an image become one conversation (the first of the paper's seven strategies), in
the order of their ids. Answers that are empty are left out and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .mixture_fields import Conversation, Fields, Reading, keyed, listed, natural, only, unusable
from .mixture_fields import read_json as _json
from .mixture_kinds import AokvqaOptions, OcrVqaOptions, QaOptions, VqaOptions

COCO_NAMES = {"2017": "{:012d}.jpg", "2014": "COCO_train2014_{:012d}.jpg"}
OCR_SPLITS = {"train": 1, "val": 2, "test": 3}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about an image, by the id of the question, and its answer."""

    image: str
    key: str
    question: str
    answer: str


def coco_image(fields: Fields, field: str, names: str, reading: Reading) -> str:
    """The image name of a COCO image's number."""
    return reading.image(COCO_NAMES[names].format(fields.whole(field)), fields, field)


def read_vqa(reading: Reading) -> list[Conversation]:
    """VQAv2 and OKVQA: questions and annotations, joined by question_id.

    The answer is `multiple_choice_answer` where there is one (VQAv2); else the most frequent of
    `answers`, on a tie the one that is listed first (OKVQA).
    """
    options: VqaOptions = reading.source.options
    answers: dict[str, tuple[str, str, Fields]] = {}
    for fields in _members(reading, "annotations"):
        key = fields.name("question_id")
        if key in answers:
            raise fields.fault("question_id", f"{key} is annotated twice", "keep one of them")
        answers[key] = (fields.name("image_id"), _agreed_answer(fields), fields)
    asked, seen = [], set()
    for fields in _members(reading, "questions"):
        key = fields.name("question_id")
        if key in seen:
            raise fields.fault("question_id", f"{key} is asked twice", "keep one of them")
        seen.add(key)
        if key not in answers:
            raise fields.fault(
                "question_id", f"{key} has no annotation", "give the annotations of this split"
            )
        image_id, answer, _ = answers.pop(key)
        if image_id != fields.name("image_id"):
            raise fields.fault(
                "image_id", f"is another one than its annotation's {image_id}", "mend one of them"
            )
        image = coco_image(fields, "image_id", options.coco_names, reading)
        asked.append(Asked(image, key, fields.text("question"), answer))
    if answers:
        key, (_, _, fields) = next(iter(answers.items()))
        raise fields.fault(
            "question_id", f"{key} has no question", "give the questions of this split"
        )
    return merged(asked, options, reading)


def _members(reading: Reading, role: str) -> Iterator[Fields]:
    """The records of VQA's files, which stand below one key."""
    for path in reading.files[role]:
        yield from Fields(_json(path, _slim_vqa), path, "").objects(role)


CHOSEN = "multiple_choice_answer"


def _slim_vqa(value: dict[str, Any]) -> dict[str, Any]:
    """An annotation whose answer is chosen, without the ten answers that it was chosen from."""
    if CHOSEN in value:
        value.pop("answers", None)
    return value


def _agreed_answer(fields: Fields) -> str:
    if CHOSEN in fields.value:
        return fields.text(CHOSEN)
    counts = Counter(answer.text("answer") for answer in fields.objects("answers"))
    return counts.most_common(1)[0][0] if counts else ""  # equal counts stay in their order


def read_gqa(reading: Reading) -> list[Conversation]:
    """GQA's `*_questions.json`: an object of questions by id, each with imageId and answer."""
    hook = only("imageId", "question", "answer")
    asked = []
    for key, fields in keyed(reading.files["questions"], hook):
        image = reading.image(f"{fields.name('imageId')}.jpg", fields, "imageId")
        asked.append(Asked(image, key, fields.text("question"), fields.text("answer")))
    return merged(asked, reading.source.options, reading)


def read_ocrvqa(reading: Reading) -> list[Conversation]:
    """OCR-VQA's dataset.json: an object of books by id with questions, answers and split (1, 2 or
    3). Images are named after the id, all as .jpg, as LLaVA saves them."""
    options: OcrVqaOptions = reading.source.options
    hook = only("questions", "answers", "split")
    asked = []
    for key, fields in keyed(reading.files["dataset"], hook):
        split = fields.whole("split")
        if split not in OCR_SPLITS.values():
            raise fields.fault("split", f"is {split}", "give 1 (train), 2 (val) or 3 (test)")
        questions, answers = fields.texts("questions"), fields.texts("answers")
        if len(questions) != len(answers):
            reason = f"are {len(answers)} for {len(questions)} questions"
            raise fields.fault("answers", reason, "give one for each")
        if split == OCR_SPLITS[options.split]:
            image = reading.image(f"{key}.jpg", fields, "the id")
            for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                asked.append(Asked(image, f"{i:06d}", question, answer))
    return merged(asked, options, reading)


def merged(
    asked: Iterable[Asked], options: QaOptions, reading: Reading, suffix: str = ""
) -> list[Conversation]:
    """One conversation for each image; the format prompt stands at the first question or all."""
    by_image: dict[str, list[Asked]] = defaultdict(list)
    for one in asked:
        reason = unusable(one.question) or unusable(one.answer)
        if reason:
            reading.skipped[f"question: {reason}"] += 1
        else:
            by_image[one.image].append(one)
    conversations = []
    for image, questions in by_image.items():
        rounds: list[tuple[str, str]] = []
        for one in sorted(questions, key=lambda one: natural(one.key)):
            answer = one.answer
            if options.capitalise:
                answer = answer[:1].upper() + answer[1:]
            rounds.append((with_prompt(one.question, options, len(rounds)), answer))
        conversations.append(Conversation(f"{image}{suffix}", image, tuple(rounds)))
    return conversations


def with_prompt(question: str, options: QaOptions | AokvqaOptions, number: int) -> str:
    """The question, with the format prompt on a line of its own where that is due."""
    due = options.prompt and (number == 0 or options.prompt_on == "every")
    return f"{question}\n{options.prompt}" if due else question


def read_aokvqa(reading: Reading) -> list[Conversation]:
    """A-OKVQA's `aokvqa_v1p0_*.json`: a list of questions with choices and correct_choice_idx.

    Merged by image, then repeated: copy r holds the questions with more than r choices, with their
    choices turned by r places if `copies` is "rotated".
    """
    options: AokvqaOptions = reading.source.options
    letters = QaOptions(options.prompt, options.prompt_on, capitalise=False)
    copies: dict[int, list[Asked]] = defaultdict(list)
    seen = set()
    for path in reading.files["questions"]:
        for fields in listed(path):
            key = fields.name("question_id")
            if key in seen:
                raise fields.fault("question_id", f"{key} is there twice", "keep one of them")
            seen.add(key)
            image = coco_image(fields, "image_id", options.coco_names, reading)
            question, choices, right = fields.text("question"), *_choices(fields)
            if any(unusable(choice) for choice in choices) or unusable(question):
                reading.skipped["question: an unusable text or choice"] += 1
                continue
            for copy in range(len(choices)):
                turn = copy if options.copies == "rotated" else 0
                text, letter = _lettered(question, choices, right, turn)
                copies[copy].append(Asked(image, key, text, letter))
    return [
        conversation
        for copy, asked in sorted(copies.items())
        for conversation in merged(asked, letters, reading, f"#{copy}")
    ]


def _choices(fields: Fields) -> tuple[list[str], int]:
    choices, right = fields.texts("choices"), fields.whole("correct_choice_idx")
    if not 2 <= len(choices) <= len(LETTERS):
        raise fields.fault("choices", f"are {len(choices)}", "give 2 to 26")
    if not 0 <= right < len(choices):
        raise fields.fault(
            "correct_choice_idx",
            f"is {right} for {len(choices)} choices",
            f"give 0 to {len(choices) - 1}",
        )
    return choices, right


def _lettered(question: str, choices: list[str], right: int, turn: int) -> tuple[str, str]:
    """The question with its choices, turned by `turn` places, and the letter of the right one."""
    order = [(place + turn) % len(choices) for place in range(len(choices))]
    lines = [f"{LETTERS[i]}. {choices[place]}" for i, place in enumerate(order)]
    return "\n".join([question, *lines]), LETTERS[order.index(right)]
