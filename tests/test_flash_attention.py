"""Attention against every score written out in fp64, dense and packed."""

import pytest
import torch

from llava_hd.kernels.flash_attention import flash_attention, flash_attention_reference


def qkv(shape_q: tuple[int, ...], shape_k: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (shape_q, shape_k, shape_k)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (65, 65), (1, 9), (4, 9)])
def test_dense_attention_is_its_definition(causal: bool, queries: int, keys: int) -> None:
    args = qkv((2, queries, 4, 8), (2, keys, 2, 8))
    out = flash_attention(*args, causal=causal)
    truth = flash_attention_reference(*args, causal=causal)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), args)
    theirs = torch.autograd.grad((truth * weight).sum(), args)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_a_pack_is_its_sequences_one_by_one(causal: bool) -> None:
    lengths = [3, 0, 1, 12, 5]
    ends = torch.tensor([0, 3, 3, 4, 16, 21], dtype=torch.int32)
    q, k, v = qkv((21, 4, 8), (21, 2, 8))
    out = flash_attention(q, k, v, cu_seqlens=ends, causal=causal)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        if length:
            alone = flash_attention_reference(
                q[None, part], k[None, part], v[None, part], causal=causal
            )
            torch.testing.assert_close(out[part], alone[0], rtol=1e-10, atol=1e-12)
        start += length


def test_sequences_of_a_pack_have_exactly_no_influence_on_each_other() -> None:
    ends = torch.tensor([0, 6, 11], dtype=torch.int32)
    q, k, v = (x.detach().float() for x in qkv((11, 2, 8), (11, 2, 8)))
    before = flash_attention(q, k, v, cu_seqlens=ends)
    for x in (q, k, v):
        x[:6] = float("nan")
    after = flash_attention(q, k, v, cu_seqlens=ends)
    assert torch.equal(before[6:], after[6:])


def test_a_given_scale_is_used() -> None:
    args = qkv((1, 5, 2, 4), (1, 5, 2, 4))
    out = flash_attention(*args, scale=0.3)
    torch.testing.assert_close(out, flash_attention_reference(*args, scale=0.3))
    assert not torch.allclose(out, flash_attention(*args))


def test_cu_seqlens_that_do_not_cover_the_pack_are_refused() -> None:
    q, k, v = qkv((8, 2, 4), (8, 2, 4))
    with pytest.raises(ValueError, match="end at 7"):
        flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
