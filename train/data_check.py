"""All records and images of a data set, read to the end: what is bad, and how long samples become.

Nothing stops at the first fault. Each image is decoded once, in worker processes; then the tokens
of each record are counted there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..hd.errors import DataError, UsageError
from ..hd.image import image_size
from ..model.prompt import Turn
from .data_check_tokens import CheckSettings, Measure, load_tokenizer, measure
from .record import BadRecord, Record
from .records import without_collection
from .sources import open_files
from .sources_base import FileImage, ImagePlace, Source, open_image
from .sources_paths import expand, is_json
from .workers import Done, Run, silent, workers

Size = tuple[int, int]  # (height, width)


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
    """All that was found. records: the good ones in form; images: where theirs stand; measures:
    theirs, None where an image is bad; sizes: of the good images by their keys; num_values:
    records in the files, faulty ones included."""

    records: list[Record] = field(default_factory=list)
    images: list[tuple[ImagePlace, ...]] = field(default_factory=list)
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
    root: str | Path | None,
    settings: CheckSettings,
    num_workers: int = 0,
    done: Done = silent,
) -> Checked:
    """Read everything; `num_workers` 0 reads in this process.

    root: folder of the images; None where all stand inside the data files. Raises UsageError for
    files, folders or a tokenizer that are not there, and nothing for what they hold.
    """
    if root is not None and not Path(root).is_dir():
        raise UsageError(f"--images {root} is not a folder; give the root of the images")
    files = expand(paths)
    if root is None and any(is_json(path) for path in files):
        raise UsageError("--images is missing; give the root folder of the images")
    if settings.tokenizer is not None:
        load_tokenizer(settings.tokenizer)
    checked = Checked()
    with without_collection():
        for path, found in zip(files, open_files(files, root, done=done), strict=True):
            if isinstance(found, DataError):
                reason = str(found).removeprefix(f"{path}: ")
                checked.faults.append(Fault("file", str(path), reason))
            else:
                _read_records(found, checked)
                done("read", checked.num_values, checked.num_values)
    if root is None:
        _check_all_inside(checked)
    with workers(num_workers) as run:
        _check_images(checked, run, done)
        _measure_records(checked, settings, run, done)
    return checked


def _read_records(source: Source, checked: Checked) -> None:
    """The good records of a file, and the faults of the others."""
    for index in range(len(source)):
        checked.num_values += 1
        try:
            record = source.record(index)
        except BadRecord as bad:
            checked.faults.append(Fault("record", bad.where, bad.reason))
            continue
        checked.records.append(record)
        places = (source.locate(record, number) for number in range(len(record.images)))
        checked.images.append(tuple(places))


def _check_all_inside(checked: Checked) -> None:
    for record, places in zip(checked.records, checked.images, strict=True):
        if any(isinstance(place, FileImage) for place in places):
            raise UsageError(
                f"--images is missing; {record.where} names image files, give their root folder"
            )


def _check_images(checked: Checked, run: Run, done: Done) -> None:
    """Decode every image of the records once: files by name, others as they come in their file."""
    first: dict[str, tuple[str, ImagePlace]] = {}
    uses = Counter[str]()
    for record, places in zip(checked.records, checked.images, strict=True):
        for place in places:
            first.setdefault(place.key, (record.where, place))
            uses[place.key] += 1
    files = sorted(key for key, (_, place) in first.items() if isinstance(place, FileImage))
    inside = [key for key, (_, place) in first.items() if not isinstance(place, FileImage)]
    checked.num_images, count = len(first), 0
    for results in run(_sizes, [first[key][1] for key in (*files, *inside)], ()):
        for key, found in results:
            if isinstance(found, str):
                more = f" ({uses[key]} uses)" if uses[key] > 1 else ""
                checked.faults.append(Fault("image", first[key][0] + more, found, key))
            else:
                checked.sizes[key] = found
        count += len(results)
        done("images", count, len(first))


def _sizes(places: Sequence[ImagePlace]) -> list[tuple[str, Size | str]]:
    """(height, width) of each image once decoded, or why there is none; runs in a worker."""
    found: list[tuple[str, Size | str]] = []
    for place in places:
        try:
            found.append((place.key, image_size(open_image(place))))
        except DataError as error:
            found.append((place.key, str(error)))
    return found


def _measure_records(checked: Checked, settings: CheckSettings, run: Run, done: Done) -> None:
    jobs: list[tuple[tuple[Turn, ...], list[Size] | None]] = []
    for record, places in zip(checked.records, checked.images, strict=True):
        sizes = [checked.sizes.get(place.key) for place in places]
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
