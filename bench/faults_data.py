"""Bad images and bad records under each policy: what a run counts is what was put in, no more and
no less.

Each fault by itself through the reader of a run and through the pass that counts tokens before it;
then all of them among as many good samples in real runs of two ranks.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..model.processor import Processor
from ..train.bad_samples import BadSample
from ..train.config import BAD_SAMPLES_FILE, NONFINITE_FILE, TrainConfig
from ..train.dataset import BadPass, Passes, RecordReader
from ..train.lengths import LengthReader
from ..train.run import build_model, train
from ..train.sources import open_records
from .fault_lab import Hook, Lab, in_child, losses, start_ranks
from .faults_images import image_faults
from .faults_records import (
    KINDS,
    MAX_LENGTH,
    Due,
    FaultyData,
    file_faults,
    write_image_data,
    write_record_data,
)

Progress = Callable[[str], None]
Row = dict[str, Any]
POLICIES = ("error", "skip", "text_only")
BAD_DATA = 3  # exit code
RUN_SECONDS = 180.0


def read_alone(data: FaultyData, processor: Processor, policy: str) -> list[str]:
    """What is not as it should be when a run with this policy reads each record by itself."""
    records = open_records([data.path], data.images, tolerant=True)
    reader = RecordReader(records, data.images, processor, None, MAX_LENGTH)
    counting = LengthReader(records, records.image, processor, None, MAX_LENGTH)
    passes = Passes(reader, processor, bad_samples=policy)  # type: ignore[arg-type]
    wrong = [] if len(records) == data.count else [f"{len(records)} records, not {data.count}"]
    for index in range(len(records)):
        due = data.due.get(index)
        name = due.name if due else f"record {index}"
        try:
            found, early = passes[(index,)], counting(index).fault
        except Exception as error:  # what would end a loader process
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            continue
        reasons = [found.message] if isinstance(found, BadPass) else [b.reason for b in found.bad]
        wrong += [f"{name}: {fault}" for fault in _faults_of(data, due, [*reasons, early or ""])]
        kept = due is not None and due.keeps_text and policy == "text_only"
        if policy == "error":
            as_due = isinstance(found, BadPass) == (due is not None)
        else:
            bad = () if due is None else (BadSample(index, reasons[0] if reasons else "", kept),)
            stays = due is None or kept
            as_due = not isinstance(found, BadPass) and found.bad == bad
            as_due = as_due and len(found.batch.names) == stays  # type: ignore[union-attr]
        if not as_due:
            wrong.append(f"{name}: under {policy} it became {found!r:.300}")
        if (early is not None) != (due is not None and due.early):
            wrong.append(f"{name}: before training it was {early or 'good'}")
    return wrong


def _faults_of(data: FaultyData, due: Due | None, reasons: Sequence[str]) -> Iterator[str]:
    """What is wrong with messages."""
    for reason in filter(None, reasons):
        words = (str(data.path), due.place, due.says) if due else ()
        missing = [word for word in words if word not in reason]
        if due is None or missing or "\n" in reason:
            yield f"{reason!r} lacks {missing}"


@dataclass(frozen=True)
class Run:
    """A training run that has ended."""

    config: TrainConfig
    codes: list[int] | None
    log: str

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def lines(self) -> list[dict[str, Any]]:
        """Of bad_samples.jsonl."""
        path = self.folder / BAD_SAMPLES_FILE
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.split("\n") if line]

    def told(self) -> list[str]:
        """What the ranks said on leaving. They write at the same time, so a line may begin behind
        another one."""
        said = [part.strip() for part in re.split(r"(?=rank \d+: )", self.log)]
        return [
            part for part in said if part.startswith("rank ") and "another rank has" not in part
        ]

    def row(self, part: str, ranks: int, **more: Any) -> Row:
        data = self.config.data
        return {
            "part": part,
            "policy": data.bad_samples,
            "batching": data.batching,
            "workers": data.num_workers,
            "ranks": ranks,
            **more,
        }


def run(lab: Lab, name: str, ranks: int = 2, hook: Hook | None = None, **settings: Any) -> Run:
    """Train in the lab, with a cache of lengths that is its own."""
    config = lab.config(name, **settings)
    log = lab.folder / f"{name}.log"

    def body() -> None:
        os.environ["XDG_CACHE_HOME"] = str(lab.folder / "cache")
        train(config)

    codes = start_ranks(ranks, body, log, hook).wait(RUN_SECONDS)
    return Run(config, codes, log.read_text(encoding="utf-8") if log.exists() else "")


def count_fault(run: Run, data: FaultyData, ranks: int) -> str:
    """What is not as it should be with a run that left out, or kept the text of, every fault."""
    lines = run.lines()
    found = sorted(line["index"] for line in lines)
    keeps = run.config.data.bad_samples == "text_only"
    if run.codes != [0] * ranks:
        return f"ended with {run.codes}: {run.log[-300:]}"
    if found != sorted(data.due):
        extra, lost = sorted(set(found) - set(data.due)), sorted(set(data.due) - set(found))
        return f"counted {len(found)}: {extra} too many, {lost} too few"
    for line in lines:
        due = data.due[line["index"]]
        if line["kept_text"] != (keeps and due.keeps_text) or due.says not in line["reason"]:
            return f"{due.name}: {line}"
    if not all(map(math.isfinite, losses(run.folder))) or (run.folder / NONFINITE_FILE).exists():
        return "a loss is not finite"
    return ""


def stop_fault(run: Run, ranks: int, says: str) -> str:
    """What is not as it should be with a run that bad data must stop, by words of its message."""
    if run.codes != [BAD_DATA] * ranks:
        return f"ended with {run.codes}: {run.log[-300:]}"
    told = run.told()
    if not told or not all(says in line and "\n" not in line for line in told):
        return f"told {told}, not {says!r}"
    return ""


def data_faults(lab: Lab, quick: bool, progress: Progress) -> list[Row]:
    """Every fault under every policy; a row whose `fault` is empty is as it should be.

    `quick` makes a third of the runs.
    """
    images = write_image_data(lab.folder / "image-faults", image_faults())
    by_kind: dict[str, FaultyData] = {
        kind: write_record_data(lab.folder / f"{kind}-faults", kind) for kind in KINDS
    }
    rows: list[Row] = []
    parts = (
        _alone(lab, {"images": images, **by_kind}),
        _counted(lab, images, by_kind, quick),
        _stopped(lab, quick),
        _limited(lab, images, quick),
        _files(lab, images.images, quick),
        [_resumed(lab, images)],
    )
    for part in parts:
        for row in part:
            rows.append(row)
            progress(f"bad data: {len(rows)} rows, {sum(bool(r['fault']) for r in rows)} faulty")
    return rows


def _alone(lab: Lab, sets: dict[str, FaultyData]) -> Iterator[Row]:
    report = lab.folder / "alone.json"

    def work() -> None:
        _, processor = build_model(lab.config("alone"), None)
        found = {
            f"{part} {policy}": read_alone(data, processor, policy)
            for (part, data), policy in product(sets.items(), POLICIES)
        }
        report.write_text(json.dumps(found), encoding="utf-8")

    in_child(work, lab.log)
    for key, wrong in json.loads(report.read_text(encoding="utf-8")).items():
        part, policy = key.split()
        yield {
            "part": f"{part}, each alone",
            "policy": policy,
            "injected": len(sets[part].due),
            "fault": "; ".join(wrong),
        }


def _counted(
    lab: Lab, images: FaultyData, by_kind: dict[str, FaultyData], quick: bool
) -> Iterator[Row]:
    batchings = ("packs", "modality", "plain", "padded")
    plan = [("images", images, *one) for one in product(POLICIES[1:], ("packs", "plain"), (0, 2))]
    plan = plan[:: len(plan) - 1] if quick else plan
    for number, (policy, kind) in enumerate(product(POLICIES[1:], KINDS)):
        if not quick or number % 2:
            plan.append((kind, by_kind[kind], policy, batchings[number % 4], 0))
    for part, data, policy, batching, workers in plan:
        name = f"{part}-{policy}-{batching}-{workers}"
        more: dict[str, Any] = {"data__batching": batching, "data__num_workers": workers}
        done = run(lab, name, **data.settings(policy), **more)
        yield done.row(
            part, 2, injected=len(data.due), counted=len(done.lines()),
            fault=count_fault(done, data, 2),
        )  # fmt: skip


def _stopped(lab: Lab, quick: bool) -> Iterator[Row]:
    """Policy error: before anything is written where names or headers show a fault, else when the
    first bad sample is due."""
    for seen, batching, workers in (
        ("file", "plain", 0),
        ("header", "packs", 0),
        ("pixels", "packs", 2),
    ):
        faults = [fault for fault in image_faults() if fault.seen == seen]
        data = write_image_data(lab.folder / f"only-{seen}", faults)
        words = {
            "file": f"({len(faults)} of {data.count} images are missing or refused)",
            "header": f"({len(faults)} of {data.count} samples are bad)",
            "pixels": "damaged image",
        }
        more: dict[str, Any] = {"data__batching": batching, "data__num_workers": workers}
        done = run(lab, f"error-{seen}", **data.settings("error"), **more)
        fault = stop_fault(done, 2, words[seen])
        if not fault and seen != "pixels" and done.folder.exists():
            fault = "left a folder"
        yield done.row(f"images, seen by {seen}", 2, injected=len(faults), fault=fault)
    for kind in KINDS[::2] if quick else KINDS:
        data = write_record_data(lab.folder / f"error-{kind}-data", kind)
        done = run(lab, f"error-{kind}", **data.settings("error"))
        fault = stop_fault(done, 2, str(data.path))
        yield done.row(kind, 2, injected=len(data.due), fault=fault)


def _limited(lab: Lab, images: FaultyData, quick: bool) -> Iterator[Row]:
    """One bad sample more than the limit allows; and half of them, which the headers show."""
    number = len(images.due)
    early = sum(due.early for due in images.due.values())
    for policy, batching, allowed in (
        ("skip", "plain", number - 1),
        ("text_only", "packs", early - 1),
    ):
        if quick and policy == "skip":
            continue
        bad = number if batching == "plain" else early
        says = f"{bad} of {images.count} samples are bad, {allowed} are allowed"
        settings = images.settings(policy, allowed)
        done = run(lab, f"limit-{policy}", **settings, data__batching=batching)
        fault = stop_fault(done, 2, says) or ("" if len(done.told()) == 1 else "told twice")
        yield done.row("images, one above the limit", 2, injected=number, fault=fault)


def _files(lab: Lab, images: Path, quick: bool) -> Iterator[Row]:
    """Data files that cannot be read: every policy stops, before anything is written."""
    folder = lab.folder / "files"
    folder.mkdir()
    for number, file in enumerate(file_faults()):
        (folder / file.file).write_bytes(file.content)
        data = FaultyData(folder / file.file, images, 1)
        for policy in (POLICIES[number % 3],) if quick else POLICIES:
            done = run(lab, f"{file.file}-{policy}", 1, **data.settings(policy, 1))
            fault = stop_fault(done, 1, file.says) or (
                "left a folder" if done.folder.exists() else ""
            )
            yield done.row(f"file: {file.name}", 1, injected=1, fault=fault)


def _resumed(lab: Lab, images: FaultyData) -> Row:
    """Killed two steps behind its checkpoint, with their bad samples already written down."""

    def kill(rank: int, step: int, doing: str) -> None:
        if step == 6 and doing == "reading its samples":
            os.kill(os.getpid(), signal.SIGKILL)

    settings = {**images.settings("skip"), "save_steps": 4, "resume": "auto"}
    first = run(lab, "resumed", hook=kill, **settings)
    before = len(first.lines())
    done = run(lab, "resumed", **settings)
    fault = count_fault(done, images, 2)
    if first.codes != [-signal.SIGKILL] * 2 or not 0 < before < len(images.due):
        fault = f"was not killed in the middle: {first.codes}, {before} written down"
    return done.row(
        "images, killed and resumed", 2, injected=len(images.due), counted=len(done.lines()),
        fault=fault,
    )  # fmt: skip
