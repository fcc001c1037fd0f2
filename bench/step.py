"""`llava-hd bench step`: whole training steps of ours and of transformers' LlavaNext, in turn.

Random weights of the wanted geometry are written once as a llava_next folder, which both read, and
so are the samples' pictures. Each competitor runs in a process of its own, one after the other
(`--rounds` of them, in rotating order), takes the same steps and leaves its times, memory and
losses. A step is what a trainer waits for: reading the samples (loader processes read ahead),
forward, backward and AdamW.

`python -m llava_hd.bench.step` is the same on a bare machine (torch, transformers, pillow).
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..hd.errors import Interrupted, LlavaHDError
from ..model.nano import SHIPPED
from ..model.processor import Processor, read_tokenizer
from ..model.rival import SIZES, Sizes, save_random
from ..model.rival_training import add_processor
from .bare_parser import bare_parser
from .measure import (
    csv_text,
    device_name,
    environment,
    json_text,
    measure_roofline,
    result_folder,
    rotated,
    so_many_threads,
    write_results,
)
from .packing_data import Scale
from .step_competitors import refusal
from .step_data import StepData, write_data
from .step_flops import FORMULA, datasheet_tflops, work_of
from .step_options import (
    DESCRIPTION,
    DTYPES,
    EXAMPLES,
    OURS,
    Request,
    add_options,
    request_of,
)
from .step_process import Taken, run_process
from .step_profile import TABLE as PROFILE
from .step_rows import Found, Totals, losses_of, ratios_of, rows_of, taken_record, targets_of

RECORD, TABLE = "step.json", "step.csv"
NOTES = (
    FORMULA,
    "mfu_every_head counts the last MLP and the head for every useful token, as 6 N a token does",
    "both stages cut pictures into tiles, as LlavaNext must; lengths are drawn from rough tables",
    "one optimizer for all: torch's fused AdamW in the type of the weights",
    "the largest loss difference is relative to ours, over all steps of the first process",
    "CPU time is the training process's own: what its loader processes do is in the clock alone",
)
Say = Callable[[str], None]


def run_benchmark(
    request: Request, say: Say, profiled: bool = False
) -> tuple[dict[str, Any], Path]:
    """Measure, write both files, return the record and the folder. profiled: look into one step of
    ours too, and write step-profile.csv.

    The record: environment, request, model, data, peak (what the utilisation is a share of), rows,
    ratios, losses, targets, processes, notes, complete (False after Ctrl-C: what was finished).
    Raises UsageError for a folder with results, LlavaHDError where ours does not run; what was
    finished by then is written.
    """
    out = result_folder(request.out, torch.device(request.device), RECORD)
    with so_many_threads(request.threads):
        record, failure, profile = _measure(request, say, profiled)
    record["request"]["out"] = str(out)
    if record["rows"]:
        first = next(row for row in record["rows"] if not row["reason"])
        files = {PROFILE: csv_text(profile, list(profile[0]))} if profile else {}
        files |= {TABLE: csv_text(record["rows"], list(first)), RECORD: json_text(record)}
        write_results(out, files)
    if failure is not None:
        raise LlavaHDError(f"{failure}; {kept_words(out / RECORD)}") from failure
    return record, out


def kept_words(path: Path) -> str:
    """What a run that ends early leaves."""
    return f"what was finished is in {path}" if path.exists() else "nothing is kept"


def _measure(
    request: Request, say: Say, profiled: bool
) -> tuple[dict[str, Any], LlavaHDError | None, list[dict[str, Any]]]:
    """The record, why it is not complete where a process of ours has failed, and the profile."""
    device = torch.device(request.device)
    sizes = sizes_of(request)
    record: dict[str, Any] = {
        "environment": step_environment(request),
        "request": {**asdict(request), "out": None},
        "model": asdict(sizes),
        "data": [],
        "peak": peak_rate(request),
        "rows": [],
        "ratios": [],
        "losses": [],
        "targets": [],
        "processes": [],
        "notes": list(NOTES),
        "complete": True,
    }
    failure, profile = None, []
    say(f"{device_name(device)}, {request.dtype}, {torch.get_num_threads()} threads")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = prepare(request, sizes, folder)
        for stage, one in data.items():
            record["data"].append({"stage": stage, **describe(one)})
            say(f"stage {stage}: {record['data'][-1]}")
        found: dict[int, Found] = {stage: {} for stage in request.stages}
        reasons: dict[int, dict[str, str]] = {stage: {} for stage in request.stages}
        try:
            _race(request, folder, found, reasons, say)
            if profiled:
                say("looking into a step of ours")
                seen = run_process(request, OURS, folder, profiled=True)
                for named, kernels in seen.items():
                    profile += [{"stage": named, **row} for row in kernels["profile"]]
        except KeyboardInterrupt:
            record["complete"] = False
        except LlavaHDError as error:
            record["complete"], failure = False, error
    on_gpu = device.type == "cuda"
    for stage, own in found.items():
        if OURS not in own:
            continue
        totals = totals_of(request, data[stage], sizes, stage)
        rate = record["peak"]["tflops"]
        record["rows"] += rows_of(stage, own, reasons[stage], totals, rate)
        record["ratios"] += ratios_of(stage, own)
        record["losses"].append(losses_of(stage, own))
        for name, rounds in own.items():
            record["processes"] += [
                taken_record(stage, name, number, taken) for number, taken in enumerate(rounds)
            ]
    record["targets"] = targets_of(record["rows"], record["ratios"], on_gpu, request.geometry)
    return record, failure, profile


def sizes_of(request: Request) -> Sizes:
    """The geometry, cut to the wanted layers."""
    sizes = SIZES[request.geometry]
    return sizes if request.layers is None else sizes.cut(request.layers)


def step_environment(request: Request) -> dict[str, Any]:
    """As everywhere, and the version of transformers."""
    facts = environment(torch.device(request.device), request.command, request.seed)
    facts["versions"]["transformers"] = importlib.metadata.version("transformers")
    return facts


def peak_rate(request: Request) -> dict[str, Any]:
    """What the utilisation is a share of: the data sheet's rate, else one product measured here."""
    device = torch.device(request.device)
    listed = datasheet_tflops(device_name(device), request.dtype)
    if listed is not None:
        return {"tflops": listed, "what": "data sheet, dense, 16 bits"}
    dtype = getattr(torch, DTYPES[request.dtype])
    roof = measure_roofline(device, dtype, request.quick, request.seed)
    return {"tflops": round(roof.tflops, 5), "what": f"measured in this run: {roof.product}"}


def prepare(request: Request, sizes: Sizes, folder: Path) -> dict[int, StepData]:
    """Write weights and samples; the samples by stage."""
    device, dtype = torch.device(request.device), getattr(torch, DTYPES[request.dtype])
    tokenizer, hd = read_tokenizer(SHIPPED / "lm"), Scale(request.tile_px).hd
    save_random(folder, sizes, hd, tokenizer, dtype, device, request.seed)
    add_processor(folder)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the competitors are other processes
    processor = Processor.from_pretrained(folder)
    return {stage: write_data(request, stage, folder, processor) for stage in request.stages}


def describe(data: StepData) -> dict[str, Any]:
    """What the samples are like."""
    facts = data.facts
    total = int(data.lengths.sum())
    return {
        "samples": len(facts),
        "mean_tokens": round(total / len(facts), 1),
        "least_tokens": int(data.lengths.min()),
        "most_tokens": int(data.lengths.max()),
        "visual_share": round(sum(one.visual for one in facts) / total, 4),
        "learned_share": round(sum(one.labels for one in facts) / total, 4),
        "tiles_per_image": round(
            sum(one.tiles for one in facts) / max(1, sum(one.tiles > 0 for one in facts)), 2
        ),
    }


def totals_of(request: Request, data: StepData, sizes: Sizes, stage: int) -> Totals:
    """What the timed steps hold."""
    order = data.order(request, packs=False)
    timed = range(request.warm_up, request.num_steps)
    samples = [data.facts[int(index)] for step in timed for index in order.samples(step)]
    return Totals(
        samples=len(samples),
        images=sum(one.tiles > 0 for one in samples),
        tokens=sum(one.length for one in samples),
        work=work_of(samples, sizes, Scale(request.tile_px).hd, stage),
    )


def _race(
    request: Request,
    folder: Path,
    found: dict[int, Found],
    reasons: dict[int, dict[str, str]],
    say: Say,
) -> None:
    """Start everyone's processes in turn and collect what they leave."""
    device, dtype = torch.device(request.device), getattr(torch, DTYPES[request.dtype])
    running = []
    for name in request.competitors:
        why = refusal(name, device, dtype)
        if why is None:
            running.append(name)
            continue
        say(f"{name}: not run: {why}")
        for one in reasons.values():
            one[name] = f"not run: {why}"
    total = request.rounds * len(running)
    for number in range(request.rounds):
        for place, name in enumerate(rotated(running, number)):
            stages = run_process(request, name, folder)
            for stage in request.stages:
                values = stages[str(stage)]
                if "reason" in values:
                    reasons[stage][name] = f"failed: {values['reason']}"
                    found[stage].pop(name, None)
                elif name not in reasons[stage]:
                    found[stage].setdefault(name, []).append(Taken(**values))
            done = number * len(running) + place + 1
            say(f"[{done}/{total}] {name}: {_short(stages)}")


def _short(stages: dict[str, Any]) -> str:
    return ", ".join(
        f"stage {stage} " + (one["reason"] if "reason" in one else f"{sum(one['seconds']):.1f} s")
        for stage, one in stages.items()
    )


def main(words: Sequence[str] | None = None) -> int:
    """The bare-machine entry point; exit codes as llava-hd's."""
    words = list(sys.argv[1:] if words is None else words)
    call = "python -m llava_hd.bench.step"
    parser = bare_parser(call, DESCRIPTION, EXAMPLES)
    add_options(parser)
    args = parser.parse_args(words)
    try:
        request = request_of(args, f"{call} {' '.join(words)}", torch.cuda.device_count())
        return finish(request, args.json, lambda record: None, args.profile)
    except LlavaHDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def tell(line: str) -> None:
    """A line of progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def finish(
    request: Request,
    as_json: bool,
    show: Callable[[dict[str, Any]], None],
    profiled: bool = False,
) -> int:
    """Measure, print as JSON or by `show`. Raises Interrupted after Ctrl-C, told what is kept."""
    if request.growth:
        from .step_growth import RECORD as GROWTH
        from .step_growth import run_growth

        record, out = run_growth(request, tell)
        path, chosen = out / GROWTH, {key: record[key] for key in ("points", "curves")}
    else:
        record, out = run_benchmark(request, tell, profiled)
        path, chosen = out / RECORD, shown(record)
    if path.exists():  # not after a Ctrl-C before anything was finished
        if as_json:
            print(json_text(chosen), end="")
        else:
            show(record)
        tell(f"results: {path}")
    if not record["complete"]:
        raise Interrupted(kept_words(path))
    return 0


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """What --json prints: the ratios, the largest loss difference, the targets."""
    differences = [r["largest_loss_difference"] for r in record["rows"] if not r["reason"]]
    return {
        "ratios": record["ratios"],
        "largest_loss_difference": max(differences, default=None),
        "targets": record["targets"],
    }


if __name__ == "__main__":
    sys.exit(main())
