"""What a training run shows while it runs."""

from __future__ import annotations

import pytest
from rich.console import Console

from llava_hd.cli.train_progress import TrainProgress
from llava_hd.train.metrics import StepMetrics, running_mean


def metrics_of(step: int) -> StepMetrics:
    values = dict.fromkeys(("epoch", "lr", "grad_norm", "seconds"), 0.5)
    counts = dict.fromkeys(("samples", "tokens", "label_tokens", "images"), 4)
    speeds = {"tokens_per_second": 2000.0, "images_per_second": 3.0}
    return StepMetrics(step=step, loss=2.0, **values, **counts, **speeds)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(terminal, tmp_path):
    with (tmp_path / "shown").open("w", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=terminal, width=140)
        with TrainProgress(title="stage 1", console=console) as progress:
            progress.start(0, 40)
            for step in range(1, 41):
                progress.step(metrics_of(step))
    text = (tmp_path / "shown").read_text(encoding="utf-8")
    assert "loss 2.0000  2,000 tokens/s  3.0 images/s" in text and "stage 1" in text
    assert ("\x1b" in text) == terminal
    if not terminal:
        assert [line.split()[3] for line in text.splitlines()][-1] == "40/40"
        assert 8 <= len(text.splitlines()) <= 12


def test_a_running_mean_is_that_of_the_last_values():
    values = [4.0, 2.0, 6.0, 0.0, 3.0]
    for width in (1, 2, 3, 9):
        wanted = [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(5)]
        assert running_mean(values, width) == pytest.approx(wanted)
