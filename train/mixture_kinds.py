"""The kinds of annotation files that a mixture is made of: their files and their options.

The paper's prompts and counts (arXiv 2310.03744v2, table 7 and appendix A.2) stand here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..hd.errors import UsageError

SINGLE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
DESCRIBE = "Provide a short description for this region: {box}"
LOCATE = "Provide the bounding box coordinate of the region this sentence describes: {phrase}"

# Conversations of each set, table 7; it is rounded to thousands and sums to 664,000.
PAPER: dict[str, int] = {
    "llava_instruct": 158_000,
    "sharegpt": 40_000,
    "vqav2": 83_000,
    "gqa": 72_000,
    "okvqa": 9_000,
    "ocrvqa": 80_000,
    "aokvqa": 66_000,
    "textcaps": 22_000,
    "refcoco": 48_000,
    "vg": 86_000,
}
# Records of the released llava_v1_5_mix665k.json by the first folder of their image, as counted
# in haotian-liu/LLaVA issue 657; "" is text alone.
RELEASED: dict[str, int] = {
    "coco": 364_100,
    "vg": 86_417,
    "gqa": 72_140,
    "ocr_vqa": 80_000,
    "textvqa": 21_953,
    "": 40_688,
}

PromptOn = Literal["first", "every"]
CocoNames = Literal["2017", "2014"]
Boxes = Literal["square", "image"]


@dataclass(frozen=True)
class LlavaOptions:
    """LLaVA's own records have no options."""


@dataclass(frozen=True)
class ShareGptOptions:
    """max_tokens: whole rounds behind that many tokens of `tokenizer` (a model folder) are left
    out, and conversations without an answer before; null leaves the cut to the trainer."""

    tokenizer: str | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.tokenizer is None) != (self.max_tokens is None):
            raise UsageError("max_tokens and tokenizer belong together; give both or neither")
        _at_least_one("max_tokens", self.max_tokens)


@dataclass(frozen=True)
class QaOptions:
    """prompt_on: the format prompt stands at the first question of an image, or at every one.
    capitalise: answers begin with a capital letter."""

    prompt: str = SINGLE_WORD
    prompt_on: PromptOn = "first"
    capitalise: bool = True


@dataclass(frozen=True)
class VqaOptions(QaOptions):
    """coco_names: 2017 is 000000000001.jpg, 2014 is COCO_train2014_000000000001.jpg."""

    coco_names: CocoNames = "2017"


@dataclass(frozen=True)
class OcrVqaOptions(QaOptions):
    """split: which books of dataset.json."""

    split: Literal["train", "val", "test"] = "train"


@dataclass(frozen=True)
class AokvqaOptions:
    """copies: a question with k choices is repeated k times, its choices "rotated" by one place
    each time (so the answer stands at every letter once) or the "same"."""

    prompt: str = LETTER
    prompt_on: PromptOn = "first"
    copies: Literal["rotated", "same"] = "rotated"
    coco_names: CocoNames = "2017"


@dataclass(frozen=True)
class TextCapsOptions:
    """captions: "one" of each image, drawn by the seed, or "all" of them in one conversation."""

    prompt: str = CAPTION
    captions: Literal["one", "all"] = "one"


@dataclass(frozen=True)
class RegionOptions:
    """The two forms of a region, between which the seed draws.

    boxes: corners are shares of the square that the image is padded to (as in LLaVA's released
    data, haotian-liu/LLaVA issue 606), or of the image itself.
    """

    describe: str = DESCRIBE
    locate: str = LOCATE
    boxes: Boxes = "square"

    def __post_init__(self) -> None:
        for name, blank in (("describe", "{box}"), ("locate", "{phrase}")):
            if blank not in getattr(self, name):
                raise UsageError(f"{name} has no {blank}; write it where that stands")


@dataclass(frozen=True)
class RefCocoOptions(RegionOptions):
    """max_turns: rounds of one conversation; the paper has fewer than 10."""

    max_turns: int = 9
    coco_names: CocoNames = "2017"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("max_turns", self.max_turns)


@dataclass(frozen=True)
class VgOptions(RegionOptions):
    """max_regions: annotations of one image, drawn by the seed."""

    max_regions: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("max_regions", self.max_regions)


@dataclass(frozen=True)
class Kind:
    """The form of a set's annotation files: which files there must and may be, and options."""

    files: tuple[str, ...]
    options: type
    optional_files: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "llava": Kind(("records",), LlavaOptions),
    "sharegpt": Kind(("records",), ShareGptOptions),
    "vqa": Kind(("questions", "annotations"), VqaOptions),
    "gqa": Kind(("questions",), QaOptions),
    "ocrvqa": Kind(("dataset",), OcrVqaOptions),
    "aokvqa": Kind(("questions",), AokvqaOptions),
    "textcaps": Kind(("captions",), TextCapsOptions, ("ocr",)),
    "refcoco": Kind(("expressions",), RefCocoOptions),
    "vg": Kind(("regions", "images"), VgOptions),
}


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{name} must be 1 or more, not {value}")
