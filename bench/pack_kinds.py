"""The benchmarks that `llava-hd eval pack` knows: how each is read, asked and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lmms_prompts import LETTER, LETTER_CN, SINGLE, UNANSWERABLE
from .pack_readers import (
    Document,
    read_choices,
    read_gqa,
    read_llava_w,
    read_mmbench,
    read_mme,
    read_mmvet,
    read_pope,
    read_scienceqa,
    read_seedbench,
    read_textvqa,
    read_vizwiz,
    read_vqav2,
)

Keep = Callable[[Document], bool]


@dataclass(frozen=True)
class Metric:
    """A name in the task's results, and how lmms-eval adds them up: "mean", or a function."""

    name: str
    aggregation: str = "mean"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task of lmms-eval. text, target, results, choices: functions of the pack's utils.py or of
    the harness' task (`utils.NAME`); target may be a field's name. keep: which documents."""

    metrics: tuple[Metric, ...]
    text: str = "question"
    target: str = "answer"
    results: str | None = None
    prompt: str = ""
    max_new_tokens: int = 16
    choices: str | None = None
    keep: Keep = lambda document: True
    words: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A benchmark. harness: lmms-eval's module whose functions its tasks name; tasks: name behind
    `llava_hd_` -> task; wants: what --annotations is, for the help."""

    read: Callable[[Sequence[Path]], list[Document]]
    wants: str
    tasks: dict[str, Task]
    harness: str = ""


def _plain(module: str) -> str:
    return f"lmms_eval.tasks.{module}"


EXACT = Metric("exact_match", options={"ignore_case": True, "ignore_punctuation": True})
SCORED = (Metric("exact_match"),)

POPE = Task(
    tuple(
        Metric(f"pope_{name}", f"utils.pope_aggregate_{name}")
        for name in ("accuracy", "precision", "recall", "f1_score")
    ),
    results="utils.pope_process_results",
    prompt=SINGLE,
)
MME = Task(
    tuple(
        Metric(f"mme_{name}_score", "utils.mme_aggregate_results")
        for name in ("perception", "cognition")
    ),
    text="utils.mme_doc_to_text",
    results="utils.mme_process_results",
    prompt=SINGLE,
)
SCIENCEQA = Task(
    SCORED,
    text="utils.sqa_doc_to_text",
    target="utils.sqa_doc_to_target",
    results="utils.sqa_process_results",
    prompt=LETTER,
    words={"format": "default"},
)


def _mmbench(prompt: str) -> Task:
    # lmms-eval writes an empty line between the options and a prompt that begins with a newline.
    return Task(
        (Metric("gpt_eval_score", "utils.mmbench_aggregate_dev_results_static"),),
        text="utils.mmbench_doc_to_text",
        results="utils.mmbench_process_results",
        prompt=prompt.removeprefix("\n"),
    )


def _about(split: str) -> Keep:
    return lambda document: document.part == split


def _with_image(document: Document) -> bool:
    return bool(document.pictures)


KINDS: dict[str, Kind] = {
    "pope": Kind(
        read_pope,
        "POPE's files of questions, or their folder",
        {
            f"pope_{split}": Task(**{**POPE.__dict__, "keep": _about(split)})
            for split in ("random", "popular", "adversarial")
        },
        _plain("pope.utils"),
    ),
    "mme": Kind(read_mme, "MME's folder of categories", {"mme": MME}, _plain("mme.utils")),
    "gqa": Kind(
        read_gqa,
        "testdev_balanced_questions.json",
        {"gqa": Task((EXACT,), prompt=SINGLE)},
    ),
    "vqav2": Kind(
        read_vqav2,
        "v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json",
        {"vqav2_val": Task(SCORED, results="utils.vqav2_process_results_val", prompt=SINGLE)},
        _plain("vqav2.utils"),
    ),
    "textvqa": Kind(
        read_textvqa,
        "TextVQA_0.5.1_val.json",
        {
            "textvqa_val": Task(
                SCORED, target="answers", results="utils.textvqa_process_results", prompt=SINGLE
            )
        },
        _plain("textvqa.utils"),
    ),
    "vizwiz": Kind(
        read_vizwiz,
        "VizWiz's val.json",
        {
            "vizwiz_vqa_val": Task(
                SCORED,
                target="answers",
                results="utils.vizwiz_vqa_process_results",
                prompt=UNANSWERABLE,
            )
        },
        _plain("vizwiz_vqa.utils"),
    ),
    "scienceqa": Kind(
        read_scienceqa,
        "problems.json",
        {
            "scienceqa": SCIENCEQA,
            "scienceqa_img": Task(**{**SCIENCEQA.__dict__, "keep": _with_image}),
        },
        _plain("scienceqa.utils"),
    ),
    "mmbench": Kind(
        read_mmbench,
        "mmbench_dev_20230712.tsv",
        {"mmbench_en_dev": _mmbench(LETTER)},
        _plain("mmbench.en_utils"),
    ),
    "mmbench_cn": Kind(
        read_mmbench,
        "mmbench_dev_cn_20231003.tsv",
        {"mmbench_cn_dev": _mmbench(LETTER_CN)},
        _plain("mmbench.en_utils"),
    ),
    "seedbench": Kind(
        read_seedbench,
        "SEED-Bench.json",
        {
            "seedbench": Task(
                (Metric("seed_image", "utils.seed_aggregation_result"),),
                text="utils.seed_doc_to_text",
                results="utils.seed_process_result",
            ),
            "seedbench_ppl": Task(
                (Metric("acc"),),
                text="utils.seed_doc_to_text_mc",
                target="utils.seed_doc_to_mc_target",
                choices="utils.seed_doc_to_choice",
            ),
        },
        _plain("seedbench.utils"),
    ),
    "llava_in_the_wild": Kind(
        read_llava_w,
        "the folder of questions.jsonl, context.jsonl and answers_gpt4.jsonl",
        {
            "llava_in_the_wild": Task(
                tuple(
                    Metric(f"gpt_eval_llava_{part}", f"utils.llava_{part}_aggregation")
                    for part in ("all", "conv", "detail", "complex")
                ),
                target="gpt_answer",
                results="utils.llava_process_results",
                max_new_tokens=1024,
            )
        },
        _plain("llava-in-the-wild.utils"),
    ),
    "mmvet": Kind(
        read_mmvet,
        "mm-vet.json",
        {
            "mmvet": Task(
                (Metric("gpt_eval_score", "utils.mmvet_aggregate_results"),),
                results="utils.mmvet_process_results",
                max_new_tokens=1024,
            )
        },
        _plain("mmvet.utils"),
    ),
    "choices": Kind(
        read_choices,
        "JSON lines of your own: question_id, question, choices, answer, image",
        {
            "choices": Task(
                SCORED,
                text="utils.question_with_options",
                target="utils.letter",
                results="utils.letter_score",
                prompt=LETTER,
            ),
            "choices_ppl": Task(
                (Metric("acc"),),
                text="utils.question",
                target="utils.right_choice",
                choices="utils.choices",
            ),
        },
    ),
}
