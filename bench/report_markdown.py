"""A report's sections (report.py) as Markdown: text, facts, tables, and charts as files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from .report import Block, Chart, Facts, Note, Section, Table

WIDTH = 124  # of lines of text


def markdown(
    title: str, sections: Sequence[Section], charts: Mapping[str, str], head: str = ""
) -> str:
    """The page. charts: chart's name -> its file, as the page refers to it.

    Raises TypeError for a block that Markdown has no form for.
    """
    parts = [f"# {title}", *([_wrapped(head)] if head else [])]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_wrapped(section.intro)] if section.intro else []
        parts += [_block(block, charts) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are text without line ends."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _block(block: Block, charts: Mapping[str, str]) -> str:
    if isinstance(block, Note):
        return _wrapped(block.text if block.tone == "plain" else f"**{block.text}**")
    if isinstance(block, Facts):
        return table(("", ""), block.pairs)
    if isinstance(block, Table):
        rows = [
            [f"**{cell}**" if cell and place in block.strong else cell for cell in row]
            for place, row in enumerate(block.rows)
        ]
        return table(block.columns, rows) + (
            f"\n\n{_wrapped(block.caption)}" if block.caption else ""
        )
    if isinstance(block, Chart):
        return f"![{block.alt}]({charts[block.name]})"
    raise TypeError(f"{type(block).__name__} has no form in Markdown")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
