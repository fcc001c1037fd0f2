"""Mixture recipes: YAML -> a `MixtureRecipe`, strictly, with a "did you mean" for unknown keys.

A recipe names the sources of an instruction mixture in the order in which they are written: the
kind of their annotation files, the files, the image folder, how many conversations, options of
the kind (mixture_kinds.py).
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..hd.errors import UsageError
from ..hd.grid import suggest
from .mixture_kinds import KINDS, Kind
from .record_images import path_fault

MIXTURES = Path(__file__).resolve().parent / "mixtures"


@dataclass(frozen=True)
class Source:
    """One set. files: by role, each one path or several. images: folder below the image root.
    count: so many conversations, drawn by the seed; null takes all."""

    kind: str
    name: str
    files: Mapping[str, tuple[str, ...]]
    options: Any
    images: str = ""
    count: int | None = None


@dataclass(frozen=True)
class MixtureRecipe:
    """The sources in the order in which they are written. fraction: share of each of them."""

    sources: tuple[Source, ...]
    seed: int = 0
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, not {self.seed}")
        if not 0 < self.fraction <= 1:
            raise UsageError(f"fraction must be above 0 and at most 1, not {self.fraction:g}")


@dataclass(frozen=True)
class _Head:
    """The keys of a recipe file."""

    sources: list = field()
    seed: int = 0
    fraction: float = 1.0


@dataclass(frozen=True)
class _Entry:
    """The keys of a source."""

    kind: str
    files: dict
    name: str | None = None
    images: str = ""
    count: int | None = None
    options: dict = field(default_factory=dict)


def mixture_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in MIXTURES.glob("*.yaml"))


def find_mixture(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one. Raises UsageError."""
    if Path(name).is_file():
        return Path(name)
    if (MIXTURES / f"{name}.yaml").is_file():
        return MIXTURES / f"{name}.yaml"
    if "/" in name or name.endswith((".yaml", ".yml")):
        known = ", ".join(mixture_names())
        raise UsageError(f"recipe {name}: no such file; the shipped ones are {known}")
    raise UsageError(f"recipe {name!r} is unknown; {suggest(name, mixture_names())}")


def load_mixture(name: str) -> MixtureRecipe:
    """The recipe of a path or a shipped name. UsageError names file, setting and remedy."""
    path = find_mixture(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the path") from error
    try:
        return mixture_from(values)
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from error


def mixture_from(values: Any) -> MixtureRecipe:
    """Checked values; UsageError names the setting and the remedy."""
    head = _build(_Head, values, "")
    if not head.sources:
        raise UsageError("sources is empty; name at least one")
    sources = tuple(_source(entry, f"sources[{i}]") for i, entry in enumerate(head.sources))
    names = [source.name for source in sources]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"sources[{i}].name {name!r} is there twice; give each its own")
    return MixtureRecipe(sources, head.seed, head.fraction)


def _source(values: Any, where: str) -> Source:
    entry = _build(_Entry, values, f"{where}.")
    if entry.kind not in KINDS:
        hint = suggest(entry.kind, list(KINDS))
        raise UsageError(f"{where}.kind {entry.kind!r} is unknown; {hint}")
    kind = KINDS[entry.kind]
    fault = path_fault(entry.images) if entry.images else None
    if fault:
        raise UsageError(f"{where}.images {entry.images!r} {fault}; name a folder below the root")
    if entry.count is not None and entry.count < 1:
        raise UsageError(f"{where}.count must be 1 or more, not {entry.count}; null takes all")
    return Source(
        kind=entry.kind,
        name=entry.kind if entry.name is None else entry.name,
        files=_files(entry.files, kind, f"{where}.files"),
        options=_build(kind.options, entry.options, f"{where}.options."),
        images=entry.images.strip("/"),
        count=entry.count,
    )


def _files(values: Mapping[Any, Any], kind: Kind, where: str) -> dict[str, tuple[str, ...]]:
    known = [*kind.files, *kind.optional_files]
    for role in values:
        if role not in known:
            raise UsageError(f"{where}.{role} is not a file of it; {suggest(str(role), known)}")
    for role in kind.files:
        if role not in values:
            raise UsageError(f"{where}.{role} is missing; give the file")
    found = {}
    for role, given in values.items():
        paths = given if isinstance(given, list) else [given]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise UsageError(f"{where}.{role} must be a path or a list of them, not {given!r}")
        found[role] = tuple(paths)
    return found


def _build(cls: type, values: Any, prefix: str) -> Any:
    """The flat dataclass of a table; unknown, missing and ill-typed keys are UsageErrors."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{prefix.rstrip('.') or 'the recipe'} must be a table of settings")
    if not is_dataclass(cls):
        raise TypeError(f"{cls} is not a dataclass")
    kinds, known = get_type_hints(cls), [item.name for item in fields(cls)]
    for key in values:
        if key not in known:
            hint = suggest(str(key), known) if known else "there is none here"
            raise UsageError(f"{prefix}{key} is not a setting; {hint}")
    for item in fields(cls):
        optional = item.default is not MISSING or item.default_factory is not MISSING
        if item.name not in values and not optional:
            raise UsageError(f"{prefix}{item.name} is missing; set it")
    checked = {key: _value(kinds[key], value, prefix + key) for key, value in values.items()}
    try:
        return cls(**checked)
    except UsageError as error:
        raise UsageError(f"{prefix}{error}") from error


def _value(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if text not in choices:
            raise UsageError(f"{name} {value!r} is unknown; {suggest(str(value), choices)}")
        return text
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        if type(value) is option or (option is types.NoneType and value is None):
            return value
        if option is float and type(value) is int:
            return float(value)
    raise UsageError(f"{name} must be {' or '.join(WORDS[one] for one in options)}, not {value!r}")


WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
    types.NoneType: "null",
}
