"""`llava-hd judge`: a language model rates LLaVA-Bench answers; the relative score."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.files import sha256
from ..bench.free_run import read_texts
from ..bench.judge import (
    JudgeSettings,
    JudgeWork,
    read_bench,
    read_contexts,
    read_rules,
    relative_scores,
    rules_digest,
)
from ..bench.pope_data import ANSWERS
from ..hd.errors import LlavaHDError, UsageError
from ..hd.files import check_out, write_whole
from ..train.asking import ask_all
from ..train.generate_cost import Prices
from ..train.generate_journal import JOURNAL, REJECTED, Journal, check_run, write_lines
from ..train.generate_settings import check_endpoint
from .endpoint import add_endpoint, asking_bar, check_endpoint_options, endpoint_client
from .parser import Parser

REVIEWS, SCORES = "reviews.jsonl", "scores.json"
INPUTS = ("questions", "context", "reference", "answers")


def build_parser(command: str) -> Parser:
    """The options of `llava-hd judge`."""
    parser = Parser(
        command,
        "Let a language model rate a model's answers to LLaVA-Bench beside the reference's, as\n"
        "the original LLaVA did, and print the relative score. What the judge writes is kept line\n"
        "by line: an interrupted run goes on when the same command is started again. Judgements\n"
        "without two scores are asked for again; what stays unreadable is left out and counted.\n"
        "The endpoint's key is read from an environment variable and written nowhere.",
        [
            "llava-hd judge --questions questions.jsonl --context context.jsonl \\",
            "    --reference answers_gpt4.jsonl --answers runs/hd-bench --rule rule.json \\",
            "    --model NAME --out runs/hd-judged",
            "llava-hd judge ... --endpoint http://localhost:8000/v1 --no-key --both-orders --json",
        ],
    )
    add = parser.add_argument
    add("--questions", type=str | None, metavar="FILE", help="LLaVA-Bench's questions.jsonl")
    add("--context", type=str | None, metavar="FILE", help="its context.jsonl: image, caption")
    add("--reference", type=str | None, metavar="FILE", help="the reference's answers")
    add("--answers", type=str | None, metavar="FILE", help="the model's answers, or their folder")
    add(
        "--rule", type=str | None, metavar="FILE", help="LLaVA's rule.json instead of our own words"
    )
    add("--both-orders", action="store_true", help="judge each pair again with answers swapped")
    add("--out", type=str, default="judged", metavar="DIR", help=f"folder of {REVIEWS}, {SCORES}")
    add_endpoint(parser)
    add("--seed", type=int, default=0, help="seed of the judge and of the intervals")
    add("--temperature", type=float | None, default=0.2, help="null leaves it to the server")
    add("--max-tokens", type=int, default=1024, help="longest judgement")
    add("--tries", type=int, default=3, help="how often to ask until there are two scores")
    add("--json", action="store_true", help="print the scores as JSON")
    return parser


def run(args: Namespace) -> int:
    """Ask for the judgements that are not there yet, then write and print the scores."""
    _check_options(args)
    out, endpoint = Path(args.out), check_endpoint(args.endpoint)
    check_out(out)
    files = {name: Path(getattr(args, name)) for name in INPUTS}
    if files["answers"].is_dir():
        files["answers"] /= ANSWERS
    work = _work(args, files)
    client = endpoint_client(args, work.settings.model, endpoint)
    out.mkdir(parents=True, exist_ok=True)
    identity = {
        **vars(work.settings),
        "rules": rules_digest(work.rules),
        "files": {name: sha256(path) for name, path in files.items()},
        "limit_field": args.limit_field,
        "endpoint": endpoint,
    }
    check_run(out, identity)
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    with Journal(out) as journal:
        if journal.dropped:
            errors.print(f"{out / JOURNAL}: dropped a half-written last line; it is asked again")
        with asking_bar(errors) as progress:
            reason = ask_all(
                work,
                journal,
                client,
                prices=Prices(),
                concurrency=args.concurrency,
                progress=progress,
                notify=errors.print,
            )
        keys = [task.key for task in work.tasks]
        rejected = journal.rejected(keys)
        write_lines(out / REJECTED, rejected)
        if reason is not None:
            raise reason
        reviews = [journal.records[key] for key in keys if key in journal.records]
    scores = _scores(args, work, reviews, rejected, out)
    write_lines(out / REVIEWS, reviews)
    write_whole(out / SCORES, json.dumps(scores, indent=2) + "\n")
    if args.json:
        print(json.dumps(scores, indent=2))
    else:
        _print(scores, out)
    return 0


def _check_options(args: Namespace) -> None:
    for name in (*INPUTS, "model"):
        if not getattr(args, name):
            raise UsageError(f"--{name} is missing; see llava-hd judge --help")
    check_endpoint_options(args)
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: give a number from 0")
    if args.temperature is not None and not 0 <= args.temperature <= 2:
        raise UsageError(f"--temperature {args.temperature:g}: give a number from 0 to 2")


def _work(args: Namespace, files: dict[str, Path]) -> JudgeWork:
    questions = read_bench(files["questions"])
    keys = [question.key for question in questions]
    settings = JudgeSettings(
        model=args.model,
        seed=args.seed,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        tries=args.tries,
        send_seed=not args.no_seed,
        both_orders=args.both_orders,
    )
    return JudgeWork(
        settings,
        questions,
        read_contexts(files["context"], questions),
        read_rules(Path(args.rule) if args.rule else None),
        read_texts(files["reference"], keys),
        read_texts(files["answers"], keys),
    )


def _scores(
    args: Namespace,
    work: JudgeWork,
    reviews: list[dict[str, Any]],
    rejected: list[dict[str, Any]],
    out: Path,
) -> dict[str, Any]:
    if not reviews:
        why = rejected[0]["reason"] if rejected else "nothing was asked"
        raise LlavaHDError(
            f"{out}: no judgement can be read ({why}); look into {REJECTED}, or try another judge"
        )
    return {
        "judge": work.settings.model,
        "rule": args.rule or "our own",
        "rules_sha256": rules_digest(work.rules),
        "both_orders": work.settings.both_orders,
        "rejected": len(rejected),
        "categories": relative_scores(work.questions, reviews, seed=work.settings.seed),
    }


def _print(scores: dict[str, Any], out: Path) -> None:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    orders = "both orders" if scores["both_orders"] else "reference first"
    title = f"LLaVA-Bench, judged by {scores['judge']}, {orders}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("category", "relative score", "95 %", "reference", "model", "judgements"):
        table.add_column(name, justify="left" if name == "category" else "right")
    for category, entry in scores["categories"].items():
        interval = entry["interval"]
        table.add_row(
            category,
            f"{entry['relative_score']:.1f}",
            "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}",
            f"{entry['reference_mean']:.2f}",
            f"{entry['model_mean']:.2f}",
            str(entry["judgements"]),
        )
    console.print(table)
    if scores["rejected"]:
        console.print(
            f"{scores['rejected']} judgements could not be read and are left out: {out / REJECTED}"
        )
    console.print(f"instructions: {scores['rule']} (sha256 {scores['rules_sha256'][:12]})")
    console.print(f"{REVIEWS} and {SCORES} are in {out}")
