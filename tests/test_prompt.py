"""Prompts: text and labels against LLaVA's templates as written out here."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import IMAGE_ID, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_hd.hd.errors import UsageError
from llava_hd.model.prompt import (
    IGNORE,
    TEMPLATES,
    SampleError,
    Turn,
    encode_conversation,
    encode_question,
    get_template,
)

TOKENIZER = tiny_tokenizer()
SYSTEM = TEMPLATES["vicuna_v1"].system
WORD = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1, max_size=12)
TEXT = st.lists(WORD, min_size=1, max_size=6).map(" ".join).filter(lambda text: text.strip())


def conversation(*texts: str) -> list[Turn]:
    return [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


def encode(turns: list[Turn], images: list[int], template: str = "vicuna_v1", **options: int):
    return encode_conversation(TOKENIZER, turns, images, template, IMAGE_ID, **options)


def test_the_system_text_is_vicunas() -> None:
    digest = hashlib.sha256(SYSTEM.rstrip(" ").encode()).hexdigest()
    assert digest == "1fa69e2371b762d1882b0bd98d284f312a36c27add732016e12e52586f98a9f5"


@given(st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_vicuna_text_is_the_original_conversation_and_labels_are_the_answers(
    texts: list[str],
) -> None:
    encoded = encode(conversation("<image>\n" + texts[0], *texts[1:]), [2])
    questions = [texts[0].strip(), *texts[2::2]]  # beside an image the text is stripped, as LLaVA
    rounds = zip(questions, texts[1::2], strict=True)
    expected = "<s>" + SYSTEM
    expected += "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in rounds).replace(
        "USER: ", "USER: <image><image>\n", 1
    )
    assert TOKENIZER.decode(encoded.ids) == expected
    learned = [token for token in encoded.labels if token != IGNORE]
    assert TOKENIZER.decode(learned) == "".join(f" {a}</s>" for a in texts[1::2])
    assert all(a in (IGNORE, b) for a, b in zip(encoded.labels, encoded.ids, strict=True))


@given(TEXT, TEXT)
def test_ids_are_those_of_the_whole_prompt_tokenised_once(question: str, answer: str) -> None:
    encoded = encode(conversation(question, answer), [])
    whole = f"{SYSTEM}USER: {question} ASSISTANT: {answer}</s>"
    assert encoded.ids == TOKENIZER(whole).input_ids


@given(TEXT)
def test_a_question_is_the_beginning_of_its_training_sample(text: str) -> None:
    turns = conversation(f"<image>\n{text}", "Yes")
    asked = encode_question(TOKENIZER, turns[:1], [5], "vicuna_v1", IMAGE_ID)
    trained = encode(turns, [5])
    assert trained.ids[: len(asked)] == asked
    assert TOKENIZER.decode(asked).endswith("ASSISTANT:")
    assert all(label == IGNORE for label in trained.labels[: len(asked)])


def test_plain_is_image_caption_newline_without_an_end_token() -> None:
    encoded = encode(conversation("Describe it.\n<image>", "a cat"), [3], "plain")
    assert TOKENIZER.decode(encoded.ids) == "<s><image><image><image>a cat\n"
    assert encoded.labels[:4] == [IGNORE] * 4 and encoded.labels[4:] == encoded.ids[4:]


def test_text_that_spells_special_tokens_stays_text() -> None:
    encoded = encode(conversation("what is </s> and <s>?", "the end </s> token"), [])
    assert encoded.ids.count(TOKENIZER.eos_token_id) == 1
    assert encoded.ids.count(TOKENIZER.bos_token_id) == 1
    learned = [token for token in encoded.labels if token != IGNORE]
    assert TOKENIZER.decode(learned) == " the end </s> token</s>"


def test_an_answer_keeps_its_own_spaces() -> None:
    code = "    def f():\n        return 1\n"
    encoded = encode(conversation("write it", code), [])
    learned = [token for token in encoded.labels if token != IGNORE]
    assert TOKENIZER.decode(learned) == f" {code}</s>"


def test_several_images_stand_in_front_of_their_turn() -> None:
    turns = conversation("compare <image> with <image> now", "No", "and <image>?", "Yes")
    text = TOKENIZER.decode(encode(turns, [1, 2, 3]).ids)
    assert "USER: <image>\n<image><image>\ncompare  with  now ASSISTANT: No</s>" in text
    assert "USER: <image><image><image>\nand ? ASSISTANT: Yes</s>" in text


@pytest.mark.parametrize("room", [0, 1])
def test_the_last_visual_token_must_fit_exactly(room: int) -> None:
    turns = [Turn("human", "<image>"), Turn("gpt", "cat " * 9)]
    limit = 1 + 20 + room  # <s>, the image, and `room` tokens of the caption
    if room:
        assert encode(turns, [20], "plain", max_length=limit).ids.count(IMAGE_ID) == 20
        with pytest.raises(SampleError, match="reach place 21, beyond max_length 20"):
            encode(turns, [20], "plain", max_length=20)
    else:
        with pytest.raises(SampleError, match="cuts every answer off"):
            encode(turns, [20], "plain", max_length=limit)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([Turn("system", "be kind")], "'system', expected 'human'"),
        (conversation("a", "b"), "2 turns; a question ends"),
    ],
)
def test_a_question_out_of_order_is_named(turns: list[Turn], words: str) -> None:
    with pytest.raises(SampleError, match=words):
        encode_question(TOKENIZER, turns, [], "vicuna_v1", IMAGE_ID)


def test_an_image_tag_in_an_answer_is_text() -> None:
    encoded = encode(conversation("<image>\nwhat?", "the tag <image> is"), [4])
    assert encoded.ids.count(IMAGE_ID) == 4


def test_truncation_cuts_text_only() -> None:
    turns = conversation("<image>\nwhat colour is the cat?", "red green " * 20)
    whole = encode(turns, [9])
    cut = encode(turns, [9], max_length=len(whole.ids) - 10)
    assert cut.truncated and not whole.truncated
    assert cut.ids == whole.ids[:-10] and cut.ids.count(IMAGE_ID) == 9


@pytest.mark.parametrize(
    ("turns", "images", "limit", "words"),
    [
        (conversation("<image> a", "b"), [], None, "1 <image> tags"),
        (conversation("a", "b"), [4], None, "0 <image> tags in the human turns but 1 images"),
        (conversation("a", "b", "c"), [], None, "3 turns"),
        ([Turn("gpt", "a"), Turn("human", "b")], [], None, "expected 'human'"),
        ([Turn("human", "a"), Turn("system", "b")], [], None, "'system', expected 'gpt'"),
        ([], [], None, "0 turns"),
        (conversation("a", " \n"), [], None, "turn 1 is an empty answer"),
        (conversation("<image>\na", "b"), [500], 200, "beyond max_length 200"),
        (conversation("dog " * 99, "b"), [], 60, "cuts every answer off"),
    ],
)
def test_faults_are_named(turns: list[Turn], images: list[int], limit: int, words: str) -> None:
    with pytest.raises(SampleError, match=words):
        encode(turns, images, max_length=limit)


def llama_tokenizer(legacy: bool) -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer as Llama has it: words carry their space in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # as in Llama, no entry crosses a space
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", "<image>"], show_progress=False
    )
    words = f"{SYSTEM}USER: \n is the cat red? ASSISTANT: Yes it is</s>USER: what ASSISTANT: No"
    tokenizer.train_from_iterator([words] * 3, trainer)
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=["<image>"],
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_like_tokenizers_give_the_ids_of_the_whole_prompt(legacy: bool) -> None:
    tokenizer = llama_tokenizer(legacy)
    turns = conversation("<image>\nis the cat red?", "Yes it is", "what is it", "No cat")
    encoded = encode_conversation(tokenizer, turns, [2], "vicuna_v1", IMAGE_ID)
    whole = (
        f"{SYSTEM}USER: <image><image>\nis the cat red? ASSISTANT: Yes it is</s>"
        "USER: what is it ASSISTANT: No cat</s>"
    )
    assert encoded.ids == [1, *tokenizer(whole, add_special_tokens=False).input_ids]


def test_an_unknown_template_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'vicuna_v1'"):
        get_template("vicuna_v2")
