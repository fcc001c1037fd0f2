"""`llava-hd nano build`: make the shipped nano towers and the nano language model again."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from ..bench.nano import PARTS, build
from ..bench.nano_lm import LanguageRecipe
from ..bench.nano_towers import TowerRecipe
from ..hd.errors import UsageError
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd nano build`."""
    parser = Parser(
        command,
        "Train the nano CLIP towers and the nano language model from a seed, and write them as "
        "transformers folders. The defaults made the shipped weights. Measured with one thread "
        "each on two busy cores: tower56 20 minutes, tower84 38, the language model 35. "
        "A cut run goes on from its checkpoint in OUT/work when the command is given again.",
        [
            "llava-hd nano build --out runs/nano",
            "llava-hd nano build --out runs/nano --parts tower84 & "
            "llava-hd nano build --out runs/nano --parts tower56,lm",
        ],
    )
    parser.add_argument("--out", type=str, required=True, help="folder of the parts")
    parser.add_argument(
        "--parts", type=str, default=",".join(PARTS), help="comma-separated list of parts"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the scenes")
    parser.add_argument("--steps", type=int, default=TowerRecipe.steps, help="steps of each tower")
    parser.add_argument(
        "--lm_steps",
        type=int,
        default=LanguageRecipe.steps,
        help="steps of the language model's first phase; the second has a sixth of them",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the training")
    return parser


def run(args: Namespace) -> int:
    """Build the parts; 0 when all are written."""
    for name in ("steps", "lm_steps", "threads"):
        if getattr(args, name) < 1:
            raise UsageError(f"nano build: --{name} {getattr(args, name)}: give 1 or more")
    torch.set_num_threads(args.threads)
    build(
        out=Path(args.out),
        parts=args.parts.split(","),
        seed=args.seed,
        tower_steps=args.steps,
        lm_steps=args.lm_steps,
        progress=lambda line: print(line, flush=True),
    )
    return 0
