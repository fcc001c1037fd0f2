"""`llava-hd estimate`: what a run needs in memory, operations, traffic, time and money."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..bench.files import write_json
from ..hd.errors import UsageError
from ..hd.files import check_out
from ..train.recipe import find_recipe, load_config, read_recipe
from .parser import Parser
from .train import add_settings, given_settings

if TYPE_CHECKING:
    from ..train.estimate import Estimate
    from ..train.estimate_dry_run import DryRun, ReadPass
    from ..train.estimate_memory import Memory
    from ..train.prepare import Job
    from ..train.workers import Done

GIB = 2**30
MOMENTS = {"start": "start", "pass": "largest pass", "update": "update"}


def build_parser(command: str) -> Parser:
    """The options of `llava-hd estimate`."""
    parser = Parser(
        command,
        "Memory of a GPU part by part at the largest pass, tokens of an image, operations,\n"
        "traffic, time and price of a run. No weight is read: config.json and tokenizer files are\n"
        "enough, and the published shapes of CLIP-L and Vicuna are known by their folders' names.\n"
        "Lengths are measured from the data, if it is there, else assumed, which is said.",
        [
            "llava-hd estimate --config vicuna-7b-hd448 --gpus 8 --memory-gib 80",
            "llava-hd estimate --config vicuna-13b-hdflex --gpus 32 --tflops 350 --gbps 400 \\",
            "    --num-samples 665000 --price-per-gpu-hour 2.5",
            "llava-hd estimate --config my.yaml --gpus 8 --measured runs/short --out estimate",
            "llava-hd estimate --config vicuna-7b-hd448 --lora.bits 4 --zero.stage 2 --json",
        ],
    )
    parser.usage = "llava-hd estimate --config RECIPE [--gpus N] [options] [--SETTING VALUE ...]"
    add = parser.add_argument
    add("--config", type=str, required=True, help="recipe: shipped name or a file")
    add("--stage", type=str | None, help="pretrain or finetune, where the recipe does not tell")
    add("--gpus", type=int, default=1, metavar="N", help="ranks in all; default: 1")
    add("--cpu", action="store_true", help="training on a CPU, one process per rank")
    add(
        "--memory-gib", type=float | None, metavar="X", help="of a GPU: does it fit, what to change"
    )
    add("--tflops", type=float | None, metavar="X", help="TFLOP/s of a GPU, recomputation included")
    add("--measured", type=str | None, metavar="RUN_DIR", help="take that speed from a run of ours")
    add("--gbps", type=float | None, metavar="X", help="gigabits per second that a rank sends")
    add("--price-per-gpu-hour", type=float | None, metavar="X", help="in any currency")
    add("--records", type=int | None, metavar="N", help="measure N records, evenly spread; all")
    data = parser.add_argument_group("instead of data that is not there")
    data.add_argument(
        "--sizes", type=str, nargs="+", default=argparse.SUPPRESS, metavar="HxW",
        help="height x width of images in px, such as 480x640",
    )  # fmt: skip
    data.add_argument("--text-tokens", type=int, default=256, metavar="N", help="of a sample")
    data.add_argument("--num-samples", type=int | None, metavar="N", help="samples of the data")
    add("--out", type=str | None, metavar="DIR", help="also write estimate.json and tokens.png")
    add("--json", action="store_true", help="print the figures as JSON, in bytes and counts")
    add_settings(parser)
    return parser


def run(args: Namespace) -> int:
    """Estimate, print, write what is asked for."""
    path = find_recipe(args.config, args.stage or "finetune")
    stage = args.stage or str(read_recipe(path).get("stage", "finetune"))
    config = load_config(path, stage, given_settings(args))
    if args.out is not None:
        check_out(Path(args.out))
    _check(args)
    from ..train.estimate import Question, estimate, report_of
    from ..train.estimate_samples import TYPICAL_SIZES

    question = Question(
        gpus=args.gpus,
        on_gpu=not args.cpu,
        sizes=tuple(map(_size, args.sizes)) if "sizes" in args else TYPICAL_SIZES,
        text_tokens=args.text_tokens,
        num_samples=args.num_samples,
        at_most=args.records,
        tflops=args.tflops,
        measured=None if args.measured is None else Path(args.measured),
        gbps=args.gbps,
        price=args.price_per_gpu_hour,
        memory_gib=args.memory_gib,
    )
    with bar() as done:
        found = estimate(config, question, done)
    report = {"recipe": args.config, "gpus": args.gpus, **report_of(found)}
    if args.out is not None:
        _write(Path(args.out), report, found)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(found, args.gpus, question.on_gpu)
    return 0


def _check(args: Namespace) -> None:
    for name, value in (
        ("gpus", args.gpus),
        ("memory-gib", args.memory_gib),
        ("tflops", args.tflops),
        ("gbps", args.gbps),
        ("records", args.records),
        ("text-tokens", args.text_tokens),
        ("num-samples", args.num_samples),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name} must be above 0, not {value}")
    price = args.price_per_gpu_hour
    if price is not None and not 0 <= price < float("inf"):
        raise UsageError(f"--price-per-gpu-hour must be 0 or more, not {price}")


def _size(text: str) -> tuple[int, int]:
    """`480x640` as (height, width)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise UsageError(f"--sizes {text}: give height x width in pixels, such as 480x640")
    return int(height), int(width)


@contextmanager
def bar() -> Iterator[Done]:
    """A bar on stderr while samples are measured, gone afterwards."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def done(what: str, count: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=count)

        yield done


def _write(out: Path, report: dict[str, Any], found: Estimate) -> None:
    from ..train.estimate_picture import tokens_png

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "estimate.json", report)
    (out / "tokens.png").write_bytes(tokens_png(found.samples))


def _print(found: Estimate, gpus: int, on_gpu: bool) -> None:
    # Wide enough for the table wherever the output goes.
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for words in found.assumed:
        console.print(f"note: {words}")
    console.print(_parts_table(found))
    console.print(f"samples {found.samples.source}")
    for line in _sample_lines(found):
        console.print(line)
    console.print(memory_table(found.memory))
    for line in [*_memory_lines(found, on_gpu), "", *_work_lines(found, gpus)]:
        console.print(line)
    if found.missing:
        console.print("not said, because not given: " + "; ".join(found.missing))


def _parts_table(found: Estimate) -> Table:
    table = Table(title="model", title_justify="left")
    for name in ("part", "parameters", "trained", "weights, GiB"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in found.run.parts:
        table.add_row(
            part.name, f"{part.parameters:,}", f"{part.trained:,}", f"{part.bytes / GIB:.2f}"
        )
    return table


def _sample_lines(found: Estimate) -> list[str]:
    from ..train.estimate import spread

    lines = []
    samples = found.samples
    for words, values in (
        ("tokens of an image", samples.images),
        ("tokens of a sample", samples.total),
        ("tiles of a sample", samples.tiles),
    ):
        figures = spread(values)
        if figures is not None:
            shown = ", ".join(f"{name} {value:,.0f}" for name, value in figures.items())
            lines.append(f"  {words}: {shown}")
    if samples.faults:
        lines.append(f"  {len(samples.faults):,} cannot be trained on: {samples.faults[0]}")
    shape = found.shape
    lines.append(
        f"largest pass of a rank: {shape.tokens:,} tokens, {shape.tiles:,} tiles, {shape.rows:,} "
        f"visual tokens, {shape.labels:,} learned; {found.passes} pass(es) a step, "
        f"{found.samples_per_step:,} samples over all ranks"
    )
    return lines


def memory_table(memory: Memory) -> Table:
    """Parts of a rank's memory in GiB, at the moments that may be the tightest."""
    table = Table(title="memory of a rank, GiB", title_justify="left", show_footer=True)
    totals = memory.totals
    table.add_column("part", footer="total")
    for moment, words in MOMENTS.items():
        table.add_column(words, footer=f"{totals[moment] / GIB:.2f}", justify="right")
    for name, sizes in memory.parts.items():
        table.add_row(
            name, *(f"{sizes[m] / GIB:.2f}" if sizes.get(m) else "" for m in MOMENTS)
        )  # fmt: skip
    return table


def _memory_lines(found: Estimate, on_gpu: bool) -> list[str]:
    from ..train.estimate import ACCURACY

    memory = found.memory
    lines = [f"peak {memory.peak / GIB:.2f} GiB ({MOMENTS[memory.peak_moment]})"]
    if on_gpu:
        lines.append(
            "  not in it: CUDA's context, NCCL's buffers, fragmentation; never compared with a GPU"
        )
    else:
        lines.append(
            f"  within {ACCURACY:.0%} in measured runs with glibc's MALLOC_MMAP_THRESHOLD_ and "
            "MALLOC_TRIM_THRESHOLD_ at 65536; without them they took 1.4 to 1.6 times as much"
        )
    if memory.host:
        lines.append(f"memory of the machine for each rank: {memory.host / GIB:.1f} GiB")
    fit = found.fit
    if fit is not None:
        words = "to spare" if fit.spare >= 0 else "too little"
        remedy = "" if fit.verdict == "fits" else f"; largest: {fit.part}, change {fit.remedy}"
        lines.append(f"{fit.verdict}: {abs(fit.spare) / GIB:.1f} GiB {words}{remedy}")
    return lines


def _work_lines(found: Estimate, gpus: int) -> list[str]:
    work, traffic = found.step_operations, found.traffic
    shares = ", ".join(f"{name} {value / 1e12:,.1f}" for name, value in vars(work).items())
    lines = [
        f"step, all ranks: {work.total / 1e12:,.1f} TFLOP ({shares})",
        f"step, each rank sends: {traffic.total / 1e9:,.2f} GB (gradients "
        f"{traffic.gradients / 1e9:,.2f}, weights {traffic.weights / 1e9:,.2f})",
    ]
    if found.traffic_seconds is not None:
        lines[-1] += f"; {found.traffic_seconds:,.2f} s at the given --gbps"
    if found.num_steps is not None:
        lines.append(f"run: {found.num_steps:,} steps, {work.total * found.num_steps:.3g} FLOP")
    if found.speed is None or found.cost is None:
        return lines
    cost = found.cost
    lines.append(f"at {found.speed.tflops:,.3g} TFLOP/s a GPU ({found.speed.source}):")
    lines.append(f"  step {_range(cost.step_seconds, 's')}")
    if cost.hours is not None:
        lines.append(f"  run {_range(cost.hours, 'h')} on {gpus} GPU(s)")
    if cost.price is not None:
        lines.append(f"  price {_range(cost.price, '')}".rstrip())
    return lines


def _range(pair: tuple[float, float], unit: str) -> str:
    """Communication hidden behind the computation, or not at all."""
    low, high = (f"{value:,.2f}" for value in pair)
    if low == high:
        return f"{low} {unit}"
    return f"{low} {unit} (communication hidden) to {high} {unit} (not hidden)"


def dry_run_lines(job: Job, found: DryRun, world_size: int) -> list[str]:
    """What `--dry-run` of the trainers tells."""
    from ..train.estimate_model import open_words

    config, state, order = job.config, job.state, found.order
    share = found.at_limit / max(1, len(found.samples))
    fill = ""
    if order.fill is not None:
        fill = f", packs of {order.pack_tokens:,} tokens {order.fill:.1%} full"
    lines = [
        f"{config.stage}: {job.data_words}; steps {state.step:,}..{state.num_steps:,} of "
        f"{state.samples_per_step:,} samples on {world_size} ranks, ZeRO-{config.zero.stage}, "
        f"{config.precision}; would write {config.output_dir}",
        f"samples: {found.at_limit:,} ({share:.2%}) reach max_length {config.max_length:,}, cut or "
        f"just full; {len(found.samples.faults):,} cannot be trained on",
        f"a step: {order.passes:.2f} passes of each rank on average, batching "
        f"{config.data.batching}{fill}, padding {order.padding:.1%}",
        *(f"note: {words}" for words in open_words(config)),
    ]
    lines += _pass_lines("most tokens", found.most_tokens)
    if found.most_tiles.place != found.most_tokens.place:
        lines += _pass_lines("most tiles", found.most_tiles)
    return lines


def _pass_lines(words: str, one: ReadPass) -> list[str]:
    shape, memory = one.shape, one.memory
    moment = memory.peak_moment
    parts = ", ".join(
        f"{name} {sizes[moment] / GIB:.2f}"
        for name, sizes in memory.parts.items()
        if sizes.get(moment)
    )
    return [
        f"pass with {words} (step {one.place.step + 1}, rank {one.place.rank}), read and packed: "
        f"{len(one.place.samples)} samples, {shape.tokens:,} tokens, {shape.tiles:,} tiles, "
        f"{shape.labels:,} learned",
        f"  memory of that rank: {memory.peak / GIB:.2f} GiB at its peak ({MOMENTS[moment]}): "
        f"{parts}",
    ]
