"""The model through every Triton kernel, interpreted on the CPU, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_llava_hd import (  # the tests among them run here with this file's `next_pair`
    next_inputs,
    sample,
    test_greedy_answers_equal_the_oracles_alone_and_in_a_mixed_batch,  # noqa: F401
    test_samples_of_a_pack_never_see_each_other,  # noqa: F401
    text_sample,
)
from tiny import IMAGE_ID, random_image, save_llava, save_llava_next
from transformers import LlavaImageProcessorPil

from llava_hd.kernels import attention_launch, backend, launch, place_kernels
from llava_hd.kernels.backend import SWITCH
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import pack


@pytest.fixture(scope="module", autouse=True)
def every_kernel() -> Iterator[None]:
    """LLAVA_HD_KERNELS=triton: the projector and the placing run on Triton as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "triton")
        backend._table_for.cache_clear()
        yield
    backend._table_for.cache_clear()


@pytest.fixture(scope="module", params=["hd448", "hdflex"])
def next_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save_llava_next(folder, request.param)
    return LlavaHD.from_pretrained(folder, attention="triton"), theirs


@pytest.mark.parametrize("size", [(56, 56), (33, 200), (120, 160)])
@torch.no_grad()
def test_logits_equal_llava_next(next_pair, size: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = next_pair
    one = sample(ours, size)
    logits = theirs(input_ids=torch.tensor([one.ids]), **next_inputs(theirs, size)).logits[0]
    assert (ours.logits(pack([one], ours.config)) - logits).abs().max() <= 1e-5


@torch.no_grad()
def test_logits_equal_llava(tmp_path: Path) -> None:
    theirs = save_llava(tmp_path)
    ours = LlavaHD.from_pretrained(tmp_path, attention="triton")
    side = ours.config.hd.tile_px
    box = {"height": side, "width": side}
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": side}, crop_size=box)
    one = sample(ours, (64, 100))
    pixels = processor(random_image((64, 100)), return_tensors="pt")["pixel_values"]
    logits = theirs(input_ids=torch.tensor([one.ids]), pixel_values=pixels).logits[0]
    assert (ours.logits(pack([one], ours.config)) - logits).abs().max() <= 1e-5


def test_samples_of_a_pack_have_no_influence_on_each_other(next_pair) -> None:  # type: ignore[no-untyped-def]
    ours, _ = next_pair
    others = [sample(ours, (100, 90), seed) for seed in (1, 2)]
    with torch.no_grad():
        packs = [pack([text_sample(3), one, text_sample(4)], ours.config) for one in others]
        first, second = (ours.logits(batch) for batch in packs)
    image = packs[0].ids == IMAGE_ID
    assert not torch.equal(first[image], second[image])
    for part in (slice(0, 10), slice(-10, None)):
        assert torch.equal(first[part], second[part])


def test_a_training_step_equals_that_of_torch(
    next_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """Loss and every gradient; and the kernels really ran."""
    ours, _ = next_pair
    ran: list[str] = []
    for module, name in (
        (launch, "linear_rows"), (launch, "hidden_grad"), (launch, "weight_grad"),
        (place_kernels, "fill"), (place_kernels, "rows_grad"), (place_kernels, "place"),
        (attention_launch, "forward"), (attention_launch, "backward"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, _noted(getattr(module, name), name, ran))
    batch = pack([sample(ours, (120, 160), 0), text_sample(1)], ours.config)
    results = []
    for switch in ("triton", "torch"):
        monkeypatch.setenv(SWITCH, switch)
        if switch == "torch":
            ours.save_pretrained(tmp_path)
            model = LlavaHD.from_pretrained(tmp_path)
            noted = set(ran)
            ran.clear()
        else:
            model = ours
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = model(batch).loss_sum
        results.append((loss, dict(zip(learned, torch.autograd.grad(loss, list(learned.values())),
                                       strict=True))))  # fmt: skip
    assert not ran
    needed = {"linear_rows", "hidden_grad", "weight_grad", "rows_grad", "forward", "backward"}
    assert needed <= noted and noted & {"fill", "place"}
    (ours_loss, ours_grads), (torchs_loss, torchs_grads) = results
    torch.testing.assert_close(ours_loss, torchs_loss)
    assert ours_grads.keys() == torchs_grads.keys()
    for name, mine in ours_grads.items():
        torch.testing.assert_close(mine, torchs_grads[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_dummy_pack_has_gradients_of_exactly_zero_through_every_kernel(next_pair) -> None:  # type: ignore[no-untyped-def]
    ours, _ = next_pair
    ours.zero_grad(set_to_none=True)
    output = ours(pack([], ours.config))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.eq(0).all(), name
    ours.zero_grad(set_to_none=True)


def _noted(function, name: str, ran: list[str]):  # type: ignore[no-untyped-def]
    def call(*args, **options):  # type: ignore[no-untyped-def]
        ran.append(name)
        return function(*args, **options)

    return call
