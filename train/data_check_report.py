"""What `check_data` found, as figures: JSON-able values and the histogram of token lengths."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..hd.plan import TooManyTokens, plan_image
from ..model.prompt import IMAGE_TAG
from .data_check import Checked
from .data_check_tokens import CHARACTERS_PER_TOKEN, CheckSettings
from .record import Record

BINS = 60
EXAMPLES = 20  # of each kind of duplicates


def report_of(checked: Checked, settings: CheckSettings) -> dict[str, Any]:
    """All figures, JSON-able; `faults` lists every single one."""
    lengths = token_lengths(checked)
    cut = int((lengths > settings.max_length).sum())
    text_only = sum(not record.images for record in checked.records)
    return {
        "records": checked.num_values,
        "bad_files": checked.count("file"),
        "bad_records": checked.count("record"),
        "bad_samples": checked.count("sample"),
        "images": checked.num_images,
        "bad_images": checked.count("image"),
        "text_only": {"records": text_only, "share": _share(text_only, len(checked.records))},
        "tokens": _spread(lengths),
        "tokens_are": "exact" if settings.tokenizer else "estimated",
        "characters_per_token": None if settings.tokenizer else CHARACTERS_PER_TOKEN,
        "visual_tokens": _spread(_array(m.visual for m in checked.measures if m and m.visual)),
        "limit": {
            "max_length": settings.max_length,
            "cut": cut,
            "share": _share(cut, len(lengths)),
        },
        "tiles": tile_counts(checked, settings),
        "image_height_px": _spread(_array(height for height, _ in checked.sizes.values())),
        "image_width_px": _spread(_array(width for _, width in checked.sizes.values())),
        "duplicates": {
            "same_id": _duplicates(checked.records, [record.id for record in checked.records]),
            "same_image_and_first_question": _duplicates(
                checked.records, _first_questions(checked)
            ),
        },
        "settings": {**asdict(settings), "hd": settings.hd.to_dict()},
        "faults": [asdict(fault) for fault in checked.faults],
    }


def is_clean(checked: Checked) -> bool:
    """Whether nothing is bad; duplicates and cut samples are no faults."""
    return not checked.faults


def token_lengths(checked: Checked) -> np.ndarray:
    """int64 `[samples]`: tokens of each sample that could be measured."""
    return _array(found.tokens for found in checked.measures if found is not None and found.tokens)


def tile_counts(checked: Checked, settings: CheckSettings) -> dict[str, int]:
    """Images by their grid, "rows x cols", the most frequent first."""
    named = Counter(_grid(size, settings) for size in checked.sizes.values())
    return dict(sorted(named.items(), key=lambda pair: (-pair[1], pair[0])))


def _grid(size: tuple[int, int], settings: CheckSettings) -> str:
    try:
        rows, cols = plan_image(size, settings.hd).grid
    except TooManyTokens:
        return "none fits"
    return f"{rows}x{cols}" if rows else "no grid"


def _first_questions(checked: Checked) -> list[Hashable | None]:
    """Images and first question of each record; None without an image."""
    found: list[Hashable | None] = []
    for record, places in zip(checked.records, checked.images, strict=True):
        keys = tuple(place.key for place in places)
        question = record.turns[0].text.replace(IMAGE_TAG, "").strip()
        found.append((keys, question) if keys else None)
    return found


def _duplicates(records: list[Record], values: Sequence[Hashable | None]) -> dict[str, Any]:
    """How many records are a second or later one of their value, and the first groups."""
    groups: dict[Hashable, list[Record]] = defaultdict(list)
    for record, value in zip(records, values, strict=True):
        if value is not None:
            groups[value].append(record)
    repeated = [group for group in groups.values() if len(group) > 1]
    return {
        "records": sum(len(group) - 1 for group in repeated),
        "groups": len(repeated),
        "examples": [[record.where for record in group[:4]] for group in repeated[:EXAMPLES]],
    }


def _array(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """Least, quantiles, greatest and mean; None of nothing."""
    if not len(values):
        return None
    names = ("min", "p05", "median", "p95", "p99", "max")
    found = np.quantile(values, (0, 0.05, 0.5, 0.95, 0.99, 1))
    spread = {name: float(value) for name, value in zip(names, found, strict=True)}
    return {**spread, "mean": float(values.mean())}


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0


def histogram_png(checked: Checked, settings: CheckSettings) -> bytes:
    """A PNG: samples by tokens, with and without image, and the length limit."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    measured = [found for found in checked.measures if found is not None and found.tokens]
    groups = {
        "with images": [found.tokens for found in measured if found.visual],
        "text only": [found.tokens for found in measured if not found.visual],
    }
    shown = {name: values for name, values in groups.items() if values}
    longest = max((max(values) for values in shown.values()), default=0)
    edges = np.linspace(0, max(longest, settings.max_length) * 1.02, BINS + 1)
    if shown:
        axes.hist(list(shown.values()), bins=edges.tolist(), stacked=True, label=list(shown))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axvline(settings.max_length, color="tab:red", linewidth=1.2, label="max_length")
    words = "" if settings.tokenizer else f" (estimated, {CHARACTERS_PER_TOKEN} characters each)"
    axes.set(xlabel=f"tokens{words}", ylabel="samples", title="Tokens of a sample")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
