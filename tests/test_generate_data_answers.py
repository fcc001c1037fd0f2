"""Which answers `data generate` takes, and the prompts that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_hd.hd.errors import UsageError
from llava_hd.train.generate_answers import BOUNDS, Invalid, read_answer
from llava_hd.train.generate_context import Box, Context
from llava_hd.train.generate_prompts import EXAMPLES, flowed, load_prompts, prompts_digest
from llava_hd.train.generate_settings import KINDS, Kind

CONTEXT = Context(("A dog runs.",), (Box("dog", (0.125, 0.25, 0.681, 0.9)),))
LONG = "The dog runs over the meadow in the morning while nobody watches it from the house. " * 5
TALK = "Q: What runs?\nA: A dog.\nQ: Is it day?\nA: Yes, it is.\nQ: Who watches?\nA: Nobody does."


def test_valid_answers_become_rounds() -> None:
    loose = TALK.replace("\nQ", " \r\n\n  \nQ")
    assert read_answer("conversation", loose, "", CONTEXT) == (
        ("What runs?", "A dog."),
        ("Is it day?", "Yes, it is."),
        ("Who watches?", "Nobody does."),
    )
    [(question, answer)] = read_answer("reasoning", f"Q: Why does it run?\nA: {LONG}\n\nSo it is.",
                                       "", CONTEXT)  # fmt: skip
    assert question == "Why does it run?" and answer.endswith("house.\n\nSo it is.")
    assert read_answer("detail", LONG, "What is this?", CONTEXT) == (
        ("What is this?", LONG.strip()),
    )


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("conversation", f"Here it is:\n{TALK}", "a line that begins neither with Q: nor with A:"),
        ("conversation", TALK.replace("A: A dog.\n", ""), "questions and answers do not take"),
        ("conversation", f"{TALK}\nQ: And now?", "the last question has no answer"),
        ("conversation", f"{TALK}\nQ: what runs\nA: It.", "a question is asked twice"),
        ("conversation", TALK[: TALK.index("\nQ: Who")], "too few rounds"),
        ("conversation", TALK.replace("A dog.", "dog " * 121), "an answer too long"),
        ("conversation", TALK.replace("Is it day?", "Why?"), "a question too short"),
        ("conversation", "\n".join(f"Q: Is {i} it?\nA: No." for i in range(11)), "too many rounds"),
        ("conversation", TALK.replace("A dog.", ""), "a line that begins neither"),
        ("reasoning", f"A: {LONG}", "the first line does not begin with Q:"),
        ("reasoning", "Q: Why does it run?", "no answer that begins with A:"),
        ("reasoning", f"Q: Why does it run?\nA: {LONG}\nQ: More?", "more than one question"),
        ("reasoning", "Q: Why does it run?\nA: So.", "an answer too short"),
        ("detail", "A dog.", "an answer too short"),
        ("detail", LONG * 6, "an answer too long"),
        ("detail", f"# Scene\n{LONG}", "headings, lists or questions"),
        ("detail", f"{LONG}\n- a dog", "headings, lists or questions"),
        ("detail", f"The captions say: {LONG}", "speaks of captions"),
        ("detail", f"{LONG} The bounding-box is large.", "speaks of bounding boxes"),
        ("detail", f"{LONG} Its coordinates are known.", "speaks of coordinates"),
        ("detail", f"{LONG} It lies at [0.1, 0.2, 0.3, 0.4].", "lists numbers like a box"),
        ("detail", f"{LONG} It lies at (12, 13).", "lists numbers like a box"),
        ("detail", f"{LONG} It lies at 0.681 from the left.", "holds numbers of the boxes"),
        ("detail", f"{LONG} It lies at 0.68.", "holds numbers of the boxes"),
        ("detail", f"{LONG} It lies at .125.", "holds numbers of the boxes"),
        ("detail", f"{LONG} According to the description it is.", "speaks of the notes"),
        ("detail", f"I\u2019m sorry. {LONG}", "declines or speaks of itself"),
        ("detail", f"As an AI, {LONG}", "declines or speaks of itself"),
        ("detail", f"I can't see it. {LONG}", "declines or speaks of itself"),
        ("detail", f"{LONG}<|im_end|>", "holds marks of a chat template"),
        ("detail", f"{LONG}</s>", "holds marks of a chat template"),
        ("detail", f"<image> {LONG}", "<image> in the text"),
        ("detail", f"{LONG}\ud800", "half of a character"),
        ("detail", f"{LONG}\x07", "a control character"),
        ("detail", " \n", "empty text"),
    ],
)  # fmt: skip
def test_an_invalid_answer_has_a_reason(kind: Kind, text: str, reason: str) -> None:
    with pytest.raises(Invalid) as caught:
        read_answer(kind, text, "What is this?", CONTEXT)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("words", ["about 5.50 euros", "version 10.125", "at 0.7 of it", "2.25 m",
                                   "in 0.33 s", "on 12.05.2001"])  # fmt: skip
def test_other_numbers_are_allowed(words: str) -> None:
    assert read_answer("detail", f"{LONG} It is {words}.", "What is this?", CONTEXT)


def test_the_shipped_prompts_are_valid_and_whole() -> None:
    prompts = load_prompts()
    assert list(prompts) == list(KINDS)
    for kind, prompt in prompts.items():
        assert len(prompt.examples) >= 2 and bool(prompt.questions) == (kind == "detail")
        for example in prompt.examples:
            assert example.context.captions and example.context.boxes
            for line in example.answer.split("\n"):
                assert line == line.strip()
            with pytest.raises(Invalid, match="repeats an example"):
                read_answer(kind, example.answer.upper().replace("A:", "A:"), "What is this?",
                            CONTEXT, prompt.answers)  # fmt: skip
        for word in ("caption", "bounding box", "coordinates"):
            assert word in prompt.system
        assert not any("\n" in question for question in prompt.questions)
        assert BOUNDS[kind].answer[0] < BOUNDS[kind].answer[1]
    assert len(set(prompts["detail"].questions)) >= 10


def test_every_question_for_descriptions_is_drawn() -> None:
    prompt = load_prompts()["detail"]
    drawn = {prompt.question(0, f"{i}.jpg") for i in range(400)}
    assert drawn == set(prompt.questions)
    assert prompt.question(0, "7.jpg") == prompt.question(0, "7.jpg")
    assert prompt.messages(CONTEXT, "Why?")[-1] == (
        "user",
        "A dog runs.\n\ndog: [0.125, 0.250, 0.681, 0.900]\n\nQuestion: Why?",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sistem": "x"}, "detail.yaml: sistem is not a field; did you mean 'system'"),
        ({"system": " "}, "system is empty"),
        ({"questions": []}, "questions is empty"),
        ({"questions": [""]}, "questions holds an empty one"),
        (
            {"examples": [{"captions": ["a"], "answer": "short"}]},
            r"examples\[0\]: answer is not val",
        ),
        ({"examples": [{"captions": ["a"], "boxes": [["dog", 1]], "answer": LONG}]}, "is no box"),
        (
            {"examples": [{"captions": ["a"], "boxes": [["dog", 0, 0, 2, 1]], "answer": LONG}]},
            "leaves the image",
        ),
    ],
)
def test_own_prompts_are_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for kind in KINDS:
        (tmp_path / f"{kind}.yaml").write_bytes((EXAMPLES / f"{kind}.yaml").read_bytes())
    assert prompts_digest(load_prompts(tmp_path)) == prompts_digest(load_prompts())
    path = tmp_path / "detail.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        load_prompts(tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match="check --examples"):
        load_prompts(tmp_path)


def test_broken_lines_of_a_paragraph_become_one() -> None:
    assert flowed("one\n two\n\nthree\n- a\n  b\nQ: c\nd\nA: e\n") == (
        "one two\n\nthree\n- a b\nQ: c d\nA: e"
    )
