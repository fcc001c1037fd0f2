"""The section "Whole steps" of docs/performance.md, from the results of `llava-hd bench step`."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError
from ..model.rival import SIZES
from .step import RECORD as STEP
from .step_growth import RECORD as GROWTH
from .step_options import COMPETITORS, OURS
from .step_profile import TABLE as PROFILE

LONGEST_NAME = 70  # of a kernel
CHARTS = {STEP: "step.png", GROWTH: "step-growth.png"}
# What each file must have, to be told from a file of another kind, and each entry of its lists.
KEYS = {STEP: ("rows", "ratios", "losses", "targets", "data", "peak"), GROWTH: ("points", "curves")}
ENTRIES = {
    "rows": ("stage", "competitor", "reason"),
    "ratios": ("stage", "rival", "ratio", "low", "high", "cpu_ratio"),
    "losses": ("stage", "losses"),
    "targets": ("what", "value", "goal", "reached"),
    "data": (
        *("stage", "mean_tokens", "least_tokens", "most_tokens", "visual_share"),
        *("learned_share", "tiles_per_image"),
    ),
    "points": ("axis", "x", "seconds", "peak_mib"),
    "curves": ("axis", "measure", "words", "fixed", "factor", "exponent"),
}
# Of a competitor that has run.
FIGURES = (
    *("useful_tokens_per_second", "images_per_second", "mfu", "mfu_every_head", "peak_mib"),
    *("loading_share", "padding"),
)
# What `step_rows.targets_of` says of a result of a device: where, geometry, its words.
GOALS = (
    ("cuda", "7b", "stage 1: useful tokens/s over llava_next's", ">= 2.2"),
    ("cuda", "7b", "stage 2: useful tokens/s over llava_next's", ">= 2"),
    ("cuda", "7b", "stage 2: model FLOP utilisation", ">= 0.54"),
    ("cuda", "7b", "stage 2: peak memory, share of llava_next's", "<= 0.6"),
    ("cpu", "1b", "stage 1: useful tokens/s over llava_next's", ">= 2.2"),
    ("cpu", "1b", "stage 2: useful tokens/s over llava_next's", ">= 2"),
    ("cpu", "1b", "largest difference of a loss, relative to ours", "<= 0.001"),
)
GPU = "H200"  # the one that the goals are for
PLACES = {"cuda": GPU, "cpu": "CPU"}


@dataclass(frozen=True)
class StepResult:
    """One step.json or step-growth.json (`kind`) and its folder."""

    kind: str
    folder: Path
    record: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """Device, versions, command, seed."""
        return self.record["environment"]


def find_steps(folders: Sequence[Path]) -> list[StepResult]:
    """The results below some folders, newest first. DataError for a file that is not one."""
    paths = {p.resolve(): p for folder in folders for kind in KEYS for p in folder.rglob(kind)}
    found = [_read(path) for path in sorted(paths.values())]
    return sorted(found, key=lambda one: one.environment["time"], reverse=True)


def _read(path: Path) -> StepResult:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for name in ("environment", "request", "model", "notes", *KEYS[path.name]):
            _check_entries(name, record[name])
        for name in ("time", "device", "device_type", "command", "seed", "threads", "versions"):
            record["environment"][name]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: not a result of llava-hd bench step ({type(error).__name__}: {error}); "
            "measure again"
        ) from error
    return StepResult(path.name, path.parent, record)


def _check_entries(name: str, value: Any) -> None:
    """KeyError where an entry of a list of a record lacks what the page shows."""
    for entry in value if name in ENTRIES else ():
        has_run = name == "rows" and entry["reason"] == ""
        for key in (*ENTRIES[name], *(FIGURES if has_run else ())):
            entry[key]


def write_step_chart(result: StepResult) -> Path:
    """Draw the result's chart beside it."""
    from .performance_step_charts import growth_chart, step_chart

    path = result.folder / CHARTS[result.kind]
    draw = step_chart if result.kind == STEP else growth_chart
    path.write_bytes(draw(result.record))
    return path


def step_parts(results: Sequence[StepResult], beside: Path) -> Iterator[str]:
    """The section: the goals and what is reached of them, then every result: tables, losses,
    charts."""
    yield "## Whole steps"
    yield goals_table(results)
    for result in results:
        yield from (_race if result.kind == STEP else _growth)(result, beside)


def goals_table(results: Sequence[StepResult]) -> str:
    """Each goal and what full results of its device and geometry have reached: of each depth and
    batch the newest."""
    lines = ["| where | what | goal | measured |", "|---|---|---|---|"]
    for kind, geometry, what, goal in GOALS:
        reached: dict[str, str] = {}  # what it was measured with -> the figure
        for result in results:
            asked = result.record["request"]
            if result.kind != STEP or asked["quick"] or asked["geometry"] != geometry:
                continue
            facts = result.environment
            found = [one for one in result.record["targets"] if one["what"] == what]
            if found and facts["device_type"] == kind and (kind == "cpu" or GPU in facts["device"]):
                met = "met" if found[0]["reached"] else "not met"
                reached.setdefault(_under(result, what), f"{found[0]['value']:.3g}, {met}")
        figures = [f"{figure} ({under})" for under, figure in reached.items()]
        words = "<br>".join(figures) or "not measured"
        lines.append(f"| {PLACES[kind]}, {geometry} | {what} | {goal} | {words} |")
    return "\n".join(lines)


def _under(result: StepResult, what: str) -> str:
    """What a goal's figure was measured with: device, layers of how many, samples of a padded
    batch, tokens of a sample."""
    record = result.record
    layers, whole = record["model"]["layers"], SIZES[record["request"]["geometry"]].layers
    parts = [result.environment["device"], f"{layers} of {whole} layers"]
    parts.append(f"batches of {record['request']['batch']}")
    for data in record["data"]:
        if what.startswith(f"stage {data['stage']}:"):
            parts.append(f"{data['mean_tokens']:,.0f} tokens a sample")
    return ", ".join(parts)


def _race(result: StepResult, beside: Path) -> Iterator[str]:
    record = result.record
    about, asked = record["model"], record["request"]
    facts = result.environment
    yield (
        f"### {facts['device']}, {facts['time'][:10]}: {asked['geometry']}, {about['layers']} "
        f"layers of width {about['width']}, tower {about['vision_layers']} of "
        f"{about['vision_width']}, {asked['dtype']}, batches of {asked['batch']}"
    )
    lines = [_how(result, beside)]
    lines.append(
        f"Utilisation is a share of {record['peak']['tflops']:.4g} TFLOP/s "
        f"({record['peak']['what']})."
    )
    if not record["complete"]:
        lines.append("The run was interrupted: these are the competitors that were finished.")
    yield "\n".join(lines)
    yield _targets(record)
    for data in record["data"]:
        yield _stage(data, record)
    yield from _profile(result.folder / PROFILE)
    yield f"![Whole steps]({_link(result.folder / CHARTS[STEP], beside)})"
    for one in record["losses"]:
        yield f"Losses of stage {one['stage']}, step by step, the first ones not timed:"
        yield _losses(one["losses"])
    yield "\n".join(f"- {note}" for note in record["notes"])


def _profile(path: Path) -> Iterator[str]:
    """The largest kernels of a step of ours, where the run has looked into one."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| stage | what a step of ours computes | calls | ms | share |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["name"][:LONGEST_NAME].replace("|", "\\|")
        share = float(row["share"])
        lines.append(f"| {row['stage']} | {name} | {row['calls']} | {row['ms']} | {share:.1%} |")
    yield "\n".join(lines)


def _targets(record: dict[str, Any]) -> str:
    lines = ["| what | goal | measured |", "|---|---|---|"]
    for one in record["targets"]:
        met = "met" if one["reached"] else "not met"
        lines.append(f"| {one['what']} | {one['goal']} | {one['value']:.3g}, {met} |")
    return "\n".join(lines)


def _stage(data: dict[str, Any], record: dict[str, Any]) -> str:
    stage = data["stage"]
    ratios = {one["rival"]: one for one in record["ratios"] if one["stage"] == stage}
    on_gpu = record["environment"]["device_type"] == "cuda"
    heads = ["stage " + str(stage), f"time / {OURS}", "20-80 % of steps", "by CPU time"]
    heads += ["useful tokens/s", "images/s", "MFU", "every head", "peak MiB", "loading", "padding"]
    heads.append("what it is")
    lines = [
        f"Samples of stage {stage}: {data['mean_tokens']:g} tokens on average "
        f"({data['least_tokens']} to {data['most_tokens']}), {data['visual_share']:.0%} visual, "
        f"{data['learned_share']:.0%} learned, {data['tiles_per_image']:g} tiles an image.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in record["rows"]:
        if row["stage"] != stage:
            continue
        name, what = row["competitor"], COMPETITORS.get(row["competitor"], "")
        if row["reason"]:
            cells = [name, row["reason"], *[""] * (len(heads) - 3), what]
        else:
            cells = [name, *_ratio(ratios.get(name), on_gpu), *_figures(row), what]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(ratio: dict[str, Any] | None, on_gpu: bool) -> list[str]:
    if ratio is None:
        return ["1", "", ""]
    spread = f"{ratio['low']:.2f}-{ratio['high']:.2f}"
    cpu = "" if on_gpu else f"{ratio['cpu_ratio']:.2f}"  # a GPU's work has the clock alone
    return [f"**{ratio['ratio']:.2f}**", spread, cpu]


def _figures(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['useful_tokens_per_second']:,.1f}",
        f"{row['images_per_second']:.2f}",
        f"{row['mfu']:.1%}",
        f"{row['mfu_every_head']:.1%}",
        "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
        f"{row['loading_share']:.1%}",
        f"{row['padding']:.1%}",
    ]


def _losses(losses: dict[str, list[float]]) -> str:
    names = list(losses)
    lines = ["| step | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for number, values in enumerate(zip(*losses.values(), strict=True), start=1):
        lines.append(f"| {number} | " + " | ".join(f"{value:.6f}" for value in values) + " |")
    return "\n".join(lines)


def _growth(result: StepResult, beside: Path) -> Iterator[str]:
    about, facts = result.record["model"], result.environment
    yield (
        f"### Growth: {facts['device']}, {facts['time'][:10]}, {about['layers']} layers of width "
        f"{about['width']}"
    )
    yield _how(result, beside)
    lines = ["| against | measure | exponent | fixed + factor x^exponent |", "|---|---|---|---|"]
    for one in result.record["curves"]:
        lines.append(
            f"| {one['axis']} | {one['measure']} | **{one['exponent']:.2f}** | {one['words']} |"
        )
    yield "\n".join(lines)
    ranks, cores = _most_ranks(result.record), facts.get("cores")
    if cores is not None and cores < ranks:
        yield (
            f"The {ranks} ranks shared {cores} core{'s' * (cores != 1)}: their time says nothing "
            "of what more ranks bring."
        )
    yield f"![Growth]({_link(result.folder / CHARTS[GROWTH], beside)})"
    yield "\n".join(f"- {note}" for note in result.record["notes"])


def _most_ranks(record: dict[str, Any]) -> int:
    on_cpu = record["environment"]["device_type"] == "cpu"
    ranks = [point["x"] for point in record["points"] if point["axis"] == "ranks"]
    return max(ranks, default=1) if on_cpu else 1


def _how(result: StepResult, beside: Path) -> str:
    facts = result.environment
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value)
    return (
        f"`{facts['command']}`, seed {facts['seed']}, threads "
        f"{result.record['request']['threads']}; {versions}. Everything: "
        f"[{result.kind}]({_link(result.folder / result.kind, beside)})."
    )


def _link(path: Path, beside: Path) -> str:
    return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()
