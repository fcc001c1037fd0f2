"""PNG charts of `bench step`: what each competitor's step costs, and how time and memory grow."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .charts import COLOURS
from .performance_charts import GREY, STYLE
from .step_options import OURS, RIVALS

FEWEST = 5  # bars that a panel has room for
MEASURES = {"seconds": ("time, s", COLOURS[0]), "peak_mib": ("memory, MiB", COLOURS[1])}


def step_chart(record: dict[str, Any]) -> bytes:
    """Bars of each competitor's time over ours, a panel for each stage."""
    stages = list(dict.fromkeys(row["stage"] for row in record["rows"]))
    ratios = {(one["stage"], one["rival"]): one for one in record["ratios"]}
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(stages), record["environment"]["device"])
        for stage, axes in zip(stages, panels, strict=True):
            names = [name for at, name in ratios if at == stage]
            values = [ratios[stage, name]["ratio"] for name in names]
            colours = [COLOURS[1] if name in RIVALS else COLOURS[0] for name in names]
            places = np.arange(len(names))[::-1]
            axes.barh(places, values, color=colours, height=0.6)
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, f" {value:.2f}", va="center", color=GREY)
            axes.set_yticks(places, names)
            spare = max(0, FEWEST - len(names)) / 2  # one bar alone fills no panel
            axes.set_ylim(-0.5 - spare, len(names) - 0.5 + spare)
            axes.axvline(1, color=GREY, linewidth=1)
            axes.set_xlabel(f"time of the same steps / {OURS}")
            axes.set_title(f"stage {stage}")
        return _png(figure)


def growth_chart(record: dict[str, Any]) -> bytes:
    """Time and memory over each axis, with the fitted curves."""
    axis_names = list(dict.fromkeys(point["axis"] for point in record["points"]))
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(axis_names), record["environment"]["device"])
        for name, axes in zip(axis_names, panels, strict=True):
            _grow(axes, name, record)
        return _png(figure)


def _grow(axes: Axes, name: str, record: dict[str, Any]) -> None:
    points = [point for point in record["points"] if point["axis"] == name]
    fits = {one["measure"]: one for one in record["curves"] if one["axis"] == name}
    x = np.array([point["x"] for point in points], dtype=float)
    dense = np.geomspace(x.min(), x.max(), 60)
    for place, (measure, (label, colour)) in enumerate(MEASURES.items()):
        own = axes if place == 0 else axes.twinx()
        own.set_ylabel(label, color=colour)
        if measure not in fits:
            own.set_yticks([])
            continue
        found = fits[measure]
        values = [point[measure] for point in points]
        own.plot(x, values, "o", color=colour, markersize=4)
        curve = found["fixed"] + found["factor"] * dense ** found["exponent"]
        own.plot(dense, curve, color=colour, linewidth=1)
        own.set_ylim(0, 1.08 * max(values))
    exponents = ", ".join(
        f"{MEASURES[measure][0].partition(',')[0]} x^{one['exponent']:.2f}"
        for measure, one in fits.items()
        if measure in MEASURES
    )
    axes.set_title(exponents)
    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # all axes count something


def _figure(panels: int, device: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * panels, 3.5), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    figure.suptitle(device, fontsize=11, x=0.01, ha="left")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
