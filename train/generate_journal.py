"""What was answered, on disk as it comes: the journal of `data generate`, and the files made of it.

`run.json` says what makes the answers; `journal.jsonl` has a line for every answered request, good
or not. It is the only truth: `data.json` and `rejected.jsonl` are written from it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..hd.errors import DataError, UsageError
from ..hd.files import write_whole
from .generate_request import Usage

RUN, JOURNAL, REJECTED, DATA, SUMMARY = (
    "run.json",
    "journal.jsonl",
    "rejected.jsonl",
    "data.json",
    "summary.json",
)
FREE = ("endpoint",)  # may differ when a run goes on: a server of one's own often moves


@dataclass(frozen=True)
class Fault:
    """An answer that was not taken. final: the image is not asked about again."""

    reason: str
    text: str
    final: bool


@dataclass
class Journal:
    """The answered requests of an output folder. Use it as a context manager; it holds a lock, so
    that no second run asks the same.

    records, faults: by task. used: tokens of all requests. estimated: requests without counts of
    the server. dropped: whether the last line was half-written.
    """

    folder: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    used: Usage = field(default_factory=Usage)
    requests: int = 0
    estimated: int = 0
    dropped: bool = False

    def __enter__(self) -> Journal:
        path = self.folder / JOURNAL
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(
                f"{path} is in use by another run; wait for it, or give another --out"
            ) from None
        try:
            self._read(path)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def good(self, key: str, record: dict[str, Any], usage: Usage, told: bool) -> None:
        """A valid answer; on disk when this returns."""
        self._write({"key": key, "record": record, **_usage_fields(usage, told)})

    def bad(self, key: str, fault: Fault, usage: Usage, told: bool) -> None:
        """An invalid answer, or a refusal; on disk when this returns."""
        line = {"key": key, "fault": fault.reason, "text": fault.text, "final": fault.final}
        self._write({**line, **_usage_fields(usage, told)})

    def is_done(self, key: str) -> bool:
        """Whether nothing more is asked for the task."""
        return key in self.records or any(fault.final for fault in self.faults.get(key, ()))

    def attempts(self, key: str) -> int:
        """How often the task got an invalid answer."""
        return len(self.faults.get(key, ()))

    def rejected(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """Of these tasks those without a valid answer, as written to rejected.jsonl."""
        return [
            {
                "key": key,
                "reason": self.faults[key][-1].reason,
                "reasons": [fault.reason for fault in self.faults[key]],
                "text": self.faults[key][-1].text,
            }
            for key in keys
            if key not in self.records and self.is_done(key)
        ]

    def reasons(self, keys: Iterable[str]) -> dict[str, int]:
        """How many answers of these tasks were invalid, by reason, the most frequent first."""
        counts = Counter(fault.reason for key in keys for fault in self.faults.get(key, ()))
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def _write(self, line: dict[str, Any]) -> None:
        rest = memoryview((json.dumps(line, ensure_ascii=False) + "\n").encode())
        before = self._file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:  # a full disk: no half line may stand in front of the next one
            self._file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.folder / JOURNAL)) from error
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        key = line["key"]
        if "record" in line:
            self.records[key] = line["record"]
        else:
            fault = Fault(line["fault"], line["text"], line["final"])
            self.faults.setdefault(key, []).append(fault)
        self.used += Usage(line["prompt_tokens"], line["answer_tokens"])
        self.requests += 1
        self.estimated += not line["counted_by_server"]

    def _read(self, path: Path) -> None:
        """A half-written last line is cut off; a fault elsewhere is a DataError."""
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
            self.dropped = True
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: is no line of a journal; restore the file, or take the line "
                    "out to have it asked again"
                ) from error


def _usage_fields(usage: Usage, told: bool) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "answer_tokens": usage.answer_tokens,
        "counted_by_server": told,
    }


def check_run(folder: Path, identity: dict[str, Any]) -> None:
    """Write `run.json`, or make sure that the one in the folder has the same settings.

    Raises UsageError naming the first setting that differs, DataError for a damaged file.
    """
    path = folder / RUN
    if not path.exists():
        if (folder / JOURNAL).exists():
            raise UsageError(
                f"{folder} holds {JOURNAL} but no {RUN}, so what it answers is not known; give "
                "another --out"
            )
        write_whole(path, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON; restore it or give another --out") from error
    if not isinstance(before, dict):
        raise DataError(f"{path}: is no object; restore it or give another --out")
    for name in {**before, **identity}:
        if name not in FREE and before.get(name) != identity.get(name):
            raise UsageError(
                f"{path}: {name} was {_short(before.get(name))} and is now "
                f"{_short(identity.get(name))}; go on with the former, or give another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """JSON lines, whole."""
    write_whole(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def write_array(path: Path, values: Iterable[Any]) -> None:
    """A JSON array with one value a line, whole."""
    lines = ",\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    write_whole(path, f"[\n{lines}\n]\n")
