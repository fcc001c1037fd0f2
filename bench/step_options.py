"""The options of `llava-hd bench step`, for the command and for a bare machine alike."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import UsageError
from ..hd.grid import suggest

OURS, RIVAL = "ours", "llava_next"
# Who takes part -> what it is.
COMPETITORS = {
    OURS: "packs, kept rows, one tower call, label rows, loader processes; on CUDA Liger layers",
    RIVAL: "transformers' LlavaNext: its processor, padded to the longest, sdpa, its own loss",
    f"{RIVAL}-checkpointing": "the same with gradient checkpointing",
    f"{RIVAL}-liger": "the same with liger-kernel's norms, rope, SwiGLU and cross entropy",
    "no-packing": "ours with passes of --batch samples, padded to the longest",
    "no-kept-rows": "ours, every feature row projected, padding too",
    "no-fused-projector": "ours with torch's projector and row placing",
    "no-attention": "ours with transformers' sdpa attention, masks between samples",
    "no-label-layer": "ours with every row through the last layer's MLP, not the learned alone",
    "no-label-rows": "ours with that, the logits of every token and torch's cross entropy",
    "no-fused-norms": "ours with transformers' norms, rope and SwiGLU",
    "no-overlap": "ours without loader processes: data is read between the steps",
    "compile": "ours with torch.compile of the decoder layers (an addition: ours runs without)",
}
RIVALS = tuple(name for name in COMPETITORS if name.startswith(RIVAL))
QUICK = tuple(name for name in COMPETITORS if name != "compile")  # compiling takes minutes
GEOMETRIES = ("nano", "1b", "7b")
LENGTHS = ("hd", "mix665k")
TILES = ("56", "112", "224")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# What a race alone has (--growth has none), and its usual value.
RACE_OPTIONS = {
    "stage": "both", "lengths": "hd", "competitors": None, "batch": None, "step_samples": None,
    "steps": None, "rounds": 1, "workers": None, "profile": False,
}  # fmt: skip
# LLaVA's in stage 1; in stage 2 ten times LLaVA's, so that random weights learn within 20 steps.
LEARNING_RATES = {1: 1e-3, 2: 2e-4}
DESCRIPTION = """Whole training steps (forward, backward, AdamW) of ours and of transformers'
LlavaNext, each in a process of its own, the same weights, images and samples: useful tokens/s,
images/s, model FLOP utilisation, peak memory, share of waiting for data, and the losses side by
side. Then ours with one optimisation off at a time. --growth instead: time and memory against
tiles, tokens, packs and ranks. step.json and step.csv (step-growth.json; with --profile also
step-profile.csv) go to --out or to bench/results/DEVICE/DATE; `llava-hd bench report` draws them
and writes docs/performance.md."""
EXAMPLES = (
    "--quick",
    "--geometry 1b --layers 2 --stage both --steps 20 --out runs/step",
    "--competitors ours llava_next --stage 2 --json",
    "--device cuda --dtype bf16 --geometry 7b --batch 4 --step-samples 16 --profile",
    "--growth --quick",
)


@dataclass(frozen=True)
class Request:
    """One run. layers: of the language model, None for the geometry's own; lengths: of stage 2's
    samples; tile_px: the scale of pictures and words; batch: samples of a padded pass, of a pack on
    average; step_samples: of a step; steps: timed ones, after warm_up; rounds: processes of each
    competitor; workers: loader processes; threads: of the processor."""

    stages: tuple[int, ...] = (1, 2)
    geometry: str = "1b"
    layers: int | None = None
    lengths: str = "hd"
    tile_px: int = 56
    competitors: tuple[str, ...] = tuple(COMPETITORS)
    batch: int = 16
    step_samples: int = 16
    steps: int = 20
    warm_up: int = 1
    rounds: int = 1
    workers: int = 1
    threads: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    seed: int = 0
    quick: bool = False
    growth: bool = False
    out: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("batch", "step_samples", "steps", "warm_up", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} must be 0 or more")
        if self.layers is not None and self.layers < 1:
            raise UsageError("--layers must be 1 or more")
        if self.step_samples % self.batch:
            raise UsageError(
                f"--step-samples {self.step_samples} is not a multiple of --batch {self.batch}"
            )
        if OURS not in self.competitors:
            raise UsageError(f"--competitors: {OURS} is missing; everyone is compared with it")

    @property
    def num_steps(self) -> int:
        """Steps of a process, those before the clock starts included."""
        return self.warm_up + self.steps


def add_options(parser: Any) -> None:
    """The options, on an argparse parser or on one with the same `add_argument`."""
    add = parser.add_argument
    add("--stage", choices=("1", "2", "both"), default="both", help="of the training")
    add("--geometry", choices=GEOMETRIES, help="1b, with --quick nano, on a GPU 7b")
    add("--layers", type=int, help="of the language model; the tower is cut alike; all (1b: 4)")
    add("--lengths", choices=LENGTHS, default="hd", help="of stage 2's samples")
    add(
        "--tile-px",
        choices=TILES,
        help="scale of the samples; 56, on a GPU 224 (nano 56)",
    )
    add("--competitors", type=str, nargs="+", metavar="C", help=f"of {', '.join(COMPETITORS)}")
    add("--batch", type=int, help="samples of a padded batch, of a pack on average; 16, GPU 4")
    add("--step-samples", type=int, help="samples of a step; as many as --batch")
    add("--steps", type=int, help="timed steps; 20, with --quick 3")
    add("--rounds", type=int, default=1, help="processes of each competitor, in rotating order")
    add("--workers", type=int, help="loader processes of everyone; 1, on a GPU 8")
    add("--threads", type=int, default=1, help="threads of the processor")
    add("--device", type=str, help="cpu or cuda[:N]; cuda where there is one")
    add("--dtype", choices=tuple(DTYPES), help="fp32, on a GPU bf16")
    add("--seed", type=int, default=0, help="of weights, samples and order")
    add("--quick", action="store_true", help="nano, few steps: three minutes on two cores")
    add("--growth", action="store_true", help="how time and memory grow, instead of a race")
    add("--profile", action="store_true", help="the ten largest kernels of a step of ours too")
    add("--out", type=str, metavar="DIR", help="folder of the results")
    add("--json", action="store_true", help="print ratios, targets and the loss difference")


def request_of(args: Namespace, command: str, num_gpus: int) -> Request:
    """The request of parsed options; num_gpus: of this machine. Raises UsageError."""
    if args.out is not None and not args.out:
        raise UsageError("--out is empty; give a folder")
    for name, usual in RACE_OPTIONS.items():
        if args.growth and getattr(args, name) != usual:
            option = name.replace("_", "-")
            raise UsageError(f"--growth is no race and has no --{option}; leave one of them out")
    device = args.device or ("cuda" if num_gpus else "cpu")
    cuda = _is_cuda(device, num_gpus)
    geometry = args.geometry or ("nano" if args.quick else "7b" if cuda else "1b")
    usual_tile = 224 if cuda and geometry != "nano" else 56
    usual_layers = 4 if geometry == "1b" and not cuda else None
    batch = _given(args.batch, 8 if args.quick else 4 if cuda else 16)
    return Request(
        stages=(1, 2) if args.stage == "both" else (int(args.stage),),
        geometry=geometry,
        layers=_given(args.layers, usual_layers),
        lengths=args.lengths,
        tile_px=int(args.tile_px or usual_tile),
        competitors=_known(args.competitors, QUICK if args.quick else tuple(COMPETITORS)),
        batch=batch,
        step_samples=_given(args.step_samples, batch),
        steps=_given(args.steps, 3 if args.quick else 20),
        warm_up=1 if args.quick else 2,
        rounds=args.rounds,
        workers=_given(args.workers, 8 if cuda else 1),
        threads=args.threads,
        device=device,
        dtype=args.dtype or ("bf16" if cuda else "fp32"),
        seed=args.seed,
        quick=args.quick,
        growth=args.growth,
        out=None if args.out is None else Path(args.out),
        command=command,
    )


def _is_cuda(device: str, num_gpus: int) -> bool:
    """Whether a device is a GPU. UsageError for one that is not there, or of another kind."""
    if device == "cpu":
        return False
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if named is None:
        raise UsageError(f"--device {device}: give cpu, cuda or cuda:N")
    if not num_gpus:
        raise UsageError(f"--device {device}: torch finds no GPU here; try --device cpu")
    if int(named[1] or 0) >= num_gpus:
        raise UsageError(f"--device {device}: the last GPU here is cuda:{num_gpus - 1}")
    return True


def _given(value: Any, usual: Any) -> Any:
    return usual if value is None else value


def _known(names: Sequence[str] | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    for name in names or ():
        if name not in COMPETITORS:
            raise UsageError(f"--competitors {name}: {suggest(name, COMPETITORS)}")
    return tuple(dict.fromkeys(names)) if names else usual
