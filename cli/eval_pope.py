"""`llava-hd eval pope`: ask a model POPE's questions and score the answers, or score existing ones.

Scoring alone (`--score-only`) imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..bench.pope import PROMPT, score_table
from ..bench.pope_data import Answered, answer_files, read_questions, split_files
from ..bench.pope_join import load_answered, load_questions
from ..bench.pope_run import (
    SCORES,
    AnswerBatch,
    RunRecord,
    check_finished,
    check_resumable,
    describe_files,
    evaluate,
    fingerprint,
    finished_answers,
    first_questions,
    image_paths,
)
from ..hd.errors import UsageError
from ..hd.files import check_out
from ..train.output_lock import only_run
from .parser import Parser
from .resolution import OPTIONS, add_limits, limits_of, limits_record, tell_before

if TYPE_CHECKING:
    from ..hd.limits import ResolutionLimits

DTYPES = ("auto", "float32", "bfloat16", "float16")


def build_parser(command: str) -> Parser:
    """The options of `llava-hd eval pope`."""
    parser = Parser(
        command,
        "Ask a model POPE's questions and score its answers, or score existing answers.\n\n"
        "Questions are POPE's own files of JSON lines (..._random.json, ..._popular.json,\n"
        "..._adversarial.json; their folder; or SPLIT=FILE), or LLaVA's one file with --labels.\n"
        "An interrupted run goes on when the same command is started again.",
        [
            "llava-hd eval pope --model M --questions pope/*.json --images val2014 --out runs/a",
            "llava-hd eval pope --score-only --answers runs/a/answers.jsonl --json",
            "llava-hd eval pope --score-only --answers llava.jsonl \\",
            "    --questions llava_pope_test.jsonl --labels pope",
        ],
    )
    add = parser.add_argument
    add("--model", type=str | None, metavar="DIR", help="folder of a saved model")
    add("--questions", type=str, nargs="+", metavar="FILE", help="question files, or their folder")
    add(
        "--labels", type=str | None, metavar="DIR", help="POPE's label files, for LLaVA's questions"
    )
    add("--images", type=str | None, metavar="DIR", help="folder of the images")
    add("--out", type=str | None, metavar="DIR", help="folder of answers.jsonl and scores.json")
    add("--prompt", type=str | None, help="own response prompt, on a line below each question")
    add("--batch-size", type=int, default=18, help="questions at a time; an image's stay together")
    add("--max-new-tokens", type=int, default=16, help="longest answer")
    add("--limit", type=int | None, help="only the first N questions of each split")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", type=str, default="auto", help=f"{', '.join(DTYPES)} (auto: bfloat16 on a GPU)")
    add("--score-only", action="store_true", help="score the answers of --answers, ask no model")
    add("--answers", type=str, nargs="+", metavar="FILE", help="answers to score, or their folder")
    add("--json", action="store_true", help="print the scores as JSON")
    add_limits(parser)
    return parser


def run(args: Namespace) -> int:
    """Score existing answers, or ask the model what has no answer yet and score all."""
    answered = _score_only(args) if args.score_only else _ask(args)
    table = score_table(answered)
    if args.json:
        print(json.dumps(table, indent=2))
    else:
        console = Console()
        console.print(f"{len(answered)} questions of POPE")
        for shown in scores_tables(table):
            console.print(shown)
        if args.out:
            console.print(f"answers and {SCORES} are in {args.out}")
    return 0


def _score_only(args: Namespace) -> list[Answered]:
    for option in ("model", "images", "out", "limit", "prompt", *OPTIONS):
        if getattr(args, option) is not None:
            option = option.replace("_", "-")
            raise UsageError(f"--{option} has no meaning with --score-only; leave one of them out")
    if not args.answers:
        raise UsageError("--score-only needs --answers FILE, the answers to score")
    questions = split_files(args.questions or [])
    labels = split_files([args.labels]) if args.labels else []
    files = answer_files(args.answers)
    for file in files:
        check_finished(file)
    return load_answered(files, questions, labels)


def _ask(args: Namespace) -> list[Answered]:
    """All checks that need no model come first; only then anything is loaded or written."""
    _check_options(args)
    limits = limits_of(args)
    model_dir, images_dir, out = Path(args.model), Path(args.images), Path(args.out)
    check_out(out)
    model = {"path": str(model_dir.resolve()), "fingerprint": fingerprint(model_dir)}
    files = split_files(args.questions)
    labels = split_files([args.labels]) if args.labels else []
    questions = load_questions(files, labels)
    described = describe_files(files, questions)
    labels_described = describe_files(labels, read_questions(labels)) if labels else []
    questions = first_questions(questions, args.limit)
    images = image_paths(questions, images_dir)
    device, dtype = device_and_dtype(args.device, args.dtype)
    record = RunRecord(
        model=model,
        prompt=PROMPT if args.prompt is None else f"\n{args.prompt}" if args.prompt else "",
        questions=tuple(described),
        images=str(images_dir.resolve()),
        decoding={
            "max_new_tokens": args.max_new_tokens,
            "greedy": True,
            "dtype": dtype,
            **limits_record(limits),
        },
        limit=args.limit,
        batch_size=args.batch_size,
        device=device,
        labels=tuple(labels_described),
    )
    with only_run(out, tell):
        check_resumable(out, record)
        done = finished_answers(out, notify=tell)
        if done:
            tell(f"{out}: {len(done)} of {len(questions)} questions are answered already")
        if len(done) < len(questions):
            tell_before(model_dir, limits, dtype, images.values())
            answer, hd = _load(model_dir, device, dtype, args.max_new_tokens, limits)
            record = replace(record, model={**model, "hd": hd})
        else:
            answer = _nothing_to_ask
        with progress_bar() as progress:
            return evaluate(questions, images, answer, out, record, done, progress)


def _check_options(args: Namespace) -> None:
    if args.answers:
        raise UsageError("--answers is for --score-only; add it, or leave --answers out")
    for option in ("model", "questions", "images", "out"):
        if not getattr(args, option):
            raise UsageError(
                f"--{option} is missing; asking a model needs --model, --questions, --images and "
                "--out (scoring existing answers: --score-only --answers FILE)"
            )
    for option in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value}: give a number from 1")
    if args.dtype not in DTYPES:
        raise UsageError(f"--dtype {args.dtype!r} is unknown; there is {', '.join(DTYPES)}")


def device_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    """Resolve "auto"; UsageError for a device that this machine does not have."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {device} cannot be used ({reason}); try --device cpu"
        ) from error
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, dtype


def _load(
    folder: Path, device: str, dtype: str, max_new_tokens: int, limits: ResolutionLimits
) -> tuple[AnswerBatch, dict[str, Any]]:
    """The model's answer function and the geometry it sees images with."""
    import torch

    from ..model.generate import answer_batch
    from ..model.llava_hd import LlavaHD
    from ..model.processor import Processor

    model = LlavaHD.from_pretrained(folder, dtype=getattr(torch, dtype), device=device)
    processor = Processor.from_pretrained(folder, limits)

    def answer(images: list[Path], questions: list[str]) -> list[str]:
        return answer_batch(model, processor, images, questions, max_new_tokens=max_new_tokens)

    return answer, processor.config.hd.to_dict()


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def _nothing_to_ask(images: list[Path], questions: list[str]) -> list[str]:
    raise ValueError(f"{len(questions)} questions are left, but no model was loaded")


class _Rate(ProgressColumn):
    """Questions per second, of this run's own questions."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "-/s", style="progress.data.speed")


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with rate and remaining time; yields `progress(answered, total)`."""
    columns = (
        TextColumn("asking"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("asking", total=None)

        def progress(answered: int, total: int) -> None:
            bar.update(task, completed=answered, total=total)

        yield progress


RULES = {
    "original": "a no-word in the first sentence is a no, all else a yes",
    "strict": "the first word is yes or no, all else is unparsable",
}
FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def scores_tables(table: Mapping[str, Any]) -> list[Table]:
    """The scores as rich tables, one per parser, with a row per split and one for the mean."""
    original = {split: values for split, values in table.items() if split != "strict"}
    return [_scores_table(parser, table.get(parser, original)) for parser in RULES]


def _scores_table(parser: str, scores: Mapping[str, Mapping[str, float]]) -> Table:
    title = f"{parser} parser: {RULES[parser]}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("split")
    for name in (*FIGURES, "unparsable"):
        shown.add_column(name.replace("_", " ").replace("f1", "F1"), justify="right")
    for split, values in scores.items():
        shown.add_row(
            split,
            *(f"{values[name]:.4f}" for name in FIGURES),
            f"{values['unparsable']:.4g}",
            style="bold" if split == "mean" else "",
        )
    return shown
