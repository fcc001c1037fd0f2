"""The two sides of a comparison, and what is said about them; needs neither torch nor pictures.

A contestant is a name, its answers and, where they were made by `llava-hd eval pope`, the record
of that run: it tells the prompt, the question files, the decoding, the images and the geometry.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..hd.errors import DataError
from .compare import ALL, MEAN, MIN_IMAGES, Comparison, Estimate
from .files import find_image
from .pope_data import Answered, SplitFile, answer_files
from .pope_join import load_answered
from .pope_run import RunRecord, read_run


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

    The record of the run is looked for beside the answers.
    """
    [file] = answer_files([answers])
    answered = load_answered([file], questions, labels)
    return Contestant(name, file.path, answered, read_run(file.path.parent))


def contestant_names(a: str | Path, b: str | Path) -> tuple[str, str]:
    """The last part of each path in which the two differ (folders of answers files included)."""
    parts = []
    for path in map(Path, (a, b)):
        folder = path if path.is_dir() else path.with_suffix("")
        parts.append([part for part in folder.resolve().parts if part != "answers"])
    for x, y in zip(reversed(parts[0]), reversed(parts[1]), strict=False):
        if x != y:
            return x, y
    return str(a), str(b)


def verdict(a: str, b: str, comparison: Comparison) -> str:
    """What the comparison shows, in one or two sentences; of too few images only the figures."""
    estimate = comparison.difference[MEAN]["f1"]
    scores = [figures[MEAN]["f1"].value for figures in (comparison.a, comparison.b)]
    bootstrap = f", bootstrap {_equals(estimate.p)}" if estimate.p is not None else ""
    numbers = (
        f"mean F1 {scores[0]:.4f} for {a} and {scores[1]:.4f} for {b}, a difference of "
        f"{interval(estimate, signed=True)}{bootstrap}; "
        f"McNemar on all answers {_equals(comparison.mcnemar[ALL].p)}"
    )
    if estimate.few_images:
        return f"No verdict, the images are too few: {numbers}."
    if estimate.clear:
        return f"{b if estimate.value > 0 else a} is better: {numbers}."
    return f"No difference is shown: {numbers}. The interval holds 0."


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


def warnings_of(a: Contestant, b: Contestant, comparison: Comparison) -> list[str]:
    """What the reader must know before the figures, a sentence each."""
    few = [f"{split} has {number}" for split, number in comparison.few_images.items()]
    if not few:
        return differing_settings(a, b)
    return [
        f"Too few images for intervals and p by bootstrap: {', '.join(few)}, at least "
        f"{MIN_IMAGES} are needed. McNemar's test takes questions about one image as independent.",
        *differing_settings(a, b),
    ]


def differing_settings(a: Contestant, b: Contestant) -> list[str]:
    """What apart from the model differs between the two runs, a sentence each."""
    if a.run is None or b.run is None:
        unknown = " and ".join(side.name for side in (a, b) if side.run is None)
        return [f"How {unknown} was run is not known: prompt and decoding may differ."]
    pairs = {
        "response prompt": (a.run.prompt, b.run.prompt),
        "decoding": (a.run.decoding, b.run.decoding),
        "batch size": (a.run.batch_size, b.run.batch_size),
        "folder of images": (a.run.images, b.run.images),
    }
    return [
        f"The {name} differs: {json.dumps(x)} for {a.name}, {json.dumps(y)} for {b.name}."
        for name, (x, y) in pairs.items()
        if x != y
    ]


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
