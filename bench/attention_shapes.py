"""What the benchmark runs of attention, as data: shapes, packs like those of HD training, work.

| operation | what `rows` counts | shapes |
|---|---|---|
| attention_dense | tokens of a sequence | causal, head dim 128, 32 heads, 16k tokens in all; once with 8 key heads |
| attention_tower | tiles | full, head dim 64, 16 heads; 257 tokens (224 px) and 577 (336 px) |
| attention_packed | tokens of the pack | causal, head dim 128, 32 heads; samples of hd448 and hdflex |

Useful operations (Dao, FlashAttention-2): 4 S² H d forward for each sequence of S tokens and H query
heads, half of it when causal; backward 2.5 times forward. Least bytes: q, k, v and the output once
forward; backward these four, the log-sum-exps (fp32), the gradient of the output and three
gradients. What somebody computes on padding is no useful work.
"""  # noqa: E501

from __future__ import annotations

import random
from dataclasses import dataclass, replace

OPERATIONS = ("attention_dense", "attention_packed", "attention_tower")
LENGTHS, QUICK_LENGTHS = (1024, 2048, 4096, 8192, 16384), (128, 256)
DENSE_TOKENS, QUICK_DENSE_TOKENS = 16384, 512
TILES, QUICK_TILES = (64, 160, 320), (2,)
TOWER_LENGTHS = (257, 577)
PACK_TOKENS, QUICK_PACK_TOKENS = 32768, 1024
QUICK_SHRINKS = 8  # lengths of a quick pack's samples are an eighth
BACKWARD = 2.5

# Common photos, (height, width): 4:3, 3:2, 16:9 and their portraits, 1:1, 2:1, 7:3, a thumbnail.
PHOTOS = (
    (480, 640), (640, 480), (427, 640), (640, 427), (1080, 1920), (1920, 1080), (640, 640),
    (1000, 2000), (600, 1400), (224, 224),
)  # fmt: skip
# Their visual tokens by preset, as hd.plan.plan_image counts them. Numbers, because a bare machine
# has no `hd`; a test counts them again.
PHOTO_TOKENS = {
    "hd448": (1048, 1056, 982, 992, 850, 864, 1312, 784, 718, 1312),
    "hdflex": (1632, 1642, 1824, 1840, 1628, 1648, 1312, 1432, 1236, 528),
}
TEXT_TOKENS = (72, 1344)  # least and most of a sample: with the photos, 600 to 3,184 tokens

LONGEST_CHECKED = 2048  # tokens of a sequence that are compared with fp64
SCORES_CHECKED = 2**27  # queries x keys x heads: 1 GiB in fp64, of which a backward holds several
SCORES_TIMED = 2**30  # of those who write the scores out


@dataclass(frozen=True)
class Shape:
    """Self-attention over sequences: `lengths` in tokens, end to end when `packed`, else equal and
    a batch."""

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    packed: bool
    lengths: tuple[int, ...]

    @property
    def operation(self) -> str:
        """Its name among OPERATIONS, which are also kernels/backend.py's."""
        if self.packed:
            return "attention_packed"
        return "attention_dense" if self.causal else "attention_tower"

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def scores(self) -> int:
        """Numbers in all score matrices."""
        return self.heads * sum(length**2 for length in self.lengths)

    @property
    def ends(self) -> tuple[int, ...]:
        """0 and where each sequence ends: cu_seqlens."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return tuple(ends)

    def size(self, heads: int) -> tuple[int, ...]:
        """Of a tensor with so many heads: `[T heads d]` packed, else `[B S heads d]`."""
        if self.packed:
            return self.tokens, heads, self.head_dim
        return len(self.lengths), self.longest, heads, self.head_dim

    def work(self, itemsize: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """(useful floating-point operations, least bytes) of forward, and of backward."""
        flops = 4 * self.scores * self.head_dim / (2 if self.causal else 1)
        rows = self.tokens * self.head_dim * itemsize
        ends = 2 * rows * (self.heads + self.kv_heads)  # q and the output, k and v
        logs = 4 * self.tokens * self.heads
        return (flops, ends), (BACKWARD * flops, 2 * ends + logs)


def shapes_of(op: str, rows: tuple[int, ...] | None, quick: bool) -> list[tuple[str, int, Shape]]:
    """(size, rows, shape) of an operation's cases, at the given rows or its own."""
    if op == "attention_dense":
        return _dense(rows or (QUICK_LENGTHS if quick else LENGTHS), quick)
    if op == "attention_tower":
        heads = 2 if quick else 16
        return [
            (f"{length} tokens", tiles, Shape(heads, heads, 64, False, False, (length,) * tiles))
            for length in TOWER_LENGTHS
            for tiles in rows or (QUICK_TILES if quick else TILES)
        ]
    heads, shrinks = (4, QUICK_SHRINKS) if quick else (32, 1)
    return [
        (preset, tokens, Shape(heads, heads, 128, True, True, pack(preset, tokens, shrinks)))
        for preset in PHOTO_TOKENS
        for tokens in rows or ((QUICK_PACK_TOKENS if quick else PACK_TOKENS),)
    ]


def _dense(rows: tuple[int, ...], quick: bool) -> list[tuple[str, int, Shape]]:
    """Every length with as many key heads as query heads, the middle one also with a quarter."""
    heads, tokens = (4, QUICK_DENSE_TOKENS) if quick else (32, DENSE_TOKENS)
    made = []
    for kv_heads, lengths in ((heads, rows), (heads // 4, rows[len(rows) // 2 :][:1])):
        name = f"{heads} heads" if kv_heads == heads else f"{heads}/{kv_heads} heads"
        for length in lengths:
            batch = max(1, tokens // length)
            made.append((name, length, Shape(heads, kv_heads, 128, True, False, (length,) * batch)))
    return made


def pack(preset: str, tokens: int, shrinks: int = 1) -> tuple[int, ...]:
    """Lengths of samples with one photo and a text each, until the pack is full; the last is cut.

    Always the same for the same arguments. shrinks: divisor of all lengths.
    """
    drawn = random.Random(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        length = drawn.choice(PHOTO_TOKENS[preset]) + drawn.randint(*TEXT_TOKENS)
        lengths.append(min(left, max(1, length // shrinks)))
    return tuple(lengths)


def checked_shape(shape: Shape) -> Shape:
    """The shape at which errors are measured: this one, or fewer and shorter sequences of the same
    kind where fp64 scores would fill the memory. Packs keep their mixture, at half the lengths."""
    lengths = shape.lengths
    if shape.longest > LONGEST_CHECKED:
        most = [n // 2 for n in lengths] if shape.packed else [LONGEST_CHECKED for _ in lengths]
        lengths = tuple(min(n, LONGEST_CHECKED) for n in most)
    fits = max(1, sum(1 for n in range(len(lengths)) if _scores(shape, lengths[: n + 1])))
    return replace(shape, lengths=lengths[:fits])


def _scores(shape: Shape, lengths: tuple[int, ...]) -> bool:
    return replace(shape, lengths=lengths).scores <= SCORES_CHECKED
