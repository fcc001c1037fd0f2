"""Images and words to samples: the one way from a conversation to the model, in every use."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer

from ..hd.errors import UsageError
from ..hd.image import image_size, load_image
from ..hd.limits import NO_LIMITS, ResolutionLimits, limited
from ..hd.plan import TilePlan, plan_image
from ..hd.tiler import Resizer, pillow_resizer, tile_image
from .config import LlavaHDConfig, readable
from .foreign import read_config
from .packing import Sample
from .prompt import IGNORE, IMAGE_TAG, Turn, encode_conversation, encode_question

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


SENTENCEPIECE = "tokenizer.model"


def read_tokenizer(folder: str | Path, text: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of a folder; text: the language model's configuration, for a folder whose own
    config.json transformers does not know. UsageError where there is none, or none of use."""
    told = {}
    if text is not None:
        values = dict(text)
        with readable(f"{folder}/config.json"):
            told["config"] = AutoConfig.for_model(values.pop("model_type"), **values)
    with readable(f"the tokenizer of model folder {folder}", "copy its tokenizer files again"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **told)
        # Without its vocabulary's file, transformers makes an empty one of some kinds.
        empty = not tokenizer("USER", add_special_tokens=False).input_ids
    if empty:
        raise UsageError(
            f"model folder {folder} has no tokenizer with words; copy tokenizer.json or "
            f"{SENTENCEPIECE} to it"
        )
    if tokenizer.eos_token is None:
        raise UsageError(
            f"{folder}/tokenizer_config.json names no eos_token, which ends every answer; copy the "
            "tokenizer files again"
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer's files. OSError where the disk is full: its library raises a bare
    Exception then, with the system's number in its words."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def read_sentencepiece(folder: str | Path) -> bytes | None:
    """The SentencePiece file of a folder, if it has one."""
    file = Path(folder) / SENTENCEPIECE
    return file.read_bytes() if file.is_file() else None


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that begins a text with the token that training begins with, if it has one.

    Our prompts are built without it; others' rely on the tokenizer, and some of transformers 5's
    own Llama tokenizers leave the token out where 4.x adds it. The same object where it does.
    """
    begin = tokenizer.bos_token
    if begin is None or tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        return tokenizer
    copied = deepcopy(tokenizer)
    copied.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A $B",
        special_tokens=[(begin, tokenizer.bos_token_id)],
    )
    return copied


@dataclass(frozen=True)
class Cut:
    """An image ready for the model: its plan, and its tiles uint8 `[n 3 px px]`.

    features, key, fault: of a cache, see model/packing.py's Sample.
    """

    plan: TilePlan
    tiles: torch.Tensor
    features: torch.Tensor | None = None
    key: str = ""
    fault: str | None = None


class Processor:
    """Plans and cuts images, writes prompts; the same in training, evaluation and chat.


    sentencepiece: the file that a Llama tokenizer was made of. Nothing here reads it; it goes from
    folder to folder for the programs that do (the original LLaVA, llama.cpp). resizer: what makes
    images smaller or larger (hd/tiler.py).
    """

    def __init__(
        self,
        tokenizer: Any,
        config: LlavaHDConfig,
        resizer: Resizer = pillow_resizer,
        sentencepiece: bytes | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.resizer = resizer
        self.sentencepiece = sentencepiece

    @classmethod
    def from_pretrained(cls, path: str | Path, limits: ResolutionLimits = NO_LIMITS) -> Processor:
        """The processor of a model folder that `LlavaHD.from_pretrained` reads. limits: of the
        images' resolution, instead of what the model was trained on (hd/limits.py)."""
        config = read_config(path)
        tokenizer = read_tokenizer(path, config.text)
        config = replace(config, hd=limited(config.hd, limits))
        return cls(tokenizer, config, sentencepiece=read_sentencepiece(path))

    def limited(self, limits: ResolutionLimits) -> Processor:
        """The same processor with other limits of resolution; its cuts go to the same model."""
        config = replace(self.config, hd=limited(self.config.hd, limits))
        return Processor(self.tokenizer, config, self.resizer, self.sentencepiece)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer files; the configuration is the model's config.json."""
        save_tokenizer(self.tokenizer, path)
        if self.sentencepiece is not None:
            (Path(path) / SENTENCEPIECE).write_bytes(self.sentencepiece)

    def cut(self, image: Image) -> Cut:
        """The plan of an RGB image and its tiles."""
        plan = plan_image(image_size(image), self.config.hd)
        return Cut(plan, tile_image(image, plan, self.resizer))

    def conversation(
        self,
        turns: Sequence[Turn],
        images: Sequence[Image | Cut],
        max_length: int | None = None,
        template: str | None = None,
        name: str = "",
    ) -> Sample:
        """A training sample; raises SampleError (model/prompt.py)."""
        cuts = [image if isinstance(image, Cut) else self.cut(image) for image in images]
        encoded = encode_conversation(
            self.tokenizer,
            turns,
            [cut.plan.num_tokens for cut in cuts],
            self.config.template if template is None else template,
            self.config.image_token_id,
            max_length,
        )
        plans, tiles = tuple(cut.plan for cut in cuts), tuple(cut.tiles for cut in cuts)
        features, keys = tuple(cut.features for cut in cuts), tuple(cut.key for cut in cuts)
        faults = tuple(cut.fault for cut in cuts if cut.fault is not None)
        return Sample(encoded.ids, encoded.labels, plans, tiles, name, features, keys, faults)

    def question(self, text: str, images: Sequence[Image | Cut] = (), name: str = "") -> Sample:
        """A prompt that waits for its answer; image tags are put in front where there are none.

        An image is RGB, or cut already (`cut`), which several questions may share.
        """
        tags = "" if IMAGE_TAG in text else f"{IMAGE_TAG}\n" * len(images)
        cuts = [image if isinstance(image, Cut) else self.cut(image) for image in images]
        ids = encode_question(
            self.tokenizer,
            [Turn("human", tags + text)],
            [cut.plan.num_tokens for cut in cuts],
            self.config.template,
            self.config.image_token_id,
        )
        plans, tiles = tuple(cut.plan for cut in cuts), tuple(cut.tiles for cut in cuts)
        return Sample(ids, [IGNORE] * len(ids), plans, tiles, name)

    @staticmethod
    def load(source: str | Path | bytes) -> Image:
        """The image loader (hd/image.py); raises ImageError."""
        return load_image(source)
