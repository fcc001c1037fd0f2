"""Ablations as report.json, report.html, report.md and a chart, beside the paper's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..hd.files import write_whole
from .ablate_plan import Variant
from .ablate_results import BEYOND, DISAGREE, NOISE, SAME_WAY, Effect, Results
from .charts import difference_chart
from .compare_report import CHARTS
from .contestants import interval, show_p
from .files import json_text
from .measure import environment
from .report import Chart, Facts, Note, Section, Table, chart_files, render
from .report_markdown import markdown

TITLE = "Ablations at nano size"
CHART = "ablations"
WORDS: Mapping[tuple[str, Any], str] = {
    ("projector", "linear"): "linear projector",
    ("resolution", 336): "one view, 84 px (for 336)",
    ("resolution", 224): "one view, 56 px (for 224)",
    ("global_view", False): "no global view",
    ("row_ends", False): "no row-ends",
    ("format_prompt", False): "no format prompt, in training and questions",
}
FULL = "2x2 tiles of 56 px (for 448), global view, row-ends, MLP, all data, format prompt"


def write_ablations(
    results: Results, out: Path, command: str, page: Path | None, record: Path | None
) -> dict[str, Any]:
    """Write report.json, report.html, report.md and charts/ into `out`; returns the values.

    page: the Markdown once more, with its chart in images/ beside it. record: report.json once
    more. All are made before any is written.
    """
    values = ablations_json(results, out, command)
    text = json_text(values)
    sections = ablation_sections(results, values["environment"])
    [(chart, png)] = chart_files(sections).items()
    subtitle = f"POPE about {results.comparison.num_images:,} drawn scenes"
    own_page = markdown(TITLE, sections, {CHART: f"{CHARTS}/{chart}"})
    (out / CHARTS).mkdir(parents=True, exist_ok=True)
    write_whole(out / CHARTS / chart, png)
    write_whole(out / "report.json", text)
    write_whole(out / "report.html", render(TITLE, sections, subtitle))
    write_whole(out / "report.md", own_page)
    if page is not None:
        (page.parent / "images").mkdir(parents=True, exist_ok=True)
        write_whole(page.parent / "images" / chart, png)
        where = f"Written by `{command}`; do not edit it by hand."
        if record is not None:
            where += f" Every figure is in `{record}`."
        write_whole(page, markdown(TITLE, sections, {CHART: f"images/{chart}"}, where))
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, text)
    return values


def ablations_json(results: Results, out: Path, command: str) -> dict[str, Any]:
    """JSON-able: plan, scores and differences by variant, folders and seconds of the runs."""
    variants = {}
    for name in results.names:
        effect = results.effects.get(name)
        variants[name] = {
            "settings": results.plan.variants[name].choices,
            "steps": list(results.plan.steps(name)),
            "f1": asdict(results.pooled(name)),
            "f1_by_seed": list(results.f1[name]),
            "difference": _effect_json(effect) if effect else None,
        }
    return {
        "plan": results.plan.to_dict(),
        "missing": list(results.missing),
        "variants": variants,
        "resamples": results.comparison.resamples,
        "questions": results.comparison.num_questions,
        "images": results.comparison.num_images,
        "runs": [
            {**run.to_dict(out), "seconds": results.seconds.get(run.name, {})}
            for run in results.runs
        ],
        "process_seconds": round(results.process_seconds, 1),
        "environment": environment(torch.device("cpu"), command, results.plan.seeds[0]),
    }


def _effect_json(effect: Effect) -> dict[str, Any]:
    return {
        "against": effect.against,
        **asdict(effect.estimate),
        "p_holm": effect.p_holm,
        "by_seed": list(effect.by_seed),
        "over_seeds": list(effect.over_seeds) if effect.over_seeds else None,
        "verdict": effect.verdict,
        "paper": effect.paper.words if effect.paper else None,
        "beside_paper": effect.beside_paper,
    }


def ablation_sections(results: Results, where: Mapping[str, Any]) -> list[Section]:
    """What was run, what came out, each choice beside the paper's table."""
    return [
        _run_section(results, where),
        _result_section(results),
        *_paper_sections(results),
    ]


def _run_section(results: Results, where: Mapping[str, Any]) -> Section:
    plan = results.plan
    intro = (
        "The nano HD model with one of the paper's choices taken back at a time: same language "
        "model, same scenes, same order and number of steps where nothing else is said. Stage 1 "
        "on captions, stage 2 on questions and answers, then POPE's questions about held-out "
        "scenes. A seed decides scenes, data order and new weights."
    )
    pairs = [
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("training scenes of each stage", f"{plan.train_scenes:,}"),
        ("steps", f"{plan.steps_1} of stage 1, {plan.steps_2} of stage 2"),
        (
            "questions",
            f"{results.comparison.num_questions:,} about {results.comparison.num_images:,} "
            "held-out scenes, all seeds together",
        ),
        ("command", f"`{where['command']}`"),
        (
            "time",
            f"{results.process_seconds / 60:.0f} min, all processes one after another; several ran "
            f"side by side on {where['cores']} cores, {where['device']}",
        ),
    ]
    small = Note(
        "These are models of two million parameters on drawn scenes with short training. They "
        "tell that every choice can be taken back and measured, and which of them matters here; "
        "they do not tell what a choice does to a 7B model.",
        "warning",
    )
    blocks: list[Any] = [Facts(pairs), small]
    if results.missing:
        blocks.append(Note(f"Not done yet: {', '.join(results.missing)}.", "warning"))
    return Section("What was run", intro, blocks)


def _result_section(results: Results) -> Section:
    rows = []
    for name in results.names:
        effect = results.effects.get(name)
        variant, (first, second) = results.plan.variants[name], results.plan.steps(name)
        usual = (results.plan.steps_1, results.plan.steps_2)
        steps = f", {first} and {second} steps" if (first, second) != usual else ""
        rows.append(
            [
                name,
                _settings(variant) + steps,
                interval(results.pooled(name)),
                " ".join(f"{value:.3f}" for value in results.f1[name]),
                *(_effect_cells(effect) if effect else ["", "", "", "", "", ""]),
            ]
        )
    columns = [
        "variant", "made with", "mean F1 [95 % over images]", "each seed", "against",
        "difference [95 % over images]", "p (Holm)", "each seed", "[95 % over seeds]", "verdict",
    ]  # fmt: skip
    shown = Table(
        columns,
        rows,
        "Mean F1 of POPE's three splits. Over images: bootstrap, the scenes of all seeds together. "
        "Over seeds: Student's interval of the seeds' differences.",
    )
    return Section("Results", "", [shown, _chart(results), *_verdict_notes(results)])


def _effect_cells(effect: Effect) -> list[str]:
    low, high = effect.over_seeds or (0.0, 0.0)
    return [
        effect.against,
        interval(effect.estimate, signed=True),
        show_p(effect.p_holm),
        " ".join(f"{value:+.3f}" for value in effect.by_seed),
        f"[{low:+.3f}, {high:+.3f}]" if effect.over_seeds else "",
        effect.verdict,
    ]


def _settings(variant: Variant) -> str:
    """What a variant is made with, in words; steps aside."""
    changed = {k: v for k, v in variant.choices.items() if v != getattr(Variant, k)}
    words = [
        f"{value:.0%} of stage 2's data" if name == "data_share" else WORDS[name, value]
        for name, value in changed.items()
    ]
    return ", ".join(words) or FULL


def _chart(results: Results) -> Chart:
    rows = [(f"{n} - {e.against}", e.estimate) for n, e in results.effects.items()]
    dots = [effect.by_seed for effect in results.effects.values()]
    return difference_chart(
        "One choice taken back", rows, "difference in mean F1 (ticks: each seed)", CHART, dots
    )


def _verdict_notes(results: Results) -> list[Note]:
    """A sentence for each verdict that occurs, with the variants that have it."""
    by_verdict: dict[str, list[str]] = {}
    for name, effect in results.effects.items():
        by_verdict.setdefault(effect.verdict, []).append(name)
    order = [BEYOND, SAME_WAY, DISAGREE, NOISE]
    order += [verdict for verdict in by_verdict if verdict not in order]
    words = [f"{v}: {', '.join(by_verdict[v])}" for v in order if v in by_verdict]
    return [Note(f"{text[0].upper()}{text[1:]}.") for text in words]


def _paper_sections(results: Results) -> list[Section]:
    """For each choice that the plan takes back, ours in a sentence, and the paper's own table."""
    by_choice: dict[str, list[tuple[str, Effect]]] = {}
    for name, effect in results.effects.items():
        if effect.paper:
            by_choice.setdefault(effect.paper.choice, []).append((name, effect))
    sections = []
    for choice, found in by_choice.items():
        paper = found[0][1].paper
        if paper is None:
            continue
        ours = [[n, interval(e.estimate, signed=True), e.verdict, e.beside_paper] for n, e in found]
        columns = ["here", "difference in mean F1", "verdict", "beside the paper"]
        blocks: list[Any] = [Table(columns, ours)]
        if paper.rows:
            blocks.append(Table(["paper", *paper.columns[1:]], paper.rows))
        blocks.append(Note(f"The paper ({paper.source}): {paper.words}."))
        sections.append(Section(f"{choice[0].upper()}{choice[1:]}", "", blocks))
    source = (
        "The paper is LLaVA-1.5, arXiv 2310.03744v2; 7B models, and other benchmarks than POPE, "
        "where nothing else is said. Its tables have one run each and no intervals."
    )
    return [Section("Beside the paper", source, []), *sections]
