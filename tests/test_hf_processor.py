"""LlavaHDProcessor under transformers' and TRL's conventions, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_files import native
from tiny import IMAGE_ID, random_image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from llava_hd.hd.errors import UsageError
from llava_hd.model.hf_model import LlavaHDForConditionalGeneration
from llava_hd.model.hf_processor import LlavaHDProcessor
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import SampleError, Turn

TALK = [("user", "What is it?"), ("assistant", "A cat."), ("user", "Red?"), ("assistant", "No")]


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native(tmp_path_factory.mktemp("hf") / "model", "hdflex")


@pytest.fixture(scope="module", name="llama_folder")
def llama_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native(tmp_path_factory.mktemp("hf") / "llama", "hd448", legacy=True)


@pytest.fixture(scope="module", name="model")
def model_fixture(folder: Path) -> LlavaHDForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(folder)


def talk(images: int) -> list[dict[str, Any]]:
    """A conversation, its images in the first turn."""
    made = []
    for number, (role, text) in enumerate(TALK):
        pictures = [{"type": "image", "image": picture(i)} for i in range(images)]
        content = [*(pictures if number == 0 else []), {"type": "text", "text": text}]
        made.append({"role": role, "content": content})
    return made


def picture(seed: int) -> Any:
    return random_image((60 + 70 * seed, 90), seed)


@pytest.mark.parametrize("which", ["folder", "llama_folder"])
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("added", [None, False])
def test_ids_and_assistant_masks_are_those_of_training(
    which: str, images: int, added: bool | None, request: pytest.FixtureRequest
) -> None:
    """TRL's call: the template has written every special token, none is to be added."""
    folder = request.getfixturevalue(which)
    options = {} if added is None else {"add_special_tokens": added}
    made = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [talk(images)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs=options,
    )
    turns = [Turn({"user": "human"}.get(role, "gpt"), text) for role, text in TALK]
    tags = "<image>" * images
    turns[0] = Turn("human", f"{tags}\n{turns[0].text}" if images else turns[0].text)
    sample = Processor.from_pretrained(folder).conversation(
        turns, [picture(i) for i in range(images)]
    )
    assert made["input_ids"][0].tolist() == list(sample.ids)
    learned = [int(label != -100) for label in sample.labels]
    assert torch.as_tensor(made["assistant_masks"])[0].tolist() == learned
    assert sum(learned) > 4


def test_offsets_count_characters_of_the_text_as_given(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    text = "<s>USER: <image> a <image> cat"
    made = processor(images=[picture(0), picture(1)], text=text, return_offsets_mapping=True)
    words = [text[start:end] for start, end in made["offset_mapping"][0]]
    pairs = list(zip(made["input_ids"][0], words, strict=True))
    assert {word for token, word in pairs if token == IMAGE_ID} == {"<image>"}
    assert "".join(word for token, word in pairs[1:] if token != IMAGE_ID) == "USER:  a  cat"


def test_the_first_token_stands_once(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    once = processor(text="a cat")["input_ids"][0]
    assert once[0] == 1 and processor(text="<s>a cat")["input_ids"][0] == once
    assert processor(text="<s>a cat", add_special_tokens=False)["input_ids"][0] == once
    assert processor(text="a cat", add_special_tokens=False)["input_ids"][0] == once[1:]
    with pytest.raises(UsageError, match="some texts begin with <s>"):
        processor(text=["<s>a", "b"], add_special_tokens=False)


def test_options_in_nested_dicts_are_obeyed_and_unknown_ones_refused(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    made = processor(
        text=["a cat on the mat", "b"],
        text_kwargs={"padding": True, "padding_side": "left"},
        common_kwargs={"return_tensors": "pt"},
    )
    assert (
        made["attention_mask"][1].tolist()[0] == 0 and made["attention_mask"][1].tolist()[-1] == 1
    )
    for options, words in (
        ({"paddin": True}, "did you mean 'padding'"),
        ({"text_kwargs": {"paddin": True}}, "did you mean 'padding'"),
        ({"images_kwargs": {"do_rescale": False}}, "preset says how images are cut"),
        ({"videos": [1]}, "does not know 'videos'"),
    ):
        with pytest.raises(UsageError, match=words):
            processor(text="a", **options)
    with pytest.raises(UsageError, match="give padding=True"):
        processor(text=["a cat", "b"], return_tensors="pt")


def test_images_for_each_text_must_fit_their_text(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    texts = ["<image> a", "b"]
    assert len(processor(images=[[picture(0)], None], text=texts)["image_sizes"]) == 1
    with pytest.raises(SampleError, match="text 0 has 1 <image> tags but 0 images"):
        processor(images=[[], [picture(0)]], text=texts)
    with pytest.raises(SampleError, match="1 lists of images for 2 texts"):
        processor(images=[[picture(0)]], text=texts)


def test_arrays_are_taken_and_other_things_named(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    one = processor(images=picture(0), text="<image>")
    two = processor(images=np.asarray(picture(0)), text="<image>")
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    for bad in (np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), {"a": 1}, 7):
        with pytest.raises(UsageError, match="cannot be taken"):
            processor(images=bad, text="<image>")


def test_padding_side_is_obeyed_when_it_is_read(folder: Path) -> None:
    assert (
        AutoProcessor.from_pretrained(folder, padding_side="left").tokenizer.padding_side == "left"
    )
    with pytest.raises(UsageError, match="does not know min_pixels"):
        AutoProcessor.from_pretrained(folder, min_pixels=3)


def test_a_processor_saved_alone_is_read_again(folder: Path, tmp_path: Path) -> None:
    """As beside an adapter of peft's, where no model's config.json is."""
    processor = AutoProcessor.from_pretrained(folder, chat_template="{{ 'mine' }}")
    processor.save_pretrained(tmp_path / "alone")
    again = AutoProcessor.from_pretrained(tmp_path / "alone")
    assert isinstance(again, LlavaHDProcessor) and again.chat_template == "{{ 'mine' }}"
    images, text = [picture(1)], "<image> a cat"
    one, two = (p(images=images, text=text) for p in (processor, again))
    assert one["input_ids"] == two["input_ids"]
    assert torch.equal(one["pixel_values"], two["pixel_values"])


def test_transformers_pipeline_takes_the_folder(folder: Path) -> None:
    answer = pipeline("image-text-to-text", model=str(folder))(
        text=[talk(1)[0]], max_new_tokens=3, return_full_text=False
    )
    assert isinstance(answer[0]["generated_text"], str)


@torch.inference_mode()
def test_last_hidden_states_and_the_head_give_the_logits(
    folder: Path, model: LlavaHDForConditionalGeneration
) -> None:
    """TRL computes its loss this way, in chunks."""
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        images=[picture(0)], text=["<image> a", "b"], padding=True, return_tensors="pt"
    )
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    kept = inputs["attention_mask"].bool()
    logits = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits[kept], model(**inputs).logits[kept], rtol=0, atol=1e-6)


def test_images_without_a_place_are_never_dropped(
    folder: Path, model: LlavaHDForConditionalGeneration
) -> None:
    inputs = AutoProcessor.from_pretrained(folder)(
        images=[picture(0), picture(1)], text=["<image> a", "<image> b"], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    first = {k: v[:1] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    pictures = {k: inputs[k] for k in ("pixel_values", "image_sizes")}
    with pytest.raises(SampleError, match="2 images, of which 1 have no visual tokens"):
        model(**first, **pictures)
    with pytest.raises(UsageError, match="belong together"):
        model(**inputs | {"image_sizes": None})
    with pytest.raises(SampleError, match="tiles for images that are cut into"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][1:]})
    with pytest.raises(UsageError, match="position_ids is not taken"):
        model(**inputs, position_ids=torch.zeros_like(inputs["input_ids"]))


def test_generate_returns_what_transformers_does(
    folder: Path, model: LlavaHDForConditionalGeneration
) -> None:
    inputs = AutoProcessor.from_pretrained(folder)(
        images=[picture(0)], text=["<image> a"], return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    whole = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(whole.sequences, plain) and len(whole.scores) == plain.shape[1] - length
    several = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert several.shape[0] == 3 and torch.equal(several[2, :length], inputs["input_ids"][0])


def test_a_trainers_state_dict_is_what_is_saved_and_by_one_process(
    model: LlavaHDForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", state_dict=gathered)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in gathered.items())
    with pytest.raises(UsageError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)


def test_dtype_auto_is_as_stored(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype="auto", device_map={"": "cpu"}
    )
    assert again.model.projector.bias_1.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
        AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat17")
    with pytest.raises(UsageError, match="has several parts"):
        AutoModelForImageTextToText.from_pretrained(folder, device_map={"model.vision": 0, "x": 1})
