"""The one argument parser of the commands: jsonargparse with one-line errors and examples."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse

from ..hd.errors import UsageError

# jsonargparse's words for a value of the wrong type, and for one that fits no type of several.
WRONG_TYPE = re.compile(r'Parser key "(?P<key>[^"]+)": Expected an? (?P<kind>.+?)\. Got value: ')
NO_TYPE = re.compile(
    r'Parser key "(?P<key>[^"]+)": Does not validate .*?Subtypes: \[(?P<kinds>.*)\] Errors:'
)
# The value as it was given stands at the very end, behind what each type made of it.
GIVEN = re.compile(r".*(?:Given|Got) value: (?P<value>.*)$")
# A type, as jsonargparse shows it, in words. (Types inside a dict or tuple are not told apart.)
KIND = re.compile(r"<class '(?P<name>\w+)'>|\b(?P<outer>dict|tuple)\[|Literal\[(?P<choice>.*?)\]")
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "dict": "a table as JSON, {...}",
    "tuple": "a list, [...]",
    "NoneType": "null",
}


class HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help; description and examples keep their lines."""


class Parser(jsonargparse.ArgumentParser):
    """`jsonargparse.ArgumentParser` whose errors are `UsageError` (exit code 2), one line each.

    Options may be written with `-` or `_`; an unknown one is answered with the nearest known one.
    """

    def __init__(self, command: str, description: str, examples: list[str]) -> None:
        epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples)
        super().__init__(
            prog=f"llava-hd {command}",
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.command = command
        self.add_argument(
            "--debug", action="store_true", help="a traceback of an error instead of one line"
        )

    def parse_args(self, args: Sequence[str], **options: Any) -> jsonargparse.Namespace:
        """Parse the words behind the command."""
        return super().parse_args([self._known_spelling(word) for word in args], **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one line, with the remedy where it can be told."""
        text = " ".join(part.strip() for part in message.strip().splitlines() if part.strip())
        raise UsageError(f"{self.command}: {self._plainly(text)}") from ex

    @property
    def long_options(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _known_spelling(self, word: str) -> str:
        """`--out-dir=x` as `--out_dir=x` where only that is an option, and the other way round."""
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in self._option_string_actions:
            for spelling in ("--" + name[2:].replace("-", "_"), "--" + name[2:].replace("_", "-")):
                if spelling in self._option_string_actions:
                    return spelling + equals + value
        return word

    def _plainly(self, text: str) -> str:
        unknown = re.search(r"unrecognized arguments: (?P<words>.*)", text, re.IGNORECASE)
        if unknown:
            return self._unknown(unknown["words"].split()[0])
        found = NO_TYPE.search(text) or WRONG_TYPE.search(text)
        given = GIVEN.search(text)
        if found is None or given is None:
            return text
        parts = found.groupdict()
        wanted, choices = [], []
        for kind in KIND.finditer(parts.get("kinds") or parts.get("kind") or ""):
            if kind["choice"]:
                wanted.append(f"one of {kind['choice']}")
                choices += re.findall(r"[\w.]+", kind["choice"])
            else:
                name = kind["name"] or kind["outer"]
                wanted.append(KINDS.get(name, name))
        if not wanted:
            return text
        hint = self._near(given["value"], choices)
        return f"--{found['key']} must be {' or '.join(wanted)}, not {given['value']!r}{hint}"

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word!r} is not expected; see llava-hd {self.command} --help"
        name = word.partition("=")[0]
        bare = name.lstrip("-")
        known = [option.lstrip("-") for option in self.long_options]
        meant = [option for option in known if option.endswith(f".{bare}")]
        meant += difflib.get_close_matches(bare, known, n=1)
        meant += [option for option in known if len(bare) > 2 and option.startswith(bare)]
        if meant:
            return f"{name} is not an option; did you mean '--{meant[0]}'?"
        return f"{name} is not an option; see llava-hd {self.command} --help"

    @staticmethod
    def _near(word: str, known: Sequence[str]) -> str:
        close = difflib.get_close_matches(word, known, n=1)
        return f"; did you mean {close[0]!r}?" if close else ""
