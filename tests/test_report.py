"""The HTML page: whole, self-contained, escaped, the same in light and dark; the charts in it."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import random_image

from llava_hd.bench.bootstrap import Estimate
from llava_hd.bench.charts import INK, bar_chart, difference_chart, line_chart, trailing_mean
from llava_hd.bench.report import (
    Card,
    CardAnswer,
    Cards,
    Chart,
    Facts,
    Note,
    Pictures,
    Section,
    Table,
    picture,
    render,
    write_report,
)

NASTY = "<script>alert(\"x\")</script> & $a_b^$ 'quoted' {{ 7 * 7 }}"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def estimates(*values: float) -> list[Estimate]:
    return [Estimate(value, value - 0.02, value + 0.03) for value in values]


def charts() -> list[Chart]:
    return [
        line_chart(NASTY, {NASTY: ([0, 1, 2], [3.0, 2.0, 1.0]), "b": ([0], [1.0])}),
        bar_chart("F1", ["random", NASTY], {NASTY: estimates(0.7, 0.8), "b": estimates(0.6, 0.0)}),
        difference_chart("B - A", [(NASTY, Estimate(0.1, -0.1, 0.2, 0.3))], "difference"),
    ]


def every_block() -> list[Section]:
    shown = picture(random_image((30, 40)), NASTY, NASTY)
    card = Card(NASTY, "yes", [CardAnswer(NASTY, NASTY, True), CardAnswer("b", "", False)], [shown])
    return [
        Section(NASTY, NASTY, [Note(NASTY), Note("fine", "good"), Note("beware", "warning")]),
        Section("facts", "", [Facts([(NASTY, NASTY)]), Table([NASTY, "n"], [[NASTY, "1"]], NASTY)]),
        Section("charts", "", charts()),
        Section("cards", "", [Cards([card, Card("Is it?", "no", [])], NASTY), Pictures([shown])]),
    ]


def test_a_page_is_well_formed_and_shows_all_text_as_text() -> None:
    page = Page(render(NASTY, every_block(), NASTY))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert page.text.count(NASTY) >= 14
    assert "49" not in page.text.replace(NASTY, "")
    assert ("html", {"lang": "en"}) in page.tags
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == [NASTY, NASTY]


def test_a_page_loads_nothing() -> None:
    text = render("title", every_block())
    for tag, attributes in Page(text).tags:
        assert tag not in {"link", "iframe", "object", "base"}
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "action", "srcset"}:
                assert (value or "").startswith(("data:image/png;base64,", "#")), (tag, name)
            assert not name.startswith("on")
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"@import|url\((?!#)", style)


def test_a_page_follows_light_and_dark() -> None:
    text = render("title", every_block())
    assert "color-scheme: light dark" in text
    assert "prefers-color-scheme: dark" in text


def test_right_and_wrong_are_told_in_words_and_marks_too() -> None:
    card = Card("Is it?", "no", [CardAnswer("a", "No", True), CardAnswer("b", "Yes", False)])
    text = " ".join(Page(render("t", [Section("s", "", [Cards([card])])])).text.split())
    assert "✓ a No right ✗ b Yes wrong" in text


@pytest.mark.parametrize(("size", "expected"), [((300, 100), (128, 43)), ((40, 60), (40, 60))])
def test_a_picture_is_a_small_png_inside_the_page(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    source = picture(random_image(size), "noise", max_px=128).source
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
    loaded = Image.open(io.BytesIO(data))
    assert (loaded.format, (loaded.height, loaded.width)) == ("PNG", expected)


def test_a_report_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "report.html"
    write_report(path, "title", every_block(), "subtitle")
    assert path.read_text(encoding="utf-8") == render("title", every_block(), "subtitle")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("chart", charts(), ids=["line", "bar", "difference"])
def test_a_chart_is_xml_in_the_colour_of_the_text_on_no_ground(chart: Chart) -> None:
    root = ET.fromstring(str(chart.markup))
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == chart.alt
    assert INK not in chart.svg
    assert "currentColor" in chart.svg
    assert "<script" not in chart.svg
    assert "fill: #ffffff" not in chart.svg


def test_the_same_chart_gives_the_same_bytes() -> None:
    assert [chart.svg for chart in charts()] == [chart.svg for chart in charts()]


def test_bars_stand_on_zero_and_end_at_their_values() -> None:
    chart = bar_chart("F1", ["g"], {"a": estimates(0.25), "b": estimates(0.5), "c": estimates(1.0)})
    heights = []
    for colour in ("#d9782d", "#2b84c6", "#2f9e77"):
        path = re.search(rf'<path d="([^"]*)" clip-path[^>]*fill: {colour}', chart.svg)
        assert path is not None
        ys = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path[1])]
        heights.append(max(ys) - min(ys))
    assert heights[1] / heights[0] == pytest.approx(2, rel=1e-3)
    assert heights[2] / heights[0] == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("series", [{}, {"a": ([], [])}, {"a": ([0], [1.0])}])
def test_curves_of_no_or_one_point_are_drawn(
    series: dict[str, tuple[list[float], list[float]]],
) -> None:
    ET.fromstring(line_chart("loss", series).svg)


@given(st.lists(st.floats(-100, 100), max_size=30), st.integers(1, 8))
def test_the_trailing_mean_is_the_mean_of_what_stands_before(
    values: list[float], length: int
) -> None:
    expected = [np.mean(values[max(0, i + 1 - length) : i + 1]) for i in range(len(values))]
    assert trailing_mean(values, length) == pytest.approx(np.array(expected), abs=1e-9)
