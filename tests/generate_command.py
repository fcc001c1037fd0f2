"""`llava-hd data generate` as the tests call it: small COCO files, a local server, a fake key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from coco_files import write_coco
from openai_server import OpenAIServer

from llava_hd.cli.main import main

KEY = "sk-test-0123456789-abcdef"
KINDS = "conversation=5,detail=50%,reasoning=6"
NUM_TASKS = 15


class Bench:
    """A folder with the annotation files, and the command over it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.captions, self.instances = write_coco(folder)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def words(self, server: OpenAIServer | None, *more: str) -> list[str]:
        """The command line; what `more` says again counts."""
        return [
            *("data", "generate", "--captions", str(self.captions)),
            *("--instances", str(self.instances), "--kinds", KINDS, "--model", "small"),
            *("--out", str(self.out), "--endpoint", server.url if server else "http://x/v1"),
            *more,
        ]

    def run(self, server: OpenAIServer | None, *more: str) -> int:
        return main(self.words(server, *more))

    def journal(self) -> list[dict[str, Any]]:
        lines = (self.out / "journal.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def rejected(self) -> dict[str, str]:
        """Reason by task."""
        lines = (self.out / "rejected.jsonl").read_text().splitlines()
        return {value["key"]: value["reason"] for value in map(json.loads, lines)}

    def data(self) -> bytes:
        return (self.out / "data.json").read_bytes()

    def files(self) -> str:
        """All that was written."""
        return "\n".join(path.read_text() for path in sorted(self.out.rglob("*")))


def one_line(text: str) -> str:
    """The last line of standard error, which has to be the error's only one."""
    lines = [line for line in text.splitlines() if line.startswith("llava-hd: ")]
    assert len(lines) == 1 and text.endswith(lines[0] + "\n"), text
    return lines[0]
