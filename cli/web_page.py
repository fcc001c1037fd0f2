"""The web page's components and how they lie; what they do is in web_events.py."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from .web_pictures import AS_BEGUN

TITLE = "llava-hd"
LARGEST_GRID = 12
# Gradio's semi-bold file holds a few letters only; its bold one is whole.
THEME = gr.themes.Default(
    primary_hue="blue",
    spacing_size="sm",
    font=(gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"),
)
CSS = """
.gradio-container { max-width: 1480px !important; padding: 0 16px !important; }
.gradio-container > main { padding: 10px 0 !important; }
footer, .chat [title="Clear"], .chat [title="Fullscreen"], .chat .message-buttons-right,
#examples label { display: none !important; }
#head b { font-size: 1.4rem; }
#head span { color: var(--body-text-color-subdued); margin-left: 10px; }
#banner { border: 1px solid #d9534f !important; background: #fdf0ef !important; border-radius: 8px;
  padding: 8px 14px !important; }
#banner * { color: #8c1d18; font-weight: 500; }
#examples, #examples .grid-wrap { height: auto !important; min-height: 0 !important; }
#examples .gallery-container { position: static; height: auto; min-height: 0; }
#examples .grid-wrap { overflow: hidden; padding: 8px; }
#examples .grid-container { grid-template-columns: repeat(4, 1fr) !important; padding: 0;
  grid-template-rows: none !important; grid-auto-rows: auto !important; gap: 6px; }
#examples .thumbnail-item { aspect-ratio: 1; width: 100%; height: auto; }
.chat .image-container img { max-height: 110px; width: auto !important; }
.counts { line-height: 1.55; padding: 2px 4px; font-size: 0.95rem; }
.counts .view { color: #0072b2; font-weight: 600; }
.counts .map { color: #00795a; font-weight: 600; }
.counts .ends { color: #c04f00; font-weight: 600; }
.counts .shape, .counts .told { color: var(--body-text-color-subdued); }
"""
NO_PICTURE = '<div class="counts told">Upload a picture, or choose an example.</div>'
ENTER = "Ask about the picture, for example: Is there a boat in the image?"


@dataclass(frozen=True)
class Parts:
    """The components of the page; those of the models in the models' order."""

    upload: Any
    examples: Any
    preset: Any
    max_tiles: Any
    banner: Any
    question: Any
    send: Any
    stop: Any
    clear: Any
    chats: tuple[Any, ...]
    pictures: tuple[Any, ...]
    counts: tuple[Any, ...]

    @property
    def shown(self) -> list[Any]:
        """What a question and its answer change."""
        return [*self.chats, self.banner, self.question, self.send, self.stop]


def lay_out(
    names: Sequence[str], begun: str, presets: Sequence[str], examples: Sequence[Path]
) -> Parts:
    """The controls on the left; for one model its chat and its picture, for two each in a column
    of its own; the question below them."""
    title = html.escape(" and ".join(names))
    _words(f"<div><b>{TITLE}</b><span>{title}</span></div>", "head")
    banner = _words("", "banner", visible=False)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=250):
            upload = gr.Image(
                label="Picture",
                show_label=False,
                sources=["upload", "clipboard"],
                type="filepath",
                image_mode=None,
                height=210,
                buttons=[],
                elem_id="upload",
            )
            gallery = gr.Gallery(
                value=[str(path) for path in examples],
                label="Examples",
                columns=4,
                rows=2,
                height=104,
                allow_preview=False,
                interactive=False,
                buttons=[],
                object_fit="cover",
                elem_id="examples",
            )
            preset = gr.Dropdown(
                [(begun, AS_BEGUN), *presets],
                value=AS_BEGUN,
                label="Geometry",
                info="Another one begins a new conversation.",
                elem_id="preset",
            )
            max_tiles = gr.Slider(
                0,
                LARGEST_GRID,
                value=0,
                step=1,
                label="Most tiles of a grid",
                info="0: the grids of the geometry.",
                elem_id="max-tiles",
            )
        columns = [_model_column(name, number, len(names)) for number, name in enumerate(names)]
    with gr.Row(equal_height=True):
        question = gr.Textbox(
            placeholder=ENTER,
            show_label=False,
            container=False,
            lines=1,
            max_lines=4,
            scale=8,
            autofocus=True,
            elem_id="question",
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
        stop = gr.Button(
            "Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="stop"
        )
        clear = gr.Button("Clear", scale=1, min_width=90, elem_id="clear")
    chats, pictures, counts = zip(*columns, strict=True)
    return Parts(
        upload, gallery, preset, max_tiles, banner, question, send, stop, clear, chats, pictures,
        counts,
    )  # fmt: skip


def _model_column(name: str, number: int, total: int) -> tuple[Any, Any, Any]:
    """A model's chat, picture and counts: side by side where it is alone, else in one column."""
    if total == 1:
        with gr.Column(scale=4, min_width=320):
            chat = _chat(name, number, 562)
        with gr.Column(scale=4, min_width=320):
            picture, counts = _seen(number, 330)
        return chat, picture, counts
    with gr.Column(scale=4, min_width=320):
        picture, counts = _seen(number, 210)
        return _chat(name, number, 250), picture, counts


def _chat(name: str, number: int, height: int) -> Any:
    return gr.Chatbot(
        label=name,
        height=height,
        render_markdown=False,  # an answer is text; nothing in it is made a link
        sanitize_html=True,
        allow_tags=False,
        latex_delimiters=[],
        feedback_options=None,
        buttons=[],
        placeholder=f"{html.escape(name)} is waiting for a question.",
        elem_id=f"chat-{number}",
        elem_classes="chat",
    )


def _seen(number: int, height: int) -> tuple[Any, Any]:
    picture = gr.Image(
        label="What the model sees",
        show_label=False,
        interactive=False,
        height=height,
        buttons=["fullscreen"],
        elem_id=f"tiles-{number}",
    )
    return picture, _words(NO_PICTURE, f"counts-{number}")


def _words(markup: str, elem_id: str, visible: bool = True) -> Any:
    """Words with some HTML. (Gradio's own HTML component needs the browser to run code made out of
    text, which the page's policy does not allow.)"""
    return gr.Markdown(
        markup, sanitize_html=True, latex_delimiters=[], elem_id=elem_id, visible=visible
    )
