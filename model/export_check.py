"""An exported model, read back before it gets its name: weights, prompts, pixels and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from ..hd.errors import LlavaHDError
from ..hd.image import from_array
from ..hd.tiler import normalise
from .attention import implementation
from .chat_template import messages
from .config import LlavaHDConfig
from .key_names import VISION, from_clip, from_transformers
from .original import read_original
from .packing import Sample, pack
from .processor import Processor
from .prompt import IMAGE_TAG, Turn, prompt_text
from .tensor_files import folder_tensors
from .weights import model_of, quiet_transformers

# (height, width) of the images of the check, in tiles.
SIZES = (
    (1, 1), (2, 2), (1.5, 2), (2, 1.5), (0.5, 3), (3, 0.5), (2.1, 2.9),
    (0.3, 0.35), (5, 1.6), (1.9, 2.85),
)  # fmt: skip
# Equal weights and pixels give equal logits but for the order of additions, which a matrix product
# may choose by the number of its rows (we project kept rows only). Relative to the largest logit.
TOLERANCE = 1e-5
QUESTION = "What is in the image?"
CONVERSATIONS = (
    (f"{IMAGE_TAG}\n{QUESTION}",),
    ("Hello", "Hi there.", "Who?"),
    (f"Compare {IMAGE_TAG} and {IMAGE_TAG}, please", 'The first.\nIt is "red"\'s.', "Sure? "),
)
INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@dataclass(frozen=True)
class CheckReport:
    """How reading back went. max_difference: of logits in fp32, max_relative: to the largest one,
    both over `images` image sizes (0 where a format's own reader is not at hand). same_ids:
    whether the reader's tokenizer splits the prompts as training did. prompts: how many rendered
    chat templates equal the training prompt."""

    images: int
    max_difference: float
    max_relative: float
    prompts: int
    same_ids: bool


def check_transformers(
    folder: Path, config: LlavaHDConfig, state: Mapping[str, Tensor], processor: Processor
) -> CheckReport:
    """Read an export of ours with transformers. Raises LlavaHDError for any difference."""
    check_tensors(folder, state, from_transformers)
    prompts = check_prompts(folder, config)
    sdpa = implementation("sdpa")
    with quiet_transformers():
        samples = _samples(processor)
        ours = model_of(config, state, folder, torch.float32, sdpa).eval()
        expected = [_logits(ours, sample) for sample in samples]
        del ours
        theirs_class, processor_class, images_class = (
            (LlavaNextForConditionalGeneration, LlavaNextProcessor, LlavaNextImageProcessorPil)
            if config.hd.grids
            else (LlavaForConditionalGeneration, LlavaProcessor, LlavaImageProcessorPil)
        )
        theirs = _loaded(theirs_class, folder, attn_implementation=sdpa)
        reader = processor_class.from_pretrained(folder)
        # without torchvision's variant, whose resizing differs from PIL's in the last bits
        reader.image_processor = images_class.from_pretrained(folder)
    worst, largest, same_ids = 0.0, 0.0, True
    for size, sample, logits in zip(_sizes(config), samples, expected, strict=True):
        inputs = _read(reader, size)
        pixels = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[-3:])
        if not torch.equal(pixels, normalise(sample.tiles[0])):
            raise LlavaHDError(
                f"the exported processor cuts an image of {size} differently; please report this"
            )
        same_ids &= inputs["input_ids"][0].tolist() == list(sample.ids)
        given = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
        with torch.inference_mode():
            found = theirs(input_ids=torch.tensor([sample.ids]), **given).logits[0]
        worst = max(worst, float((found - logits).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    relative = worst / largest if largest else worst
    if not relative <= TOLERANCE:
        raise LlavaHDError(
            f"the exported model's logits differ by {relative:.1e} of the largest in transformers "
            f"(allowed: {TOLERANCE:.0e}), so it was not kept; please report this"
        )
    return CheckReport(len(samples), worst, relative, prompts, same_ids)


def check_original(
    folder: Path, config: LlavaHDConfig, state: Mapping[str, Tensor], processor: Processor
) -> CheckReport:
    """Read an export in the original layout with our importer, its tower with transformers."""
    prompts = check_prompts(folder, config)
    found = read_original(folder)
    geometry = (found.hd, found.projector, found.vision_layer)
    if geometry != (config.hd, config.projector, config.vision_layer):
        raise LlavaHDError(f"the export reads back as {geometry}; please report this")
    tower = {name: tensor for name, tensor in state.items() if name.startswith(VISION)}
    rest = {name: tensor for name, tensor in state.items() if name not in tower}
    assert found.vision is not None
    check_tensors(found.vision, tower, from_clip)
    check_tensors(folder, rest, found.rename)
    with quiet_transformers():
        _loaded(CLIPVisionModel, found.vision)
        AutoConfig.from_pretrained(folder)
    turns = [Turn("human", QUESTION)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt_text(turns, config.template, tokenizer.eos_token)).input_ids
    return CheckReport(0, 0.0, 0.0, prompts, ids == list(processor.question(QUESTION).ids))


def check_tensors(folder: Path, state: Mapping[str, Tensor], rename: Any) -> None:
    """LlavaHDError unless the folder's tensors are those of `state`, to the last bit."""
    left = set(state)
    for name, tensor in folder_tensors(folder):
        ours = rename(name)
        if ours not in left or not torch.equal(tensor, state[ours]):
            raise LlavaHDError(f"{name} was not written as it is; please report this")
        left.remove(ours)
    if left:
        raise LlavaHDError(f"{min(left)} was not written; please report this")


def check_prompts(folder: Path, config: LlavaHDConfig) -> int:
    """LlavaHDError unless the written chat template gives the training prompt, byte for byte, for
    contents as text and as lists; the number of prompts compared."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = 0
    for texts in CONVERSATIONS:
        for known in range(1, len(texts) + 1):
            turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts[:known])]
            due = prompt_text(turns, config.template, tokenizer.eos_token)
            for listed in (False, True):
                rendered = tokenizer.apply_chat_template(
                    messages(turns, listed), tokenize=False, add_generation_prompt=known % 2 == 1
                )
                if rendered != due:
                    raise LlavaHDError(
                        f"the chat template gives {rendered!r}, training {due!r}; please report it"
                    )
                count += 1
    return count


def _sizes(config: LlavaHDConfig) -> list[tuple[int, int]]:
    px = config.hd.tile_px
    return [(round(height * px), round(width * px)) for height, width in SIZES]


def _noise(size: tuple[int, int]) -> Any:
    """An image of (height, width)."""
    generator = np.random.default_rng(sum(size))
    return from_array(generator.integers(0, 256, (*size, 3), dtype=np.uint8))


def _samples(processor: Processor) -> list[Sample]:
    sizes = _sizes(processor.config)
    return [processor.question(QUESTION, [_noise(size)]) for size in sizes]


def _read(reader: Any, size: tuple[int, int]) -> Any:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = reader.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return reader(text=text, images=_noise(size), return_tensors="pt")


@torch.inference_mode()
def _logits(model: Any, sample: Sample) -> Tensor:
    return model.logits(pack([sample], model.config))


def _loaded(model_class: Any, folder: Path, **options: Any) -> Any:
    """A transformers model in fp32, its four lists of wrong keys empty."""
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    for name in INFO:
        if info[name]:
            raise LlavaHDError(
                f"transformers reads the export with {name} {sorted(map(str, info[name]))[:3]}; "
                "please report this"
            )
    return model.eval()
