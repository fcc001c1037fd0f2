"""`llava-hd export`: a model as others read it. A rename, not a conversion: no number changes.

llava_next: transformers' LlavaNext in the key layout of 4.47, for transformers, vLLM and SGLang's
fallback. llava: the original LLaVA, for SGLang and llama.cpp. llava_hf: transformers' Llava, for
one padded view. What a target cannot express is refused, by the names of the fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..hd.errors import UsageError
from ..hd.grid import PRESETS, HDConfig
from .config import LlavaHDConfig
from .export_check import CheckReport, check_original, check_transformers
from .export_files import generation_values, transformers_config, write_processor, write_tokenizer
from .export_original import write_original
from .key_names import LANGUAGE, to_transformers
from .native_state import DTYPES, dtype_name, native_state
from .processor import Processor
from .whole_folder import save_tensors, whole_folder, write_json

FORMATS = ("llava_next", "llava", "llava_hf")
ARCHITECTURES = {
    "llava_next": ("LlavaNextForConditionalGeneration", "LlavaNext"),
    "llava_hf": ("LlavaForConditionalGeneration", "Llava"),
}
# Format -> what it fixes of the geometry, and the presets that have it.
TILED: dict[str, object] = {
    "global_view": "squash",
    "keep": "llava_next",
    "row_end": True,
    "pad_colour": "black",
    "max_visual_tokens": None,
}
SINGLE: dict[str, object] = {
    "global_view": "pad",
    "row_end": False,
    "pad_colour": "mean",
    "max_visual_tokens": None,
}


@dataclass(frozen=True)
class ExportReport:
    """What was written and how the check went (model/export_check.py)."""

    out: str
    format: str
    dtype: str
    tensors: int
    check: CheckReport


def export_folder(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    dtype: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write the model of a folder to `out`, a new folder, in another format: checked and whole, or
    not at all.

    dtype: of the weights, "auto" (as they are), "fp32", "bf16" or "fp16". Raises UsageError for
    what the format cannot express, LlavaHDError where the check finds a difference.
    """
    folder, target = Path(source), Path(out)
    say("reading the model")
    processor = Processor.from_pretrained(folder)
    refuse_inexpressible(processor.config, format)
    config, gathered = native_state(folder, None if dtype == "auto" else DTYPES[dtype])
    state = gathered.state
    check_names(state)
    name = dtype_name(state)
    with whole_folder(target) as unfinished:
        say(f"writing {target}")
        write_tokenizer(unfinished, processor)
        values = generation_values(processor.tokenizer, config.text)
        write_json(unfinished / "generation_config.json", values)
        if format == "llava":
            write_original(unfinished, target, config, state, name)
            say("reading it back")
            check = check_original(unfinished, config, state, processor)
        else:
            write_transformers(unfinished, config, state, format, name)
            say("reading it with transformers, both models in fp32")
            check = check_transformers(unfinished, config, state, processor)
    return ExportReport(str(target), format, name, len(state), check)


def write_transformers(
    folder: Path, config: LlavaHDConfig, state: dict[str, Tensor], format: str, dtype: str
) -> None:
    """Configuration, processor and weights of transformers' LlavaNext or Llava."""
    architecture, processor = ARCHITECTURES[format]
    kind = "llava_next" if format == "llava_next" else "llava"
    write_json(folder / "config.json", transformers_config(config, kind, architecture, dtype))
    write_processor(folder, config, processor)
    save_tensors({to_transformers(name): tensor for name, tensor in state.items()}, folder)


def refuse_inexpressible(config: LlavaHDConfig, format: str) -> None:
    """UsageError naming every field that the format has no word for, and what would do."""
    if format not in FORMATS:
        raise UsageError(f"--format {format!r} is unknown; there is {', '.join(FORMATS)}")
    wrong = _differing(config, format)
    if not wrong:
        return
    fitting = [other for other in FORMATS if not _differing(config, other)]
    if fitting:
        remedy = f"--format {' or '.join(fitting)} can"
    else:
        able = [p for p in PRESETS if not _geometry(PRESETS[p], format)]
        remedy = f"train with preset {' or '.join(able)} for it"
    raise UsageError(f"--format {format} cannot express {', '.join(wrong)}; {remedy}")


def _differing(config: LlavaHDConfig, format: str) -> list[str]:
    wrong = _geometry(config.hd, format)
    if format != "llava" and config.projector != "mlp2x_gelu":
        wrong.append(f"model.projector {config.projector}")
    kind = config.text["model_type"]
    if format == "llava" and kind != "llama":
        wrong.append(f"a language model of type {kind}")
    return wrong


def _geometry(hd: HDConfig, format: str) -> list[str]:
    """The fields of the geometry that the format does not have, with their values."""
    tiled = format == "llava_next" or (format == "llava" and bool(hd.grids))
    wrong = [
        f"hd.{name} {getattr(hd, name)!r}"
        for name, value in (TILED if tiled else SINGLE).items()
        if getattr(hd, name) != value
    ]
    if bool(hd.grids) != tiled:
        wrong.insert(0, f"hd.grids {list(hd.grids)}")
    return wrong


def check_names(state: dict[str, Tensor]) -> None:
    """UsageError for a language model whose tensors are not below `model.` and `lm_head.`."""
    for name in state:
        if name.startswith(LANGUAGE) and not name.startswith(
            (LANGUAGE + "model.", LANGUAGE + "lm_head.")
        ):
            raise UsageError(f"{name}: language models with such names are not exported")
