"""`llava-hd bench tune`: block sizes measured on this GPU, as a table for kernels/backend.py.

For each kernel every candidate is first checked against fp64 (kernels_errors.py has the rule's
form: at most twice the rival's error plus a rounding) and then timed at the largest size; the best
one races its rival at every size, and is used from the size on at which it wins there and at all
larger ones. At last the two operations as a whole race plain torch in the same way. Nothing of this
ever happens inside a training step.

On a bare machine: `python -m llava_hd.bench.tune`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..kernels.backend import (
    ATTENTION,
    ELEMENTWISE,
    OPERATIONS,
    PRODUCTS,
    Blocks,
    Entry,
    Table,
    architecture,
    load_shipped,
    table_path,
    table_values,
)
from .measure import (
    device_name,
    environment,
    json_text,
    quantiles,
    short_error,
    time_interleaved,
    write_results,
)
from .tune_options import Sizes, add_options, sizes_of
from .tune_tasks import Task, operation_calls, task

# Calls by name -> median milliseconds by name, taken in turns.
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]
Say = Callable[[str], None]
CHECK_ROWS = 1000  # not a multiple of any block
TUNED_ATTENTION = tuple(name for name in ATTENTION if not name.endswith("256"))
KERNELS = (*ELEMENTWISE, *PRODUCTS, *TUNED_ATTENTION)
# The kernels that an operation always runs (a product has the library's to fall back on), and those
# that our second product runs beside itself where it writes into the sequence.
NEEDS = {
    "down": ("place", "place_grad"),
    "gelu_mlp": ("gelu_grad",),
    "place_rows": ("place", "place_grad"),
    "attention_dense": TUNED_ATTENTION,
    "attention_packed": TUNED_ATTENTION,
    "attention_tower": ("attention_tower_64",),
}
BUDGET_S = 0.5


def candidates(name: str, arch: str) -> list[Blocks]:
    """The blocks that are tried for a kernel, the shipped ones first."""
    tried = [load_shipped(arch).blocks(name)]
    if name in PRODUCTS and arch == "sm_90":
        for tma in (True, False):
            for stages in (3, 4, 5):  # a gather inside the loop takes two of them
                tried += [
                    Blocks(128, 256, 64, 8, stages, tma=tma),
                    Blocks(128, 128, 64, 4, stages, tma=tma),
                    Blocks(128, 128, 64, 8, stages, tma=tma),
                    Blocks(256, 128, 64, 8, stages, tma=tma),
                    Blocks(64, 256, 64, 4, stages, tma=tma),
                ]
    elif name in PRODUCTS:
        for stages in (3, 4):
            tried += [
                Blocks(128, 128, 32, 4, stages),
                Blocks(128, 128, 32, 8, stages),
                Blocks(128, 64, 32, 4, stages),
                Blocks(64, 128, 32, 4, stages),
                Blocks(128, 64, 64, 4, stages),
            ]
    elif name in ATTENTION:
        for stages in (1, 2, 3):
            for warps in (4, 8):
                shapes = [(64, 64), (128, 64), (64, 128), (128, 32), (32, 128)]
                shapes += [(128, 128)] if arch == "sm_90" else [(64, 32), (32, 64)]
                tried += [Blocks(r, c, warps=warps, stages=stages) for r, c in shapes]
    elif name == "gelu_grad":
        tried += [Blocks(rows, cols, warps=8) for rows in (16, 32, 64) for cols in (128, 256)]
    elif name == "place":
        tried += [Blocks(1, cols, warps=warps) for cols in (1024, 2048, 4096) for warps in (4, 8)]
    else:
        tried += [Blocks(rows, cols, warps=4) for rows in (32, 64, 128) for cols in (128, 256)]
    return list(dict.fromkeys(tried))


@dataclass(frozen=True)
class Trial:
    """One candidate: its milliseconds, or why it has none."""

    kernel: str
    blocks: Blocks
    ms: float | None
    reason: str = ""


@dataclass(frozen=True)
class Race:
    """A kernel or an operation against its rival at one size, in milliseconds."""

    name: str
    rows: int
    ms: float
    rival_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster than the rival."""
        return self.rival_ms / self.ms


def tune(
    arch: str, sizes: Sizes, device: torch.device, dtype: torch.dtype, timer: Timer, say: Say
) -> tuple[Table, list[Trial], list[Race]]:
    """The measured table (its `measured` is still empty) and everything that led to it."""
    table, trials, races = load_shipped(arch), [], []
    unusable: set[str] = set()
    for name in KERNELS:
        found = [_try(name, b, table, sizes, device, dtype) for b in candidates(name, arch)]
        if not all(trial.reason for trial in found):
            largest = task(name, max(sizes.rows), table, sizes, device, dtype)
            found = _timed(found, largest, timer)
        trials += found
        best = min((t for t in found if t.ms is not None), key=_milliseconds, default=None)
        if best is None:
            say(f"{name}: no candidate is right; it is never used ({found[0].reason})")
            unusable.add(name)
            table = _with(table, name, Entry(None, table.blocks(name)))
            continue
        start: int | None = 0
        if unusable & set(NEEDS.get(name, ())):
            start = None
            say(f"{name}: never used, for want of {', '.join(NEEDS[name])}")
        elif name in PRODUCTS:
            raced = [_race(name, best.blocks, n, table, sizes, device, dtype, timer)
                     for n in sizes.rows]  # fmt: skip
            races += raced
            start = first_win(raced)
            say(f"{name}: {best.blocks}; {_told(raced)}; used {_from(start)}")
        else:
            say(f"{name}: {best.blocks}, {best.ms:.4g} ms")
        table = _with(table, name, Entry(start, best.blocks))
    for name in OPERATIONS:
        missing = sorted(unusable & set(NEEDS[name]))
        if missing:
            say(f"{name}: never used, for want of {', '.join(missing)}")
            table = _with(table, name, Entry(None, None))
            continue
        raced = []
        for rows in sizes.rows:
            ms = timer(operation_calls(name, rows, table, sizes, device, dtype))
            rivals = [value for rival, value in ms.items() if rival != "ours"]
            raced.append(Race(name, rows, ms["ours"], min(rivals)))
        races += raced
        table = _with(table, name, Entry(first_win(raced), None))
        say(f"{name}: {_told(raced)}; used {_from(first_win(raced))}")
    return table, trials, races


def _milliseconds(trial: Trial) -> float:
    assert trial.ms is not None
    return trial.ms


def first_win(races: Sequence[Race]) -> int | None:
    """The fewest rows from which on every race is won; None where the largest one is lost."""
    start = None
    for race in sorted(races, key=lambda race: -race.rows):
        if race.ratio <= 1.0:
            break
        start = race.rows
    return start


def _try(
    name: str, blocks: Blocks, table: Table, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Trial:
    """Compile and check a candidate; a reason where it does not run or is wrong."""
    small = task(name, CHECK_ROWS, table, sizes, device, dtype)
    try:
        reason = wrong(small, blocks)
    except Exception as error:  # too large for the chip, or beyond the compiler: that is the result
        reason = short_error(error)
    return Trial(name, blocks, None, reason)


def wrong(small: Task, blocks: Blocks) -> str:
    """ "" for blocks whose results are as exact as the rival's, else what differs.

    Largest error at most twice the rival's plus a rounding step of the largest value."""
    ours, theirs = small.fresh(lambda made: made.ours(blocks)), small.fresh(lambda m: m.rival())
    for place, (mine, other, exact) in enumerate(zip(ours, theirs, small.exact(), strict=True)):
        error, allowed = ((t.double() - exact).abs().max().item() for t in (mine, other))
        floor = torch.finfo(mine.dtype).eps * exact.abs().max().item()
        if not error <= 2 * allowed + floor:
            return f"result {place}: error {error:.3g}, rival {allowed:.3g}, rounding {floor:.3g}"
    return ""


def _timed(found: Sequence[Trial], largest: Task, timer: Timer) -> list[Trial]:
    def call_of(blocks: Blocks) -> Callable[[], object]:
        return lambda: largest.ours(blocks)

    right = {str(i): call_of(t.blocks) for i, t in enumerate(found) if not t.reason}
    ms = timer(right)
    return [replace(t, ms=ms.get(str(i))) for i, t in enumerate(found)]


def _race(
    name: str, blocks: Blocks, rows: int, table: Table, sizes: Sizes, device: torch.device,
    dtype: torch.dtype, timer: Timer,
) -> Race:  # fmt: skip
    made = task(name, rows, table, sizes, device, dtype)
    ms = timer({"ours": lambda: made.ours(blocks), "rival": made.rival})
    return Race(name, rows, ms["ours"], ms["rival"])


def _with(table: Table, name: str, entry: Entry) -> Table:
    return replace(table, entries={**table.entries, name: entry})


def _told(races: Sequence[Race]) -> str:
    return ", ".join(f"{race.ratio:.3f}x at {race.rows}" for race in races)


def _from(start: int | None) -> str:
    return "never" if start is None else f"from {start} rows"


def device_timer(device: torch.device) -> Timer:
    """Medians on the device, the calls in turns (measure.py)."""

    def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        steps = {name: (lambda _, call=call: call(),) for name, call in calls.items()}
        times = time_interleaved(steps, device, BUDGET_S * max(1, len(calls)))
        return {name: quantiles(times[name].total())[0] for name in calls}

    return timer


def tune_device(sizes: Sizes, out: str | None, command: str, say: Say) -> Path:
    """Tune the current GPU in bf16, write its table and, beside it, the record of all times.

    Returns the table's path. Raises ValueError without a GPU that the kernels serve.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench tune measures a GPU, and torch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    arch = architecture(*capability)
    if arch is None:
        raise ValueError(f"compute capability {capability} is older than 8.0")
    path = table_path(arch) if out is None else Path(out)
    facts = environment(device, command, sizes.seed)
    say(f"{device_name(device)}: table {arch}, widths {sizes.widths}, rows {sizes.rows}")
    table, trials, races = tune(arch, sizes, device, torch.bfloat16, device_timer(device), say)
    versions = facts["versions"]
    measured = (
        f"{facts['device']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"{facts['time'][:10]}"
    )
    record = {
        "environment": facts,
        "sizes": asdict(sizes),
        "trials": [{**asdict(trial), "blocks": vars(trial.blocks)} for trial in trials],
        "races": [{**asdict(race), "ratio": race.ratio} for race in races],
    }
    record_name = f"{path.stem}.times.json"
    values = table_values(replace(table, measured=measured))
    write_results(path.parent, {record_name: json_text(record), path.name: json_text(values)})
    say(f"written: {path} (times in {record_name})")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The bare machine's entry point: 0, or 2 for bad usage."""
    parser = argparse.ArgumentParser("python -m llava_hd.bench.tune", description=__doc__)
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        tune_device(sizes_of(args), args.out, " ".join(sys.argv), print)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
