"""Asking: batches on disk as they come, and a resumed run equals one that was never stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from pope_files import image_name, true_label, write_pope

from llava_hd.bench.pope import PROMPT, score_table
from llava_hd.bench.pope_data import Answered, Question, read_questions, split_files
from llava_hd.bench.pope_run import (
    RunRecord,
    batches_by_image,
    check_resumable,
    describe_files,
    evaluate,
    fingerprint,
    finished_answers,
    first_questions,
    read_run,
)
from llava_hd.hd.errors import DataError, UsageError


class Oracle:
    """A model that knows every label, keeps what it was asked, and may stop after some batches."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.batches: list[int] = []
        self.stop_after = stop_after

    def __call__(self, images: list[Path], questions: list[str]) -> list[str]:
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(len(questions))
        self.asked += [(path.name, text) for path, text in zip(images, questions, strict=True)]
        return [true_label(text).title() + ", ünï\u2028code" for text in questions]


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return read_questions(split_files(write_pope(tmp_path / "pope")))


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    return {image_name(number): tmp_path / image_name(number) for number in range(3)}


def run_record(batch_size: int = 4) -> RunRecord:
    return RunRecord(
        model={"path": "/models/a", "fingerprint": "f" * 64},
        prompt=PROMPT,
        questions=({"file": "q_random.json", "sha256": "0" * 64, "questions": 54},),
        images="/images",
        decoding={"max_new_tokens": 16, "greedy": True, "dtype": "float32"},
        limit=None,
        batch_size=batch_size,
        device="cpu",
    )


def test_every_question_is_asked_once_with_the_prompt_and_its_image(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    oracle = Oracle()
    evaluate(questions, images, oracle, tmp_path / "out", run_record())
    assert sorted(oracle.asked) == sorted((q.image, q.text + PROMPT) for q in questions)
    assert oracle.batches == [4, 4, 4, 4, 2] * 3
    images_asked = [name for name, _ in oracle.asked]
    assert images_asked == sorted(images_asked)  # an image's questions of all splits together


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (1, [1] * 54),
        (4, [4, 4, 4, 4, 2] * 3),
        (17, [17, 1] * 3),
        (18, [18] * 3),
        (35, [18] * 3),
        (36, [36, 18]),
        (99, [54]),
    ],
)
def test_a_batch_holds_whole_images_where_they_fit(
    questions: list[Question], size: int, sizes: list[int]
) -> None:
    batches = batches_by_image(questions, size)
    assert [len(batch) for batch in batches] == sizes
    images = [question.image for batch in batches for question in batch]
    assert images == [name for number in range(3) for name in [image_name(number)] * 18]
    assert {question.key for batch in batches for question in batch} == {q.key for q in questions}


def test_images_with_few_questions_fill_a_batch(questions: list[Question]) -> None:
    few = [question for n, question in enumerate(questions) if n % 5 == 0]
    batches = batches_by_image(few, 8)
    for batch, following in pairwise(batches):
        assert len(batch) + sum(q.image == following[0].image for q in following) > 8
    for name in {question.image for question in few}:
        assert sum(any(q.image == name for q in batch) for batch in batches) == 1


def test_answers_scores_and_record_are_on_disk(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    out = tmp_path / "deep" / "out"
    answered = evaluate(questions, images, Oracle(), out, run_record())
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_bytes().splitlines()]
    assert list(lines[0]) == ["split", "question_id", "image", "question", "label", "text"]
    by_key = {(line["split"], str(line["question_id"])): Answered(**line) for line in lines}
    assert answered == [by_key[question.key] for question in questions]
    assert json.loads((out / "scores.json").read_text()) == score_table(answered)
    assert score_table(answered)["mean"]["f1"] == 1.0
    assert read_run(out) == run_record()


def test_a_prompt_in_the_question_file_is_not_asked_twice(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    oracle = Oracle()
    asked = [replace(question, text=question.text + PROMPT) for question in questions]
    evaluate(asked, images, oracle, tmp_path / "out", run_record())
    assert sorted(oracle.asked) == sorted((q.image, q.text + PROMPT) for q in questions)


def test_each_batch_is_on_disk_before_the_next_is_asked(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    out, seen = tmp_path / "out", []
    oracle = Oracle()

    def answer(paths: list[Path], texts: list[str]) -> list[str]:
        seen.append((out / "answers.jsonl").read_bytes().count(b"\n"))
        return oracle(paths, texts)

    reports: list[tuple[int, int]] = []
    evaluate(questions, images, answer, out, run_record(20), progress=lambda *x: reports.append(x))
    assert seen == [0, 18, 36]
    assert reports == [(0, 54), (18, 54), (36, 54), (54, 54)]


@pytest.mark.parametrize("stop_after", [0, 1, 7, 13])
@pytest.mark.parametrize("tail", [b"", b"{", b'{"split": "random", "question_id": 1, "te'])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    tmp_path: Path,
    questions: list[Question],
    images: dict[str, Path],
    stop_after: int,
    tail: bytes,
) -> None:
    whole = evaluate(questions, images, Oracle(), tmp_path / "whole", run_record())
    out, first = tmp_path / "out", Oracle(stop_after)
    with pytest.raises(KeyboardInterrupt):
        evaluate(questions, images, first, out, run_record())
    assert not (out / "scores.json").exists()
    with (out / "answers.jsonl").open("ab") as file:
        file.write(tail)
    words: list[str] = []
    done = finished_answers(out, words.append)
    assert len(done) == sum(first.batches) > 0 or stop_after == 0
    assert len(words) == (1 if tail else 0)
    second = Oracle()
    check_resumable(out, run_record(5))
    resumed = evaluate(questions, images, second, out, run_record(5), done)
    assert resumed == whole
    assert sorted(first.asked + second.asked) == sorted(
        (q.image, q.text + PROMPT) for q in questions
    )
    assert (out / "scores.json").read_text() == (tmp_path / "whole/scores.json").read_text()


def test_a_finished_run_asks_nothing_and_keeps_its_record(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    evaluate(questions, images, Oracle(), out, run_record())
    done = finished_answers(out, pytest.fail)
    again = evaluate(questions, images, Oracle(stop_after=0), out, run_record(99), done)
    assert len(again) == 54
    assert read_run(out) == run_record()


def test_a_line_cut_anywhere_loses_that_answer_only(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    evaluate(questions, images, Oracle(), out, run_record())
    data = (out / "answers.jsonl").read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for end in range(last + 1, len(data)):
        (out / "answers.jsonl").write_bytes(data[:end])
        assert len(finished_answers(out, lambda word: None)) == 53
        assert (out / "answers.jsonl").read_bytes() == data[:last]


def test_a_damaged_line_in_the_middle_is_an_error_and_not_repaired(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    evaluate(questions, images, Oracle(), out, run_record())
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:20] + b"\n"
    (out / "answers.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"answers\.jsonl:4"):
        finished_answers(out, lambda word: None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": {"path": "/models/b", "fingerprint": "e" * 64}}, ["model", "/models/b"]),
        ({"prompt": ""}, ["prompt", "single word"]),
        (
            {"questions": ({"file": "other.json", "sha256": "1" * 64, "questions": 54},)},
            ["questions", "q_random.json", "other.json"],
        ),
        ({"images": "/elsewhere"}, ["images", "/elsewhere"]),
        ({"limit": 5}, ["limit", "5"]),
        (
            {"decoding": {"max_new_tokens": 8, "greedy": True, "dtype": "float32"}},
            ["decoding", "8"],
        ),
    ],
)
def test_answers_of_another_run_are_never_mixed_in(
    tmp_path: Path,
    questions: list[Question],
    images: dict[str, Path],
    changed: dict[str, object],
    words: list[str],
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(questions, images, Oracle(1), out, run_record())
    with pytest.raises(UsageError) as caught:
        check_resumable(out, replace(run_record(), **changed))
    assert all(word in str(caught.value) for word in [str(out), *words])
    assert "\n" not in str(caught.value)


def test_a_moved_model_another_batch_size_and_device_may_resume(tmp_path: Path) -> None:
    record = run_record()
    moved = {**record.model, "path": "/moved", "hd": {"tile_px": 224}}
    (tmp_path / "run.json").write_text(json.dumps(record.to_dict()))
    check_resumable(tmp_path, replace(record, model=moved, batch_size=1, device="cuda"))


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_resumable(tmp_path / "file", run_record())
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"answers\.jsonl but no run\.json"):
        check_resumable(tmp_path, run_record())
    (tmp_path / "run.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"run\.json: not the record"):
        check_resumable(tmp_path, run_record())


def test_a_wrong_number_of_answers_is_not_written(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="1 answers for 4 questions"):
        evaluate(questions, images, lambda i, q: ["Yes"], tmp_path, run_record())
    assert (tmp_path / "answers.jsonl").read_bytes() == b""


def test_a_damaged_image_names_its_question_and_the_run_goes_on_once_it_is_mended(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    out, mended = tmp_path / "out", []

    def answer(paths: list[Path], texts: list[str]) -> list[str]:
        if images[image_name(1)] in paths and not mended:
            raise DataError(f"{images[image_name(1)]}: damaged image; fetch it again")
        return [true_label(text).title() for text in texts]

    with pytest.raises(DataError) as caught:
        evaluate(questions, images, answer, out, run_record(6))
    message = str(caught.value)
    assert message.startswith(f"{questions[6].where}: question_id 7 of split random: ")
    assert "photo_1.png: damaged image; fetch it again; the answers so far are kept" in message
    done = finished_answers(out, pytest.fail)
    assert len(done) == 18
    mended.append(True)
    assert len(evaluate(questions, images, answer, out, run_record(6), done)) == 54


def test_the_order_of_the_question_files_does_not_matter_for_resuming(tmp_path: Path) -> None:
    files = tuple({"file": f"{n}.json", "sha256": str(n) * 64, "questions": 1} for n in range(3))
    record = replace(run_record(), questions=files, labels=files)
    (tmp_path / "run.json").write_text(json.dumps(record.to_dict()))
    assert read_run(tmp_path) == record
    check_resumable(tmp_path, replace(record, questions=files[::-1], labels=files[::-1]))
    with pytest.raises(UsageError, match="its labels is"):
        check_resumable(tmp_path, replace(record, labels=files[:2]))


def test_answers_to_questions_that_are_not_asked_now_are_refused(
    tmp_path: Path, questions: list[Question], images: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    evaluate(questions[:6], images, Oracle(), out, run_record())
    done = finished_answers(out, pytest.fail)
    with pytest.raises(UsageError, match="answers question_id 1 of split random, which is not"):
        evaluate(questions[1:], images, Oracle(0), out, run_record(), done)


def test_an_out_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=rf"{tmp_path}/file is a file"):
        check_resumable(tmp_path / "file" / "deep" / "x", run_record())


def test_a_limit_takes_the_first_questions_of_each_split(questions: list[Question]) -> None:
    chosen = first_questions(questions, 7)
    assert [q.question_id for q in chosen] == list(range(1, 8)) * 3
    assert first_questions(questions, None) == questions


def test_files_are_described_by_path_digest_and_size(tmp_path: Path) -> None:
    import hashlib

    paths = write_pope(tmp_path / "pope")
    files = split_files(paths)
    described = describe_files(files, read_questions(files))
    assert [entry["file"] for entry in described] == [str(path) for path in paths]
    assert [entry["questions"] for entry in described] == [18, 18, 18]
    assert described[0]["sha256"] == hashlib.sha256(paths[0].read_bytes()).hexdigest()


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def save(name: str, config: bytes = b"{}", weights: bytes = b"w" * 3_000_000) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(weights)
        return fingerprint(folder)

    first = save("a")
    assert save("b") == first
    assert save("c", config=b"{ }") != first
    for place in (0, 1_500_000, 2_999_999):
        weights = bytearray(b"w" * 3_000_000)
        weights[place] = 0
        assert save(f"changed {place}", weights=bytes(weights)) != first


def test_a_folder_that_holds_no_model_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        fingerprint(tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        fingerprint(tmp_path / "nothing")
