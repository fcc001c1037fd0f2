"""Answers piece by piece: the same tokens as `answer`, stops, sampling, several turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import random_image, tiny_hd

from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer, context_length, end_tokens
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import SampleError, Turn
from llava_hd.model.stream import (
    Piece,
    Sampling,
    chat_sample,
    choose,
    cut_at,
    text_stream,
    token_stream,
)


@pytest.fixture(scope="module")
def pair(parts: Path) -> tuple[LlavaHD, Processor]:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    return model.eval(), processor


def pieces(pair: tuple[LlavaHD, Processor], question: str, count: int, **more) -> list[Piece]:
    model, processor = pair
    sample = processor.question(question)
    return list(text_stream(model, processor.tokenizer, sample, count, **more))


@pytest.mark.parametrize("size", [None, (60, 90), (33, 200)])
def test_the_pieces_of_a_greedy_answer_are_the_answer(pair, size) -> None:
    model, processor = pair
    image = None if size is None else random_image(size)
    sample = processor.question("what is on the mat?", [] if image is None else [image])
    found = list(text_stream(model, processor.tokenizer, sample, 12))
    assert "".join(piece.text for piece in found) == answer(
        model, processor, image, "what is on the mat?", 12
    )
    assert [piece.finish for piece in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1].finish == "length" and found[-1].num_tokens == 12


def test_an_end_token_ends_the_answer_with_stop(pair) -> None:
    model, processor = pair
    sample = processor.question("the cat is on the mat")
    free = list(token_stream(model, sample, 6, ends=[2]))
    assert len(free) == 6
    assert list(token_stream(model, sample, 6, ends=[free[3]])) == free[: free.index(free[3])]
    assert end_tokens(model, processor.tokenizer) == [2]


def test_text_from_the_first_stop_on_is_never_sent(pair) -> None:
    whole = "".join(piece.text for piece in pieces(pair, "the dog", 24))
    assert len(whole) > 8
    stop = whole[5:8]
    found = pieces(pair, "the dog", 24, stops=["not in it", stop])
    assert "".join(piece.text for piece in found) == whole[: whole.index(stop)].rstrip()
    assert found[-1].finish == "stop"
    assert cut_at("one two", ["two", "one"]) == "" and cut_at("one", ["two", ""]) is None


def test_the_same_seed_draws_the_same_answer(pair) -> None:
    def drawn(seed: int) -> str:
        sampling = Sampling(temperature=2.0, seed=seed)
        return "".join(piece.text for piece in pieces(pair, "the dog", 16, sampling=sampling))

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_top_p_leaves_only_the_likeliest_tokens() -> None:
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    generator = torch.Generator().manual_seed(0)

    def seen(top_p: float) -> set[int]:
        sampling = Sampling(1.0, top_p)
        return {choose(logits, sampling, generator) for _ in range(200)}

    assert seen(0.5) == {1} and seen(0.7) == {1, 2} and seen(1.0) == {0, 1, 2}
    assert choose(logits, Sampling(), None) == 1


def test_no_temperature_is_too_low() -> None:
    logits = torch.tensor([-60.0, 50.0, 49.0])
    for temperature in (1e-300, 1e-45, 1e-40, 1e-38, 1e-7, 1e-6, 1e-3):
        assert choose(logits, Sampling(temperature), None) == 1


def test_a_conversation_has_its_turns_and_its_images_in_the_prompt(pair) -> None:
    model, processor = pair
    one, two = random_image((60, 60), 1), random_image((60, 90), 2)
    turns = [Turn("human", "<image>\nred?"), Turn("gpt", "Yes"), Turn("human", "<image> and this?")]
    sample = chat_sample(processor, turns, [one, two])
    tokenizer = processor.tokenizer
    text = tokenizer.decode([i for i in sample.ids if i != processor.config.image_token_id])
    assert "USER: \nred? ASSISTANT: Yes</s>USER: \nand this? ASSISTANT:" in text
    assert len(sample.plans) == 2
    assert list(text_stream(model, tokenizer, sample, 2))[-1].num_tokens == 2
    with pytest.raises(SampleError, match="2 <image> tags"):
        chat_sample(processor, turns, [one])
    own = chat_sample(processor, [Turn("human", "hi")], [], system="Be brief.")
    assert tokenizer.decode(own.ids) == "<s>Be brief. USER: hi ASSISTANT:"
    assert context_length(model) == 2048
