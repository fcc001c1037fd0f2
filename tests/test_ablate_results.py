"""What an ablation came to: scores, intervals over images and seeds, verdicts, reports."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from llava_hd.bench.ablate import runs_of
from llava_hd.bench.ablate_paper import DATA, FORMAT_PROMPT, GLOBAL_VIEW, ROW_ENDS
from llava_hd.bench.ablate_plan import Plan, Variant
from llava_hd.bench.ablate_report import write_ablations
from llava_hd.bench.ablate_results import (
    BEYOND,
    DISAGREE,
    FEW,
    NOISE,
    ONE_SEED,
    SAME_WAY,
    Effect,
    find_results,
    over_seeds,
)
from llava_hd.bench.bootstrap import Estimate
from llava_hd.bench.pope_data import SPLITS, Answered
from llava_hd.bench.report import Chart, Facts, Note, Pictures, Section, Table
from llava_hd.bench.report_markdown import markdown

IMAGES = 30
PLAN = Plan(
    {
        "full": Variant(),
        "linear": Variant(projector="linear"),
        "no-view": Variant(global_view=False),
        "336": Variant(resolution=336),
        "224": Variant(resolution=224, against="336"),
    },
    seeds=(0, 1),
    test_scenes=IMAGES,
)
RIGHT = {"full": 0.95, "linear": 0.95, "no-view": 0.6, "336": 0.9, "224": 0.7}


def answers(variant: str, seed: int) -> list[Answered]:
    """Six questions of each split about each image, so many of them answered right."""
    rng = random.Random(f"{variant}/{seed}")
    found = []
    for split in SPLITS:
        for number in range(6 * IMAGES):
            label = "yes" if number % 2 else "no"
            said = label if rng.random() < RIGHT[variant] else {"yes": "no", "no": "yes"}[label]
            image, asked = f"test_{number // 6}.png", f"Is there thing {number}?"
            found.append(Answered(split, number, image, asked, label, said.capitalize()))
    return found


def mean_f1(items: list[Answered]) -> float:
    """By its definition, for each split."""
    scores = []
    for split in SPLITS:
        said = np.array([x.text == "Yes" for x in items if x.split == split])
        true = np.array([x.label == "yes" for x in items if x.split == split])
        scores.append(2 * (said & true).sum() / (said.sum() + true.sum()))
    return float(np.mean(scores))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablations")
    for run in runs_of(PLAN, folder):
        run.pope.mkdir(parents=True)
        (run.pope / "scores.json").write_text("{}")
        lines = (json.dumps(asdict(x)) + "\n" for x in answers(run.variant, run.seed))
        (run.pope / "answers.jsonl").write_text("".join(lines))
    return folder


def test_scores_and_differences_are_those_of_the_answers(out: Path) -> None:
    results = find_results(PLAN, out, 500)
    assert results is not None and not results.missing
    for name in PLAN.variants:
        each = [mean_f1(answers(name, seed)) for seed in PLAN.seeds]
        assert results.f1[name] == pytest.approx(each)
        both = answers(name, 0) + answers(name, 1)
        assert results.pooled(name).value == pytest.approx(mean_f1(both))
    assert results.comparison.num_images == 2 * IMAGES  # each seed has images of its own
    assert {n: e.against for n, e in results.effects.items()} == {
        "linear": "full", "no-view": "full", "336": "full", "224": "336",
    }  # fmt: skip
    effect = results.effects["224"]
    gap = mean_f1(answers("224", 0) + answers("224", 1)) - results.pooled("336").value
    assert effect.estimate.value == pytest.approx(gap) and gap < 0
    assert effect.estimate.low < gap < effect.estimate.high < 0
    assert results.effects["linear"].verdict == NOISE
    assert results.effects["no-view"].verdict in (SAME_WAY, BEYOND)
    assert results.effects["no-view"].beside_paper == "as in the paper"
    adjusted = [e.p_holm for e in results.effects.values()]
    plain = [e.estimate.p for e in results.effects.values()]
    assert all(a >= p for a, p in zip(adjusted, plain, strict=True))


def test_only_what_is_done_is_reported(out: Path) -> None:
    more = replace(PLAN, variants={**PLAN.variants, "half": Variant(data_share=0.5)})
    results = find_results(more, out, 500)
    assert results is not None and results.missing == ("half",) and "half" not in results.f1
    first = {"half": Variant(data_share=0.5), **PLAN.variants}
    assert find_results(replace(PLAN, variants=first), out, 500) is None
    assert find_results(replace(PLAN, seeds=(0, 1, 2)), out, 500) is None
    alone = find_results(replace(PLAN, seeds=(1,)), out, 500)
    assert alone is not None and alone.effects["no-view"].verdict == ONE_SEED


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.02, -0.01, 0.05]
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert over_seeds(values) == pytest.approx((theirs.low, theirs.high))
    assert over_seeds([0.1]) is None


def effect(low: float, high: float, seeds: list[float], paper=None, few: bool = False) -> Effect:
    estimate = Estimate((low + high) / 2, low, high, 0.5, few)
    return Effect("full", estimate, 0.5, tuple(seeds), over_seeds(seeds), paper)


def test_a_verdict_looks_at_questions_and_at_seeds() -> None:
    assert effect(-0.1, 0.1, [0.1, 0.1001]).verdict == NOISE
    assert effect(0.1, 0.2, [0.2, -0.1]).verdict == DISAGREE
    assert effect(0.1, 0.2, [0.2, 0.01]).verdict == SAME_WAY
    assert effect(-0.2, -0.1, [-0.15, -0.151]).verdict == BEYOND
    assert effect(0.1, 0.2, [0.2]).verdict == ONE_SEED
    assert effect(0.1, 0.2, [0.2, 0.2], few=True).verdict == FEW


def test_what_stands_beside_the_paper() -> None:
    worse, better = (-0.2, -0.1, [-0.1, -0.2]), (0.1, 0.2, [0.1, 0.2])
    nothing = (-0.1, 0.1, [0.0, 0.1])
    assert effect(*worse, GLOBAL_VIEW).beside_paper == "as in the paper"
    assert effect(*better, GLOBAL_VIEW).beside_paper == "contrary to the paper"
    assert effect(*nothing, GLOBAL_VIEW).beside_paper == "not shown here"
    assert effect(*worse, DATA).beside_paper == "contrary to the paper"
    assert effect(*better, DATA).beside_paper == "contrary to the paper"
    assert effect(*nothing, DATA).beside_paper == "no difference shown, as in the paper"
    assert effect(0.1, 0.2, [0.2], DATA).beside_paper == "undecided here"
    assert effect(0.1, 0.2, [0.2, -0.1], GLOBAL_VIEW).beside_paper == "undecided here"
    assert effect(*worse, ROW_ENDS).beside_paper == "the paper reports nothing"
    assert "differ among" in effect(*worse, FORMAT_PROMPT).beside_paper
    assert effect(*worse).beside_paper == "several choices at once"


def test_the_report_says_the_same_in_every_form(out: Path, tmp_path: Path) -> None:
    results = find_results(PLAN, out, 500)
    assert results is not None
    page, record = tmp_path / "docs" / "page.md", tmp_path / "results" / "r.json"
    values = write_ablations(results, out, "llava-hd ablate x", page, record)
    assert json.loads((out / "report.json").read_text()) == json.loads(record.read_text()) == values
    text, html = page.read_text(), (out / "report.html").read_text()
    for name, entry in values["variants"].items():
        assert entry["f1"]["value"] == pytest.approx(results.pooled(name).value)
        for form in (text, html):
            assert f"{entry['f1']['value']:.4f}" in form
            if entry["difference"]:
                assert entry["difference"]["verdict"] in form
                assert f"{entry['difference']['value']:+.4f}" in form
    assert "Table 2, rows 2 and 3" in text and "1497.5" in text and "Written by" in text
    chart = (page.parent / "images" / "ablations.png").read_bytes()
    assert chart == (out / "charts" / "ablations.png").read_bytes() and chart[1:4] == b"PNG"
    assert "charts/ablations.png" in (out / "report.md").read_text()


def test_markdown_holds_every_block_and_refuses_what_it_cannot_say() -> None:
    blocks = [
        Note("careful", "warning"),
        Facts([("a|b", "c\nd")]),
        Table(["x", "y"], [["1", "2"], ["3", ""]], "Caption.", strong=[1]),
        Chart("<svg></svg>", "a chart", name="c"),
    ]
    text = markdown("T", [Section("S", "Intro.", blocks)], {"c": "images/c.png"}, "Head.")
    assert text.splitlines()[0] == "# T" and "\n\n## S\n\nIntro.\n\n**careful**\n\n" in text
    assert "| a\\|b | c d |" in text and "| **3** |  |" in text
    assert "![a chart](images/c.png)" in text and text.endswith("\n")
    with pytest.raises(TypeError, match="Pictures"):
        markdown("T", [Section("S", "", [Pictures([])])], {})
