"""What `llava-hd estimate` says, held against real models, DeepSpeed's formulas, torch's counter of
operations, and every pass that a data order makes. Measured memory: test_estimate_memory.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from estimate_data import measured, records_of, small_run
from tiny import TILE, tiny_hd
from torch.utils.flop_counter import FlopCounterMode
from train_data import changed

from llava_hd.hd.grid import PRESETS
from llava_hd.hd.plan import plan_image
from llava_hd.model.packing import pack
from llava_hd.train.batches import BatchOrder
from llava_hd.train.config import TrainConfig
from llava_hd.train.dataset import RecordReader
from llava_hd.train.estimate import Question, estimate, report_of
from llava_hd.train.estimate_memory import Memory
from llava_hd.train.estimate_model import outline_run
from llava_hd.train.estimate_samples import (
    Samples,
    heaviest_passes,
    largest_image,
    largest_pass,
)
from llava_hd.train.estimate_time import Work, count_operations
from llava_hd.train.estimate_trace import LiveBytes, PassShape, shape_batch, trace_pass
from llava_hd.train.estimate_zero import Weights, model_states, step_traffic
from llava_hd.train.lora import start_adapter
from llava_hd.train.optimizer import freeze
from llava_hd.train.recipe import load_config
from llava_hd.train.run import build_model
from llava_hd.train.settings import LoraConfig, ZeroConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> TrainConfig:
    return small_run(tmp_path_factory.mktemp("estimate"), parts)


def finetune(config: TrainConfig, **settings: object) -> TrainConfig:
    """Stage 2; the folder of stage 1 is only named."""
    return changed(config, stage="finetune", model__projector_from="stage1", **settings)


# ------------------------------------------------------------------ the model, counted


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, bits=16)])
def test_parts_are_those_of_the_real_model(config, lora):
    stage_2 = replace(finetune(config), lora=lora)
    model, _ = build_model(changed(config, stage="pretrain"), None)
    if lora is not None:
        start_adapter(model, stage_2, None)
    freeze(model, "finetune")
    counted = outline_run(stage_2)
    assert sum(part.parameters for part in counted.parts) == sum(
        p.numel() for p in model.parameters()
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(part.trained for part in counted.parts) == counted.weights.learned == trained
    assert counted.weights.bytes == 4 * sum(p.numel() for p in model.parameters())


def test_published_models_have_their_published_sizes():
    shipped = load_config("vicuna-7b-hd448", "finetune")
    parts = {part.name: part for part in outline_run(shipped).parts}
    # Vicuna-7B has 6,738,415,616; 64 rows are added to both of its tables for <image>.
    assert parts["language"].parameters == 6_738_415_616 + 2 * 64 * 4096
    assert parts["projector"].parameters == 1024 * 4096 + 4096 + 4096**2 + 4096 + 4096
    assert parts["vision"].trained == 0


def test_four_bits_are_half_a_byte_and_their_scales():
    shipped = load_config("vicuna-7b-hd448", "finetune", {"zero.stage": 2, "lora.bits": 4})
    language = next(part for part in outline_run(shipped).parts if part.name == "language")
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = language.parameters - linears
    assert language.bytes == pytest.approx(linears * (0.5 + 0.0159) + 2 * rest, rel=1e-3)


# ------------------------------------------------------------------ memory


def real_pass(config: TrainConfig):
    """A real model and one pack of six samples of its data."""
    model, processor = build_model(
        changed(config, model__projector_from=None, stage="pretrain"), None
    )
    reader = RecordReader(records_of(config), Path(config.data.images), processor, None, 2048)
    return model, pack([reader(index) for index in range(6)], processor.config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"train_vision": True},
        {"train_vision": True, "gradient_checkpointing": True},
    ],
)
def test_a_traced_pass_keeps_what_a_real_one_keeps(config, settings):
    config = finetune(config, **settings)
    model, batch = real_pass(config)
    freeze(model, "finetune", config.train_vision)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    model.train()
    known = [*model.parameters(), *model.buffers(), *vars(batch).values()]
    with LiveBytes(t for t in known if isinstance(t, torch.Tensor)) as real:
        output = model(batch)
        kept = real.live
        output.loss_sum.backward()
    shape = PassShape(
        lengths=tuple(torch.diff(batch.cu_seqlens).tolist()),
        tiles=len(batch.tiles),
        rows=len(batch.rows),
        labels=batch.num_label_tokens,
    )
    traced = trace_pass(outline_run(config).model, shape)
    # Real attention on a CPU copies a sequence at a time; index tables are built otherwise.
    assert traced.kept == pytest.approx(kept, rel=0.06)
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert traced.peak <= real.peak * 1.06 and real.peak <= (traced.peak + gradients) * 1.06


def weights_of(learned: int, frozen: int = 0) -> Weights:
    """A model in bf16 of one group of equal tensors."""
    return Weights(
        bytes=2 * (learned + frozen),
        width=2,
        groups=((learned // 64,) * 64,),
        frozen=(frozen,) if frozen else (),
        largest_module=learned // 64,
        reused=learned,
    )


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_model_states_are_deepspeeds_own_without_its_gradients_in_16_bits(ranks):
    """DeepSpeed counts 18 bytes: 2 and 4 of gradients, 4 of weights, 8 of moments. Ours sums its
    gradients in fp32 only, with buckets told apart."""
    learned = 2**30
    _, theirs = estimate_zero2_model_states_mem_needs(learned, ranks, 1, cpu_offload=False)
    ours = model_states(weights_of(learned), ZeroConfig(stage=2), ranks, 4, True)
    held = ours.weights + ours.master + ours.moments + ours.gradients
    assert theirs - held == 2 * learned // ranks


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_partitioned_states_are_deepspeeds_own(ranks):
    learned = 2**30
    _, theirs, layer = estimate_zero3_model_states_mem_needs(
        learned, learned // 64, ranks, 1, cpu_offload=False
    )
    zero = ZeroConfig(stage=3, stage3_param_persistence_threshold=0)
    ours = model_states(weights_of(learned), zero, ranks, 1, True)
    held = ours.weights + ours.master + ours.moments + ours.gradients
    assert theirs - layer == held


def test_offloaded_states_are_in_the_machine():
    zero = ZeroConfig(stage=3, offload_optimizer="cpu", offload_param="cpu")
    states = model_states(weights_of(2**30), zero, 8, 1, True)
    assert (states.master, states.moments, states.gradients) == (0, 0, 0)
    assert states.host >= (2 + 16) * 2**30 // 8


def test_more_ranks_and_checkpointing_need_less():
    shipped = load_config("vicuna-7b-hd448", "finetune", {"per_device_batch_size": 8})
    peaks = [estimate(shipped, Question(gpus=ranks)).memory.peak for ranks in (4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)
    whole = changed(shipped, gradient_checkpointing=False)
    assert estimate(whole, Question(gpus=8)).memory.peak > peaks[1]


def test_the_peak_is_of_one_moment():
    memory = Memory({"a": {"start": 5, "pass": 1}, "b": {"pass": 3, "update": 1}}, 0)
    assert memory.totals == {"start": 5, "pass": 4, "update": 1}
    assert (memory.peak, memory.peak_moment, memory.largest_part) == (5, "start", "a")


# ------------------------------------------------------------------ samples and passes


def test_no_image_exceeds_the_largest():
    rng = np.random.default_rng(0)
    sizes = [tuple(map(int, rng.integers(1, 2500, 2))) for _ in range(2000)]
    for preset in PRESETS.values():
        tokens, tiles = largest_image(preset)
        plans = [plan_image(size, preset) for size in sizes]
        assert max(plan.num_tokens for plan in plans) <= tokens
        assert max(plan.num_tiles for plan in plans) == tiles


@pytest.mark.parametrize("batching", ["plain", "modality", "padded", "packs"])
def test_no_pass_of_any_order_exceeds_the_largest(config, batching):
    config = changed(config, data__batching=batching, per_device_batch_size=4, global_batch_size=16)
    rng = np.random.default_rng(1)
    visual = rng.choice([0, 272, 784, 1312], 200)
    samples = Samples(
        total=visual + rng.integers(20, 300, 200),
        visual=visual,
        tiles=np.select([visual == 0, visual == 272, visual == 784], [0, 1, 2], 5),
        images=visual[visual > 0],
        num_samples=200,
        source="",
    )
    bound = largest_pass(config, samples, 16)
    for seed in range(5):
        order = BatchOrder(
            num_samples=200,
            samples_per_step=16,
            samples_per_pass=4,
            seed=seed,
            batching=batching,
            has_image=visual > 0,
            lengths=samples.total,
            pack_tokens=bound.tokens if batching == "packs" else None,
        )
        for step in range(order.num_steps(1.0)):
            for chosen in order.step(step):
                assert samples.total[chosen].sum() <= bound.tokens
                assert samples.tiles[chosen].sum() <= bound.tiles
                assert samples.visual[chosen].sum() <= bound.rows
                assert (samples.total - samples.visual)[chosen].sum() <= bound.labels


def test_measured_samples_are_those_that_are_read(config):
    samples = measured(config)
    processor = outline_run(config).processor
    reader = RecordReader(
        records_of(config), Path(config.data.images), processor, config.sample_template, 2048
    )
    for index in range(len(samples)):
        sample = reader(index)
        assert len(sample.ids) == samples.total[index]
        assert sum(plan.num_tokens for plan in sample.plans) == samples.visual[index]
        assert sum(len(tiles) for tiles in sample.tiles) == samples.tiles[index]
    assert not samples.faults and samples.image_bytes > 0


def test_the_heaviest_passes_are_found(config):
    samples = measured(config)
    order = BatchOrder(12, 4, 2, seed=3)
    tokens, tiles = heaviest_passes(order, samples, 2, range(3))
    passes = [chosen for step in range(3) for chosen in order.step(step)]
    assert tokens.tokens == max(samples.total[chosen].sum() for chosen in passes)
    assert tiles.tiles == max(samples.tiles[chosen].sum() for chosen in passes)


# ------------------------------------------------------------------ operations, traffic, time


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("train_vision", [False, True])
def test_operations_are_those_that_torch_counts(config, stage, checkpointing, train_vision):
    """Without attention, whose products the outline leaves out."""
    config = changed(config, stage=stage, model__projector_from="stage1")
    config = changed(config, gradient_checkpointing=checkpointing, train_vision=train_vision)
    model = outline_run(config).model
    shape = PassShape((300, 212), tiles=7, rows=400, labels=90)
    with FlopCounterMode(display=False) as counter:
        model(shape_batch(shape, TILE)).loss_sum.backward()
    work = Work(tokens=512, squares=0, tiles=7, rows=400, labels=90)
    ours = count_operations(model, work, checkpointing).total
    per_layer = 4 * 7 * 17**2 * 32  # the tower's attention: 17 rows of width 32, two layers read
    again = int(checkpointing and train_vision)
    ours -= 2 * per_layer * (1 + (2.5 + again) * train_vision)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_traffic_is_two_and_three_times_the_weights():
    weights = weights_of(2**30)
    one = 2 * 2**30 * 7 // 8
    z2 = step_traffic(weights, ZeroConfig(stage=2), 8, 1)
    assert (z2.gradients, z2.weights) == (2 * one, one)  # an all-reduce; DeepSpeed does not scatter
    z3 = step_traffic(weights, ZeroConfig(stage=3), 8, 1)
    assert (z3.gradients, z3.weights) == (one, 2 * one)
    assert step_traffic(weights, ZeroConfig(stage=3), 8, 4).total == 4 * z3.total
    assert step_traffic(weights, ZeroConfig(stage=2), 1, 1).total == 0
    assert z3.seconds(gbps=8) == pytest.approx(z3.total / 1e9)


def test_no_speed_is_invented_and_a_given_one_is_used():
    shipped = load_config("vicuna-7b-hd448", "finetune")
    silent = report_of(estimate(shipped, Question(gpus=8)))
    assert silent["cost"] is silent["speed"] is silent["fit"] is silent["steps"] is None
    assert len(silent["missing"]) == 5
    asked = Question(gpus=8, tflops=400, gbps=400, num_samples=12_800, price=2.0, memory_gib=80)
    told = report_of(estimate(shipped, asked))
    seconds = told["operations_of_a_step"]["total"] / 8 / 400e12
    assert told["steps"] == 100 and told["missing"] == []
    assert told["cost"]["step_seconds"][0] == pytest.approx(seconds)
    hours = told["cost"]["step_seconds"][1] * 100 / 3600
    assert told["cost"]["price"][1] == pytest.approx(hours * 8 * 2.0)


@pytest.mark.parametrize(
    ("samples", "gib", "verdict"),
    [
        (16, 141, "fits"), (16, 28, "too close to call"), (16, 24, "does not fit"),
        (32, 141, "fits"), (32, 40, "too close to call"), (32, 36, "does not fit"),
    ],
)  # fmt: skip
def test_a_verdict_has_a_margin_and_names_what_to_change(samples, gib, verdict):
    shipped = load_config("vicuna-7b-hd448", "finetune")
    given = replace(shipped, per_device_batch_size=samples, global_batch_size=8 * samples)
    fit = estimate(given, Question(gpus=8, memory_gib=gib)).fit
    assert fit is not None and fit.verdict == verdict
    assert (fit.spare < 0) == (verdict == "does not fit")
    if samples == 16:
        assert fit.part == "optimizer" and "zero.offload_optimizer" in fit.remedy
    else:
        assert "activations" in fit.part and "per_device_batch_size" in fit.remedy


def test_geometry_of_tiny_tests_is_hdflex():
    assert largest_image(tiny_hd("hdflex")) == (16 + 6 * 4 * (4 + 1), 7)
