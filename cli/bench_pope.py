"""`llava-hd bench pope`: questions per second with a shared image prefix, and of the rivals."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..hd.errors import UsageError
from .bench_output import command_line, measure_and_show, out_folder
from .eval_pope import DTYPES, device_and_dtype
from .parser import Parser

DESCRIPTION = """Ask 6 and 18 questions about each image (POPE's in one split, and in all three):
with the image's prefix read once for all of them, one by one, and with transformers' LlavaNext
generate at batch 1 and in batches padded on the left. Same weights (random, or a llava_next
folder), same images and questions, in turns. Prints questions per second, the ratios, and how many
answers differ. Default sizes: on a CPU 4 layers of width 512 on one thread, on a GPU a random 7B
model. pope.json and pope.csv go to bench/results/DEVICE/DATE or to --out."""
EXAMPLES = (
    "--quick",
    "--questions 18 --rounds 5 --out runs/pope-speed",
    "--device cuda --images 4 --json",
    "--model llava-v1.6-vicuna-7b-hf --device cuda",
)


def build_parser(command: str) -> Parser:
    """The options of `llava-hd bench pope`."""
    parser = Parser(command, DESCRIPTION, [f"llava-hd {command} {words}" for words in EXAMPLES])
    add = parser.add_argument
    add("--questions", type=int, nargs="+", help="questions of an image; 6 and 18, with --quick 6")
    add("--images", type=int, default=1, help="images of a round")
    add("--rounds", type=int, help="timed rounds of each setting; 3, with --quick 2")
    add("--batch", type=int, default=8, help="prompts of transformers' larger batch")
    add("--new-tokens", type=int, default=2, help="longest answer: a word and the end token")
    add("--size", choices=("tiny", "small", "7b"), help="of random weights; small, on a GPU 7b")
    add("--model", type=str | None, metavar="DIR", help="a llava_next folder instead of them")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", type=str, default="auto", help=f"{', '.join(DTYPES)} (auto: bfloat16 on a GPU)")
    add("--threads", type=int, default=1, help="threads of the processor")
    add("--seed", type=int, default=0, help="of weights, images and questions")
    add("--quick", action="store_true", help="six questions, two rounds: under a minute on a CPU")
    add("--out", type=str, metavar="DIR", help="folder of the results")
    add("--json", action="store_true", help="print rows, ratios and targets as JSON")
    return parser


def run(args: Namespace) -> int:
    """Measure, write the results, print the table (or JSON)."""
    if args.model is not None and args.size is not None:
        raise UsageError("--size is for random weights; leave it or --model out")
    if args.dtype not in DTYPES:
        raise UsageError(f"--dtype {args.dtype!r} is unknown; there is {', '.join(DTYPES)}")
    device, dtype = device_and_dtype(args.device, args.dtype)
    from ..bench.bench_pope import RECORD, run_benchmark
    from ..bench.bench_pope_race import Request

    usual_rounds = 2 if args.quick else 3
    request = Request(
        questions=tuple(dict.fromkeys(args.questions or ((6,) if args.quick else (6, 18)))),
        images=args.images,
        rounds=usual_rounds if args.rounds is None else args.rounds,
        batch=args.batch,
        new_tokens=args.new_tokens,
        check_questions=2 if args.quick else 6,
        threads=args.threads,
        size=args.size or ("7b" if device.startswith("cuda") else "small"),
        model=None if args.model is None else Path(args.model),
        device=device,
        dtype=dtype,
        seed=args.seed,
        out=out_folder(args),
        command=command_line(),
    )
    shown = ("model", "check", "rows", "ratios", "targets")
    return measure_and_show(partial(run_benchmark, request), _print, args, shown, RECORD)


def _print(console: Console, record: dict[str, Any]) -> None:
    """A table for each number of questions: who, how fast, against the shared prefix."""
    ratios = {(one["questions_per_image"], one["rival"]): one for one in record["ratios"]}
    about = record["model"]
    for target in record["targets"]:
        number = target["questions_per_image"]
        title = (
            f"{number} questions an image, {about['visual_tokens']} visual tokens, "
            f"{about['layers']} layers of width {about['width']}"
        )
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("who", no_wrap=True)
        for name in ("questions/s", "shared / this", "by CPU time", "answers differ"):
            table.add_column(name, justify="right")
        for row in record["rows"]:
            if row["questions_per_image"] == number:
                ratio = ratios.get((number, row["contestant"]))
                table.add_row(
                    row["contestant"],
                    f"{row['questions_per_second']:.3f}",
                    "" if ratio is None else f"{ratio['ratio']:.2f}",
                    "" if ratio is None else f"{ratio['cpu_ratio']:.2f}",
                    f"{row['differing']} of {row['questions']}",
                )
        console.print(table)
        console.print(
            f"goal: {target['target']:g} times either batch of transformers: "
            f"{'reached' if target['reached'] else 'not reached'}, {target['ratio']:.2f} times, "
            f"by CPU time {target['cpu_ratio']:.2f}",
            highlight=False,
        )
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
