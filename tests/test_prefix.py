"""Shared prefixes: the tokens of each question alone, with the image read and stored once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from test_language import FAMILIES, build, causal_lm
from test_llava_hd import next_inputs
from tiny import IMAGE_ID, random_image, save_llava_next, text_config, tiny_hd, tiny_tokenizer
from transformers import AutoModelForCausalLM

from llava_hd.model import prefix as module
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer, answer_batch, end_tokens, generate
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import Sample, pack
from llava_hd.model.prefix import (
    Places,
    PrefixNotSharedWarning,
    SharedReader,
    generate_shared,
    shared_length,
    sharing_refusal,
)
from llava_hd.model.processor import Processor

NEVER = (2,)
QUESTIONS = [
    "is there a cat on the mat?",
    "is there a dog?",
    "is there",
    "is there ",
    "what colour is the mat, and is there a dog on it or not?",
    "Yes",
    "",
    "\n\n",
    "ünï 猫 \u2028?",
    "does it say </s> or <s>?",
    "is the <image> red?",  # the tag goes to the front
]


@pytest.fixture(scope="module")
def pair(parts: Path) -> tuple[LlavaHD, Processor]:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    return model.eval(), processor


def asked(processor: Processor, questions: list[str], seed: int = 0) -> list[Sample]:
    """Questions about one image of noise."""
    cut = processor.cut(random_image((100, 90), seed))
    return [processor.question(question, [cut]) for question in questions]


def alone(model: LlavaHD, samples: list[Sample], steps: int) -> list[list[int]]:
    return [generate(model, [sample], steps, tiny_tokenizer())[0] for sample in samples]


def about_one_image(model: LlavaHD, rows: list[list[int]]) -> list[Sample]:
    """Prompts of ids about one image, for language models of other vocabularies."""
    processor = Processor(tiny_tokenizer(), model.config)
    cut = processor.cut(random_image((60, 60)))
    image = [1, 7, 8, *[IMAGE_ID] * cut.plan.num_tokens, 9]
    samples = [[*image, *row] for row in rows]
    return [Sample(ids, [-100] * len(ids), (cut.plan,), (cut.tiles,)) for ids in samples]


ROWS = [[20, 21, 22], [20, 21], [20, 30, 31, 32, 33, 34], [40], [20, 21, 22, 23]]


def test_every_question_gets_the_tokens_that_it_gets_alone(pair) -> None:
    model, processor = pair
    samples = asked(processor, QUESTIONS)
    expected = alone(model, samples, 12)
    assert generate_shared(model, samples, 12, NEVER) == expected
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[kind for kind, _ in FAMILIES])
def test_a_family_shares_as_it_reads_alone(kind: str, options: dict, attention: str) -> None:
    model = build(causal_lm(kind, attention, **options))
    samples = about_one_image(model, ROWS)
    assert sharing_refusal(model.language.causal_lm) is None
    assert generate_shared(model, samples, 8, NEVER) == alone(model, samples, 8)


@torch.no_grad()
def test_the_shared_tokens_are_llava_nexts(tmp_path: Path) -> None:
    theirs = save_llava_next(tmp_path, "hd448")
    ours = LlavaHD.from_pretrained(tmp_path)
    processor = Processor(tiny_tokenizer(), ours.config)
    samples = asked(processor, QUESTIONS)
    inputs = next_inputs(theirs, (100, 90))
    expected = []
    for sample in samples:
        ids = torch.tensor([sample.ids])
        row = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            max_new_tokens=12,
            do_sample=False,
        )[0, ids.shape[1] :].tolist()
        expected.append(row[: row.index(2)] if 2 in row else row)
    assert generate_shared(ours, samples, 12, NEVER) == expected
    assert len({tuple(row) for row in expected}) > 1


@torch.inference_mode()
def test_shared_logits_are_those_of_the_whole_prompts(pair) -> None:
    model, processor = pair
    samples = asked(processor, QUESTIONS)
    length = shared_length(samples, model.config.image_token_id)
    prefix = Sample(samples[0].ids[:length], [-100] * length, samples[0].plans, samples[0].tiles)
    reader = SharedReader(model, prefix, room=sum(len(sample.ids) for sample in samples))
    own = [sample.ids[length:] for sample in samples]
    new = Places.joined(
        [Places.of(n, range(length, length + len(ids)), model.device) for n, ids in enumerate(own)]
    )
    hidden = reader._step(torch.tensor([token for ids in own for token in ids]), new)
    for sample, part in zip(samples, hidden.split([len(ids) for ids in own]), strict=True):
        whole = model.hidden(pack([sample], model.config))[length:]
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


def test_the_image_is_encoded_once_and_its_keys_stand_once(pair, monkeypatch) -> None:
    model, processor = pair
    samples = asked(processor, QUESTIONS)
    tiles: list[int] = []
    hook = model.vision.register_forward_hook(lambda _, x, __: tiles.append(len(x[0])))
    readers: list[SharedReader] = []

    class Seen(SharedReader):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            readers.append(self)
            self.stores = [layer.stores[0].data_ptr() for layer in self.cache.layers]

    monkeypatch.setattr(module, "SharedReader", Seen)
    steps = 5
    assert generate_shared(model, samples, steps, NEVER) is not None
    hook.remove()
    assert tiles == [len(samples[0].tiles[0])]
    [reader] = readers
    length = shared_length(samples, model.config.image_token_id)
    assert reader.length == length
    own = sum(len(sample.ids) - length for sample in samples)
    for layer, store in zip(reader.cache.layers, reader.stores, strict=True):
        batch, _, places, _ = layer.keys.shape
        assert batch == 1
        assert length + own < places <= length + own + len(samples) * (steps - 1)
        assert layer.keys.data_ptr() == layer.stores[0].data_ptr() == store


def test_the_last_layer_reads_the_prefix_no_further_than_its_keys(pair) -> None:
    model, processor = pair
    samples = asked(processor, QUESTIONS)
    length = shared_length(samples, model.config.image_token_id)
    layers = model.language.causal_lm.model.layers
    rows: dict[str, list[int]] = {"first": [], "last": []}
    hooks = [
        layer.mlp.register_forward_hook(
            lambda _, x, __, name=name: rows[name].append(x[0].shape[1])
        )
        for name, layer in (("first", layers[0]), ("last", layers[-1]))
    ]
    assert generate_shared(model, samples, 3, NEVER) is not None
    for hook in hooks:
        hook.remove()
    own = sum(len(sample.ids) - length for sample in samples)
    assert rows["last"] == [own, len(samples), len(samples)]
    assert rows["first"] == [length, *rows["last"]]


def test_an_end_token_ends_its_question_and_no_other(pair) -> None:
    model, processor = pair
    samples = asked(processor, QUESTIONS)
    free = alone(model, samples, 10)
    ends = [free[0][4], free[1][2]]
    cut = [next((row[:i] for i, x in enumerate(row) if x in ends), row) for row in free]
    assert generate_shared(model, samples, 10, ends) == cut
    assert len({len(row) for row in cut}) > 1


def test_many_questions_are_read_in_passes_behind_one_prefix(pair, monkeypatch) -> None:
    model, processor = pair
    samples = asked(processor, QUESTIONS)
    expected = alone(model, samples, 6)
    for most in (1, 2, 5):
        monkeypatch.setattr(module, "MOST_QUESTIONS", most)
        assert generate_shared(model, samples, 6, NEVER) == expected


def test_prefix_and_rest_are_the_prompt_and_leave_a_token_to_each(pair) -> None:
    _, processor = pair
    samples = asked(processor, QUESTIONS)
    length = shared_length(samples, IMAGE_ID)
    visual = samples[0].plans[0].num_tokens
    for sample in samples:
        assert len(sample.ids) > length
        assert list(sample.ids[:length]) == list(samples[0].ids[:length])
        assert sum(token == IMAGE_ID for token in sample.ids[:length]) == visual
    assert len({sample.ids[length] for sample in samples}) > 1  # and it is the longest one
    begun = about_one_image(build(causal_lm("llama")), [[20, 21], [20, 21, 22]])
    assert shared_length(begun, IMAGE_ID) == len(begun[0].ids) - 1


def test_other_images_are_not_shared(pair) -> None:
    _, processor = pair
    both = [*asked(processor, ["a"], seed=0), *asked(processor, ["a"], seed=1)]
    with pytest.raises(ValueError, match="not about the same image"):
        shared_length(both, IMAGE_ID)
    same = asked(processor, ["a", "b"])
    bent = Sample([1, 5, *same[1].ids[1:]], [-100] * (len(same[1].ids) + 1), *_seen(same[1]))
    with pytest.raises(ValueError, match="differ before the end of the image"):
        shared_length([same[0], bent], IMAGE_ID)
    with pytest.raises(ValueError, match="differ from their first token on"):
        shared_length([Sample([5, 6], [-100] * 2), Sample([7, 6], [-100] * 2)], IMAGE_ID)


def _seen(sample: Sample) -> tuple:
    return sample.plans, sample.tiles


def test_a_token_sees_the_prefix_and_its_own_question() -> None:
    new = Places(torch.tensor([0, 0, 1]), torch.tensor([2, 3, 2]))
    seen = Places.joined([Places.of(-1, range(2), torch.device("cpu")), new])
    assert new.sees(seen).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("kind", "attention", "options", "words"),
    [
        (
            "mistral",
            "sdpa",
            {"sliding_window": 4},
            "layers see the whole prompt .sliding window of 4",
        ),
        (
            "llama",
            "auto",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "frequencies depend on the length",
        ),
    ],
)
def test_where_it_cannot_be_shared_it_says_so(
    kind: str, attention: str, options: dict, words: str
) -> None:
    model = build(causal_lm(kind, attention, **options))
    samples = about_one_image(model, ROWS)
    with pytest.warns(PrefixNotSharedWarning, match=words):
        assert generate_shared(model, samples, 4, NEVER) is None


def test_prompts_that_cannot_be_shared_are_answered_whole(pair, monkeypatch) -> None:
    model, processor = pair
    image = random_image((60, 60))
    expected = [answer(model, processor, image, question, 5) for question in QUESTIONS[:4]]
    monkeypatch.setattr(module, "FIXED_ROTATIONS", ())
    with pytest.warns(PrefixNotSharedWarning, match="read again for each question"):
        found = answer_batch(model, processor, [image] * 4, QUESTIONS[:4], 5)
    assert found == expected


def test_a_mixed_batch_shares_per_image_and_keeps_its_order(pair, monkeypatch) -> None:
    model, processor = pair
    one, two, three = (random_image((60, 40 + 30 * n), n) for n in range(3))
    images = [one, None, two, one, three, two, one, None]
    questions = QUESTIONS[: len(images)]
    expected = [answer(model, processor, i, q, 6) for i, q in zip(images, questions, strict=True)]
    shared: list[int] = []

    def counted(model: LlavaHD, samples: list[Sample], *rest: object) -> list[list[int]] | None:
        shared.append(len(samples))
        return generate_shared(model, samples, *rest)

    monkeypatch.setattr("llava_hd.model.generate.generate_shared", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer_batch(model, processor, images, questions, 6) == expected
    assert shared == [3, 2]


def test_every_attention_that_is_not_known_to_take_masks_is_refused() -> None:
    language = AutoModelForCausalLM.from_config(text_config())
    assert sharing_refusal(language) is None
    language.config._attn_implementation_internal = "flash_attention_2"
    assert "choose attention=auto" in str(sharing_refusal(language))


def test_ends_are_the_models(pair) -> None:
    model, processor = pair
    samples = asked(processor, QUESTIONS[:3])
    ends = end_tokens(model, processor.tokenizer)
    assert generate_shared(model, samples, 7, ends) == alone(model, samples, 7)
