"""Chat sessions: the tokens of answering afresh, only new tokens read, nothing broken by a stop."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import random_image, text_config, tiny_hd
from transformers import LlamaForCausalLM

from llava_hd.hd.errors import UsageError
from llava_hd.model.assemble import assemble
from llava_hd.model.chat import ChatSession, ContextFull, Usage
from llava_hd.model.generate import generate
from llava_hd.model.kept import HEADROOM, GrowingLayer
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import Sample
from llava_hd.model.prefix import PrefixNotSharedWarning
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import IMAGE_TAG, SampleError, Turn
from llava_hd.model.stream import Piece, Sampling, chat_sample

Pair = tuple[LlavaHD, Processor]


@pytest.fixture(scope="module")
def pair(parts: Path) -> Pair:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    return model.eval(), processor


@pytest.fixture
def session(pair: Pair) -> ChatSession:
    return ChatSession(*pair)


def text_of(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def afresh(session: ChatSession) -> Sample:
    """The conversation up to its last question, as one prompt."""
    turns, images = [], []
    for exchange in session.history:
        tags = f"{IMAGE_TAG}\n" * len(exchange.images)
        turns += [Turn("human", tags + exchange.question), Turn("gpt", exchange.answer)]
        images += [image.cut for image in exchange.images]
    return chat_sample(session.processor, turns[:-1], images, session.system)


def answer_afresh(session: ChatSession, steps: int) -> str:
    """transformers' own generate, on the whole conversation."""
    ids = generate(session.model, [afresh(session)], steps, session.processor.tokenizer)[0]
    return session.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


class Reads:
    """Lengths of what the language model reads, pass by pass, and tiles that the tower sees."""

    def __init__(self, model: LlavaHD) -> None:
        self.lengths: list[int] = []
        self.tiles: list[int] = []
        layer = model.language.causal_lm.get_decoder()
        self.hooks = [
            layer.register_forward_pre_hook(
                lambda _, __, given: self.lengths.append(given["inputs_embeds"].shape[1]),
                with_kwargs=True,
            ),
            model.vision.register_forward_pre_hook(lambda _, x: self.tiles.append(len(x[0]))),
        ]

    def __enter__(self) -> Reads:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


TURNS: list[tuple[str, list[tuple[int, int]]]] = [
    ("what is on the mat?", [(60, 90)]),
    ("is there a dog?", []),
    ("ünï 猫, and in these?", [(33, 200), (112, 112)]),
    ("", []),
    ("</s> or <s>", []),
]


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("first_image", [True, False])
def test_every_turn_has_the_tokens_of_the_whole_conversation_afresh(
    parts: Path, attention: str, first_image: bool
) -> None:
    model, processor = assemble(
        vision=parts / "vision",
        language=parts / "language",
        hd=tiny_hd("hdflex"),
        attention=attention,
    )
    session = ChatSession(model.eval(), processor)
    for number, (question, sizes) in enumerate(TURNS if first_image else TURNS[1:]):
        images = [session.image(random_image(size, number)) for size in sizes]
        said = text_of(session.ask(question, images, 12))
        assert session.history[-1].answer == said == answer_afresh(session, 12)
        assert session.usage is not None
        assert session.usage.prompt_tokens == len(afresh(session).ids)
    assert len({exchange.answer for exchange in session.history}) > 1


def test_a_turn_reads_only_what_is_new(session: ChatSession) -> None:
    image = session.image(random_image((60, 90)))
    with Reads(session.model) as first:
        text_of(session.ask("what is on the mat?", [image], 6))
    assert first.tiles == [image.cut.plan.num_tiles]
    assert first.lengths == [len(afresh(session).ids), *[1] * 5]
    before = len(afresh(session).ids)
    with Reads(session.model) as second:
        text_of(session.ask("is there a dog?", max_new_tokens=6))
    now = len(afresh(session).ids)
    assert second.tiles == []
    assert session.usage == Usage(now, now - second.lengths[0])
    assert session.usage.kept_tokens >= before  # the image and the question are not read again
    other = session.image(random_image((60, 90), 1))
    with Reads(session.model) as third:
        text_of(session.ask("and here?", [other], 6))
    assert third.tiles == [other.cut.plan.num_tiles]
    assert third.lengths[0] < now


def test_nothing_is_kept_of_another_image_of_the_same_size(pair: Pair) -> None:
    session = ChatSession(*pair)
    one, two = (session.image(random_image((60, 60), seed)) for seed in (1, 2))
    text_of(session.ask("what colour?", [one], 4))
    kept = session._kept
    session.reset()
    assert session.history == () and session.usage is None and session.messages() == []
    session._kept = kept  # as after a conversation that began with the other image
    said = text_of(session.ask("what colour?", [two], 8))
    assert session.usage is not None
    start = afresh(session).ids.index(pair[0].config.image_token_id)
    assert session.usage.kept_tokens == start
    assert said == answer_afresh(session, 8)


def test_a_history_that_was_retokenised_is_read_again_from_there(session: ChatSession) -> None:
    text_of(session.ask("the cat", max_new_tokens=8))
    assert session._kept is not None
    read = session._kept.ids
    at = 7
    session._kept.ids = [*read[:at], read[at] + 1, *read[at + 1 :]]
    said = text_of(session.ask("the dog", max_new_tokens=8))
    assert session.usage is not None and session.usage.kept_tokens == at
    assert said == answer_afresh(session, 8)


def test_an_answer_that_is_cancelled_stays_as_far_as_it_was_said(session: ChatSession) -> None:
    found = []
    for piece in session.ask("the cat is on the mat", max_new_tokens=64):
        found.append(piece)
        if piece.num_tokens >= 4:
            session.cancel()
    assert found[-1].finish == "cancelled" and found[-1].num_tokens < 8
    [exchange] = session.history
    assert exchange.finish == "cancelled"
    assert exchange.answer == "".join(piece.text for piece in found)
    said = text_of(session.ask("go on", max_new_tokens=8))
    assert said == answer_afresh(session, 8)


def test_a_closed_iterator_is_a_cancelled_answer(session: ChatSession) -> None:
    pieces = session.ask("the cat is on the mat", max_new_tokens=64)
    first = next(pieces)
    with pytest.raises(UsageError, match="still running"):
        session.ask("and the dog?")
    with pytest.raises(UsageError, match="still running"):
        session.reset()
    pieces.close()
    assert [(e.answer, e.finish) for e in session.history] == [(first.text, "cancelled")]
    assert text_of(session.ask("go on", max_new_tokens=8)) == answer_afresh(session, 8)


def test_a_question_cancelled_before_anything_is_said_is_withdrawn(session: ChatSession) -> None:
    pieces = session.ask("the cat", max_new_tokens=8)
    session.cancel()
    assert [(piece.text, piece.finish) for piece in pieces] == [("", "cancelled")]
    assert session.history == ()
    never_begun = session.ask("the cat", max_new_tokens=8)
    text_of(session.ask("the dog", max_new_tokens=8))
    with pytest.raises(UsageError, match="gone on"):
        next(never_begun)
    assert [exchange.question for exchange in session.history] == ["the dog"]


def test_another_thread_may_cancel(session: ChatSession) -> None:
    begun = threading.Event()

    def stop() -> None:
        begun.wait()
        session.cancel()

    thread = threading.Thread(target=stop)
    thread.start()
    found = []
    for piece in session.ask("the cat", max_new_tokens=2**20):
        found.append(piece)
        begun.set()
    thread.join()
    assert found[-1].finish in ("cancelled", "length")
    assert session.history


def test_an_error_in_the_middle_of_an_answer_leaves_the_session_as_it_was(
    session: ChatSession,
) -> None:
    text_of(session.ask("the cat", max_new_tokens=8))
    before = session.messages()
    layers = session.model.language.causal_lm.get_decoder().layers
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise MemoryError("no room")

    hook = layers[1].register_forward_pre_hook(fail)  # layer 0 has its keys already
    pieces = session.ask("the dog", max_new_tokens=8)
    with pytest.raises(MemoryError):
        list(pieces)
    hook.remove()
    assert session.messages() == before
    assert text_of(session.ask("the mat", max_new_tokens=8)) == answer_afresh(session, 8)


def test_a_conversation_longer_than_the_model_reads_is_refused_and_goes_on(parts: Path) -> None:
    hd = tiny_hd("hd448")
    model, processor = assemble(vision=parts / "vision", language=parts / "language", hd=hd)
    model.config.text["max_position_embeddings"] = 200
    session = ChatSession(model.eval(), processor)
    image = session.image(random_image((80, 80)))
    with pytest.raises(ContextFull, match=r"but the model reads 200; reset the conversation"):
        session.ask("and these?", [image, image, image])
    assert session.history == () and session.usage is None
    room = 200 - len(session._sample("hi", []).ids)
    assert list(session.ask("hi", max_new_tokens=10**6))[-1].num_tokens == room
    with pytest.raises(ContextFull):
        session.ask("hi again")
    session.reset()
    assert text_of(session.ask("is there a cat?", max_new_tokens=4))


def test_the_store_grows_with_the_conversation_and_not_beyond_the_context(pair: Pair) -> None:
    session = ChatSession(*pair)
    text_of(session.ask("the cat", max_new_tokens=8))
    assert session._kept is not None
    [layer, *_] = session._kept.cache.layers
    assert session.usage is not None
    rooms = [layer.room]
    assert rooms == [session.usage.prompt_tokens + HEADROOM]
    while len(session.history) < 12:
        text_of(session.ask("the dog is on the mat " * 8, max_new_tokens=2))
        rooms.append(layer.room)
    grown = list(dict.fromkeys(rooms))
    assert len(grown) > 2 and grown[1] == 2 * grown[0] and grown[-1] <= 2048
    assert text_of(session.ask("and now?", max_new_tokens=8)) == answer_afresh(session, 8)
    assert GrowingLayer(256, 300)._roomy(200, 512) == 300


def test_an_image_tag_in_the_text_is_refused(session: ChatSession) -> None:
    with pytest.raises(SampleError, match=r"the text holds <image>.*leave it out"):
        session.ask("what is in <image>?")
    with pytest.raises(SampleError, match=r"the system text holds <image>"):
        ChatSession(session.model, session.processor, "look at <image>")
    assert session.history == ()


def test_the_conversation_as_data(pair: Pair) -> None:
    session = ChatSession(*pair, system="Be brief.")
    image = session.image(random_image((60, 90)), "cat.png")
    said = text_of(session.ask("red?", [image], 3))
    plan = image.cut.plan
    assert session.messages() == [
        {
            "role": "user",
            "text": "red?",
            "images": [
                {
                    "name": "cat.png",
                    "size": [60, 90],
                    "grid": list(plan.grid),
                    "num_tokens": plan.num_tokens,
                }
            ],
        },
        {"role": "assistant", "text": said, "num_tokens": 3, "finish": "length"},
    ]
    assert pair[1].tokenizer.decode(afresh(session).ids[:4]).startswith("<s>Be")


def test_drawn_answers_and_stops_are_those_of_the_stream(session: ChatSession) -> None:
    sampling = Sampling(temperature=2.0, seed=3)
    one = text_of(session.ask("the dog", max_new_tokens=16, sampling=sampling))
    session.drop_cache()
    session.reset()
    assert text_of(session.ask("the dog", max_new_tokens=16, sampling=sampling)) == one
    session.reset()
    stop = one[3:5]
    said = text_of(session.ask("the dog", (), 16, sampling, stops=[stop]))
    assert said == one[: one.index(stop)].rstrip()
    assert session.history[-1].finish == "stop"


def test_where_nothing_can_be_kept_the_turns_are_read_again(pair: Pair) -> None:
    model, processor = pair
    rotated = text_config()
    rotated.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    longer = LlavaHD(model.config, model.vision.clip, LlamaForCausalLM(rotated)).eval()
    with pytest.warns(PrefixNotSharedWarning, match="rotary frequencies"):
        session = ChatSession(longer, processor)
    for question in ("the cat", "the dog"):
        said = text_of(session.ask(question, max_new_tokens=6))
        assert said == answer_afresh(session, 6)
        assert session.usage is not None and session.usage.kept_tokens == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChatSession(model, processor)
