"""The sides of a comparison, and what is said about them; needs neither torch nor pictures.

A contestant is a name, its answers and, where they were made by `llava-hd eval pope`, the record
of that run: it tells the prompt, the question files, the decoding, the images and the geometry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from .bootstrap import MIN_IMAGES, Estimate
from .compare import ALL, MEAN, Comparison, Pair
from .files import find_image
from .pope_data import Answered, SplitFile, answer_files
from .pope_join import load_answered
from .pope_run import RunRecord, check_finished, read_run
from .question_sets import all_matched


@dataclass(frozen=True)
class Contestant:
    """One side of a comparison; `run` is None for answers of unknown origin."""

    name: str
    answers: Path
    answered: Sequence[Answered]
    run: RunRecord | None = None


def read_contestant(
    name: str,
    answers: str | Path,
    questions: Sequence[SplitFile] = (),
    labels: Sequence[SplitFile] = (),
) -> Contestant:
    """A side from an evaluation's output folder or an answers file (see pope_join.load_answered).

    The record of the run is looked for beside the answers. Raises DataError for a run that is not
    finished.
    """
    [file] = answer_files([answers])
    check_finished(file)
    answered = load_answered([file], questions, labels)
    return Contestant(name, file.path, answered, read_run(file.path.parent))


def check_same_questions(sides: Sequence[Contestant]) -> None:
    """DataError, with the files, when two sides answer different questions."""
    all_matched({str(side.answers): side.answered for side in sides})


def contestant_names(paths: Sequence[str | Path]) -> list[str]:
    """The last part of each path in which they all differ (folders of answers files included), or
    the paths themselves."""
    parts = []
    for path in map(Path, paths):
        folder = path if path.is_dir() else path.with_suffix("")
        parts.append([part for part in folder.resolve().parts if part != "answers"])
    for names in zip(*map(reversed, parts), strict=False):
        if len(set(names)) == len(names):
            return list(names)
    return [str(path) for path in paths]


def check_names(names: Sequence[str], sides: int) -> None:
    """UsageError unless there is one name for each side, and no name twice."""
    if len(names) != sides:
        raise UsageError(f"--names gives {len(names)} names for {sides} models; give one for each")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"two models are called {twice[0]!r}; tell them apart with --names")


def verdicts(comparison: Comparison) -> list[tuple[str, bool]]:
    """What the comparison shows: for each model a sentence, and whether it is clearly another than
    the first one; before them, of more than two, the models by their mean F1."""
    found = [
        (verdict(pair, comparison), pair.difference[MEAN]["f1"].clear)
        for pair in comparison.from_first
    ]
    if len(comparison.names) == 2:
        return found
    scores = {name: figures[MEAN]["f1"].value for name, figures in comparison.models.items()}
    ranked = sorted(scores, key=lambda name: -scores[name])
    shown = ", ".join(f"{name} {scores[name]:.4f}" for name in ranked)
    return [(f"Mean F1, highest first: {shown}.", False), *found]


def verdict(pair: Pair, comparison: Comparison) -> str:
    """What is known of two models, in one or two sentences; of too few images only the figures."""
    a, b = pair.a, pair.b
    estimate = pair.difference[MEAN]["f1"]
    scores = [comparison.models[name][MEAN]["f1"].value for name in (a, b)]
    bootstrap = f", bootstrap {_equals(estimate.p)}" if estimate.p is not None else ""
    numbers = (
        f"mean F1 {scores[0]:.4f} for {a} and {scores[1]:.4f} for {b}, a difference of "
        f"{interval(estimate, signed=True)}{bootstrap}; "
        f"McNemar on all answers {_equals(pair.mcnemar[ALL].p)}"
    )
    if estimate.few_images:
        return f"No verdict, the images are too few: {numbers}."
    if estimate.clear:
        return f"{b if estimate.value > 0 else a} is better: {numbers}."
    return f"No difference is shown: {numbers}. The interval holds 0."


def power_words(pair: Pair) -> str:
    """What this many questions can find between two models, in one or two sentences."""
    power = pair.power[ALL]
    share = f"{100 * power.discordance:.1f} % of the questions are right in one of {pair.a} and "
    found = (
        "no difference is found in 8 of 10 such tests"
        if power.detectable is None
        else f"a difference of {100 * power.detectable:.1f} points of accuracy is found in 8 of 10 "
        "such tests"
    )
    words = f"{share}{pair.b} alone: {found}"
    if power.difference and power.needed is not None:
        seen = f"{100 * abs(power.difference):.1f} points seen"
        words += f", and the {seen} need about {power.needed:,} questions for that"
    return f"{words}."


def interval(estimate: Estimate, signed: bool = False) -> str:
    """`value [low, high]` with four digits; the bare value where there is no interval."""
    sign = "+" if signed else ""
    if estimate.few_images:
        return f"{estimate.value:{sign}.4f}"
    return f"{estimate.value:{sign}.4f} [{estimate.low:{sign}.4f}, {estimate.high:{sign}.4f}]"


def show_p(p: float | None) -> str:
    """`0.012`, or `< 0.0001` below that."""
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _equals(p: float | None) -> str:
    """`p = 0.012` or `p < 0.0001`."""
    shown = show_p(p)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


def warnings_of(sides: Sequence[Contestant], comparison: Comparison) -> list[str]:
    """What the reader must know before the figures, a sentence each."""
    few = [f"{split} has {number}" for split, number in comparison.few_images.items()]
    if not few:
        return differing_settings(sides)
    return [
        f"Too few images for intervals and p by bootstrap: {', '.join(few)}, at least "
        f"{MIN_IMAGES} are needed. McNemar's test takes questions about one image as independent.",
        *differing_settings(sides),
    ]


def differing_settings(sides: Sequence[Contestant]) -> list[str]:
    """What apart from the model differs between the runs, a sentence each."""
    unknown = [side.name for side in sides if side.run is None]
    found = []
    if unknown:
        found.append(
            f"How {listed(unknown)} {'was' if len(unknown) == 1 else 'were'} run is not known: "
            "prompt and decoding may differ."
        )
    runs = {side.name: side.run for side in sides if side.run is not None}
    for name, value_of in SETTINGS.items():
        by_value: dict[str, list[str]] = {}
        for side, run in runs.items():
            by_value.setdefault(json.dumps(value_of(run)), []).append(side)
        if len(by_value) > 1:
            values = ", ".join(f"{value} for {listed(who)}" for value, who in by_value.items())
            found.append(f"The {name} differs: {values}.")
    return found


SETTINGS: dict[str, Callable[[RunRecord], Any]] = {
    "response prompt": lambda run: run.prompt,
    "decoding": lambda run: run.decoding,
    "batch size": lambda run: run.batch_size,
    "folder of images": lambda run: run.images,
}


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def run_facts(side: Contestant) -> list[tuple[str, str]]:
    """Names and values of a run: model, prompt, question files with their sizes, decoding."""
    if side.run is None:
        return [("answers", str(side.answers)), ("run", "not known (no run.json beside them)")]
    run = side.run
    decoding = ", ".join(f"{name} {value}" for name, value in run.decoding.items())
    return [
        ("answers", str(side.answers)),
        ("model", f"{run.model['path']} ({run.model['fingerprint'][:12]})"),
        ("response prompt", json.dumps(run.prompt)),
        (
            "question files",
            "\n".join(f"{file['file']}: {file['questions']} questions" for file in run.questions)
            + (f"\nthe first {run.limit} of each split" if run.limit else ""),
        ),
        *(
            ("label file", f"{file['file']}: {file['questions']} labelled questions")
            for file in run.labels
        ),
        ("decoding", f"{decoding}, batches of {run.batch_size} on {run.device}"),
    ]


def holds_images(folder: Path, side: Contestant) -> bool:
    """Whether the folder holds any image that the questions are about."""
    return any(_is_in(folder, name) for name in {item.image for item in side.answered})


def _is_in(folder: Path, name: str) -> bool:
    try:
        return find_image(folder, name) is not None
    except DataError:  # it leaves the folder
        return False
