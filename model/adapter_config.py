"""The config.json of an adapter folder: whose frozen weights it needs, and what the model is.

Nothing here imports torch; reading an adapter needs model/adapter.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..hd.errors import UsageError
from .config import LlavaHDConfig, read_config_json

ADAPTER_TYPE = "llava_hd_lora"
KEYS = ("model_type", "base", "base_digest", "bits", "vision", "model")


@dataclass(frozen=True)
class BaseFolders:
    """Where the frozen weights are: the folder of a whole model (`path`), or of its two parts.
    A relative one is relative to the adapter folder."""

    path: str | None = None
    vision: str | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        given = (self.path is not None, self.vision is not None, self.language is not None)
        if given not in ((True, False, False), (False, True, True)):
            raise UsageError("base must name path, or vision and language")

    def named(self) -> dict[str, str]:
        """The folders that are given, by field."""
        return {name: folder for name, folder in vars(self).items() if folder is not None}

    def found(self, adapter: Path) -> dict[str, Path]:
        """The same as paths; UsageError where one is not there."""
        folders = {name: adapter / folder for name, folder in self.named().items()}
        for name, folder in folders.items():
            if not folder.is_dir():
                raise UsageError(
                    f"{adapter}/config.json: base.{name} {folder} is not there; put the model "
                    f"there, correct base.{name}, or give the whole model to merge-lora as --base"
                )
        return folders


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter folder belongs to.

    model: the configuration of base and adapter together. base_digest: `adapter.base_digest` of
    the frozen weights. bits: those of the frozen linears while it was trained (16: as they are).
    vision: whether the folder holds a tower of its own, because that was trained too.
    """

    model: LlavaHDConfig
    base: BaseFolders
    base_digest: str
    bits: int = 16
    vision: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return {
            "model_type": ADAPTER_TYPE,
            "base": self.base.named(),
            "base_digest": self.base_digest,
            "bits": self.bits,
            "vision": self.vision,
            "model": self.model.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """The configuration written by `to_dict`; every key required, no other allowed."""
        for key in values:
            if key not in KEYS:
                raise UsageError(f"{key!r} is not a setting; there is {', '.join(KEYS)}")
        for key, kind in (
            ("base", dict),
            ("base_digest", str),
            ("bits", int),
            ("vision", bool),
            ("model", dict),
        ):
            if not isinstance(values.get(key), kind):
                raise UsageError(f"{key!r} is missing or damaged; copy or save the adapter again")
        base = values["base"]
        if not set(base) <= {"path", "vision", "language"} or not all(
            isinstance(folder, str) for folder in base.values()
        ):
            raise UsageError("base must name path, or vision and language, as text")
        return cls(
            model=LlavaHDConfig.from_dict(values["model"]),
            base=BaseFolders(**base),
            base_digest=values["base_digest"],
            bits=values["bits"],
            vision=values["vision"],
        )


def is_adapter(folder: str | Path) -> bool:
    """Whether a model folder is an adapter of ours; UsageError where it is no model folder."""
    return bool(read_config_json(folder)["model_type"] == ADAPTER_TYPE)


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """The config.json of an adapter folder. Raises UsageError."""
    if not is_adapter(folder):
        raise UsageError(
            f"{folder} is a whole model, not an adapter (its config.json has another model_type); "
            "give the output folder of a LoRA run"
        )
    try:
        return AdapterConfig.from_dict(read_config_json(folder))
    except UsageError as error:
        raise UsageError(f"{folder}/config.json: {error}") from error


def require_bitsandbytes(bits: int) -> None:
    """UsageError where bitsandbytes is needed and not installed."""
    if bits < 16 and find_spec("bitsandbytes") is None:
        raise UsageError(
            f"lora.bits {bits} needs bitsandbytes; install llava-hd[qlora], or set lora.bits to 16"
        )
