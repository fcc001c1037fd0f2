"""The commands' parser: one-line errors with a remedy, spellings, and a readable help."""

from __future__ import annotations

import importlib
import re
from typing import Any, Literal

import pytest

from llava_hd.cli import main as main_module
from llava_hd.cli.parser import Parser
from llava_hd.hd.errors import UsageError


@pytest.fixture
def parser() -> Parser:
    parser = Parser("cook", "Cooks.", ["llava-hd cook rice", "llava-hd cook soup --dry-run"])
    parser.add_argument("dishes", nargs="*", type=str)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output_dir", type=str)
    parser.add_argument("--oven.degrees", type=float | None)
    parser.add_argument("--mode", type=Literal["boil", "bake"], default="boil")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--most", type=int | None)
    parser.add_argument("--spices", type=dict[str, Any] | None)
    parser.add_argument("--range", type=tuple[float, float])
    parser.add_argument("--lid", type=bool)
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--outputdir", "x"], "--outputdir is not an option; did you mean '--output_dir'?"),
        (["--degrees", "3"], "--degrees is not an option; did you mean '--oven.degrees'?"),
        (["--oven", "3"], "--oven is not an option; did you mean '--oven.degrees'?"),
        (["--zzz"], "--zzz is not an option; see llava-hd cook --help"),
        (["--count", "many"], "--count must be a whole number, not 'many'"),
        (["--oven.degrees", "hot"], "--oven.degrees must be a number or null, not 'hot'"),
        (["--most", "1e2"], "--most must be a whole number or null, not '1e2'"),
        (["--spices", "hot"], "--spices must be a table as JSON, {...} or null, not 'hot'"),
        (["--range", "0.9"], "--range must be a list, [...], not '0.9'"),
        (["--lid", "maybe"], "--lid must be true or false, not 'maybe'"),
        (["--mode", "bale"], "--mode must be one of 'boil', 'bake', not 'bale'; did you mean"),
        (["--count"], "argument --count: expected one argument"),
    ],
)
def test_a_wrong_option_is_told_in_one_line_with_a_remedy(parser, words, message):
    with pytest.raises(UsageError) as caught:
        parser.parse_args(words)
    assert str(caught.value).startswith(f"cook: {message}")
    assert "\n" not in str(caught.value)


def test_dashes_and_underscores_are_the_same(parser):
    args = parser.parse_args(["--dry_run", "--output-dir=a_b-c", "soup_of-day"])
    assert args.dry_run and args.output_dir == "a_b-c" and args.dishes == ["soup_of-day"]


def test_a_value_may_look_like_another_spelling_of_an_option(parser):
    assert parser.parse_args(["--output_dir", "dry_run"]).output_dir == "dry_run"


def test_options_are_not_abbreviated(parser):
    with pytest.raises(UsageError, match="--coun is not an option; did you mean '--count'"):
        parser.parse_args(["--coun", "3"])


def test_the_help_keeps_each_example_on_its_line(parser):
    lines = parser.format_help().splitlines()
    assert lines[-3:] == ["examples:", "  llava-hd cook rice", "  llava-hd cook soup --dry-run"]


def test_a_group_of_commands_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "bench kernels" in out and "bench tune" in out and "finetune" not in out
    assert main_module.main(["bench"]) == 2


@pytest.mark.parametrize("name", main_module.COMMANDS, ids=" ".join)
def test_the_help_of_each_command_has_examples_and_no_inner_names(name: tuple[str, ...]) -> None:
    module = importlib.import_module(f"llava_hd.cli.{main_module.COMMANDS[name][0]}")
    text = module.build_parser(" ".join(name)).format_help()
    assert f"llava-hd {' '.join(name)}" in text.partition("\nexamples:\n")[2]
    assert not re.search(r"<function|<class|object at 0x|lambda", text)


def test_a_failed_rank_leaves_at_once_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(main_module.os, "_exit", left.append)
    for code in (3, 0):
        monkeypatch.setattr(main_module, "main", lambda code=code: code)
        monkeypatch.delenv("RANK", raising=False)
        assert main_module.console() == code
        monkeypatch.setenv("RANK", "1")
        main_module.console()
    assert left == [3]
