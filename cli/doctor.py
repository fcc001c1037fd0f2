"""`llava-hd doctor`: what this machine can run, and for the rest the reason and the remedy."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

from .parser import Parser

# Distribution, module to import, whether the project needs it, what it is for, how to get it.
LIBRARIES = [
    ("torch", "torch", True, "tensors", "pip install -c constraints.txt torch"),
    ("transformers", "transformers", True, "CLIP and the LLM", "make test installs it"),
    ("deepspeed", "deepspeed", True, "training", "make test installs it"),
    ("pillow", "PIL", True, "reading images", "make test installs it"),
    ("triton", "triton", False, "fused kernels on a GPU", "pip install triton"),
    (
        "flash-attn",
        "flash_attn",
        False,
        "attention=flash_attention_2",
        "needs an NVIDIA GPU, nvcc and a matching torch: "
        "pip install flash-attn --no-build-isolation",
    ),
    ("xformers", "xformers", False, "memory-efficient attention", "pip install xformers"),
    ("liger-kernel", "liger_kernel", False, "fused norms on a GPU", "pip install liger-kernel"),
    ("gradio", "gradio", False, "the web page", "pip install 'llava-hd[web]'"),
    ("lmms-eval", "lmms_eval", False, "the other benchmarks", "pip install 'llava-hd[eval]'"),
]


@dataclass(frozen=True)
class Finding:
    """One line of the report: a library or a feature, its state, the reason and the remedy."""

    name: str
    state: str  # ok | missing | broken
    detail: str
    needed: bool
    remedy: str = ""


def build_parser(command: str) -> Parser:
    """Options of `llava-hd doctor`."""
    parser = Parser(
        command,
        "Report what this machine can run, and for the rest the reason and the remedy. "
        "Exit code 1 when something that the project needs is missing.",
        ["llava-hd doctor", "llava-hd doctor --json"],
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when a needed library is missing or broken."""
    machine = describe_machine()
    # DeepSpeed talks on standard output while it is imported; that belongs to the report alone.
    with contextlib.redirect_stdout(sys.stderr):
        findings = [probe_library(*row) for row in LIBRARIES]
        try:
            findings += [*probe_attention(), *probe_kernels()]
        except ValueError as error:  # a bad switch or table, with file and remedy
            findings.append(Finding("kernels", "broken", str(error), needed=True))
        findings.append(probe_device())
    if args.json:
        report = {"machine": machine, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        _print_table(machine, findings)
    return int(any(f.needed and f.state != "ok" for f in findings))


def describe_machine() -> dict[str, Any]:
    """Python, system, processors and memory (GiB)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(memory, 1),
    }


def probe_library(name: str, module: str, needed: bool, purpose: str, remedy: str) -> Finding:
    """Import a library and report its version, or why it does not import."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", f"not installed; it is for {purpose}", needed, remedy)
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        return Finding(name, "broken", f"{version} does not import: {first}", needed, remedy)
    return Finding(name, "ok", f"{version}: {purpose}", needed)


def probe_attention() -> list[Finding]:
    """Which `attention=` choices this machine can run, and what `auto` takes for what."""
    import torch

    from ..model.attention import IMPLEMENTATIONS, auto_choice, default_device, refusal

    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    findings = []
    for kind in ("packed", "dense", "tower"):
        packed = kind == "packed"
        chosen = auto_choice(f"attention_{kind}", device, dtype, rows=2**15, packed=packed)
        detail = f"{kind}: {chosen.name} ({chosen.reason})"
        findings.append(Finding("attention=auto", "ok", detail, False))
    for name in IMPLEMENTATIONS:
        reason = refusal(name)
        if reason is not None:
            remedy = "use attention=auto; or see the library above"
            findings.append(Finding(f"attention={name}", "missing", reason, False, remedy))
        elif name != "auto":
            whose = "kernels/" if name == "triton" else "the library's"
            findings.append(Finding(f"attention={name}", "ok", whose, False))
    return findings


def probe_kernels() -> list[Finding]:
    """Which path each operation takes on this machine, and why; on a GPU for bf16."""
    import torch

    from ..kernels.backend import PRODUCTS, choose
    from ..model.attention import default_device

    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    findings = []
    for name in ("gelu_mlp", "place_rows"):
        choice = choose(name, device, dtype, rows=2**17)
        detail = f"{choice.path}: {choice.reason}"
        if choice.table is not None:
            start = choice.table.entries[name].from_rows
            detail += f"; from {start} rows on, below that torch; {choice.table.path}"
            if name == "gelu_mlp":
                ours = [p for p in PRODUCTS if choice.table.uses(p, 2**17)]
                detail += f"; products of our own: {', '.join(ours) or 'none'}"
        findings.append(Finding(f"kernel {name}", "ok", detail, False))
    findings.append(Finding("kernel linear_loss", "ok", "torch: no Triton kernel", False))
    return findings


def probe_device() -> Finding:
    """The CUDA device, or the word that everything runs on the CPU."""
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
        detail = f"{count} x {name}, {memory:.0f} GiB each"
        return Finding("cuda", "ok", detail, False)
    build = torch.version.cuda
    reason = "this torch is a CPU build" if build is None else f"torch for CUDA {build}, no device"
    return Finding("cuda", "missing", f"{reason}; all runs on the CPU", False, "a CUDA machine")


def _print_table(machine: dict[str, Any], findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"Python {machine['python']} on {machine['system']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB"
    )
    table = Table(show_edge=False)
    for title in ("", "state", "what and why", "remedy"):
        table.add_column(title, overflow="fold")
    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, state, escape(finding.detail), escape(finding.remedy))
    console.print(table)
