"""The tensors of the original LLaVA's folders under our names: whole models, LoRA folders, and
stage 1's `mm_projector.bin`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from ..hd.errors import DataError, UsageError
from .config import readable
from .foreign import config_dict
from .import_lora import TRAINABLES, add_adapter, is_lora, plain_name
from .key_names import NOT_THE_TOWER, PROJECTOR, ROW_END, VISION, from_clip, from_original
from .native_state import Gathered
from .original import Original, read_original
from .tensor_files import file_tensors, folder_tensors, has_weights

STAGE_1 = "mm_projector.bin"


def original_state(
    folder: Path, vision: Path | None, language: Path | None, dtype: torch.dtype | None
) -> tuple[Original, Gathered]:
    """What an original folder is, and its tensors. vision: the CLIP folder, if none is inside;
    language: the language model that a LoRA or stage-1 folder belongs to."""
    found = read_original(folder, vision)
    if found.vision is None:
        raise UsageError(
            f"{folder}/config.json: mm_vision_tower {found.tower!r} is not in the folder; give the "
            "folder of that CLIP as --vision"
        )
    whole = has_weights(folder) and not is_lora(folder)
    if not whole and language is None:
        kind = "a LoRA adapter" if is_lora(folder) else "no language model"
        raise UsageError(f"{folder} holds {kind}; give the folder of its base as --language")
    base = folder if whole else language
    assert base is not None
    gathered = Gathered()
    gathered.take(base, folder_tensors(base), from_original, dtype)
    if is_lora(folder):
        add_adapter(folder, gathered.state)
        _replace(gathered, folder / TRAINABLES, dtype)
    elif not any(name.startswith(PROJECTOR) for name in gathered.state):
        _replace(gathered, folder / STAGE_1, dtype)
    if not any(name.startswith(VISION) for name in gathered.state):
        take_tower(gathered, found.vision, dtype)
    return found, gathered


def take_tower(gathered: Gathered, vision: Path, dtype: torch.dtype | None) -> None:
    """Add the image tower of a CLIP folder, whole or alone."""

    def tower() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in folder_tensors(vision):
            if name.startswith(NOT_THE_TOWER):
                gathered.left_out.append(name)
            else:
                yield name, tensor

    gathered.take(vision, tower(), from_clip, dtype)


def tower_config(vision: Path) -> dict[str, object]:
    """The configuration of the image tower of a CLIP folder."""
    with readable(f"{vision}/config.json"):
        return config_dict(CLIPVisionConfig.from_pretrained(vision))


def _replace(gathered: Gathered, file: Path, dtype: torch.dtype | None) -> None:
    """Take a file's tensors, which stand for those of the base where both have them."""
    if not file.is_file():
        raise DataError(f"{file} is missing, and with it the projector; copy the folder again")
    added = Gathered()
    tensors = ((plain_name(name), tensor) for name, tensor in file_tensors(file))
    added.take(file, tensors, from_original, dtype)
    gathered.state |= added.state
    gathered.left_out += added.left_out


def read_projector(file: Path) -> dict[str, Tensor]:
    """Projector and row-end of an original stage 1, under our names; of a file, or of the folder
    that holds it."""
    path = file / STAGE_1 if file.is_dir() else file
    gathered = Gathered()
    tensors = ((plain_name(name), tensor) for name, tensor in file_tensors(path))
    gathered.take(path, tensors, from_original)
    for name in gathered.state:
        if not name.startswith(PROJECTOR):
            raise DataError(f"{path} has {name}, which is not of a projector")
    if not set(gathered.state) - {ROW_END}:
        raise DataError(f"{path} holds no projector; give the mm_projector.bin of a stage 1")
    return gathered.state


def projector_kind(state: dict[str, Tensor]) -> str:
    """The `model.projector` that such tensors belong to."""
    return "linear" if PROJECTOR + "weight" in state else "mlp2x_gelu"
