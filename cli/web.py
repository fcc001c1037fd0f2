"""`llava-hd web`: one model, or two side by side, on a page in the browser."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..hd.errors import UsageError
from ..hd.image import ImageLimits
from ..hd.limits import ResolutionLimits
from .listening import LOOPBACK_NAMES, is_loopback, listen, shown_address
from .parser import Parser
from .resolution import add_limits, limits_of, tell_before
from .sigterm import sigterm_is_ctrl_c

if TYPE_CHECKING:
    import uvicorn

    from .web_guard import Guard
    from .web_session import Entrant, Hall
    from .web_tab import WebLimits

CONNECTIONS = 128  # open at a time; each page holds two
MOST_MODELS = 2


def build_parser(command: str) -> Parser:
    """The options of `llava-hd web`."""
    parser = Parser(
        command,
        "A page to chat with a model about pictures, beside what the model sees of them. With two\n"
        "models the same question goes to both, side by side. Only this machine can reach it,\n"
        "unless another host is given. Nothing is fetched from elsewhere. Uploads lie in a\n"
        "private folder, which is deleted at the end (Ctrl-C or SIGTERM).",
        [
            "llava-hd web --model runs/vicuna-7b-hd448",
            "llava-hd web --model runs/demo/base/stage2 runs/demo/hd/stage2 --port 0",
            "llava-hd web --model runs/vicuna-7b-hdflex --max-visual-tokens 1312",
        ],
    )
    add = parser.add_argument
    add(
        "--model", type=str, nargs="+", action="extend", required=True, metavar="DIR",
        help="one or two models",
    )  # fmt: skip
    add("--host", type=str, default="127.0.0.1", help="address to listen at")
    add("--port", type=int, default=7860, help="port; 0 takes a free one and tells it")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", type=str, default="auto", help="auto, float32, bfloat16, float16")
    add("--max-new-tokens", type=int, default=512, help="longest answer")
    add("--max-upload-mb", type=int, default=20, help="size of an upload")
    add("--max-pixels", type=int, default=40_000_000, help="pixels of an upload")
    add("--tabs", type=int, default=16, help="conversations held at a time")
    add("--queue", type=int, default=16, help="questions and uploads that may wait")
    add_limits(parser)
    return parser


def run(args: Namespace) -> int:
    """Serve the page until it is interrupted (Ctrl-C, SIGTERM); 0 then."""
    limits = _limits(args)
    if len(args.model) > MOST_MODELS:
        raise UsageError(f"--model: {len(args.model)} models; a page shows one or two")
    listening = listen(args.host, args.port)
    with sigterm_is_ctrl_c():
        return _run(args, listening, limits)


def _run(args: Namespace, listening: socket.socket, limits: WebLimits) -> int:
    if not is_loopback(args.host):
        print(
            f"llava-hd: warning: --host {args.host}: whoever reaches this machine can use the "
            "page; there is no password",
            file=sys.stderr,
        )
    with private_folder() as folder:
        hall = _open_hall(args, folder, limits)
        from .web_events import build_app

        names = LOOPBACK_NAMES if is_loopback(args.host) else None
        guard = build_app(hall, names)
        print(
            f"serving the page at http://{shown_address(listening)} (end with Ctrl-C)", flush=True
        )
        serve(guard, hall, listening)
    return 0


def _limits(args: Namespace) -> WebLimits:
    if find_spec("gradio") is None:
        raise UsageError("gradio is not installed; install it with: pip install 'llava-hd[web]'")
    from .web_tab import WebLimits

    for name in ("max_new_tokens", "max_upload_mb", "max_pixels", "tabs", "queue"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {getattr(args, name)}: give a number from 1")
    images: ImageLimits = replace(
        WebLimits().images, max_bytes=args.max_upload_mb * 2**20, max_pixels=args.max_pixels
    )
    return WebLimits(
        images=images,
        max_new_tokens=args.max_new_tokens,
        max_tabs=args.tabs,
        waiting=args.queue,
    )


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of this process alone for all that Gradio and the page write, deleted at the end.

    Gradio is told of it, and of its silence, by its environment variables, which it reads when it
    is imported; what the environment said to it before could open folders and is dropped.
    """
    with tempfile.TemporaryDirectory(prefix="llava-hd-web-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        for variable in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[variable]
        os.environ.update(
            GRADIO_ANALYTICS_ENABLED="False",
            GRADIO_TEMP_DIR=str(folder),
            GRADIO_EXAMPLES_CACHE=str(folder / "cache"),
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_OFFLINE="1",
        )
        yield folder


def _open_hall(args: Namespace, folder: Path, limits: WebLimits) -> Hall:
    """The models, loaded, in their hall."""
    import torch

    from .eval_pope import DTYPES, device_and_dtype
    from .web_session import Hall

    if args.dtype not in DTYPES:
        raise UsageError(f"--dtype {args.dtype!r} is unknown; there is {', '.join(DTYPES)}")
    device, dtype = device_and_dtype(args.device, args.dtype)
    names = model_names(args.model)
    limits_of_each = share_limits(names, [Path(path) for path in args.model], limits_of(args))
    entrants = []
    for name, path, resolution in zip(names, args.model, limits_of_each, strict=True):
        tell_before(Path(path), resolution, dtype)
        print(f"reading {path} ...", file=sys.stderr, flush=True)
        entrants.append(_load(name, Path(path), device, getattr(torch, dtype), resolution))
    return Hall(entrants, folder, limits)


def _load(
    name: str, folder: Path, device: str, dtype: object, resolution: ResolutionLimits
) -> Entrant:
    from ..model.llava_hd import LlavaHD
    from ..model.processor import Processor
    from .web_session import Entrant

    model = LlavaHD.from_pretrained(folder, dtype=dtype, device=device)  # type: ignore[arg-type]
    return Entrant(name, model, Processor.from_pretrained(folder, resolution))


def share_limits(
    names: list[str], folders: list[Path], limits: ResolutionLimits
) -> list[ResolutionLimits]:
    """The limits of each model. Limits of grids are for models with tiles; beside one of them, a
    model with one view is asked without, which is told on stderr."""
    from ..model.foreign import read_config

    tiled = [bool(read_config(folder).hd.grids) for folder in folders]
    shared = []
    for name, has_tiles in zip(names, tiled, strict=True):
        own = limits
        if any(tiled) and not has_tiles:
            own = replace(limits, max_tiles=None, grid=None)
            if own != limits:
                line = f"{name} sees one view and no tiles; --max-tiles and --grid are not for it"
                print(f"llava-hd: note: {line}", file=sys.stderr)
        shared.append(own)
    return shared


def model_names(folders: list[str]) -> list[str]:
    """What the models are called: the end of each folder's path, two parts of it (a run's folder
    and its stage), more where those are alike."""
    parts = [Path(folder).resolve().parts[1:] for folder in folders]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number + 1}: {part[-1]}" for number, part in enumerate(parts)]


def serve(guard: Guard, hall: Hall, listening: socket.socket) -> None:
    """Answer requests at the socket until a signal ends it."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            hall.close()
            guard.ended.set()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        guard,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    with _ended_by_signals(server):
        server.run(sockets=[listening])


@contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """A signal that ended the server ends nothing else: what stands behind it is done as well.

    Uvicorn takes the signals while it runs, and afterwards sends them again to whoever had them.
    """

    def end(*_: object) -> None:
        server.should_exit = True  # before uvicorn has taken the signals, or when it is at its end

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
