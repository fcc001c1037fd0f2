"""`llava-hd export`: a model in the formats that transformers, vLLM, SGLang and llama.cpp read."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..hd.files import check_out
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd export`."""
    parser = Parser(
        command,
        "Write a model in another format: checked by reading it back, whole or not at all.\n"
        "llava_next  transformers' LlavaNext (hd448, hdflex): also vLLM, SGLang's fallback\n"
        "llava_hf    transformers' Llava (base336)\n"
        "llava       the original LLaVA layout: SGLang, LMDeploy, llama.cpp's converters",
        [
            "llava-hd export runs/vicuna-7b-hd448 --format llava_next --out exports/hd448",
            "llava-hd export runs/vicuna-7b-base336 --format llava_hf --out exports/base336 --json",
            "llava-hd export runs/vicuna-7b-hd448 --format llava --out /srv/llava-hd448",
        ],
    )
    add = parser.add_argument
    add("model", type=str, metavar="MODEL", help="model folder")
    add("--format", type=Literal["llava_next", "llava", "llava_hf"], required=True)
    add("--out", type=str, required=True, metavar="DIR", help="new folder")
    add(
        "--dtype",
        type=Literal["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="of the written weights; auto: as they are",
    )
    add("--json", action="store_true", help="print the figures as JSON")
    return parser


def run(args: Namespace) -> int:
    """Export, print how the check went."""
    check_out(Path(args.out))
    from ..model.export import export_folder

    with Console(stderr=True).status("starting") as status:
        report = export_folder(
            args.model, args.out, args.format, dtype=args.dtype, say=status.update
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return 0
    check = report.check
    print(f"{report.out}: {report.tensors} tensors, {report.dtype}, read back bit by bit")
    print(f"  {check.prompts} rendered chat templates equal the training prompt")
    if check.images:
        print(
            f"  logits in transformers, fp32, {check.images} image sizes: largest difference "
            f"{check.max_difference:.1e}"
        )
    if not check.same_ids:
        print("  note: readers split some prompts into other tokens than training did")
    return 0
