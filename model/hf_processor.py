"""LlavaHDProcessor: our processor under transformers' conventions, for its pipelines and TRL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin, TextKwargs

from ..hd.errors import UsageError
from ..hd.grid import suggest
from ..hd.image import as_rgb, from_array, is_image, load_image
from .chat_template import chat_template as written_template
from .config import MODEL_TYPE, LlavaHDConfig, readable
from .processor import Cut, Processor, read_sentencepiece, read_tokenizer, with_bos
from .prompt import IMAGE_TAG, SampleError, get_template

PROCESSOR_FILE, TEMPLATE_FILE = "processor_config.json", "chat_template.jinja"
# Where transformers' processors also take options; those of other media must be empty.
NESTED = ("text_kwargs", "images_kwargs", "common_kwargs")
# What the auto classes hand on by themselves, and options about downloads, which there are none of.
PASSED_ON = (
    "cache_dir", "config", "dtype", "force_download", "local_files_only", "revision",
    "subfolder", "torch_dtype", "token", "use_fast", "_from_auto", "_from_pipeline",
    "_commit_hash",
)  # fmt: skip


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
        own = _own_template(self.processor)
        self.chat_template = own if chat_template is None else chat_template

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that transformers would save on their own."""
        return ["tokenizer"]

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> LlavaHDProcessor:
        """The processor of a model folder that `LlavaHD.from_pretrained` reads, or of one that
        `save_pretrained` wrote; nothing is fetched. options: chat_template, padding_side."""
        options = {k: v for k, v in options.items() if v is not None and k not in PASSED_ON}
        unknown = sorted(options.keys() - {"chat_template", "padding_side"})
        if unknown:
            raise UsageError(
                f"LlavaHDProcessor.from_pretrained does not know {', '.join(unknown)}; leave it out"
            )
        processor = _read(Path(path))
        template = Path(path) / TEMPLATE_FILE
        if "chat_template" not in options and template.is_file():
            options["chat_template"] = template.read_text(encoding="utf-8")
        made = cls(processor.tokenizer, processor.config, options.get("chat_template"))
        made.processor.sentencepiece = processor.sentencepiece
        made.tokenizer.padding_side = options.get("padding_side", made.tokenizer.padding_side)
        return made

    def save_pretrained(self, path: str | Path, **options: Any) -> list[str]:
        """Write the tokenizer files, the chat template where it is not the model's, and, where no
        model's config.json is, a file that stands for it."""
        if options.get("push_to_hub"):
            raise UsageError("push_to_hub is not known here; upload the folder that is written")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.processor.save_pretrained(folder)
        if self.chat_template not in (None, _own_template(self.processor)):
            (folder / TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
        if not (folder / "config.json").is_file():
            values = {
                "processor_class": type(self).__name__,
                MODEL_TYPE: self.processor.config.to_dict(),
            }
            text = json.dumps(values, indent=2) + "\n"
            (folder / PROCESSOR_FILE).write_text(text, encoding="utf-8")
        return []

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """One text or several, with one tag for each image.

        images: one, a list, or a list for each text; PIL images, uint8 arrays `[H W 3]`, paths or
        bytes. options: the tokenizer's (padding, max_length, ...), also in `text_kwargs` and
        `common_kwargs`. Raises SampleError where tags and images differ, and where a limit would
        cut visual tokens off; ImageError for what cannot be read; UsageError for other options.
        """
        if text is None:
            raise UsageError("LlavaHDProcessor needs text; give one with a tag for each image")
        options = _known({"return_tensors": return_tensors, **options})
        return_tensors = options.pop("return_tensors", None)
        if return_tensors not in (None, "pt"):
            raise UsageError(f"return_tensors {return_tensors!r} is not made here; give 'pt'")
        texts = [text] if isinstance(text, str) else list(text)
        _check_own_images(images, texts)
        cuts = [self.processor.cut(_opened(image)) for image in flattened(images)]
        wide = self._expanded(texts, [cut.plan.num_tokens for cut in cuts])
        bare, options["add_special_tokens"] = self._begun(wide, options)
        options.pop("return_text_replacement_offsets", None)  # offsets are those of the given text
        made = dict(self.tokenizer([one.text for one in bare], **options))
        if "offset_mapping" in made:
            pairs = zip(made["offset_mapping"], bare, strict=True)
            made["offset_mapping"] = [[one.given(span) for span in row] for row, one in pairs]
        for row, one in zip(made["input_ids"], bare, strict=True):
            found = sum(1 for token in row if token == self.image_token_id)
            if found != one.visual:
                raise SampleError(
                    f"{found} of {one.visual} visual tokens are left of a text; raise max_length "
                    "or use a preset with fewer tiles"
                )
        if return_tensors is not None:
            if len({len(row) for row in made["input_ids"]}) > 1:
                raise UsageError("texts of different lengths make no tensor; give padding=True")
            made = {name: torch.tensor(rows) for name, rows in made.items()}
        return BatchFeature({**made, **_tensors(cuts)})

    def _begun(self, wide: list[_Wide], options: dict[str, Any]) -> tuple[list[_Wide], bool]:
        """The texts without the first token that they may spell, and whether the tokenizer is to
        put it there: once, whether the template wrote it, the caller asked for it, or both."""
        begin = self.tokenizer.bos_token
        spelt = [begin is not None and one.text.startswith(begin) for one in wide]
        asked = bool(options.get("add_special_tokens", True))
        if not asked and any(spelt) and not all(spelt):
            raise UsageError(f"some texts begin with {begin} and others do not; write it in all")
        cut = [one.without(begin) if has else one for one, has in zip(wide, spelt, strict=True)]
        return cut, asked or (any(spelt) and all(spelt))

    def _expanded(self, texts: Sequence[str], num_tokens: Sequence[int]) -> list[_Wide]:
        """The texts with as many tags as each image has visual tokens."""
        tags = sum(text.count(IMAGE_TAG) for text in texts)
        if tags != len(num_tokens):
            raise SampleError(
                f"{tags} {IMAGE_TAG} tags in the texts but {len(num_tokens)} images; "
                "write one tag per image"
            )
        waiting = iter(num_tokens)
        wide = []
        for text in texts:
            first, *others = text.split(IMAGE_TAG)
            spans, whole = [], first
            for other in others:
                start = len(whole)
                whole += IMAGE_TAG * next(waiting)
                spans.append((start, len(whole)))
                whole += other
            wide.append(_Wide(whole, tuple(spans)))
        return wide


@dataclass(frozen=True)
class _Wide:
    """A text with a tag for each visual token. images: where each image's tags are; begun: how
    many characters of the given text stand before this one."""

    text: str
    images: tuple[tuple[int, int], ...]
    begun: int = 0

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return sum(end - start for start, end in self.images) // len(IMAGE_TAG)

    def without(self, begin: str) -> _Wide:
        """The text behind its first token."""
        cut = len(begin)
        images = tuple((start - cut, end - cut) for start, end in self.images)
        return _Wide(self.text[cut:], images, cut)

    def given(self, span: Sequence[int]) -> tuple[int, int]:
        """Where a span of characters is in the text that was given, with one tag an image."""
        return self._given(span[0], False), self._given(span[1], True)

    def _given(self, place: int, is_end: bool) -> int:
        gained = 0
        for start, end in self.images:
            if place >= end:
                gained += end - start - len(IMAGE_TAG)
            elif place > start:  # inside: the whole tag
                return self.begun + start - gained + (len(IMAGE_TAG) if is_end else 0)
        return self.begun + place - gained


def _own_template(processor: Processor) -> str | None:
    """The chat template of a model; None for one of stage 1, which answers nothing."""
    name = processor.config.template
    if get_template(name).only_answers:
        return None
    tokenizer = processor.tokenizer
    # Trainers tokenise what a template writes without adding anything to it.
    begin = "" if tokenizer.bos_token is None else "{{- bos_token -}}"
    return begin + written_template(name, tokenizer.eos_token)


def _read(folder: Path) -> Processor:
    """The processor of a model's folder, or of one that holds a processor alone."""
    file = folder / PROCESSOR_FILE
    if (folder / "config.json").is_file() or not file.is_file():
        return Processor.from_pretrained(folder)
    with readable(file):
        values = json.loads(file.read_text(encoding="utf-8"))
        config = LlavaHDConfig.from_dict(values[MODEL_TYPE])
    tokenizer = read_tokenizer(folder, config.text)
    return Processor(tokenizer, config, sentencepiece=read_sentencepiece(folder))


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's options, those in transformers' nested dicts among them; UsageError for one
    that nobody here would obey."""
    flat = {k: v for k, v in options.items() if k not in NESTED and v is not None}
    for name in NESTED:
        for key, value in (options.get(name) or {}).items():
            if name == "images_kwargs":
                raise UsageError(
                    f"{name} {key!r} is not known; the model's preset says how images are cut"
                )
            flat[key] = value
    known = ("split_special_tokens", *TextKwargs.__annotations__)
    for key in flat:
        if key not in known:
            raise UsageError(f"LlavaHDProcessor does not know {key!r}; {suggest(key, known)}")
    return flat


def _check_own_images(images: Any, texts: Sequence[str]) -> None:
    """SampleError where a list of images for each text does not fit its text's tags."""
    nested = isinstance(images, (list, tuple)) and any(
        one is None or isinstance(one, (list, tuple)) for one in images
    )
    if not nested:
        return
    if len(images) != len(texts):
        raise SampleError(
            f"{len(images)} lists of images for {len(texts)} texts; give each its own"
        )
    for number, (own, text) in enumerate(zip(images, texts, strict=True)):
        tags, count = text.count(IMAGE_TAG), len(flattened(own))
        if tags != count:
            raise SampleError(
                f"text {number} has {tags} {IMAGE_TAG} tags but {count} images; write one tag per "
                "image"
            )


def flattened(images: Any) -> list[Any]:
    """Images alone, in a list or in a list for each text, as one list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for inner in images for image in flattened(inner)]
    return [images]


def _opened(image: Any) -> Any:
    if isinstance(image, (str, Path, bytes)):
        return load_image(image)
    if is_image(image):
        return as_rgb(image)
    try:
        return from_array(np.asarray(image))
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"an image is a {type(image).__name__} that cannot be taken ({error}); give a PIL "
            "image, a path, bytes or a uint8 array [height width 3]"
        ) from error


def _tensors(cuts: Sequence[Cut]) -> dict[str, Tensor]:
    if not cuts:
        return {}
    return {
        "pixel_values": torch.cat([cut.tiles for cut in cuts]),
        "image_sizes": torch.tensor([cut.plan.image_size for cut in cuts]),
    }
