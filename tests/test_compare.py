"""Paired statistics against enumeration, a bootstrap in loops, known tables and simulation."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from dataclasses import asdict, replace

import numpy as np
import pytest
from compared import SPLITS, Two, compare, noisy, questions
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_hd.bench import compare as module
from llava_hd.bench.bootstrap import bootstrap_p
from llava_hd.bench.compare import ALL, MEAN, METRICS
from llava_hd.bench.mcnemar import mcnemar_p
from llava_hd.bench.pope import PARSERS, score_splits
from llava_hd.bench.pope_data import Answered
from llava_hd.hd.errors import DataError

ITEMS = questions(24)
A, B = noisy(ITEMS, 0.3, seed=1), noisy(ITEMS, 0.15, seed=2)


@pytest.fixture(scope="module")
def comparison() -> Two:
    return compare(A, B, resamples=4000)


@pytest.mark.parametrize("parser", PARSERS)
def test_the_figures_are_those_of_the_scores(parser: str) -> None:
    found = compare(A, B, parser, resamples=10)
    for side, items in ((found.a, A), (found.b, B)):
        for split, scores in score_splits(items, PARSERS[parser]).items():
            for metric in METRICS:
                expected = getattr(scores, metric)
                assert side[split][metric].value == pytest.approx(expected, abs=1e-12)
    for split, metric in itertools.product((*SPLITS, MEAN), METRICS):
        difference = found.b[split][metric].value - found.a[split][metric].value
        assert found.difference[split][metric].value == pytest.approx(difference, abs=1e-12)


def resampled(items: list[Answered], images: list[str]) -> list[Answered]:
    """The answers of the drawn images, an image drawn twice counting twice."""
    by_image: dict[str, list[Answered]] = {}
    for item in items:
        by_image.setdefault(item.image, []).append(item)
    return [item for image in images for item in by_image[image]]


def f1_difference(images: list[str]) -> float:
    a, b = (score_splits(resampled(items, images))[MEAN].f1 for items in (A, B))
    return b - a


def test_intervals_and_p_agree_with_a_bootstrap_written_as_loops(comparison: Two) -> None:
    rng = random.Random(5)
    names = sorted({item.image for item in A})
    drawn = [f1_difference(rng.choices(names, k=len(names))) for _ in range(1500)]
    cuts = statistics.quantiles(drawn, n=40)
    found = comparison.difference[MEAN]["f1"]
    noise = 4 * statistics.stdev(drawn) / math.sqrt(1500) / 0.37  # of a 2.5 % quantile
    assert found.low == pytest.approx(cuts[0], abs=noise)
    assert found.high == pytest.approx(cuts[-1], abs=noise)
    assert found.p is not None
    assert found.p == pytest.approx(2 * sum(d <= 0 for d in drawn) / 1500, abs=0.01)


def test_intervals_and_p_agree_with_all_resamples_of_four_images() -> None:
    items = questions(4, per_image=4, splits=("random",))
    flip = {"yes": "No", "no": "Yes"}
    wrong_a, wrong_b = {0, 1, 4, 9, 12}, {3, 6, 9}
    a, b = (
        [replace(x, text=flip[x.label]) if x.question_id in wrong else x for x in items]
        for wrong in (wrong_a, wrong_b)
    )
    names = sorted({item.image for item in items})
    every = []
    for images in itertools.product(names, repeat=4):
        x, y = (score_splits(resampled(side, list(images)))["random"].f1 for side in (a, b))
        every.append(y - x)
    found = compare(a, b, resamples=40_000, min_images=4).difference["random"]["f1"]
    low, high = np.percentile(every, (2.5, 97.5))
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    share = sum(d <= 1e-12 for d in every) / len(every)
    assert 0.02 < share < 0.4  # so the comparison of the p says something
    assert found.p == pytest.approx(2 * share, abs=0.012)


def test_mcnemar_counts_and_p_by_hand(comparison: Two) -> None:
    read = PARSERS["original"]
    right = [
        tuple(read(item.text) == (item.label == "yes") for item in pair)
        for pair in zip(A, B, strict=True)
    ]
    test = comparison.mcnemar[ALL]
    assert (test.only_a, test.only_b) == (right.count((True, False)), right.count((False, True)))
    assert test.p == mcnemar_p(test.only_a, test.only_b)
    for field in ("only_a", "only_b"):
        total = sum(getattr(comparison.mcnemar[split], field) for split in SPLITS)
        assert getattr(test, field) == total


def test_swapping_the_models_turns_every_sign(comparison: Two) -> None:
    turned = compare(B, A, resamples=4000)
    for split, metric in itertools.product((*SPLITS, MEAN), METRICS):
        one, other = comparison.difference[split][metric], turned.difference[split][metric]
        assert other.value == pytest.approx(-one.value)
        assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
        assert other.p == one.p
        assert turned.a[split][metric] == comparison.b[split][metric]
    test, back = comparison.mcnemar[ALL], turned.mcnemar[ALL]
    assert (back.only_a, back.only_b, back.p) == (test.only_b, test.only_a, test.p)


def test_the_order_of_the_answers_does_not_matter(comparison: Two) -> None:
    shuffled_a, shuffled_b = list(A), list(B)
    random.Random(1).shuffle(shuffled_a)
    random.Random(2).shuffle(shuffled_b)
    assert compare(shuffled_a, shuffled_b, resamples=4000) == comparison


def test_the_seed_decides_the_intervals(comparison: Two) -> None:
    assert compare(A, B, resamples=4000) == comparison
    assert compare(A, B, resamples=4000, seed=1).difference != comparison.difference


def test_a_model_compared_with_itself_shows_no_difference() -> None:
    found = compare(A, A, resamples=200)
    for split, metric in itertools.product((*SPLITS, MEAN), METRICS):
        estimate = found.difference[split][metric]
        assert (estimate.value, estimate.low, estimate.high, estimate.p) == (0, 0, 0, 1)
    assert all(test.p == 1 for test in found.mcnemar.values())


def test_asking_the_same_again_about_the_same_image_adds_no_certainty(
    comparison: Two,
) -> None:
    """Copied questions are no new evidence: clustered intervals stay, McNemar is fooled."""

    def doubled(items: list[Answered]) -> list[Answered]:
        return [*items, *(replace(item, question_id=f"again {item.question_id}") for item in items)]

    found = compare(doubled(A), doubled(B), resamples=4000)
    for split, metric in itertools.product((*SPLITS, MEAN), METRICS):
        one, other = comparison.difference[split][metric], found.difference[split][metric]
        assert asdict(other) == pytest.approx(asdict(one))
    assert found.mcnemar[ALL].p < comparison.mcnemar[ALL].p


def simulated(rng: random.Random, num_images: int, lift: float) -> tuple[list[Answered], ...]:
    """Two models whose errors cluster in hard images; B has `lift` fewer errors on average."""
    items = questions(num_images, per_image=4, splits=("random",))
    flip = {"yes": "No", "no": "Yes"}
    sides: tuple[list[Answered], list[Answered]] = ([], [])
    hard = {f"{n}.jpg": tuple(rng.random() * 0.8 for _ in sides) for n in range(num_images)}
    for item in items:
        for number, side in enumerate(sides):
            rate = hard[item.image][number] - lift * number
            side.append(replace(item, text=flip[item.label]) if rng.random() < rate else item)
    return sides


def test_the_bootstrap_keeps_its_promises_where_errors_cluster() -> None:
    """200 simulated pairs without a true difference: 95 % intervals hold 0 about 95 times in 100.

    McNemar takes the questions of a hard image as independent and claims more than it may.
    """
    rng = random.Random(0)
    misses, mcnemar_misses = 0, 0
    for _ in range(200):
        a, b = simulated(rng, num_images=60, lift=0)
        found = compare(a, b, resamples=400)
        estimate = found.difference["random"]["accuracy"]
        misses += not estimate.low <= 0 <= estimate.high
        mcnemar_misses += found.mcnemar[ALL].p < 0.05
    assert 2 <= misses <= 20  # binomial(200, 0.05): mean 10, three standard deviations up
    assert mcnemar_misses > misses


def test_a_true_difference_is_inside_its_interval() -> None:
    """Errors in [0, 0.8) on average 0.4; a lift of 0.1 below is cut at 0: the true gap is known."""
    rng = random.Random(1)
    truth = 0.4 - (0.8 - 0.1) ** 2 / (2 * 0.8)
    inside = 0
    for _ in range(100):
        a, b = simulated(rng, num_images=60, lift=0.1)
        estimate = compare(a, b, resamples=400).difference["random"]["accuracy"]
        inside += estimate.low <= truth <= estimate.high
    assert inside >= 88


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=30))
def test_bootstrap_p_is_twice_the_smaller_tail(drawn: list[float]) -> None:
    below, above = sum(d <= 0 for d in drawn), sum(d >= 0 for d in drawn)
    expected = min(1.0, 2 * (1 + min(below, above)) / (1 + len(drawn)))
    assert bootstrap_p(np.array([*drawn, math.nan])) == pytest.approx(expected)
    assert bootstrap_p(-np.array(drawn)) == bootstrap_p(np.array(drawn))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_answers_give_figures_in_order(data: st.DataObject) -> None:
    items = questions(data.draw(st.integers(1, 3)), per_image=2)
    texts = st.lists(st.sampled_from(["Yes", "No", "?"]), min_size=len(items), max_size=len(items))
    a, b = (
        [replace(item, text=text) for item, text in zip(items, data.draw(texts), strict=True)]
        for _ in range(2)
    )
    found = compare(a, b, data.draw(st.sampled_from(list(PARSERS))), resamples=20)
    for figures in (found.a, found.b, found.difference):
        for estimates in figures.values():
            for estimate in estimates.values():
                assert -1 <= estimate.low <= estimate.high <= 1
                assert estimate.p is None
                assert estimate.few_images and not estimate.clear
                assert estimate.span == (estimate.value, estimate.value)


def test_a_split_that_few_images_have_does_not_break_the_resamples() -> None:
    a = [*A, Answered("odd", 1, "0.jpg", "Is it?", "yes", "Yes")]
    b = [*B, Answered("odd", 1, "0.jpg", "Is it?", "yes", "No")]
    found = compare(a, b, resamples=500)
    assert found.few_images == {"odd": 1}
    odd = found.difference["odd"]["accuracy"]
    assert (odd.value, odd.high, odd.p) == (-1, -1, None)
    assert found.difference[MEAN]["accuracy"].p is None
    assert found.difference["random"]["accuracy"].p is not None


@pytest.mark.parametrize("resamples", [1, 100])
def test_splits_about_different_images_can_be_compared(resamples: int) -> None:
    a, b = (
        [x for x in items if (x.split == "random") == (int(x.image[:-4]) < 2)] for items in (A, B)
    )
    found = compare(a, b, resamples=resamples)
    assert found.few_images == {"random": 2}
    for figures in found.difference.values():
        assert all(np.isfinite(estimate.span).all() for estimate in figures.values())


def test_below_twenty_images_there_is_no_p_and_mcnemar_stays() -> None:
    for number in (19, 20):
        a, b = ([x for x in items if int(x.image[:-4]) < number] for items in (A, B))
        found = compare(a, b, resamples=100)
        assert found.few_images == (dict.fromkeys(SPLITS, 19) if number == 19 else {})
        estimates = [figures["f1"] for figures in found.difference.values()]
        assert {estimate.p is None for estimate in estimates} == {number == 19}
        assert 0 < found.mcnemar[ALL].p <= 1


def test_different_questions_are_refused_with_both_sides_named() -> None:
    with pytest.raises(DataError) as caught:
        compare(A[1:], B[:-2])
    message = str(caught.value)
    assert "2 only in A (first: question_id 142 of adversarial)" in message
    assert "1 only in B (first: question_id 0 of random)" in message


@pytest.mark.parametrize(
    ("field", "value"), [("image", "x.jpg"), ("question", "Is it?"), ("label", "no")]
)
def test_questions_that_only_share_their_ids_are_refused(field: str, value: str) -> None:
    changed = [replace(B[0], **{field: value}), *B[1:]]
    with pytest.raises(DataError, match=f"question_id 0 of split random has {field} .* in B"):
        compare(A, changed)


def test_three_models_are_compared_as_every_two_of_them(comparison: Two) -> None:
    third = noisy(ITEMS, 0.2, seed=3)
    whole = module.compare({"A": A, "B": B, "C": third}, resamples=4000)
    assert [(pair.a, pair.b) for pair in whole.pairs] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert [pair.b for pair in whole.from_first] == ["B", "C"]
    assert whole.models["A"] == comparison.a
    first = whole.pairs[0]
    assert (first.difference, first.mcnemar) == (comparison.difference, comparison.mcnemar)
    alone = comparison.whole.pairs[0]
    assert first.power == alone.power
    assert alone.mean_f1_adjusted == alone.difference[MEAN]["f1"].p  # one test needs no adjustment
    for pair in whole.pairs:
        assert pair.mean_f1_adjusted >= pair.difference[MEAN]["f1"].p
        assert pair.mcnemar_adjusted >= pair.mcnemar[ALL].p
    gaps = [pair.difference[MEAN]["f1"].value for pair in whole.pairs]
    assert gaps[0] + gaps[2] == pytest.approx(gaps[1])
    assert json.loads(json.dumps(whole.to_dict(), allow_nan=False))


def test_one_model_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="1 models"):
        module.compare({"A": A})


def test_a_third_model_with_other_questions_is_refused() -> None:
    with pytest.raises(DataError, match="A and C answer different questions"):
        module.compare({"A": A, "B": B, "C": B[1:]})


def test_the_design_effect_is_that_of_questions_drawn_one_by_one() -> None:
    """Independent questions: about 1. Each asked three times of the same image: about 3."""
    items = questions(400, per_image=1, splits=("random",))
    a, b = noisy(items, 0.3, seed=1), noisy(items, 0.2, seed=2)
    once = compare(a, b, resamples=2000).whole.pairs[0].power
    assert once["random"].design_effect == pytest.approx(1, abs=0.1)

    def tripled(side: list[Answered]) -> list[Answered]:
        return [replace(x, question_id=f"{x.question_id}/{n}") for x in side for n in range(3)]

    thrice = compare(tripled(a), tripled(b), resamples=2000).whole.pairs[0].power
    assert thrice["random"].design_effect == pytest.approx(3, abs=0.3)
    assert thrice[ALL].design_effect == thrice["random"].design_effect
    for field in ("power", "detectable"):  # three copies are worth one question
        value, other = getattr(once["random"], field), getattr(thrice["random"], field)
        assert other == pytest.approx(value, rel=0.05)


def test_few_images_leave_the_design_effect_open() -> None:
    a, b = ([x for x in items if int(x.image[:-4]) < 5] for items in (A, B))
    power = compare(a, b, resamples=100).whole.pairs[0].power
    assert {entry.design_effect for entry in power.values()} == {None}
    assert all(0 <= entry.power <= 1 for entry in power.values())
