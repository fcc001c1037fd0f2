"""docs/performance.md and the PNG charts, made from the results of `llava-hd bench kernels`.

The page is written by hand outside its two markers and by this module between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from .files import write_whole
from .kernels import RECORD
from .kernels_cases import MODES
from .kernels_rows import Row, ratios_of

BEGIN = "<!-- begin: written by llava-hd bench report -->"
END = "<!-- end: written by llava-hd bench report -->"
RIVALS = ("eager", "compile", "llava")
NO_GPU = (
    "**Nothing has been measured on a GPU.** The figures below are CPU figures of small shapes: "
    "they show that the benchmark works and what the torch paths cost on a CPU, and say nothing "
    "about a GPU."
)


@dataclass(frozen=True)
class Result:
    """One kernels.json: its folder, everything but the rows, the rows."""

    folder: Path
    record: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def environment(self) -> dict[str, Any]:
        """Device, versions, command, seed."""
        return self.record["environment"]

    @property
    def on_gpu(self) -> bool:
        """Whether the figures are a GPU's."""
        return self.environment["device_type"] == "cuda"


@dataclass(frozen=True)
class Target:
    """A goal of the project: the least ratio to a rival (or the most saved memory, as a share of
    the rival's) among the rows that `applies` picks."""

    text: str
    goal: float
    rival: str
    applies: Callable[[Row], bool]
    saved: bool = False


def _at(op: str, mode: str, low: int, high: int, keep: float = 1.0) -> Callable[[Row], bool]:
    return lambda row: (
        (row.op, row.mode, row.size) == (op, mode, "7B")
        and low <= row.rows <= high
        and row.keep == keep
    )


TARGETS = (
    Target(
        "projector, forward and backward, R = 16k and 65k",
        1.06,
        "eager",
        _at("gelu_mlp", "both", 16384, 65536),
    ),
    Target(
        "projector, activations saved for backward, R = 16k and 65k",
        0.5,
        "eager",
        _at("gelu_mlp", "both", 16384, 65536),
        saved=True,
    ),
    Target(
        "projector, forward, R = 1k to 3k", 1.3, "eager", _at("gelu_mlp", "forward", 1000, 3000)
    ),
    Target(
        "gather, project, row-ends, place: forward, all rows kept, R from 16k",
        1.18,
        "llava",
        _at("project_place", "forward", 16000, 70000),
    ),
    Target(
        "the same at keep ratio 0.7",
        1.6,
        "llava",
        _at("project_place", "forward", 11000, 50000, keep=0.7),
    ),
    Target("never slower than eager, at any size", 1.0, "eager", lambda row: True),
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


def write_page(page: Path, results: Sequence[Result]) -> None:
    """Write what stands between the page's markers; the rest is left as it is."""
    text = page.read_text(encoding="utf-8")
    write_whole(page, page_text(text, results, page.parent))


def page_text(text: str, results: Sequence[Result], beside: Path) -> str:
    """The page with new tables; links are relative to the folder `beside`."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"the page needs one line '{BEGIN}' and below it one '{END}'")
    newest_first = sorted(results, key=lambda r: r.environment["time"], reverse=True)
    made = "\n\n".join(_parts(newest_first, beside))
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{made}\n\n{text[text.index(END) :]}"


def _parts(results: Sequence[Result], beside: Path) -> Iterator[str]:
    if not any(result.on_gpu for result in results):
        yield NO_GPU
    yield "## Targets on an H200, bf16"
    yield targets_table(results)
    for result in results:
        yield from _result_parts(result, beside)


def targets_table(results: Sequence[Result]) -> str:
    """Each target and what the newest full GPU result (bf16) has reached: the worst of its rows."""
    lines = ["| what | against | target | measured |", "|---|---|---|---|"]
    for target in TARGETS:
        sign = "<=" if target.saved else ">="
        goal = f"{sign} {target.goal:g}x"
        lines.append(f"| {target.text} | {target.rival} | {goal} | {_reached(target, results)} |")
    return "\n".join(lines)


def _reached(target: Target, results: Sequence[Result]) -> str:
    for result in results:
        if not result.on_gpu or result.record["quick"]:
            continue
        rows = [row for row in result.rows if row.dtype == "bf16" and target.applies(row)]
        values = _saved_shares(rows, target.rival) if target.saved else _ratios(rows, target.rival)
        if values:
            worst = max(values) if target.saved else min(values)
            met = worst <= target.goal if target.saved else worst >= target.goal
            return f"{worst:.3f}x, {'met' if met else 'not met'} ({result.environment['device']})"
    return "not measured"


def _ratios(rows: Sequence[Row], rival: str) -> list[float]:
    return [ratio.ratio for ratio in ratios_of(rows) if ratio.rival == rival]


def _saved_shares(rows: Sequence[Row], rival: str) -> list[float]:
    theirs = {row.case: row.saved_mib for row in rows if row.provider == rival}
    return [
        row.saved_mib / other
        for row in rows
        if row.provider == "ours" and row.saved_mib is not None and (other := theirs.get(row.case))
    ]


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
    rivals = [name for name in RIVALS if any(row.provider == name and row.ms for row in rows)]
    ratio = {(r.case, r.rival): r.ratio for r in ratios_of(rows)}
    eager = {row.case: row for row in rows if row.provider == "eager"}
    has_keep = any(row.keep < 1 for row in rows)
    has_peak = any(row.peak_mib is not None for row in rows)
    heads = [
        "size",
        "rows",
        *(["keep"] if has_keep else []),
        "type",
        "mode",
        "path",
        "ours, ms (20-80 %)",
    ]
    heads += ["TFLOP/s", "GB/s", "of roofline", *(f"{name} / ours" for name in rivals)]
    heads += ["saved, MiB (eager)", *(["peak, MiB (eager)"] if has_peak else []), "error / eager's"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in sorted((r for r in rows if r.provider == "ours"), key=_order):
        other = eager.get(row.case)
        cells = [row.size, str(row.rows), *([f"{row.keep:g}"] if has_keep else [])]
        cells += [row.dtype, row.mode, row.path, _time(row)]
        cells += [_number(row.tflops), _number(row.gbps), _number(row.roofline, "{:.0%}")]
        cells += [_number(ratio.get((row.case, name)), "{:.2f}x") for name in rivals]
        cells += [_beside(row.saved_mib, other.saved_mib if other else None)]
        if has_peak:
            cells += [_beside(row.peak_mib, other.peak_mib if other else None)]
        cells += [_number(row.error_vs_eager, "{:.2g}")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _order(row: Row) -> tuple[Any, ...]:
    return row.dtype, row.size, -row.keep, row.rows, MODES.index(row.mode)


def _time(row: Row) -> str:
    if row.ms is None or row.ms_p20 is None or row.ms_p80 is None:
        return row.reason
    return f"{row.ms:.3g} ({row.ms_p20:.3g}-{row.ms_p80:.3g})"


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "" if value is None else form.format(value)


def _beside(mine: float | None, theirs: float | None) -> str:
    return "" if mine is None else f"{mine:.3g} ({_number(theirs)})"


def _charts_and_reasons(result: Result, rows: Sequence[Row], beside: Path) -> Iterator[str]:
    from .performance_charts import chart_names

    for name in chart_names(rows):
        yield f"![{name.removesuffix('.png')}]({_link(result.folder / name, beside)})"
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason and row.mode == "both":
            reasons.setdefault((row.provider, row.reason), []).append(f"{row.size} R={row.rows}")
    if reasons:
        yield "\n".join(f"- {_why(*key, where)}" for key, where in reasons.items())


def _why(provider: str, reason: str, where: Sequence[str]) -> str:
    everywhere = reason.startswith("not ")
    return f"{provider}: {reason}" + ("" if everywhere else f" ({', '.join(where)})")


def _link(path: Path, beside: Path) -> str:
    return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()
