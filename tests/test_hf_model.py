"""LlavaHDProcessor and the auto classes, for every preset, paper's ones too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_files import native
from tiny import IMAGE_ID, random_image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.processing_utils import ProcessorMixin

from llava_hd.hd.errors import UsageError
from llava_hd.model.generate import answer_batch
from llava_hd.model.hf_model import LlavaHDForConditionalGeneration
from llava_hd.model.hf_processor import LlavaHDProcessor
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import pack
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import SampleError

QUESTIONS = ["What is it?", "Is there a cat?", "No image here"]


@pytest.fixture(scope="module", params=["hd448", "hdflex-paper", "base"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native(tmp_path_factory.mktemp("hf") / "model", request.param)


def chats(count: int) -> list[list[dict[str, object]]]:
    """`count` questions, the last of three without an image."""
    made = []
    for question in QUESTIONS[:count]:
        images = [] if question == QUESTIONS[2] else [{"type": "image"}]
        content = [*images, {"type": "text", "text": question}]
        made.append([{"role": "user", "content": content}])
    return made


def images() -> list[object]:
    return [random_image((120, 160), 1), random_image((33, 200), 2)]


def test_the_auto_classes_know_our_folders(folder: Path) -> None:
    assert AutoConfig.from_pretrained(folder).model_type == "llava_hd"
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, LlavaHDProcessor) and isinstance(processor, ProcessorMixin)
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder)
        assert isinstance(model, LlavaHDForConditionalGeneration)
    expected = LlavaHD.from_pretrained(folder).state_dict()
    found = model.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_llama_tokenizer_begins_with_the_first_token(tmp_path: Path) -> None:
    folder = native(tmp_path / "model", "hd448", legacy=True)
    processor = AutoProcessor.from_pretrained(folder)
    [text] = processor.apply_chat_template(chats(1), add_generation_prompt=True)
    made = processor(images=images()[0], text=text)
    sample = Processor.from_pretrained(folder).question(QUESTIONS[0], images()[:1])
    assert made["input_ids"][0] == list(sample.ids) and sample.ids[0] == 1


@torch.inference_mode()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_logits_that_each_question_has_alone(
    folder: Path, side: str
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    ours = Processor.from_pretrained(folder)
    texts = processor.apply_chat_template(chats(3), add_generation_prompt=True)
    processor.tokenizer.padding_side = side
    inputs = processor(images=images(), text=texts, padding=True, return_tensors="pt")
    logits = model(**inputs).logits
    for number, question in enumerate(QUESTIONS):
        sample = ours.question(question, images()[number : number + 1])
        mask = inputs["attention_mask"][number].bool()
        assert inputs["input_ids"][number][mask].tolist() == list(sample.ids)
        alone = model.model.logits(pack([sample], ours.config))
        torch.testing.assert_close(logits[number][mask], alone, rtol=1e-5, atol=1e-5)
        assert not logits[number][~mask].any()


def test_the_loss_is_the_mean_over_labels_and_learns(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    texts = processor.apply_chat_template(chats(2), add_generation_prompt=True)
    inputs = processor(images=images(), text=texts, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[(labels == IMAGE_ID) | (inputs["attention_mask"] == 0)] = -100
    out = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    total = model(**inputs, labels=labels, num_items_in_batch=1).loss
    torch.testing.assert_close(total, expected * (labels[:, 1:] != -100).sum(), rtol=1e-4, atol=0)
    out.loss.backward()
    assert model.model.projector.bias_2.grad.abs().sum() > 0


def test_generate_gives_our_answers(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    texts = processor.apply_chat_template(chats(3), add_generation_prompt=True)
    inputs = processor(images=images(), text=texts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    said = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    ours = Processor.from_pretrained(folder)
    assert said == answer_batch(model.model, ours, [*images(), None], QUESTIONS, 8)


def test_messages_with_their_images_become_tensors(folder: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    random_image((60, 90)).save(tmp_path / "a.png")
    content = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "text", "text": "What is it?"},
    ]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ours = Processor.from_pretrained(folder)
    sample = ours.question("What is it?", [random_image((60, 90))])
    assert made["input_ids"][0].tolist() == list(sample.ids)
    assert torch.equal(made["pixel_values"], sample.tiles[0])
    assert made["pixel_values"].dtype == torch.uint8 and made["image_sizes"].tolist() == [[60, 90]]


def test_saved_and_loaded_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert AutoProcessor.from_pretrained(tmp_path).chat_template.count("USER: ") == 1


def test_wrong_calls_are_named(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    with pytest.raises(SampleError, match="1 <image> tags in the texts but 2 images"):
        processor(images=images(), text="<image> a")
    with pytest.raises(SampleError, match="visual tokens are left"):
        processor(images=images()[:1], text="<image> a", truncation=True, max_length=10)
    with pytest.raises(UsageError, match="needs text"):
        processor(images=images())
    with pytest.raises(UsageError, match="give 'pt'"):
        processor(text="a", return_tensors="np")


def test_one_text_and_nested_images_are_taken(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    flat = processor(images=images(), text=["<image> a", "<image> b"])
    nested = processor(images=[[one] for one in images()], text=["<image> a", "<image> b"])
    assert flat["input_ids"] == nested["input_ids"]
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert "pixel_values" not in processor(text="only words")


def test_options_that_would_change_the_model_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="does not know load_in_4bit"):
        AutoModelForImageTextToText.from_pretrained(folder, load_in_4bit=True)
    with pytest.raises(UsageError, match="did you mean 'sdpa'"):
        AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="spda")
