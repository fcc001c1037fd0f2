"""The attention kernels, interpreted on the CPU, against torch and fp64."""

import kernel_checks
import pytest
import torch
from kernel_checks import assert_as_exact_as_torch, small_table
from torch import Tensor

from llava_hd.kernels.flash_attention import (
    flash_attention,
    flash_attention_reference,
    flash_attention_with_lse,
    pack_schedule,
)

TABLE = small_table()


def qkv(
    shape: tuple[int, ...], heads: tuple[int, int], d: int, dtype: torch.dtype, keys: int = 0
) -> list[Tensor]:
    """q `[*shape Hq d]`, k and v `[*shape Hkv d]`; keys: another length of k and v."""
    torch.manual_seed(sum(shape) + d)
    other = (*shape[:-1], keys or shape[-1])
    shapes = [(*shape, heads[0], d), (*other, heads[1], d), (*other, heads[1], d)]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def check(args: list[Tensor], dout: Tensor | None = None, **options) -> None:  # type: ignore[no-untyped-def]
    """Output, lse and every gradient, from poisoned memory."""
    with kernel_checks.poisoned_memory():
        ours, lse = flash_attention_with_lse(*args, table=TABLE, **options)
        dout = torch.randn(ours.shape).to(ours.dtype) if dout is None else dout
        ours_grads = torch.autograd.grad(ours, args, dout)
    torchs, torchs_lse = flash_attention_with_lse(*args, **options)
    torchs_grads = torch.autograd.grad(torchs, args, dout)
    wide = [x.detach().double().requires_grad_() for x in args]
    exact = flash_attention_reference(*wide, **options)
    exact_grads = torch.autograd.grad(exact, wide, dout.double())
    assert_as_exact_as_torch(ours, torchs, exact)
    for mine, theirs, true in zip(ours_grads, torchs_grads, exact_grads, strict=True):
        assert_as_exact_as_torch(mine, theirs, true)
    exact_lse = flash_attention_with_lse(*wide, **options)[1]
    assert torch.equal(lse == float("-inf"), exact_lse == float("-inf"))
    close = 1e-5 if ours.dtype == torch.float32 else 3e-3
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=close)
    assert torchs_lse.shape == lse.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "d"), [(1, 64), (31, 32), (64, 40), (65, 128), (127, 64)])
def test_dense_batches(length: int, d: int, causal: bool, dtype: torch.dtype) -> None:
    check(qkv((2, length), (2, 2), d, dtype), causal=causal)


def ends(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_packs_with_shared_key_heads(
    heads: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    """Lengths of 0, 1 and around powers of two."""
    cu = ends(0, 1, 31, 64, 0, 33, 2)
    check(qkv((131,), heads, 32, dtype), cu_seqlens=cu, causal=causal)


@pytest.mark.parametrize("d", [32, 80, 96, 256])
def test_head_dimensions(d: int) -> None:
    check(qkv((40,), (2, 1), d, torch.float32), cu_seqlens=ends(17, 23))


@pytest.mark.parametrize("length", [257, 577])
def test_long_sequences(length: int) -> None:
    check(qkv((length + 6,), (1, 1), 16, torch.float32), cu_seqlens=ends(5, length, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", [65, 257])
def test_the_towers_shapes_with_their_first_token_apart(length: int, dtype: torch.dtype) -> None:
    check(qkv((3, length), (2, 2), 16, dtype), causal=False)


def test_the_336_px_tower_at_its_own_head_dimension() -> None:
    check(qkv((1, 577), (1, 1), 64, torch.float16), causal=False)


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (5, 40), (33, 70), (40, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_other_numbers_of_keys_than_queries(queries: int, keys: int, causal: bool) -> None:
    """A cached prefix; and queries that see no key at all give zeros."""
    check(qkv((2, queries), (2, 1), 32, torch.float32, keys=keys), causal=causal)


def test_a_scale_is_used() -> None:
    check(qkv((20,), (2, 2), 32, torch.float32), cu_seqlens=ends(20), scale=0.5)


def test_rows_of_no_sequence_give_zeros_and_matter_to_nobody() -> None:
    args = qkv((50,), (2, 1), 32, torch.float32)
    for x in args:
        x.data[37:] = float("nan")
    dout = torch.randn(50, 2, 32)
    dout[37:] = float("nan")
    out = flash_attention(*args, cu_seqlens=ends(20, 17), table=TABLE)
    grads = torch.autograd.grad(out, args, dout)
    assert out[37:].eq(0).all() and out.isfinite().all()
    assert all(grad[37:].eq(0).all() and grad.isfinite().all() for grad in grads)


def test_sequences_do_not_see_each_other() -> None:
    args = [x.detach() for x in qkv((70,), (2, 2), 32, torch.float32)]
    before = flash_attention(*args, cu_seqlens=ends(33, 37), table=TABLE)
    for x in args:
        x[:33] = float("nan")
    after = flash_attention(*args, cu_seqlens=ends(33, 37), table=TABLE)
    assert torch.equal(before[33:], after[33:])


def test_slices_of_a_fused_qkv_and_gradients_of_any_layout() -> None:
    torch.manual_seed(0)
    fused = torch.randn(45, 3, 2, 32, requires_grad=True)
    cu = ends(20, 25)
    for dout in (torch.randn(45, 2, 64)[..., ::2], torch.tensor(0.5).expand(45, 2, 32)):
        results = []
        for table in (TABLE, None):
            q, k, v = fused.unbind(1)
            out = flash_attention(q, k, v, cu_seqlens=cu, table=table)
            results.append((out, *torch.autograd.grad(out, fused, dout)))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_batches_in_transformers_layout() -> None:
    args = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            for x in qkv((2, 30), (4, 2), 32, torch.float32)]  # fmt: skip
    check(args)


def test_one_schedule_serves_all_layers_and_runs_agree_bit_for_bit() -> None:
    cu = ends(12, 40, 3)
    args = qkv((55,), (2, 1), 32, torch.float16)
    schedule = pack_schedule(cu, 55)
    runs = []
    for given in (schedule, schedule, None):
        out = flash_attention(*args, cu_seqlens=cu, schedule=given, table=TABLE)
        runs.append([out, *torch.autograd.grad(out, args, torch.ones_like(out))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
