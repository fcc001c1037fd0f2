"""What trains, and how fast: groups of parameters and transformers' schedule, step by step."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_hd
from transformers import get_cosine_schedule_with_warmup

from llava_hd.hd.errors import UsageError
from llava_hd.hd.tiler import normalise
from llava_hd.model.assemble import assemble
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.merge import random_packs
from llava_hd.train.optimizer import (
    LearningRates,
    build_optimizer,
    freeze,
    lr_factor,
    trained_words,
    warmup_steps,
)
from llava_hd.train.settings import OptimizerConfig


@pytest.fixture
def model(parts) -> LlavaHD:
    built, _ = assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hd448"))
    return built


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100, 5198])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 1.0])
def test_the_rate_of_each_step_is_that_of_transformers(num_steps, ratio):
    config = OptimizerConfig(lr=1.0, warmup_ratio=ratio)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(theirs, warmup_steps(num_steps, ratio), num_steps)
    for step in range(num_steps):
        assert lr_factor(step, num_steps, config) == pytest.approx(
            schedule.get_last_lr()[0], abs=1e-12
        )
        theirs.step()
        schedule.step()


def test_a_constant_schedule_stays_at_its_peak_after_the_warm_up():
    config = OptimizerConfig(warmup_ratio=0.2, schedule="constant")
    factors = [lr_factor(step, 10, config) for step in range(10)]
    assert factors == [0.0, 0.5] + [1.0] * 8


def trained(model: LlavaHD) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_each_stage_trains_its_parts_and_not_the_tower(model):
    freeze(model, "pretrain")
    assert trained(model) == {"projector"}
    freeze(model, "finetune")
    assert trained(model) == {"projector", "language"}
    freeze(model, "pretrain")
    assert trained(model) == {"projector"}


def test_the_groups_hold_every_trained_parameter_once_and_no_other(model):
    freeze(model, "finetune")
    optimizer = build_optimizer(model, OptimizerConfig())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(wanted)


def test_only_matrices_decay_and_the_projector_may_have_its_own_rate(model):
    freeze(model, "finetune")
    config = OptimizerConfig(lr=1e-3, projector_lr=5e-3, weight_decay=0.1)
    for group in build_optimizer(model, config).param_groups:
        is_matrix = group["params"][0].dim() > 1
        assert all((p.dim() > 1) == is_matrix for p in group["params"])
        assert group["weight_decay"] == (0.1 if is_matrix else 0.0)
        assert group["lr"] == (5e-3 if group["name"].startswith("projector") else 1e-3)
    ends = [g for g in build_optimizer(model, config).param_groups if "no decay" in g["name"]]
    assert any(p is model.row_end for group in ends for p in group["params"])


@pytest.mark.parametrize(("last", "layers"), [(None, {0, 1}), (2, {0, 1}), (1, {1})])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_of_the_tower_only_what_is_read_is_trained(model, stage, last, layers):
    freeze(model, stage, train_vision=True, vision_layers=last)
    trains = {n for n, p in model.vision.clip.named_parameters() if p.requires_grad}
    assert {int(n.split(".")[2]) for n in trains if n.startswith("encoder")} == layers
    rest = {n.split(".")[0] for n in trains if not n.startswith("encoder")}
    assert rest == ({"embeddings", "pre_layrnorm"} if last is None else set())
    assert model.train().vision.training
    freeze(model, stage)
    assert trained(model) <= {"projector", "language"} and not model.train().vision.training


def test_more_layers_than_are_read_are_refused(model):
    with pytest.raises(UsageError, match="vision_layers 3 is more than the 2 layers"):
        freeze(model, "finetune", train_vision=True, vision_layers=3)


@pytest.mark.parametrize("last", [None, 1])
def test_gradients_of_the_tower_are_those_of_transformers(model, last):
    """Every kept row is summed with a weight of its own; the same sum over transformers' states."""
    freeze(model, "finetune", train_vision=True, vision_layers=last)
    batch, _ = random_packs(model.config)
    clip, ours = model.vision.clip, {}
    for checkpointed in (False, True):
        if checkpointed:
            model.checkpoint_gradients()
        clip.zero_grad()
        features = model.train().vision(batch.tiles)
        weights = torch.linspace(-1, 1, features.numel()).view_as(features)
        (features * weights).sum().backward()
        ours[checkpointed] = {n: p.grad for n, p in clip.named_parameters() if p.requires_grad}
    clip.zero_grad()
    states = clip(normalise(batch.tiles, torch.float32), output_hidden_states=True).hidden_states
    (states[-2] * weights).sum().backward()
    due = dict(clip.named_parameters())
    for found in ours.values():
        assert found and all(grad is not None for grad in found.values())
        for name, grad in found.items():
            torch.testing.assert_close(grad, due[name].grad, atol=1e-4, rtol=1e-4)


def test_the_loss_reaches_the_tower_through_the_projector(model):
    freeze(model, "pretrain", train_vision=True)
    image, text = random_packs(model.config)
    for batch, some in ((image, True), (text, False)):
        model.zero_grad()
        model.train().logits(batch).square().mean().backward()
        grads = [p.grad for p in model.vision.parameters() if p.requires_grad]
        assert all(grad is not None for grad in grads)  # a pack without images has zeros
        assert any(grad.any() for grad in grads) == some


def test_a_frozen_tower_keeps_no_graph(model):
    freeze(model, "finetune")
    batch, _ = random_packs(model.config)
    assert not model.train().vision(batch.tiles).requires_grad
    freeze(model, "finetune", train_vision=True)
    with torch.no_grad():
        assert not model.vision(batch.tiles).requires_grad


def test_the_tower_has_a_group_of_its_own_and_the_language_models_rate_is_reported(model):
    freeze(model, "finetune", train_vision=True)
    config = OptimizerConfig(lr=1e-3, projector_lr=5e-3, vision_lr=2e-6, warmup_ratio=0.0)
    optimizer = build_optimizer(model, config)
    peaks = {group["name"].split()[0]: group["lr"] for group in optimizer.param_groups}
    assert peaks == {"vision": 2e-6, "language": 1e-3, "projector": 5e-3}
    assert LearningRates(optimizer, config).set(0, 8) == 1e-3
    freeze(model, "pretrain")
    assert LearningRates(build_optimizer(model, config), config).set(0, 8) == 5e-3


def test_what_trains_is_said_in_numbers(model):
    freeze(model, "pretrain")
    ours = sum(p.numel() for p in model.projector.parameters())
    assert trained_words(model).startswith(f"training {ours:,} of ")


def test_rates_are_set_from_the_peaks_however_often(model):
    freeze(model, "finetune")
    config = OptimizerConfig(lr=1e-3, projector_lr=5e-3, warmup_ratio=0.5)
    rates = LearningRates(build_optimizer(model, config), config)
    for step in (1, 4, 2):
        rates.set(step, 8)
        for group in rates.optimizer.param_groups:
            peak = 5e-3 if group["name"].startswith("projector") else 1e-3
            assert group["lr"] == pytest.approx(peak * step / 4)
