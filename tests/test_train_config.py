"""Recipes and flags: strict, typed, written back whole, and the paper's numbers in the recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_hd.hd.errors import UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.limits import ResolutionLimits, limited
from llava_hd.train.config import SHIPPED_FOLDER, TrainConfig, leaves, part_folder
from llava_hd.train.recipe import (
    changed_settings,
    config_from,
    config_values,
    config_yaml,
    find_recipe,
    load_config,
    read_recipe,
    recipe_names,
    with_values,
)

GOOD: dict[str, Any] = {
    "stage": "finetune",
    "output_dir": "out",
    "model": {
        "vision": "v",
        "language": "l",
        "preset": "hd448",
        "projector_from": "s1",
    },
    "data": {"path": "d.json", "images": "i"},
}
HYPERPARAMETERS = {
    # stage: lr, batch, ZeRO stage; the paper's table 9 and LLaVA's scripts
    "pretrain": (1e-3, 256, 2),
    "finetune": (2e-5, 128, 3),
}


def built(**settings: Any) -> TrainConfig:
    flags = {name.replace("__", "."): value for name, value in settings.items()}
    return config_from(with_values(GOOD, flags), "r.yaml")


def test_the_shipped_recipes_are_all_there():
    models = [
        f"vicuna-{size}-{p}" for size in ("7b", "13b") for p in ("base336", "hd448", "hdflex")
    ]
    models += ["nano-base", "nano-hd"]
    wanted = {f"{model}-{stage}" for model in models for stage in HYPERPARAMETERS}
    adapted = [f"vicuna-{size}-{p}" for size in ("7b", "13b") for p in ("base336", "hd448")]
    wanted |= {f"{model}-lora-finetune" for model in adapted}
    assert set(recipe_names()) == wanted


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("vicuna")])
def test_vicuna_recipes_have_the_papers_hyperparameters(name):
    stage = name.rpartition("-")[2]
    config = load_config(name, stage)
    lr, batch, zero = HYPERPARAMETERS[stage]
    if "-lora-" in name:  # LLaVA's finetune_lora.sh
        lr = 2e-4
        assert config.lora is not None and config.optimizer.projector_lr == 2e-5
        assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (128, 256, 0.05)
    assert config.stage == stage
    assert (config.optimizer.lr, config.global_batch_size, config.zero.stage) == (lr, batch, zero)
    assert config.samples_per_step(world_size=8) == batch and config.accumulation(8) == 1
    assert (config.epochs, config.optimizer.warmup_ratio, config.optimizer.weight_decay) == (
        1,
        0.03,
        0,
    )
    assert (config.optimizer.schedule, config.precision) == ("cosine", "bf16")
    assert "gradient_clipping" in read_recipe(find_recipe(name, stage))
    assert config.gradient_clipping == 0.0


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("preset", ["hd448", "hdflex"])
def test_hd_recipes_begin_at_the_base_resolution_and_tile_in_stage_2_only(size, preset):
    stage_1 = load_config(f"vicuna-{size}-{preset}", "pretrain")
    stage_2 = load_config(f"vicuna-{size}-{preset}", "finetune")
    assert stage_1.model.geometry is not None and stage_1.model.geometry.grids == ()
    assert stage_1.model.geometry.tile_px == 224 and stage_1.model.geometry.row_end
    assert stage_2.model.geometry == PRESETS[preset]
    assert stage_2.model.projector_from == stage_1.output_dir
    assert (stage_2.model.vision, stage_2.model.language) == (
        stage_1.model.vision,
        stage_1.model.language,
    )


def test_stage_2_of_hd_has_room_for_every_image_beside_the_original_text():
    longest = max(256 + rows * 16 * (cols * 16 + 1) for rows, cols in PRESETS["hdflex"].grids)
    assert longest == 1888
    config = load_config("vicuna-13b-hdflex", "finetune")
    assert longest + 2048 <= config.max_length == 4096


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_nano_recipes_of_both_models_train_alike(stage):
    base = config_values(load_config("nano-base", stage))
    hd = config_values(load_config("nano-hd", stage))
    for values in (base, hd):
        for name in ("vision", "hd", "projector_from"):
            del values["model"][name]
        del values["output_dir"]
    assert base == hd


def test_a_recipe_is_found_by_its_name_with_or_without_the_stage_or_by_its_path(tmp_path):
    path = find_recipe("vicuna-7b-hd448", "finetune")
    assert path.name == "vicuna-7b-hd448-finetune.yaml"
    assert find_recipe("vicuna-7b-hd448-finetune", "finetune") == path
    assert find_recipe(str(path), "finetune") == path
    with pytest.raises(UsageError, match=r"did you mean 'vicuna-7b-hd448-finetune'"):
        find_recipe("vicuna-7b-hd44", "finetune")
    with pytest.raises(UsageError, match="no such file"):
        find_recipe(str(tmp_path / "mine.yaml"), "finetune")
    with pytest.raises(UsageError, match="recipe for finetune; llava-hd finetune"):
        load_config("vicuna-7b-hd448-finetune", "pretrain")
    (tmp_path / "mine.yaml").write_text("stage: pretrian", encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine\.yaml: stage 'pretrian' .* mean 'pretrain'\?"):
        load_config(tmp_path / "mine.yaml", "pretrain")


@pytest.mark.parametrize("text", ["a: [", "3", "", "- a"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_config(path, "finetune")


def test_a_recipe_cannot_make_python_objects(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: !!python/object/apply:os.system ['true']", encoding="utf-8")
    with pytest.raises(UsageError, match="not YAML"):
        load_config(path, "finetune")


@pytest.mark.parametrize("name", recipe_names())
def test_the_resolved_configuration_rebuilds_the_run(name):
    config = load_config(name, name.rpartition("-")[2])
    again = config_from(yaml.safe_load(config_yaml(config)))
    assert again == config and changed_settings(config_values(config), config_values(again)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizr": {}}, "optimizr is not a setting; did you mean 'optimizer'?"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr is not a setting; did you mean 'lr'?"),
        ({"lr": 1}, "lr is not a setting; did you mean 'optimizer.lr'?"),
        ({"epochs": "many"}, "epochs must be a number, not 'many'"),
        ({"max_steps": 1.5}, "max_steps must be a whole number, not 1.5"),
        ({"deterministic": "yes"}, "deterministic must be true or false, not 'yes'"),
        ({"precision": "fp61"}, "precision 'fp61' is unknown; there is fp32, bf16"),
        ({"zero": {"stage": 4}}, "zero.stage 4 is unknown; there is 2, 3"),
        ({"zero": {"stage": 1}}, "zero.stage 1 is unknown; there is 2, 3"),
        ({"zero": {"reduce_bucket_size": 0}}, "zero.reduce_bucket_size must be 1 or more, not 0"),
        (
            {"zero": {"stage3_prefetch_bucket_size": -1}},
            "zero.stage3_prefetch_bucket_size must be 0 or more",
        ),
        ({"zero": {"stage3_max_live_parameters": -1}}, "zero.stage3_max_live_parameters must be"),
        ({"zero": {"stage3_max_reuse_distance": -1}}, "zero.stage3_max_reuse_distance must be"),
        (
            {"zero": {"stage3_param_persistence_threshold": -1}},
            "zero.stage3_param_persistence_threshold must be",
        ),
        ({"zero": 3}, "zero must be a table of settings"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas must be a list of 2 values"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr must be above 0"),
        ({"optimizer": {"lr": math.nan}}, "optimizer.lr must be above 0"),
        ({"optimizer": {"warmup_ratio": 3}}, "optimizer.warmup_ratio must lie in 0..1"),
        ({"per_device_batch_size": 0}, "per_device_batch_size must be 1 or more"),
        ({"gradient_clipping": -1.0}, "gradient_clipping must be 0 or more"),
        ({"data": {"path": "d"}}, "data.images is missing"),
        ({"data": {"images": "d"}}, "data.path is missing"),
        ({"output_dir": ""}, "output_dir is missing"),
        ({"model": {"vision": "v"}}, "model.language is missing"),
        ({"model": {"vision": "v", "language": "l"}}, "model.preset or as model.hd"),
        ({"model": {"path": "m", "vision": "v"}}, "model.vision has no place"),
        ({"model": {**GOOD["model"], "preset": "hd48"}}, "preset 'hd48' is unknown; did you mean"),
        ({"model": {**GOOD["model"], "hd": {"tile": 3}}}, "hd.tile is not a setting; did you mean"),
        ({"model": {**GOOD["model"], "projector_from": None}}, "model.projector_from is missing"),
        ({"zero": {"offload_param": "cpu"}}, "zero.offload_param cpu needs zero.stage 3"),
        ({"vision_layers": 2}, "vision_layers needs train_vision; set it"),
        ({"optimizer": {"vision_lr": 1e-6}}, "optimizer.vision_lr needs train_vision; set it"),
        ({"train_vision": True, "vision_layers": 0}, "vision_layers must be 1 or more, not 0"),
        ({"lora": {"rank": 8}}, "lora.rank is not a setting; "),
        ({"lora": {"r": 0}}, "lora.r must be 1 or more, not 0"),
        ({"lora": {"dropout": 1}}, "lora.dropout must lie in [0, 1), not 1"),
        ({"lora": {"target_modules": []}}, "lora.target_modules is empty"),
        ({"lora": {"bits": 5}}, "lora.bits 5 is unknown; there is 16, 8, 4"),
        ({"lora": {"bits": 4}, "zero": {"stage": 3}}, "lora.bits 4 needs zero.stage 2"),
        ({"stage": "pretrain", "lora": {}}, "lora has no place in pretrain"),
    ],
)
def test_a_wrong_setting_is_named_with_file_and_remedy(settings, message):
    with pytest.raises(UsageError) as caught:
        config_from({**GOOD, **settings}, "r.yaml")
    assert str(caught.value).startswith("r.yaml: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named():
    values = {key: value for key, value in GOOD.items() if key != "data"}
    with pytest.raises(UsageError, match=r"r\.yaml: data is missing"):
        config_from(values, "r.yaml")


def test_flags_replace_values_and_leave_the_others():
    config = built(optimizer__lr=1e-5, data__path=["a.json", "b.json"], max_steps=3)
    assert config.optimizer.lr == 1e-5 and config.optimizer.warmup_ratio == 0.03
    assert config.data.paths == ("a.json", "b.json") and config.data.images == "i"
    assert GOOD["data"] == {"path": "d.json", "images": "i"}


def test_a_geometry_or_a_whole_model_takes_the_place_of_what_the_recipe_had():
    hd = PRESETS["hdflex"].to_dict()
    config = built(model__hd=hd)
    assert config.model.preset is None and config.model.geometry == PRESETS["hdflex"]
    whole = built(model__path="m").model
    assert (whole.path, whole.vision, whole.geometry) == ("m", None, None)
    with pytest.raises(UsageError, match=r"model\.vision has no place"):
        built(model__path="m", model__vision="v")


def test_limits_of_resolution_are_settings_written_back_whole():
    recipe = read_recipe(find_recipe("vicuna-7b-hdflex", "finetune"))
    config = config_from(with_values(recipe, {"model.max_tiles": 9, "model.grid": None}))
    assert config.model.geometry == limited(PRESETS["hdflex"], ResolutionLimits(max_tiles=9))
    again = config_from(yaml.safe_load(config_yaml(config)))
    assert again == config and again.model.max_tiles == 9
    tight = config_from(with_values(recipe, {"model.max_visual_tokens": 900}))
    assert tight.model.geometry is not None and tight.model.geometry.max_visual_tokens == 900
    assert changed_settings(config_values(config), config_values(tight)) == [
        "model.max_tiles",
        "model.max_visual_tokens",
    ]
    flagged = with_values(config_values(config), {"model.grid": "2x3"})
    forced = config_from(flagged).model  # a flag takes the place of the recipe's other one
    assert forced.geometry is not None and forced.geometry.grids == ((2, 3),)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model.max_tiles": 0}, "model.max_tiles must be a whole number from 1, not 0"),
        ({"model.max_tiles": "9"}, "model.max_tiles must be a whole number"),
        ({"model.max_tile": 9}, "model.max_tile is not a setting; did you mean 'max_tiles'"),
        ({"model.grid": "2by2"}, "model.grid '2by2' is not ROWSxCOLS; give one such as 2x3"),
        (
            {"model.grid": "2x2", "model.max_tiles": 4},
            "model.grid 2x2 allows no other, so max_tiles 4 has no place",
        ),
        ({"model.preset": "base336", "model.max_tiles": 4}, "model.max_tiles has no meaning"),
    ],
)
def test_limits_that_make_no_sense_are_named_with_their_setting(flags, message):
    recipe = read_recipe(find_recipe("vicuna-7b-hdflex", "finetune"))
    with pytest.raises(UsageError, match=message):
        config_from(with_values(recipe, flags))


def test_numbers_in_yaml_may_look_like_text():
    assert yaml.safe_load("1e-3") == "1e-3"  # YAML 1.1
    assert built(optimizer__lr="1e-3").optimizer.lr == 1e-3


def test_stage_1_reads_captions_and_stage_2_conversations():
    assert built(stage="pretrain").sample_template == "plain"
    assert built().sample_template is None
    assert built(stage="pretrain", data__template="vicuna_v1").sample_template == "vicuna_v1"


@pytest.mark.parametrize(
    ("settings", "world", "passes"),
    [
        ({}, 4, 1),
        ({"gradient_accumulation_steps": 3}, 4, 3),
        ({"global_batch_size": 128}, 8, 1),
        ({"global_batch_size": 128}, 1, 8),
        ({"global_batch_size": 128, "gradient_accumulation_steps": 2}, 4, 2),
    ],
)
def test_the_batch_sizes_make_the_passes(settings, world, passes):
    assert built(**settings).accumulation(world) == passes


@pytest.mark.parametrize("settings", [{"global_batch_size": 128}, {"global_batch_size": 8}])
def test_batch_sizes_that_do_not_divide_are_refused(settings):
    with pytest.raises(UsageError, match="x 3 ranks x"):
        built(**settings).accumulation(3)


def test_shipped_parts_are_found_in_the_package():
    assert part_folder("shipped:lm") == SHIPPED_FOLDER / "lm"
    assert part_folder("models/lm") == Path("models/lm")


def test_only_settings_that_change_the_weights_count_as_changed():
    values = config_values(built())
    same = config_values(built(output_dir="other", logging_steps=7, data__num_workers=0))
    assert changed_settings(values, same) == []
    other = config_values(built(seed=7, optimizer__lr=1.0))
    assert changed_settings(values, other) == ["optimizer.lr", "seed"]


def test_every_setting_has_a_line_of_help():
    for name, field in leaves(TrainConfig):
        assert name == "stage" or len(field.metadata["help"]) > 5, name
