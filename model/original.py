"""The original LLaVA's folders (LlavaLlamaForCausalLM): their config.json as ours, and ours as
theirs. Sizes are (width, height) there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from ..hd.errors import UsageError
from ..hd.grid import HDConfig
from .config import PROJECTORS, read_config_json, readable
from .foreign import config_dict
from .key_names import from_original

ARCHITECTURE = "LlavaLlamaForCausalLM"
# Values that our forward has no other form of; None stands for "not there".
REQUIRED: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": ("patch", None),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
}
OLD_NAMES = ("rope_theta", "rope_scaling", "torch_dtype")


@dataclass(frozen=True)
class Original:
    """What an original folder says. vision: the CLIP folder inside it, if it has one;
    tower: its `mm_vision_tower`."""

    folder: Path
    hd: HDConfig
    text: Mapping[str, Any]
    projector: str
    vision_layer: int
    tower: str
    vision: Path | None
    rename: Callable[[str], str | None] = from_original


def is_original(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an original LLaVA folder."""
    architectures = values.get("architectures")
    named = isinstance(architectures, list) and ARCHITECTURE in architectures
    return "mm_vision_tower" in values or named


def read_original(folder: Path, vision: Path | None = None) -> Original:
    """An original folder's config.json. vision: the CLIP folder; otherwise one inside `folder` of
    the name that config.json gives. Raises UsageError naming the field that we have no word for.
    """
    with readable(f"{folder}/config.json"):
        return _read(folder, vision, read_config_json(folder))


def _read(folder: Path, vision: Path | None, values: Mapping[str, Any]) -> Original:
    where = f"{folder}/config.json"
    architectures = values.get("architectures") or [ARCHITECTURE]
    if ARCHITECTURE not in architectures:
        raise UsageError(f"{where}: architectures is {architectures}, only {ARCHITECTURE} is read")
    for key, allowed in REQUIRED.items():
        if values.get(key) not in allowed:
            raise UsageError(f"{where}: {key} is {values[key]!r}, only {allowed[0]!r} is read")
    for key in ("mm_vision_tower", "mm_vision_select_layer", "hidden_size", "vocab_size"):
        if key not in values:
            raise UsageError(f"{where} has no {key}; it does not describe a LLaVA model")
    if not isinstance(values["mm_vision_select_layer"], int):
        raise UsageError(f"{where}: mm_vision_select_layer must be one layer, a whole number")
    projector = values.get("mm_projector_type", "linear")
    if projector not in PROJECTORS:
        raise UsageError(
            f"{where}: mm_projector_type is {projector!r}, only {' and '.join(PROJECTORS)} are read"
        )
    tower = str(values["mm_vision_tower"])
    inside = folder / Path(tower).name
    found = vision or (inside if inside.is_dir() else None)
    text = _text(values)
    side, patch = _sides(found) if found else (224, 14)
    return Original(
        folder=folder,
        hd=_geometry(where, values, side, patch),
        text=text,
        projector=projector,
        vision_layer=values["mm_vision_select_layer"],
        tower=tower,
        vision=found,
    )


def _text(values: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration among the top-level keys."""
    known = {*LlamaConfig().to_dict(), *OLD_NAMES} - {"architectures", "model_type"}
    return config_dict(LlamaConfig(**{k: v for k, v in values.items() if k in known}))


def _sides(vision: Path) -> tuple[int, int]:
    """(tile, patch) in pixels of a CLIP folder."""
    values = read_config_json(vision)
    values = values.get("vision_config", values)
    if "image_size" not in values or "patch_size" not in values:
        raise UsageError(f"{vision}/config.json has no image_size and patch_size of a CLIP tower")
    return values["image_size"], values["patch_size"]


def _geometry(where: str, values: Mapping[str, Any], tile_px: int, patch_px: int) -> HDConfig:
    aspect = values.get("image_aspect_ratio")
    merge = values.get("mm_patch_merge_type", "flat")
    sides = {"tile_px": tile_px, "patch_px": patch_px}
    if aspect == "pad":
        return HDConfig(
            **sides, grids=(), global_view="pad", keep="all", row_end=False, pad_colour="mean"
        )
    if aspect != "anyres":
        raise UsageError(
            f"{where}: image_aspect_ratio is {aspect!r}, only 'pad' and 'anyres' are read"
        )
    if merge != "spatial_unpad":
        raise UsageError(f"{where}: mm_patch_merge_type is {merge!r}, only 'spatial_unpad' is read")
    grids = []
    for pinpoint in values.get("image_grid_pinpoints") or ():
        width, height = pinpoint
        if width % tile_px or height % tile_px:
            raise UsageError(
                f"{where}: image_grid_pinpoints has {pinpoint}, which is not a multiple of the "
                f"tower's {tile_px} px"
            )
        grids.append((height // tile_px, width // tile_px))
    if not grids:
        raise UsageError(f"{where} has no image_grid_pinpoints; anyres needs them")
    return HDConfig(
        **sides,
        grids=tuple(grids),
        global_view="squash",
        keep="llava_next",
        row_end=True,
        pad_colour="black",
    )
