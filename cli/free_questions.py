"""What `eval scienceqa` and `eval llava-bench` share: options, checks, the loaded model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.files import sha256
from ..bench.free_run import AnswerMixed, Item, ask_items, begin, item_images
from ..bench.pope_run import fingerprint
from ..hd.errors import UsageError
from ..hd.files import check_out
from ..train.output_lock import only_run
from .eval_pope import DTYPES, device_and_dtype, progress_bar, tell
from .parser import Parser
from .resolution import add_limits, limits_of, limits_record, tell_before

if TYPE_CHECKING:
    from ..model.llava_hd import LlavaHD
    from ..model.processor import Processor


def add_model(parser: Parser, max_new_tokens: int) -> None:
    """The options of a command that asks a model of ours."""
    add = parser.add_argument
    add("--model", type=str | None, metavar="DIR", help="folder of a saved model")
    add("--images", type=str | None, metavar="DIR", help="folder of the images")
    add("--out", type=str | None, metavar="DIR", help="folder of answers.jsonl")
    add("--batch-size", type=int, default=8, help="questions at a time")
    add("--max-new-tokens", type=int, default=max_new_tokens, help="longest answer")
    add("--limit", type=int | None, help="only the first N questions")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", type=str, default="auto", help=f"{', '.join(DTYPES)} (auto: bfloat16 on a GPU)")
    add_limits(parser)


def check_model_options(args: Namespace) -> None:
    """UsageError for what is missing or out of range."""
    for option in ("model", "images", "out"):
        if not getattr(args, option):
            raise UsageError(
                f"--{option} is missing; asking a model needs --model, --images, --out"
            )
    for option in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value}: give a number from 1")
    if args.dtype not in DTYPES:
        raise UsageError(f"--dtype {args.dtype!r} is unknown; there is {', '.join(DTYPES)}")
    limits_of(args)
    check_out(Path(args.out))


class Asker:
    """Turns a loaded model into an answer function; the commands differ in that."""

    def __init__(self, args: Namespace) -> None:
        self.max_new_tokens: int = args.max_new_tokens

    def answers(self, model: LlavaHD, processor: Processor) -> AnswerMixed:
        """One greedy answer to each question."""
        from ..model.generate import answer_batch

        def answer(images: Sequence[Path | None], prompts: Sequence[str]) -> list[str]:
            return answer_batch(model, processor, images, prompts, self.max_new_tokens)

        return answer


def ask(
    args: Namespace, items: Sequence[Item], asker: Asker, about: dict[str, Any], files: list[Path]
) -> dict[str, str]:
    """All answers by question id; the model is loaded only where one is missing.

    about: what else than model, files, images and decoding makes the answers.
    """
    out = Path(args.out)
    images = item_images(items, Path(args.images))
    device, dtype = device_and_dtype(args.device, args.dtype)
    limits = limits_of(args)
    identity = {
        **about,
        "model": fingerprint(Path(args.model)),
        "files": {path.name: sha256(path) for path in files},
        "images": str(Path(args.images).resolve()),
        "decoding": {
            "greedy": True,
            "max_new_tokens": args.max_new_tokens,
            "dtype": dtype,
            **limits_record(limits),
        },
        "limit": args.limit,
    }
    with only_run(out, tell):
        done = begin(out, items, identity, tell)
        if done:
            tell(f"{out}: {len(done)} of {len(items)} questions are answered already")
        answer: AnswerMixed = _nothing_to_ask
        if len(done) < len(items):
            tell_before(Path(args.model), limits, dtype, images.values())
            answer = _loaded(args, asker, device, dtype)
        with progress_bar() as progress:
            return ask_items(items, images, answer, out, done, args.batch_size, progress)


def _loaded(args: Namespace, asker: Asker, device: str, dtype: str) -> AnswerMixed:
    import torch

    from ..model.llava_hd import LlavaHD
    from ..model.processor import Processor

    folder = Path(args.model)
    model = LlavaHD.from_pretrained(folder, dtype=getattr(torch, dtype), device=device)
    return asker.answers(model, Processor.from_pretrained(folder, limits_of(args)))


def _nothing_to_ask(images: Sequence[Path | None], prompts: Sequence[str]) -> list[str]:
    raise ValueError(f"{len(prompts)} questions are left, but no model was loaded")
