"""What a step need not compute is not computed; fused and compiled layers are the same model."""

from __future__ import annotations

import shutil
import sys
from types import ModuleType

import pytest
import torch
from tiny import tiny_hd
from torch import nn
from train_data import tiny_config, write_data

from llava_hd.hd.errors import UsageError
from llava_hd.model import fused
from llava_hd.model.assemble import assemble
from llava_hd.model.fused import check_liger, compile_layers, fuse_layers
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.merge import random_packs
from llava_hd.train.optimizer import build_optimizer, freeze
from llava_hd.train.run import train
from llava_hd.train.settings import OptimizerConfig


@pytest.fixture
def model(parts) -> LlavaHD:
    built, _ = assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hd448"))
    return built.train()


def pack_of(model: LlavaHD):
    return random_packs(model.config, seed=0)[0]


def graph_leaves(loss: torch.Tensor) -> set[int]:
    """ids of the parameters that backward would reach."""
    found, waiting, seen = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [other for other, _ in node.next_functions]
    return found


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_frozen_parts_have_no_place_in_the_graph_no_gradient_and_no_state(model, stage):
    freeze(model, stage)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained < {id(p) for p in model.parameters()}
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(pack_of(model)).loss_sum
    assert graph_leaves(loss) == trained
    head = model.language.head.weight
    like_head = [t for t in saved if t.shape == head.shape and t.data_ptr() != head.data_ptr()]
    assert len(like_head) == (stage == "finetune")  # linear_loss makes the head's gradient there
    loss.backward()
    assert all((p.grad is not None) == (id(p) in trained) for p in model.parameters())
    optimizer = build_optimizer(model, OptimizerConfig())
    optimizer.step()
    assert {id(p) for p in optimizer.state} == trained


def test_the_tower_is_called_once_a_pass_without_a_graph(model):
    freeze(model, "finetune")
    calls: list[torch.Tensor] = []
    model.vision.register_forward_hook(lambda module, args, out: calls.append(out))
    batch = pack_of(model)
    model(batch).loss_sum.backward()
    assert len(calls) == 1 and len(calls[0]) == len(batch.tiles) > 1
    assert calls[0].grad_fn is None and not calls[0].requires_grad


class Plain:
    """Liger's functions by torch: what they must be called with, and what they give."""

    @staticmethod
    def norm(x, weight, eps, offset, casting, in_place):
        assert (offset, casting, in_place) == (0.0, "llama", False)
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def swiglu(gate, up):
        return nn.functional.silu(gate) * up

    @staticmethod
    def rope(q, k, cos, sin):
        def turned(x):
            a, b = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

        return turned(q), turned(k)


@pytest.fixture
def liger(monkeypatch):
    """A package with the names of Liger Kernel's functions; the real ones run on a GPU only."""
    parts = {
        "rms_norm": ("LigerRMSNormFunction", Plain.norm),
        "swiglu": ("LigerSiLUMulFunction", Plain.swiglu),
        "rope": ("LigerRopeFunction", Plain.rope),
    }
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for file, (name, function) in parts.items():
        module = ModuleType(f"liger_kernel.ops.{file}")
        setattr(module, name, type(name, (), {"apply": staticmethod(function)}))
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_fused_modules_have_the_names_the_loss_and_the_gradients_of_llamas(model, liger):
    freeze(model, "finetune")
    batch, names = pack_of(model), list(model.state_dict())
    model(batch).loss_sum.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    loss = model(batch).loss_sum.item()
    model.zero_grad(set_to_none=True)
    layers = model.language.causal_lm.config.num_hidden_layers
    assert fuse_layers(model.language.causal_lm) == 4 * layers + 1
    assert list(model.state_dict()) == names
    kinds = {type(m).__name__ for m in model.language.causal_lm.modules()}
    assert not kinds & {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}
    output = model(batch)
    assert output.loss_sum.item() == pytest.approx(loss, rel=1e-6)
    output.loss_sum.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_liger_is_refused_where_it_cannot_run(model, parts, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="needs a CUDA GPU"):
        check_liger("cpu")
    monkeypatch.setattr(fused, "LIBRARY", "no_such_library_here")
    with pytest.raises(UsageError, match="not installed; pip install"):
        check_liger("cuda")
    if not torch.cuda.is_available():
        data = write_data(tmp_path)
        config = tiny_config(
            data, parts, tmp_path / "o", stage="pretrain", model__fused="liger"
        )  # fmt: skip
        with pytest.raises(UsageError, match=r"model\.fused liger: needs a CUDA GPU"):
            train(config)
    model.language.causal_lm.config.hidden_act = "gelu"
    with pytest.raises(UsageError, match="not of llama with gelu"):
        fuse_layers(model.language.causal_lm)


COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
def test_compiled_layers_are_the_same_model(model):
    decoder = model.language.causal_lm.get_decoder()
    decoder.layers = decoder.layers[-1:]  # one is enough, and compiling takes its time
    freeze(model, "pretrain")
    packs, expected = random_packs(model.config, seed=0)[:1], []
    for batch in packs:
        loss = model(batch).loss_sum
        loss.backward()
        expected.append((loss.item(), model.projector.weight_1.grad.clone()))
    model.zero_grad(set_to_none=True)
    assert compile_layers(model.language.causal_lm) == 1
    for batch, (value, grad) in zip(packs, expected, strict=True):
        loss = model(batch).loss_sum
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-5)
        torch.testing.assert_close(model.projector.weight_1.grad, grad, rtol=1e-3, atol=1e-5)


def test_compiling_keeps_the_names_and_is_refused_under_zero_3(model, parts, tmp_path):
    names = list(model.state_dict())
    assert compile_layers(model.language.causal_lm) == 2
    assert list(model.state_dict()) == names
    with pytest.raises(UsageError, match=r"model\.compile needs zero\.stage 2"):
        tiny_config(
            tmp_path, parts, tmp_path, stage="pretrain", model__compile=True, zero__stage=3
        )  # fmt: skip
