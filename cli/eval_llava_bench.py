"""`llava-hd eval llava-bench`: a model's answers to LLaVA-Bench, for `llava-hd judge`."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from ..bench.judge import bench_items, read_bench
from ..bench.pope_data import ANSWERS
from ..hd.errors import UsageError
from .free_questions import Asker, add_model, ask, check_model_options
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd eval llava-bench`."""
    parser = Parser(
        command,
        "Let a model answer LLaVA-Bench's questions (questions.jsonl: question_id, image, text,\n"
        "category). They are asked as they are, without a response prompt, and answered greedily.\n"
        "`llava-hd judge` rates the answers. An interrupted run goes on when the same command is\n"
        "started again.",
        [
            "llava-hd eval llava-bench --model M --questions bench/questions.jsonl \\",
            "    --images bench/images --out runs/hd-bench",
        ],
    )
    add = parser.add_argument
    add("--questions", type=str | None, metavar="FILE", help="questions.jsonl")
    add_model(parser, max_new_tokens=1024)
    add("--json", action="store_true", help="print where the answers are as JSON")
    return parser


def run(args: Namespace) -> int:
    """Ask what has no answer yet."""
    if not args.questions:
        raise UsageError("--questions is missing; give LLaVA-Bench's questions.jsonl")
    check_model_options(args)
    path = Path(args.questions)
    items = bench_items(read_bench(path))[: args.limit]
    texts = ask(args, items, Asker(args), {"benchmark": "llava-bench"}, [path])
    answers = Path(args.out) / ANSWERS
    if args.json:
        print(json.dumps({"answers": str(answers), "questions": len(texts)}))
    else:
        print(f"{len(texts)} answers in {answers}; next: llava-hd judge --answers {answers}")
    return 0
