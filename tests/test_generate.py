"""Answers: mixed batches, shared images, the processor's prompts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import random_image, save_llava_next, tiny_hd, tiny_tokenizer

from llava_hd.hd.image import ImageError, save_png
from llava_hd.model import generate as module
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer, answer_batch, pad_left
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import SampleError


@pytest.fixture(scope="module")
def pair(parts: Path) -> tuple[LlavaHD, Processor]:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    return model.eval(), processor


def test_a_mixed_batch_answers_as_each_question_alone(pair) -> None:
    model, processor = pair
    images = [random_image((100, 90), 1), None, random_image((33, 200), 2), random_image((9, 9), 3)]
    questions = ["what colour is the cat?", "the dog is", "is the mat red?", "Yes"]
    together = answer_batch(model, processor, images, questions, max_new_tokens=8)
    alone = [answer(model, processor, i, q, 8) for i, q in zip(images, questions, strict=True)]
    assert together == alone
    assert any(together)


def test_an_image_shared_by_questions_is_read_once(
    pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = pair
    path = tmp_path / "one.png"
    save_png(random_image((60, 60)), path)
    reads = []
    load = module.load_image
    monkeypatch.setattr(
        module, "load_image", lambda source: (reads.append(source), load(source))[1]
    )
    answer_batch(model, processor, [path, str(path), path], ["a", "b", "c"], max_new_tokens=1)
    assert len(reads) == 1


def test_the_same_question_about_the_same_image_is_answered_once(
    pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = pair
    one, two = random_image((60, 60), 1), random_image((60, 60), 2)
    images, questions = [one, two, one, one, None, None], ["a", "a", "a", "b", "a", "a"]
    expected = [answer(model, processor, i, q, 4) for i, q in zip(images, questions, strict=True)]
    sizes: dict[str, list[int]] = {"generate": [], "generate_shared": []}

    def count(name: str) -> None:
        whole = getattr(module, name)

        def counted(model, samples, *rest):
            sizes[name].append(len(samples))
            return whole(model, samples, *rest)

        monkeypatch.setattr(module, name, counted)

    count("generate")
    count("generate_shared")
    assert answer_batch(model, processor, images, questions, 4) == expected
    assert sizes == {"generate": [2], "generate_shared": [2]}


def test_no_question_gives_no_answer(pair) -> None:
    assert answer_batch(*pair, [], []) == []


def test_a_missing_image_is_an_image_error(pair, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png"):
        answer_batch(*pair, [tmp_path / "none.png"], ["a"])


def test_counts_must_agree(pair) -> None:
    with pytest.raises(ValueError, match="1 images for 2 questions"):
        answer_batch(*pair, [None], ["a", "b"])


def test_a_question_gets_its_image_tags_in_front(pair) -> None:
    _, processor = pair
    image = random_image((100, 90))
    plain = processor.question("is it red?", [image])
    tagged = processor.question("<image>\nis it red?", [image])
    assert plain.ids == tagged.ids
    with pytest.raises(SampleError, match="1 <image> tags"):
        processor.question("<image>\nis it red?", [])


def test_generation_stops_before_the_end_token(pair) -> None:
    model, processor = pair
    sample = processor.question("the cat is on the mat")
    never = SimpleNamespace(bos_token_id=1, eos_token_id=2)
    free = module.generate(model, [sample], 6, never)[0]
    assert len(free) == 6
    ends = SimpleNamespace(bos_token_id=1, eos_token_id=free[3])
    cut = module.generate(model, [sample], 6, ends)[0]
    assert cut == free[: free.index(free[3])]


def test_a_transformers_folder_answers_without_conversion(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_llava_next(tmp_path, "hd448")
    tiny_tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    model = LlavaHD.from_pretrained(tmp_path)
    processor = Processor.from_pretrained(tmp_path)
    assert processor.config == model.config
    words = answer(model, processor, random_image((60, 90)), "what is there?", max_new_tokens=4)
    assert (
        words == answer_batch(model, processor, [random_image((60, 90))], ["what is there?"], 4)[0]
    )
    assert capfd.readouterr().err == ""


def test_left_padding_keeps_rows_at_the_right() -> None:
    packed = torch.arange(12.0).reshape(6, 2)
    x, mask = pad_left(packed, [2, 4])
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(x[0, 2:], packed[:2]) and torch.equal(x[1], packed[2:])
