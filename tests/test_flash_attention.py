"""Attention against every score written out in fp64, dense and packed."""

import pytest
import torch

from llava_hd.kernels.flash_attention import (
    flash_attention,
    flash_attention_reference,
    flash_attention_with_lse,
    pack_schedule,
)


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


def test_cu_seqlens_beyond_the_pack_are_refused() -> None:
    q, k, v = qkv((8, 2, 4), (8, 2, 4))
    with pytest.raises(ValueError, match="end at 9"):
        flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))


def test_rows_behind_the_last_end_belong_to_no_sequence() -> None:
    args = qkv((8, 2, 4), (8, 2, 4))
    for x in args:
        x.data[5:] = float("nan")
    out = flash_attention(*args, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
    assert out[5:].eq(0).all() and out.isfinite().all()
    grads = torch.autograd.grad(out.sum(), args)
    assert all(grad[5:].eq(0).all() and grad.isfinite().all() for grad in grads)


def test_queries_without_keys_give_zeros() -> None:
    args = qkv((1, 6, 2, 4), (1, 4, 2, 4))
    out = flash_attention(*args, causal=True)
    truth = flash_attention_reference(*args, causal=True)
    assert out[:, :2].eq(0).all()
    torch.testing.assert_close(out, truth)
    for a, b in zip(
        *(torch.autograd.grad(x.square().sum(), args) for x in (out, truth)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [True, False])
def test_the_log_of_the_sum_of_exponentials(causal: bool) -> None:
    q, k, v = qkv((9, 2, 4), (9, 1, 4))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    _, lse = flash_attention_with_lse(q, k, v, cu_seqlens=cu, causal=causal)
    scores = torch.einsum("shd,ld->hsl", q[4:], k[4:, 0]) / 2
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(lse[:, 4:], scores.exp().sum(-1).log().detach())


def test_a_schedule_of_another_pack_is_refused() -> None:
    q, k, v = qkv((8, 2, 4), (8, 2, 4))
    cu = torch.tensor([0, 8], dtype=torch.int32)
    for schedule in (pack_schedule(cu, 8, causal=False), pack_schedule(cu, 9)):
        with pytest.raises(ValueError, match="the schedule is for"):
            flash_attention(q, k, v, cu_seqlens=cu, schedule=schedule)


@pytest.mark.parametrize("ends", [[1, 8], [0, 5, 3], []])
def test_ends_that_do_not_rise_from_zero_are_refused(ends: list[int]) -> None:
    q, k, v = qkv((8, 2, 4), (8, 2, 4))
    with pytest.raises(ValueError, match="rise from 0"):
        flash_attention(q, k, v, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_nothing_to_look_at_gives_zeros_with_a_gradient() -> None:
    q, k, v = qkv((1, 3, 2, 4), (1, 0, 2, 4))
    out = flash_attention(q, k, v, causal=False)
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), q)[0].eq(0).all()
    q, k, v = qkv((3, 2, 4), (3, 2, 4))
    out = flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 0], dtype=torch.int32))
    assert torch.autograd.grad(out.sum(), q)[0].eq(0).all()


def test_shapes_that_do_not_fit_are_named() -> None:
    for a, b in (((3, 6, 2, 4), (2, 6, 2, 4)), ((1, 6, 2, 8), (1, 6, 2, 4))):
        with pytest.raises(ValueError, match=r"need \[B S H d\]"):
            flash_attention(*qkv(a, b))
    q, k, v = qkv((1, 6, 2, 4), (1, 4, 2, 4))
    with pytest.raises(ValueError, match=r"v \(1, 3, 2, 4\)"):
        flash_attention(q, k, v[:, :3])
    with pytest.raises(ValueError, match="6 packed queries, 4 keys"):
        flash_attention(q[0], k[0], v[0], cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
