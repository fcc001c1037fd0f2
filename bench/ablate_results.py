"""What an ablation came to: each variant against another, over the questions and over the seeds.

Two kinds of chance stand behind a difference. Which scenes were asked about: the bootstrap over
images (bootstrap.py), with the scenes of all seeds together, each seed's its own images. And which
run it was, its scenes, data order and new weights: Student's interval of the seeds' differences,
wide where the seeds are few. A verdict looks at both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student

from .ablate import TIMES_FILE, Run, runs_of
from .ablate_paper import Quoted, quoted
from .ablate_plan import Plan
from .bootstrap import Estimate
from .compare import MEAN, Comparison, compare
from .contestants import read_contestant
from .mcnemar import holm
from .nano_steps import Seconds, read_seconds
from .pope import score_table
from .pope_data import Answered

FEW = "too few scenes to tell"
NOISE = "within the noise of the questions"
DISAGREE = "the seeds disagree"
ONE_SEED = "beyond the questions' noise, one seed"
SAME_WAY = "the same way in each seed"
BEYOND = "beyond the noise of questions and seeds"
CLEAR = (SAME_WAY, BEYOND)


@dataclass(frozen=True)
class Effect:
    """A variant minus the one it is set against, in mean F1.

    estimate: all seeds' questions together, interval and p over images. p_holm: that p, adjusted
    for the plan's comparisons. by_seed: each seed's. over_seeds: 95 % interval of their mean; None
    for one seed. paper: what the paper says of the choice, if it is one.
    """

    against: str
    estimate: Estimate
    p_holm: float | None
    by_seed: tuple[float, ...]
    over_seeds: tuple[float, float] | None
    paper: Quoted | None

    @property
    def verdict(self) -> str:
        """What is known of it, by both kinds of chance."""
        if self.estimate.few_images:
            return FEW
        if not self.estimate.clear:
            return NOISE
        if self.over_seeds is None:
            return ONE_SEED
        if len({value > 0 for value in self.by_seed}) > 1:
            return DISAGREE
        low, high = self.over_seeds
        return SAME_WAY if low <= 0 <= high else BEYOND

    @property
    def beside_paper(self) -> str:
        """The same choice here and in the paper, in a few words."""
        if self.paper is None:
            return "several choices at once"
        if self.paper.effect == "none":
            return "the paper reports nothing"
        if self.paper.effect == "mixed":
            return "the paper's benchmarks differ among themselves"
        if self.verdict == NOISE:
            same = self.paper.effect == "equal"
            return "no difference shown, as in the paper" if same else "not shown here"
        if self.verdict not in CLEAR:
            return "undecided here"
        worse = self.estimate.value < 0
        as_there = worse and self.paper.effect == "worse"
        return "as in the paper" if as_there else "contrary to the paper"


@dataclass(frozen=True)
class Results:
    """All that is done of a plan. names: variants that are done with every seed; missing: others.

    f1: by variant, the mean F1 of each seed. effects: of every variant but the first whose other
    side is done. seconds: of the runs' steps, as run_steps returns them.
    """

    plan: Plan
    runs: Sequence[Run]
    names: tuple[str, ...]
    missing: tuple[str, ...]
    comparison: Comparison
    f1: dict[str, tuple[float, ...]]
    effects: dict[str, Effect]
    seconds: Seconds

    def pooled(self, name: str) -> Estimate:
        """The mean F1 of a variant, all seeds' questions together."""
        return self.comparison.models[name][MEAN]["f1"]

    @property
    def process_seconds(self) -> float:
        """Of all steps of these runs, one after another."""
        return sum(sum(self.seconds.get(run.name, {}).values()) for run in self.runs)


def find_results(plan: Plan, out: Path, resamples: int = 10_000) -> Results | None:
    """What is done of a plan; None before the first variant and another are done.

    The scores are those of `out`, whatever command made them: its folders are named by what they
    follow from (ablate.py).
    """
    runs = runs_of(plan, out)
    open_names = {run.variant for run in runs if not run.is_done}
    names = tuple(name for name in plan.variants if name not in open_names)
    if plan.first not in names or len(names) < 2:
        return None
    done = [run for run in runs if run.variant in names]
    answers = {name: [_answers(run) for run in done if run.variant == name] for name in names}
    together = {name: [x for one in parts for x in one] for name, parts in answers.items()}
    comparison = compare(together, resamples=resamples, seed=0)
    f1 = {
        name: tuple(score_table(one)[MEAN]["f1"] for one in parts)
        for name, parts in answers.items()
    }
    return Results(
        plan=plan,
        runs=done,
        names=names,
        missing=tuple(name for name in plan.variants if name in open_names),
        comparison=comparison,
        f1=f1,
        effects=_effects(plan, comparison, f1),
        seconds=read_seconds(out / TIMES_FILE),
    )


def _answers(run: Run) -> list[Answered]:
    """A run's answers with the seed in image and id: each seed has scenes of its own."""
    return [
        replace(x, image=f"seed{run.seed}/{x.image}", question_id=f"{run.seed}-{x.question_id}")
        for x in read_contestant(run.name, run.pope).answered
    ]


def _effects(
    plan: Plan, comparison: Comparison, f1: dict[str, tuple[float, ...]]
) -> dict[str, Effect]:
    pairs = {(pair.a, pair.b): pair for pair in comparison.pairs}
    sides = {name: other for name in f1 if (other := plan.against(name)) in f1}
    found = {name: pairs[other, name].difference[MEAN]["f1"] for name, other in sides.items()}
    known = [name for name, estimate in found.items() if estimate.p is not None]
    adjusted = dict(zip(known, holm([found[name].p or 0.0 for name in known]), strict=True))
    effects = {}
    for name, other in sides.items():
        gaps = tuple(here - there for here, there in zip(f1[name], f1[other], strict=True))
        effects[name] = Effect(
            against=other,
            estimate=found[name],
            p_holm=adjusted.get(name),
            by_seed=gaps,
            over_seeds=over_seeds(gaps),
            paper=quoted(plan.variants[name].differing(plan.variants[other])),
        )
    return effects


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean of values; None for a single one."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half
