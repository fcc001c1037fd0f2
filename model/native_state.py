"""The tensors of a model folder under our names, whoever wrote it; mapped from the files, checked
to be exactly those of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..hd.errors import DataError, UsageError
from .adapter_config import is_adapter
from .config import MODEL_TYPE, LlavaHDConfig, read_config_json, readable
from .foreign import read_config
from .key_names import EMBEDDING, HEAD, from_transformers, is_computed
from .outline import outline
from .tensor_files import folder_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Gathered:
    """Tensors under our names, and the names of those in the files that no model needs."""

    state: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def take(
        self,
        where: Path,
        tensors: Iterable[tuple[str, Tensor]],
        rename: Callable[[str], str | None],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add tensors by their new names, in `dtype` if given. DataError for a name that the
        layout does not have, and for one that comes twice."""
        for name, tensor in tensors:
            if is_computed(name):
                self.left_out.append(name)
                continue
            ours = rename(name)
            if ours is None:
                raise DataError(
                    f"{where} has an unknown tensor {name}; its config.json and its weights do "
                    "not belong together"
                )
            if ours in self.state:
                raise DataError(f"{where} holds {name} twice (both are {ours}); copy it again")
            self.state[ours] = tensor if dtype is None else tensor.to(dtype)


def check_complete(where: Path, state: Mapping[str, Tensor], config: LlavaHDConfig) -> None:
    """DataError unless the tensors are those of the configuration, none missing, none left over,
    each of its shape and of finite numbers. A tied head may be missing."""
    with readable(f"{where}/config.json"):
        due = outline(config, torch.float32).state_dict()
    tied = {HEAD} if config.text.get("tie_word_embeddings") else set()
    missing = sorted(due.keys() - state.keys() - tied)
    unknown = sorted(state.keys() - due.keys())
    shaped = sorted(k for k in state.keys() & due.keys() if state[k].shape != due[k].shape)
    for what, names in (
        ("lacks", missing),
        ("has an unknown tensor", unknown),
        ("has a tensor of another shape:", shaped),
    ):
        if names:
            shape = ""
            if names is shaped:
                shape = f" {tuple(state[names[0]].shape)}, not {tuple(due[names[0]].shape)}"
            raise DataError(
                f"model folder {where} {what} {names[0]}{shape} ({len(names)} such); its "
                "config.json and its weights do not belong together"
            )
    strange = sorted(k for k, t in state.items() if not t.is_floating_point())
    if strange:
        raise DataError(f"model folder {where}: {strange[0]} is {state[strange[0]].dtype}")
    for name, tensor in state.items():
        # a nan is the smallest and the largest; isfinite would need copies as large as the tensor
        ends = torch.stack(torch.aminmax(tensor)) if tensor.numel() else torch.zeros(1)
        if not bool(torch.isfinite(ends).all()):
            raise DataError(
                f"model folder {where}: {name} holds numbers that are not finite as "
                f"{tensor.dtype}; copy the model again, or choose a wider --dtype"
            )


def native_state(folder: Path, dtype: torch.dtype | None = None) -> tuple[LlavaHDConfig, Gathered]:
    """Configuration and tensors of a whole model's folder: ours, or transformers' llava_next or
    llava in any layout. Raises UsageError and DataError."""
    if is_adapter(folder):
        raise UsageError(
            f"{folder} is an adapter; make it a whole model first: "
            f"llava-hd merge-lora {folder} --out DIR"
        )
    config = read_config(folder)
    own = read_config_json(folder)["model_type"] == MODEL_TYPE
    gathered = Gathered()
    gathered.take(folder, folder_tensors(folder), str if own else from_transformers, dtype)
    drop_tied_head(folder, gathered, config)
    check_complete(folder, gathered.state, config)
    return config, gathered


def drop_tied_head(where: Path, gathered: Gathered, config: LlavaHDConfig) -> None:
    """Leave a head out that is the embedding again; DataError where it is said to be and is not."""
    if not config.text.get("tie_word_embeddings") or HEAD not in gathered.state:
        return
    head, table = gathered.state.pop(HEAD), gathered.state.get(EMBEDDING)
    if table is None or not torch.equal(head, table):
        raise DataError(
            f"{where}/config.json says tie_word_embeddings, but the head of the weights is not the "
            "embedding; set it to false there"
        )
    gathered.left_out.append(HEAD)


def dtype_name(state: Mapping[str, Tensor]) -> str:
    """torch's name of the type of most numbers ("bfloat16")."""
    sizes: dict[str, int] = {}
    for tensor in state.values():
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.numel()
    return max(sizes, key=lambda name: sizes[name])
