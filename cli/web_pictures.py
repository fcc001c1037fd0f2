"""The pictures of the web page: what was uploaded, what the model sees of it, examples."""

from __future__ import annotations

import html
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..hd.errors import UsageError
from ..hd.grid import PRESETS, HDConfig
from ..hd.image import ImageError, ImageLimits, image_size, load_image, resize, save_png
from ..hd.limits import ResolutionLimits, limited
from ..hd.plan import TilePlan, plan_image
from ..hd.preview import draw_plan

if TYPE_CHECKING:
    from PIL.Image import Image

AS_BEGUN = "as begun"  # as trained, within the limits that the command was given
THUMBNAIL_PX = 384
NUM_EXAMPLES = 8


@dataclass(frozen=True)
class Picture:
    """An image that was uploaded: its name, its RGB pixels, and a small PNG of it."""

    name: str
    image: Image
    thumbnail: Path


def read_picture(path: Path, name: str, limits: ImageLimits, folder: Path) -> Picture:
    """The picture of an uploaded file; its thumbnail is written into the folder.

    Raises ImageError with the user's name of the file, and a remedy that a user has.
    """
    try:
        image = load_image(path, limits)
    except ImageError as error:
        remedy = error.remedy.partition(" or raise ")[0]
        raise ImageError(_plain(name), error.reason, remedy) from error
    thumbnail = new_path(folder)
    save_png(_small(image), thumbnail)
    return Picture(_plain(name), image, thumbnail)


def _plain(name: str) -> str:
    """A file's name in one short line."""
    last = Path(name).name or "upload"
    shown = last if last.isprintable() else ascii(last)
    return shown if len(shown) <= 80 else f"{shown[:60]}...{shown[-16:]}"


def _small(image: Image) -> Image:
    height, width = image_size(image)
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    return resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))


def remove(paths: Iterable[Path]) -> None:
    """Delete files that may be gone already."""
    for path in paths:
        path.unlink(missing_ok=True)


def new_path(folder: Path) -> Path:
    """A name for a PNG that nobody can guess."""
    return folder / f"{secrets.token_hex(16)}.png"


def fitting_presets(trained: HDConfig) -> list[str]:
    """The presets that a model of this geometry can be asked with."""
    return [name for name in PRESETS if _of_preset(trained, name).reads_like(trained)]


def chosen_geometry(first: HDConfig, preset: str, max_tiles: int | None) -> HDConfig:
    """The geometry that the controls say. first: the one that the page begins with; preset: one of
    PRESETS or AS_BEGUN; max_tiles: all grids of at most so many tiles instead. What a model cannot
    be asked with leaves it as it began. Raises UsageError for values that no control has."""
    if preset not in (*PRESETS, AS_BEGUN):
        raise UsageError(f"geometry {preset!r} is unknown; choose one of the list")
    limits = ResolutionLimits(max_tiles=max_tiles)
    if not first.grids:
        return first
    chosen = first if preset == AS_BEGUN else _of_preset(first, preset)
    return limited(chosen if chosen.reads_like(first) else first, limits)


def _of_preset(trained: HDConfig, preset: str) -> HDConfig:
    """The preset's geometry in the model's tiles, within its limit of tokens."""
    return replace(
        PRESETS[preset],
        tile_px=trained.tile_px,
        patch_px=trained.patch_px,
        max_visual_tokens=trained.max_visual_tokens,
    )


def draw_tiles(image: Image, hd: HDConfig, folder: Path) -> tuple[TilePlan, Path]:
    """What a model of this geometry sees: the plan, and its picture in the folder."""
    plan = plan_image(image_size(image), hd)
    path = new_path(folder)
    save_png(draw_plan(image, plan, caption=False), path)
    return plan, path


def counts_html(name: str, plan: TilePlan, note: str = "") -> str:
    """What the model of that name sees, in words in the colours of its picture."""
    height, width = plan.image_size
    shape = f"{height} x {width} px"
    if plan.config.grids:
        rows, cols = plan.grid
        shape += f" · grid {rows} x {cols} of {plan.config.tile_px} px tiles"
    elif plan.has_global_view:
        shape += f" · one view of {plan.config.tile_px} px"
    parts = []
    if plan.has_global_view:
        parts.append(f'<span class="view">{plan.num_global_tokens} global view</span>')
    if plan.config.grids:
        rows, cols = plan.kept_size
        parts.append(f'<span class="map">{rows * cols} map ({rows} x {cols})</span>')
    if plan.num_row_ends:
        parts.append(f'<span class="ends">{plan.num_row_ends} row-ends</span>')
    key = "yellow: tiles · green frame: kept cells" if plan.config.grids else "blue frame: the view"
    tiles = "one tile" if plan.num_tiles == 1 else f"{plan.num_tiles} tiles"
    told = f'<div class="told">{html.escape(note)}</div>' if note else ""
    return (
        f'<div class="counts"><div><b>What {html.escape(name)} sees: {plan.num_tokens} visual '
        f"tokens</b> from {tiles}</div><div>{' + '.join(parts)}</div>"
        f'<div class="shape">{shape}<br>{key}</div>{told}</div>'
    )


def draw_examples(folder: Path) -> list[Path]:
    """A few drawn scenes as PNG, of the kind that the nano models know."""
    from ..bench.scenes import dataset_scene, native_pixels

    paths = [folder / f"scene-{number + 1}.png" for number in range(NUM_EXAMPLES)]
    for number, path in enumerate(paths):
        save_png(native_pixels(dataset_scene(0, "example", number)), path)
    return paths
