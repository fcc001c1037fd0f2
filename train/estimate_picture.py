"""The tokens of images and of samples, as a picture."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .estimate_samples import Samples

BINS = 60


def tokens_png(samples: Samples) -> bytes:
    """A PNG: histograms of the visual tokens of an image and of all tokens of a sample."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, values, words in zip(
        figure.subplots(2, 1, sharex=True),
        (samples.images, samples.total),
        ("images", "samples"),
        strict=True,
    ):
        axes.hist(values, bins=BINS, color="tab:blue")
        axes.set(ylabel=words)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    kind = samples.source.partition(" ")[0].rstrip(":")
    figure.axes[0].set_title(f"Tokens of images and samples, {kind}")
    figure.axes[1].set_xlabel("tokens")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
