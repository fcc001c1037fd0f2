"""What trains, and how fast: groups of parameters and transformers' schedule, step by step."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_hd
from transformers import get_cosine_schedule_with_warmup

from llava_hd.model.assemble import assemble
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.train.optimizer import LearningRates, build_optimizer, freeze, lr_factor, warmup_steps
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


def test_each_stage_trains_its_parts_and_never_the_tower(model):
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


def test_rates_are_set_from_the_peaks_however_often(model):
    freeze(model, "finetune")
    config = OptimizerConfig(lr=1e-3, projector_lr=5e-3, warmup_ratio=0.5)
    rates = LearningRates(build_optimizer(model, config), config)
    for step in (1, 4, 2):
        rates.set(step, 8)
        for group in rates.optimizer.param_groups:
            peak = 5e-3 if group["name"].startswith("projector") else 1e-3
            assert group["lr"] == pytest.approx(peak * step / 4)
