"""`llava-hd pretrain` and `llava-hd finetune`: a recipe, flags over it, and the run.

A recipe is found by name among the shipped ones (`--config vicuna-7b-hd448`) or by path. Every
setting is a flag of the same dotted name; LLaVA's and transformers' names of flags work as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_origin, get_type_hints

from jsonargparse import Namespace

from ..hd.errors import Interrupted, UsageError
from ..hd.grid import HDConfig
from ..train.config import SECTIONS, TrainConfig, leaves
from ..train.launch import check_num_processes, run_workers, worker_command
from ..train.recipe import config_yaml, load_config, recipe_names
from .parser import Parser

if TYPE_CHECKING:
    from ..train.run import TrainResult

# Other projects' names of the same settings, and those of our other commands; on the command line.
ALIASES: dict[str, tuple[str, ...]] = {
    "per_device_batch_size": ("per_device_train_batch_size",),
    "epochs": ("num_train_epochs",),
    "gradient_clipping": ("max_grad_norm",),
    "max_length": ("model_max_length",),
    "resume": ("resume_from_checkpoint",),
    "optimizer.lr": ("learning_rate",),
    "optimizer.projector_lr": ("mm_projector_lr",),
    "optimizer.vision_lr": ("mm_vision_tower_lr",),
    "optimizer.weight_decay": ("weight_decay",),
    "optimizer.warmup_ratio": ("warmup_ratio",),
    "optimizer.schedule": ("lr_scheduler_type",),
    "data.path": ("data_path",),
    "data.images": ("image_folder",),
    "data.num_workers": ("dataloader_num_workers",),
    "model.language": ("model_name_or_path",),
    "model.vision": ("vision_tower",),
    "model.projector_from": ("pretrain_mm_mlp_adapter",),
    "model.projector": ("mm_projector_type",),
    "model.vision_layer": ("mm_vision_select_layer",),
    "model.max_tiles": ("max_tiles",),
    "model.max_visual_tokens": ("max_visual_tokens",),
    "model.grid": ("grid",),
    "train_vision": ("unfreeze_mm_vision_tower",),
    "lora.r": ("lora_r",),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.bits": ("bits",),
    "lora.quant_type": ("quant_type",),
    "lora.double_quant": ("double_quant",),
}
# Flags whose values mean another setting: flag -> value -> (setting, its value).
SWITCHES: dict[str, dict[bool, tuple[str, Any]]] = {
    "bf16": {True: ("precision", "bf16"), False: ("precision", "fp32")},
    "group_by_modality_length": {
        True: ("data.batching", "modality"),
        False: ("data.batching", "plain"),
    },
    # The table that the single settings (lora.r) then go into; null: none.
    "lora_enable": {True: ("lora", {}), False: ("lora", None)},
}
STAGES = {
    "pretrain": "Stage 1: train the projector and the row-end token; tower and language model are "
    "frozen.",
    "finetune": "Stage 2: train projector, row-end token and language model (or, with lora "
    "settings, adapters in it); the tower is frozen unless train_vision is set.",
}


def build_parser(command: str) -> Parser:
    """The options of `llava-hd pretrain` or `llava-hd finetune`."""
    names = [name for name in recipe_names() if name.endswith(command)]
    parser = Parser(
        command, f"{STAGES[command]}\n\nshipped recipes: {', '.join(names)}", _examples(command)
    )
    parser.usage = f"llava-hd {command} --config RECIPE [--num-processes N] [--SETTING VALUE ...]"
    parser.add_argument("--config", type=str, required=True, help="recipe: shipped name or a file")
    parser.add_argument("--num-processes", type=int, help="local workers, one per GPU")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would run, write nothing"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe")
    add_settings(parser)
    parser.add_argument("--stage", type=str, default=command, help=argparse.SUPPRESS)
    return parser


def add_settings(parser: Parser) -> None:
    """A flag for every setting of a run; `given_settings` reads them back."""
    groups = {section: parser.add_argument_group(f"{section} settings") for section in SECTIONS}
    groups[""] = parser.add_argument_group("settings of the run")
    for name, field in leaves(TrainConfig):
        if name != "stage":
            flags = [f"--{flag}" for flag in (name, *ALIASES.get(name, ()))]
            kind = _kind(name)
            # Only what is given comes back, so that the recipe's values stay.
            groups[name.rpartition(".")[0]].add_argument(
                *flags, type=kind, default=argparse.SUPPRESS, help=_help(field), **_metavar(kind)
            )
    for name in SWITCHES:
        parser.add_argument(
            f"--{name}", type=bool, default=argparse.SUPPRESS, help="as in LLaVA's scripts"
        )


def _examples(command: str) -> list[str]:
    if command == "pretrain":
        return [
            "llava-hd pretrain --config vicuna-7b-hd448 --num-processes 8 \\",
            "    --model.vision models/clip-vit-large-patch14 --model.language models/vicuna-7b \\",
            "    --data.path blip_558k.json --data.images images --output_dir runs/7b-stage1",
            "llava-hd pretrain --config nano-hd --data.path d.json --data.images i --output_dir o",
        ]
    return [
        "llava-hd finetune --config vicuna-7b-hd448 --num-processes 8 \\",
        "    --model.projector_from runs/7b-stage1 --data.path mix665k.json \\",
        "    --data.images images --output_dir runs/7b-hd448",
        "llava-hd finetune --config vicuna-7b-hd448-lora --bits 4 --zero.stage 2 # QLoRA",
        "llava-hd finetune --config my.yaml --resume auto     # go on after an interruption",
        "torchrun --nproc_per_node 8 --no-python llava-hd finetune --config my.yaml",
    ]


def _kind(name: str) -> Any:
    """The type of a setting for the command line."""
    section, _, key = name.rpartition(".")
    kind = get_type_hints(SECTIONS[section] if section else TrainConfig)[key]
    return dict[str, Any] | None if kind == HDConfig | None else kind


def _help(field: dataclasses.Field[Any]) -> str:
    """A setting's line of help, with its default where it has one that says something."""
    text = field.metadata["help"]
    if field.default in (None, "", dataclasses.MISSING):
        return text
    return f"{text}; default {field.default}"


def _metavar(kind: Any) -> dict[str, str]:
    """A short name for the value in the help; choices speak for themselves."""
    for number, word in ((float, "X"), (int, "N")):
        if kind in (number, number | None):
            return {"metavar": word}
    return {} if get_origin(kind) is Literal or kind is bool else {"metavar": "VALUE"}


def run(args: Namespace) -> int:
    """Check, then train here or in workers."""
    if args.stage not in STAGES:
        raise UsageError(f"--stage {args.stage} is not a stage; there is {', '.join(STAGES)}")
    config = load_config(args.config, args.stage, given_settings(args))
    if args.print_config:
        print(config_yaml(config), end="")
        return 0
    workers = check_num_processes(args.num_processes, os.environ)
    if args.dry_run:
        return _dry_run(config, max(1, workers))
    if workers:
        return _train_in_workers(config, workers, args.debug)
    return _train_here(config)


def _dry_run(config: TrainConfig, world_size: int) -> int:
    """Check everything, read the run's heaviest passes, and say what would run; writes nothing."""
    from ..train.estimate_dry_run import dry_run
    from ..train.prepare import find_checkpoint, prepare
    from .estimate import bar, dry_run_lines

    job = prepare(config, world_size, find_checkpoint(config))
    if job.state.is_finished:
        print(f"{job.checkpoint} is finished after {job.state.step} steps; nothing to do")
        return 0
    with bar() as done:
        found = dry_run(job, world_size, done)
    print("\n".join(dry_run_lines(job, found, world_size)))
    return 0


def _train_in_workers(config: TrainConfig, workers: int, debug: bool) -> int:
    """Start one process per rank; faults that can be known before are told once, from here."""
    from ..train.prepare import find_checkpoint, prepare

    prepare(config, workers, find_checkpoint(config))
    with TemporaryDirectory(prefix="llava-hd-") as folder:
        recipe = Path(folder) / "train_config.yaml"
        recipe.write_text(config_yaml(config), encoding="utf-8")
        words = [config.stage, "--config", str(recipe), *(["--debug"] if debug else [])]
        return run_workers(worker_command(words), workers)


def _train_here(config: TrainConfig) -> int:
    """Train in this process, as one rank of its launcher's world or alone."""
    from ..train.run import train
    from ..train.together import StoppedByPeer
    from ..train.zero import leave_world
    from .train_progress import TrainProgress

    is_main = os.environ.get("RANK", "0") == "0"
    with TrainProgress(shown=is_main) as progress:
        try:
            result = train(config, progress)
        except StoppedByPeer as stop:
            return stop.exit_code
        except KeyboardInterrupt:
            if is_main:
                raise Interrupted(_how_to_go_on(config)) from None
            return Interrupted.exit_code
    leave_world()
    if is_main:
        print(_summary(result))
    return 0


def _summary(result: TrainResult) -> str:
    """What a run came to, in a line or two."""
    fill = "" if result.pack_fill is None else f", packs {result.pack_fill:.0%} full"
    odd = [
        f"{count} {what}"
        for count, what in (
            (result.skipped, "steps left out"),
            (result.bad_samples, "bad samples"),
        )
        if count
    ]
    return (
        f"{result.output_dir}: {result.num_steps:,} steps, loss {result.last_loss:.4f}, "
        f"{result.seconds:.0f} s; {result.tokens_per_second:,.0f} useful tokens/s, padding "
        f"{result.padding:.1%}{fill}{'; ' if odd else ''}{', '.join(odd)}{_cache_words(result)}"
    )


def _cache_words(result: TrainResult) -> str:
    """What the feature cache saved, if there is one."""
    use = result.cache
    if use is None:
        return ""
    damaged = f", {use.damaged} damaged ones made again" if use.damaged else ""
    stopped = ", then storing stopped" if use.stopped else ""
    return (
        f"; feature cache: {use.read:,} of {use.images:,} images "
        f"({use.read / max(1, use.images):.0%}) neither decoded nor encoded, {use.stored:,} stored "
        f"({use.stored_bytes / 2**30:.2f} GiB){stopped}{damaged}"
    )


def _how_to_go_on(config: TrainConfig) -> str:
    """What to do after Ctrl-C, by what the run has left."""
    from ..train.prepare import find_checkpoint, is_fresh

    folder = Path(config.output_dir)
    checkpoint = find_checkpoint(dataclasses.replace(config, resume="auto"))
    if checkpoint is not None:
        return f"go on from {checkpoint} with --resume auto"
    if is_fresh(folder):
        return "no step was logged; start the same command again"
    return (
        f"{folder} holds no checkpoint (save_steps is {config.save_steps}), so there is nothing to "
        "go on from; remove it and start again"
    )


def given_settings(args: Namespace) -> dict[str, Any]:
    """The settings that were given as flags, by dotted name."""
    names = {name for name, _ in leaves(TrainConfig)} - {"stage"}
    given = {name: value for name, value in args.items() if name in names}
    switched = {}
    for switch, meanings in SWITCHES.items():
        if switch in args:
            name, value = meanings[args[switch]]
            switched[name] = value
            below = [other for other in given if other.startswith(f"{name}.")]
            if value is None and below:
                raise UsageError(f"--{switch} false, but --{below[0]} is given; leave one out")
    # Tables first, so that their settings go into them; of one setting the switch has the word.
    return switched | given | switched
