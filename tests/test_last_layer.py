"""The last layer computes asked rows only: the same loss and gradients as transformers' model."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from families import FAMILIES, build, causal_lm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from llava_hd.model.last_layer import ASKED_ROWS, KINDS, LastLayer, last_layer
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import PackedBatch, Sample, pack
from llava_hd.model.prompt import IGNORE

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
# Learned tokens in the middle and at the end, at the end alone, and none at all.
SAMPLES = [
    Sample(list(range(5, 14)), [IGNORE] * 3 + [8, 9] + [IGNORE] * 2 + [12, 13]),
    Sample(list(range(20, 25)), [IGNORE] * 4 + [24]),
    Sample(list(range(30, 43)), [IGNORE] * 13),
]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_transformers(language: PreTrainedModel) -> tuple[float, dict[str, Tensor]]:
    """Loss sum and gradients of the samples, one by one, every row of every layer computed."""
    total = 0.0
    for sample in SAMPLES[:2]:
        logits = language(input_ids=torch.tensor([sample.ids])).logits[0, :-1]
        targets = torch.tensor(sample.labels)[1:]
        loss = cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, gradients(language)


def packed(model: LlavaHD, samples: list[Sample]) -> PackedBatch:
    return pack(samples, model.config)


def rows_of_mlps(language: PreTrainedModel) -> list[int]:
    """Told at each call: the rows that each layer's MLP is given, in the order of the calls."""
    seen: list[int] = []
    for layer in language.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].shape[0]))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[kind for kind, _ in FAMILIES])
def test_loss_and_gradients_are_those_of_every_row(kind, options, checkpointing):
    language = causal_lm(kind, **options).double().train()
    expected_loss, expected = by_transformers(deepcopy(language))
    model = build(language).double().train()
    seen = rows_of_mlps(language)
    if checkpointing:
        model.checkpoint_gradients()
    output = model(packed(model, SAMPLES))
    asked = 5 if kind in KNOWN else 27  # kinds that are not known compute every row
    assert seen == [27, asked]
    output.loss_sum.backward()
    assert len(seen) == (4 if checkpointing else 2) and set(seen) == {27, asked}
    assert output.loss_sum.item() == pytest.approx(expected_loss, rel=1e-7)
    ours = gradients(language)
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():  # norms compute in fp32, whatever the model's type
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-9)


def test_it_stays_a_layer_of_its_kind_with_its_names():
    language = causal_lm("llama")
    names, kind = list(language.state_dict()), type(last_layer(language))
    model = build(language)
    assert list(language.state_dict()) == names
    assert isinstance(last_layer(language), (kind, LastLayer))
    assert type(language.get_decoder().layers[0]) is kind and kind in KINDS
    ids = torch.tensor([SAMPLES[0].ids])
    with torch.no_grad():
        states = language(input_ids=ids, output_hidden_states=True).hidden_states
        whole = model.hidden(packed(model, SAMPLES[:1]))
    assert len(states) == 3  # transformers finds the layers by their class
    torch.testing.assert_close(states[-1][0], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_transformers_own_attention_takes_the_keyword(attention):
    language = causal_lm("llama", attention).double()
    whole = deepcopy(language)
    model = build(language).double()
    seen = rows_of_mlps(language)
    loss = model(packed(model, SAMPLES)).loss_sum.item()
    assert seen == [27, 5]
    logits = [whole(input_ids=torch.tensor([x.ids])).logits[0, :-1] for x in SAMPLES]
    targets = torch.cat([torch.tensor(x.labels)[1:] for x in SAMPLES])
    expected = cross_entropy(torch.cat(logits), targets, ignore_index=IGNORE, reduction="sum")
    assert loss == pytest.approx(expected.item(), rel=1e-7)


@torch.no_grad()
def test_asked_rows_of_a_padded_batch_count_through_all_its_rows():
    language = causal_lm("llama")
    build(language)
    x = torch.randn(2, 6, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    decoder, rows = language.get_decoder(), torch.tensor([5, 1, 7, 8])
    given = {"inputs_embeds": x, "attention_mask": mask, "use_cache": False}
    whole = decoder(**given).last_hidden_state.flatten(0, 1)
    asked = decoder(**given, **{ASKED_ROWS: rows}).last_hidden_state
    torch.testing.assert_close(asked[0], whole[rows], rtol=1e-6, atol=1e-6)


def test_a_pack_without_labels_runs_the_same_modules_and_learns_nothing():
    model = build(causal_lm("llama")).train()
    called: list[str] = []
    for name, module in model.language.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(packed(model, SAMPLES)).loss_sum.backward()
    with_labels, called[:] = list(called), []
    model.zero_grad()
    output = model(packed(model, SAMPLES[2:]))
    assert called == with_labels
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    layers = gradients(model.language.causal_lm)
    assert layers and all(not grad.any() for grad in layers.values())
