"""`llava-hd merge-lora`: an adapter and its base model as one whole model, checked by logits."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..hd.errors import UsageError
from ..hd.files import check_out
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd merge-lora`."""
    parser = Parser(
        command,
        "Add a LoRA adapter to the model that it was trained on and write the whole model. Before\n"
        "anything is written, both must give the same logits for random packs in fp32.",
        [
            "llava-hd merge-lora runs/7b-hd448-lora --out runs/7b-hd448-merged",
            "llava-hd merge-lora runs/lora --base models/base --out merged --dtype fp32 --json",
        ],
    )
    add = parser.add_argument
    add("adapter", type=str, metavar="ADAPTER", help="output folder of a LoRA run")
    add("--out", type=str, required=True, metavar="DIR", help="new folder of the whole model")
    add("--base", type=str | None, metavar="DIR", help="the whole base model, if it has moved")
    add(
        "--dtype",
        type=Literal["auto", "fp32", "bf16"],
        default="auto",
        help="of the written weights; auto: that of the adapter",
    )
    add("--device", type=str, default="cpu", help="where to compute the check")
    add("--json", action="store_true", help="print the figures as JSON")
    return parser


def run(args: Namespace) -> int:
    """Merge, print how it went."""
    check_out(Path(args.out))
    import torch

    from ..model.merge import merge_folder

    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {args.device}: torch sees no GPU; use --device cpu")
    with Console(stderr=True).status("starting") as status:
        report = merge_folder(
            args.adapter,
            args.out,
            base=args.base,
            dtype=dtype,
            device=args.device,
            say=status.update,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return 0
    print(
        f"{report.out}: {report.linears} linears merged, {report.dtype}; largest difference of "
        f"logits {report.max_difference:.1e} ({report.max_relative:.1e} of the largest) over "
        f"{report.packs} random packs in fp32, {report.rounded:.1e} with the weights as written"
    )
    return 0
