"""`llava-hd eval scienceqa`: ask ScienceQA's problems, straight or with a thought, and score."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.files import write_json
from ..bench.free_run import AnswerMixed, read_texts
from ..bench.pope_data import ANSWERS
from ..bench.pope_run import SCORES
from ..bench.science_qa import (
    ANSWER_OPENING,
    FORMS,
    SPLIT,
    Form,
    items_of,
    read_problems,
    score_problems,
    thought_of,
    with_answer,
)
from ..hd.errors import UsageError
from .free_questions import Asker, add_model, ask, check_model_options
from .parser import Parser

if TYPE_CHECKING:
    from ..model.llava_hd import LlavaHD
    from ..model.processor import Processor

LETTER_TOKENS = 64  # behind a thought


def build_parser(command: str) -> Parser:
    """The options of `llava-hd eval scienceqa`."""
    parser = Parser(
        command,
        "Ask a model ScienceQA's problems and score its answers, or score existing ones.\n"
        "--data holds ScienceQA's problems.json and pid_splits.json, --images the split's folders\n"
        "ID/image.png; problems without an image are asked as text. --form letter asks for the\n"
        "option's letter (LLaVA-1.5), --form thought lets the model reason first (LLaVA).\n"
        "An interrupted run goes on when the same command is started again.",
        [
            "llava-hd eval scienceqa --model M --data sqa --images sqa/test --out runs/a",
            "llava-hd eval scienceqa --form thought --max-new-tokens 512 --model M \\",
            "    --data scienceqa --images scienceqa/test --out runs/b",
            "llava-hd eval scienceqa --data scienceqa --score-only --answers llava.jsonl --json",
        ],
    )
    add = parser.add_argument
    add("--data", type=str | None, metavar="DIR", help="folder of problems.json, pid_splits.json")
    add("--split", type=str, default=SPLIT, help="split of pid_splits.json")
    add("--form", type=Form, default="letter", help=f"{' or '.join(FORMS)}: how it is asked")
    add_model(parser, max_new_tokens=128)
    add("--score-only", action="store_true", help="score the answers of --answers, ask no model")
    add("--answers", type=str | None, metavar="FILE", help="answers to score, or their folder")
    add("--json", action="store_true", help="print the scores as JSON")
    return parser


def run(args: Namespace) -> int:
    """Ask what has no answer yet, and score; or score alone."""
    if not args.data:
        raise UsageError("--data is missing; give the folder of ScienceQA's problems.json")
    folder = Path(args.data)
    problems = read_problems(folder, args.split)
    if args.score_only:
        texts = read_texts(_answers(args), [problem.key for problem in problems])
    elif args.answers:
        raise UsageError("--answers is for --score-only; add it, or leave --answers out")
    else:
        check_model_options(args)
        problems = problems[: args.limit]
        files = [folder / "problems.json", folder / "pid_splits.json"]
        about = {"benchmark": "scienceqa", "split": args.split, "form": args.form}
        asker = _Thinker(args) if args.form == "thought" else Asker(args)
        items = items_of(problems, args.form, files[0])
        texts = ask(args, items, asker, about, files)
    scores = {"split": args.split, **score_problems(problems, texts)}
    if not args.score_only:
        scores["form"] = args.form
        write_json(Path(args.out) / SCORES, scores)
    if args.json:
        print(json.dumps(scores, indent=2))
    else:
        _print(args, scores)
    return 0


def _answers(args: Namespace) -> Path:
    """The file to score; UsageError for options that ask a model."""
    for option in ("model", "images", "out", "limit"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option} has no meaning with --score-only; leave one of them out")
    if not args.answers:
        raise UsageError("--score-only needs --answers FILE, the answers to score")
    path = Path(args.answers)
    return path / ANSWERS if path.is_dir() else path


class _Thinker(Asker):
    """Reasons first, then carries the same answer on with the letter."""

    def answers(self, model: LlavaHD, processor: Processor) -> AnswerMixed:
        from ..model.continuation import continue_batch

        think = super().answers(model, processor)

        def answer(images: Sequence[Path | None], prompts: Sequence[str]) -> list[str]:
            thoughts = [thought_of(text) for text in think(images, prompts)]
            begun = [thought + ANSWER_OPENING for thought in thoughts]
            letters = continue_batch(model, processor, images, prompts, begun, LETTER_TOKENS)
            return [with_answer(x, letter) for x, letter in zip(thoughts, letters, strict=True)]

        return answer


def _print(args: Namespace, scores: dict[str, Any]) -> None:
    console = Console(highlight=False)
    title = f"ScienceQA, {scores['split']}: accuracy in per cent"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", *scores["groups"]):
        table.add_column(name, justify="right")
    groups = scores["groups"].values()
    table.add_row("accuracy", *(f"{100 * group['accuracy']:.2f}" for group in groups))
    table.add_row("problems", *(f"{group['questions']:,}" for group in groups))
    console.print(table)
    console.print(f"{scores['unreadable']:,} answers name no choice; they count as wrong")
    if not args.score_only:
        console.print(f"{ANSWERS} and {SCORES} are in {args.out}", markup=False, soft_wrap=True)
