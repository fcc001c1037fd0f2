"""`llava-hd import`: others' checkpoints as a model of ours."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..hd.files import check_out
from ..hd.grid import get_preset
from .parser import Parser


def build_parser(command: str) -> Parser:
    """The options of `llava-hd import`."""
    parser = Parser(
        command,
        "Write a checkpoint of others as a model folder of ours: whole, or not at all. Read are\n"
        "transformers' llava and llava_next folders of any version, the original LLaVA's folders\n"
        "(whole, LoRA, stage 1), and the parts alone. Pickles with code in them are refused.",
        [
            "llava-hd import llava-v1.6-vicuna-7b-hf --out models/llava-next",
            "llava-hd import llava-v1.5-7b --vision clip-vit-large-patch14-336 --out models/v15",
            "llava-hd import llava-v1.5-7b-lora --vision clip-vit-large-patch14-336 "
            "--language vicuna-7b-v1.5 --out models/lora",
            "llava-hd import --vision clip-vit-large-patch14 --language vicuna-7b-v1.5 "
            "--projector mm_projector.bin --preset hd448 --out models/parts",
        ],
    )
    add = parser.add_argument
    add("source", type=str | None, nargs="?", metavar="FOLDER", help="left out for parts alone")
    add("--out", type=str, required=True, metavar="DIR", help="new folder")
    add("--vision", type=str | None, metavar="DIR", help="CLIP folder, where FOLDER has none")
    add("--language", type=str | None, metavar="DIR", help="base of a LoRA folder, or a part")
    add(
        "--projector",
        type=str | None,
        metavar="PATH",
        help="mm_projector.bin or a stage-1 folder of ours, for parts; otherwise a new one",
    )
    add("--preset", type=str | None, metavar="NAME", help="geometry of parts (hd448, base336, …)")
    add("--template", type=str | None, metavar="NAME", help="conversation template")
    add(
        "--dtype",
        type=Literal["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="of the written weights; auto: as stored",
    )
    add("--json", action="store_true", help="print what was done as JSON")
    return parser


def run(args: Namespace) -> int:
    """Import, print what was done."""
    check_out(Path(args.out))
    hd = None if args.preset is None else get_preset(args.preset)
    from ..model.import_folder import import_folder

    with Console(stderr=True).status("starting") as status:
        report = import_folder(
            args.source,
            args.out,
            vision=args.vision,
            language=args.language,
            projector=args.projector,
            hd=hd,
            template=args.template,
            dtype=args.dtype,
            say=status.update,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return 0
    print(
        f"{report.out}: from {report.kind}, {report.tensors} tensors placed, {report.dtype}, "
        f"{report.rows} rows of vocabulary"
    )
    if report.left_out:
        print(f"  left out, no model needs them: {len(report.left_out)} ({report.left_out[0]}, …)")
    if report.untrained:
        print(f"  untrained, no checkpoint held them: {', '.join(report.untrained)}")
    for note in report.notes:
        print(f"  note: {note}")
    return 0
