"""Begun answers: tokenised as in training, carried on greedily, alike alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import random_image, save_llava_next, tiny_tokenizer

from llava_hd.hd.image import save_png
from llava_hd.model.continuation import begun, continue_batch
from llava_hd.model.generate import generate
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import SampleError, Turn

Pair = tuple[LlavaHD, Processor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("model")
    save_llava_next(folder, "hd448")
    tiny_tokenizer().save_pretrained(folder)
    return LlavaHD.from_pretrained(folder), Processor.from_pretrained(folder)


def test_a_begun_answer_is_a_training_sample_without_its_end(pair: Pair) -> None:
    _, processor = pair
    image = random_image((50, 70))
    sample = begun(processor, image, "what colour is the cat?", "red ###\nANSWER:")
    turns = [Turn("human", "<image>\nwhat colour is the cat?"), Turn("gpt", "red ###\nANSWER:")]
    whole = processor.conversation(turns, [image])
    assert [*sample.ids, processor.tokenizer.eos_token_id] == list(whole.ids)
    question = processor.question("what colour is the cat?", [image])
    assert list(sample.ids[: len(question.ids)]) == list(question.ids)


def test_answers_go_on_greedily_behind_their_beginnings(pair: Pair, tmp_path: Path) -> None:
    model, processor = pair
    path = tmp_path / "a.png"
    save_png(random_image((60, 60), 1), path)
    images = [path, None, random_image((33, 120), 2)]
    questions, beginnings = ["a cat?", "the dog", "red?"], ["Yes", "No the mat", "on"]
    together = continue_batch(model, processor, images, questions, beginnings, 6)
    alone = [
        continue_batch(model, processor, [i], [q], [b], 6)[0]
        for i, q, b in zip(images, questions, beginnings, strict=True)
    ]
    assert together == alone
    assert any(together)


def test_what_a_model_would_say_itself_changes_nothing(pair: Pair) -> None:
    """Begun with its own first tokens, a model says the rest of what it says anyway."""
    model, processor = pair
    sample = begun(processor, None, "the dog is on the mat", "Yes")
    with torch.inference_mode():
        [tokens] = generate(model, [sample], 6, processor.tokenizer)
    assert len(tokens) > 2
    longer = replace(sample, ids=[*sample.ids, *tokens[:2]], labels=[*sample.labels, *([-100] * 2)])
    [rest] = generate(model, [longer], 4, processor.tokenizer)
    assert tokens[2:] == rest[: len(tokens) - 2]


def test_nothing_to_continue_and_empty_beginnings(pair: Pair) -> None:
    assert continue_batch(*pair, [], [], [], 4) == []
    with pytest.raises(SampleError):
        continue_batch(*pair, [None], ["a"], [""], 4)
