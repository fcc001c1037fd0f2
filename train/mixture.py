"""The instruction mixture of LLaVA-1.5 out of public annotation files, as one LLaVA JSON.

One source after the other is read, put into conversations, sampled and written, so memory holds
one at a time. What is drawn depends on the seed, the source's name and the content alone, never
on the order of files, keys or records. A smaller fraction holds a part of what a larger one holds,
source by source.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from ..hd.errors import DataError, UsageError
from ..model.prompt import IMAGE_TAG
from .mixture_fields import Conversation, Reading, draw, natural
from .mixture_kinds import PAPER, RELEASED
from .mixture_qa import read_aokvqa, read_gqa, read_ocrvqa, read_vqa
from .mixture_recipe import MixtureRecipe, Source
from .mixture_regions import read_refcoco, read_vg
from .mixture_text import read_llava, read_sharegpt, read_textcaps
from .records import without_collection

READERS: dict[str, Callable[[Reading], list[Conversation]]] = {
    "llava": read_llava,
    "sharegpt": read_sharegpt,
    "vqa": read_vqa,
    "gqa": read_gqa,
    "ocrvqa": read_ocrvqa,
    "aokvqa": read_aokvqa,
    "textcaps": read_textcaps,
    "refcoco": read_refcoco,
    "vg": read_vg,
}
ROUNDING = 1000  # the paper's counts are in thousands, some rounded down


@dataclass(frozen=True)
class SourceCount:
    """What became of one source.

    read: conversations that its files make. skipped: what was left out, by reason. written: after
    `count` and the fraction. paper: the paper's count times the fraction; None for a set that it
    does not have. differs: by more than the rounding of the paper's table.
    """

    name: str
    kind: str
    files: tuple[str, ...]
    read: int
    skipped: dict[str, int]
    written: int
    paper: int | None
    differs: bool


@dataclass(frozen=True)
class MixtureSummary:
    """A written mixture: counts by source and by the first folder of the image ("": no image)."""

    out: str
    sha256: str
    seed: int
    fraction: float
    records: int
    sources: tuple[SourceCount, ...]
    folders: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the paper's and the released file's counts beside ours."""
        released = {name: round(count * self.fraction) for name, count in RELEASED.items()}
        return {
            **asdict(self),
            "paper": {"records": round(sum(PAPER.values()) * self.fraction)},
            "missing_sources": [n for n in PAPER if n not in {one.name for one in self.sources}],
            "released": {"records": sum(released.values()), "folders": released},
        }


def check_inputs(recipe: MixtureRecipe, annotations: Path, out: Path) -> None:
    """Make sure that every annotation file is there and that `out` can be written.

    Raises UsageError, before anything is read.
    """
    for source in recipe.sources:
        for role, paths in _paths(source, annotations).items():
            for path in paths:
                if not path.is_file():
                    raise UsageError(
                        f"{source.name}: files.{role} {path}: no such file; fetch it, name the "
                        "folder of the annotations, or take the source out of the recipe"
                    )
                if path.resolve() in (out.resolve(), summary_path(out).resolve()):
                    raise UsageError(f"--out {out} would overwrite {path}; give another file")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: cannot be written; give a file in a folder that is there")


def write_mixture(
    recipe: MixtureRecipe,
    annotations: Path,
    out: Path,
    notify: Callable[[Source], None] = lambda source: None,
) -> MixtureSummary:
    """Write the mixture and, beside it, its summary; both are whole or not there at all.

    `annotations` is the folder that the recipe's files are relative to; `notify` is told of each
    source before it is read. Raises UsageError, DataError (file, record, field and remedy).
    """
    check_inputs(recipe, annotations, out)
    counts, folders = [], Counter[str]()
    with without_collection(), _whole(out) as write:
        for source in recipe.sources:
            notify(source)
            reading = Reading(source, _paths(source, annotations), recipe.seed, Counter())
            conversations = _without_repeats(READERS[source.kind](reading), reading)
            chosen = sample(conversations, source, recipe.seed, recipe.fraction)
            for conversation in chosen:
                write.record(parse_record(conversation, source))
                folders[(conversation.image or "").partition("/")[0]] += 1
            counts.append(_count(reading, len(conversations), len(chosen), recipe.fraction))
        if not write.records:
            raise DataError("the mixture holds no record; see the recipe's fraction and sources")
        write.text("\n]\n")
        summary = MixtureSummary(
            out=out.name,
            sha256=write.hash.hexdigest(),
            seed=recipe.seed,
            fraction=recipe.fraction,
            records=write.records,
            sources=tuple(counts),
            folders=dict(sorted(folders.items())),
        )
        write.summary = json.dumps(summary.to_dict(), indent=2, ensure_ascii=False) + "\n"
    return summary


def _paths(source: Source, annotations: Path) -> dict[str, list[Path]]:
    return {role: [annotations / name for name in names] for role, names in source.files.items()}


def _without_repeats(conversations: list[Conversation], reading: Reading) -> list[Conversation]:
    """Each conversation once, in the order of their keys."""
    by_key = {conversation.key: conversation for conversation in conversations}
    if len(by_key) < len(conversations):
        reading.skipped["conversation: there twice"] += len(conversations) - len(by_key)
    return [by_key[key] for key in sorted(by_key, key=natural)]


def sample(
    conversations: Sequence[Conversation], source: Source, seed: int, fraction: float
) -> list[Conversation]:
    """The conversations of `count` and the fraction, in their order.

    Both take the first of one drawn order, so a smaller number is a part of a larger one.
    """
    count = len(conversations) if source.count is None else min(source.count, len(conversations))
    count = int(count * fraction + 0.5)
    if count == len(conversations):
        return list(conversations)
    places = sorted(
        range(len(conversations)),
        key=lambda i: (draw(seed, source.name, "sample", conversations[i].key), i),
    )
    return [conversations[i] for i in sorted(places[:count])]


def parse_record(conversation: Conversation, source: Source) -> dict[str, Any]:
    """LLaVA's form; the image tag stands in front of the first question."""
    turns: list[dict[str, str]] = []
    for question, answer in conversation.rounds:
        tag = f"{IMAGE_TAG}\n" if conversation.image and not turns else ""
        turns.append({"from": "human", "value": tag + question})
        turns.append({"from": "gpt", "value": answer})
    image = {} if conversation.image is None else {"image": conversation.image}
    return {"id": f"{source.name}/{conversation.key}", **image, "conversations": turns}


def _count(reading: Reading, read: int, written: int, fraction: float) -> SourceCount:
    source = reading.source
    paper = PAPER.get(source.name)
    return SourceCount(
        name=source.name,
        kind=source.kind,
        files=tuple(str(path) for paths in reading.files.values() for path in paths),
        read=read,
        skipped=dict(sorted(reading.skipped.items())),
        written=written,
        paper=None if paper is None else round(paper * fraction),
        differs=paper is not None and abs(written - paper * fraction) > ROUNDING * fraction,
    )


def summary_path(out: Path) -> Path:
    """Where the summary of a mixture is: `mix.json` has `mix.summary.json`."""
    return out.with_suffix(".summary.json")


@dataclass
class _Writer:
    """A JSON array, one record a line, as it grows."""

    file: TextIO
    records: int = 0
    summary: str = ""
    hash: Any = field(default_factory=sha256)

    def record(self, value: dict[str, Any]) -> None:
        self.text(",\n" if self.records else "[\n")
        self.text(json.dumps(value, ensure_ascii=False))
        self.records += 1

    def text(self, text: str) -> None:
        self.file.write(text)
        self.hash.update(text.encode())


@contextmanager
def _whole(out: Path) -> Iterator[_Writer]:
    """Writes beside `out` and takes its place at the end; an error leaves nothing behind."""
    paths = out, summary_path(out)
    unfinished = [path.with_name(f".{path.name}.{os.getpid()}.unfinished") for path in paths]
    try:
        with unfinished[0].open("w", encoding="utf-8", newline="\n") as file:
            writer = _Writer(file)
            yield writer
        unfinished[1].write_text(writer.summary, encoding="utf-8")
        for part, path in zip(unfinished, paths, strict=True):
            part.replace(path)
    finally:
        for part in unfinished:
            part.unlink(missing_ok=True)
