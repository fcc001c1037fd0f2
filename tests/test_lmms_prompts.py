"""The paper's prompts, and that lmms-eval's own tasks word their questions as the table says."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_hd.bench.lmms_prompts import LETTER, PROMPTS, SINGLE, UNANSWERABLE, paper_text
from llava_hd.bench.pope import PROMPT
from llava_hd.hd.errors import UsageError

# Task -> its folder in lmms-eval, its YAML and the function that words a question.
OWN: dict[str, tuple[str, str, str]] = {
    **{f"pope{x}": ("pope", f"pope{x}.yaml", "utils.pope_doc_to_text") for x in ("", "_adv")},
    "pope_random": ("pope", "pope_random.yaml", "utils.pope_doc_to_text"),
    "pope_pop": ("pope", "pope_pop.yaml", "utils.pope_doc_to_text"),
    "gqa": ("gqa", "gqa.yaml", "utils.gqa_doc_to_text"),
    "mme": ("mme", "mme.yaml", "utils.mme_doc_to_text"),
    "vqav2_val": ("vqav2", "vqav2_val.yaml", "utils.vqav2_doc_to_text"),
    "textvqa_val": ("textvqa", "_default_template_textvqa_yaml", "utils.textvqa_doc_to_text"),
    "vizwiz_vqa_val": (
        "vizwiz_vqa",
        "_default_template_vqa_yaml",
        "utils.vizwiz_vqa_doc_to_text",
    ),
    "scienceqa": ("scienceqa", "scienceqa.yaml", "utils.sqa_doc_to_text"),
    "scienceqa_img": ("scienceqa", "scienceqa_img.yaml", "utils.sqa_doc_to_text"),
    "seedbench": ("seedbench", "seedbench.yaml", "utils.seed_doc_to_text"),
    "mmbench_en_dev": (
        "mmbench",
        "_default_template_mmbench_en_yaml",
        "en_utils.mmbench_doc_to_text",
    ),
    "mmbench_cn_dev": (
        "mmbench",
        "_default_template_mmbench_cn_yaml",
        "cn_utils.mmbench_doc_to_text",
    ),
    "llava_in_the_wild": (
        "llava-in-the-wild",
        "llava-in-the-wild.yaml",
        "utils.llava_doc_to_text",
    ),
    "mmvet": ("mmvet", "mmvet.yaml", "utils.doc_to_text"),
}
DOC: dict[str, Any] = {
    "question": "What is it?",
    "choices": ["a", "b"],
    "hint": "",
    "ocr_tokens": [],
    **{f"choice_{x}": x for x in "abcd"},
    **{x: x for x in "ABCD"},
    **dict.fromkeys(("answer", "category", "L2-category", "index", "source", "split"), "x"),
}


def harness_text(task: str) -> str:
    folder, file, function = OWN[task]
    spec = find_spec("lmms_eval")
    assert spec and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "tasks" / folder / file
    module, _, name = function.partition(".")
    words: Callable[..., str] = getattr(
        importlib.import_module(f"lmms_eval.tasks.{folder}.{module}"), name
    )
    plain = "\n".join(line for line in path.read_text().split("\n") if "!function" not in line)
    specific = yaml.safe_load(plain).get("lmms_eval_specific_kwargs")
    return words(DOC) if specific is None else words(DOC, specific["default"])


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
@pytest.mark.parametrize("task", OWN)
def test_lmms_evals_tasks_word_their_questions_as_the_table_says(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # MM-Vet's module makes a client on import
    text = harness_text(task)
    paper = paper_text(task, text)
    assert paper.endswith(PROMPTS[task].paper)
    assert "What is it?" in paper and "\n\n" not in paper
    bare = text.removeprefix(PROMPTS[task].before).removesuffix(PROMPTS[task].behind)
    assert paper == bare + PROMPTS[task].paper


def test_the_prompts_are_the_papers() -> None:
    assert SINGLE == PROMPT
    assert PROMPTS["vizwiz_vqa_val"].paper == UNANSWERABLE and UNANSWERABLE.endswith(SINGLE)
    assert PROMPTS["mmbench_en_dev"].paper == PROMPTS["seedbench"].paper == LETTER
    assert PROMPTS["mmvet"].paper == PROMPTS["llava_in_the_wild"].paper == ""


def test_a_text_that_is_not_as_expected_is_refused() -> None:
    with pytest.raises(UsageError, match="'pope' does not word its questions"):
        paper_text("pope", "Is there a dog?")
    with pytest.raises(UsageError, match="no prompt for task 'docvqa_val'"):
        paper_text("docvqa_val", "What?")
    assert paper_text("llava_hd_pope_random", "as it is") == "as it is"
