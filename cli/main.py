"""The `llava-hd` command: finds the sub-command, runs it, turns errors into one line and a code.

Sub-command modules are imported only when they are called, so `llava-hd --help` imports neither
torch nor transformers. Each has `build_parser() -> Parser` and `run(args) -> int`.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 bad data, 75 interrupted but
resumable.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from importlib.metadata import version

from ..hd.errors import Interrupted, LlavaHDError, UsageError

# Words of the command -> (module in cli/, what it does in one line).
COMMANDS: dict[tuple[str, ...], tuple[str, str]] = {
    ("demo",): ("demo", "the whole job at nano size: data, two stages, two models, comparison"),
    ("ablate",): (
        "ablate",
        "train variants of the nano recipe by a plan, beside the paper's tables",
    ),
    ("tile",): ("tile", "draw what the model sees of an image, and count its tokens"),
    ("chat",): ("chat", "talk with a model about images, in the terminal or in a pipe"),
    ("pretrain",): ("train", "stage 1: train the projector and the row-end token"),
    ("finetune",): ("train", "stage 2: train the projector, the row-end token and the LLM"),
    ("estimate",): ("estimate", "memory, time and price of a training run, before it runs"),
    ("merge-lora",): ("merge_lora", "make a LoRA adapter and its base one whole model, checked"),
    ("import",): ("import_model", "others' checkpoints as a model of ours"),
    ("export",): ("export_model", "a model in the formats of transformers, vLLM and SGLang"),
    ("web",): ("web", "a page to chat with one model or two about pictures, in the browser"),
    ("eval", "pope"): ("eval_pope", "answer and score POPE, or score existing answers"),
    ("eval", "pack"): (
        "eval_pack",
        "make an offline task pack for lmms-eval of a benchmark's files",
    ),
    ("eval", "serve"): ("eval_serve", "answer OpenAI's chat completions, with images, on a port"),
    ("eval", "scienceqa"): ("eval_scienceqa", "answer and score ScienceQA, also with a thought"),
    ("eval", "llava-bench"): ("eval_llava_bench", "answer LLaVA-Bench's questions, for a judge"),
    ("judge",): ("judge", "let a language model rate LLaVA-Bench answers: the relative score"),
    ("compare",): ("compare", "compare models' POPE answers with paired tests, report.html"),
    ("data", "mix"): ("data_mix", "build the instruction mixture from public annotation files"),
    ("data", "check"): ("data_check", "read all records and images, report what is bad"),
    ("data", "generate"): (
        "data_generate",
        "let a language model write data from COCO annotations",
    ),
    ("nano", "build"): ("nano", "make the shipped nano weights again from a seed"),
    ("bench", "kernels"): ("bench_kernels", "time our kernels against their rivals, with errors"),
    ("bench", "faults"): ("bench_faults", "training runs killed, torn and fed with rubbish"),
    ("bench", "loader"): ("bench_loader", "our loader's images/s against transformers' processors"),
    ("bench", "packing"): ("bench_packing", "train with packs and with padded batches, in turns"),
    ("bench", "pope"): ("bench_pope", "questions/s with a shared image prefix, and of the rivals"),
    ("bench", "step"): ("bench_step", "whole training steps of ours and of transformers, in turn"),
    ("bench", "report"): ("bench_report", "charts and docs/performance.md from the results"),
    ("bench", "tune"): ("bench_tune", "measure the kernels' block sizes on this GPU"),
    ("bench", "inspect"): ("bench_inspect", "compile the kernels and print what they need"),
    ("doctor",): ("doctor", "report what this machine can run, and why not the rest"),
}


def console() -> int:
    """The entry point of the `llava-hd` command: `main`, and for a rank of a distributed run that
    fails an exit at once.

    Its peers' connections are still open then, and the C++ threads behind them can abort the
    process while Python takes itself down ("terminate called without an active exception"), which
    hides the exit code from whoever started the ranks.
    """
    code = main()
    if code and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code (see the module's docstring)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = _without_launchers_word([word for word in words if word != "--debug"])
    try:
        return _dispatch(words, debug)
    except Interrupted as stop:
        print(f"llava-hd: interrupted; {stop}", file=sys.stderr)
        return stop.exit_code
    except LlavaHDError as error:
        if debug:
            traceback.print_exc()
        print(f"llava-hd: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a folder without permission, a file that went away
        if debug:
            traceback.print_exc()
        print(f"llava-hd: error: {_one_line(error)}", file=sys.stderr)
        return LlavaHDError.exit_code
    except KeyboardInterrupt:
        print("llava-hd: interrupted; start the same command again to go on", file=sys.stderr)
        return Interrupted.exit_code


def _without_launchers_word(words: list[str]) -> list[str]:
    """The words without `--local_rank=N`, which `deepspeed --no_python` puts in front of them; the
    rank is in LOCAL_RANK as well."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched and words and re.fullmatch(r"--local[_-]rank=\d+", words[0]):
        return words[1:]
    return words


def _one_line(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def _dispatch(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"llava-hd {version('llava-hd')}")
        return 0
    for length in (2, 1):
        name = tuple(words[:length])
        if name in COMMANDS:
            module = importlib.import_module(f"llava_hd.cli.{COMMANDS[name][0]}")
            parser = module.build_parser(" ".join(name))
            rest = [*(["--debug"] if debug else []), *words[length:]]
            return module.run(parser.parse_args(rest))
    if words[1:] in (["-h"], ["--help"]) and _group(words[0]):
        print(help_text(words[0]))
        return 0
    raise UsageError(_unknown_command(words))


def _group(word: str) -> list[tuple[str, ...]]:
    """The commands of two words that begin with `word`."""
    return [name for name in COMMANDS if len(name) == 2 and name[0] == word]


def _unknown_command(words: list[str]) -> str:
    group = _group(words[0])
    if group:
        choices = ", ".join(" ".join(name) for name in group)
        return f"'{' '.join(words[:2])}' is not a command; there is: {choices}"
    known = [" ".join(name) for name in COMMANDS]
    close = difflib.get_close_matches(words[0], known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see llava-hd --help"
    return f"'{words[0]}' is not a command; {hint}"


def help_text(group: str = "") -> str:
    """The text of `llava-hd --help`, or of a group of commands (`llava-hd bench --help`)."""
    names = _group(group) if group else list(COMMANDS)
    width = max(len(" ".join(name)) for name in names)
    lines = [f"  {' '.join(name):<{width}}  {COMMANDS[name][1]}" for name in names]
    if group:
        usage = f"usage: llava-hd {group} COMMAND [options]   (--help after it tells the options)"
        return "\n".join([usage, "", "commands:", *lines])
    return "\n".join(
        [
            "usage: llava-hd COMMAND [options]        (llava-hd COMMAND --help tells the options)",
            "",
            "LLaVA-1.5-HD: tile images, train in two stages, compare hallucination on POPE.",
            "",
            "commands:",
            *lines,
            "",
            "examples:",
            "  llava-hd demo --out runs/demo",
            "  llava-hd tile photo.jpg --preset hdflex --out tiles",
            "  llava-hd finetune --config vicuna-7b-hd448 --data.path mix665k.json",
            "",
            "Every command takes --debug (a traceback instead of one line).",
        ]
    )


if __name__ == "__main__":
    sys.exit(console())
