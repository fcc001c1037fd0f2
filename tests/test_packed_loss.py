"""The loss of a step, however its samples fall into packs, against transformers one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_llava_hd import next_inputs, sample, text_sample
from tiny import save_llava_next, save_parts, tiny_hd

from llava_hd.model.assemble import assemble
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import Sample, pack
from llava_hd.model.prompt import IGNORE

SIZES = [(120, 160), (33, 200), None, (56, 56), None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    """transformers' LlavaNext in fp64, and ours read from the folder that it saved."""
    folder = tmp_path_factory.mktemp("hdflex")
    theirs = save_llava_next(folder, "hdflex").double()
    return LlavaHD.from_pretrained(folder, dtype=torch.float64), theirs


def mixed(model: LlavaHD) -> list[Sample]:
    """Samples with and without images whose last words are labelled: 3, 4, 5, ... of them."""
    samples = []
    for seed, size in enumerate(SIZES):
        one = text_sample(seed, 9 + seed) if size is None else sample(model, size, seed, seed)
        kept = 3 + seed
        labels = [IGNORE] * (len(one.ids) - kept) + list(one.ids[-kept:])
        samples.append(Sample(one.ids, labels, one.plans, one.tiles, one.name))
    return samples


@pytest.fixture(scope="module")
def oracle(pair) -> list[torch.Tensor]:
    """fp64 `[labels]`: the cross entropies of each sample alone, by transformers."""
    ours, theirs = pair
    found = []
    for seed, (one, size) in enumerate(zip(mixed(ours), SIZES, strict=True)):
        inputs = {} if size is None else next_inputs(theirs, size, seed)
        if inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([one.ids]), **inputs).logits[0]
        labels = torch.tensor(one.labels)[1:]
        losses = F.cross_entropy(logits[:-1], labels, reduction="none", ignore_index=IGNORE)
        found.append(losses[labels != IGNORE])
    return found


SHARES = [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[3, 1], [], [4, 0, 2]]]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["token", "sample"])
@torch.no_grad()
def test_the_loss_is_that_of_the_samples_one_by_one_in_fp64(pair, oracle, shares, padded, kind):
    ours, _ = pair
    samples = mixed(ours)
    batches = [pack([samples[i] for i in share], ours.config, kind, padded) for share in shares]
    outputs = [ours(batch) for batch in batches]
    loss = sum(output.loss_sum for output in outputs) / sum(out.loss_units for out in outputs)
    if kind == "token":
        expected = torch.cat(oracle).mean()
    else:
        expected = torch.stack([losses.mean() for losses in oracle]).mean()
    # The pixels pass through fp32 in transformers' processor, the weights of samples in ours.
    assert loss.dtype == torch.float64
    assert abs(loss - expected) <= 1e-6 * expected


def gradients(model: LlavaHD, batches: list, units: int) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        (model(batch).loss_sum / units).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return [p.grad.clone() for p in trained]


@pytest.mark.parametrize("kind", ["token", "sample"])
def test_gradients_do_not_depend_on_packs_padding_or_dummies(pair, kind):
    ours, _ = pair
    samples = mixed(ours)
    whole = pack(samples, ours.config, kind)
    expected = gradients(ours, [whole], whole.loss_units)
    for padded in (False, True):
        parts = [[samples[4], samples[0]], [], [samples[2], samples[1], samples[3]]]
        batches = [pack(part, ours.config, kind, padded) for part in parts]
        assert sum(batch.loss_units for batch in batches) == whole.loss_units
        for a, b in zip(gradients(ours, batches, whole.loss_units), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_dummy_pack_gives_every_trained_part_a_gradient_of_exactly_zero(
    projector, recompute, tmp_path
):
    parts = save_parts(tmp_path)
    model, _ = assemble(
        vision=parts / "vision",
        language=parts / "language",
        hd=tiny_hd("hdflex"),
        projector=projector,
    )
    if recompute:
        model.train().checkpoint_gradients()
    batch = pack([], model.config, "sample")
    output = model(batch)
    assert output.loss_sum.item() == 0 and output.loss_units == 0
    output.loss_sum.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.eq(0).all(), name
