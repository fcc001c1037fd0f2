"""llava-hd export: what is written is read by others, to the last bit, or nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from export_files import exported, native
from PIL import Image
from safetensors import safe_open
from tiny import random_image, tiny_hd
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
)

from llava_hd.cli.main import main
from llava_hd.hd.errors import LlavaHDError, UsageError
from llava_hd.hd.plan import plan_image
from llava_hd.model import export as export_module
from llava_hd.model.chat_template import chat_template, messages
from llava_hd.model.export import export_folder, refuse_inexpressible
from llava_hd.model.import_folder import import_folder
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import pack
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import Turn, prompt_text

PAIRS = [("hd448", "llava_next"), ("hdflex", "llava_next"), ("base", "llava_hf")]


@pytest.mark.parametrize(("preset", "format"), PAIRS)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_gives_the_same_logits_to_the_last_bit(
    preset: str, format: str, tied: bool, tmp_path: Path
) -> None:
    model = native(tmp_path / "model", preset, tied=tied)
    report = export_folder(model, tmp_path / "out", format)
    assert report.check.images == 10
    assert report.check.max_difference == 0.0
    assert report.check.same_ids and report.check.prompts == 14
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llama_tokenizer_splits_prompts_as_in_training(legacy: bool, tmp_path: Path) -> None:
    model = native(tmp_path / "model", "hd448", legacy=legacy)
    report = export_folder(model, tmp_path / "out", "llava_next")
    assert report.check.same_ids and report.check.max_difference == 0.0
    values = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "LlamaTokenizerFast"  # 4.x knows no other


@pytest.mark.parametrize(
    ("preset", "format", "options"),
    [*((p, f, {}) for p, f in PAIRS), ("hdflex", "llava", {}), ("base", "llava", {}),
     ("base", "llava", {"projector": "linear"})],
)  # fmt: skip
def test_there_and_back_changes_nothing(
    preset: str, format: str, options: dict[str, str], tmp_path: Path
) -> None:
    model = native(tmp_path / "model", preset, **options)
    import_folder(exported(model, tmp_path / "out", format), tmp_path / "back")
    before, after = (LlavaHD.from_pretrained(tmp_path / name) for name in ("model", "back"))
    assert before.config.hd == after.config.hd and before.config.projector == after.config.projector
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounded_weights_are_checked_as_rounded(dtype: str, tmp_path: Path) -> None:
    model = native(tmp_path / "model", "hd448")
    report = export_folder(model, tmp_path / "out", "llava_next", dtype=dtype)
    name = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert report.dtype == name and report.check.max_difference == 0.0
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == values["text_config"]["torch_dtype"] == name


TURNS = [
    ["<image>\nWhat is it?"],
    ["What <image> is\nit?  "],
    ["<image><image> Compare.", " Both red. ", "Why?\n", 'It\'s "so".', "And {{ x }}?"],
    ["Hi", "Hello <b>&amp;</b>"],
    ["", "x"],
    ["é 漢字 \U0001f600 {% x %}", "\n\n"],
]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("listed", [False, True])
def test_the_chat_template_is_the_training_prompt(
    turns: list[str], listed: bool, parts: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts / "language")
    tokenizer.chat_template = chat_template("vicuna_v1", "</s>")
    said = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(turns)]
    rendered = tokenizer.apply_chat_template(
        messages(said, listed), tokenize=False, add_generation_prompt=len(said) % 2 == 1
    )
    assert rendered == prompt_text(said, "vicuna_v1", "</s>")


def test_the_chat_template_marks_what_is_learned(parts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts / "language")
    tokenizer.chat_template = chat_template("vicuna_v1", "</s>")
    said = [Turn("human", "Who?"), Turn("gpt", "The cat."), Turn("human", "No"), Turn("gpt", "Yes")]
    made = tokenizer.apply_chat_template(
        messages(said, False), return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
    learned = [token for token, mask in pairs if mask]
    assert tokenizer.decode(learned) == " The cat.</s> Yes</s>"


def test_the_prompt_as_text_is_the_prompt_as_ids(tmp_path: Path) -> None:
    processor = Processor.from_pretrained(native(tmp_path / "model", "hd448"))
    sample = processor.question("What is it?", [random_image((60, 60))])
    ids = [
        token for i, token in enumerate(sample.ids) if not (token == 3 and sample.ids[i - 1] == 3)
    ]
    due = prompt_text([Turn("human", "<image>\nWhat is it?")], "vicuna_v1", "</s>")
    assert processor.tokenizer.decode(ids) == "<s>" + due


def test_autoprocessor_reads_the_export(tmp_path: Path) -> None:
    out = exported(native(tmp_path / "model", "hdflex"), tmp_path / "out", "llava_next")
    processor = AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "LlavaNextProcessor"
    made = processor(images=random_image((120, 160)), text="USER: <image>\nHi", return_tensors="pt")
    plan = plan_image((120, 160), tiny_hd("hdflex"))
    assert int((made["input_ids"] == 3).sum()) == plan.num_tokens
    assert AutoConfig.from_pretrained(out).image_grid_pinpoints[0] == [56, 56]


@torch.inference_mode()
def test_the_original_layout_computes_the_same_as_the_original_code_would(tmp_path: Path) -> None:
    """LLaVA's own forward restated: tiles by its rule, encode, unpad, row-ends, language model."""
    model = native(tmp_path / "model", "hd448")
    out = exported(model, tmp_path / "out", "llava")
    values = json.loads((out / "config.json").read_text())
    assert isinstance(AutoConfig.from_pretrained(out), LlavaConfig)
    assert "clip" in values["mm_vision_tower"] and Path(values["mm_vision_tower"]).is_absolute()
    assert values["image_grid_pinpoints"] == [[112, 112]]
    tower = CLIPVisionModel.from_pretrained(values["mm_vision_tower"]).eval()
    known = LlamaConfig().to_dict().keys() | {"rope_theta"}
    causal_lm = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in values.items() if k in known}))
    with safe_open(out / "model.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = causal_lm.eval().load_state_dict(state, strict=False)
    assert not found.missing_keys
    assert all("mm_projector" in name or "newline" in name for name in found.unexpected_keys)

    image = random_image((120, 160))
    wide, high = 112, 84  # 160x120 fitted into 112x112
    canvas = image.resize((wide, high), resample=3)
    padded = Image.new("RGB", (112, 112))
    padded.paste(canvas, (0, 14))
    crops = [padded.crop((x, y, x + 56, y + 56)) for y in (0, 56) for x in (0, 56)]
    images = CLIPImageProcessorPil.from_pretrained(out)
    pixels = images([image.resize((56, 56), resample=3), *crops], return_tensors="pt")
    features = tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    hidden = torch.nn.functional.linear(
        features, state["model.mm_projector.0.weight"], state["model.mm_projector.0.bias"]
    )
    rows = torch.nn.functional.linear(
        torch.nn.functional.gelu(hidden),
        state["model.mm_projector.2.weight"],
        state["model.mm_projector.2.bias"],
    )
    merged = rearrange(rows[1:], "(r s) (i j) h -> (r i) (s j) h", r=2, i=4)
    merged = merged[1:-1]  # 8 rows, of which 6 hold the image
    ends = state["model.image_newline"].expand(len(merged), 1, -1)
    visual = torch.cat([rows[0], torch.cat([merged, ends], 1).flatten(0, 1)])

    ours = LlavaHD.from_pretrained(model, attention="sdpa")
    sample = Processor.from_pretrained(model).question("What is it?", [image])
    ids = torch.tensor(sample.ids)
    x = causal_lm.get_input_embeddings()(ids)
    x[ids == 3] = visual
    logits = causal_lm(inputs_embeds=x[None]).logits[0]
    torch.testing.assert_close(logits, ours.logits(pack([sample], ours.config)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("preset", "options", "format", "words"),
    [
        ("hd448-paper", {}, "llava_next", ["hd.global_view 'pad'", "hd.keep 'touched'",
         "hd.pad_colour 'mean'", "train with preset hd448 or hdflex"]),
        ("hdflex-paper", {}, "llava", ["hd.keep 'touched'", "preset hd448 or hdflex"]),
        ("base", {}, "llava_next", ["hd.grids []", "hd.row_end False",
         "--format llava or llava_hf"]),
        ("hd448", {}, "llava_hf", ["hd.grids [(2, 2)]", "--format llava_next or llava can"]),
        ("base", {"projector": "linear"}, "llava_hf", ["model.projector linear",
         "--format llava can"]),
        ("base", {"template": "plain"}, "llava_hf", ["model.template 'plain'", "stage 2"]),
    ],
)  # fmt: skip
def test_what_a_format_cannot_express_is_refused_with_what_can(
    preset: str, options: dict[str, str], format: str, words: list[str], tmp_path: Path
) -> None:
    model = native(tmp_path / "model", preset, **options)
    with pytest.raises(UsageError) as error:
        export_folder(model, tmp_path / "out", format)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("format", "hd", "options", "words"),
    [
        ("llava_next", {"row_end": False}, {}, ["hd.row_end False", "preset hd448 or hdflex"]),
        ("llava", {"row_end": False}, {}, ["hd.row_end False", "preset hd448 or hdflex"]),
        ("llava_next", {"global_view": "none"}, {}, ["hd.global_view 'none'", "preset hd448"]),
        ("llava", {"global_view": "none"}, {}, ["hd.global_view 'none'", "preset hd448"]),
        ("llava_next", {}, {"projector": "linear"},
         ["model.projector linear", "--format llava can"]),
    ],
)  # fmt: skip
def test_what_an_ablation_leaves_out_is_refused_where_a_format_takes_it_for_granted(
    format: str, hd: dict[str, object], options: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    config = Processor.from_pretrained(native(tmp_path / "model", "hd448")).config
    changed = replace(config, hd=replace(config.hd, **hd), **options)
    with pytest.raises(UsageError) as error:
        refuse_inexpressible(changed, format)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_difference_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = native(tmp_path / "model", "hd448")
    whole = export_module.to_transformers
    swapped = {"projector.bias_1": "projector.bias_2", "projector.bias_2": "projector.bias_1"}
    monkeypatch.setattr(export_module, "to_transformers", lambda n: whole(swapped.get(n, n)))
    with pytest.raises(LlavaHDError, match="was not written as it is"):
        export_folder(model, tmp_path / "out", "llava_next")
    assert not list(tmp_path.glob("*out*"))


def test_a_layout_that_transformers_reads_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = native(tmp_path / "model", "hd448")
    values = export_module.transformers_config

    def wrong(*args: object) -> dict[str, object]:
        return values(*args) | {"vision_feature_layer": -1}

    monkeypatch.setattr(export_module, "transformers_config", wrong)
    with pytest.raises(LlavaHDError, match="logits differ"):
        export_folder(model, tmp_path / "out", "llava_next")
    assert not list(tmp_path.glob("*out*"))


def test_an_adapter_is_to_be_merged_first(parts: Path, tmp_path: Path) -> None:
    from lora_models import built, give_adapter

    from llava_hd.model.adapter_config import BaseFolders

    model, processor = built(parts)
    folders = {name: str(parts / name) for name in ("vision", "language")}
    give_adapter(model, BaseFolders(**folders))
    model.save_pretrained(tmp_path / "lora")
    processor.save_pretrained(tmp_path / "lora")
    with pytest.raises(UsageError, match="llava-hd merge-lora"):
        export_folder(tmp_path / "lora", tmp_path / "out", "llava_next")


def test_a_full_disk_leaves_no_target(tmp_path: Path) -> None:
    native(tmp_path / "model", "hd448")
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "model"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("could not be written") == 3 and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


FULL_DISK = """
import resource, signal, sys
from llava_hd.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (1_000, 20_000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert main(["export", sys.argv[1], "--format", "llava_next", "--out", sys.argv[2]]) == 1
"""


def test_the_command_prints_how_the_check_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = native(tmp_path / "model", "hd448")
    words = ["export", str(model), "--format", "llava_next"]
    assert main([*words, "--out", str(tmp_path / "a"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["check"]["max_difference"] == 0.0
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    assert "10 image sizes: largest difference 0.0e+00" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "b")]) == 2
    assert "is not empty" in capsys.readouterr().err
