"""What a transformers folder says beside its weights: how images are prepared, how prompts read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from ..hd.grid import HDConfig
from ..hd.tiler import CLIP_MEAN, CLIP_STD
from .chat_template import messages
from .config import readable
from .export_files import BICUBIC
from .prompt import IMAGE_TAG, Turn, prompt_text

TURNS = (Turn("human", f"{IMAGE_TAG}\nWho?"), Turn("gpt", "A cat."), Turn("human", "Why?"))
PREPROCESSORS = (
    ("preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
)


def check_preprocessor(folder: Path, hd: HDConfig) -> list[str]:
    """UsageError where a folder's image processor does what our loader does not; notes for what is
    done as LLaVA's training did it instead."""
    file, values = _preprocessor(folder)
    if file is None:
        return []
    due: dict[str, Any] = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    due |= {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": BICUBIC}
    for key, ours in due.items():
        theirs = values.get(key)
        with readable(f"{file}: {key}"):
            same = theirs is None or _close(theirs, ours)
        if not same:
            raise UsageError(f"{file}: {key} is {theirs!r}, only {ours!r} is read")
    pinpoints = values.get("image_grid_pinpoints")
    if hd.grids and pinpoints is not None:
        grids = [[rows * hd.tile_px, cols * hd.tile_px] for rows, cols in hd.grids]
        with readable(f"{file}: image_grid_pinpoints"):
            same = sorted(map(list, pinpoints)) == sorted(grids)
        if not same:
            raise DataError(
                f"{file}: image_grid_pinpoints are not those of config.json, so tiles and tokens "
                "would not fit; copy the files of one model"
            )
    if not hd.grids and not values.get("do_pad"):
        return [f"{file.name} crops images to their middle; here they are padded, as in training"]
    return []


def _preprocessor(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The file that describes the image processor, and its values; newer folders nest them."""
    for name, key in PREPROCESSORS:
        file = folder / name
        if not file.is_file():
            continue
        with readable(file):
            values = json.loads(file.read_text(encoding="utf-8"))
            values = values if key is None else values.get(key)
            if values is not None:
                return file, dict(values)
    return None, {}


def _close(theirs: Any, ours: Any) -> bool:
    """Equal, numbers of a list to 1e-4: other places write fewer digits."""
    if isinstance(ours, list):
        return len(theirs) == len(ours) and all(
            abs(a - b) < 1e-4 for a, b in zip(theirs, ours, strict=True)
        )
    return bool(theirs == ours)


def template_note(folder: Path, tokenizer: Any, name: str) -> list[str]:
    """A note where a folder's chat template writes other prompts than the conversation template
    `name`, with which the model will be asked."""
    chat_template = tokenizer.chat_template
    legacy = folder / "chat_template.json"
    if chat_template is None and legacy.is_file():
        with readable(legacy):
            chat_template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
    if chat_template is None:
        return []
    due = prompt_text(TURNS, name, tokenizer.eos_token)
    bare = _bare(due, tokenizer)
    rendered = [_rendered(tokenizer, chat_template, listed) for listed in (True, False)]
    if any(text is not None and _bare(text, tokenizer) == bare for text in rendered):
        return []
    shown = next((text for text in rendered if text), None)
    what = "cannot be rendered" if shown is None else f"writes {shown!r}"
    return [
        f"the folder's chat template {what}; the model will be asked with {name}: {due!r}. If it "
        "was trained with another template, its answers suffer"
    ]


def _bare(text: str, tokenizer: Any) -> str:
    """Without the first token, which some templates write and others leave to the tokenizer."""
    return text.removeprefix(tokenizer.bos_token or "").strip()


def _rendered(tokenizer: Any, chat_template: str, listed: bool) -> str | None:
    """What a template writes of the turns; None where it does not take them in that form."""
    first = Turn("human", TURNS[0].text.replace("\n", "") if listed else TURNS[0].text)
    try:
        return str(
            tokenizer.apply_chat_template(
                messages((first, *TURNS[1:]), listed),
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except Exception:  # a template of others may raise anything
        return None
