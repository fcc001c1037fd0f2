"""Packs through lmms-eval's own evaluator, on a CPU and offline; answers and scores are ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import WRITERS
from tiny import tiny_hd

from llava_hd.bench.lmms_prompts import LETTER, SINGLE
from llava_hd.bench.task_packs import write_pack
from llava_hd.hd.image import load_image
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer_batch
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor
from llava_hd.model.scores import score_answers

NEEDED = ("lmms_eval", "datasets", "evaluate", "sacrebleu", "tenacity", "loguru", "pytz")
missing = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"lmms-eval's evaluator needs {', '.join(missing)} (Makefile)"
)
KINDS = ("pope", "choices", "mme", "gqa", "vqav2", "vizwiz", "textvqa", "scienceqa", "seedbench")
KINDS += ("mmbench", "mmbench_cn")


@pytest.fixture(scope="module")
def folder(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of all packs; the packs' folder is in `packs`."""
    root = tmp_path_factory.mktemp("packs")
    tasks: list[str] = []
    for kind in KINDS:
        annotations, images = WRITERS[kind](root / "source" / kind)
        tasks += write_pack(kind, annotations, images, root / "packs" / kind).tasks
    asked = {
        "model": str(folder),
        "packs": str(root / "packs"),
        "tasks": tasks,
        "batch_size": 5,
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "hf")}
    worker = Path(__file__).with_name("lmms_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(asked)],
        env={**alone(), **offline},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "packs": root / "packs", "asked": tasks}


def alone() -> dict[str, str]:
    """The environment without a rank, which training in this process may have left in it."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ranks}


def rows(found: dict[str, Any], kind: str, task: str) -> list[dict[str, Any]]:
    lines = (found["packs"] / kind / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def first_image(found: dict[str, Any], kind: str, row: dict[str, Any]) -> Any:
    folder = found["packs"] / kind / "images"
    return load_image(folder / row["images"][0]) if row["images"] else None


def test_every_task_of_every_pack_has_its_scores(found: dict[str, Any]) -> None:
    assert set(found["results"]) == set(found["asked"])
    wanted = {
        "pope_random": "pope_f1_score",
        "mme": "mme_perception_score",
        "mmbench_cn_dev": "gpt_eval_score",
        "seedbench": "seed_image",
        "seedbench_ppl": "acc",
        "scienceqa_img": "exact_match",
        "vizwiz_vqa_val": "exact_match",
        "textvqa_val": "exact_match",
    }
    for task, metric in wanted.items():
        assert 0 <= found["results"][f"llava_hd_{task}"][metric] <= 400


def test_pope_is_answered_as_by_the_model_alone(found: dict[str, Any], folder: Path) -> None:
    asked = rows(found, "pope", "pope_random")
    model, processor = LlavaHD.from_pretrained(folder), Processor.from_pretrained(folder)
    images = [first_image(found, "pope", row) for row in asked]
    expected = answer_batch(model, processor, images, [row["question"] + SINGLE for row in asked])
    samples = sorted(found["samples"]["llava_hd_pope_random"])
    assert [texts[0] for _, texts in samples] == expected
    scores = found["results"]["llava_hd_pope_random"]
    right = [text.lower() == row["answer"] for text, row in zip(expected, asked, strict=True)]
    assert scores["pope_accuracy"] == pytest.approx(sum(right) / len(right))


def test_a_choice_is_the_one_with_the_smallest_loss(found: dict[str, Any], folder: Path) -> None:
    asked = rows(found, "choices", "choices_ppl")
    model, processor = LlavaHD.from_pretrained(folder), Processor.from_pretrained(folder)
    right = []
    for row in asked:
        image = first_image(found, "choices", row)
        shown = [[] if image is None else [image]] * 3
        scores = score_answers(model, processor, shown, [row["question"]] * 3, row["choices"])
        losses = [score.mean_loss for score in scores]
        right.append(losses.index(min(losses)) == row["answer"])
    assert found["results"]["llava_hd_choices_ppl"]["acc"] == pytest.approx(sum(right) / 3)


def test_letters_are_asked_for_with_the_options(found: dict[str, Any], folder: Path) -> None:
    asked = rows(found, "choices", "choices")
    questions = [
        "\n".join(
            [row["question"], *(f"{c}. {x}" for c, x in zip("ABC", row["choices"], strict=True))]
        )
        + LETTER
        for row in asked
    ]
    model, processor = LlavaHD.from_pretrained(folder), Processor.from_pretrained(folder)
    images = [first_image(found, "choices", row) for row in asked]
    expected = answer_batch(model, processor, images, questions)
    samples = sorted(found["samples"]["llava_hd_choices"])
    assert [texts[0] for _, texts in samples] == expected
