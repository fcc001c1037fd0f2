"""What the commands that ask a language model share: options, client, progress bar."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ..hd.errors import UsageError
from ..train.asking import Progress as Done
from ..train.generate_request import OpenClient
from ..train.generate_settings import LimitField
from .parser import Parser


def add_endpoint(parser: Parser) -> None:
    """Where the model is, and how hard it may be asked. The command adds --max-tokens, --tries."""
    add = parser.add_argument
    add("--endpoint", type=str, default="https://api.openai.com/v1", metavar="URL",
        help="server that speaks OpenAI's chat completions")  # fmt: skip
    add("--model", type=str | None, metavar="NAME", help="the model's name there")
    add("--key-env", type=str, default="OPENAI_API_KEY", metavar="NAME", help="variable of the key")
    add("--no-key", action="store_true", help="the server needs no key")
    add("--limit-field", type=LimitField, default="max_tokens", help="its name of --max-tokens")
    add("--no-seed", action="store_true", help="for servers that refuse the field seed")
    add("--concurrency", type=int, default=8, help="requests on their way at a time")
    add("--retries", type=int, default=5, help="after rate limits, server errors and timeouts")
    add("--timeout", type=float, default=120.0, help="seconds for one request")


def check_endpoint_options(args: Namespace) -> None:
    """UsageError for a number out of range."""
    for name in ("concurrency", "max_tokens", "tries"):
        value = getattr(args, name)
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a number from 1")
    if args.retries < 0:
        raise UsageError(f"--retries {args.retries}: give a number from 0")
    if not 0 < args.timeout < float("inf"):
        raise UsageError(f"--timeout {args.timeout:g}: give seconds above 0")


def endpoint_client(args: Namespace, model: str, url: str) -> OpenClient:
    """The client is a library of its own, and needed only where something is asked."""
    try:
        from ..train.generate_client import Endpoint, open_client, read_key
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise UsageError(
            "the client library openai is not installed; pip install 'llava-hd[data]'"
        ) from error
    endpoint = Endpoint(
        url=url,
        model=model,
        key=None if args.no_key else read_key(args.key_env),
        key_name=args.key_env,
        retries=args.retries,
        timeout=args.timeout,
        limit_field=args.limit_field,
    )
    return lambda: open_client(endpoint)


@contextmanager
def asking_bar(console: Console) -> Iterator[Done]:
    """A bar on stderr with what was rejected and the cost so far."""
    columns = (
        TextColumn("asking"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("asking", total=None, numbers="")

        def done(count: int, total: int, rejected: int, cost: float | None) -> None:
            numbers = f"{rejected:,} rejected"
            if cost is not None:
                numbers += f"  cost {cost:,.4g}"
            bar.update(task, completed=count, total=total, numbers=numbers)

        yield done
