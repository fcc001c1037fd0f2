"""What the web page does: each event of its components, from the tab that it belongs to.

Everything that a page shows of a conversation comes from its `Tab` (web_session.py). Nothing is
taken from the browser but the question, the controls, and the path of an uploaded file, which must
lie in the private folder.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.applications import Starlette
from starlette.types import ASGIApp

from ..hd.errors import LlavaHDError, UsageError
from .web_guard import Guard, is_inside
from .web_page import CSS, NO_PICTURE, THEME, TITLE, Parts, lay_out
from .web_pictures import (
    Picture,
    counts_html,
    draw_examples,
    draw_tiles,
    fitting_presets,
    read_picture,
)
from .web_session import Geometry, Hall, Message, Tab

SECONDS_BETWEEN = 0.04  # a page is not told of every token
DECODERS = 2  # uploads read at a time

Updates = dict[Any, Any]  # component -> its new value, as Gradio takes it


def build_app(hall: Hall, folder: Path, names: tuple[str, ...] | None) -> ASGIApp:
    """The page behind its guard. names: the host names that it answers to; None: any."""
    page = build_page(hall, folder, draw_examples(folder / "examples"))
    app = gr.mount_gradio_app(
        Starlette(),
        page,
        "/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[],
        show_error=False,
        max_file_size=hall.limits.images.max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=THEME,
        css=CSS,
    )
    # Mounted, Gradio would not check that the files it is told of are uploads; launched, it does.
    page.has_launched = page.is_running = True
    return Guard(app, folder, hall.limits.images.max_bytes, names)


def build_page(hall: Hall, private: Path, examples: Sequence[Path]) -> gr.Blocks:
    """The page for the hall's models. private: the folder of its files, the only one served."""
    names = [entrant.name for entrant in hall.entrants]
    fitting = [fitting_presets(entrant.model.config.hd) for entrant in hall.entrants]
    presets = list(dict.fromkeys(preset for fits in fitting for preset in fits))
    with gr.Blocks(
        analytics_enabled=False, title=TITLE, fill_width=True, delete_cache=(60, 600)
    ) as page:
        parts = lay_out(names, presets, examples)
        _connect(page, Events(hall, parts, private, tuple(examples)))
    page.queue(max_size=hall.limits.waiting, api_open=False, default_concurrency_limit=1)
    return page


def _connect(page: gr.Blocks, events: Events) -> None:
    """Which event calls what."""
    parts = events.parts
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    at_once: dict[str, Any] = {**hidden, "queue": False}
    drawing: dict[str, Any] = {
        "api_visibility": "private",
        "show_progress": "minimal",
        "show_progress_on": list(parts.pictures),
        "concurrency_limit": DECODERS,
        "concurrency_id": "draw",
    }
    seen = [parts.upload, *parts.pictures, *parts.counts]
    controls = [parts.preset, parts.max_tiles]
    page.load(events.arrive, None, [*parts.shown, *seen, *controls], **at_once)
    page.unload(events.leave)
    seen.append(parts.banner)
    parts.upload.upload(events.take_upload, [parts.upload], seen, preprocess=False, **drawing)
    parts.examples.select(events.take_example, None, seen, **drawing)
    parts.upload.clear(events.take_away, None, seen, **at_once)
    for changed in (parts.preset.input, parts.max_tiles.release):
        changed(events.set_geometry, controls, [*parts.chats, *seen], **drawing)
    asked = gr.on(
        [parts.question.submit, parts.send.click],
        events.expect,
        [parts.question],
        parts.shown,
        **at_once,
    )
    answered = asked.then(
        events.answer, None, parts.shown, concurrency_id="answer", concurrency_limit=1, **hidden
    )
    answered.then(events.rest, None, parts.shown, **at_once)
    parts.stop.click(events.stop, None, None, **at_once)
    parts.clear.click(events.clear, None, parts.shown, **at_once)


@dataclass(frozen=True)
class Events:
    """The functions that Gradio calls; each finds its tab by the page's session."""

    hall: Hall
    parts: Parts
    private: Path
    examples: tuple[Path, ...]

    def arrive(self, request: gr.Request) -> Updates:
        """A page was opened, or loaded again: it begins empty."""
        tab = self.hall.enter(_key(request))
        return {**self._shown(tab), **self._seen(tab), **self._controls(tab)}

    def leave(self, request: gr.Request) -> None:
        """A page was closed."""
        self.hall.leave(_key(request))

    def take_upload(self, file: dict[str, Any] | None, request: gr.Request) -> Updates:
        """A file was given; its path is the browser's word and checked here."""
        path = "" if file is None else str(file.get("path") or "")
        name = "" if file is None else str(file.get("orig_name") or path)

        def read(tab: Tab) -> Picture:
            if not is_inside(path, self.private):
                raise UsageError("the upload is not here any more; upload it again")
            return read_picture(Path(path), name, self.hall.limits.images, self.private)

        return self._place(request, read)

    def take_example(self, chosen: gr.SelectData, request: gr.Request) -> Updates:
        """An example was chosen by its number."""
        number = chosen.index

        def read(tab: Tab) -> Picture:
            if not isinstance(number, int) or not 0 <= number < len(self.examples):
                raise UsageError("there is no such example; choose one that is shown")
            path = self.examples[number]
            return read_picture(path, path.name, self.hall.limits.images, self.private)

        return self._place(request, read)

    def take_away(self, request: gr.Request) -> Updates:
        """The picture was taken away."""
        return self._place(request, lambda tab: None)

    def _place(self, request: gr.Request, read: Callable[[Tab], Picture | None]) -> Updates:
        """Put what is read beside the conversations; a picture that is bad leaves none."""

        def place(tab: Tab) -> Updates:
            tab.place(None)
            try:
                tab.place(read(tab))
            except LlavaHDError as error:
                return {**self._seen(tab), **self._told(str(error))}
            return {**self._told(""), **self._seen(tab)}

        return self._with_tab(request, place)

    def set_geometry(self, preset: str, max_tiles: float, request: gr.Request) -> Updates:
        """A control was moved: the picture is cut anew, the conversations begin again."""

        def choose(tab: Tab) -> Updates:
            tab.set_geometry(Geometry(str(preset), int(max_tiles) or None))
            return {**self._told(""), **self._conversations(tab), **self._seen(tab)}

        return self._with_tab(request, choose)

    def expect(self, question: str, request: gr.Request) -> Updates:
        """A question was sent; `answer` comes next, when the model is free."""

        def note(tab: Tab) -> Updates:
            tab.expect(str(question))
            return {**self._told(""), **self._buttons(True), self.parts.question: ""}

        return self._with_tab(request, note)

    def answer(self, request: gr.Request) -> Iterator[Updates]:
        """The answers of all models, as they grow."""
        try:
            tab = self.hall.find(_key(request))
            shown = 0.0
            for _ in tab.answer():
                if time.monotonic() - shown >= SECONDS_BETWEEN:
                    shown = time.monotonic()
                    yield self._conversations(tab)
            yield self._conversations(tab)
        except LlavaHDError as error:
            yield self._told(str(error))

    def rest(self, request: gr.Request) -> Updates:
        """The answers are at their end, or were refused a place among those that wait."""

        def restore(tab: Tab) -> Updates:
            unasked = tab.give_up()
            given_back = {self.parts.question: unasked} if unasked else {}
            return {**self._conversations(tab), **self._buttons(False), **given_back}

        return self._with_tab(request, restore)

    def stop(self, request: gr.Request) -> None:
        """The stop button."""
        self.hall.find(_key(request)).stop()

    def clear(self, request: gr.Request) -> Updates:
        """The clear button: the conversations are forgotten, the picture stays."""

        def forget(tab: Tab) -> Updates:
            tab.clear()
            return self._shown(tab)

        return self._with_tab(request, forget)

    def _with_tab(self, request: gr.Request, act: Callable[[Tab], Updates]) -> Updates:
        """What acting on the page's tab changes; an error that a user can cause is told."""
        try:
            return act(self.hall.find(_key(request)))
        except LlavaHDError as error:
            return self._told(str(error))

    def _told(self, text: str) -> Updates:
        return {
            self.parts.banner: gr.update(
                value=f"<div>{html.escape(text)}</div>", visible=bool(text)
            )
        }

    def _shown(self, tab: Tab) -> Updates:
        return {**self._conversations(tab), **self._told(""), **self._buttons(False)}

    def _buttons(self, answering: bool) -> Updates:
        return {
            self.parts.send: gr.update(visible=not answering),
            self.parts.stop: gr.update(visible=answering),
        }

    def _controls(self, tab: Tab) -> Updates:
        return {
            self.parts.preset: tab.geometry.preset,
            self.parts.max_tiles: tab.geometry.max_tiles or 0,
        }

    def _conversations(self, tab: Tab) -> Updates:
        return {
            chat: [_message(message) for message in tab.messages(number)]
            for number, chat in enumerate(self.parts.chats)
        }

    def _seen(self, tab: Tab) -> Updates:
        """The picture, and what each model sees of it."""
        if tab.picture is None:
            pictures: Updates = dict.fromkeys(self.parts.pictures)
            counts: Updates = dict.fromkeys(self.parts.counts, NO_PICTURE)
            return {self.parts.upload: None, **pictures, **counts}
        updates: Updates = {self.parts.upload: str(tab.picture.thumbnail)}
        for number, hd in enumerate(tab.geometries):
            plan, path = draw_tiles(tab.picture.image, hd, self.private)
            updates[self.parts.pictures[number]] = str(path)
            updates[self.parts.counts[number]] = counts_html(
                self.hall.entrants[number].name, plan, tab.note(number)
            )
        return updates


def _key(request: gr.Request) -> str:
    return str(request.session_hash)


def _message(message: Message) -> dict[str, Any]:
    """A message as Gradio's chatbot takes it."""
    if message.picture is not None:
        return {"role": message.role, "content": {"path": str(message.picture)}}
    note = f"  [{message.note}]" if message.note else ""
    return {"role": message.role, "content": message.text + note}
