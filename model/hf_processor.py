"""LlavaHDProcessor: our processor under transformers' conventions, for its pipelines and TRL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from ..hd.errors import UsageError
from ..hd.image import as_rgb, load_image
from .chat_template import chat_template as written_template
from .config import LlavaHDConfig
from .processor import Cut, Processor, with_bos
from .prompt import IMAGE_TAG, SampleError, get_template


class LlavaHDProcessor(ProcessorMixin):
    """Texts with `<image>` tags and their images -> tensors; `apply_chat_template` for messages.

    `pixel_values` are uint8 tiles `[N 3 px px]` of all images end to end, which the model
    normalises itself; `image_sizes` int64 `[images 2]` (height, width) tell them apart.
    """

    model_input_names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")

    def __init__(
        self, tokenizer: Any, config: LlavaHDConfig, chat_template: str | None = None
    ) -> None:
        self.processor = Processor(tokenizer, config)
        self.tokenizer = with_bos(tokenizer)
        self.image_token = IMAGE_TAG
        self.image_token_id = config.image_token_id
        if chat_template is None and not get_template(config.template).only_answers:
            chat_template = written_template(config.template, tokenizer.eos_token)
        self.chat_template = chat_template

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that transformers would save on their own."""
        return ["tokenizer"]

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> LlavaHDProcessor:
        """The processor of a model folder that `LlavaHD.from_pretrained` reads; nothing is fetched
        and no option is known but `chat_template`."""
        template = options.pop("chat_template", None)
        processor = Processor.from_pretrained(path)
        return cls(processor.tokenizer, processor.config, template)

    def save_pretrained(self, path: str | Path, **options: Any) -> list[str]:
        """Write the tokenizer files; the configuration is the model's config.json."""
        self.processor.save_pretrained(path)
        return []

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """One text or several, with one tag for each image.

        images: one, a list, or a list for each text; PIL images, paths or bytes. options: the
        tokenizer's (padding, max_length, ...). Raises SampleError where tags and images differ,
        and where a limit would cut visual tokens off; ImageError for what cannot be read.
        """
        if text is None:
            raise UsageError("LlavaHDProcessor needs text; give one with a tag for each image")
        if return_tensors not in (None, "pt"):
            raise UsageError(f"return_tensors {return_tensors!r} is not made here; give 'pt'")
        texts = [text] if isinstance(text, str) else list(text)
        cuts = [self.processor.cut(_opened(image)) for image in flattened(images)]
        wide, counts = self._expanded(texts, [cut.plan.num_tokens for cut in cuts])
        options = {k: v for k, v in options.items() if not k.endswith("_kwargs")}
        made = dict(self.tokenizer(wide, **options))
        for row, count in zip(made["input_ids"], counts, strict=True):
            found = sum(1 for token in row if token == self.image_token_id)
            if found != count:
                raise SampleError(
                    f"{found} of {count} visual tokens are left of a text; raise max_length or use "
                    "a preset with fewer tiles"
                )
        if return_tensors is not None:
            made = {name: torch.tensor(rows) for name, rows in made.items()}
        return BatchFeature({**made, **_tensors(cuts)})

    def _expanded(
        self, texts: Sequence[str], num_tokens: Sequence[int]
    ) -> tuple[list[str], list[int]]:
        """The texts with as many tags as each image has visual tokens, and those counts by text."""
        tags = sum(text.count(IMAGE_TAG) for text in texts)
        if tags != len(num_tokens):
            raise SampleError(
                f"{tags} {IMAGE_TAG} tags in the texts but {len(num_tokens)} images; "
                "write one tag per image"
            )
        waiting, wide, counts = list(num_tokens), [], []
        for text in texts:
            first, *others = text.split(IMAGE_TAG)
            mine = [waiting.pop(0) for _ in others]
            wide.append(
                first + "".join(IMAGE_TAG * n + t for n, t in zip(mine, others, strict=True))
            )
            counts.append(sum(mine))
        return wide, counts


def flattened(images: Any) -> list[Any]:
    """Images alone, in a list or in a list for each text, as one list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for inner in images for image in flattened(inner)]
    return [images]


def _opened(image: Any) -> Any:
    return load_image(image) if isinstance(image, (str, Path, bytes)) else as_rgb(image)


def _tensors(cuts: Sequence[Cut]) -> dict[str, Tensor]:
    if not cuts:
        return {}
    return {
        "pixel_values": torch.cat([cut.tiles for cut in cuts]),
        "image_sizes": torch.tensor([cut.plan.image_size for cut in cuts]),
    }
