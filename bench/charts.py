"""Charts for the HTML reports: matplotlib figures as inline SVG that follow the page's colours.

Text and axes take the colour of the surrounding text (`currentColor`) and the background is
transparent, so one chart serves light and dark pages. A chart with a name is drawn as PNG, too, on
white. No window system, no global figure.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .bootstrap import Estimate
from .contestants import interval
from .report import Chart

COLOURS = ("#d9782d", "#2b84c6", "#2f9e77", "#b5679e", "#c2a02c", "#5b6bb5", "#7f5539", "#4ea5a8")
GREY = "#8a8f98"
PNG_DPI = 160
VALUES_UP_TO = 16  # bars; above, their values would stand in each other's way
INK = "#010203"  # stands for currentColor until the SVG is written
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "path",  # looks the same wherever the file is opened
    "svg.hashsalt": "llava-hd",  # the same chart gives the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str = "step",
    y_label: str = "loss",
    smooth: int | None = None,
) -> Chart:
    """Lines by name, each (x values, y values).

    `smooth` draws the mean of the last that many points over the faint line; None takes a 50th of
    the longest line.
    """
    if smooth is None:
        smooth = max(1, max((len(y) for _, y in series.values()), default=1) // 50)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(7.2, 3.4, title)
        for colour, (name, (x, y)) in zip(_cycle(len(series)), series.items(), strict=True):
            if smooth > 1:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, trailing_mean(y, smooth), color=colour, linewidth=1.8, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.18, color=INK)
        if len(series) > 1:
            axes.legend()
        names = ", ".join(series)
        return _chart(figure, f"{title}: {y_label} over {x_label} for {names}")


def bar_chart(
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Estimate]],
    y_label: str = "F1",
    name: str = "",
) -> Chart:
    """Bars from 0 for each group and name, with their intervals and, if there are few, values."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(7.2, 3.4, title)
        width = 0.76 / max(1, len(series))
        tallest = 0.0
        few = len(groups) * len(series) <= VALUES_UP_TO
        for place, (colour, label) in enumerate(zip(_cycle(len(series)), series, strict=True)):
            estimates = series[label]
            x = np.arange(len(groups)) + (place - (len(series) - 1) / 2) * width
            axes.bar(
                x,
                [e.value for e in estimates],
                width=width * 0.9,
                color=colour,
                label=label,
                yerr=_whiskers(estimates),
                error_kw={"ecolor": INK, "elinewidth": 1.1, "capsize": 2.5},
            )
            for at, e in zip(x, estimates, strict=True):
                top = e.span[1]
                tallest = max(tallest, top)
                axes.annotate(
                    f"{e.value:.3f}" if few else "",
                    (at, top),
                    textcoords="offset points",
                    xytext=(0, 4),
                    ha="center",
                    fontsize=8.5,
                )
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(y_label)
        axes.set_ylim(0, max(tallest, 1e-9) * 1.14)
        axes.grid(axis="y", alpha=0.18, color=INK)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=min(4, max(1, len(series))))
        return _chart(figure, f"{title}: {y_label} of {', '.join(series)}", name)


def difference_chart(
    title: str,
    rows: Sequence[tuple[str, Estimate]],
    x_label: str,
    name: str = "",
    dots: Sequence[Sequence[float]] = (),
) -> Chart:
    """One row per (name, difference): the point, its 95 % interval, the line of no difference.

    dots: for each row, single differences (of one seed each) that the point stands for.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(7.2, 0.9 + 0.34 * len(rows), title)
        axes.axvline(0, color=INK, linewidth=1, alpha=0.6)
        for place, (label, e) in enumerate(rows):
            colour = COLOURS[1 if e.value > 0 else 0] if e.clear else GREY
            y = len(rows) - place
            axes.plot(e.span, [y, y], color=colour, linewidth=2.4)
            axes.plot([e.value], [y], "o", color=colour, markersize=6)
            for value in dots[place] if dots else ():
                axes.plot([value], [y - 0.22], "|", color=INK, markersize=6, alpha=0.7)
            axes.annotate(
                interval(e, signed=True),
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8.5,
                fontweight="bold" if label.startswith("mean") else "normal",
            )
        axes.set_yticks(range(len(rows), 0, -1), [label for label, _ in rows])
        axes.set_ylim(0.4, len(rows) + 0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", alpha=0.18, color=INK)
        return _chart(figure, f"{title}: differences with 95 % intervals", name)


def square_chart(
    title: str, names: Sequence[str], values: Sequence[Sequence[float | None]], name: str = ""
) -> Chart:
    """A square table of numbers up to 1 as colours, with the numbers written in; None is empty."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(7.2, 1.2 + 0.55 * len(names), title)
        table = np.array([[np.nan if v is None else v for v in row] for row in values])
        axes.imshow(table, cmap="Blues", vmin=min(0.0, float(np.nanmin(table))), vmax=1.4)
        for row, column in zip(*np.nonzero(~np.isnan(table)), strict=True):
            axes.annotate(
                f"{table[row, column]:.2f}", (column, row), ha="center", va="center",
                color="black", fontsize=9,
            )  # fmt: skip
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _chart(figure, f"{title}: {', '.join(names)}", name)


def trailing_mean(values: Sequence[float], length: int) -> np.ndarray:
    """float64 `[n]`: the mean of each value and up to `length - 1` values before it."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    stop = np.arange(1, len(sums))
    start = np.maximum(0, stop - length)
    return (sums[stop] - sums[start]) / (stop - start)


def _axes(width_in: float, height_in: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _cycle(number: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(number)]


def _whiskers(estimates: Sequence[Estimate]) -> np.ndarray:
    """`[2 n]` lengths below and above each value."""
    pairs = [(e.value - e.span[0], e.span[1] - e.value) for e in estimates]
    return np.array(pairs).reshape(-1, 2).clip(min=0).T


def _chart(figure: Figure, alt: str, name: str = "") -> Chart:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(INK, "currentColor")
    png = io.BytesIO()
    if name:
        figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": ""})
    return Chart(text[text.index("<svg") :], alt, name=name, png=png.getvalue())
