"""All records and images of a data set, read to the end: what is bad, and how long samples become.

Nothing stops at the first fault. Each image is decoded once, in worker processes; then the tokens
of each record are counted there.
"""

from __future__ import annotations

import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from ..hd.errors import DataError, LlavaHDError, UsageError
from ..hd.image import image_size, load_image
from ..model.prompt import Turn
from .data_check_tokens import CheckSettings, Measure, load_tokenizer, measure
from .records import (
    Record,
    RecordFault,
    image_path,
    parse_file_text,
    parse_record,
    read_file_text,
    record_name,
    without_collection,
)

CHUNK = 64  # images or records that a worker takes at a time
AHEAD = 4  # chunks that wait for each worker

Size = tuple[int, int]  # (height, width)
Done = Callable[[str, int, int], None]  # what, how many are done, of how many
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Fault:
    """One thing that is bad. kind: "file", "record", "image" (once for each image; `record` is the
    first that names it) or "sample" (good in itself, but not to be trained on)."""

    kind: str
    where: str
    reason: str
    image: str | None = None


@dataclass
class Checked:
    """All that was found. records: the good ones in form; measures: theirs, None where an image is
    bad; sizes: of the good images; num_values: records in the files, faulty ones included."""

    records: list[Record] = field(default_factory=list)
    measures: list[Measure | None] = field(default_factory=list)
    sizes: dict[str, Size] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    num_values: int = 0
    num_images: int = 0

    def count(self, kind: str) -> int:
        """Faults of that kind."""
        return sum(fault.kind == kind for fault in self.faults)


def check_data(
    paths: Sequence[str | Path],
    root: str | Path,
    settings: CheckSettings,
    workers: int = 0,
    done: Done = lambda what, count, total: None,
) -> Checked:
    """Read everything; `workers` 0 reads in this process.

    Raises UsageError for files, folders or a tokenizer that are not there, and nothing for what
    they hold.
    """
    if not Path(root).is_dir():
        raise UsageError(f"--images {root} is not a folder; give the root of the images")
    if settings.tokenizer is not None:
        load_tokenizer(settings.tokenizer)
    checked = Checked()
    with without_collection():
        for path in paths:
            _read_file(Path(path), checked)
            done("files", len(checked.records), len(checked.records))
    with _workers(workers) as run:
        _check_images(checked, root, run, done)
        _measure_records(checked, settings, run, done)
    return checked


def _read_file(path: Path, checked: Checked) -> None:
    """The good records of a file; faults of the others, or of the file as a whole."""
    before = checked.num_values
    for value in _values(path, checked):
        index = checked.num_values - before
        checked.num_values += 1
        try:
            checked.records.append(parse_record(value, str(path), index))
        except RecordFault as fault:
            identity = value.get("id") if isinstance(value, dict) else None
            where = f"{path}: {record_name(index, identity)}"
            checked.faults.append(Fault("record", where, str(fault)))
    if checked.num_values == before and not checked.count("file"):
        checked.faults.append(Fault("file", str(path), "holds no record"))


def _values(path: Path, checked: Checked) -> Iterator[Any]:
    """The JSON values of an array or of lines. A line that is no JSON is one bad record, an array
    that is none a bad file."""

    def add(kind: str, error: DataError) -> None:
        checked.faults.append(Fault(kind, str(path), str(error).removeprefix(f"{path}: ")))

    try:
        text = read_file_text(path)
        if text.lstrip()[:1] == "[":
            yield from parse_file_text(path, text, 1)
            return
    except DataError as error:
        add("file", error)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = parse_file_text(path, line, number, text)
            except DataError as error:
                checked.num_values += 1
                add("record", error)
                continue
            yield value


Run = Callable[[Callable[..., Any], Sequence[Any], tuple[Any, ...]], Iterator[Any]]


@contextmanager
def _workers(count: int) -> Iterator[Run]:
    """Runs a function over chunks of items, in `count` processes; results come in order."""
    if not count:
        yield lambda function, items, shared: (function(c, *shared) for c in _chunks(items))
        return
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        with _ignored_interrupts():
            for _ in range(count):
                pool.submit(int)
        yield lambda function, items, shared: _in_order(pool, count, function, items, shared)
    except BrokenProcessPool as error:
        raise LlavaHDError(
            "a worker process died, perhaps out of memory; try again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Processes begun here leave Ctrl-C to the one that began them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_order(
    pool: ProcessPoolExecutor,
    count: int,
    function: Callable[..., Any],
    items: Sequence[Any],
    shared: tuple[Any, ...],
) -> Iterator[Any]:
    waiting: deque[Future] = deque()
    for chunk in _chunks(items):
        waiting.append(pool.submit(function, chunk, *shared))
        if len(waiting) > AHEAD * count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def _check_images(checked: Checked, root: str | Path, run: Run, done: Done) -> None:
    """Decode every image that a record names, once."""
    first: dict[str, str] = {}
    uses = Counter[str]()
    for record in checked.records:
        for name in record.images:
            first.setdefault(name, record.where)
            uses[name] += 1
    names = sorted(first)
    checked.num_images, count = len(names), 0
    for results in run(_sizes, names, (str(root),)):
        for name, found in results:
            if isinstance(found, str):
                more = f" ({uses[name]} uses)" if uses[name] > 1 else ""
                checked.faults.append(Fault("image", first[name] + more, found, name))
            else:
                checked.sizes[name] = found
        count += len(results)
        done("images", count, len(names))


def _sizes(names: Sequence[str], root: str) -> list[tuple[str, Size | str]]:
    """(height, width) of each image once decoded, or why there is none; runs in a worker."""
    found: list[tuple[str, Size | str]] = []
    for name in names:
        try:
            found.append((name, image_size(load_image(image_path(root, name)))))
        except DataError as error:
            found.append((name, str(error)))
    return found


def _measure_records(checked: Checked, settings: CheckSettings, run: Run, done: Done) -> None:
    jobs: list[tuple[tuple[Turn, ...], list[Size] | None]] = []
    for record in checked.records:
        sizes = [checked.sizes.get(name) for name in record.images]
        good = [size for size in sizes if size is not None]
        jobs.append((record.turns, good if len(good) == len(sizes) else None))
    for results in run(_measures, jobs, (settings,)):
        for found in results:
            if found is not None and found.reason is not None:
                where = checked.records[len(checked.measures)].where
                checked.faults.append(Fault("sample", where, found.reason))
            checked.measures.append(found)
        done("records", len(checked.measures), len(jobs))


def _measures(
    jobs: Sequence[tuple[tuple[Turn, ...], list[Size] | None]], settings: CheckSettings
) -> list[Measure | None]:
    return [None if sizes is None else measure(settings, turns, sizes) for turns, sizes in jobs]
