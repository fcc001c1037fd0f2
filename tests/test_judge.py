"""The judge: what it reads, its scores, the relative score."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from judge_files import CATEGORIES, make, write_lines

from llava_hd.bench.judge import (
    OWN_RULE,
    SYSTEM,
    JudgeSettings,
    JudgeWork,
    read_bench,
    read_contexts,
    read_rules,
    read_scores,
    relative_scores,
    rules_digest,
)
from llava_hd.hd.errors import DataError
from llava_hd.train.generate_request import Invalid


def work_of(folder: Path, **settings: Any) -> JudgeWork:
    questions = read_bench(folder / "questions.jsonl")
    texts = {
        side: {q.key: f"{side} {q.key}" for q in questions} for side in ("reference", "answers")
    }
    contexts = read_contexts(folder / "context.jsonl", questions)
    own = JudgeSettings("judge", **settings)
    return JudgeWork(own, questions, contexts, read_rules(None), **texts)


def test_the_judge_reads_what_llavas_judge_read(tmp_path: Path) -> None:
    work = work_of(make(tmp_path))
    request = work.request(work.tasks[1])
    assert request.messages == (
        ("system", SYSTEM),
        (
            "user",
            "[Context]\nA scene 0.\nIt is calm.\n\n[Question]\nWhat about 1?\n\n"
            "[Assistant 1]\nreference 1\n\n[End of Assistant 1]\n\n"
            "[Assistant 2]\nanswers 1\n\n[End of Assistant 2]\n\n"
            f"[System]\n{OWN_RULE}\n\n",
        ),
    )
    assert (request.max_tokens, request.temperature) == (1024, 0.2)
    seeds = {work.request(work.tasks[1], attempt).seed for attempt in range(3)}
    assert len(seeds) == 3


def test_in_the_other_order_the_scores_are_turned_back(tmp_path: Path) -> None:
    work = work_of(make(tmp_path), both_orders=True)
    assert len(work.tasks) == 24
    swapped = work.tasks[12]
    text = work.request(swapped).messages[1][1]
    assert "[Assistant 1]\nanswers 0\n" in text and "[Assistant 2]\nreference 0\n" in text
    assert work.take(swapped, "7 9\nwhy")["tuple"] == [9, 7]
    assert work.take(work.tasks[0], "7 9\nwhy")["tuple"] == [7, 9]
    assert len({task.key for task in work.tasks}) == 24


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 6\nBecause.", (8, 6)),
        ("8, 6", (8, 6)),
        ("8,6", (8, 6)),
        ("\n 8.5 10 \n", (8.5, 10)),
        ("(8, 6)", (8, 6)),
        ("8/10 6/10", (8, 6)),
    ],
)
def test_scores_are_read_from_the_first_line(text: str, scores: tuple[float, float]) -> None:
    assert read_scores(text) == scores


@pytest.mark.parametrize(
    "text",
    ["", "Both are fine.", "8", "8 6 7", "0 5", "8 11", "-8 6", "nan 5", "86", "Scores below\n8 6"],
)
def test_nonsense_is_no_score(text: str) -> None:
    with pytest.raises(Invalid):
        read_scores(text)


def review(question: int, category: str, pair: tuple[float, float]) -> dict[str, Any]:
    return {"question_id": str(question), "category": f"llava_bench_{category}", "tuple": pair}


def test_the_relative_score_is_the_quotient_of_the_means(tmp_path: Path) -> None:
    questions = read_bench(make(tmp_path) / "questions.jsonl")
    pairs = itertools.cycle([(8.0, 6.0), (10.0, 7.0), (9.0, 9.0), (4.0, 5.0)])
    reviews = [review(int(q.key), q.category, next(pairs)) for q in questions]
    found = relative_scores(questions, reviews, resamples=100)
    first, second = (sum(r["tuple"][i] for r in reviews) for i in (0, 1))
    assert found["all"]["relative_score"] == pytest.approx(100 * second / first)
    assert found["all"]["judgements"] == 12
    assert found["all"]["interval"] is None  # four images
    conv = [r["tuple"] for r in reviews if r["category"].endswith("conv")]
    assert found["conv"]["relative_score"] == pytest.approx(
        100 * sum(b for _, b in conv) / sum(a for a, _ in conv)
    )


def test_the_interval_is_over_images(tmp_path: Path) -> None:
    questions = read_bench(make(tmp_path, num_images=24) / "questions.jsonl")
    reviews = [review(int(q.key), q.category, (8, 4 + int(q.key) % 5)) for q in questions]
    found = relative_scores(questions, reviews, resamples=500)["all"]
    low, high = found["interval"]
    assert low < found["relative_score"] < high


def test_llavas_rules_are_taken_from_its_file(tmp_path: Path) -> None:
    rules = {f"llava_bench_{c}": {"role": "Judge", "prompt": f"Rate {c}."} for c in CATEGORIES}
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(rules))
    found = read_rules(path)
    assert found["detail"] == ("Judge", "Rate detail.")
    assert rules_digest(found) != rules_digest(read_rules(None))
    path.write_text(json.dumps({"llava_bench_conv": rules["llava_bench_conv"]}))
    with pytest.raises(DataError, match="llava_bench_detail is missing"):
        read_rules(path)


@pytest.mark.parametrize(
    ("name", "record", "said"),
    [
        ("questions", {"question_id": 1, "image": "a", "text": "b", "category": "x"}, "category"),
        ("questions", {"image": "a", "text": "b", "category": "conv"}, "question_id is missing"),
        ("context", {"image": "000.png", "caption": ""}, "no caption of 000.png"),
        ("context", {"image": "other.png", "caption": ["x"]}, "no caption of 000.png"),
    ],
)
def test_bad_files_are_told_by_file_and_field(
    tmp_path: Path, name: str, record: dict[str, Any], said: str
) -> None:
    folder = make(tmp_path)
    write_lines(folder / f"{name}.jsonl", [record])
    with pytest.raises(DataError, match=said) as caught:
        work_of(folder)
    assert f"{name}.jsonl" in str(caught.value)
