"""`llava-hd data generate`: instruction data out of COCO's annotations and a text-only model."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.files import sha256
from ..hd.errors import UsageError
from ..hd.files import check_out
from ..train.generate import Summary, finish, generate
from ..train.generate_context import Annotations, read_coco
from ..train.generate_cost import Estimate, Prices, counted, estimate
from ..train.generate_journal import DATA, JOURNAL, REJECTED, SUMMARY, Journal, check_run
from ..train.generate_plan import Work, plan
from ..train.generate_prompts import load_prompts, prompts_digest
from ..train.generate_request import OpenClient
from ..train.generate_settings import (
    KINDS,
    GenerateSettings,
    check_endpoint,
    parse_kinds,
)
from .endpoint import add_endpoint, asking_bar, check_endpoint_options, endpoint_client
from .parser import Parser

UNNAMED = "not named"  # the model of an estimate


def build_parser(command: str) -> Parser:
    """The options of `llava-hd data generate`."""
    parser = Parser(
        command,
        "Let a text-only language model write instruction data about images that it knows by\n"
        "their COCO captions and boxes, as the original LLaVA did: conversations, detailed\n"
        "descriptions, complex reasoning. The cost is estimated first and answers are checked. An\n"
        "interrupted run goes on when the same command is started again; nothing is asked twice.\n"
        "The endpoint's key is read from an environment variable and written nowhere.",
        [
            "llava-hd data generate --captions captions_train2017.json \\",
            "    --instances instances_train2017.json --estimate \\",
            "    --price-in 0.15 --price-out 0.6 \\",
            "    --kinds conversation=58000,detail=23000,reasoning=77000",
            "llava-hd data generate --captions c.json --instances i.json --kinds detail=50% \\",
            "    --endpoint http://localhost:8000/v1 --no-key --model NAME --out generated",
        ],
    )
    add = parser.add_argument
    add("--captions", type=str, nargs="+", metavar="FILE", help="COCO captions_*.json")
    add("--instances", type=str, nargs="+", metavar="FILE", help="COCO instances_*.json")
    add("--skip-empty", action="store_true", help="leave out images without captions and boxes")
    add("--kinds", type=str | None, help=f"count or share of images for {', '.join(KINDS)}")
    add("--out", type=str, default="generated", metavar="DIR", help=f"folder of {DATA}")
    add("--image-prefix", type=str, default="", metavar="DIR", help="images' folder in the records")
    add("--examples", type=str | None, metavar="DIR", help="own prompts instead of the shipped")
    add("--estimate", action="store_true", help="count requests, tokens and cost; ask nothing")
    add("--finish", action="store_true", help="ask nothing more; write what is answered")
    add_endpoint(parser)
    add("--seed", type=int, default=0, help="seed of the choice of images, and of the answers")
    add("--temperature", type=float | None, default=0.7, help="null leaves it to the server")
    add("--max-tokens", type=int, default=1024, help="longest answer")
    add("--tries", type=int, default=3, help="how often to ask until the answer is valid")
    add("--price-in", type=float | None, help="money for a million tokens of prompts")
    add("--price-out", type=float | None, help="money for a million tokens of answers")
    add("--max-cost", type=float | None, help="stop before the folder's runs cost more than that")
    add("--tokenizer", type=str | None, metavar="DIR", help="counts the estimate's tokens")
    add("--json", action="store_true", help="print the estimate, or the summary, as JSON")
    return parser


def run(args: Namespace) -> int:
    """Estimate; then ask what is not answered yet, and write the data."""
    _check_options(args)
    settings = GenerateSettings(
        model=UNNAMED if args.model is None else args.model,
        seed=args.seed,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        tries=args.tries,
        send_seed=not args.no_seed,
        limit_field=args.limit_field,
        image_prefix=args.image_prefix.strip("/"),
    )
    prices = Prices(args.price_in, args.price_out, args.max_cost)
    endpoint, amounts = check_endpoint(args.endpoint), parse_kinds(args.kinds)
    prompts = load_prompts(Path(args.examples) if args.examples else None)
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    with errors.status("reading"):
        found = _read(args)
        work = Work(settings, prompts, found.contexts, plan(found.contexts, amounts, settings.seed))
    for reason, count in sorted(found.skipped.items()):
        errors.print(f"left out {count:,} x {reason}")
    if args.estimate:
        _show_estimate(args, _estimate(args, work, None, prices, errors), errors)
        return 0
    out = Path(args.out)
    check_out(out)
    # A folder without answers is not written before the key is known to be there.
    client = None if args.finish else endpoint_client(args, settings.model, endpoint)
    out.mkdir(parents=True, exist_ok=True)
    check_run(out, _identity(args, work, endpoint))
    with Journal(out) as journal:
        if journal.dropped:
            errors.print(f"{out / JOURNAL}: dropped a half-written last line; it is asked again")
        if args.finish:
            summary = finish(work, out, journal, prices)
        else:
            _show_estimate(args, _estimate(args, work, journal, prices, errors), errors)
            summary = _ask(args, work, out, journal, client, prices, errors)
    _show_summary(args, summary, out)
    return 0


def _check_options(args: Namespace) -> None:
    if not args.kinds:
        raise UsageError(
            "--kinds is missing; give for example --kinds conversation=1000,detail=50%"
        )
    if args.estimate and args.finish:
        raise UsageError("--estimate and --finish do not go together; leave one out")
    if args.model is None and not args.estimate:
        raise UsageError("--model is missing; name the one that the endpoint serves")
    check_endpoint_options(args)


def _read(args: Namespace) -> Annotations:
    captions, instances = (
        [Path(f) for f in files or []] for files in (args.captions, args.instances)
    )
    return read_coco(captions, instances, args.skip_empty)


def _identity(args: Namespace, work: Work, endpoint: str) -> dict[str, Any]:
    """What has to stay as it is when a run goes on. The amounts may grow: they are nested."""
    files = {
        name: sorted(sha256(Path(path)) for path in getattr(args, name) or [])
        for name in ("captions", "instances")
    }
    return {
        **vars(work.settings),
        "prompts": prompts_digest(dict(work.prompts)),
        **files,
        "endpoint": endpoint,
    }


def _estimate(
    args: Namespace, work: Work, journal: Journal | None, prices: Prices, errors: Console
) -> Estimate:
    """Of what is not answered yet."""
    tasks = [task for task in work.tasks if journal is None or not journal.is_done(task.key)]
    with errors.status("counting tokens"):
        count, words = counted(Path(args.tokenizer) if args.tokenizer else None)
        return estimate(work, tasks, count, words, prices)


def _show_estimate(args: Namespace, found: Estimate, errors: Console) -> None:
    values = found.to_dict()
    if args.estimate and args.json:
        print(json.dumps(values, indent=2))
        return
    if not found.kinds:
        return
    console = Console(markup=False, highlight=False) if args.estimate else errors
    title = f"estimate; tokens by {found.counted_by}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind")
    columns = ("requests", "prompt tokens", "answer tokens", "at most")
    for name in columns:
        table.add_column(name, justify="right")
    for name, one in [*found.kinds.items(), ("all", found.all)]:
        numbers = (one.requests, one.prompt_tokens, one.answer_tokens, one.most_answer_tokens)
        table.add_row(name, *(f"{number:,}" for number in numbers))
    console.print(table)
    if values["cost"] is None:
        console.print("cost: unknown; give --price-in and --price-out for a million tokens")
    else:
        console.print(
            f"cost: about {values['cost']:,.4g}, and {values['most_cost']:,.4g} if every answer "
            f"were as long as allowed and asked for {found.tries} times"
        )
        most = found.prices.most
        if most is not None and values["cost"] > most:
            console.print(f"that is above --max-cost {most:g}: the run will stop before its end")


def _ask(
    args: Namespace,
    work: Work,
    out: Path,
    journal: Journal,
    client: OpenClient | None,
    prices: Prices,
    errors: Console,
) -> Summary:
    if client is None:
        raise ValueError("asking needs a client")
    with asking_bar(errors) as done:
        return generate(
            work,
            out,
            journal,
            client,
            prices=prices,
            concurrency=args.concurrency,
            progress=done,
            notify=errors.print,
        )


def _show_summary(args: Namespace, summary: Summary, out: Path) -> None:
    if args.json:
        print(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False))
        return
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for reason, count in summary.invalid.items():
        console.print(f"invalid {count:,} x {reason}")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary.kinds.items())
    console.print(f"{summary.records:,} records ({kinds}) in {out / DATA}")
    if summary.rejected:
        console.print(f"{summary.rejected:,} images without a valid answer: {out / REJECTED}")
    cost = "" if summary.cost is None else f", cost {summary.cost:,.4g}"
    by_rule = summary.requests_counted_by_rule
    rule = f" ({by_rule:,} requests counted by rule)" if by_rule else ""
    console.print(
        f"{summary.requests:,} requests, {summary.prompt_tokens:,} tokens of prompts, "
        f"{summary.answer_tokens:,} of answers{rule}{cost}; {out / SUMMARY}"
    )
    if sys.stdout.isatty():
        console.print(f"next: llava-hd data check {out / DATA} --images DIR", style="dim")
