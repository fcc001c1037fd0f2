"""A conversation template as Jinja, for transformers, vLLM and TRL: the training prompt, byte for
byte.

Contents may be text or lists of parts. As in training, the images of a human turn stand in front
of it, each followed by a newline, wherever their tags were. `{% generation %}` encloses what is
learned, so that a trainer can mask the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..hd.errors import UsageError
from .prompt import IMAGE_TAG, Turn, get_template


def chat_template(name: str, end_token: str) -> str:
    """The Jinja text of a template of model/prompt.py; `end_token` ends an answer.

    Raises UsageError for a template that only captions.
    """
    template = get_template(name)
    if template.only_answers:
        raise UsageError(
            f"model.template {name!r} is that of stage 1, which answers no questions; "
            "export the model of stage 2"
        )
    end = end_token if template.end_token else template.answer_end
    words = {
        "SYSTEM": template.system.rstrip(" "),
        "GAP": template.system[len(template.system.rstrip(" ")) :],
        "USER_END": template.user_end,
        "USER": template.user,
        "ASSISTANT": template.assistant,
        "SPACE": " " if template.assistant else "",
        "ANSWER_END": end,
        "TAG": IMAGE_TAG,
    }
    lines = JINJA
    for word in sorted(words, key=len, reverse=True):
        lines = lines.replace(f"@{word}@", _quoted(words[word]))
    return "".join(line.strip() for line in lines.splitlines())


def messages(turns: Sequence[Turn], listed: bool) -> list[dict[str, Any]]:
    """Turns in Hugging Face's words; listed: contents as parts, images first."""
    roles = {"human": "user", "gpt": "assistant"}
    made: list[dict[str, Any]] = []
    for turn in turns:
        content: Any = turn.text
        if listed:
            images = turn.text.count(IMAGE_TAG) if turn.role == "human" else 0
            text = turn.text.replace(IMAGE_TAG, "") if images else turn.text
            content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
        made.append({"role": roles[turn.role], "content": content})
    return made


def _quoted(text: str) -> str:
    """A Jinja string; JSON's is one for the characters that templates have."""
    return json.dumps(text, ensure_ascii=False)


JINJA = """
{%- set sys = @SYSTEM@ -%}
{%- set off = 0 -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set off = 1 -%}
    {%- if messages[0]['content'] is string -%}
        {%- set sys = messages[0]['content'] -%}
    {%- else -%}
        {%- set sys = messages[0]['content'][0]['text'] -%}
    {%- endif -%}
{%- endif -%}
{{- sys + @GAP@ -}}
{%- for m in messages[off:] -%}
    {%- set ns = namespace(images=0, text='') -%}
    {%- if m['content'] is string -%}
        {%- set ns.text = m['content'] -%}
    {%- else -%}
        {%- for c in m['content'] -%}
            {%- if c['type'] in ('image', 'image_url') -%}
                {%- set ns.images = ns.images + 1 -%}
            {%- elif c['type'] == 'text' -%}
                {%- set ns.text = ns.text + c['text'] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if m['role'] == 'user' -%}
        {%- set ns.images = ns.images + ns.text.split(@TAG@) | length - 1 -%}
        {%- if ns.images -%}
            {%- set ns.text = (@TAG@ + '\\n') * ns.images + ns.text.replace(@TAG@, '').strip() -%}
        {%- endif -%}
        {{- @USER@ + ns.text + @USER_END@ -}}
    {%- else -%}
        {{- @ASSISTANT@ -}}
        {%- generation -%}{{- @SPACE@ + ns.text + @ANSWER_END@ -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @ASSISTANT@ -}}{%- endif -%}
"""
