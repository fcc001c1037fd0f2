"""Samples whose lengths spread like those of HD training, for `bench packing` and `bench step`.

Three settings, in the numbers of the real model (224 px tiles, Vicuna's tokens). They are drawn
from the rough tables below, not counted on the real data sets, which are not here.

hd: pictures of all sizes, their mean side log-uniform in 120..1600 px, aspect ratios log-normal;
6 % text alone; answers log-normal with a long tail (median 250 tokens, sigma 1, at most 2,048).
Nine samples of ten have 500 to 2,600 tokens.
mix665k: the kinds of LLaVA's stage 2 in the paper's shares, photos in COCO's, Visual Genome's,
book covers' and TextCaps' usual sizes. Under `hdflex` most pictures have the same 1,632 tokens.
captions: stage 1's pairs, the pictures of hd, each with a caption of some 16 tokens.

Small models read all of it at a scale: pictures at a quarter of their size for tiles of 56 px, so
that each gets the grid that it gets at 224 px, and a sixteenth of the words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..hd.grid import PRESETS, HDConfig
from ..hd.image import from_array, png_bytes
from ..model.prompt import IMAGE_TAG, Turn
from ..train.mixture_kinds import PAPER
from ..train.record import Record

REAL_TILE_PX = 224
MOST_WORDS = 2048
SYSTEM_TOKENS = 45  # of Vicuna's system prompt and the names of the roles
TEMPLATE = "plain"  # picture, then the words, all of them learned: lengths are all that matters
ONE_TOKEN_WORDS = ("anchor", "arrow", "boat", "cup", "fish", "flag")
SETTINGS = ("hd", "mix665k")
CAPTIONS = "captions"
CAPTION_TOKENS = 16

Size = tuple[int, int]  # (height, width)

COCO = ((480, 640), (480, 640), (480, 640), (640, 480), (427, 640))
GENOME = ((375, 500), (375, 500), (500, 375), (333, 500), (600, 800), (768, 1024))
COVERS = ((500, 330), (500, 330), (500, 375), (475, 316), (500, 500), (160, 110))
TEXTS = ((768, 1024), (768, 1024), (1024, 768), (683, 1024))

# Set of table 7 -> sizes of its pictures, median and sigma of its words in tokens (estimates).
KINDS: dict[str, tuple[tuple[Size, ...], int, float]] = {
    "llava_instruct": (COCO, 230, 0.4),
    "sharegpt": ((), 1000, 0.9),
    "vqav2": (COCO, 130, 0.4),
    "gqa": (GENOME, 220, 0.5),
    "okvqa": (COCO, 35, 0.2),
    "ocrvqa": (COVERS, 130, 0.25),
    "aokvqa": (COCO, 70, 0.2),
    "textcaps": (TEXTS, 110, 0.5),
    "refcoco": (COCO, 300, 0.5),
    "vg": (GENOME, 380, 0.4),
}


@dataclass(frozen=True)
class Drawn:
    """One sample before scaling: the size of its picture, if any, and tokens of its words."""

    size: Size | None
    words: int


@dataclass(frozen=True)
class Scale:
    """How a small model reads the samples: with tiles of `tile_px`, a divisor of 224."""

    tile_px: int

    @property
    def image(self) -> int:
        """What the sides of pictures are divided by."""
        return REAL_TILE_PX // self.tile_px

    @property
    def tokens(self) -> int:
        """What visual tokens and words are divided by."""
        return self.image**2

    @property
    def max_length(self) -> int:
        """That of the vicuna-*-hdflex recipes, scaled."""
        return 4096 // self.tokens

    @property
    def hd(self) -> HDConfig:
        """`hdflex` with such tiles."""
        return replace(PRESETS["hdflex"], tile_px=self.tile_px)


NANO = Scale(56)


def draw(setting: str, count: int, seed: int) -> list[Drawn]:
    """Samples of a setting; the same ones for the same seed."""
    kinds = {"hd": _draw_hd, "mix665k": _draw_mix665k, CAPTIONS: _draw_caption}
    rng = np.random.default_rng((seed, list(kinds).index(setting)))
    return [kinds[setting](rng) for _ in range(count)]


def _draw_hd(rng: np.random.Generator) -> Drawn:
    words = _words(rng, 250, 1.0)
    if rng.random() < 0.06:
        return Drawn(None, words)
    return Drawn(_size(rng), words)


def _draw_caption(rng: np.random.Generator) -> Drawn:
    return Drawn(_size(rng), max(1, int(rng.lognormal(math.log(CAPTION_TOKENS), 0.4))))


def _size(rng: np.random.Generator) -> Size:
    side = math.exp(rng.uniform(math.log(120), math.log(1600)))
    aspect = math.exp(rng.normal(0, 0.35) / 2)
    return round(side / aspect), round(side * aspect)


def _draw_mix665k(rng: np.random.Generator) -> Drawn:
    counts = np.array([PAPER[kind] for kind in KINDS], dtype=float)
    sizes, median, sigma = list(KINDS.values())[rng.choice(len(KINDS), p=counts / counts.sum())]
    size = sizes[rng.integers(len(sizes))] if sizes else None
    return Drawn(size, _words(rng, median, sigma))


def _words(rng: np.random.Generator, median: int, sigma: float) -> int:
    drawn = int(rng.lognormal(math.log(median), sigma))
    return SYSTEM_TOKENS + min(drawn, MOST_WORDS)


def records_of(drawn: list[Drawn], scale: Scale = NANO) -> list[Record]:
    """The samples at a model's scale, as records; `picture` makes their images."""
    records = []
    for index, one in enumerate(drawn):
        count = max(1, round(one.words / scale.tokens))
        words = " ".join(ONE_TOKEN_WORDS[(index + i) % len(ONE_TOKEN_WORDS)] for i in range(count))
        tag = "" if one.size is None else f"{IMAGE_TAG}\n"
        turns = (Turn("human", f"{tag}What is it?"), Turn("gpt", words))
        images = () if one.size is None else ("{}x{}".format(*one.size),)
        records.append(Record(str(index), images, turns, "drawn", index))
    return records


def picture(record: Record, number: int, scale: Scale = NANO) -> bytes:
    """The PNG of a record's image at a model's scale: colours of its own in two ramps."""
    height, width = (
        max(1, round(int(side) / scale.image)) for side in record.images[number].split("x")
    )
    rows, cols = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    own = np.full((height, width), 37 * record.index % 256)
    pixels = np.stack([rows + 0 * cols, cols + 0 * rows, own], axis=2)
    return png_bytes(from_array(pixels.astype(np.uint8)))
