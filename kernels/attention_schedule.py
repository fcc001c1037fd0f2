"""Which (sequence, block) each attention program serves, worked out once for a batch.

Plain torch, and nothing waits for the device: the number of programs is bounded from the number of
tokens and sequences, and entries behind the last are (-1, -1). Blocks are ordered by their work,
longest first, so that the last programs to start are short ones (LPT; Dao et al., FlashAttention-3,
schedule their packs so, but at every launch). All layers of a model share the schedule.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


class Schedule:
    """The blocks of a batch of sequences laid end to end.

    cu_q, cu_k: int32 `[S + 3]`: the ends as given, then two sequences for what is behind the last
    end, the rest of the queries without keys and the rest of the keys without queries; so that
    rows of no sequence get zeros from the same kernels.
    """

    def __init__(
        self, cu_q: Tensor, cu_k: Tensor, num_queries: int, num_keys: int, causal: bool
    ) -> None:
        for name, ends, rows in (("q", cu_q, num_queries), ("k", cu_k, num_keys)):
            if ends.device.type == "cpu":
                _check_ends(name, ends.tolist(), rows)
        # On a GPU they are not looked at, which would wait for it, but nothing outside is read.
        cu_q, cu_k = cu_q.clamp(0, num_queries), cu_k.clamp(0, num_keys)
        self.given = cu_q, cu_k
        self.causal = causal
        self.cu_q = torch.cat([cu_q, cu_q.new_full((2,), num_queries)])
        self.cu_k = torch.cat([cu_k, cu_k[-1:], cu_k.new_full((1,), num_keys)])
        self.num_rows = num_queries, num_keys
        self._blocks: dict[tuple[str, int, int], Tensor] = {}

    @property
    def num_sequences(self) -> int:
        """S, without the two that hold the rest."""
        return len(self.given[0]) - 1

    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each given sequence; waits for the device (torch's path needs it)."""
        if not hasattr(self, "_lengths"):
            ends = (cu.tolist() for cu in self.given)
            self._lengths = tuple([b - a for a, b in pairwise(cu)] for cu in ends)
        queries, keys = self._lengths
        return queries, keys

    def query_blocks(self, size: int, skip: int = 0) -> Tensor:
        """int32 `[n 2]`, (sequence, block of `size` queries); the first `skip` tokens of each
        sequence are left out."""
        if ("q", size, skip) not in self._blocks:
            queries, keys = self.cu_q.diff() - skip, self.cu_k.diff() - skip
            sequence, block = _places(queries.clamp(min=0), size, self.num_rows[0])
            work = keys[sequence]
            if self.causal:
                work = torch.minimum(work, (block + 1) * size + (keys - queries)[sequence])
            self._blocks["q", size, skip] = _ordered(sequence, block, work)
        return self._blocks["q", size, skip]

    def key_blocks(self, size: int) -> Tensor:
        """int32 `[n 2]`, (sequence, block of `size` keys)."""
        if ("k", size, 0) not in self._blocks:
            queries, keys = self.cu_q.diff(), self.cu_k.diff()
            sequence, block = _places(keys, size, self.num_rows[1])
            work = queries[sequence]
            if self.causal:
                work = torch.minimum(work, (keys[sequence] - block * size))
            self._blocks["k", size, 0] = _ordered(sequence, block, work)
        return self._blocks["k", size, 0]


def _check_ends(name: str, ends: list[int], rows: int) -> None:
    if not ends or ends[0] != 0 or ends != sorted(ends):
        raise ValueError(f"flash_attention: cu_seqlens must rise from 0, not {ends[:8]}")
    if ends[-1] > rows:
        raise ValueError(f"flash_attention: cu_seqlens end at {ends[-1]}, {name} has {rows} rows")


def _places(lengths: Tensor, size: int, total: int) -> tuple[Tensor, Tensor]:
    """(sequence, block) of the i-th block, for as many as there can be; sequence = len(lengths)
    where there is none."""
    counts = (lengths + size - 1) // size
    ends = counts.cumsum(0)
    i = torch.arange(total // size + len(lengths), device=lengths.device)
    sequence = torch.searchsorted(ends, i, right=True)
    inside = sequence.clamp(max=len(lengths) - 1)
    block = i - (ends - counts)[inside]
    return torch.where(sequence < len(lengths), inside, -1), block


def _ordered(sequence: Tensor, block: Tensor, work: Tensor) -> Tensor:
    """The entries by falling work, those of no sequence last and (-1, -1)."""
    there = sequence >= 0
    order = torch.where(there, work.clamp(min=0), -1).argsort(descending=True, stable=True)
    entries = torch.stack([sequence, block], 1).where(there[:, None], -1)
    return entries[order].to(torch.int32).contiguous()


@lru_cache(maxsize=32)
def dense_schedule(
    batch: int, queries: int, keys: int, causal: bool, device: torch.device
) -> Schedule:
    """The schedule of `batch` equal sequences."""
    steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return Schedule(steps * queries, steps * keys, batch * queries, batch * keys, causal)
