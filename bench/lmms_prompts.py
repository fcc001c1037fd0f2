"""The evaluation prompts of LLaVA-1.5's paper (v2, table 8) and what lmms-eval's tasks say instead.

lmms-eval hands the adapter a finished text, question and response prompt together. `paper_text`
takes the task's own words off again, strictly, and puts the paper's in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hd.errors import UsageError

SINGLE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
# LLaVA's own Chinese prompt, in llava/eval/model_vqa_mmbench.py.
LETTER_CN = "\n请直接回答选项字母。"
UNANSWERABLE = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SINGLE
)
REASONING = (
    "First please perform reasoning, and think step by step to provide best answer to the "
    "following question: \n\n"
)
HARNESS_LETTER_CN = "\n\n请直接使用所提供的选项字母作为答案回答。"

PACK = "llava_hd_"  # tasks of `llava-hd eval pack` begin so; their texts are the paper's already


@dataclass(frozen=True)
class Wording:
    """What lmms-eval puts before and behind a question, and what the paper puts behind it."""

    before: str
    behind: str
    paper: str


PROMPTS: dict[str, Wording] = {
    **{task: Wording("", SINGLE, SINGLE) for task in ("pope", "pope_random", "pope_pop")},
    **{task: Wording("", SINGLE, SINGLE) for task in ("pope_adv", "gqa", "mme")},
    **{task: Wording("", SINGLE, SINGLE) for task in ("vqav2_val", "vqav2_test")},
    **{task: Wording("", SINGLE, SINGLE) for task in ("textvqa_val", "textvqa_test")},
    **{
        task: Wording("", UNANSWERABLE, UNANSWERABLE)
        for task in ("vizwiz_vqa_val", "vizwiz_vqa_test")
    },
    **{task: Wording("", LETTER, LETTER) for task in ("scienceqa", "scienceqa_img", "seedbench")},
    # lmms-eval leaves an empty line between the options and the prompt.
    **{
        task: Wording("", f"\n{LETTER}", LETTER)
        for task in ("mmbench_en_dev", "mmbench_en_dev_static", "mmbench_en_test")
    },
    **{
        task: Wording("", HARNESS_LETTER_CN, LETTER_CN)
        for task in ("mmbench_cn_dev", "mmbench_cn_test")
    },
    "llava_in_the_wild": Wording("", "", ""),
    "mmvet": Wording(REASONING, "", ""),
}


def paper_text(task: str, text: str) -> str:
    """The text of a row of `task` with the paper's prompt instead of the task's.

    Raises UsageError for a task that the paper has no prompt for, and for a text that is not as
    this table says (another version of lmms-eval, or --lmms_eval_specific_kwargs of one's own).
    """
    if task.startswith(PACK):
        return text
    if task not in PROMPTS:
        raise UsageError(
            f"prompts=paper: the paper has no prompt for task {task!r}; known are "
            f"{', '.join(PROMPTS)}; leave prompts=task for the others"
        )
    words = PROMPTS[task]
    if not (text.startswith(words.before) and text.endswith(words.behind)):
        raise UsageError(
            f"prompts=paper: task {task!r} does not word its questions as it did "
            f"(expected {words.before[:40]!r} before and {words.behind[-40:]!r} behind, got "
            f"{text[-60:]!r}); use prompts=task"
        )
    return text[len(words.before) : len(text) - len(words.behind)] + words.paper
