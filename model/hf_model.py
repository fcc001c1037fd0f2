"""LlavaHD as transformers' auto classes know models; importing this file registers it.

import llava_hd.model.hf_model
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..hd.errors import UsageError
from ..hd.grid import suggest
from ..hd.plan import plan_image
from .adapter_config import is_adapter
from .attention import default_device
from .config import MODEL_TYPE, LlavaHDConfig, read_config_json
from .generate import pad_left
from .hf_processor import LlavaHDProcessor
from .llava_hd import LlavaHD
from .native_state import dtype_name
from .packing import PackedBatch, Sample, pack
from .prompt import IGNORE, SampleError
from .tensor_files import folder_tensors

DTYPE_NAMES = ("float32", "bfloat16", "float16")
# What the auto classes hand on by themselves, and options about downloads, which there are none of.
HARMLESS = (
    "adapter_kwargs", "cache_dir", "code_revision", "force_download", "local_files_only",
    "low_cpu_mem_usage", "revision", "token", "use_safetensors",
)  # fmt: skip


class LlavaHDHFConfig(PreTrainedConfig):
    """Our config.json as a transformers configuration; `llava_hd` is it as LlavaHDConfig."""

    model_type = MODEL_TYPE

    def __init__(self, values: dict[str, Any] | None = None, **options: Any) -> None:
        self.values = dict(
            values or {}
        )  # first: the base class asks for the text's while it begins
        super().__init__(**options)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Any:
        """The configuration of a model folder of ours."""
        return cls.from_dict(read_config_json(path), **options)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **options: Any) -> Any:
        """Of what config.json holds."""
        options.pop("name_or_path", None)
        wants_rest = options.pop("return_unused_kwargs", False)
        made = cls(values.get("values", values))
        return (made, options) if wants_rest else made

    @property
    def llava_hd(self) -> LlavaHDConfig:
        """The same as a value of ours; raises UsageError."""
        return LlavaHDConfig.from_dict(self.values)

    def get_text_config(self, *args: Any, **options: Any) -> PreTrainedConfig:
        """The language model's."""
        text = dict(self.values.get("text", {}))
        if not text:
            return self
        return AutoConfig.for_model(text.pop("model_type"), **text)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return dict(self.values)


class LlavaHDForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """LlavaHD with transformers' forward and generate. Rows of a batch are packed, so padding is
    never computed and may stand on either side."""

    config_class = LlavaHDHFConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: LlavaHDHFConfig, model: LlavaHD | None = None) -> None:
        super().__init__(config)
        self.model = _random(config.llava_hd) if model is None else model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *args: Any,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LlavaHDForConditionalGeneration:
        """A model folder of ours; fp32 unless told ("auto": as stored), on one device. Options that
        would change the model otherwise (quantization_config, ...) are refused with UsageError."""
        unknown = sorted(k for k, v in options.items() if v and k not in HARMLESS)
        if unknown or args:
            raise UsageError(
                f"from_pretrained of a llava_hd model does not know {', '.join(unknown) or args}; "
                "leave it out"
            )
        wanted = _dtype(Path(path), dtype if dtype is not None else torch_dtype)
        model = LlavaHD.from_pretrained(
            path, wanted, _device(device_map), attn_implementation or "auto"
        )
        return cls(LlavaHDHFConfig(model.config.to_dict()), model).eval()

    def save_pretrained(
        self,
        path: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """A model folder of ours, written by the main process alone; state_dict: what a trainer
        gathered, in place of the model's own tensors."""
        if options.get("push_to_hub") or options.get("variant"):
            raise UsageError("push_to_hub and variant are not known here; leave them out")
        if not is_main_process:
            return
        own = (
            None
            if state_dict is None
            else {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
        )
        self.model.save_pretrained(path, own)

    @property
    def base_model(self) -> Any:
        """What gives the last hidden states, which TRL multiplies with the head itself."""
        return self._hidden_states

    def _hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """last_hidden_state `[B S H]`, zero at padding."""
        _refuse_places(options)
        kept = _kept(input_ids, attention_mask)
        flat = self.model.hidden(self._packed(input_ids, kept, pixel_values, image_sizes, None))
        hidden = flat.new_zeros(*input_ids.shape, flat.shape[-1])
        hidden[kept] = flat
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def get_input_embeddings(self) -> Any:
        return self.model.language.causal_lm.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.language.head

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """As in our own training."""
        self.model.checkpoint_gradients()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids, attention_mask, labels `[B S]`; pixel_values and image_sizes as
        LlavaHDProcessor makes them. loss: mean over the labelled tokens, or their sum by
        `num_items_in_batch`; logits `[B S V]`, zero at padding."""
        _refuse_places(options)
        kept = _kept(input_ids, attention_mask)
        batch = self._packed(input_ids, kept, pixel_values, image_sizes, labels)
        hidden = self.model.hidden(batch)
        flat = self.model.language.head(hidden)
        logits = flat.new_zeros(*input_ids.shape, flat.shape[-1])
        logits[kept] = flat
        loss = None
        if labels is not None:
            head = self.model.language.head
            total = head(hidden, batch.targets, batch.weights, batch.label_rows)
            loss = total / (batch.loss_units if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The prompts as given with what follows, `[B S+new]`, or transformers' output with it as
        `sequences`; options are those of transformers' `generate`."""
        kept = _kept(input_ids, attention_mask)
        batch = self._packed(input_ids, kept, pixel_values, image_sizes, None)
        x, mask = pad_left(self.model.embeddings(batch), kept.sum(1).tolist())
        causal_lm = self.model.language.causal_lm
        options.setdefault("eos_token_id", self.model.config.text.get("eos_token_id"))
        options.setdefault("pad_token_id", self.model.config.text.get("pad_token_id"))
        made = causal_lm.generate(inputs_embeds=x, attention_mask=mask, **options)
        new = (made if isinstance(made, Tensor) else made.sequences).to(input_ids.device)
        asked = input_ids.repeat_interleave(len(new) // len(input_ids), dim=0)
        whole = torch.cat([asked, new], dim=1)
        if isinstance(made, Tensor):
            return whole
        made.sequences = whole
        return made

    def _packed(
        self,
        input_ids: Tensor,
        kept: Tensor,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
        labels: Tensor | None,
    ) -> PackedBatch:
        config = self.model.config
        if (pixel_values is None) != (image_sizes is None):
            raise UsageError("pixel_values and image_sizes belong together; give both or neither")
        sizes = [] if image_sizes is None else image_sizes.tolist()
        plans = [plan_image((height, width), config.hd) for height, width in sizes]
        due = [plan.num_tiles for plan in plans]
        if pixel_values is not None and len(pixel_values) != sum(due):
            raise SampleError(
                f"{len(pixel_values)} tiles for images that are cut into {sum(due)}; give "
                "pixel_values as LlavaHDProcessor makes them"
            )
        tiles = () if pixel_values is None else pixel_values.split(due)
        samples, used = [], 0
        for number, keep in enumerate(kept):
            ids = input_ids[number][keep].tolist()
            own = [IGNORE] * len(ids) if labels is None else labels[number][keep].tolist()
            left, first = ids.count(config.image_token_id), used
            while left > 0 and used < len(plans):
                left -= plans[used].num_tokens
                used += 1
            cut = tuple(tile.cpu() for tile in tiles[first:used])
            samples.append(Sample(ids, own, tuple(plans[first:used]), cut, f"row {number}"))
        if used < len(plans):
            raise SampleError(
                f"{len(plans)} images, of which {len(plans) - used} have no visual tokens in the "
                "texts; give each text its own images"
            )
        return pack(samples, config).to(self.model.device)


def _kept(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where tokens are that are not padding, bool `[B S]`."""
    return torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()


def _refuse_places(options: Mapping[str, Any]) -> None:
    """UsageError for positions, caches and embeddings of the caller's own, which change what is
    computed and would be passed over."""
    for name in ("inputs_embeds", "past_key_values", "position_ids"):
        if options.get(name) is not None:
            raise UsageError(f"{name} is not taken here; give input_ids with attention_mask")


def _dtype(folder: Path, wanted: torch.dtype | str | None) -> torch.dtype:
    if wanted is None:
        return torch.float32
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted == "auto":
        if is_adapter(folder):
            raise UsageError(f"{folder} is an adapter, which does not name a dtype; name one")
        return getattr(torch, dtype_name(dict(folder_tensors(folder))))
    if wanted not in DTYPE_NAMES:
        raise UsageError(f"dtype {wanted!r} is unknown; {suggest(wanted, DTYPE_NAMES)}")
    return getattr(torch, wanted)


def _device(device_map: str | torch.device | Mapping[str, Any] | None) -> str | torch.device:
    """The one device of a map."""
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise UsageError(f"device_map {dict(device_map)} has several parts; name one device")
        return _device(device_map[""])
    if device_map == "auto":
        return default_device()
    return "cpu" if device_map is None else device_map


def _random(config: LlavaHDConfig) -> LlavaHD:
    text = dict(config.text)
    causal_lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(text.pop("model_type"), **text)
    )
    clip = CLIPVisionModel(CLIPVisionConfig.from_dict(dict(config.vision)))
    return LlavaHD(config, clip, causal_lm)


AutoConfig.register(MODEL_TYPE, LlavaHDHFConfig, exist_ok=True)
AutoModel.register(LlavaHDHFConfig, LlavaHDForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(
    LlavaHDHFConfig, LlavaHDForConditionalGeneration, exist_ok=True
)
AutoProcessor.register(LlavaHDHFConfig, LlavaHDProcessor, exist_ok=True)
