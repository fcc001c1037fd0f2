"""The one argument parser of the commands: jsonargparse with one-line errors and examples."""

from __future__ import annotations

from typing import NoReturn

import jsonargparse

from ..hd.errors import UsageError


class Parser(jsonargparse.ArgumentParser):
    """`jsonargparse.ArgumentParser` whose errors are `UsageError` (exit code 2), one line each."""

    def __init__(self, command: str, description: str, examples: list[str]) -> None:
        epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples)
        super().__init__(
            prog=f"llava-hd {command}",
            description=description,
            epilog=epilog,
            formatter_class=jsonargparse.DefaultHelpFormatter,
        )
        self.command = command

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one line; the first line of a jsonargparse message says it all."""
        text = " ".join(part.strip() for part in message.strip().splitlines() if part.strip())
        raise UsageError(f"{self.command}: {text}") from ex
