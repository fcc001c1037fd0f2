"""The rows of the kernels' benchmark: what a case measured, figures made of times, ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from .attention_shapes import Shape, checked_shape
from .kernels_cases import Case
from .measure import Roofline, Times, quantiles


@dataclass(frozen=True)
class Row:
    """One provider in one mode at one case. Where `ms` is None, `reason` says why.

    ms: median milliseconds, with the 20 % and 80 % quantiles of `rounds` calls. host_ms: median
    time that the launching processor spends. tflops, gbps: useful work and least bytes
    (kernels_cases.py) per time. roofline: least possible time on this device over the time taken.
    peak_mib: most memory above the inputs (CUDA only). saved_mib: kept for backward. error_output,
    error_gradients: max |x - fp64|; error_vs_eager: the largest ratio to eager's own error.

    For attention, whose rows are explained in attention_shapes.py: heads, kv_heads, head_dim,
    sequences, longest (tokens); checked: the smaller shape at which errors were measured, "" for
    this one; setup_ms: what is built once for a batch and shared by all layers, outside of `ms`
    (our schedule, flex_attention's block mask).
    """

    op: str
    size: str
    rows: int
    all_rows: int
    keep: float
    tokens: int
    d: int
    f: int
    h: int
    labels: int
    vocabulary: int
    dtype: str
    provider: str
    path: str
    mode: str
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    sequences: int = 0
    longest: int = 0
    checked: str = ""
    setup_ms: float | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    rounds: int = 0
    host_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roofline: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    error_output: float | None = None
    error_gradients: float | None = None
    error_vs_eager: float | None = None
    reason: str = ""

    @property
    def case(self) -> tuple[Any, ...]:
        """What two rows must share to be compared."""
        return self.op, self.size, self.rows, self.keep, self.dtype, self.mode


COLUMNS = tuple(field.name for field in fields(Row))
KINDS = {field.name: str(field.type) for field in fields(Row)}


@dataclass(frozen=True)
class Ratio:
    """A rival's time over ours: above 1, ours is faster."""

    op: str
    size: str
    rows: int
    keep: float
    dtype: str
    mode: str
    rival: str
    ratio: float

    @property
    def case(self) -> tuple[Any, ...]:
        """The `case` of the two rows."""
        return self.op, self.size, self.rows, self.keep, self.dtype, self.mode


def blank_row(
    case: Case,
    dtype: str,
    provider: str,
    mode: str,
    path: str = "",
    reason: str = "",
    setup_ms: float | None = None,
) -> Row:
    """A row without figures."""
    shape = case.attention
    return Row(
        op=case.op,
        size=case.size,
        rows=case.rows,
        all_rows=case.all_rows,
        keep=case.keep,
        tokens=case.tokens,
        d=case.d,
        f=case.f,
        h=case.h,
        labels=case.labels,
        vocabulary=case.vocabulary,
        dtype=dtype,
        provider=provider,
        path=path,
        mode=mode,
        reason=reason,
        setup_ms=None if setup_ms is None else short(setup_ms),
        **({} if shape is None else _attention_columns(shape)),
    )


def _attention_columns(shape: Shape) -> dict[str, Any]:
    """The columns that only attention has."""
    at = checked_shape(shape)
    checked = f"{len(at.lengths)} x up to {at.longest} tokens" if at != shape else ""
    return {
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "sequences": len(shape.lengths),
        "longest": shape.longest,
        "checked": checked,
    }


def figures(
    case: Case, mode: str, itemsize: int, times: Times, roof: Roofline | None
) -> dict[str, Any]:
    """The figures of a row that follow from its times, rounded to five significant digits.

    times: of a call in one step (forward), or in the two steps of forward and backward; `both` is
    their sum in each round, `backward` the second alone.
    """
    first_step = 1 if mode == "backward" else 0
    ms, low, high = quantiles(times.total(first_step))
    flops, num_bytes = case.work(mode, itemsize)
    made: dict[str, float] = {
        "ms": ms,
        "ms_p20": low,
        "ms_p80": high,
        "host_ms": quantiles(times.host_total(first_step))[0],
        "gbps": num_bytes / ms / 1e6,
    }
    if flops:
        made["tflops"] = flops / ms / 1e9
    if roof is not None:
        made["roofline"] = roof.floor_ms(flops, num_bytes) / ms
    return {name: short(value) for name, value in made.items()} | {"rounds": len(times.device_ms)}


def short(value: float) -> float:
    """Five significant digits: more would be noise in the files."""
    return float(f"{value:.5g}")


def ratios_of(rows: Sequence[Row]) -> list[Ratio]:
    """Every rival's time over ours in the same case and mode; pairs without a time are left out."""
    ours = {row.case: row.ms for row in rows if row.provider == "ours" and row.ms}
    return [
        Ratio(
            op=row.op,
            size=row.size,
            rows=row.rows,
            keep=row.keep,
            dtype=row.dtype,
            mode=row.mode,
            rival=row.provider,
            ratio=short(row.ms / ours[row.case]),
        )
        for row in rows
        if row.provider != "ours" and row.ms and ours.get(row.case)
    ]


def row_from_text(record: dict[str, str]) -> Row:
    """A row of kernels.csv; ValueError for one that is not."""
    if tuple(record) != COLUMNS:
        raise ValueError(f"columns {', '.join(record)}; expected {', '.join(COLUMNS)}")
    values: dict[str, Any] = {}
    for name, text in record.items():
        kind = KINDS[name]
        if kind == "str":
            values[name] = text
        elif kind == "int":
            values[name] = int(text)
        else:
            values[name] = float(text) if text else None
    return Row(**values)


def row_cells(row: Row) -> dict[str, Any]:
    """The row for CSV, every column."""
    return asdict(row)


def row_record(row: Row) -> dict[str, Any]:
    """The row for JSON: what has its default value is left out."""
    defaults = {f.name: f.default for f in fields(Row) if f.default is not MISSING}
    return {n: v for n, v in asdict(row).items() if n not in defaults or v != defaults[n]}
