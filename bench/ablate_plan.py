"""Plans of ablations: YAML -> a `Plan`, strictly, with a "did you mean" for unknown keys.

A variant is the nano HD recipe with some of the paper's choices taken back; a plan is a list of
variants, with the amount of data and training that all of them get, and the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..hd.errors import UsageError
from ..hd.grid import suggest
from ..train.recipe import build, read_recipe
from ..train.settings import at_least

PLANS = Path(__file__).resolve().parent / "plans"
NOT_A_CHOICE = ("steps_1", "steps_2", "against")  # fields of a variant that are no choice of it


@dataclass(frozen=True)
class Variant:
    """What one model is made with; the defaults are the HD recipe's.

    resolution: 448 is the 2x2 grid of tiles with row-ends and a global view, 336 and 224 are one
        view; their nano counterparts have a quarter of these sides.
    data_share: of stage 2's conversations; as in the paper the epochs stay, so the steps are
        fewer, unless steps_2 says otherwise.
    format_prompt: whether "Answer the question using a single word or phrase." stands in the
        conversations and in POPE's questions.
    steps_1, steps_2: of the stages, instead of the plan's.
    against: the earlier variant that this one is compared with; the plan's first by default.
    """

    projector: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    resolution: Literal[224, 336, 448] = 448
    global_view: bool = True
    row_ends: bool = True
    data_share: float = 1.0
    format_prompt: bool = True
    steps_1: int | None = None
    steps_2: int | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        if self.resolution != 448:
            for name in ("global_view", "row_ends"):
                if not getattr(self, name):
                    raise UsageError(
                        f"{name} has no place at resolution {self.resolution}, which is one view "
                        "without tiles; leave it out"
                    )
        if not 0 < self.data_share <= 1:
            raise UsageError(f"data_share must be above 0 and at most 1, not {self.data_share:g}")
        for name in ("steps_1", "steps_2"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)

    @property
    def choices(self) -> dict[str, Any]:
        """The fields that say what the model is made with."""
        return {k: v for k, v in asdict(self).items() if k not in NOT_A_CHOICE}

    @property
    def made_with(self) -> dict[str, Any]:
        """All that tells it from others: two variants of equal values are one."""
        return {k: v for k, v in asdict(self).items() if k != "against"}

    def differing(self, other: Variant) -> dict[str, tuple[Any, Any]]:
        """Choice -> (its value here, there), where they differ; steps only where given."""
        here, there = self.made_with, other.made_with
        return {name: (here[name], there[name]) for name in here if here[name] != there[name]}


@dataclass(frozen=True)
class Plan:
    """Variants, each trained and asked with every seed.

    train_scenes: of each stage. test_scenes: held-out, eighteen questions each. steps_1, steps_2:
    of the stages. A seed decides scenes, data order and new weights.
    """

    variants: Mapping[str, Variant]
    seeds: tuple[int, ...] = (0, 1, 2)
    train_scenes: int = 2000
    test_scenes: int = 300
    steps_1: int = 600
    steps_2: int = 200

    def __post_init__(self) -> None:
        for name in ("train_scenes", "test_scenes", "steps_1", "steps_2"):
            at_least(name, getattr(self, name), 1)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(
                f"seeds must be different whole numbers from 0, not {list(self.seeds)}"
            )
        if len(self.variants) < 2:
            raise UsageError("variants must name two or more; a comparison needs two sides")
        earlier: dict[str, Variant] = {}
        for name, variant in self.variants.items():
            if variant.against is not None and variant.against not in earlier:
                raise UsageError(
                    f"variants.{name}.against {variant.against!r} is no earlier variant; "
                    f"{suggest(variant.against, earlier) if earlier else 'it is the first one'}"
                )
            for other, value in earlier.items():
                if value.made_with == variant.made_with:
                    raise UsageError(f"variants {other} and {name} are the same; drop one of them")
            earlier[name] = variant

    @property
    def first(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    def against(self, name: str) -> str | None:
        """What a variant is compared with; None for the first."""
        return None if name == self.first else self.variants[name].against or self.first

    def steps(self, name: str) -> tuple[int, int]:
        """Steps of a variant's stage 1 and stage 2."""
        variant = self.variants[name]
        less = max(1, math.floor(self.steps_2 * variant.data_share + 0.5))
        return variant.steps_1 or self.steps_1, variant.steps_2 or less

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `plan_from` reads it back."""
        variants = {name: _given(variant) for name, variant in self.variants.items()}
        return {**asdict(self), "seeds": list(self.seeds), "variants": variants}


@dataclass(frozen=True)
class _Head:
    """The keys of a plan file."""

    variants: Any = field(default=None)
    seeds: tuple[int, ...] = Plan.seeds
    train_scenes: int = Plan.train_scenes
    test_scenes: int = Plan.test_scenes
    steps_1: int = Plan.steps_1
    steps_2: int = Plan.steps_2


def _given(variant: Variant) -> dict[str, Any]:
    """What a variant has apart from the defaults."""
    return {
        item.name: getattr(variant, item.name)
        for item in fields(variant)
        if getattr(variant, item.name) != item.default
    }


def plan_names() -> list[str]:
    """The shipped plans."""
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def load_plan(name: str) -> Plan:
    """The plan of a file, or a shipped one by its name. UsageError names file, setting, remedy."""
    path = Path(name)
    if not path.is_file():
        path = PLANS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(plan_names())
        raise UsageError(f"plan {name}: no such file; the shipped ones are {known}")
    try:
        return plan_from(read_recipe(path))
    except UsageError as error:
        where = "" if str(error).startswith(str(path)) else f"{path}: "
        raise UsageError(f"{where}{error}") from error


def plan_from(values: Mapping[str, Any]) -> Plan:
    """Checked values of a plan; UsageError names the setting and the remedy."""
    rest = {key: value for key, value in values.items() if key != "variants"}
    known = [item.name for item in fields(Plan)]
    head = build(_Head, rest, hint=lambda key, _: suggest(key, known))
    table = values.get("variants")
    if not isinstance(table, dict) or not table:
        raise UsageError("variants must be a table of `name: settings`, such as `linear: "
                         "{projector: linear}`")  # fmt: skip
    variants = {}
    for name, settings in table.items():
        where = f"variants.{name}."
        _check_name(name)
        try:
            variants[name] = build(Variant, settings or {}, where, hint=suggest)
        except UsageError as error:
            shown = str(error) if str(error).startswith(where) else f"{where}{error}"
            raise UsageError(shown) from error
    return Plan(**{**vars(head), "variants": variants})


def _check_name(name: object) -> None:
    plain = isinstance(name, str) and name.replace("-", "").replace("_", "").isalnum()
    if not plain:
        raise UsageError(
            f"variants: {name!r} is no name; use letters, digits, - and _ (quote it if it is a "
            "number)"
        )
