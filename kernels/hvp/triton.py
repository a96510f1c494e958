"""Triton kernels of the products without a Hessian and their launchers; the contract is in `reference.py`.

The four functions of X have the form out = X^T f(X V) with a function f of one row of X V at a time, and share one
kernel. `_pass` takes a tile of rows, multiplies it by V, applies f, and multiplies the same tile, still in registers,
by the result. A program goes through a range of rows that depends on the shapes alone, adds at most `_RUN` tiles in
the arithmetic type and then into its own float64 sums in memory; `_finish` adds the sums of all programs in a fixed
order. Nothing is atomic, so results repeat bit for bit.

A program holds D columns of X and K <= 4 columns of V. More columns of V are groups, next to each other in the grid, so
that they find X in the L2 cache. Where a row of X is too long, or f needs all columns of X V (softmax), `_pass` runs
twice, for X V and for X^T R with `_between` in the middle, and reads X twice: chunks of rows that the cache could hold
between the two would cost as much in launches as they save.
"""

# ruff: noqa: RUF005, SIM102 (there is no unpacking in a kernel, and a compile-time condition has its own if)

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from secant.kernels import _triton_support
from secant.kernels._triton_support import store as _store
from secant.kernels._triton_support import widened as _widened
from secant.kernels.hvp import LOSSES
from torch import Tensor

#: Most columns of X times columns of V that a program has, half as many of float64, and columns of V.
_ELEMENTS, _VECTORS = 16384, 4
#: Entries of a tile, half as many of float64, twice as many with several columns of V, each counted; rows of it.
_TILE, _TILE_ROWS = 4096, 256
#: Columns of a slab, where X is read twice.
_SLAB = 1024
#: Tiles that are added before the sum goes to float64.
_RUN = 256
#: Programs per multiprocessor, the fewest tiles worth a program, and the most bytes of sums and of X V in memory.
_PROGRAMS_PER_SM, _FEWEST_TILES, _WORKSPACE = 4, 4, 64 << 20
#: Entries of X V of a program between the two passes.
_BETWEEN = 1024
#: A tile of partial sums: programs, entries.
_FINISH_PARTS, _FINISH_ENTRIES, _VALUE_ENTRIES = 128, 16, 4096
#: Longest row of logits that a program holds, half of it for float64; else entries that it reads at a time.
_ROW, _ROW_BLOCK = 16384, 8192
#: Side of a tile of a product, half of it for float64, terms at a time, and the fewest worth a program of their own.
_PRODUCT_SIDE, _PRODUCT_K, _PRODUCT_TERMS = 64, 32, 512
#: Of a Gram matrix: rows whose sum is added to the others as a whole, rows at a time.
_GRAM_RUN, _GRAM_K = 512, 16

_GLM_HVP, _GLM_VALUE_GRAD, _SOFTMAX_HVP, _SOFTMAX_VALUE_GRAD = 0, 1, 2, 3


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return _triton_support.available(_INTERPRETED)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when X (or logits) of this device and dtype are supported, else the reason why they are not."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"X is float32, float64, bfloat16 or float16, not {dtype}"
    return _triton_support.supports(device, _INTERPRETED)


# --------------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _wide(x):
    """Make a whole number one of 64 bits; Triton makes a constant of an argument that is 1."""
    return tl.full((), x, tl.int64)


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1 as 2 artanh(x / (2 + x)), a series in at most 1 / 9."""
    TERMS: tl.constexpr = 17 if x.dtype.primitive_bitwidth == 64 else 8
    s = x / (2.0 + x)
    square = s * s
    series = tl.full(x.shape, 1.0 / (2 * TERMS - 1), x.dtype)
    for i in tl.static_range(TERMS - 1):
        series = series * square + 1.0 / (2 * (TERMS - 2 - i) + 1)
    return 2.0 * s * series


@triton.jit
def _times_exp(t, x):
    """t e^x, zero for t = 0 where the exponential overflows; NaN stays."""
    return tl.where((t == 0.0) & (x == x), 0.0, t * tl.exp(x))


@triton.jit
def _loss(z, t, number, LOSS: tl.constexpr):
    """Compute the loss of z for a target t, and its first two derivatives in z; `number` as in the contract."""
    if LOSS == 0:
        e = z - t
        return 0.5 * e * e, e, tl.full(z.shape, 1.0, z.dtype)
    elif LOSS == 1:
        e = tl.exp(-tl.abs(z))
        q = e / (1.0 + e)  # of the less likely label
        positive = z > 0
        # The difference of the two large terms is taken where it is exact.
        slope = tl.where(positive, (1.0 - t) - q, q - t)
        return tl.where(positive, (1.0 - t) * z, -t * z) + _log1p(e), slope, q / (1.0 + e)
    elif LOSS == 2:
        e = tl.exp(z)
        return e - t * z, e - t, e
    elif LOSS == 4:
        down = _times_exp(t, -z)
        return down + z, 1.0 - down, down
    elif LOSS == 5:
        above, below = tl.full((), 2.0 - number, z.dtype), tl.full((), 1.0 - number, z.dtype)
        up, down = tl.exp(above * z), _times_exp(t, below * z)
        return up / above - down / below, up - down, above * up - below * down
    else:
        delta = tl.full((), number, z.dtype)
        e = z - t
        size = tl.abs(e)
        inner = size <= delta
        outer = tl.where(e > 0, delta, tl.where(e < 0, -delta, e))  # NaN stays
        loss = tl.where(inner, 0.5 * e * e, delta * (size - 0.5 * delta))
        return loss, tl.where(inner, e, outer), tl.where(inner, 1.0, tl.where(e != e, e, 0.0)).to(z.dtype)


@triton.jit
def _glm_rows(
    z, row, live, weight, sample_weight, target, delta, OP: tl.constexpr, LOSS: tl.constexpr
):  # fmt: skip
    """Compute what multiplies the rows of X, and each row's part of the value; z (rows,) is X V, zero outside.

    It writes the weights of `glm_value_grad`.
    """
    if OP == 0:
        return z * tl.load(weight + row, mask=live, other=0.0), tl.zeros(z.shape, tl.float64)
    else:
        t = tl.load(target + row, mask=live, other=0.0)
        loss, slope, curvature = _loss(z, t, delta, LOSS)
        if sample_weight is not None:
            s = tl.load(sample_weight + row, mask=live, other=0.0)
            loss, slope, curvature = s * loss, s * slope, s * curvature
        tl.store(weight + row, curvature, mask=live)
        return tl.where(live, slope, 0.0), tl.where(live, loss, 0.0).to(tl.float64)


@triton.jit
def _softmax_rows(z, row, c, live, k, sample_weight, target, probs, OP: tl.constexpr):
    """Do the same for z (rows, classes c); it writes the probabilities of `softmax_value_grad`."""
    inside = live[:, None] & (c < k)[None, :]
    at = row[:, None] * k + c[None, :]
    if sample_weight is None:
        s = tl.where(live, 1.0, 0.0).to(z.dtype)
    else:
        s = tl.load(sample_weight + row, mask=live, other=0.0)
    if OP == 2:
        p = tl.load(probs + at, mask=inside, other=0.0)
        return s[:, None] * p * (z - tl.sum(p * z, axis=1)[:, None]), tl.zeros([z.shape[0]], tl.float64)
    else:
        t = tl.load(target + row, mask=live, other=0)
        known = (t >= 0) & (t < k)
        s = tl.where(known, s, float("nan"))  # no class: the row is NaN, and so are value and gradient
        hot = inside & (c[None, :] == t[:, None])
        largest = tl.max(tl.where(inside | ~live[:, None], z, -float("inf")), axis=1)
        e = tl.where(inside, tl.exp(z - largest[:, None]), 0.0)
        own = tl.sum(tl.where(hot, e, 0.0), axis=1)
        others = tl.sum(tl.where(hot, 0.0, e), axis=1)
        scale = 1.0 / tl.where(live, own + others, 1.0)
        p = e * scale[:, None]
        tl.store(probs + at, p, mask=inside)
        # p - 1 of the target is minus the sum of the other probabilities, which does not cancel.
        r = s[:, None] * tl.where(hot, -(others * scale)[:, None], p)
        # The sum of exponentials may be 1 and a little: its logarithm in float64, of what it has above 1.
        above = tl.where(live, (own.to(tl.float64) - 1.0) + others.to(tl.float64), 0.0)
        log_sum = tl.where(above <= 1.0, _log1p(tl.minimum(above, 1.0)), tl.log(1.0 + above))
        below = largest - tl.sum(tl.where(hot, z, 0.0), axis=1)
        return r, tl.where(live, s.to(tl.float64) * (log_sum + below.to(tl.float64)), 0.0)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _pass(
    x, x_stride, v, weight, sample_weight, target, z, partial, values, delta: tl.float64,
    first, last, d, k, rows, slabs, groups, carry,
    INTERCEPT: tl.constexpr, OP: tl.constexpr, LOSS: tl.constexpr, DOTS: tl.constexpr, GATHER: tl.constexpr,
    RUN: tl.constexpr, K: tl.constexpr, R: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows first..last of X times V (`DOTS`), transposed times what f makes of that (`GATHER`), or both.

    z (slabs, rows, k) holds X V, and in its first slab f of it, where the two are apart. `INTERCEPT`: V has a row more,
    for a column of ones, which belongs to the first slab.
    """
    program = tl.program_id(0)
    group = program % groups
    slab = program // groups % slabs
    split = (program // (groups * slabs)).to(tl.int64)
    column = slab * D + tl.arange(0, D)
    ok = column < d
    start = first + split * rows
    end = tl.minimum(start + rows, last)
    length = d + 1 if INTERCEPT else d
    sums = partial + (split * k + group * K) * length
    value = tl.zeros([R], tl.float64)
    if DOTS:
        vectors = ()
        for c in tl.static_range(K):
            source = v + column.to(tl.int64) * k + (group * K + c)
            vectors = vectors + (tl.load(source, mask=ok & (group * K + c < k), other=0.0),)
    for run in range(start, end, RUN * R):
        acc = ()
        ones = ()
        for _ in tl.static_range(K):
            acc = acc + (tl.zeros([R, D], C),)
            ones = ones + (tl.zeros([R], C),)
        for base in range(run, tl.minimum(run + RUN * R, end), R):
            row = base + tl.arange(0, R)
            live = row < end
            rows_of_x = x + row[:, None] * x_stride + column[None, :]
            tile = _widened(tl.load(rows_of_x, mask=live[:, None] & ok[None, :], other=0.0), C)
            new_acc = ()
            new_ones = ()
            for c in tl.static_range(K):
                used = live & (group * K + c < k)
                at = (row - first) * k + (group * K + c)
                if DOTS:
                    r = tl.sum(tile * vectors[c][None, :], axis=1)
                    if INTERCEPT:
                        offset = v + _wide(d) * k + (group * K + c)
                        r += tl.load(offset + row * 0, mask=used & (slab == 0), other=0.0)
                if GATHER:
                    if DOTS:
                        r, term = _glm_rows(r, row, live, weight, sample_weight, target, delta, OP, LOSS)
                        value += term
                    else:
                        r = tl.load(z + at, mask=used, other=0.0)
                    new_acc = new_acc + (acc[c] + tile * r[:, None],)
                    new_ones = new_ones + (ones[c] + r,)
                else:
                    tl.store(z + slab.to(tl.int64) * (last - first) * k + at, r, mask=used)
            if GATHER:
                acc = new_acc
                ones = new_ones
        if GATHER:
            again = (run > start) | (carry != 0)
            for c in tl.static_range(K):
                place = sums + _wide(c) * length + column
                mask = ok & (group * K + c < k)
                before = tl.load(place, mask=mask & again, other=0.0)
                tl.store(place, before + tl.sum(acc[c], axis=0).to(tl.float64), mask=mask)
                if INTERCEPT:
                    if (slab == 0) & (group * K + c < k):
                        last_place = sums + _wide(c) * length + d
                        last_before = tl.load(last_place, mask=again, other=0.0)
                        tl.store(last_place, last_before + tl.sum(ones[c], axis=0).to(tl.float64))
            tl.debug_barrier()  # the next run reads it back
    if DOTS and GATHER and values is not None:
        tl.store(values + split, tl.sum(value, axis=0))


@triton.jit
def _between(
    weight, sample_weight, target, probs, z, values, delta: tl.float64, first, last, k, slabs,
    OP: tl.constexpr, LOSS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """X V from its slabs, replaced by what multiplies the rows of X."""
    program = tl.program_id(0).to(tl.int64)
    row = first + program * R + tl.arange(0, R)
    live = row < last
    c = tl.arange(0, K)
    inside = live[:, None] & (c < k)[None, :]
    at = z + (row - first)[:, None] * k + c[None, :]
    r = tl.zeros([R, K], C)
    for slab in range(slabs):
        r += tl.load(at + _wide(slab) * (last - first) * k, mask=inside, other=0.0)
    value = tl.zeros([R], tl.float64)
    if OP == 0:
        r *= tl.load(weight + row, mask=live, other=0.0)[:, None]
    elif OP == 1:
        slope, value = _glm_rows(tl.sum(r, axis=1), row, live, weight, sample_weight, target, delta, OP, LOSS)
        r = tl.zeros([R, K], C) + slope[:, None]
    else:
        r, value = _softmax_rows(r, row, c, live, k, sample_weight, target, probs, OP)
    tl.debug_barrier()  # the first slab has been read
    tl.store(at, r, mask=inside)
    if values is not None:
        tl.store(values + program, tl.sum(value, axis=0))


@triton.jit
def _finish(
    partial, values, v, l2: tl.float64, out, value, splits, parts, length, k, d, regular,
    PARTS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the sums of all programs and the penalty; the first program adds the value, `regular` entries of v in it."""
    size = _wide(length) * k
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    acc = tl.zeros([PARTS, ENTRIES], tl.float64)
    for first in range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < splits)[:, None] & (entry < size)[None, :]
        acc += tl.load(partial + part.to(tl.int64)[:, None] * size + entry[None, :], mask=mask, other=0.0)
    row = entry % length
    at = row * k + entry // length
    penalty = l2 * tl.load(v + at, mask=(entry < size) & (row < d) & (l2 != 0.0), other=0.0).to(tl.float64)
    total = tl.sum(acc, axis=0) + penalty
    tl.store(out + at, total.to(out.dtype.element_ty), mask=entry < size)
    if value is not None:
        if tl.program_id(0) == 0:
            terms = tl.zeros([BLOCK], tl.float64)
            for first in range(0, regular, BLOCK):
                i = first + tl.arange(0, BLOCK)
                x = tl.load(v + i, mask=i < regular, other=0.0).to(tl.float64)
                terms += x * x
            terms *= 0.5 * l2
            for first in range(0, parts, BLOCK):
                i = first + tl.arange(0, BLOCK)
                terms += tl.load(values + i, mask=i < parts, other=0.0)
            tl.store(value, tl.sum(terms, axis=0))


@triton.jit
def _entries(logits, u, i, vocabulary, POLICY: tl.constexpr, C: tl.constexpr):
    x = tl.load(logits + i, mask=i < vocabulary, other=-float("inf"), eviction_policy=POLICY)
    y = tl.load(u + i, mask=i < vocabulary, other=0.0, eviction_policy=POLICY)
    return _widened(x, C), _widened(y, C)


@triton.jit
def _cross_entropy(
    logits, logits_stride, u, u_stride, lse, out, vocabulary,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One row of p (u - p.u). `WHOLE`: BLOCK entries hold it, and nothing is read twice."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    u += row * u_stride
    out += row * vocabulary
    lane = tl.arange(0, BLOCK)
    shift = tl.full((), 0.0, C)
    scale = tl.full((), 1.0, C)
    if lse is not None:
        shift = tl.load(lse + row)
    if WHOLE:
        x, y = _entries(logits, u, lane, vocabulary, "evict_first", C)
        if lse is None:
            shift = tl.max(x, axis=0)
            scale = 1.0 / tl.sum(tl.exp(x - shift), axis=0)
        p = tl.exp(x - shift) * scale
        _store(out + lane, p * (y - tl.sum(p * y, axis=0)), lane < vocabulary)
    else:
        blocks = tl.cdiv(vocabulary, BLOCK)
        largest = tl.full([BLOCK], -float("inf"), C)
        total = tl.zeros([BLOCK], C)
        dot = tl.zeros([BLOCK], C)
        for block in range(blocks):
            x, y = _entries(logits, u, block * BLOCK + lane, vocabulary, "evict_last", C)
            if lse is None:  # a lane's sums are relative to its largest logit so far
                new = tl.maximum(largest, x)
                finite = tl.where(new > -float("inf"), new, 0.0)
                e, rescale = tl.exp(x - finite), tl.exp(largest - finite)
                total = total * rescale + e
                dot = dot * rescale + e * y
                largest = new
            else:
                dot += tl.exp(x - shift) * y
        if lse is None:
            shift = tl.max(largest, axis=0)
            rescale = tl.exp(largest - shift)
            scale = 1.0 / tl.sum(total * rescale, axis=0)
            dot *= rescale
        mean = tl.sum(dot, axis=0) * scale
        # Backwards: what was read last is the likeliest to be in the cache.
        for block in range(blocks):
            i = (blocks - 1 - block) * BLOCK + lane
            x, y = _entries(logits, u, i, vocabulary, "evict_first", C)
            _store(out + i, tl.exp(x - shift) * scale * (y - mean), i < vocabulary)


@triton.jit
def _multiply(
    acc, a, a_row, a_column, b, b_row, b_column, i, j, m, n, first, last,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`acc` plus terms first..last of a tile of a @ b; each step is added to the sum as a whole."""
    for base in range(first, last, BK):
        t = base + tl.arange(0, BK)
        left = tl.load(
            a + i[:, None] * a_row + t.to(tl.int64)[None, :] * a_column,
            mask=(i < m)[:, None] & (t < last)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + t.to(tl.int64)[:, None] * b_row + j[None, :] * b_column,
            mask=(t < last)[:, None] & (j < n)[None, :],
            other=0.0,
        )
        acc += tl.dot(left, right, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _epilogue(x, i, j, n, mask, bias, scale, p, q):
    """Scale * (x + bias) + p * q for entries (i, j)."""
    at = i[:, None] * n + j[None, :]
    if bias is not None:
        x += tl.load(bias + j, mask=j < n, other=0.0)[None, :]
    if scale is not None:
        x *= tl.load(scale + at, mask=mask, other=0.0)
    if p is not None:
        x += tl.load(p + at, mask=mask, other=0.0) * tl.load(q + at, mask=mask, other=0.0)
    return x


@triton.jit
def _product(
    a, a_row, a_column, b, b_row, b_column, c, c_row, c_column, e, e_row, e_column,
    bias, scale, p, q, out, m, n, k1, k2, tiles_n, each1, each2,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write a tile of scale * (a @ b + c @ e + bias) + p * q; `SPLIT`: the sums of some terms, to `out[part]`."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    i = (tile // tiles_n).to(tl.int64) * BM + tl.arange(0, BM)
    j = (tile % tiles_n).to(tl.int64) * BN + tl.arange(0, BN)
    mask = (i < m)[:, None] & (j < n)[None, :]
    acc = tl.zeros([BM, BN], C)
    acc = _multiply(
        acc, a, a_row, a_column, b, b_row, b_column, i, j, m, n, part * each1, tl.minimum((part + 1) * each1, k1),
        BM, BN, BK,
    )  # fmt: skip
    if c is not None:
        acc = _multiply(
            acc, c, c_row, c_column, e, e_row, e_column, i, j, m, n, part * each2, tl.minimum((part + 1) * each2, k2),
            BM, BN, BK,
        )  # fmt: skip
    if SPLIT:
        out += part.to(tl.int64) * m * n
    else:
        acc = _epilogue(acc, i, j, n, mask, bias, scale, p, q)
    tl.store(out + i[:, None] * n + j[None, :], acc, mask=mask)


@triton.jit
def _product_finish(
    partial, bias, scale, p, q, out, m, n, tiles_n, parts,
    BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add the parts of a product in their order, in float64, and do the rest of the formula."""
    tile = tl.program_id(0)
    i = (tile // tiles_n).to(tl.int64) * BM + tl.arange(0, BM)
    j = (tile % tiles_n).to(tl.int64) * BN + tl.arange(0, BN)
    mask = (i < m)[:, None] & (j < n)[None, :]
    at = i[:, None] * n + j[None, :]
    total = tl.zeros([BM, BN], tl.float64)
    for part in range(parts):
        total += tl.load(partial + _wide(part) * m * n + at, mask=mask, other=0.0).to(tl.float64)
    tl.store(out + at, _epilogue(total.to(C), i, j, n, mask, bias, scale, p, q), mask=mask)


@triton.jit
def _square(tiles, B: tl.constexpr):
    """Find the rows and columns of a tile of the lower triangle, which has `tiles` along its side.

    A line of tiles and the one as far from the other end are tiles + 1 together.
    """
    line = tl.program_id(0) // (tiles + 1)
    place = tl.program_id(0) % (tiles + 1)
    row = tl.where(place <= line, line, tiles - 1 - line)
    column = tl.where(place <= line, place, place - line - 1)
    return row.to(tl.int64) * B + tl.arange(0, B), column.to(tl.int64) * B + tl.arange(0, B)


@triton.jit
def _store_both(x, out, i, j, n, ACCUMULATE: tl.constexpr):
    """Write entries (i, j), i >= j, and their mirror images; what they may be added to is read here alone."""
    lower = (i < n)[:, None] & (j[None, :] <= i[:, None])
    at = out + i[:, None] * n + j[None, :]
    if ACCUMULATE:
        x += tl.load(at, mask=lower, other=0.0)
    tl.store(at, x, mask=lower)
    tl.store(out + j[None, :] * n + i[:, None], x, mask=lower)


@triton.jit
def _gram(
    x, x_row, x_column, y, y_row, y_column, out, m, n, tiles, each,
    ACCUMULATE: tl.constexpr, SPLIT: tl.constexpr, RUN: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Write a tile of the lower triangle of X^T Y, y = weight * x, and its mirror image; `SPLIT`: to `out[part]`."""
    part = tl.program_id(1)
    i, j = _square(tiles, B)
    first = part * each
    last = tl.minimum(first + each, m)
    total = tl.zeros([B, B], C)
    for run in range(first, last, RUN):
        acc = tl.zeros([B, B], C)
        stop = tl.minimum(run + RUN, last)
        for base in range(run, stop, BK):
            k = (base + tl.arange(0, BK)).to(tl.int64)
            inside = k < stop
            left = tl.load(
                x + i[:, None] * x_column + k[None, :] * x_row, mask=(i < n)[:, None] & inside[None, :], other=0.0
            )
            right = tl.load(
                y + k[:, None] * y_row + j[None, :] * y_column, mask=inside[:, None] & (j < n)[None, :], other=0.0
            )
            acc += tl.dot(left, right, input_precision="ieee", out_dtype=C)
        total += acc
    if SPLIT:
        lower = (i < n)[:, None] & (j[None, :] <= i[:, None])
        tl.store(out + (part.to(tl.int64) * n + i[:, None]) * n + j[None, :], total, mask=lower)
    else:
        _store_both(total, out, i, j, n, ACCUMULATE)


@triton.jit
def _gram_finish(partial, out, n, tiles, parts, ACCUMULATE: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Add the parts of a Gram matrix in their order, in float64."""
    i, j = _square(tiles, B)
    lower = (i < n)[:, None] & (j[None, :] <= i[:, None])
    total = tl.zeros([B, B], tl.float64)
    for part in range(parts):
        at = partial + (_wide(part) * n + i[:, None]) * n + j[None, :]
        total += tl.load(at, mask=lower, other=0.0).to(tl.float64)
    _store_both(total.to(C), out, i, j, n, ACCUMULATE)


# ----------------------------------------------------------------------------------------------------------- launchers

_INTERPRETED = _triton_support.interpreted(_pass)


class _Plan(NamedTuple):
    """How a function of X is mapped; `chunk`: rows of X whose products with V are in memory at a time."""

    sizes: dict[str, int]  # of the kernel
    tile: int  # rows
    groups: int
    slabs: int
    splits: int
    chunk: int


def _power(x: int) -> int:
    return 1 << (x - 1).bit_length()


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _processors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else _multiprocessors(device.index or 0)


def _sizes(d: int, k: int, size: int) -> tuple[int, dict[str, int]]:
    """(slabs, sizes) of `_pass`; `size`: bytes of a number in its arithmetic."""
    elements, tile = _ELEMENTS * 4 // size, (_TILE if k == 1 else 2 * _TILE) * 4 // size
    wide, most = max(16, _power(d)), min(_power(k), _VECTORS)
    vectors = max(1, min(most, elements // wide))
    if wide > elements or vectors * 2 < most:  # more than two groups read no less than two passes
        wide, vectors = min(wide, _SLAB), most
    rows = max(1, min(_TILE_ROWS, tile // (vectors * wide)))
    warps = min(16, max(4, vectors * rows * wide * size // 2048 // (1 if vectors == 1 else 2)))
    return -(-d // wide), {"K": vectors, "R": rows, "D": wide, "num_warps": warps}


@functools.cache
def _plan(n: int, d: int, length: int, k: int, coupled: bool, size: int, processors: int) -> _Plan:
    """Plan a function of X (n, d) and V (length, k)."""
    slabs, sizes = _sizes(d, k, size)
    groups, tile = -(-k // sizes["K"]), sizes["R"]
    chunk = min(n, max(tile, _WORKSPACE // (slabs * k * size))) if slabs > 1 or coupled else n
    splits = max(1, min(
        _PROGRAMS_PER_SM * processors // (slabs * groups),
        -(-chunk // (_FEWEST_TILES * tile)),
        _WORKSPACE // (8 * k * length),
    ))  # fmt: skip
    return _Plan(sizes, tile, groups, slabs, -(-chunk // _each(chunk, splits, tile)), chunk)


def _each(n: int, splits: int, tile: int) -> int:
    """Rows of a split: whole tiles."""
    return -(-n // (splits * tile)) * tile


def _function_of_x(
    op: int,
    x: Tensor,
    v: Tensor,
    l2: float,
    out: Tensor,
    *,
    loss: str = "squared",
    delta: float = 1.0,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    target: Tensor | None = None,
    probs: Tensor | None = None,
    value: Tensor | None = None,
) -> None:
    n, d = x.shape
    length, k = v.shape if v.dim() == 2 else (len(v), 1)
    coupled = op >= _SOFTMAX_HVP
    plan = _plan(n, d, length, k, coupled, v.element_size(), _processors(x.device))
    slabs, groups = plan.slabs, plan.groups
    apart = slabs > 1 or coupled
    between = max(1, _BETWEEN // _power(k))
    each_value = -(-plan.chunk // between) if apart else plan.splits
    doubles = functools.partial(torch.empty, dtype=torch.float64, device=x.device)
    partial = doubles(plan.splits * k * length)
    values = None if value is None else doubles(-(-n // plan.chunk) * each_value)
    parts = 0
    z = v.new_empty(slabs * plan.chunk * k) if apart else None
    modes = {"OP": op, "LOSS": LOSSES.index(loss), "C": tl.float64 if v.dtype == torch.float64 else tl.float32}
    tile = {"INTERCEPT": length > d, "RUN": _RUN, **plan.sizes}
    with _triton_support.on(x.device):
        for first in range(0, n, plan.chunk):
            last = min(n, first + plan.chunk)
            each = _each(last - first, plan.splits, plan.tile)
            here = None if values is None else values[parts:]
            parts += -(-(last - first) // (between if apart else each))
            grid = (-(-(last - first) // each) * slabs * groups,)
            args = (x, x.stride(0), v, weight, sample_weight, target, z, partial)
            shape = (delta, first, last, d, k, each, slabs, groups, int(first > 0))
            if not apart:
                _pass[grid](*args, here, *shape, DOTS=True, GATHER=True, **modes, **tile)
                continue
            _pass[grid](*args, None, *shape, DOTS=True, GATHER=False, **modes, **tile)
            _between[(-(-(last - first) // between),)](
                weight, sample_weight, target, probs, z, here, delta, first, last, k, slabs,
                K=_power(k), R=between, num_warps=4, **modes,
            )  # fmt: skip
            _pass[grid](*args, None, *shape, DOTS=False, GATHER=True, **modes, **tile)
        _finish[(-(-length * k // _FINISH_ENTRIES),)](
            partial, values, v, l2, out, value, plan.splits, parts, length, k, d, d * k if l2 else 0,
            PARTS=_FINISH_PARTS, ENTRIES=_FINISH_ENTRIES, BLOCK=_VALUE_ENTRIES, num_warps=4,
        )  # fmt: skip


def glm_hvp(x: Tensor, v: Tensor, weight: Tensor, l2: float, out: Tensor) -> None:
    """out = X^T (weight * (X v)) + l2 v; see `reference.py`."""
    _function_of_x(_GLM_HVP, x, v, l2, out, weight=weight)


def glm_value_grad(
    x: Tensor, target: Tensor, coef: Tensor, loss: str, delta: float, sample_weight: Tensor | None, l2: float,
    value: Tensor, grad: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    """Value, gradient and second derivatives of a sum of losses of X coef; see `reference.py`."""
    _function_of_x(
        _GLM_VALUE_GRAD, x, coef, l2, grad, loss=loss, delta=delta, weight=weight, sample_weight=sample_weight,
        target=target, value=value,
    )  # fmt: skip


def softmax_hvp(x: Tensor, v: Tensor, probs: Tensor, sample_weight: Tensor | None, l2: float, out: Tensor) -> None:
    """out = X^T R + l2 V with the multinomial R of X V; see `reference.py`."""
    _function_of_x(_SOFTMAX_HVP, x, v, l2, out, probs=probs, sample_weight=sample_weight)


def softmax_value_grad(
    x: Tensor, target: Tensor, coef: Tensor, sample_weight: Tensor | None, l2: float, value: Tensor, grad: Tensor,
    probs: Tensor,
) -> None:  # fmt: skip
    """Value, gradient and probabilities of the multinomial loss; see `reference.py`."""
    _function_of_x(
        _SOFTMAX_VALUE_GRAD, x, coef, l2, grad, target=target, sample_weight=sample_weight, probs=probs, value=value
    )


def cross_entropy_hvp(logits: Tensor, u: Tensor, lse: Tensor | None, out: Tensor) -> None:
    """out = p * (u - p.u), row by row; see `reference.py`."""
    rows, vocabulary = logits.shape
    wide = logits.dtype == torch.float64
    whole = vocabulary <= (_ROW // 2 if wide else _ROW)
    block = max(32, _power(vocabulary)) if whole else _ROW_BLOCK // (2 if wide else 1)
    warps = min(16, max(1, block // 512)) if whole else 32
    with _triton_support.on(logits.device):
        _cross_entropy[(rows,)](
            logits, logits.stride(0), u, u.stride(0), lse, out, vocabulary,
            WHOLE=whole, BLOCK=block, C=tl.float64 if wide else tl.float32, num_warps=warps,
        )  # fmt: skip


def paired_matmul(
    a: Tensor, b: Tensor, c: Tensor | None, e: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    p: Tensor | None, q: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """out = scale * (a @ b + c @ e + bias) + p * q; see `reference.py`."""
    m, n = out.shape
    k1, k2 = a.shape[1], 0 if c is None else c.shape[1]
    wide = out.dtype == torch.float64
    side = _PRODUCT_SIDE // 2 if wide else _PRODUCT_SIDE
    tiles_n = -(-n // side)
    tiles = -(-m // side) * tiles_n
    parts = max(1, min(
        2 * _processors(out.device) // tiles, max(k1, k2) // _PRODUCT_TERMS, _WORKSPACE // out.nbytes
    ))  # fmt: skip
    each1, each2 = (-(-k // (parts * _PRODUCT_K)) * _PRODUCT_K for k in (k1, k2))
    operands: list[Any] = []
    for t in (a, b, c, e):
        operands += (None, 0, 0) if t is None else (t, t.stride(0), t.stride(1))
    target = out if parts == 1 else out.new_empty(parts * m * n)
    sizes = {"BM": side, "BN": side, "C": tl.float64 if wide else tl.float32}
    last = (bias, scale, p, q)
    with _triton_support.on(out.device):
        _product[(tiles, parts)](
            *operands, *last, target, m, n, k1, k2, tiles_n, each1, each2,
            SPLIT=parts > 1, BK=_PRODUCT_K, num_warps=4, **sizes,
        )  # fmt: skip
        if parts > 1:
            _product_finish[(tiles,)](target, *last, out, m, n, tiles_n, parts, num_warps=4, **sizes)


def gram(x: Tensor, weight: Tensor | None, accumulate: bool, out: Tensor) -> None:
    """out = X^T diag(weight) X, one triangle mirrored; see `reference.py`."""
    m, n = x.shape
    y = x if weight is None else x * weight[:, None]  # the kernel would have no registers for that
    wide = out.dtype == torch.float64
    side = _PRODUCT_SIDE // 2 if wide else _PRODUCT_SIDE
    lines = -(-n // side)
    tiles = lines * (lines + 1) // 2
    parts = max(1, min(2 * _processors(out.device) // tiles, m // _PRODUCT_TERMS, _WORKSPACE // out.nbytes))
    each = -(-m // (parts * _GRAM_K)) * _GRAM_K
    target = out if parts == 1 else out.new_empty(parts * n * n)
    sizes = {"ACCUMULATE": accumulate, "B": side, "C": tl.float64 if wide else tl.float32}
    warps = 8  # with 4 a tile of float64 spills
    with _triton_support.on(out.device):
        _gram[(tiles, parts)](
            x, *x.stride(), y, *y.stride(), target, m, n, lines, each,
            SPLIT=parts > 1, RUN=_GRAM_RUN, BK=_GRAM_K, num_warps=warps, **sizes,
        )  # fmt: skip
        if parts > 1:
            _gram_finish[(tiles,)](target, out, n, lines, parts, num_warps=warps, **sizes)
