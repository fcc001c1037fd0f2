"""`llava-hd bench pope`: questions about images per second, shared prefix against the others.

Everyone has the same weights (a llava_next folder, random unless one is given), is asked the same
questions about the same images in every round and takes its turn (the first one rotates). Timed is
what follows once images are cut and prompts are tokenised: tower, projector, prefill and decoding,
to the answers' ids on the host. The questions of an image are all different, so nothing is gained
by answering one of them once. On a CPU one thread computes, unless told otherwise, so that the
processor's own time, which other work on the machine hardly changes, can stand beside the clock's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..hd.errors import UsageError
from ..hd.grid import PRESETS, HDConfig
from ..model.llava_hd import LlavaHD
from ..model.nano import SHIPPED
from ..model.prefix import shared_length
from ..model.processor import Processor, read_tokenizer
from ..model.rival import SIZES, load_rival, save_random
from .bench_pope_race import ALONE, SHARED, Models, Request, Say, Tally, ask, differing, race
from .measure import (
    csv_text,
    device_name,
    environment,
    json_text,
    quantiles,
    result_folder,
    so_many_threads,
    write_results,
)

RECORD, TABLE = "pope.json", "pope.csv"
TARGET = 6.0  # times the questions/s of transformers' generate, the better of its two batches
NOTES = (
    "one-by-one is our own model asked each question alone; llava_next-N is transformers' "
    "LlavaNextForConditionalGeneration.generate with N prompts, padded on the left",
    "images are cut and prompts tokenised before the clock starts, for everyone",
    "answers are compared with llava_next-1, token by token",
)


def run_benchmark(request: Request, say: Say) -> tuple[dict[str, Any], Path]:
    """Measure, write both files, return the record and the folder.

    The record: environment, request, model, rows (one for each number of questions and
    contestant), check (differing answers of the untimed longer ones), ratios (questions/s of the
    shared prefix over a rival's) and targets. Raises UsageError for a folder with results.
    """
    out = result_folder(request.out, torch.device(request.device), RECORD)
    with so_many_threads(request.threads):
        record = _measure(request, say)
    record["request"]["out"] = str(out)
    table = csv_text(record["rows"], list(record["rows"][0]))
    write_results(out, {TABLE: table, RECORD: json_text(record)})
    return record, out


def _measure(request: Request, say: Say) -> dict[str, Any]:
    device = torch.device(request.device)
    record: dict[str, Any] = {
        "environment": environment(device, request.command, request.seed),
        "request": {**asdict(request), "model": request.model and str(request.model)},
        "notes": list(NOTES),
        "model": {},
        "check": [],
        "rows": [],
        "ratios": [],
        "targets": [],
    }
    say(f"{device_name(device)}, {request.dtype}, {torch.get_num_threads()} threads")
    models = load_models(request)
    record["model"] = describe(models, request)
    for number in request.questions:
        found = race(models, request, number, say, record["check"])
        record["rows"] += rows_of(found, request, number)
        record["ratios"] += ratios_of(found, request, number)
    record["targets"] = targets_of(record["ratios"], request)
    return record


def load_models(request: Request) -> Models:
    """The folder's model twice, as ours and as transformers'; a random one is made first."""
    device, dtype = torch.device(request.device), getattr(torch, request.dtype)
    with TemporaryDirectory() as temporary:
        folder = request.model
        if folder is None:
            folder, hd = Path(temporary), geometry(request.size)
            tokenizer = read_tokenizer(SHIPPED / "lm")
            save_random(folder, SIZES[request.size], hd, tokenizer, dtype, device, request.seed)
        ours = LlavaHD.from_pretrained(folder, dtype=dtype, device=device)
        if not ours.config.hd.grids:
            raise UsageError(f"--model {folder}: not a llava_next folder; it has no grids")
        processor = Processor.from_pretrained(folder)
        return Models(ours, load_rival(folder, dtype, device), processor, device, dtype)


def geometry(size: str) -> HDConfig:
    """hd448; the tests' tiny model has tiles of 56 px."""
    values = PRESETS["hd448"].to_dict()
    return HDConfig(**{**values, "tile_px": 56} if size == "tiny" else values)


def describe(models: Models, request: Request) -> dict[str, Any]:
    """What is asked: the model's sizes, tokens of a prompt, tokens that are shared."""
    ours = models.ours
    samples = ask(models, request, max(request.questions), 0)[0]
    visual = samples[0].plans[0].num_tokens
    return {
        "weights": "random" if request.model is None else str(request.model),
        "parameters": sum(p.numel() for p in ours.parameters()),
        "layers": ours.language.causal_lm.config.num_hidden_layers,
        "width": ours.language.width,
        "visual_tokens": visual,
        "prompt_tokens": round(float(np.mean([len(sample.ids) for sample in samples])), 1),
        "shared_tokens": shared_length(samples, ours.config.image_token_id),
        "attention": ours.language.causal_lm.config._attn_implementation,
        "rivals_attention": models.theirs.config.text_config._attn_implementation,
    }


def rows_of(found: dict[str, Tally], request: Request, questions: int) -> Iterator[dict[str, Any]]:
    """A row for each contestant."""
    expected = found["llava_next-1"].answers
    for name, one in found.items():
        asked = len(one.answers)
        yield {
            "questions_per_image": questions,
            "contestant": name,
            "questions_per_second": round(asked / sum(one.seconds), 4),
            "questions": asked,
            "images": request.images * request.rounds,
            "seconds": round(sum(one.seconds), 3),
            "cpu_seconds": round(sum(one.cpu_seconds), 3),
            "differing": differing(one.answers, expected),
            "peak_mib": round(one.peak_bytes / 2**20, 1) if one.peak_bytes else None,
        }


def ratios_of(
    found: dict[str, Tally], request: Request, questions: int
) -> Iterator[dict[str, Any]]:
    """Questions/s of the shared prefix over each rival's: of all rounds, and round by round."""
    ours = found[SHARED]
    for name in request.rivals:
        rival = found[name]
        median, low, high = quantiles(
            [a / b for a, b in zip(rival.seconds, ours.seconds, strict=True)]
        )
        yield {
            "questions_per_image": questions,
            "rival": name,
            "ratio": round(sum(rival.seconds) / sum(ours.seconds), 3),
            "cpu_ratio": round(sum(rival.cpu_seconds) / sum(ours.cpu_seconds), 3),
            "median": round(median, 3),
            "low": round(low, 3),
            "high": round(high, 3),
            "differing": differing(ours.answers, rival.answers),
        }


def targets_of(ratios: Sequence[dict[str, Any]], request: Request) -> list[dict[str, Any]]:
    """For each number of questions, the smallest ratios to transformers against the goal.

    On a CPU it must be reached by the clock and by the processor's time; a GPU has the clock alone.
    """
    on_cpu = torch.device(request.device).type == "cpu"
    targets = []
    for questions in request.questions:
        theirs = [
            one
            for one in ratios
            if one["questions_per_image"] == questions and one["rival"] != ALONE
        ]
        ratio = min(one["ratio"] for one in theirs)
        cpu_ratio = min(one["cpu_ratio"] for one in theirs)
        targets.append(
            {
                "questions_per_image": questions,
                "ratio": ratio,
                "cpu_ratio": cpu_ratio,
                "target": TARGET,
                "reached": min(ratio, cpu_ratio if on_cpu else ratio) >= TARGET,
            }
        )
    return targets
