"""docs/performance.md and the PNG charts, made from the results of `llava-hd bench kernels` and
(performance_steps.py) of `llava-hd bench step`.

The page is written by hand outside its two markers and by this module between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from ..hd.files import write_whole
from .attention_shapes import OPERATIONS as ATTENTION
from .kernels import RECORD
from .kernels_cases import MODES
from .kernels_options import PROVIDERS
from .kernels_rows import Row, ratios_of
from .performance_steps import StepResult, step_parts
from .performance_targets import Result, targets_table

BEGIN = "<!-- begin: written by llava-hd bench report -->"
END = "<!-- end: written by llava-hd bench report -->"
WHAT_ROWS_ARE = {
    "attention_dense": "tokens each",
    "attention_tower": "tiles",
    "attention_packed": "tokens",
}
LONGEST_KERNEL_NAME = 70
NO_GPU = (
    "**Nothing has been measured on a GPU.** The figures below are CPU figures of small shapes: "
    "they show that the benchmark works and what the torch paths cost on a CPU, and say nothing "
    "about a GPU."
)


def find_results(root: Path) -> list[Path]:
    """Folders below `root` with a kernels.json, sorted. UsageError when there is none."""
    found = sorted(path.parent for path in root.rglob(RECORD))
    if not found:
        raise UsageError(f"{root}: no {RECORD} below it; run llava-hd bench kernels, or name a DIR")
    return found


def read_result(folder: Path) -> Result:
    """The result in a folder. UsageError where there is none, DataError where it is not one."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(**row) for row in record.pop("rows"))
        for name in ("time", "device", "device_type", "command", "seed", "threads", "versions"):
            record["environment"][name]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the folder") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: not a result of llava-hd bench kernels ({type(error).__name__}: {error}); "
            "measure again"
        ) from error
    return Result(folder, record, rows)


def write_charts(result: Result) -> list[Path]:
    """Draw the result's charts beside it; returns their paths."""
    from .performance_charts import charts_of

    paths = []
    for name, png in charts_of(result.rows, result.environment["device"]).items():
        path = result.folder / name
        path.write_bytes(png)
        paths.append(path)
    return paths


def write_page(page: Path, results: Sequence[Result], steps: Sequence[StepResult] = ()) -> None:
    """Write what stands between the page's markers; the rest is left as it is."""
    text = page.read_text(encoding="utf-8")
    write_whole(page, page_text(text, results, page.parent, steps))


def page_text(
    text: str, results: Sequence[Result], beside: Path, steps: Sequence[StepResult] = ()
) -> str:
    """The page with new tables; links are relative to the folder `beside`."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"the page needs one line '{BEGIN}' and below it one '{END}'")
    newest_first = sorted(results, key=lambda r: r.environment["time"], reverse=True)
    made = "\n\n".join([*_parts(newest_first, beside), *step_parts(steps, beside)])
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{made}\n\n{text[text.index(END) :]}"


def _parts(results: Sequence[Result], beside: Path) -> Iterator[str]:
    if not any(result.on_gpu for result in results):
        yield NO_GPU
    yield "## Targets on an H200, bf16"
    yield targets_table(results)
    for result in results:
        yield from _result_parts(result, beside)


def _result_parts(result: Result, beside: Path) -> Iterator[str]:
    facts = result.environment
    kind = "" if result.on_gpu else ": CPU figures"
    yield f"## {facts['device']}, {facts['time'][:10]}{kind}"
    yield _facts(result, beside)
    for op in dict.fromkeys(row.op for row in result.rows):
        rows = [row for row in result.rows if row.op == op]
        yield f"### {op}"
        yield op_table(rows)
        yield from _charts_and_reasons(result, rows, beside)


def _facts(result: Result, beside: Path) -> str:
    facts = result.environment
    versions = ", ".join(
        f"{name} {version}" for name, version in facts["versions"].items() if version
    )
    roofs = [
        f"{name}: {roof['tflops']:.3g} TFLOP/s ({roof['product']}), "
        f"{roof['gbps']:.3g} GB/s ({roof['copy']})"
        for name, roof in result.record["rooflines"].items()
    ]
    lines = [
        f"`{facts['command']}`, seed {facts['seed']}, threads {facts['threads']}; {versions}"
        + (f"; driver {facts['driver']}" if facts["driver"] else ""),
        f"Roofline of the run: {'; '.join(roofs)}.",
        f"All rows and errors: [{RECORD}]({_link(result.folder / RECORD, beside)}).",
    ]
    if not result.record["complete"]:
        lines.append("The run was interrupted: these are the cases that were finished.")
    return "\n".join(lines)


def op_table(rows: Sequence[Row]) -> str:
    """Ours at every shape and mode: time, rates, share of the roofline, rivals' times over it."""
    rivals = [p for p in PROVIDERS if p != "ours"]
    rivals = [name for name in rivals if any(row.provider == name and row.ms for row in rows)]
    ratio = {(r.case, r.rival): r.ratio for r in ratios_of(rows)}
    eager = {row.case: row for row in rows if row.provider == "eager"}
    has_keep = any(row.keep < 1 for row in rows)
    has_setup = any(row.setup_ms is not None for row in rows if row.provider == "ours")
    has_peak = any(row.peak_mib is not None for row in rows)
    heads = [
        "size",
        WHAT_ROWS_ARE.get(rows[0].op, "rows"),
        *(["sequences; heads"] if rows[0].sequences else []),
        *(["keep"] if has_keep else []),
        "type",
        "mode",
        "path",
        "ours, ms (20-80 %)",
    ]
    heads += ["TFLOP/s", "GB/s", "of roofline", *(f"{name} / ours" for name in rivals)]
    heads += [
        *(["built once, ms"] if has_setup else []),
        "saved, MiB (eager)",
        *(["peak, MiB (eager)"] if has_peak else []),
        "error / eager's",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in sorted((r for r in rows if r.provider == "ours"), key=_order):
        other = eager.get(row.case)
        cells = [row.size, str(row.rows), *([_shape(row)] if row.sequences else [])]
        cells += [*([f"{row.keep:g}"] if has_keep else [])]
        cells += [row.dtype, row.mode, row.path, _time(row)]
        cells += [_number(row.tflops), _number(row.gbps), _number(row.roofline, "{:.0%}")]
        cells += [_number(ratio.get((row.case, name)), "{:.2f}x") for name in rivals]
        cells += [_number(row.setup_ms)] if has_setup else []
        cells += [_beside(row.saved_mib, other.saved_mib if other else None)]
        if has_peak:
            cells += [_beside(row.peak_mib, other.peak_mib if other else None)]
        cells += [_number(row.error_vs_eager, "{:.2g}")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shape(row: Row) -> str:
    """ "8 x 2048; 32 x 128": sequences and their length, heads and their dimension."""
    times = "up to" if row.op == "attention_packed" else "x"
    return f"{row.sequences} {times} {row.longest}; {row.heads} x {row.head_dim}"


def _order(row: Row) -> tuple[Any, ...]:
    return row.dtype, row.size, -row.keep, row.rows, MODES.index(row.mode)


def _time(row: Row) -> str:
    if row.ms is None or row.ms_p20 is None or row.ms_p80 is None:
        return row.reason
    return f"{row.ms:.3g} ({row.ms_p20:.3g}-{row.ms_p80:.3g})"


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "" if value is None else form.format(value)


def _beside(mine: float | None, theirs: float | None) -> str:
    if mine is None:
        return ""
    return f"{mine:.3g}" if theirs is None else f"{mine:.3g} ({theirs:.3g})"


def _charts_and_reasons(result: Result, rows: Sequence[Row], beside: Path) -> Iterator[str]:
    from .performance_charts import chart_names

    for name in chart_names(rows):
        yield f"![{name.removesuffix('.png')}]({_link(result.folder / name, beside)})"
    reasons: dict[str, dict[str, list[str]]] = {}  # reason -> provider -> cases
    for row in rows:
        if row.reason and row.mode == "both":
            cases = reasons.setdefault(row.reason, {}).setdefault(row.provider, [])
            cases.append(f"{row.size} R={row.rows}")
    lines = [f"- {_why(reason, where)}" for reason, where in reasons.items()]
    lines += _notes(result, rows)
    if lines:
        yield "\n".join(lines)


def _notes(result: Result, rows: Sequence[Row]) -> Iterator[str]:
    """Where errors were measured at another size; on CUDA, the kernels that attention ran."""
    checked = dict.fromkeys(f"{r.size}, {r.rows}: {r.checked}" for r in rows if r.checked)
    if checked:
        yield "- errors measured at a smaller size, rows of the output at this one: " + "; ".join(
            checked
        )
    if rows[0].op not in ATTENTION:
        return
    for provider in dict.fromkeys(row.provider for row in rows):
        found = {
            name[:LONGEST_KERNEL_NAME]
            for label, names in result.record["kernels"].items()
            if label.startswith(f"{rows[0].op} ") and label.endswith(f" {provider}")
            for name in names
        }
        if found:
            yield f"- {provider} ran: " + ", ".join(f"`{name}`" for name in sorted(found))


def _why(reason: str, where: Mapping[str, Sequence[str]]) -> str:
    """The providers with a reason; the cases where it is not the same for all of them."""
    names, cases = ", ".join(where), dict.fromkeys(case for at in where.values() for case in at)
    everywhere = reason.startswith("not ") and not reason.startswith("not timed")
    return f"{names}: {reason}" + ("" if everywhere else f" ({', '.join(cases)})")


def _link(path: Path, beside: Path) -> str:
    return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()
