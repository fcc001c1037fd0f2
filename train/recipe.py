"""Recipes: YAML to a `TrainConfig` and back, strictly, with a "did you mean" for unknown keys."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..hd.errors import UsageError
from ..hd.grid import HDConfig, suggest
from .config import FREE_TO_CHANGE, TrainConfig, leaves

# A setting given as a flag, and the settings of its table that a recipe may have in its place.
REPLACES = {
    "model.preset": ("hd",),
    "model.hd": ("preset",),
    "model.max_tiles": ("grid",),
    "model.grid": ("max_tiles",),
    "model.path": ("vision", "language", "projector_from", "preset", "hd"),
}
STAGES = get_args(get_type_hints(TrainConfig)["stage"])
RECIPES = Path(__file__).resolve().parent / "recipes"


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str, stage: str) -> Path:
    """The file of a recipe: a path, or a shipped one with or without its `-pretrain|-finetune`."""
    if Path(name).is_file():
        return Path(name)
    for stem in (name, f"{name}-{stage}"):
        if (RECIPES / f"{stem}.yaml").is_file():
            return RECIPES / f"{stem}.yaml"
    known = [stem for stem in recipe_names() if stem.endswith(stage)]
    if "/" in name or name.endswith((".yaml", ".yml")):
        raise UsageError(f"recipe {name}: no such file; the shipped ones are {', '.join(known)}")
    raise UsageError(f"recipe {name!r} is unknown; {suggest(name, known)}")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The values of a recipe file, not yet checked. Raises UsageError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings; a recipe is a table of `name: value`")
    return values


def with_values(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with some dotted settings replaced: `{"optimizer.lr": 1e-5}`.

    A setting that replaces others (`model.preset` the recipe's `model.hd`) takes them away. A
    table given whole (`{"lora": {}}`) goes over the recipe's, null takes it away.
    """
    merged = {key: dict(v) if isinstance(v, Mapping) else v for key, v in recipe.items()}
    for name, value in flags.items():
        section, _, key = name.rpartition(".")
        if section and merged.get(section) is None:
            merged[section] = {}
        if section and not isinstance(merged[section], dict):
            raise UsageError(f"{section} must be a table of settings, not {merged[section]!r}")
        table = merged[section] if section else merged
        if not section and isinstance(value, Mapping):  # a copy: other flags go into it
            value = {**(table[key] if isinstance(table.get(key), dict) else {}), **value}
        table[key] = value
        for other in REPLACES.get(name, ()):
            if f"{section}.{other}" not in flags:
                table.pop(other, None)
    return merged


def load_config(
    source: str | Path, stage: str, flags: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The `TrainConfig` of a recipe (shipped name or file) with dotted settings replaced."""
    path = find_recipe(str(source), stage)
    values = with_values(read_recipe(path), flags or {})
    if values.setdefault("stage", stage) not in STAGES:
        raise UsageError(
            f"{path.name}: stage {values['stage']!r} is unknown; "
            f"{suggest(str(values['stage']), list(STAGES))}"
        )
    if values["stage"] != stage:
        raise UsageError(f"{path} is a recipe for {values['stage']}; llava-hd {values['stage']}")
    return config_from(values, path.name)


def config_from(values: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
    """Checked values; UsageError names `where`, the setting and the remedy."""
    try:
        return build(TrainConfig, values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def config_values(config: TrainConfig) -> dict[str, Any]:
    """Every setting as YAML-able values; `config_from` reads them back."""
    values = _plain(asdict(config))
    if config.model.hd is not None:
        values["model"]["hd"] = config.model.hd.to_dict()
    return values


def config_yaml(config: TrainConfig) -> str:
    """The resolved configuration as the text of a recipe."""
    return yaml.safe_dump(config_values(config), sort_keys=False)


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names whose values differ, of those that decide where a run leads to."""
    flat_old, flat_new = _flat(old), _flat(new)
    names = [name for name, _ in leaves(TrainConfig) if name not in FREE_TO_CHANGE]
    return [name for name in names if flat_old.get(name) != flat_new.get(name)]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        flat.update({f"{key}.{k}": v for k, v in value.items()} if inner else {key: value})
    return flat


def build(
    cls: Any, values: Any, prefix: str = "", hint: Callable[[str, list[str]], str] | None = None
) -> Any:
    """A dataclass of the values of a table, strictly: every key a field, every value of its type.

    prefix: what the settings' names begin with in messages. hint: unknown key, known ones -> the
    remedy; by default the nearest setting of a run. Raises UsageError.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{prefix.rstrip('.')} must be a table of settings")
    if cls is HDConfig:
        return HDConfig.from_dict(values)
    types_of = get_type_hints(cls)
    known = [item.name for item in fields(cls)]
    for key in values:
        if key not in known:
            raise UsageError(f"{prefix}{key} is not a setting; {(hint or _hint)(str(key), known)}")
    for item in fields(cls):
        optional = item.default is not MISSING or item.default_factory is not MISSING
        if item.name not in values and not optional:
            raise UsageError(f"{prefix}{item.name} is missing; set it")
    return cls(**{k: _value(types_of[k], v, prefix + k) for k, v in values.items()})


def _hint(key: str, known: list[str]) -> str:
    """The nearest setting of this table; else of any table, which helps with a wrong place."""
    close = suggest(key, known)
    elsewhere = [name for name, _ in leaves(TrainConfig) if name.rpartition(".")[2] == key]
    return f"did you mean {elsewhere[0]!r}?" if elsewhere else close


def _value(kind: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type; numbers may be text, since YAML reads 1e-3 as text."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _first_fitting(options, value, name)
    if is_dataclass(kind):
        return build(kind, value, f"{name}.")
    if origin is Literal:
        if not any(type(value) is type(option) and value == option for option in options):
            choices = [str(option) for option in options]
            raise UsageError(f"{name} {value!r} is unknown; {suggest(str(value), choices)}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(inner) == len(value):
            pairs = zip(inner, value, strict=True)
            return tuple(_value(one, item, name) for one, item in pairs)
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif kind in (bool, int, str) and type(value) is kind:
        return value
    elif kind is type(None) and value is None:
        return None
    raise UsageError(f"{name} must be {_words(kind)}, not {value!r}")


def _first_fitting(options: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in options:
        return None
    choices = [option for option in options if option is not type(None)]
    for option in choices[:-1]:
        try:
            return _value(option, value, name)
        except UsageError:
            continue
    return _value(choices[-1], value, name)


def _words(kind: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} values, each "
        return f"a list of {count}{_words(inner[0])}"
    return names[kind]


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML and JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
