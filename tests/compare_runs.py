"""Runs of `llava-hd eval pope` to compare, and the command called on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pope_files import image_name, true_label, write_pope
from tiny import random_image, tiny_hd

from llava_hd.bench.pope import PROMPT
from llava_hd.bench.pope_data import read_questions, split_files
from llava_hd.bench.pope_run import RunRecord, describe_files, evaluate
from llava_hd.cli.main import main

FLIP = {"yes": "No", "no": "Yes"}


def make_run(
    folder: Path, name: str, wrong: set[int], preset: str | None = "hd448", prompt: str = PROMPT
) -> Path:
    """An evaluation of a model that errs on the question ids in `wrong`."""
    files = split_files([folder / "pope"])
    questions = read_questions(files)
    record = RunRecord(
        model={"path": f"/models/{name}", "fingerprint": name[0] * 64}
        | ({"hd": tiny_hd(preset).to_dict()} if preset else {}),
        prompt=prompt,
        questions=tuple(describe_files(files, questions)),
        images=str(folder / "images"),
        decoding={"max_new_tokens": 16, "greedy": True, "dtype": "float32"},
        limit=None,
        batch_size=6,
        device="cpu",
    )
    ids = {(q.image, q.text): q.question_id for q in questions}

    def answer(images: list[Path], texts: list[str]) -> list[str]:
        labels = [true_label(text) for text in texts]
        asked = [(i.name, t.removesuffix(prompt)) for i, t in zip(images, texts, strict=True)]
        return [
            FLIP[label] if ids[key] in wrong else label.title()
            for key, label in zip(asked, labels, strict=True)
        ]

    images = {name: folder / "images" / name for name in {q.image for q in questions}}
    evaluate(questions, images, answer, folder / name, record)
    return folder / name


def make_folder(tmp_path: Path, num_images: int) -> Path:
    """Questions, images and two runs, which err on the first four images only."""
    write_pope(tmp_path / "pope", num_images)
    (tmp_path / "images").mkdir()
    for number in range(num_images):
        random_image((60, 80), seed=number).save(tmp_path / "images" / image_name(number))
    make_run(tmp_path, "base", wrong={1, 2, 5, 7, 8, 10, 14, 15, 19, 20}, preset="base224")
    make_run(tmp_path, "hd", wrong={2, 3, 13})
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in ("compare", *words)])
    done = capsys.readouterr()
    return code, done.out, done.err
