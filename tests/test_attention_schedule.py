"""The schedule of attention blocks against a loop over the sequences."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_hd.kernels.attention_schedule import Schedule, dense_schedule


def schedule_of(lengths: list[int], rest: int, causal: bool) -> Schedule:
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths) + rest
    return Schedule(cu, cu, total, total, causal)


LENGTHS = st.lists(st.integers(0, 200), min_size=1, max_size=8)


@given(LENGTHS, st.integers(0, 50), st.sampled_from([16, 64]), st.booleans(), st.integers(0, 1))
def test_every_block_stands_there_once_and_work_falls(
    lengths: list[int], rest: int, size: int, causal: bool, skip: int
) -> None:
    made = schedule_of(lengths, rest, causal)
    entries = made.query_blocks(size, skip).tolist()
    there = [tuple(entry) for entry in entries if entry[0] >= 0]
    counts = [max(0, n - skip) for n in [*lengths, rest, 0]]
    assert sorted(there) == [
        (s, b) for s, n in enumerate(counts) for b in range((n + size - 1) // size)
    ]
    assert entries[len(there) :] == [[-1, -1]] * (len(entries) - len(there))
    keys = [*lengths, 0]
    work = [min(keys[s] - skip, (b + 1) * size) if causal else keys[s] - skip
            for s, b in there if s < len(lengths)]  # fmt: skip
    assert work == sorted(work, reverse=True)


@given(LENGTHS, st.integers(0, 50), st.booleans())
def test_blocks_of_keys_cover_the_rest_too(lengths: list[int], rest: int, causal: bool) -> None:
    entries = schedule_of(lengths, rest, causal).key_blocks(32).tolist()
    counts = [*lengths, 0, rest]
    assert sorted(tuple(e) for e in entries if e[0] >= 0) == [
        (s, b) for s, n in enumerate(counts) for b in range((n + 31) // 32)
    ]


def test_a_pack_of_128k_tokens() -> None:
    lengths = [3184, 600, 1, 0, 65_536, 61_751]
    made = schedule_of(lengths, 0, True)
    assert made.num_rows == (131_072, 131_072)
    entries = made.query_blocks(128)
    there = entries[entries[:, 0] >= 0]
    assert torch.bincount(there[:, 0].long(), minlength=6).tolist() == [
        (n + 127) // 128 for n in lengths
    ]
    assert there[0].tolist() == [4, 511]  # the most keys to see


def test_blocks_are_worked_out_once() -> None:
    made = schedule_of([40, 3], 0, True)
    assert made.query_blocks(16) is made.query_blocks(16)
    assert made.lengths() == ([40, 3], [40, 3])
    cpu = torch.device("cpu")
    assert dense_schedule(2, 9, 9, True, cpu) is dense_schedule(2, 9, 9, True, cpu)
    assert dense_schedule(2, 9, 7, False, cpu).lengths() == ([9, 9], [7, 7])
