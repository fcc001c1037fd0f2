"""`llava-hd bench faults`: everything that docs/reliability.md promises, tried on real runs.

Each part breaks runs of the nano model in one way and counts. A part is a list of rows; a row says
by itself whether what was promised came true (`ok`). Nothing here is timed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .fault_lab import Lab
from .faults_data import data_faults
from .faults_kill import kill_both
from .faults_resume import resume_matrix
from .faults_save import failed_saves
from .faults_steps import fuzz_modalities, not_finite
from .faults_torn import resumed_past_a_broken_one, torn_writes
from .measure import device_name, environment, json_text, slug, write_results

SEED = 20261121
Progress = Callable[[str], None]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """How much is tried: kills of each stage, steps of the modality fuzz, and whether the other
    parts take all of their cases."""

    kills: int
    fuzz: int
    quick: bool
    rival: bool = True  # whether DeepSpeed's own checkpoints are killed too


FULL = Sizes(kills=100, fuzz=500, quick=False)
QUICK = Sizes(kills=2, fuzz=10, quick=True, rival=False)


def resume_part(lab: Lab, sizes: Sizes, progress: Progress) -> Rows:
    """Stopped and gone on with: bits at the same number of ranks, losses at another."""
    rows = []
    for case in resume_matrix(lab, sizes.quick, progress):
        same_ranks = case.ranks[0] == case.ranks[1]
        fine = case.bit_identical if same_ranks else case.worst_loss <= 1e-5
        if case.precision == "bf16" and not same_ranks:
            fine = case.worst_loss <= 1e-2  # two ranks round their sums in bf16
        rows.append({**case.row(), "ok": fine and not case.fault})
    return rows


def kill_part(lab: Lab, sizes: Sizes, progress: Progress) -> Rows:
    """SIGKILLs; ours must all go on, DeepSpeed's are counted beside."""
    rows = []
    for stage in (2, 3):
        for result in kill_both(lab, stage, sizes.kills, SEED, sizes.rival, progress):
            whole = not result.lost and result.equal == result.runs
            rows.append({**result.row(), "ok": whole or result.who != "llava-hd"})
    return rows


def torn_part(lab: Lab, sizes: Sizes, progress: Progress) -> Rows:
    """Files of a checkpoint broken in every way."""
    cases = torn_writes(lab, sizes.quick, progress)
    rows: Rows = [{**case.row(), "ok": case.detected and case.told} for case in cases]
    went_on = resumed_past_a_broken_one(lab)
    return [*rows, {"file": "a run with a flipped bit in its newest", "ok": went_on}]


def save_part(lab: Lab, sizes: Sizes, progress: Progress) -> Rows:
    """Saves that fail on one rank."""
    return [
        {
            **case.row(),
            "ok": case.went_on and case.older_kept and case.failed_absent and case.warned,
        }
        for case in failed_saves(lab, sizes.quick, progress)
    ]


def modality_part(lab: Lab, sizes: Sizes, progress: Progress) -> Rows:
    """Any mix of images and text over ranks and passes."""
    rows = [fuzz_modalities(lab, stage, sizes.fuzz, SEED, progress) for stage in (2, 3)]
    return [{**row, "ok": row["finished"] == sizes.fuzz and not row["hangs"]} for row in rows]


def nonfinite_part(lab: Lab, sizes: Sizes, progress: Progress) -> Rows:
    """Losses, gradients and features that are NaN."""
    return [case.row() for case in not_finite(lab, sizes.quick, progress)]


def data_part(lab: Lab, sizes: Sizes, progress: Progress) -> Rows:
    """Images and records that cannot be used, under the three policies."""
    rows = data_faults(lab, sizes.quick, progress)
    return [{**row, "ok": not row["fault"]} for row in rows]


PARTS: dict[str, Callable[[Lab, Sizes, Progress], Rows]] = {
    "resume": resume_part,
    "kill": kill_part,
    "torn": torn_part,
    "save": save_part,
    "modality": modality_part,
    "nonfinite": nonfinite_part,
    "data": data_part,
}


def run_faults(
    parts: Sequence[str], sizes: Sizes, out: Path | None, command: str, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Try the parts; returns part -> its record, which is written to `out` as soon as it is there.

    out: None writes nothing.
    """
    # Ranks are forks of this process, which must not have threads of its own.
    torch.set_num_threads(1)
    records = {}
    with tempfile.TemporaryDirectory(prefix="llava-hd-faults-") as folder:
        for part in parts:
            lab = Lab.build(Path(folder) / part)
            rows = PARTS[part](lab, sizes, progress)
            records[part] = {
                "environment": environment(torch.device("cpu"), command, SEED),
                "sizes": dict(sizes.__dict__),
                **summary(part, rows),
                "rows": rows,
            }
            if out is not None:
                write_results(out, {record_name(part): json_text(records[part])})
    return records


def record_name(part: str) -> str:
    """The file of a part's record."""
    return f"faults-{part}.json"


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records that lie in a folder of results, by part."""
    paths = {part: folder / record_name(part) for part in PARTS}
    return {
        part: json.loads(path.read_text(encoding="utf-8"))
        for part, path in paths.items()
        if path.exists()
    }


def summary(part: str, rows: Rows) -> dict[str, Any]:
    """A part in one line: what it comes to, and how many rows are not as promised."""
    return {
        "cases": len(rows),
        "failed": sum(not row["ok"] for row in rows),
        "text": SUMMARIES[part](rows),
    }


def _resume_text(rows: Rows) -> str:
    same = [row for row in rows if row["ranks"][0] == row["ranks"][1]]
    other = [row for row in rows if row["ranks"][0] != row["ranks"][1]]
    worst = {p: _worst(row for row in other if row["precision"] == p) for p in ("fp32", "bf16")}
    words = ", ".join(f"{p} {value:.1e}" for p, value in worst.items() if value is not None)
    return (
        f"{sum(row['bit_identical'] for row in same)} of {len(same)} bit-identical at the same "
        f"number of ranks; 2→1 and 1→2: largest difference of a loss {words}"
    )


def _worst(rows: Any) -> float | None:
    return max((row["worst_loss"] for row in rows), default=None)


def _kill_text(rows: Rows) -> str:
    words = []
    for who in dict.fromkeys(row["who"] for row in rows):
        mine = [row for row in rows if row["who"] == who]
        kills, lost = sum(row["kills"] for row in mine), sum(row["lost"] for row in mine)
        equal, runs = sum(row["equal"] for row in mine), sum(row["runs"] for row in mine)
        words.append(
            f"{who}: {kills - lost} of {kills} kills survived "
            f"({sum(row['aimed'] for row in mine)} aimed into a save), {equal} of {runs} runs "
            "ended with the same bits"
        )
    return "; ".join(words)


def _share(what: str) -> Callable[[Rows], str]:
    return lambda rows: f"{sum(row['ok'] for row in rows)} of {len(rows)} {what}"


def _modality_text(rows: Rows) -> str:
    done = ", ".join(f"ZeRO-{r['stage']} {r['finished']} of {r['assignments']}" for r in rows)
    return f"{done} assignments; {sum(row['hangs'] for row in rows)} hangs"


SUMMARIES: dict[str, Callable[[Rows], str]] = {
    "resume": _resume_text,
    "kill": _kill_text,
    "torn": _share("faults found, named, and the older checkpoint used"),
    "save": _share("failed saves: the run went on, older checkpoints kept, nothing half left"),
    "modality": _modality_text,
    "nonfinite": _share(
        "cases: the step skipped by all ranks and written down, or stopped in time"
    ),
    "data": _share("cases with counts equal to the injected list"),
}


def results_folder() -> Path:
    """bench/results/DEVICE/DATE, for today."""
    name = slug(device_name(torch.device("cpu")))
    return Path("bench", "results", name, f"{datetime.now():%Y-%m-%d}")


BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
TITLES = {
    "resume": "Resume matrix",
    "kill": "SIGKILL",
    "torn": "Broken checkpoint files",
    "save": "Saves that fail on one rank",
    "modality": "Images and text over ranks",
    "nonfinite": "Losses that are not finite",
    "data": "Bad images and records",
}


def page_with(text: str, records: dict[str, dict[str, Any]], folder: Path) -> str:
    """docs/reliability.md with the figures of some records between its markers."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    lines = [
        "| what | cases | not as promised | result | made by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for part, record in records.items():
        where = record["environment"]
        lines.append(
            f"| {TITLES[part]} | {record['cases']} | {record['failed']} | {record['text']} | "
            f"`{where['command']}`, {where['time'][:10]} |"
        )
    lines += ["", f"Every case is in `{folder}/faults-*.json`."]
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"
