"""The models of the web page and its open pages: bounded, with one lock.

Nothing here, nor in web_tab.py, knows of Gradio.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..hd.errors import UsageError
from ..model.chat import ChatSession
from ..model.llava_hd import LlavaHD
from ..model.processor import Processor
from .web_pictures import chosen_geometry
from .web_tab import Geometry, Tab, WebLimits


@dataclass(frozen=True)
class Entrant:
    """A model that the page asks, under its name. processor: within the limits of resolution that
    the command was given; a page begins with that geometry."""

    name: str
    model: LlavaHD
    processor: Processor

    @property
    def is_limited(self) -> bool:
        """Whether it begins with another geometry than it was trained on."""
        return self.processor.config.hd != self.model.config.hd


class Hall:
    """The models, one lock for their work, and the tabs of the open pages.

    folder: where the pictures of the pages lie, as long as they are shown.
    """

    def __init__(self, entrants: Sequence[Entrant], folder: Path, limits: WebLimits) -> None:
        self.entrants, self.folder, self.limits = tuple(entrants), folder, limits
        self.lock = threading.Lock()  # held for a token of one model at a time
        self._tabs: OrderedDict[str, Tab] = OrderedDict()
        self._door = threading.Lock()

    def chats(self, geometry: Geometry) -> list[ChatSession]:
        """New conversations with all models, which see images in this geometry."""
        chats = []
        for entrant in self.entrants:
            first = entrant.processor.config
            hd = chosen_geometry(first.hd, geometry.preset, geometry.max_tiles)
            processor = Processor(entrant.processor.tokenizer, replace(first, hd=hd))
            chats.append(ChatSession(entrant.model, processor))
        return chats

    def check_room(self) -> None:
        """Raise UsageError where as many questions wait as may."""
        with self._door:
            waiting = sum(tab.is_expecting for tab in self._tabs.values())
        if waiting >= self.limits.waiting:
            raise UsageError(f"busy: {waiting} questions wait already; ask again in a moment")

    def free_memory(self, keep: int | None = None) -> None:
        """Let go what the models have read for all pages but the last few (keep: so many); the next
        question of such a page reads its conversation again."""
        with self._door:
            tabs = list(self._tabs.values())
        quiet = tabs[: max(0, len(tabs) - (self.limits.max_caches if keep is None else keep))]
        for tab in quiet:
            tab.drop_caches()

    def enter(self, key: str) -> Tab:
        """A new tab; the one that was quiet longest is put away when there are too many."""
        with self._door:
            self._leave(key)
            while len(self._tabs) >= self.limits.max_tabs:
                self._leave(next(iter(self._tabs)))
            self._tabs[key] = Tab(self)
            return self._tabs[key]

    def find(self, key: str) -> Tab:
        """The tab of that key. Raises UsageError where it was put away."""
        with self._door:
            if key not in self._tabs:
                raise UsageError(
                    "this page was put away, because too many are open or the server was started "
                    "again; reload it"
                )
            self._tabs.move_to_end(key)
            return self._tabs[key]

    def leave(self, key: str) -> None:
        """Put a tab away, if it is there; its answers end."""
        with self._door:
            self._leave(key)

    def close(self) -> None:
        """Put all tabs away."""
        with self._door:
            for key in list(self._tabs):
                self._leave(key)

    def _leave(self, key: str) -> None:
        tab = self._tabs.pop(key, None)
        if tab is not None:
            tab.leave()
