"""Small synthetic scenes: bright icons on dim backgrounds, described by a few numbers each.

A `Scene` is a value: its size, the colours of its background, its objects. `render` turns a batch
of scenes, each seen through its own window, into pixels of any size, so the same scene can be
written to disk at 224 px or drawn directly as a 56 px crop for the training of a nano tower.
Everything follows from `(seed, index)`; nothing here keeps state.

Filtering: an icon is a 64 x 64 coverage mask. Pixel (y, x) of a view is `A_y mask A_x^T`, where
the rows of A hold the bicubic kernel of PIL (a = -0.5) at the distance between the pixel's centre
and the mask cell's, so a directly drawn view looks like a resized photograph of the scene.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from .icons import icon_masks

SCENE_PX = 224  # long side of a scene
MAX_OBJECTS = 5
CONTROL = 5  # the background is interpolated between CONTROL x CONTROL colours

# Objects keep company: a scene has a theme and takes most of its objects from it. Within a theme
# the earlier words are more frequent, so popular and adversarial negatives mean something.
THEMES: tuple[tuple[str, ...], ...] = (
    ("boat", "fish", "flag", "anchor"),
    ("moon", "star", "bolt", "ring"),
    ("house", "tree", "ladder", "arrow"),
    ("cup", "key", "heart", "cross"),
)
WORDS: tuple[str, ...] = tuple(word for theme in THEMES for word in theme)
THEME_WEIGHTS = (4, 3, 3, 2)
WORD_WEIGHTS = (4, 3, 2, 2)
THEME_SHARE = 0.6  # of the objects come from the scene's theme, the others from anywhere


@dataclass(frozen=True)
class Thing:
    """One object: an index into WORDS, its square box (native px), its colour (0..1)."""

    word: int
    top: float
    left: float
    side: float
    colour: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """A scene of `size` (height, width) px; `ground` holds CONTROL x CONTROL x 3 values 0..1."""

    size: tuple[int, int]
    ground: tuple[float, ...]
    things: tuple[Thing, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The distinct object words, in drawing order."""
        return tuple(WORDS[thing.word] for thing in self.things)


@dataclass(frozen=True)
class Window:
    """A square part of a scene (native px; it may reach beyond the scene) and the pad colour."""

    top: float
    left: float
    side: float
    pad: tuple[float, float, float]


@dataclass(frozen=True)
class SceneStyle:
    """How scenes are drawn: object counts and the range of their sides (native px)."""

    min_things: int = 3
    max_things: int = MAX_OBJECTS
    min_side_px: float = 16.0
    max_side_px: float = 56.0
    sizes: tuple[tuple[int, int], ...] = ((224, 224), (224, 224), (192, 224), (224, 192))


def draw_scene(rng: random.Random, style: SceneStyle = SceneStyle()) -> Scene:
    """A new scene: distinct objects that do not overlap and lie wholly inside."""
    size = rng.choice(style.sizes)
    things: list[Thing] = []
    for word in _draw_words(rng, rng.randint(style.min_things, style.max_things)):
        thing = _place(rng, word, size, style, things)
        if thing is not None:
            things.append(thing)
    base = [rng.uniform(0.02, 0.25) for _ in range(3)]
    ground = tuple(
        min(0.4, max(0.0, base[i % 3] + rng.uniform(-0.12, 0.12))) for i in range(CONTROL**2 * 3)
    )
    return Scene(size, ground, tuple(things))


def _draw_words(rng: random.Random, count: int) -> list[int]:
    theme = rng.choices(range(len(THEMES)), THEME_WEIGHTS)[0]
    width = len(THEMES[0])
    words: list[int] = []
    while len(words) < count:
        place = theme if rng.random() < THEME_SHARE else rng.randrange(len(THEMES))
        word = place * width + rng.choices(range(width), WORD_WEIGHTS)[0]
        if word not in words:
            words.append(word)
    return words


def _place(
    rng: random.Random,
    word: int,
    size: tuple[int, int],
    style: SceneStyle,
    others: Sequence[Thing],
) -> Thing | None:
    """A free place for one object, or None when 40 tries found none."""
    ratio = style.max_side_px / style.min_side_px
    for _ in range(40):
        side = style.min_side_px * ratio ** rng.random()
        top = rng.uniform(1, size[0] - 1 - side)
        left = rng.uniform(1, size[1] - 1 - side)
        if all(
            abs(top + side / 2 - other.top - other.side / 2) > (side + other.side) / 2 + 2
            or abs(left + side / 2 - other.left - other.side / 2) > (side + other.side) / 2 + 2
            for other in others
        ):
            return Thing(word, top, left, side, _bright_colour(rng))
    return None


def _bright_colour(rng: random.Random) -> tuple[float, float, float]:
    """Any hue, but bright: at least one channel is full and none is darker than 0.35."""
    values = [1.0, rng.uniform(0.35, 1.0), rng.uniform(0.35, 1.0)]
    rng.shuffle(values)
    return (values[0], values[1], values[2])


def seen_words(scene: Scene, window: Window, share: float = 0.6) -> list[int]:
    """The words whose object's box lies in the window by at least `share` of its area."""
    found = []
    for thing in scene.things:
        height = _overlap(thing.top, thing.side, window.top, window.side)
        width = _overlap(thing.left, thing.side, window.left, window.side)
        if height * width >= share * thing.side**2:
            found.append(thing.word)
    return found


def _overlap(start: float, length: float, other: float, other_length: float) -> float:
    return max(0.0, min(start + length, other + other_length) - max(start, other))


def whole(scene: Scene, pad: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Window:
    """The square window that holds the whole scene, centred (a letterbox)."""
    side = max(scene.size)
    return Window((scene.size[0] - side) / 2, (scene.size[1] - side) / 2, side, pad)


@cache
def _masks() -> torch.Tensor:
    return torch.from_numpy(np.stack([icon_masks()[word] for word in WORDS])).float()


def _cubic_taps(offset: torch.Tensor) -> torch.Tensor:
    """Keys' bicubic kernel with a = -0.5 (PIL's) at `offset` 0..1: weights `[... 4]` of the taps
    at distances 1 + offset, offset, 1 - offset, 2 - offset."""
    far = torch.stack([1 + offset, 2 - offset], dim=-1)
    near = torch.stack([offset, 1 - offset], dim=-1)
    far = ((-0.5 * far + 2.5) * far - 4) * far + 2
    near = (1.5 * near - 2.5) * near * near + 1
    return torch.stack([far[..., 0], near[..., 0], near[..., 1], far[..., 1]], dim=-1)


def render(
    scenes: Sequence[Scene], windows: Sequence[Window], size: tuple[int, int]
) -> torch.Tensor:
    """Pixels `[n 3 height width]` float 0..1 of each scene through its window (one side ratio).

    A window is `side` high and `side * width / height` wide.
    """
    frame = torch.tensor([(w.top, w.left, size[0] / w.side) for w in windows])
    picture = _grounds(scenes, windows, frame, size)
    seen = [
        (i, thing.word, thing.top, thing.left, thing.side, *thing.colour)
        for i, (scene, window) in enumerate(zip(scenes, windows, strict=True))
        for thing in scene.things
        if _touches(thing, window, size)
    ]
    if not seen:
        return picture
    table = torch.tensor(seen)
    owner, word = table[:, 0].long(), table[:, 1].long()
    place = frame[owner]
    side = table[:, 4] * place[:, 2]
    rows = _icon_weights((table[:, 2] - place[:, 0]) * place[:, 2], side, size[0])
    cols = _icon_weights((table[:, 3] - place[:, 1]) * place[:, 2], side, size[1])
    cover = (rows @ _masks()[word] @ cols.transpose(-1, -2))[:, None]  # [objects 1 height width]
    change = (table[:, 5:, None, None] - picture[owner]).mul_(cover)
    return picture.index_add_(0, owner, change).clamp_(0, 1)


def _touches(thing: Thing, window: Window, size: tuple[int, int]) -> bool:
    """Whether any pixel of the view may show the object (two pixels of margin for the kernel)."""
    margin = 2 * window.side / size[0]
    height, width = window.side, window.side * size[1] / size[0]
    return (
        window.top - margin < thing.top + thing.side
        and thing.top < window.top + height + margin
        and window.left - margin < thing.left + thing.side
        and thing.left < window.left + width + margin
    )


def _icon_weights(start: torch.Tensor, side: torch.Tensor, length: int) -> torch.Tensor:
    """`[objects]` starts and sides in view px -> weights `[objects length cells]`.

    Each mask cell touches the four pixels around its centre; taps outside the view fall into one
    spare row that is cut off.
    """
    cells = _masks().shape[-1]
    step = side[..., None] / cells
    centre = start[..., None] + (torch.arange(cells) + 0.5) * step - 0.5  # in pixel indices
    first = centre.floor()
    taps = _cubic_taps(centre - first) * step[..., None]
    pixel = first[..., None] + torch.arange(-1, 3)
    pixel = torch.where((pixel >= 0) & (pixel < length), pixel, float(length)).long()
    weights = torch.zeros(*start.shape, length + 1, cells)
    weights.scatter_(-2, pixel.transpose(-1, -2), taps.transpose(-1, -2))
    return weights[..., :length, :]


def _grounds(
    scenes: Sequence[Scene], windows: Sequence[Window], frame: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Backgrounds `[n 3 height width]`; what lies outside a scene has the window's pad colour."""
    n = len(scenes)
    control = torch.tensor([scene.ground for scene in scenes]).view(n, CONTROL, CONTROL, 3)
    shape = torch.tensor([scene.size for scene in scenes], dtype=torch.float32)
    weights, inside = [], []
    for axis in (0, 1):
        pixel = (torch.arange(size[axis]) + 0.5) / frame[:, 2:] + frame[:, axis : axis + 1]
        place = (pixel / shape[:, axis : axis + 1]).clamp(0, 1) * (CONTROL - 1)
        knots = torch.arange(CONTROL)
        weights.append((1 - (place[..., None] - knots).abs()).clamp(min=0))
        inside.append(((pixel > 0) & (pixel < shape[:, axis : axis + 1])).float())
    ground = torch.einsum("nhi,nijc,nwj->nchw", weights[0], control, weights[1])
    mask = torch.einsum("nh,nw->nhw", *inside)[:, None]
    pads = torch.tensor([window.pad for window in windows])[:, :, None, None]
    return ground * mask + pads * (1 - mask)
