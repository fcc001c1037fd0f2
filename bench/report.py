"""Self-contained HTML reports: one file with its style, charts and pictures inside, no script.

A report is a list of sections; a section is a title, a paragraph and blocks: `Note`, `Facts`,
`Table`, `Chart` (charts.py draws them), `Pictures`, `Cards`. All text is escaped by the template.
The page follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import jinja2
from markupsafe import Markup

from ..hd.files import write_whole
from ..hd.image import image_size, png_bytes, resize

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Note:
    """A paragraph in a box: the verdict, a warning, a remark."""

    text: str
    tone: Literal["plain", "good", "warning"] = "plain"
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Facts:
    """Names and values, one pair a line."""

    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column stands left, the others right. `strong`: rows in bold."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: Sequence[int] = ()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Chart:
    """An SVG element made by charts.py, and its description for readers who do not see it.

    name, png: the same chart as a file of its own, where it has a name.
    """

    svg: str
    alt: str
    caption: str = ""
    name: str = ""
    png: bytes = b""
    kind: ClassVar[str] = "chart"

    @property
    def markup(self) -> Markup:
        """The SVG as it goes into the page: ours, with all text in it escaped by matplotlib."""
        label = Markup('<svg role="img" aria-label="{}" ').format(self.alt)
        return Markup(self.svg.replace("<svg ", str(label), 1))


@dataclass(frozen=True)
class Picture:
    """An image as a data URI."""

    source: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures below each other, as wide as the page allows."""

    pictures: Sequence[Picture]
    kind: ClassVar[str] = "pictures"


@dataclass(frozen=True)
class CardAnswer:
    """What one model said, and whether that counts as right."""

    model: str
    text: str
    right: bool


@dataclass(frozen=True)
class Card:
    """One question with its pictures, its label and the answers of the models."""

    question: str
    label: str
    answers: Sequence[CardAnswer]
    pictures: Sequence[Picture] = ()
    remark: str = ""


@dataclass(frozen=True)
class Cards:
    """Example cards in columns."""

    cards: Sequence[Card]
    caption: str = ""
    kind: ClassVar[str] = "cards"


Block = Note | Facts | Table | Chart | Pictures | Cards


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph (may be empty) and blocks."""

    title: str
    intro: str = ""
    blocks: Sequence[Block] = ()


def picture(image: Image, alt: str, caption: str = "", max_px: int = 256) -> Picture:
    """An RGB image as PNG inside the page, its longer side at most `max_px`."""
    height, width = image_size(image)
    scale = min(1.0, max_px / max(height, width))
    if scale < 1:
        image = resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    data = base64.b64encode(png_bytes(image)).decode("ascii")
    return Picture(f"data:image/png;base64,{data}", alt, caption)


def render(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The page as one string."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(title=title, subtitle=subtitle, sections=sections)


def chart_files(sections: Sequence[Section]) -> dict[str, bytes]:
    """File name -> PNG of the charts that have a name."""
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    return {f"{chart.name}.png": chart.png for chart in charts if chart.name}


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], subtitle: str = ""
) -> None:
    """Write the page; the file appears whole or never. Its folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(title, sections, subtitle))
