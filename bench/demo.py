"""The whole job at nano size: data, two stages for two models, POPE, comparison.

Every step is a command that a user could type; the demo only runs them in order, the chain of the
base model beside the chain of the HD model, each with half of the cores. A step that has finished
is not run again, so an interrupted demo goes on.

`base` sees one padded view of 84 px (the counterpart of 336), `hd` a 2x2 grid of 56 px tiles and
a global view (the counterpart of 448). Both get the same language model, the same data in the same
order, the same number of steps, and towers that were trained equally long.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import UsageError
from .charts import line_chart
from .compare import ALL, MEAN, Comparison, compare
from .compare_report import comparison_json, comparison_sections, write_charts
from .compare_sizes import BOXES, by_size
from .contestants import read_contestant
from .files import write_json
from .nano_steps import TRAINING, Seconds, Step, pope_step, train_step
from .report import Facts, Note, Section, Table, write_report

MODELS = ("base", "hd")
SETTINGS_FILE = "demo.json"
TIMES_FILE = "seconds.json"


@dataclass(frozen=True)
class DemoSettings:
    """What decides a demo's outcome; written to the output folder, and compared on resumption."""

    seed: int = 0
    train_scenes: int = 2000  # of each stage
    test_scenes: int = 300
    steps_1: int = 600  # of stage 1
    steps_2: int = 200  # of stage 2

    def __post_init__(self) -> None:
        for name in ("train_scenes", "test_scenes", "steps_1", "steps_2"):
            value = getattr(self, name)
            if value < 1:
                option = name.replace("_", "-")
                raise UsageError(f"demo: --{option} must be 1 or more, not {value}")


def check_folder(out: Path, settings: DemoSettings) -> None:
    """An empty or new folder, or one that a demo with the same settings began."""
    record = out / SETTINGS_FILE
    if out.exists() and not out.is_dir():
        raise UsageError(f"demo: --out {out} is a file; give a folder")
    if record.is_file():
        old = json.loads(record.read_text(encoding="utf-8"))
        if old != asdict(settings):
            raise UsageError(
                f"demo: --out {out} holds a demo with other settings ({old}); give another folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"demo: --out {out} is not empty and holds no demo; give another folder")


def chain(model: str, out: Path, settings: DemoSettings) -> list[Step]:
    """The steps of one model, in order."""
    data, logs = out / "data", out / "logs"
    folders = {stage: out / model / f"stage{n}" for n, stage in enumerate(TRAINING, start=1)}
    counts = dict(zip(TRAINING, (settings.steps_1, settings.steps_2), strict=True))
    steps = []
    for stage, folder in folders.items():
        words = ["--config", f"nano-{model}", "--output_dir", str(folder)]
        words += ["--data.path", str(data / f"{stage}.json"), "--data.images", str(data / "images")]
        words += ["--max_steps", str(counts[stage]), "--seed", str(settings.seed)]
        words += ["--resume", "auto"]
        if stage == "finetune":
            words += ["--model.projector_from", str(folders["pretrain"])]
        log = logs / f"{model}-{stage}.log"
        steps.append(train_step(stage, words, folder, log, counts[stage]))
    out_pope, log = out / model / "pope", logs / f"{model}-eval.log"
    return [*steps, pope_step(folders["finetune"], data, out_pope, log, settings.test_scenes)]


def write_demo_report(out: Path, settings: DemoSettings, seconds: Seconds) -> dict[str, Any]:
    """Compare the two models and write report.json and report.html; returns report.json's values.

    report.json: `models` -> scores by split, `comparison` (bench/compare.py), `demo`.
    """
    images = out / "data" / "images"
    sides = [read_contestant(name, out / name / "pope") for name in MODELS]
    answers = {side.name: side.answered for side in sides}
    comparison = compare(answers, seed=settings.seed)
    boxes = out / "data" / BOXES
    sizes = by_size(answers, boxes, seed=settings.seed)
    values = comparison_json(sides, comparison, sizes)
    [pair] = comparison.pairs
    report = {
        "demo": {**asdict(settings), "seconds": seconds},
        "models": {side["name"]: side["scores"] for side in values["contestants"]},
        "paired_p": {
            "mean_f1_bootstrap": pair.difference[MEAN]["f1"].p,
            "mcnemar_all": pair.mcnemar[ALL].p,
        },
        **values,
    }
    write_json(out / "report.json", report)
    sections = [
        _job_section(settings, comparison, seconds),
        *comparison_sections(sides, comparison, images, sizes),
        _loss_section(out),
    ]
    write_charts(out, sections)
    write_report(
        out / "report.html",
        "LLaVA-1.5-HD at nano size",
        sections,
        "base: one view of 84 px; hd: 2x2 tiles of 56 px and a global view. "
        "Same language model, data, steps and tower training.",
    )
    return report


def _job_section(settings: DemoSettings, comparison: Comparison, seconds: Seconds) -> Section:
    intro = (
        "Scenes with small objects were drawn, two models trained on them in two stages with "
        "DeepSpeed, and both asked which objects held-out scenes hold (POPE)."
    )
    facts = [
        ("training scenes of each stage", str(settings.train_scenes)),
        ("held-out scenes", str(settings.test_scenes)),
        ("questions", f"{comparison.num_questions} in three splits"),
        ("seed", str(settings.seed)),
    ]
    rows = [
        [name, *(f"{steps.get(step, 0):.0f} s" for step in ("pretrain", "finetune", "eval"))]
        for name, steps in seconds.items()
    ]
    table = Table(["model", "stage 1", "stage 2", "POPE"], rows, "Time, both models side by side.")
    note = Note(
        "One training run of each model on drawn scenes. Intervals and p values below cover the "
        "choice of the questions, not of the run: another seed gives another difference (README.md "
        "has six).",
        "warning",
    )
    return Section("The job", intro, [Facts(facts), table, note])


def _loss_section(out: Path) -> Section:
    charts = []
    for number, title in ((1, "Stage 1: captions"), (2, "Stage 2: questions and answers")):
        series = {}
        for model in MODELS:
            text = (out / model / f"stage{number}" / "metrics.jsonl").read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.splitlines()]
            series[model] = ([x["step"] for x in lines], [x["loss"] for x in lines])
        charts.append(line_chart(title, series))
    return Section("Training", "Mean cross entropy of the label tokens of each step.", charts)
