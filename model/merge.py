"""An adapter made part of its model: W + (alpha / r) B A in every linear, checked by logits.

The check runs before anything is written: both models read the same packs of random words and
random pixels in fp32, where the only difference allowed is the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..hd.errors import LlavaHDError
from ..hd.plan import plan_image
from .adapter import load_adapter, saved_dtype
from .adapter_config import read_adapter_config
from .config import LlavaHDConfig
from .llava_hd import LlavaHD
from .lora import merge_lora
from .packing import PackedBatch, Sample, pack
from .processor import Processor
from .prompt import IGNORE
from .whole_folder import check_new, whole_folder

TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit, in fp32
CHECK_WORDS = 24
CHECK_SIZES = ((60, 40), (50, 200))  # (height, width) of the check's images


@dataclass(frozen=True)
class MergeReport:
    """How a merge went. Differences of logits: the largest, and relative to the largest logit.
    rounded: relative, of the merged weights in the type that they are written in."""

    out: str
    linears: int
    packs: int
    max_difference: float
    max_relative: float
    rounded: float
    dtype: str


def merge_folder(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> MergeReport:
    """Write the whole model of an adapter folder to `out`, a new folder: whole, or not at all.

    base: a whole model's folder instead of what the adapter names. dtype: of the written weights;
    that of the adapter by default. Raises UsageError or DataError for folders that do not fit,
    LlavaHDError where the merged model differs from the adapter's; nothing is written then.
    """
    folder, target = Path(adapter), Path(out)
    config = read_adapter_config(folder)
    check_new(target)
    processor = Processor.from_pretrained(folder)
    wide = saved_dtype(folder) if dtype is None else dtype

    say("reading base and adapter")
    model = load_adapter(folder, torch.float32, "sdpa", base).to(device).eval()
    say("reading random packs with the adapter")
    packs = [batch.to(device) for batch in random_packs(config.model)]
    before = _logits(model, packs)
    say("merging")
    count = merge_lora(model.language.causal_lm)
    model.adapter = None
    difference, relative = _differences(before, _logits(model, packs))
    if not relative <= TOLERANCE:
        raise LlavaHDError(
            f"the merged model's logits differ from the adapter's by {relative:.1e} of the largest "
            f"(allowed: {TOLERANCE:.0e}), so nothing was written; please report this"
        )
    _round(model, wide)
    rounded = _differences(before, _logits(model, packs))[1]

    say(f"writing {target}")
    _write(model, processor, target, wide)
    name = str(wide).removeprefix("torch.")
    return MergeReport(str(target), count, len(packs), difference, relative, rounded, name)


def random_packs(config: LlavaHDConfig, seed: int = 0) -> list[PackedBatch]:
    """Two packs of random words: one with a random image in each of its samples, one without."""
    generator = torch.Generator().manual_seed(seed)

    def words() -> list[int]:
        count = config.text["vocab_size"] - 1
        ids = torch.randint(count, (CHECK_WORDS,), generator=generator)
        return (ids + (ids >= config.image_token_id)).tolist()  # any but the image's

    seen, read = [], []
    for number, size in enumerate(CHECK_SIZES):
        plan = plan_image(size, config.hd)
        shape = (plan.num_tiles, 3, config.hd.tile_px, config.hd.tile_px)
        tiles = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        ids = [*words(), *[config.image_token_id] * plan.num_tokens, *words()]
        seen.append(Sample(ids, [IGNORE] * len(ids), (plan,), (tiles,), f"image {number}"))
        text = words()
        read.append(Sample(text, [IGNORE] * len(text), name=f"text {number}"))
    return [pack(seen, config), pack(read, config)]


@torch.no_grad()
def _logits(model: LlavaHD, packs: list[PackedBatch]) -> list[Tensor]:
    return [model.logits(batch).double().cpu() for batch in packs]


def _differences(ours: list[Tensor], theirs: list[Tensor]) -> tuple[float, float]:
    """The largest difference, and the same relative to the largest logit (NaN stays NaN)."""
    pairs = list(zip(ours, theirs, strict=True))
    worst = torch.stack([(one - other).abs().max() for one, other in pairs]).max()
    largest = torch.stack([one.abs().max() for one, _ in pairs]).max()
    return float(worst), float(worst / largest)


def _round(model: LlavaHD, dtype: torch.dtype) -> None:
    """Round the weights to the values of `dtype`; they stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()


def _write(model: LlavaHD, processor: Processor, target: Path, dtype: torch.dtype) -> None:
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in model.state_dict().items()}
    with whole_folder(target) as unfinished:
        model.save_pretrained(unfinished, state_dict=state)
        processor.save_pretrained(unfinished)
