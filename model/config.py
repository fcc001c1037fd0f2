"""What a LlavaHD model is, as a value: written as `config.json`, read back to build the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..hd.errors import LlavaHDError, UsageError
from ..hd.grid import HDConfig, suggest
from .prompt import get_template

MODEL_TYPE = "llava_hd"
PROJECTORS = ("mlp2x_gelu", "linear")
# Of a part's configuration, what says how it was loaded or saved, not what it computes.
PASSING = ("dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path")


@dataclass(frozen=True)
class LlavaHDConfig:
    """The parts of a model and how they fit together.

    hd: geometry of the images.
    vision, text: the configurations of the CLIP tower and of the language model, as transformers
        writes them (with `model_type`).
    image_token_id: the id that holds a visual token's place; inside the vocabulary.
    projector: "mlp2x_gelu" (LLaVA-1.5) or "linear" (the original LLaVA).
    vision_layer: index into the tower's hidden states; -2 is the one before the last layer's.
    template: name of the conversation template (model/prompt.py).
    """

    hd: HDConfig
    vision: Mapping[str, Any] = field(repr=False)
    text: Mapping[str, Any] = field(repr=False)
    image_token_id: int
    projector: str = "mlp2x_gelu"
    vision_layer: int = -2
    template: str = "vicuna_v1"

    def __post_init__(self) -> None:
        if self.projector not in PROJECTORS:
            hint = suggest(str(self.projector), PROJECTORS)
            raise UsageError(f"model.projector {self.projector!r} is unknown; {hint}")
        get_template(self.template)
        for name, part, key in (
            ("vision", self.vision, "num_hidden_layers"),
            ("text", self.text, "model_type"),
            ("text", self.text, "vocab_size"),
        ):
            if key not in part:
                raise UsageError(f"model.{name} has no {key}; it does not describe a model")
        if not 0 <= self.image_token_id < self.text["vocab_size"]:
            raise UsageError(
                f"model.image_token_id {self.image_token_id} is outside the vocabulary of "
                f"{self.text['vocab_size']}"
            )
        for name, key, ours in (
            ("tile", "image_size", self.hd.tile_px),
            ("patch", "patch_size", self.hd.patch_px),
        ):
            theirs = self.vision.get(key)
            if theirs != ours:
                raise UsageError(
                    f"hd.{name}_px is {ours}, but the vision tower takes {theirs} px "
                    f"(its config's {key}); choose a preset or a tower that fit each other"
                )
        layers = self.vision["num_hidden_layers"]
        if not -layers - 1 <= self.vision_layer <= layers:
            raise UsageError(
                f"model.vision_layer {self.vision_layer} is outside the tower's {layers} layers"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"hd": self.hd.to_dict(), "vision": dict(self.vision), "text": dict(self.text)}
        return {"model_type": MODEL_TYPE, "architectures": ["LlavaHD"], **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlavaHDConfig:
        """The configuration written by `to_dict`; every key required, no other allowed."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in (*known, "model_type", "architectures"):
                raise UsageError(f"{key!r} is not a setting; {suggest(key, known)}")
        missing = [name for name in known if name not in values]
        if missing:
            raise UsageError(f"{missing[0]!r} is missing; save the model again")
        chosen = {name: values[name] for name in known}
        return cls(**{**chosen, "hd": HDConfig.from_dict(values["hd"])})


@contextmanager
def readable(where: str | Path, remedy: str = "copy or save the model again") -> Iterator[None]:
    """Turn what the libraries below say of damaged values into UsageError naming `where`.

    They check a configuration or a tokenizer in a dozen ways, each with an exception of its own
    (KeyError, ZeroDivisionError, bare ones of tokenizers), so all are taken; ours pass.
    """
    try:
        yield
    except LlavaHDError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        text = f"no {text}" if isinstance(error, KeyError) else text
        raise UsageError(f"{where} cannot be read ({text[:160]}); {remedy}") from error


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a model folder, of any kind; raises UsageError where there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        what = "has no config.json" if Path(folder).is_dir() else "is not a folder"
        raise UsageError(f"model folder {folder} {what}; give a folder that a model was saved in")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); save the model again") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UsageError(f"{path} has no model_type; it does not describe a model")
    return values
