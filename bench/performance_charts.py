"""PNG charts of the kernels' benchmark: rivals' times over ours, and rates, over the rows."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .charts import COLOURS
from .kernels_rows import Row, ratios_of

COLOUR = dict(zip(("ours", "eager", "compile", "llava"), COLOURS, strict=False)) | {
    "ours-triton": "#e8b07d",
    "sdpa-flash": "#2f9e77",
    "sdpa-cudnn": "#b5679e",
    "sdpa-efficient": "#8a8f98",
    "sdpa-math": "#5b6bbf",
    "padded": "#d4b106",
    "flex": "#c2484d",
    "varlen": "#3fb0b8",
    "xformers": "#9bb53c",
    "flash-attn": "#222222",
}
AXIS = {
    "attention_dense": "tokens of a sequence",
    "attention_tower": "tiles",
    "attention_packed": "tokens of the pack",
}
GREY = "#555555"
LINES = {"both": "-", "forward": ":"}
MODE_NAMES = {"both": "forward + backward", "forward": "forward"}
MARKERS = ("o", "s", "^")  # sizes
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
}
Key = tuple[str, str, float]  # operation, type, keep ratio: one chart each


def chart_names(rows: Sequence[Row]) -> list[str]:
    """File names of the charts that the rows give."""
    return [_name(key) for key in _keys(rows)]


def charts_of(rows: Sequence[Row], device: str) -> dict[str, bytes]:
    """PNG bytes by file name."""
    charts = {}
    for key in _keys(rows):
        own = [row for row in rows if (row.op, row.dtype, row.keep) == key]
        charts[_name(key)] = _chart(key, own, device)
    return charts


def _keys(rows: Sequence[Row]) -> list[Key]:
    return list(dict.fromkeys((row.op, row.dtype, row.keep) for row in rows if row.ms is not None))


def _name(key: Key) -> str:
    op, dtype, keep = key
    return f"{op}-{dtype}{'' if keep == 1 else f'-keep-{keep:g}'}.png"


def _chart(key: Key, rows: Sequence[Row], device: str) -> bytes:
    op, dtype, keep = key
    kept = "" if keep == 1 else f", keep {keep:g}"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.8, 3.7), layout="constrained", dpi=100)
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        figure.suptitle(f"{op}, {dtype}{kept}: {device}", fontsize=11, x=0.01, ha="left")
        _draw_ratios(left, rows)
        _draw_rates(right, rows)
        for axes in (left, right):
            axes.set_xlabel(AXIS.get(op, "visual rows"))
            axes.grid(alpha=0.25)
            _set_ticks(axes, rows)
        figure.legend(handles=_legend(rows), loc="outside lower center", ncols=4)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_ratios(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("rival's time / ours (above 1: ours is faster)")
    axes.axhline(1, color=COLOUR["ours"], linewidth=1.4)
    sizes = _sizes(rows)
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for ratio in ratios_of(rows):
        if ratio.mode in LINES:
            found.setdefault((ratio.rival, ratio.mode, ratio.size), []).append(
                (ratio.rows, ratio.ratio)
            )
    for (rival, mode, size), points in found.items():
        _line(axes, points, COLOUR[rival], LINES[mode], MARKERS[sizes.index(size)])


def _draw_rates(axes: Axes, rows: Sequence[Row]) -> None:
    by_work = any(row.tflops is not None for row in rows)
    axes.set_title(f"useful {'TFLOP/s' if by_work else 'GB/s'}, forward + backward")
    sizes = _sizes(rows)
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        rate = row.tflops if by_work else row.gbps
        if row.mode == "both" and rate is not None:
            found.setdefault((row.provider, row.size), []).append((row.rows, rate))
    for (provider, size), points in found.items():
        _line(axes, points, COLOUR[provider], "-", MARKERS[sizes.index(size)])
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)


def _line(axes: Axes, points: list[tuple[int, float]], colour: str, line: str, marker: str) -> None:
    points = sorted(points)
    x, y = [p[0] for p in points], [p[1] for p in points]
    fill = "none" if line == LINES["forward"] else "full"  # tells the mode of a single point
    axes.plot(x, y, line, color=colour, marker=marker, fillstyle=fill, markersize=4, linewidth=1.5)


def _set_ticks(axes: Axes, rows: Sequence[Row]) -> None:
    """A tick at every number of rows; no label where it would touch the one before."""
    axes.set_xscale("log", base=2)
    ticks = sorted({row.rows for row in rows})
    labels, last = [], 0.0
    for tick in ticks:
        apart = tick > 1.7 * last
        labels.append(f"{tick:,}" if apart else "")
        last = tick if apart else last
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    """Colour tells the provider, line the mode, marker the model size (where there are several)."""
    present = {row.provider for row in rows if row.ms is not None}
    made = [Line2D([], [], color=COLOUR[name], label=name) for name in COLOUR if name in present]
    for mode, line in LINES.items():
        entry = Line2D([], [], color=GREY, linestyle=line, label=MODE_NAMES[mode])
        entry.set(marker="o", markersize=4, fillstyle="none" if mode == "forward" else "full")
        made.append(entry)
    sizes = _sizes(rows)
    if len(sizes) > 1:
        for size, marker in zip(sizes, MARKERS, strict=False):
            made.append(Line2D([], [], color=GREY, linestyle="", marker=marker, label=size))
    return made


def _sizes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.size for row in rows))
