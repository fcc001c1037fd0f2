"""ScienceQA's forms, letters and scores; the command with a tiny model, in one and two passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import random_image, save_llava_next, tiny_tokenizer

from llava_hd.bench import science_qa
from llava_hd.bench.science_qa import (
    Problem,
    prompt_of,
    read_letter,
    read_problems,
    score_problems,
    target_of,
    thought_of,
    with_answer,
)
from llava_hd.cli.main import main
from llava_hd.hd.errors import DataError, UsageError

PROBLEMS: dict[str, dict[str, Any]] = {
    "4": {
        "question": "Which is red?", "choices": ["the cat", "the dog"], "answer": 1,
        "hint": "One has  a colour.", "image": "image.png", "grade": "grade2",
        "subject": "natural science", "lecture": "Colours differ.", "solution": "Look at it.",
    },
    "7": {
        "question": "What is a mat?", "choices": ["a rug", "a cat", "a dog"], "answer": 0,
        "hint": "", "image": None, "grade": "grade8",
        "subject": "language science", "lecture": "", "solution": "It lies on a floor.",
    },
    "9": {
        "question": "Where?", "choices": ["here", "there"], "answer": 0,
        "hint": "", "image": "image.png", "grade": "grade6",
        "subject": "social science", "lecture": "Places.", "solution": "",
    },
}  # fmt: skip


def make(folder: Path, problems: dict[str, Any] | None = None) -> Path:
    """ScienceQA's folder with three problems in the split `test`, and their images."""
    values = PROBLEMS if problems is None else problems
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(values))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(values), "train": []}))
    for key, value in values.items():
        if value.get("image"):
            place = folder / "test" / key
            place.mkdir(parents=True, exist_ok=True)
            random_image((40, 60), seed=int(key)).save(place / "image.png")
    return folder


def first(tmp_path: Path) -> Problem:
    return read_problems(make(tmp_path / "sqa"))[0]


def test_the_forms_are_llavas(tmp_path: Path) -> None:
    """By hand after LLaVA's converter: CQM-A with LLaVA-1.5's request, and QCM-LEPA."""
    problem = first(tmp_path)
    assert prompt_of(problem, "letter") == (
        "Context: One has a colour.\nQuestion: Which is red?\n"
        "Options: (A) the cat (B) the dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert prompt_of(problem, "thought") == (
        "Question: Which is red?\nContext: One has a colour.\nOptions: (A) the cat (B) the dog"
    )
    assert target_of(problem, "letter") == "B"
    assert target_of(problem, "thought") == (
        "LECTURE: Colours differ.\nSOLUTION: Look at it.\n###\nANSWER: B."
    )
    _, bare, placed = read_problems(tmp_path / "sqa")
    assert prompt_of(bare, "thought").splitlines()[1] == "Context: N/A"
    assert target_of(bare, "thought") == "SOLUTION: It lies on a floor.\n###\nANSWER: A."
    assert target_of(placed, "thought") == "LECTURE: Places.\n###\nANSWER: A."


def test_a_trained_target_is_read_as_its_own_answer(tmp_path: Path) -> None:
    for problem in read_problems(make(tmp_path / "sqa")):
        target = target_of(problem, "thought")
        letter = target.rpartition("ANSWER:")[2]
        text = with_answer(thought_of(target), letter)
        assert read_letter(text, len(problem.choices)) == problem.answer
        assert thought_of(target) == target.split("\n###")[0]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("A", 0),
        (" B ", None),  # models' answers come without white space at their ends
        ("C", None),  # there are two choices
        ("B. the dog", 1),
        ("B.", None),
        ("B\nbecause", None),
        ("B) the dog", None),
        ("b", None),
        ("The answer is A. The answer is B.", None),  # twice
        ("The answer is A. The answer is B", 0),  # the second has no character behind it
        ("It is red.\n The answer is B.", 1),
        ("The answer is B) because", 1),
        ("The answer is Blue.", 1),  # the pattern asks for no more
        ("The answer is B", None),
        ("The answer is B\n", None),  # a newline is no character of the pattern
        ("The answer is E.", None),
        ("The answer is X.", None),
        ("the answer is A.", None),
        ("", None),
        ("A cat", None),
        ("FAILED", None),
    ],
)
def test_letters_are_read_as_llava_reads_them(text: str, place: int | None) -> None:
    assert read_letter(text, 2) == place


def test_scores_are_by_the_columns_of_the_table(tmp_path: Path) -> None:
    problems = read_problems(make(tmp_path / "sqa"))
    scores = score_problems(problems, {"4": "B", "7": "B", "9": "?"})
    accuracy = {name: entry["accuracy"] for name, entry in scores["groups"].items()}
    assert accuracy == {
        "all": pytest.approx(1 / 3), "NAT": 1, "SOC": 0, "LAN": 0, "TXT": 1, "IMG": 0.5, "NO": 0,
        "G1-6": 0.5, "G7-12": 0,
    }  # fmt: skip
    assert scores["groups"]["IMG"]["questions"] == 2
    assert scores["unreadable"] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 2}, "answer is 2"),
        ({"answer": "B"}, "answer is text"),
        ({"choices": ["one"]}, "choices has 1"),
        ({"choices": list("abcdef")}, "choices has 6"),
        ({"subject": "art"}, "subject is 'art'"),
        ({"grade": "two"}, "grade is 'two'"),
        ({"image": 3}, "image is a whole number"),
    ],
)
def test_bad_problems_are_told_by_file_and_field(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = make(tmp_path / "sqa", {"4": PROBLEMS["4"]})
    values = {"4": {**PROBLEMS["4"], **change}}
    (folder / "problems.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=said) as caught:
        read_problems(folder)
    assert "problems.json: problem 4" in str(caught.value)


def test_unknown_splits_and_missing_problems_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "sqa")
    with pytest.raises(UsageError, match="no split 'dev' but test, train"):
        read_problems(folder, "dev")
    (folder / "pid_splits.json").write_text(json.dumps({"test": [], "train": ["4"]}))
    with pytest.raises(DataError, match=r"pid_splits\.json: split 'test' is empty; see --split"):
        read_problems(folder)
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["4", "5"]}))
    with pytest.raises(DataError, match="problem 5 of split test is missing"):
        read_problems(folder)
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["4", "4"]}))
    with pytest.raises(DataError, match="stands twice"):
        read_problems(folder)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llava_next(folder, "hd448")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in ("eval", "scienceqa", *words)])
    done = capsys.readouterr()
    return code, done.out, done.err


def words_of(folder: Path, model: Path, out: Path, *more: object) -> list[object]:
    images = ["--images", folder / "test", "--device", "cpu", "--dtype", "float32"]
    return ["--data", folder, "--model", model, *images, "--out", out, *more]


@pytest.mark.parametrize("form", science_qa.FORMS)
def test_a_tiny_model_is_asked_and_goes_on(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    folder, out = make(tmp_path / "sqa"), tmp_path / "out"
    words = words_of(folder, model_dir, out, "--form", form, "--max-new-tokens", 6, "--json")
    code, text, _ = run(capsys, *words, "--batch-size", 2)
    assert code == 0
    scores = json.loads(text)
    assert scores["groups"]["all"]["questions"] == 3
    assert scores == json.loads((out / "scores.json").read_text())
    answers = (out / "answers.jsonl").read_text()
    lines = [json.loads(line) for line in answers.splitlines()]
    assert [line["question_id"] for line in lines] == ["4", "7", "9"]
    assert all(("The answer is " in line["text"]) == (form == "thought") for line in lines)
    # half of the last answer is lost: it alone is asked again, and says the same
    (out / "answers.jsonl").write_text(answers[:-9])
    assert json.loads(run(capsys, *words)[1]) == scores
    assert (out / "answers.jsonl").read_text() == answers
    # all are there: no model is needed, and scoring alone finds the same
    for answers in (out / "answers.jsonl", out):
        _, text, _ = run(capsys, "--data", folder, "--score-only", "--answers", answers, "--json")
        assert json.loads(text)["groups"] == scores["groups"]
    other = "letter" if form == "thought" else "thought"
    code, _, err = run(capsys, *words, "--form", other)
    assert (code, err.count("\n")) == (2, 1)
    assert "form was" in err


def test_a_missing_image_is_found_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = make(tmp_path / "sqa"), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (folder / "test" / "9" / "image.png").unlink()
    code, _, err = run(capsys, *words_of(folder, model, tmp_path / "out"))
    assert (code, err.count("\n")) == (3, 1)
    assert "9/image.png: no such image" in err and "problem 9" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"question_id": "4", "text": "A"}], "2 of 3 questions have no answer"),
        ([{"question_id": "5", "text": "A"}], "question_id 5 is not among the questions"),
        ([{"question_id": "4", "text": "A"}] * 2, "stands twice"),
        ([{"question_id": "4"}], "field 'text'"),
        ([{"text": "A"}], "field 'question_id'"),
    ],
)
def test_answers_to_other_questions_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[dict[str, Any]], said: str
) -> None:
    folder, answers = make(tmp_path / "sqa"), tmp_path / "a.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run(capsys, "--data", folder, "--score-only", "--answers", answers)
    assert (code, err.count("\n")) == (3, 1)
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--data is missing"),
        (["--data", "sqa", "--score-only"], "--score-only needs --answers"),
        (["--data", "sqa", "--answers", "a"], "--answers is for --score-only"),
        (
            ["--data", "sqa", "--score-only", "--answers", "a", "--limit", "0"],
            "--limit has no mean",
        ),
        (["--data", "sqa", "--score-only", "--answers", "a", "--out", "x"], "--out has no meaning"),
        (["--data", "sqa"], "--model is missing"),
        (["--data", "sqa", "--form", "loud"], "--form must be one of"),
        (["--data", "none"], "cannot be read"),
    ],
)
def test_bad_usage_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    make(tmp_path / "sqa")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
