"""The matrix products of the projector as Triton kernels: what is gathered, fused and scattered.

    linear_rows     out[to[r]] = f(x[rows[r]] Wᵀ + b)              W [N K], f = GELU or nothing
    hidden_grad     dH = (dY W) ⊙ gelu'(H), H <- gelu(H)           W [K N], column sums of dH beside
    weight_grad     dW = Aᵀ B[rows], db = column sums of A         summed over the rows
    gelu_grad       the element-wise part of hidden_grad alone

Every product accumulates in fp32. A tile of the output belongs to one program and every sum has
a fixed order, so results are the same bit for bit from run to run. Row numbers are widened to
64 bits before they meet a stride: 524,288 rows of 4,096 are 2³¹ elements.

With TMA a matrix that is read in whole tiles comes through a tensor descriptor instead of
pointers (Hopper and later; rows of a multiple of 16 bytes).

The epilogues work on a tile's four column quarters, one after the other: GELU and its derivative
on a whole 128 x 256 accumulator need more registers than there are, and spill.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normal(h, EXACT: tl.constexpr):
    """Φ(h) and φ(h), the distribution and the density of N(0, 1): gelu(h) = h Φ(h),
    gelu'(h) = Φ(h) + h φ(h).

    EXACT: by erf. Otherwise by Abramowitz & Stegun 7.1.26 (error of Φ below 1e-7, far below what
    a 16-bit h leaves open), which shares its exponential with φ and needs few registers."""
    bell = tl.exp(-0.5 * h * h)
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    else:
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(h))  # 0.3275911 |h| / √2
        poly = -0.7265760129 + t * 0.5307027145  # the coefficients halved
        poly = 0.7107068705 + t * poly
        poly = -0.142248368 + t * poly
        poly = 0.127414796 + t * poly
        tail = t * poly * bell
        cdf = tl.where(h >= 0, 1.0 - tail, tail)
    return cdf, 0.3989422804014327 * bell


@triton.jit
def _tile_of(program, num_m, num_n, GROUP: tl.constexpr):
    """Programs in groups of GROUP tile rows, column by column: neighbours share what they read."""
    per_group = GROUP * num_n
    first = (program // per_group) * GROUP
    size = tl.minimum(num_m - first, GROUP)
    inside = program % per_group
    return first + inside % size, inside // size


@triton.jit
def _rows_of(index, r, R, stride, INDEXED: tl.constexpr):
    """Offsets in elements, 64 bits wide, of the rows r or of those that `index` names for them,
    and which of them are there (r < R and a number that is not negative).

    Where none is there the offset is that of row 0: readable, and never used."""
    there = r < R
    if INDEXED:
        number = tl.load(index + r, mask=there, other=-1).to(tl.int64)
        there = number >= 0
    else:
        number = r.to(tl.int64)
    return tl.where(there, number, 0) * stride, there


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile `[BM BN]`."""
    pair = tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1))
    return tl.split(pair)


@triton.jit
def _store_linear(
    acc, bias, pre, out, r, R, target, stored, c, N, stride_pre,
    GELU: tl.constexpr, SAVE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The epilogue of linear_rows on the columns c; target: the offsets of the output rows, stored:
    which of them are written."""
    acc += tl.load(bias + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    column = (c < N)[None, :]
    if SAVE:
        kept = pre + r.to(tl.int64)[:, None] * stride_pre + c[None, :]
        tl.store(kept, acc.to(pre.dtype.element_ty), mask=(r < R)[:, None] & column)
    if GELU:
        cdf, _ = _normal(acc, EXACT)
        acc = acc * cdf
    place = out + target[:, None] + c[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=stored[:, None] & column)


@triton.jit
def linear_rows_kernel(
    x, rows, w, bias, pre, out, to,
    R, N, K, stride_x, stride_w, stride_pre, stride_out,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, GELU: tl.constexpr, SAVE: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BM x BN tile of out. pre (SAVE) receives the rows before the GELU. Rows whose `to` is
    negative (SCATTER) are computed and stored nowhere."""
    m, n = _tile_of(tl.program_id(0), tl.cdiv(R, BM), tl.cdiv(N, BN), GROUP)
    r = m * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    offset, _ = _rows_of(rows, r, R, stride_x, GATHER)
    x_at = x + offset[:, None] + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    if not TMA:
        c = n * BN + tl.arange(0, BN)
        w_at = w + tl.where(c < N, c, 0).to(tl.int64)[None, :] * stride_w + k[:, None]
    for start in range(0, K, BK):
        if EVEN_K:
            a = tl.load(x_at)
        else:
            a = tl.load(x_at, mask=k[None, :] < K - start, other=0.0)
        if TMA:
            b = w.load([n * BN, start]).T
        else:
            if EVEN_K:
                b = tl.load(w_at)
            else:
                b = tl.load(w_at, mask=k[:, None] < K - start, other=0.0)
            w_at += BK
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_at += BK
    target, stored = _rows_of(to, r, R, stride_out, SCATTER)
    for i in tl.static_range(2):
        half = _halves(acc, BM, BN)[i]
        for j in tl.static_range(2):
            c = n * BN + (2 * i + j) * (BN // 4) + tl.arange(0, BN // 4)
            _store_linear(
                _halves(half, BM, BN // 2)[j], bias, pre, out, r, R, target, stored, c, N,
                stride_pre, GELU, SAVE, EXACT,
            )  # fmt: skip


@triton.jit
def _store_hidden_grad(
    acc, pre, dh, sums, m, r, R, c, N, stride_pre, stride_dh,
    KEEP_GELU: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The epilogue of hidden_grad on the columns c of tile row m."""
    inside = (r < R)[:, None] & (c < N)[None, :]
    place = r.to(tl.int64)[:, None]
    pre_at = pre + place * stride_pre + c[None, :]
    h = tl.load(pre_at, mask=inside, other=0.0).to(tl.float32)
    cdf, density = _normal(h, EXACT)
    grad = tl.where(inside, acc * (cdf + h * density), 0.0)
    if KEEP_GELU:
        tl.store(pre_at, (h * cdf).to(pre.dtype.element_ty), mask=inside)
    tl.store(dh + place * stride_dh + c[None, :], grad.to(dh.dtype.element_ty), mask=inside)
    tl.store(sums + m.to(tl.int64) * N + c, tl.sum(grad, 0), mask=c < N)


@triton.jit
def hidden_grad_kernel(
    dy, w, pre, dh, sums,
    R, N, K, stride_dy, stride_w, stride_pre, stride_dh,
    KEEP_GELU: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BM x BN tile of dH = (dY W) ⊙ gelu'(pre), and its column sums to sums[m].

    With KEEP_GELU the tile of `pre`, which no other program reads, is overwritten by gelu(pre)."""
    m, n = _tile_of(tl.program_id(0), tl.cdiv(R, BM), tl.cdiv(N, BN), GROUP)
    r = m * BM + tl.arange(0, BM)
    c = n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    offset, _ = _rows_of(dy, r, R, stride_dy, False)
    y_at = dy + offset[:, None] + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    if not TMA:
        w_at = w + k.to(tl.int64)[:, None] * stride_w + c[None, :]
    for start in range(0, K, BK):
        if EVEN_K:
            a = tl.load(y_at)
        else:
            a = tl.load(y_at, mask=k[None, :] < K - start, other=0.0)
        if TMA:
            b = w.load([start, n * BN])
        else:
            if EVEN_K:
                b = tl.load(w_at, mask=(c < N)[None, :], other=0.0)
            else:
                b = tl.load(w_at, mask=(k[:, None] < K - start) & (c < N)[None, :], other=0.0)
            w_at += BK * stride_w.to(tl.int64)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        y_at += BK
    for i in tl.static_range(2):
        half = _halves(acc, BM, BN)[i]
        for j in tl.static_range(2):
            c = n * BN + (2 * i + j) * (BN // 4) + tl.arange(0, BN // 4)
            _store_hidden_grad(
                _halves(half, BM, BN // 2)[j], pre, dh, sums, m, r, R, c, N,
                stride_pre, stride_dh, KEEP_GELU, EXACT,
            )  # fmt: skip


@triton.jit
def weight_grad_kernel(
    a, b, rows, dw, sums,
    R, M, N, stride_a, stride_b, stride_dw,
    GATHER: tl.constexpr, SUMS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BM x BN tile of dW = aᵀ b[rows]; a [R M], b [.. N], summed over R in fp32.

    With SUMS the column sums of a are shared out: program (m, n) adds up every num_n-th block of
    rows and writes sums[n], so that no tile is slower than the others."""
    num_n = tl.cdiv(N, BN)
    m, n = _tile_of(tl.program_id(0), tl.cdiv(M, BM), num_n, GROUP)
    i = m * BM + tl.arange(0, BM)
    j = n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, R, BK):
        r = start + tl.arange(0, BK)
        if TMA:
            left = a.load([start, m * BM])
        else:
            offset, there = _rows_of(a, r, R, stride_a, False)
            inside = there[:, None] & (i < M)[None, :]
            left = tl.load(a + offset[:, None] + i[None, :], mask=inside, other=0.0)
        offset, there = _rows_of(rows, r, R, stride_b, GATHER)
        inside = there[:, None] & (j < N)[None, :]
        right = tl.load(b + offset[:, None] + j[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
        if SUMS:
            if (start // BK) % num_n == n:
                total += tl.sum(left.to(tl.float32), 0)
    inside = (i < M)[:, None] & (j < N)[None, :]
    place = i.to(tl.int64)[:, None] * stride_dw + j[None, :]
    tl.store(dw + place, acc.to(dw.dtype.element_ty), mask=inside)
    if SUMS:
        tl.store(sums + n.to(tl.int64) * M + i, total, mask=i < M)


@triton.jit
def gelu_grad_kernel(
    dg, pre, sums, R, N, stride_dg, stride_pre,
    KEEP_GELU: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dg <- dg ⊙ gelu'(pre), pre <- gelu(pre) (KEEP_GELU), column sums of the new dg to sums[m].

    The element-wise part of hidden_grad alone, for a dG that a library's product has made."""
    m, n = tl.program_id(0), tl.program_id(1)
    r = m * BM + tl.arange(0, BM)
    c = n * BN + tl.arange(0, BN)
    inside = (r < R)[:, None] & (c < N)[None, :]
    dg_at = dg + r.to(tl.int64)[:, None] * stride_dg + c[None, :]
    grad = tl.load(dg_at, mask=inside, other=0.0).to(tl.float32)
    _store_hidden_grad(grad, pre, dg, sums, m, r, R, c, N, stride_pre, stride_dg, KEEP_GELU, EXACT)
