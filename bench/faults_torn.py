"""Every file of a checkpoint broken in every way: always found out, and the older one is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..train.checkpoint import newest_whole
from ..train.zero import join_world
from .fault_lab import Lab, run_ranks, start_ranks, weight_hash

Progress = Callable[[str], None]
Break = Callable[[Path, Path], None]  # the file to break, the same file of the older checkpoint


@dataclass(frozen=True)
class TornCase:
    """One file broken in one way."""

    file: str
    fault: str
    detected: bool  # the older checkpoint was chosen, this one put aside
    told: bool  # one loud line named it

    def row(self) -> dict[str, Any]:
        return dict(self.__dict__)


def ways_to_break(size: int) -> Iterator[tuple[str, Break]]:
    """Names and functions; a cut or a flipped bit at both ends and in the middle."""
    for name, length in (("0", 0), ("1", 1), ("50 %", size // 2), ("-1", size - 1)):
        yield f"truncated to {name}", _cut(length)
    for place in sorted({0, 8, size // 3, size // 2, size - 1}):
        if place < size:
            yield f"bit flipped in byte {place}", _flip(place)
    yield "deleted", lambda file, other: file.unlink()
    yield "swapped with the checkpoint before", lambda file, other: _swap(file, other)
    yield "emptied to zeros", lambda file, other: _write(file, bytes(size))


def _cut(length: int) -> Break:
    return lambda file, other: _write(file, file.read_bytes()[:length])


def _flip(place: int) -> Break:
    def flip(file: Path, other: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        _write(file, bytes(content))

    return flip


def _swap(file: Path, other: Path) -> None:
    _write(file, other.read_bytes())


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def torn_writes(lab: Lab, quick: bool, progress: Progress) -> list[TornCase]:
    """Break each file of the newest of two checkpoints; `quick` takes every third way."""
    config = lab.config("torn", max_steps=3, save_steps=1)
    if run_ranks(config, 2, lab.log) != [0, 0]:
        raise RuntimeError(f"the run failed; see {lab.log}")
    folder = Path(config.output_dir)
    report = lab.folder / "torn.txt"

    def work() -> None:
        world, cases = join_world(1.0), []
        newest, older = folder / "checkpoint-2", folder / "checkpoint-1"
        kept = lab.folder / "kept"
        shutil.copytree(newest, kept)
        names = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
        for number, name in enumerate(names):
            ways = list(ways_to_break((kept / name).stat().st_size))
            for what, break_it in ways[number % 3 :: 3] if quick else ways:
                if (kept / name).read_bytes() == (older / name).read_bytes() and "swap" in what:
                    continue  # the same file in both, such as the tokenizer's
                break_it(newest / name, older / name)
                said: list[str] = []
                chosen = newest_whole(folder, world, said.append)
                moved = not newest.exists() and (folder / "quarantine/checkpoint-2").is_dir()
                told = len(said) == 1 and str(newest) in said[0]
                cases.append(f"{name}\t{what}\t{chosen == older and moved}\t{told}\n")
                shutil.rmtree(folder / "quarantine", ignore_errors=True)
                shutil.rmtree(newest, ignore_errors=True)
                shutil.copytree(kept, newest)
            progress(f"torn: {number + 1} of {len(names)} files")
        if newest_whole(folder, world, print) != newest:
            raise RuntimeError("an unbroken checkpoint was not chosen")
        report.write_text("".join(cases), encoding="utf-8")

    if start_ranks(1, work, lab.log).wait(600.0) != [0]:
        raise RuntimeError(f"the torn writes could not be tried; see {lab.log}")
    lines = [line.split("\t") for line in report.read_text(encoding="utf-8").splitlines()]
    return [
        TornCase(name, what, found == "True", told == "True") for name, what, found, told in lines
    ]


def resumed_past_a_broken_one(lab: Lab) -> bool:
    """A run whose newest checkpoint has one flipped bit goes on from the one before, and ends with
    the weights of the undisturbed run."""
    whole = lab.config("torn-whole", max_steps=4)
    broken = lab.config("torn-broken", max_steps=4, save_steps=1, resume="auto")
    if run_ranks(whole, 2, lab.log) != [0, 0] or run_ranks(broken, 2, lab.log) != [0, 0]:
        raise RuntimeError(f"the run failed; see {lab.log}")
    folder = Path(broken.output_dir)
    (folder / "trainer_state.json").unlink()  # as if killed before the end
    _flip(5_000)(folder / "checkpoint-3/model.safetensors", folder)
    codes = run_ranks(broken, 2, lab.log)
    aside = (folder / "quarantine/checkpoint-3").is_dir()
    same = weight_hash(folder) == weight_hash(Path(whole.output_dir))
    return codes == [0, 0] and aside and same
