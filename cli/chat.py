"""`llava-hd chat`: a conversation with a model in the terminal, in a pipe, or one question."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ..hd.errors import UsageError
from .parser import Parser
from .resolution import add_limits, limits_of, tell_before

if TYPE_CHECKING:
    from .chat_talk import Picture, Talk

HOTTEST = 2.0  # temperature, as the server's


def build_parser(command: str) -> Parser:
    """The options of `llava-hd chat`."""
    parser = Parser(
        command,
        "Talk with a model about images, or about none. Answers come as they are made; what was\n"
        "read stays in memory between the turns. In a terminal /help lists the commands, Ctrl-C\n"
        "stops an answer and Ctrl-D ends. Without a terminal each line of the input is a question\n"
        "or a command, and answers alone go to the output.",
        [
            "llava-hd chat --model runs/vicuna-7b-hd448 --image photo.jpg",
            'llava-hd chat --model DIR --image photo.jpg --prompt "What is on the pier?"',
            "llava-hd chat --model DIR --max-tiles 9 --max-visual-tokens 1500",
            "llava-hd chat --model DIR --json < questions.txt > answers.jsonl",
        ],
    )
    add = parser.add_argument
    add("--model", type=str, required=True, metavar="DIR", help="folder of a saved model")
    add(
        "--image", type=str, nargs="+", action="extend", default=[], metavar="FILE",
        help="for the first question; may be given again",
    )  # fmt: skip
    add("--prompt", type=str | None, metavar="TEXT", help="answer this question and end")
    add("--system", type=str | None, metavar="TEXT", help="instead of the template's system text")
    add("--max-new-tokens", type=int, default=512, help="longest answer")
    add("--temperature", type=float, default=0.0, help=f"0 is greedy, up to {HOTTEST:g} draws")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", type=str, default="auto", help="auto, float32, bfloat16, float16")
    add("--no-history", action="store_true", help="keep no file of what was typed")
    add("--json", action="store_true", help="one JSON object per line: answers, errors, the rest")
    add_limits(parser)
    return parser


def run(args: Namespace) -> int:
    """Talk until the end of the input; the worst code of what went wrong in a pipe."""
    _check(args)
    from .chat_talk import load_picture

    pictures = [load_picture(path) for path in args.image]  # before a model is waited for
    in_terminal = args.prompt is None and not args.json and sys.stdin.isatty()
    talk = _load(args, pictures, in_terminal)
    if args.prompt is not None:
        talk.ask(args.prompt)
        return talk.code
    if in_terminal:
        from .chat_terminal import converse

        converse(talk, keep_history=not args.no_history)
        return 0
    talk.read(sys.stdin.buffer)
    return talk.code


def _check(args: Namespace) -> None:
    from ..model.prompt import refuse_tag
    from ..train.record_images import has_lone_surrogate
    from .eval_pope import DTYPES

    limits_of(args)
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {args.max_new_tokens}: give a number from 1")
    if not 0 <= args.temperature <= HOTTEST:  # NaN is not
        raise UsageError(f"--temperature {args.temperature}: give a number from 0 to {HOTTEST:g}")
    if args.dtype not in DTYPES:
        raise UsageError(f"--dtype {args.dtype!r} is unknown; there is {', '.join(DTYPES)}")
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty; give a question, or leave it out to talk")
    for option, text in (("--prompt", args.prompt or ""), ("--system", args.system or "")):
        if has_lone_surrogate(text):
            raise UsageError(f"{option} holds half of a character; give UTF-8 text")
    refuse_tag(args.system or "", "--system")


def _load(args: Namespace, pictures: list[Picture], in_terminal: bool) -> Talk:
    import torch

    from ..model.chat import ChatSession
    from ..model.llava_hd import LlavaHD
    from ..model.processor import Processor
    from ..model.stream import Sampling
    from .chat_talk import JsonShow, PlainShow, Talk
    from .chat_terminal import TerminalShow
    from .eval_pope import device_and_dtype

    folder, limits = Path(args.model), limits_of(args)
    device, dtype = device_and_dtype(args.device, args.dtype)
    tell_before(folder, limits, dtype, [Path(picture.path) for picture in pictures])
    model = LlavaHD.from_pretrained(folder, dtype=getattr(torch, dtype), device=device)
    session = ChatSession(model, Processor.from_pretrained(folder, limits), args.system)
    show = JsonShow() if args.json else TerminalShow(session) if in_terminal else PlainShow()
    talk = Talk(session, show, args.max_new_tokens, Sampling(args.temperature))
    for picture in pictures:
        talk.add(picture, tell=in_terminal)
    return talk
