"""Questions that not all models have right, with the image under each model's tiles."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..hd.errors import DataError
from ..hd.grid import HDConfig
from ..hd.image import image_size, load_image
from ..hd.plan import plan_image
from ..hd.preview import draw_plan
from .contestants import Contestant, listed
from .files import find_image
from .pope import PARSERS, is_right
from .pope_data import Answered
from .question_sets import all_matched
from .report import Block, Card, CardAnswer, Cards, Note, Picture, Pictures, Section, picture

if TYPE_CHECKING:
    from PIL.Image import Image

CARDS = 24  # in all; each is a picture or more in the page
GROUPS_SHOWN = 6
GALLERY_IMAGES = 2
GALLERY_PX = 560
CARD_PX = 320

Row = tuple[Answered, ...]  # one question as each model answers it


@dataclass
class Album:
    """The images of the questions, as far as they can be shown.

    folder: None when it is not known. geometries: who sees images how, by distinct geometry.
    faults: why, by name, for those that were asked for in vain.
    """

    folder: Path | None
    geometries: Sequence[tuple[str, HDConfig]]
    faults: dict[str, str] = field(default_factory=dict)

    def load(self, name: str) -> Image | None:
        """The image, or None: a report is not to fail on a picture that only adorns it."""
        if self.folder is None or name in self.faults:
            return None
        try:
            path = find_image(self.folder, name)
            if path is not None:
                return load_image(path)
            self.faults[name] = f"{self.folder / name}: no such file"
        except DataError as error:
            self.faults[name] = str(error)
        return None

    def pictures(self, name: str, max_px: int, small: bool = False) -> list[Picture]:
        """The image under the tiles of each geometry; bare where none is known. small: with few
        words."""
        image = self.load(name)
        if image is None:
            return []
        seen = [
            sight(image, config, f"{name} as seen by {who}", max_px, f"{who}: " if small else "")
            for who, config in self.geometries
        ]
        return seen or [picture(image, name, max_px=max_px)]

    def notes(self) -> list[Note]:
        """How many images are not shown, and why the first is not."""
        if not self.faults:
            return []
        number = "1 image is" if len(self.faults) == 1 else f"{len(self.faults)} images are"
        first = next(iter(self.faults.values()))
        return [Note(f"{number} missing, damaged or refused and not shown: {first}", "warning")]


def geometries(sides: Sequence[Contestant]) -> list[tuple[str, HDConfig]]:
    """The distinct geometries that are known, each with the names of its models."""
    found: dict[HDConfig, list[str]] = {}
    for side in sides:
        if side.run is not None and side.run.model.get("hd"):
            found.setdefault(HDConfig.from_dict(side.run.model["hd"]), []).append(side.name)
    if len(found) == 1 and len(sides) > 1 and len(next(iter(found.values()))) == len(sides):
        return [("all models", next(iter(found)))]
    return [(", ".join(names), config) for config, names in found.items()]


def sight(image: Image, config: HDConfig, caption: str, max_px: int, short: str = "") -> Picture:
    """The picture of hd/preview.py: an image under the tiles and patches of a geometry. short:
    stands for the caption where there is little room, and the drawing has no words then."""
    plan = plan_image(image_size(image), config)
    tiles = "1 tile" if plan.num_tiles == 1 else f"{plan.num_tiles} tiles"
    if short:
        drawn, text = draw_plan(image, plan, caption=False), f"{short}{tiles}"
    else:
        drawn = draw_plan(image, plan)
        text = f"{caption}: {tiles}, {plan.num_tokens} visual tokens"
    return picture(drawn, caption, text, max_px=max_px)


def discordant(sides: Sequence[Contestant], parser: str) -> dict[tuple[bool, ...], list[Row]]:
    """The questions that some models have right and some wrong, by who has them right.

    The largest group first. In a group the splits take turns, in the order of the questions, and a
    question that several splits ask appears once.
    """
    ordered = all_matched({side.name: side.answered for side in sides}).values()
    groups: dict[tuple[bool, ...], list[Row]] = {}
    for row in zip(*ordered, strict=True):
        right = tuple(is_right(item, PARSERS[parser]) for item in row)
        if len(set(right)) > 1:
            groups.setdefault(right, []).append(row)
    turned = {right: _taking_turns(rows) for right, rows in groups.items()}
    return dict(sorted(turned.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def _taking_turns(rows: Sequence[Row]) -> list[Row]:
    """The rows with the splits in turn; equal questions about equal images once."""
    place: dict[str, int] = {}
    ranked, seen = [], set()
    for row in rows:
        item = row[0]
        if (item.image, item.question) not in seen:
            seen.add((item.image, item.question))
            place[item.split] = place.get(item.split, 0) + 1
            ranked.append((place[item.split], row))
    return [row for _, row in sorted(ranked, key=lambda entry: entry[0])]


def examples_section(
    sides: Sequence[Contestant],
    parser: str,
    examples: dict[tuple[bool, ...], list[Row]],
    album: Album,
) -> Section:
    """Cards of the largest groups."""
    blocks: list[Block] = [] if examples else [Note("All models have the same questions right.")]
    for right, rows in list(examples.items())[:GROUPS_SHOWN]:
        cards = [_card(row, right, sides, album) for row in rows[: _cards_each(examples)]]
        winners = [side.name for side, good in zip(sides, right, strict=True) if good]
        verb = "is" if len(winners) == 1 else "are"
        number = f"{len(rows):,} question{'' if len(rows) == 1 else 's'}"
        caption = f"Only {listed(winners)} {verb} right: the first {len(cards)} of {number}."
        blocks.append(Cards(cards, caption))
    left = list(examples.items())[GROUPS_SHOWN:]
    if left:
        others = sum(len(rows) for _, rows in left)
        blocks.append(Note(f"{others:,} questions of {len(left)} smaller groups are not shown."))
    blocks += album.notes()
    intro = (
        "Questions that some models answer right and some wrong: the first of each split in turn, "
        "not chosen by hand; a question that several splits ask is shown once."
    )
    return Section("Where they differ", intro, blocks)


def _cards_each(examples: Sized) -> int:
    return min(8, CARDS // max(1, min(len(examples), GROUPS_SHOWN)))


def _card(row: Row, right: Sequence[bool], sides: Sequence[Contestant], album: Album) -> Card:
    answers = [
        CardAnswer(side.name, item.text, good)
        for side, item, good in zip(sides, row, right, strict=True)
    ]
    first = row[0]
    pictures = album.pictures(first.image, CARD_PX, small=True)
    return Card(first.question, first.label, answers, pictures, remark=first.split)


def gallery_section(examples: dict[tuple[bool, ...], list[Row]], album: Album) -> Section | None:
    """What each model sees of the first example images; None when that is not known."""
    names = [row[0].image for rows in examples.values() for row in rows[: _cards_each(examples)]]
    loaded = (name for name in dict.fromkeys(names) if album.load(name) is not None)
    shown = list(islice(loaded, GALLERY_IMAGES))
    if not album.geometries or not shown:
        return None
    pictures = [shot for name in shown for shot in album.pictures(name, GALLERY_PX)]
    intro = "Yellow lines part the tiles, the green frame holds the patches that become tokens."
    return Section("What the models see", intro, [Pictures(pictures)])
