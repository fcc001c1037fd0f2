"""The comparison of models as report.json, report.html and charts; its sections serve the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..hd.files import write_whole
from .charts import bar_chart, difference_chart, square_chart
from .compare import ALL, MEAN, METRICS, Comparison, Pair
from .compare_gallery import (
    Album,
    discordant,
    examples_section,
    gallery_section,
    geometries,
)
from .compare_sizes import BySize
from .contestants import (
    Contestant,
    interval,
    power_words,
    run_facts,
    show_p,
    verdicts,
    warnings_of,
)
from .files import json_text
from .mcnemar import ALPHA, TARGET
from .pope import score_table
from .question_sets import question_sets, questions_digest, questions_json
from .report import Block, Chart, Facts, Note, Section, Table, chart_files, render

CHARTS = "charts"  # folder of the PNG files


def write_comparison(
    out: Path,
    sides: Sequence[Contestant],
    comparison: Comparison,
    images: Path | None,
    sizes: BySize | None = None,
) -> None:
    """Write report.json, report.html and charts/*.png into `out`; `images` is their folder, if it
    is known, `sizes` the figures by the size of objects.

    All are made before any is written.
    """
    values = json_text(comparison_json(sides, comparison, sizes))
    sections = comparison_sections(sides, comparison, images, sizes)
    page = render(
        f"POPE: {', '.join(comparison.names)}",
        sections,
        f"{comparison.num_questions:,} questions about {comparison.num_images:,} images, answered "
        f"by {'both' if len(sides) == 2 else f'all {len(sides)}'} models and compared question by "
        "question",
    )
    out.mkdir(parents=True, exist_ok=True)
    write_charts(out, sections)
    write_whole(out / "report.json", values)
    write_whole(out / "report.html", page)


def write_charts(out: Path, sections: Sequence[Section]) -> None:
    """The sections' charts as PNG files in `out`/charts."""
    (out / CHARTS).mkdir(parents=True, exist_ok=True)
    for name, png in chart_files(sections).items():
        write_whole(out / CHARTS / name, png)


def comparison_json(
    sides: Sequence[Contestant], comparison: Comparison, sizes: BySize | None = None
) -> dict[str, Any]:
    """JSON-able: all sides with their scores by both parsers, questions, statistics, warnings."""
    return {
        "contestants": [
            {
                "name": side.name,
                "answers": str(side.answers),
                "run": side.run.to_dict() if side.run else None,
                "scores": score_table(side.answered),
            }
            for side in sides
        ],
        "questions": questions_json(sides[0].answered),
        "comparison": comparison.to_dict(),
        "by_size": sizes.to_dict() if sizes else None,
        "warnings": warnings_of(sides, comparison),
    }


def comparison_sections(
    sides: Sequence[Contestant],
    comparison: Comparison,
    images: Path | None,
    sizes: BySize | None = None,
) -> list[Section]:
    """Verdict and scores, differences, power, agreement, sizes, examples, what each model sees, how
    it was measured."""
    examples = discordant(sides, comparison.parser)
    album = Album(images, geometries(sides))
    found = [
        _scores_section(sides, comparison),
        _difference_section(comparison),
        _power_section(comparison),
        _agreement_section(comparison),
        _sizes_section(comparison, sizes) if sizes else None,
        examples_section(sides, comparison.parser, examples, album),
        gallery_section(examples, album),
        _method_section(sides, comparison),
    ]
    return [section for section in found if section]


def _scores_section(sides: Sequence[Contestant], comparison: Comparison) -> Section:
    notes = [Note(text, "good" if clear else "plain") for text, clear in verdicts(comparison)]
    notes += [Note(warning, "warning") for warning in warnings_of(sides, comparison)]
    rows, strong = _score_rows(sides, comparison)
    columns = ["split", "model", *(_label(metric) for metric in METRICS)]
    table = Table(columns, rows, f"Scores by the {comparison.parser} parser.", strong)
    charts = [
        _bars(comparison, "f1", "F1 by split, with 95 % intervals", "F1"),
        _bars(comparison, "yes_ratio", "Share of yes answers by split", "yes ratio"),
    ]
    return Section("Scores", "", [*notes, charts[0], table, charts[1]])


def _bars(comparison: Comparison, metric: str, title: str, label: str) -> Chart:
    series = {
        name: [figures[split][metric] for split in comparison.splits]
        for name, figures in comparison.models.items()
    }
    return bar_chart(title, comparison.splits, series, label, metric)


def _score_rows(
    sides: Sequence[Contestant], comparison: Comparison
) -> tuple[list[list[str]], list[int]]:
    """A row for each split and model, and for the labels' share of yes; the places of the mean."""
    shares = {
        entry.split: entry.labelled_yes / entry.questions
        for entry in question_sets(sides[0].answered)
    }
    shares[MEAN] = sum(shares.values()) / len(shares)
    rows: list[list[str]] = []
    strong: list[int] = []
    for split in comparison.splits:
        for place, (name, figures) in enumerate(comparison.models.items()):
            if split == MEAN:
                strong.append(len(rows))
            values = (f"{figures[split][metric].value:.4f}" for metric in METRICS)
            rows.append(["" if place else split, name, *values])
        rows.append(["", "(labels)", *[""] * (len(METRICS) - 1), f"{shares[split]:.4f}"])
    return rows, strong


def _difference_section(comparison: Comparison) -> Section:
    blocks: list[Block] = []
    for number, pair in enumerate(comparison.from_first, start=2):
        rows = [
            (f"{split}, {_label(metric)}", pair.difference[split][metric])
            for split in comparison.splits
            for metric in ("f1", "accuracy")
        ]
        axis = f"difference (right of 0: {pair.b} is higher)"
        title = f"{pair.b} minus {pair.a}"
        blocks.append(difference_chart(title, rows, axis, f"difference_{number}"))
        blocks += _difference_tables(pair)
    if len(comparison.names) > 2:
        blocks.append(_pairs_table(comparison))
    intro = "" if len(comparison.names) == 2 else f"Each model against {comparison.names[0]}."
    return Section("Differences, paired", intro, blocks)


def _difference_tables(pair: Pair) -> list[Table]:
    differences = Table(
        ["split", "F1", "p", "accuracy", "p", "yes ratio", "p"],
        [
            [
                split,
                interval(figures["f1"], signed=True),
                show_p(figures["f1"].p),
                interval(figures["accuracy"], signed=True),
                show_p(figures["accuracy"].p),
                f"{figures['yes_ratio'].value:+.4f}",
                show_p(figures["yes_ratio"].p),
            ]
            for split, figures in pair.difference.items()
        ],
        f"{pair.b} minus {pair.a} with 95 % intervals, and p against no difference: bootstrap over "
        "images.",
        [len(pair.difference) - 1],
    )
    tests = Table(
        ["split", f"only {pair.a} right", f"only {pair.b} right", "p"],
        [
            [split, str(test.only_a), str(test.only_b), show_p(test.p)]
            for split, test in pair.mcnemar.items()
        ],
        "McNemar's exact test on the questions that exactly one model has right; it takes "
        "questions as independent.",
        [len(pair.mcnemar) - 1],
    )
    return [differences, tests]


def _pairs_table(comparison: Comparison) -> Table:
    rows = [
        [
            f"{pair.b} - {pair.a}",
            interval(pair.difference[MEAN]["f1"], signed=True),
            show_p(pair.difference[MEAN]["f1"].p),
            show_p(pair.mean_f1_adjusted),
            show_p(pair.mcnemar[ALL].p),
            show_p(pair.mcnemar_adjusted),
        ]
        for pair in comparison.pairs
    ]
    columns = ["pair", "mean F1", "p", "p, adjusted", "McNemar p", "adjusted"]
    caption = (
        f"All {len(rows)} pairs. Among so many tests a small p comes by chance more often: the "
        "adjusted ones (Holm) may be read as if there were one test."
    )
    return Table(columns, rows, caption)


def _power_section(comparison: Comparison) -> Section:
    rows = []
    for pair in comparison.from_first:
        for split, power in pair.power.items():
            rows.append(
                [
                    f"{pair.b} - {pair.a}, {split}",
                    f"{100 * power.discordance:.1f} %",
                    f"{100 * power.difference:+.2f}",
                    "" if power.design_effect is None else f"{power.design_effect:.2f}",
                    f"{power.power:.2f}",
                    "" if power.detectable is None else f"{100 * power.detectable:.2f}",
                    "" if power.needed is None else f"{power.needed:,}",
                ]
            )
    columns = ["pair, split", "discordant", "difference", "design effect", "power"]
    columns += [f"found with power {TARGET:g}", "questions needed"]
    caption = (
        "Differences of accuracy in points. Power: the chance that McNemar's exact test finds a "
        f"difference as large as the one seen, p at most {ALPHA:g}, with this share of discordant "
        "questions; the power of a difference that was just seen says no more than its p. Found "
        f"with power {TARGET:g}: the smallest difference that has it here. Questions needed: for "
        "that power at the difference seen. Design effect: how much the images' clusters widen the "
        "variance; questions count by it, as 1 where it is empty."
    )
    notes = [Note(power_words(pair)) for pair in comparison.from_first]
    return Section("What so many questions can show", "", [*notes, Table(columns, rows, caption)])


def _agreement_section(comparison: Comparison) -> Section:
    names, found = comparison.names, comparison.agreement
    blocks: list[Block] = []
    if len(names) > 2:
        blocks.append(square_chart("Same reading, share", names, found.same, "agreement"))
    for title, square in (
        ("Share of the questions that both read the same (yes, no, unreadable)", found.same),
        ("Cohen's kappa: agreement beyond chance", found.kappa),
        ("Of the row's errors, the share that the column makes too", found.shared_errors),
    ):
        rows = [
            [name, *("" if value is None else f"{value:.4f}" for value in row)]
            for name, row in zip(names, square, strict=True)
        ]
        blocks.append(Table(["", *names], rows, f"{title}."))
    return Section("Agreement", "", blocks)


def _sizes_section(comparison: Comparison, sizes: BySize) -> Section:
    groups = [
        f"{group.name}, {100 * group.low:.0f} to {100 * group.high:.0f} %" for group in sizes.groups
    ]
    series = {name: [group.f1[name] for group in sizes.groups] for name in comparison.names}
    chart = bar_chart("F1 by size of the object", groups, series, "F1", "sizes")
    rows = []
    for title, group in zip(groups, sizes.groups, strict=True):
        for place, name in enumerate(comparison.names):
            gap = group.difference.get(name)
            rows.append(
                [
                    "" if place else f"{title}: {group.questions:,} questions",
                    name,
                    interval(group.f1[name]),
                    f"{group.recall[name].value:.4f}",
                    interval(gap, signed=True) if gap else "",
                    show_p(gap.p) if gap else "",
                ]
            )
    columns = ["objects", "model", "F1", "recall", f"F1 minus {comparison.names[0]}", "p"]
    unknown = (
        f" {sizes.unknown:,} questions about objects without a box are left out."
        if sizes.unknown
        else ""
    )
    intro = (
        "Size: square root of the box's share of the image. Questions labelled yes, in three "
        "groups of about equal number; questions labelled no have no object, so each group bears "
        f"its share of all false yes answers. All splits together; boxes: {sizes.boxes}.{unknown}"
    )
    return Section("F1 by the size of the object", intro, [chart, Table(columns, rows)])


def _label(metric: str) -> str:
    return {"f1": "F1", "yes_ratio": "yes ratio"}.get(metric, metric)


def _method_section(sides: Sequence[Contestant], comparison: Comparison) -> Section:
    first = sides[0].answered
    pairs = [
        ("parser", f"{comparison.parser} (bench/pope.py)"),
        ("questions, images", f"{comparison.num_questions:,}, {comparison.num_images:,}"),
        *((f"question set, {entry.split}", entry.text) for entry in question_sets(first)),
        ("question set, sha256", questions_digest(first)),
        (
            "intervals",
            f"95 %, percentile bootstrap over images, {comparison.resamples:,} resamples, "
            f"seed {comparison.seed}; the same resamples for all models and splits",
        ),
        (
            "tests",
            "bootstrap p, two-sided; McNemar's exact test on the discordant questions; Holm's "
            "adjustment where there are several pairs",
        ),
    ]
    for side in sides:
        pairs += [(f"{side.name}: {name}", value) for name, value in run_facts(side)]
    return Section("How this was measured", "", [Facts(pairs)])
