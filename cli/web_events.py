"""What the web page does: each event of its components, from the tab that it belongs to.

Everything that a page shows of a conversation comes from its `Tab` (web_tab.py). Nothing is
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

from ..hd.errors import LlavaHDError, UsageError
from .web_guard import Guard, is_inside, may_become_inside
from .web_page import CSS, NO_PICTURE, THEME, TITLE, Parts, lay_out
from .web_pictures import (
    Picture,
    counts_html,
    draw_examples,
    fitting_presets,
    read_picture,
)
from .web_session import Hall
from .web_tab import Geometry, Message, Tab

SECONDS_BETWEEN = 0.04  # a page is not told of every token
DECODERS = 2  # uploads read at a time

Updates = dict[Any, Any]  # component -> its new value, as Gradio takes it


def build_app(hall: Hall, names: tuple[str, ...] | None) -> Guard:
    """The page behind its guard. names: the host names that it answers to; None: any."""
    page = build_page(hall, draw_examples(hall.folder))
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
    return Guard(app, hall.folder, hall.limits.images.max_bytes, names)


def build_page(hall: Hall, examples: Sequence[Path]) -> gr.Blocks:
    """The page for the hall's models; gradio serves files of their folder alone."""
    names = [entrant.name for entrant in hall.entrants]
    fitting = [fitting_presets(entrant.processor.config.hd) for entrant in hall.entrants]
    presets = list(dict.fromkeys(preset for fits in fitting for preset in fits))
    limited = any(entrant.is_limited for entrant in hall.entrants)
    begun = "as the command says" if limited else "as trained"
    with gr.Blocks(analytics_enabled=False, title=TITLE, fill_width=True) as page:
        parts = lay_out(names, begun, presets, examples)
        _connect(page, Events(hall, parts, tuple(examples)))
    # Questions are bounded by the hall, which can say so; this bounds whatever else comes.
    most = 2 * hall.limits.waiting + hall.limits.max_tabs
    page.queue(max_size=most, api_open=False, default_concurrency_limit=1)
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
        changed(events.set_geometry, controls, [*parts.chats, *controls, *seen], **drawing)
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
    parts.stop.click(events.stop, None, parts.shown, **at_once)
    parts.clear.click(events.clear, None, parts.shown, **at_once)


MOVING_SECONDS = 5.0  # that an upload may take from where it was received to its place


@dataclass(frozen=True)
class Events:
    """The functions that Gradio calls; each finds its tab by the page's session."""

    hall: Hall
    parts: Parts
    examples: tuple[Path, ...]

    def arrive(self, request: gr.Request) -> Updates:
        """A page was opened, or loaded again: it begins empty."""
        tab = self.hall.enter(_key(request))
        updates = {**self._shown(tab), **self._seen(tab), **self._controls(tab)}
        del updates[self.parts.upload]  # empty as it is; the browser may be uploading by now
        return updates

    def leave(self, request: gr.Request) -> None:
        """A page was closed."""
        self.hall.leave(_key(request))

    def take_upload(self, file: dict[str, Any] | None, request: gr.Request) -> Updates:
        """A file was given; its path is the browser's word and checked here."""
        path = "" if file is None else str(file.get("path") or "")
        name = "" if file is None else str(file.get("orig_name") or path)

        def read(tab: Tab) -> Picture:
            if not self._is_upload(path):
                raise UsageError("the upload is not here any more; upload it again")
            try:
                return self._read(Path(path), name)
            finally:
                tab.discard([Path(path)])

        return self._place(request, read)

    def take_example(self, chosen: gr.SelectData, request: gr.Request) -> Updates:
        """An example was chosen by its number."""
        number = chosen.index

        def read(tab: Tab) -> Picture:
            if not isinstance(number, int) or not 0 <= number < len(self.examples):
                raise UsageError("there is no such example; choose one that is shown")
            path = self.examples[number]
            return self._read(path, path.name)

        return self._place(request, read)

    def _is_upload(self, path: str) -> bool:
        """Gradio puts uploads into folders of their own; beside those lie the page's pictures. It
        moves a file there after it has answered the browser, so the event may be here first."""
        folder = self.hall.folder
        deadline = time.monotonic() + MOVING_SECONDS
        while not is_inside(path, folder):
            if time.monotonic() > deadline or not may_become_inside(path, folder):
                return False
            time.sleep(0.02)
        return Path(path).resolve().parent != folder.resolve()

    def _read(self, path: Path, name: str) -> Picture:
        return read_picture(path, name, self.hall.limits.images, self.hall.folder)

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

    def set_geometry(self, preset: str, max_tiles: float | None, request: gr.Request) -> Updates:
        """A control was moved: the picture is cut anew, the conversations begin again."""

        def choose(tab: Tab) -> Updates:
            try:
                tab.set_geometry(Geometry(str(preset), tile_count(max_tiles)))
            except LlavaHDError as error:  # the controls go back to what they were
                return {**self._told(str(error)), **self._controls(tab)}
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
            if not tab.left:
                yield self._conversations(tab)
        except LlavaHDError as error:
            yield self._told(str(error))
        except Exception:  # a fault of ours: told here, with its traceback in the server's log
            yield self._told("the answer broke off by a fault of the program; see the server's log")
            raise

    def rest(self, request: gr.Request) -> Updates:
        """The answers are at their end, or could not be made."""
        return self._with_tab(request, self._restored)

    def stop(self, request: gr.Request) -> Updates:
        """The stop button; a question that has to wait yet is given back at once."""

        def end(tab: Tab) -> Updates:
            tab.stop()
            return self._buttons(True) if tab.is_answering else self._restored(tab)

        return self._with_tab(request, end)

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

    def _restored(self, tab: Tab) -> Updates:
        """The page as it waits for a question; one that was not asked is given back."""
        unasked = tab.give_up()
        given_back = {self.parts.question: unasked} if unasked else {}
        return {**self._conversations(tab), **self._buttons(False), **given_back}

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
        for number, (plan, path) in enumerate(tab.seen()):
            name = self.hall.entrants[number].name
            updates[self.parts.pictures[number]] = str(path)
            updates[self.parts.counts[number]] = counts_html(name, plan, tab.note(number))
        return updates


def tile_count(value: object) -> int | None:
    """What the control of tiles says; None where it is empty or 0. Raises UsageError."""
    if value is None or value == 0:
        return None
    if not isinstance(value, (int, float)) or value != value or int(value) != value:
        raise UsageError(f"most tiles {value!r} is not a whole number; move the control")
    return int(value)


def _key(request: gr.Request) -> str:
    return str(request.session_hash)


def _message(message: Message) -> dict[str, Any]:
    """A message as Gradio's chatbot takes it: it shows some HTML of a text, so none is left in."""
    if message.picture is not None:
        return {"role": message.role, "content": {"path": str(message.picture)}}
    note = f"  [{message.note}]" if message.note else ""
    return {"role": message.role, "content": html.escape(message.text, quote=False) + note}
