"""The kernels' microbenchmark: `llava-hd bench kernels`, or on a bare machine
`python -m llava_hd.bench.kernels`, which needs torch, numpy and einops (triton on a GPU).

For every case: inputs, the fp64 answer, every provider's answer and its errors, then the times of
those that are right, taken in turns (kernels_trial.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..hd.errors import UsageError
from .attention_providers import attention_providers
from .attention_setting import Setting
from .attention_shapes import checked_shape
from .bare_parser import bare_parser
from .kernels_cases import Case, cases_of
from .kernels_options import (
    DESCRIPTION,
    DTYPES,
    EXAMPLES,
    RefusedOption,
    Request,
    add_options,
    request_of,
)
from .kernels_providers import Call, Provider, compiled, providers_of
from .kernels_rows import COLUMNS, Row, ratios_of, row_cells, row_record
from .kernels_trial import BUDGET_S, try_case
from .measure import (
    csv_text,
    device_name,
    environment,
    json_text,
    measure_roofline,
    result_folder,
    write_results,
)

RECORD, TABLE = "kernels.json", "kernels.csv"
CPU_WARNING = "these are CPU figures; they say nothing about a GPU"
Say = Callable[[str], None]


def run_benchmark(request: Request, say: Say) -> tuple[dict[str, Any], Path]:
    """Measure, write both files, return the record and the folder.

    The record: environment, `complete` (False after an interrupt: the finished rows are kept),
    notes, rooflines by dtype, rows, ratios, kernel names. Nothing is written when no row was
    finished. Raises RefusedOption.
    """
    device = _device(request.device)
    out = _folder(request.out, device)
    record: dict[str, Any] = {
        "environment": environment(device, request.command, request.seed),
        "quick": request.quick,
        "complete": False,
        "notes": [CPU_WARNING] if device.type == "cpu" else [],
        "rooflines": {},
        "kernels": {},
    }
    say(f"{device_name(device)}, threads: {record['environment']['threads']}")
    for note in record["notes"]:
        say(f"note: {note}")
    rows: list[Row] = []
    try:
        for made in _batches(request, device, record, say):
            rows.extend(made)
        record["complete"] = True
    except KeyboardInterrupt:
        say("interrupted")
    finally:  # a failure half-way keeps what was finished, too
        record["rows"] = [row_record(row) for row in rows]
        record["ratios"] = [asdict(ratio) for ratio in ratios_of(rows)]
        if rows:
            table = csv_text([row_cells(row) for row in rows], COLUMNS)
            write_results(out, {TABLE: table, RECORD: json_text(record)})
    return record, out


def _batches(
    request: Request, device: torch.device, record: dict[str, Any], say: Say
) -> Iterator[list[Row]]:
    """The rows of each case as it is finished; fills the record's rooflines and kernels."""
    for name in request.dtypes or (("bf16",) if device.type == "cuda" else ("fp32",)):
        dtype = getattr(torch, DTYPES[name])
        roof = measure_roofline(device, dtype, request.quick, request.seed)
        record["rooflines"][name] = asdict(roof)
        say(f"{name}: {roof.tflops:.3g} TFLOP/s ({roof.product}), {roof.gbps:.4g} GB/s (copy)")
        cases = [c for op in request.ops for c in cases_of(op, request.rows, request.quick)]
        compile_call, before = None, ""
        for number, case in enumerate(cases, start=1):
            # A quick run compiles once for each operation, a full one for each shape.
            due = not request.quick or case.op != before
            if due and "compile" in request.providers and case.attention is None:
                compile_call, before = compiled(case.op, dynamic=request.quick), case.op
            asked, checkers = _providers(case, request, dtype, device, compile_call)
            rows, kernels = try_case(case, dtype, device, asked, roof, request.seed, checkers)
            for provider, names in kernels.items():
                record["kernels"][f"{case.label} {name} {provider}"] = names
            say(f"[{number}/{len(cases)}] {case.label}: {_summary(rows)}")
            yield rows


def _providers(
    case: Case,
    request: Request,
    dtype: torch.dtype,
    device: torch.device,
    compile_call: Call | None,
) -> tuple[list[Provider], list[Provider]]:
    """Who was asked, for the case and for the one at which errors are measured."""
    if case.attention is None:
        path = f"torch.compile of eager, {'dynamic' if request.quick else 'static'} shapes"
        everyone = providers_of(case, dtype, device, compile_call, path)
        asked = [p for p in everyone if p.name in request.providers]
        return asked, asked
    asked, checkers = (
        attention_providers(Setting(shape, case.attention, dtype, device), request.providers)
        for shape in (case.attention, checked_shape(case.attention))
    )
    return asked, checkers


def _summary(rows: list[Row]) -> str:
    """One line for the progress: the time of `both`, or the reason."""
    parts = []
    for row in rows:
        if row.mode == "both" and row.ms is not None:
            parts.append(f"{row.provider} {row.ms:.4g} ms")
        elif row.mode == "both" and not row.reason.startswith("not "):
            parts.append(f"{row.provider}: {row.reason}")
    return ", ".join(parts) or "nothing was timed"


def _device(name: str | None) -> torch.device:
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(chosen)
    except RuntimeError as error:
        raise RefusedOption(f"--device {chosen!r}: give cpu, cuda or cuda:N") from error
    if device.type not in BUDGET_S:
        raise RefusedOption(f"--device {chosen!r}: give cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RefusedOption(f"--device {chosen}: torch finds no CUDA device; give cpu")
        number = device.index or 0
        if number >= torch.cuda.device_count():
            raise RefusedOption(f"--device {chosen}: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(number)
    return device


def _folder(out: Path | None, device: torch.device) -> Path:
    """A folder without results: --out, or bench/results/DEVICE/DATE with a number if need be."""
    try:
        return result_folder(out, device, RECORD)
    except UsageError as error:
        raise RefusedOption(str(error)) from error


def main(words: list[str] | None = None) -> int:
    """The bare-machine entry point. Exit codes: 0 done, 2 bad usage, 75 interrupted."""
    words = sys.argv[1:] if words is None else words
    call = "python -m llava_hd.bench.kernels"
    parser = bare_parser(call, DESCRIPTION, EXAMPLES)
    add_options(parser)
    args = parser.parse_args(words)
    try:
        record, out = run_benchmark(request_of(args, f"{call} {' '.join(words)}"), tell)
    except RefusedOption as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    return report(record, out, args.json)


def tell(line: str) -> None:
    """A line of progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def report(record: dict[str, Any], out: Path, as_json: bool) -> int:
    """Print the outcome; 75 when the run was interrupted."""
    if as_json:
        print(json_text({"rows": record["rows"], "ratios": record["ratios"]}), end="")
    if record["rows"]:
        tell(f"results: {out / RECORD}, {out / TABLE}")
    if not record["complete"]:
        kept = "the finished cases are kept" if record["rows"] else "no case was finished"
        tell(f"interrupted; {kept}")
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
