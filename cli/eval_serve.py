"""`llava-hd eval serve`: a model behind OpenAI's chat completions, images included."""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..hd.errors import UsageError
from .listening import is_loopback, listen, shown_address
from .parser import Parser
from .resolution import add_limits, limits_of, tell_before

if TYPE_CHECKING:
    import uvicorn

    from .serve_engine import Engine
    from .serve_request import ServeLimits

TOKEN = "LLAVA_HD_TOKEN"
CONNECTIONS = 64  # open at a time, beyond the requests that are answered or wait


def build_parser(command: str) -> Parser:
    """The options of `llava-hd eval serve`."""
    parser = Parser(
        command,
        "Answer OpenAI's chat completions (/v1/chat/completions, streamed or whole) and its\n"
        "/v1/models, so that lmms-eval, VLMEvalKit and chat programs can ask the model. Images\n"
        "come as data: URLs; nothing is fetched and no file opened for a request. Answers are\n"
        "greedy unless a request sets a temperature. Any host but loopback needs a token of at\n"
        f"least 16 characters, in the environment as {TOKEN}.",
        [
            "llava-hd eval serve --model runs/vicuna-7b-hd448",
            f"{TOKEN}=... llava-hd eval serve --model DIR --host 0.0.0.0 --port 8000",
            "curl http://127.0.0.1:8000/v1/models",
        ],
    )
    add = parser.add_argument
    add("--model", type=str, required=True, metavar="DIR", help="folder of a saved model")
    add("--name", type=str | None, help="the model's name in requests (the folder's)")
    add("--host", type=str, default="127.0.0.1", help="address to listen at")
    add("--port", type=int, default=8000, help="port; 0 takes a free one and tells it")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", type=str, default="auto", help="auto, float32, bfloat16, float16")
    add("--max-new-tokens", type=int, default=1024, help="longest answer, whatever is asked for")
    add("--max-images", type=int, default=8, help="images in a request")
    add("--max-pixels", type=int, default=40_000_000, help="pixels of a request's images, together")
    add("--max-body-mb", type=int, default=32, help="size of a request")
    add("--parallel", type=int, default=1, help="answers made at a time")
    add("--queue", type=int, default=64, help="requests that may wait; more get status 429")
    add("--seconds", type=float, default=300.0, help="time of a request, waiting included")
    add_limits(parser)
    return parser


def run(args: Namespace) -> int:
    """Serve until it is interrupted (Ctrl-C, SIGTERM)."""
    token = read_token(args.host)
    listening = listen(args.host, args.port)
    limits = _limits(args)
    engine = _load(args, limits)
    locked = "a token is asked for" if token else "no token is asked for"
    address = shown_address(listening)
    print(f"serving {engine.name} at http://{address}/v1 ({locked})", flush=True)
    serve(engine, token, listening)
    return 0


def read_token(host: str) -> str | None:
    """The token of the environment; UsageError where the host needs one and there is none."""
    token = os.environ.get(TOKEN, "").strip()
    if token and not (token.isascii() and token.isprintable() and len(token) >= 16):
        raise UsageError(f"{TOKEN}: give at least 16 plain characters, without line breaks")
    if not token and not is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from elsewhere; put a token of at least 16 characters "
            f"into the environment as {TOKEN}, or take --host 127.0.0.1"
        )
    return token or None


def serve(engine: Engine, token: str | None, listening: socket.socket) -> None:
    """Answer requests at the socket until a signal ends it."""
    import uvicorn

    uvicorn.Server(server_config(engine, token)).run(sockets=[listening])


def server_config(engine: Engine, token: str | None) -> uvicorn.Config:
    """uvicorn's settings, with the application and its limits on connections."""
    import uvicorn

    from .serve_app import build_app
    from .serve_protocol import Connection

    return uvicorn.Config(
        build_app(engine, token),
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS + engine.limits.parallel + engine.limits.queue,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )


def _limits(args: Namespace) -> ServeLimits:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed; install it with: pip install 'llava-hd[serve]'"
        ) from error
    from .serve_request import ServeLimits

    for name in ("max_new_tokens", "max_images", "max_pixels", "max_body_mb", "parallel"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {getattr(args, name)}: give a number from 1")
    if args.queue < 0 or not args.seconds > 0:
        raise UsageError("--queue must be 0 or more, --seconds more than 0")
    return replace(
        ServeLimits(),
        max_body_bytes=args.max_body_mb * 2**20,
        max_images=args.max_images,
        max_pixels=args.max_pixels,
        max_new_tokens=args.max_new_tokens,
        parallel=args.parallel,
        queue=args.queue,
        seconds=args.seconds,
    )


def _load(args: Namespace, limits: ServeLimits) -> Engine:
    import torch

    from ..model.llava_hd import LlavaHD
    from ..model.processor import Processor
    from .eval_pope import DTYPES, device_and_dtype
    from .serve_engine import Engine

    if args.dtype not in DTYPES:
        raise UsageError(f"--dtype {args.dtype!r} is unknown; there is {', '.join(DTYPES)}")
    device, dtype = device_and_dtype(args.device, args.dtype)
    folder, resolution = Path(args.model), limits_of(args)
    tell_before(folder, resolution, dtype)
    model = LlavaHD.from_pretrained(folder, dtype=getattr(torch, dtype), device=device)
    name = args.name or folder.resolve().name
    return Engine(name, model, Processor.from_pretrained(folder, resolution), limits)
