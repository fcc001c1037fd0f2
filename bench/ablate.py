"""Ablations: every variant of a plan trained and asked with every seed, each result kept.

    OUT/seed0/data-HASH/          scenes (scenes.py)
    OUT/seed0/stage1-HASH/        model folders of the trainer; variants may share a stage 1
    OUT/seed0/stage2-HASH/
    OUT/seed0/pope-HASH/          answers and scores of `eval pope`
    OUT/recipes, OUT/logs         what was run, and what it said

HASH stands for everything that the result follows from: the resolved configuration, the data and
what comes before. So nothing of a changed plan mixes with older results, what did not change is not
run again, and variants may be renamed, added and dropped at will.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..hd.errors import UsageError
from ..hd.files import check_out, write_whole
from ..hd.grid import HDConfig
from ..train.config import FREE_TO_CHANGE, TrainConfig
from ..train.recipe import config_values, config_yaml, load_config
from .ablate_plan import Plan, Variant
from .files import write_json
from .nano_steps import (
    DONE,
    EVAL,
    TRAINING,
    Progress,
    Seconds,
    Step,
    pope_step,
    run_steps,
    train_step,
)
from .scenes import UNPROMPTED, draw_dataset, write_unprompted

PLAN_FILE, TIMES_FILE = "ablation.json", "seconds.json"
DATA_DONE = "boxes.json"  # the last file of a data set
SAVE_STEPS = 100  # a kill costs so many steps of a training at most
# What says only where things are, and so is no part of what a result follows from.
PLACES = frozenset({"data.path", "model.projector_from"})

# Nano counterparts: 448 is the HD recipe, 336 the base recipe; 224 is that with the smaller tower.
RECIPES = {448: "nano-hd", 336: "nano-base", 224: "nano-base"}
SMALL_TOWER, SMALL_PX = "shipped:tower56", 56

# Seconds of a step of training, of a question of POPE, and of any command's start, with one thread
# of an AMD EPYC beside another such process: what --dry-run estimates with before anything was
# measured here.
USUAL: dict[tuple[str, int], float] = {
    ("pretrain", 448): 0.07, ("finetune", 448): 0.60, (EVAL, 448): 0.005,
    ("pretrain", 336): 0.09, ("finetune", 336): 0.49, (EVAL, 336): 0.003,
    ("pretrain", 224): 0.07, ("finetune", 224): 0.43, (EVAL, 224): 0.003,
}  # fmt: skip
START_SECONDS = 8.0


@dataclass(frozen=True)
class Run:
    """One variant with one seed: its steps, and the folders that they read and fill.

    recipes: file -> the text of each training's resolved recipe.
    """

    variant: str
    seed: int
    resolution: int
    data: Path
    stage1: Path
    stage2: Path
    pope: Path
    steps: Sequence[Step]
    recipes: Mapping[Path, str]

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        return self.steps[-1].is_done

    def to_dict(self, out: Path) -> dict[str, Any]:
        """JSON-able: where everything is, below `out`."""
        folders = {name: getattr(self, name) for name in ("data", "stage1", "stage2", "pope")}
        return {
            "variant": self.variant,
            "seed": self.seed,
            **{name: folder.relative_to(out).as_posix() for name, folder in folders.items()},
        }


def runs_of(plan: Plan, out: Path, names: Collection[str] = ()) -> list[Run]:
    """The runs of a plan, or of some of its variants, seed after seed. A stage 1 that several share
    is a step of the first of them; the others need it."""
    runs: list[Run] = []
    for seed in plan.seeds:
        owned: set[Path] = set()
        for name in plan.variants:
            if names and name not in names:
                continue
            run = _run_of(plan, name, seed, out)
            if run.stage1 in owned:
                run = replace(run, steps=run.steps[1:])
            owned.add(run.stage1)
            runs.append(run)
    return runs


def _run_of(plan: Plan, name: str, seed: int, out: Path) -> Run:
    variant, home, counts = plan.variants[name], out / f"seed{seed}", plan.steps(name)
    drawn = {"train_scenes": plan.train_scenes, "test_scenes": plan.test_scenes, "seed": seed}
    data = home / f"data-{_digest(drawn)}"
    before: dict[str, Any] = drawn
    folders: list[Path] = []
    steps: list[Step] = []
    recipes: dict[Path, str] = {}
    for number, (stage, count) in enumerate(zip(TRAINING, counts, strict=True), start=1):
        source = str(folders[0]) if folders else None
        config = _stage_config(variant, stage, data, count, seed, source)
        before = {"before": before, "config": _identity(config)}
        if stage == "finetune":  # says which records there are, and a path says nothing
            before["format_prompt"] = variant.format_prompt
        folder = home / f"stage{number}-{_digest(before)}"
        recipe = out / "recipes" / f"seed{seed}-{folder.name}.yaml"
        recipes[recipe] = config_yaml(replace(config, output_dir=str(folder)))
        log = out / "logs" / f"seed{seed}-{folder.name}.log"
        needs = [steps[0].done] if steps else []
        steps.append(train_step(stage, ["--config", str(recipe)], folder, log, count, needs))
        folders.append(folder)
    pope = home / f"pope-{_digest({'model': before, 'prompt': variant.format_prompt})}"
    words = [] if variant.format_prompt else ["--prompt", ""]
    log = out / "logs" / f"seed{seed}-{pope.name}.log"
    steps.append(pope_step(folders[1], data, pope, log, plan.test_scenes, words))
    stage1, stage2 = folders
    return Run(name, seed, variant.resolution, data, stage1, stage2, pope, steps, recipes)


def _stage_config(
    variant: Variant, stage: str, data: Path, steps: int, seed: int, projector_from: str | None
) -> TrainConfig:
    """The resolved recipe of a stage of a variant, but for its folder."""
    base = load_config(RECIPES[variant.resolution], stage)
    hd = base.model.geometry
    if hd is None:
        raise UsageError(f"recipe {RECIPES[variant.resolution]} has no geometry of its own")
    source = replace(
        base.model,
        hd=_geometry(variant, hd),
        vision=SMALL_TOWER if variant.resolution == 224 else base.model.vision,
        projector=variant.projector,
        projector_from=projector_from,
    )
    records = f"{stage}.json"
    if stage == "finetune" and not variant.format_prompt:
        records = UNPROMPTED
    return replace(
        base,
        model=source,
        data=replace(
            base.data,
            path=str(data / records),
            images=str(data / "images"),
            share=variant.data_share if stage == "finetune" else 1.0,
        ),
        max_steps=steps,
        seed=seed,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        resume="auto",
    )


def _geometry(variant: Variant, hd: HDConfig) -> HDConfig:
    """Stage 1 of HD sees one view in any case, so a global view is left out of grids alone."""
    if variant.resolution == 224:
        return replace(hd, tile_px=SMALL_PX)
    if variant.resolution == 336:
        return hd
    hidden = hd.grids and not variant.global_view
    return replace(hd, row_end=variant.row_ends, global_view="none" if hidden else hd.global_view)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration decides where the run leads to."""
    flat: dict[str, Any] = {}
    for key, value in config_values(config).items():
        table = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): item for name, item in table.items()}
    return {k: v for k, v in flat.items() if k not in FREE_TO_CHANGE and k not in PLACES}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def check_folder(out: Path) -> None:
    """An empty or new folder, or one of ablations. Raises UsageError."""
    check_out(out)
    if out.is_dir() and any(out.iterdir()) and not (out / PLAN_FILE).is_file():
        raise UsageError(f"--out {out} is not empty and holds no ablations; give another folder")


def estimated_seconds(runs: Sequence[Run], measured: Seconds) -> dict[str, float]:
    """By run, what is left of it in seconds of one process: at the speed of equal steps that were
    measured here, else at the usual one."""
    here: dict[tuple[str, int], float] = {}  # per step, the start included
    for run in runs:
        for step in run.steps:
            taken = measured.get(run.name, {}).get(step.name)
            if taken and step.is_done:
                here[step.name, run.resolution] = taken / step.total

    def left(run: Run, step: Step) -> float:
        kind = step.name, run.resolution
        to_do = (1 - step.share) * step.total
        return to_do * here[kind] if kind in here else START_SECONDS + to_do * USUAL[kind]

    return {
        run.name: sum(left(run, step) for step in run.steps if not step.is_done) for run in runs
    }


def run_plan(
    plan: Plan, runs: Sequence[Run], out: Path, at_once: int, progress: Progress
) -> Seconds:
    """Run what is not done; returns the seconds of every step, by the names of runs.

    Raises LlavaHDError naming run, step and log where a step fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / PLAN_FILE, plan.to_dict())
    for data, seed in {run.data: run.seed for run in runs if not run.is_done}.items():
        _draw(plan, seed, data, partial(progress, "data", f"seed {seed}"))
    progress("data", DONE, 1.0)
    for run in runs:
        for path, text in run.recipes.items():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, text)
    chains = {run.name: run.steps for run in runs}
    return run_steps(chains, at_once, out / TIMES_FILE, progress, "ablate")


def _draw(plan: Plan, seed: int, data: Path, told: Callable[[float], None]) -> None:
    """The data set of a seed, unless it is there."""
    if not (data / DATA_DONE).is_file():
        draw_dataset(
            data,
            plan.train_scenes,
            plan.test_scenes,
            seed,
            progress=lambda done, total: told(done / total),
        )
    unprompted = any(not variant.format_prompt for variant in plan.variants.values())
    if unprompted and not (data / UNPROMPTED).is_file():
        write_unprompted(data, plan.train_scenes, seed)
