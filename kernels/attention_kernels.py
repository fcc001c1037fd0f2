"""The Triton kernels of flash_attention.py (Dao, FlashAttention-2, algorithms 1 and 2).

Sequences lie end to end: sequence s has queries cu_q[s]:cu_q[s+1] and keys cu_k[s]:cu_k[s+1]. A
program serves one entry of a schedule, (sequence, block of its rows), and one head; entries behind
the last are negative and do nothing. A causal query i sees keys up to i + keys - queries.

Scores are kept in powers of two (scale · log2 e); lse is the base-2 log of the sum of exponentials,
fp32 `[Hq T]`, -inf for a query without keys.

Backward runs two kernels, one for dq and one for dk and dv, instead of adding dq up by atomics: two
products of seven more, and every sum has a fixed order. The one for dk and dv holds the transposed
scores Sᵀ = K Qᵀ, so that no result of a product is transposed before the next one (Triton before
3.7.1 miscompiles that on Hopper). Query heads that share a key head are summed in the program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _lines(x, start, row, rows, head, stride_t, stride_h, d, D, FULL_D: tl.constexpr):
    """Rows `row` (of a sequence that begins at `start` and has `rows`) of one head: `[row d]`,
    zeros beyond."""
    at = x + (start + row).to(tl.int64)[:, None] * stride_t + head * stride_h + d[None, :]
    if FULL_D:
        return tl.load(at, mask=(row < rows)[:, None], other=0.0)
    return tl.load(at, mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_lines(x, value, start, row, rows, head, stride_t, stride_h, d, D):
    """The inverse of _lines, in x's type."""
    at = x + (start + row).to(tl.int64)[:, None] * stride_t + head * stride_h + d[None, :]
    inside = (row < rows)[:, None] & (d < D)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _visible(query, key, queries, keys, CAUSAL: tl.constexpr):
    """Whether a query may look at a key; broadcasts."""
    seen = (key < keys) & (query < queries)
    if CAUSAL:
        seen = seen & (key <= query + keys - queries)
    return seen


@triton.jit
def _key_blocks(first, queries, keys, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """(blocks of keys that every query of a block sees whole, blocks that any of them sees)."""
    if CAUSAL:
        last = tl.minimum(keys, tl.maximum(0, first + BM + keys - queries))
        whole = tl.minimum(keys, tl.maximum(0, first + 1 + keys - queries)) // BN
    else:
        last = keys
        whole = keys // BN
    return whole, tl.cdiv(last, BN)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, schedule, scale2, T,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, FULL_D: tl.constexpr,
    FIRST_APART: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of queries of one head.

    FIRST_APART: the first token of each sequence is a key that every query sees: it is the first
    state of the online softmax (score, 1, value), and blocks count from the second token on. Its
    own query is served by first_query_kernel. 257 and 577 tokens are then 4 and 9 blocks of 64."""
    entry = tl.program_id(0)
    s = tl.load(schedule + 2 * entry)
    if s < 0:
        return
    first = tl.load(schedule + 2 * entry + 1) * BM
    head = tl.program_id(1).to(tl.int64)
    start_q, start_k = tl.load(cu_q + s), tl.load(cu_k + s)
    queries, keys = tl.load(cu_q + s + 1) - start_q, tl.load(cu_k + s + 1) - start_k
    row, d = first + tl.arange(0, BM), tl.arange(0, BD)
    key_head = head // GROUP
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    if FIRST_APART:
        line = start_k.to(tl.int64)
        k0 = tl.load(k + line * stride_kt + key_head * stride_kh + d, mask=d < D, other=0.0)
        v0 = tl.load(v + line * stride_vt + key_head * stride_vh + d, mask=d < D, other=0.0)
        start_q, start_k = start_q + 1, start_k + 1
        queries, keys = queries - 1, keys - 1
    query = _lines(q, start_q, row, queries, head, stride_qt, stride_qh, d, D, FULL_D)
    if FIRST_APART:
        top = tl.sum(query.to(tl.float32) * k0.to(tl.float32)[None, :], 1) * scale2
        total += 1.0
        acc += v0.to(tl.float32)[None, :]
    whole, blocks = _key_blocks(first, queries, keys, BM, BN, CAUSAL)
    for part in tl.static_range(2):
        if part == 0:
            low, high = 0, whole
        else:
            low, high = whole, blocks
        for block in range(low, high):
            col = block * BN + tl.arange(0, BN)
            key = _lines(k, start_k, col, keys, key_head, stride_kt, stride_kh, d, D, FULL_D)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale2
            if part == 1:
                seen = _visible(row[:, None], col[None, :], queries, keys, CAUSAL)
                score = tl.where(seen, score, float("-inf"))
            peak = tl.maximum(top, tl.max(score, 1))
            base = tl.where(peak == float("-inf"), 0.0, peak)
            p = tl.exp2(score - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            value = _lines(v, start_k, col, keys, key_head, stride_vt, stride_vh, d, D, FULL_D)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
            top = peak
    total = tl.where(total == 0.0, 1.0, total)  # a query without keys: 0, and an lse of -inf
    acc = acc / total[:, None]
    _store_lines(out, acc, start_q, row, queries, head, stride_ot, stride_oh, d, D)
    tl.store(lse + head * T + start_q + row, top + tl.log2(total), mask=row < queries)


@triton.jit
def first_query_kernel(
    q, k, v, out, lse, cu_q, cu_k, scale2, T,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    GROUP: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out and lse of the first query of a sequence, which sees every key (FIRST_APART)."""
    s = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    start_q, start_k = tl.load(cu_q + s), tl.load(cu_k + s)
    keys = tl.load(cu_k + s + 1) - start_k
    if tl.load(cu_q + s + 1) == start_q:
        return
    d = tl.arange(0, BD)
    line = start_q.to(tl.int64)
    query = tl.load(q + line * stride_qt + head * stride_qh + d, mask=d < D, other=0.0)
    query = query.to(tl.float32) * scale2
    key_head = head // GROUP
    top = -float("inf")
    total = 0.0
    acc = tl.zeros((BD,), tl.float32)
    for block in range(tl.cdiv(keys, BN)):
        col = block * BN + tl.arange(0, BN)
        key = _lines(k, start_k, col, keys, key_head, stride_kt, stride_kh, d, D, False)
        score = tl.sum(key.to(tl.float32) * query[None, :], 1)
        score = tl.where(col < keys, score, float("-inf"))
        peak = tl.maximum(top, tl.max(score, 0))
        p = tl.exp2(score - peak)
        shrink = tl.exp2(top - peak)
        total = total * shrink + tl.sum(p, 0)
        value = _lines(v, start_k, col, keys, key_head, stride_vt, stride_vh, d, D, False)
        acc = acc * shrink + tl.sum(p[:, None] * value.to(tl.float32), 0)
        top = peak
    place = out + line * stride_ot + head * stride_oh + d
    tl.store(place, (acc / total).to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + head * T + start_q, top + tl.log2(total))


@triton.jit
def delta_kernel(
    out, dout, delta, T, stride_ot, stride_oh, stride_gt, stride_gh,
    D: tl.constexpr, FULL_D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """delta[h, t] = Σ_d out · dout, fp32."""
    row, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    head = tl.program_id(1).to(tl.int64)
    o = _lines(out, 0, row, T, head, stride_ot, stride_oh, d, D, FULL_D).to(tl.float32)
    g = _lines(dout, 0, row, T, head, stride_gt, stride_gh, d, D, FULL_D).to(tl.float32)
    tl.store(delta + head * T + row, tl.sum(o * g, 1), mask=row < T)


@triton.jit
def query_grad_kernel(
    q, k, v, dout, lse, delta, dq, cu_q, cu_k, schedule, scale, scale2, T,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    stride_dt, stride_dh,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, FULL_D: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    entry = tl.program_id(0)
    s = tl.load(schedule + 2 * entry)
    if s < 0:
        return
    first = tl.load(schedule + 2 * entry + 1) * BM
    head = tl.program_id(1).to(tl.int64)
    start_q, start_k = tl.load(cu_q + s), tl.load(cu_k + s)
    queries, keys = tl.load(cu_q + s + 1) - start_q, tl.load(cu_k + s + 1) - start_k
    row, d = first + tl.arange(0, BM), tl.arange(0, BD)
    query = _lines(q, start_q, row, queries, head, stride_qt, stride_qh, d, D, FULL_D)
    grad = _lines(dout, start_q, row, queries, head, stride_gt, stride_gh, d, D, FULL_D)
    norm = tl.load(lse + head * T + start_q + row, mask=row < queries, other=0.0)
    norm = tl.where(norm == float("-inf"), 0.0, norm)
    shift = tl.load(delta + head * T + start_q + row, mask=row < queries, other=0.0)
    acc = tl.zeros((BM, BD), tl.float32)
    whole, blocks = _key_blocks(first, queries, keys, BM, BN, CAUSAL)
    key_head = head // GROUP
    for part in tl.static_range(2):
        if part == 0:
            low, high = 0, whole
        else:
            low, high = whole, blocks
        for block in range(low, high):
            col = block * BN + tl.arange(0, BN)
            key = _lines(k, start_k, col, keys, key_head, stride_kt, stride_kh, d, D, FULL_D)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale2
            p = tl.exp2(score - norm[:, None])
            if part == 1:
                seen = _visible(row[:, None], col[None, :], queries, keys, CAUSAL)
                p = tl.where(seen, p, 0.0)
            value = _lines(v, start_k, col, keys, key_head, stride_vt, stride_vh, d, D, FULL_D)
            dp = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            ds = p * (dp - shift[:, None])
            acc = tl.dot(ds.to(key.dtype), key, acc, input_precision=PRECISION)
    _store_lines(dq, acc * scale, start_q, row, queries, head, stride_dt, stride_dh, d, D)


@triton.jit
def key_grad_kernel(
    q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, schedule, scale, scale2, T,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, FULL_D: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of BN keys of one key head, summed over the GROUP heads that share it.

    `schedule` counts blocks of keys here; scores are held transposed, `[keys queries]`."""
    entry = tl.program_id(0)
    s = tl.load(schedule + 2 * entry)
    if s < 0:
        return
    first = tl.load(schedule + 2 * entry + 1) * BN
    key_head = tl.program_id(1).to(tl.int64)
    start_q, start_k = tl.load(cu_q + s), tl.load(cu_k + s)
    queries, keys = tl.load(cu_q + s + 1) - start_q, tl.load(cu_k + s + 1) - start_k
    col, d = first + tl.arange(0, BN), tl.arange(0, BD)
    key = _lines(k, start_k, col, keys, key_head, stride_kt, stride_kh, d, D, FULL_D)
    value = _lines(v, start_k, col, keys, key_head, stride_vt, stride_vh, d, D, FULL_D)
    dkey = tl.zeros((BN, BD), tl.float32)
    dvalue = tl.zeros((BN, BD), tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, first + queries - keys) // BM
    blocks = tl.maximum(0, tl.cdiv(queries, BM) - begin)
    for i in range(GROUP * blocks):
        head = key_head * GROUP + i // blocks
        row = (begin + i % blocks) * BM + tl.arange(0, BM)
        query = _lines(q, start_q, row, queries, head, stride_qt, stride_qh, d, D, FULL_D)
        score = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale2
        norm = tl.load(lse + head * T + start_q + row, mask=row < queries, other=0.0)
        norm = tl.where(norm == float("-inf"), 0.0, norm)
        seen = _visible(row[None, :], col[:, None], queries, keys, CAUSAL)
        p = tl.where(seen, tl.exp2(score - norm[None, :]), 0.0)
        grad = _lines(dout, start_q, row, queries, head, stride_gt, stride_gh, d, D, FULL_D)
        dvalue = tl.dot(p.to(grad.dtype), grad, dvalue, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        shift = tl.load(delta + head * T + start_q + row, mask=row < queries, other=0.0)
        ds = p * (dp - shift[None, :])
        dkey = tl.dot(ds.to(query.dtype), query, dkey, input_precision=PRECISION)
    _store_lines(dk, dkey * scale, start_k, col, keys, key_head, stride_dkt, stride_dkh, d, D)
    _store_lines(dv, dvalue, start_k, col, keys, key_head, stride_dvt, stride_dvh, d, D)
