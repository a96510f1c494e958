"""Triton kernels of the small blocks and their launchers; the contract is in `reference.py`.

Two schemes, told apart by n alone:

* n up to `_LANES_*`: a matrix is a lane. Blocks are read as a tile (matrices, entries), and `tl.split` takes the tile
  apart into one vector per entry, which the compiler does with one pass through shared memory; after that every step
  of the elimination is written out, without an exchange between threads.
* above: a matrix is a tile (P, P), P the next power of two, several to a program while they are small. Tiles have no
  indices: a row or a column is taken out by a masked sum, in which one entry is not zero, so that it is exact.

A positive definite matrix is inverted by the sweep operator, which is LDL^T followed by L^-T D^-1 L^-1, with their
rounding errors. A general one is inverted in lanes by Gauss-Jordan in place, which loses accuracy where L is worse
conditioned than it can be at that size (Higham, section 14.4), in tiles by LU and substitution. Rows of a tile stay
where they are: pivots are searched in the rows that are left, and the last store applies the permutation. Solves are
LU or LDL^T. Eigenvalues: two-sided Jacobi, row by row in lanes, by rounds of a tournament in tiles.
"""

# ruff: noqa: RUF005 (there is no unpacking in a kernel)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from secant.kernels import _triton_support
from secant.kernels._triton_support import load as _load
from secant.kernels._triton_support import store as _store
from torch import Tensor

#: Largest n whose matrices are lanes.
_LANES_INV, _LANES_SOLVE, _LANES_EIGH = 6, 4, 4
#: Entries of the matrices of one program: with lanes, with tiles, with tiles for eigenvalues; at least one matrix.
_LANES_ENTRIES, _TILE_ENTRIES, _EIGH_ENTRIES = 4096, 1024, 512
#: Entries of a tile that a thread holds, half as many of float64.
_PER_THREAD, _EIGH_PER_THREAD = 32, 16
#: Columns of the right-hand side that a lane holds at a time.
_LANES_COLUMNS = 4
#: Cap on the sweeps of Jacobi; 6 to 10 are usual.
_SWEEPS = 30

_NO_DAMPING, _ADDED, _SCALED, _RELATIVE = 0, 1, 2, 3
_EIGH, _ABS_INV, _INV_ROOT = 0, 1, 2


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return _triton_support.available(_INTERPRETED)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when blocks of this device and dtype are supported, else the reason why they are not."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"blocks are float32, float64, bfloat16 or float16, not {dtype}"
    return _triton_support.supports(device, _INTERPRETED)


# --------------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _per_block(value, ptr, m, mask, C: tl.constexpr):
    """Read a number, or an entry of a tensor, for each of the blocks m."""
    if ptr is None:
        return tl.full(m.shape, value, tl.float64).to(C)
    else:
        return tl.load(ptr + m, mask=mask, other=1)


@triton.jit
def _damped(diagonal, damping, DAMPING: tl.constexpr):
    if DAMPING == 1:
        return diagonal + damping
    elif DAMPING == 2:
        return diagonal * (1.0 + damping)
    else:
        return diagonal


@triton.jit
def _inverse(x):
    """1 / x to nearest; float32 division is an approximation unless asked."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _root(x):
    """Compute the square root to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _magnitude(x):
    """|x| as an integer of the same order, in which NaN is the largest."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _exponent(magnitude):
    """floor(log2 |x|) of a normal x; the least, or one more than the largest, for what is smaller or not finite."""
    if magnitude.dtype == tl.int64:
        return (magnitude >> 52).to(tl.int32) - 1023
    else:
        return (magnitude >> 23) - 127


@triton.jit
def _power(e, C: tl.constexpr):
    """2^e from its bits."""
    if C.primitive_bitwidth == 64:
        return ((e + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    else:
        return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _diagonal_scale(d, C: tl.constexpr):
    """Return a power of two near 1 / sqrt(d), 1 where d is not positive and finite; products of two are normal."""
    LIMIT: tl.constexpr = 511 if C.primitive_bitwidth == 64 else 63
    e = tl.minimum(tl.maximum(-(_exponent(_magnitude(d)) >> 1), -LIMIT), LIMIT)
    return tl.where((d > 0) & _finite(d), _power(e, C), 1.0)


@triton.jit
def _shift(magnitude, STEP: tl.constexpr, C: tl.constexpr):
    """Find a multiple e of STEP such that 2^e brings the largest magnitude near 1 and 2^-e exists; 0 if not finite."""
    LAST: tl.constexpr = 1023 if C.primitive_bitwidth == 64 else 127
    LIMIT: tl.constexpr = (LAST - 1) // STEP * STEP
    e = _exponent(magnitude)
    return tl.where(e > LAST, 0, tl.minimum(tl.maximum(-e & -STEP, -LIMIT), LIMIT))


@triton.jit
def _above(low, high, off, C: tl.constexpr):
    """Tell whether `off` is above the tolerance.

    It is relative to the two diagonal entries, which keeps small eigenvalues of graded matrices, and stops at eps^2 of
    the largest entry.
    """
    EPS2: tl.constexpr = 2.0**-104 if C.primitive_bitwidth == 64 else 2.0**-46
    return (tl.abs(off) > EPS2) & (off * off > EPS2 * tl.abs(low * high))


@triton.jit
def _rotation(low, high, off, first, C: tl.constexpr):
    """Tell whether to rotate the pair, and tangent and cosine of the angle that annihilates `off`.

    `first` tells which of the two takes which sign when both diagonal entries are equal.
    """
    live = _above(low, high, off, C)
    ratio = (high - low) / tl.where(live, 2 * off, 1.0)
    tangent = 1.0 / (tl.abs(ratio) + tl.sqrt(1.0 + ratio * ratio))
    tangent = tl.where((ratio > 0) | ((ratio == 0) & first), tangent, -tangent)
    tangent = tl.where(live, tangent, 0.0)
    return live, tangent, _inverse(_root(1.0 + tangent * tangent))


@triton.jit
def _inverse_root(w, shift, P: tl.constexpr, C: tl.constexpr):
    if P == 1:
        return _inverse(w) * _power(shift, C)
    elif P == 2:
        return _inverse(_root(w)) * _power(shift >> 1, C)
    else:
        return _inverse(_root(_root(w))) * _power(shift >> 2, C)


@triton.jit
def _function(w, floor, shift, KIND: tl.constexpr, P: tl.constexpr, DAMPING: tl.constexpr, C: tl.constexpr):
    """f of the eigenvalues of A from those of 2^shift A; `floor` is added to clamped ones (DAMPING = 3)."""
    if KIND == 1:
        scale = _power(shift, C)
        w = tl.abs(w)
        return tl.where(w > floor * scale, _inverse(w) * scale, _inverse(floor))
    elif DAMPING == 3:
        w = tl.maximum(w, 0.0) + floor
        return tl.where(w == 0.0, 0.0, _inverse_root(tl.where(w == 0.0, 1.0, w), shift, P, C))
    else:
        return _inverse_root(w, shift, P, C)


@triton.jit
def _counted(w, DAMPING: tl.constexpr):
    """Tell whether `inv_root` counts this eigenvalue."""
    if DAMPING == 3:
        return w < 0
    else:
        return w <= 0


@triton.jit
def _root_code(code, below, DAMPING: tl.constexpr):
    """(the code of a root, with which it has a result it is 0)."""
    code_of_root = tl.where(code == 0, below, code)
    if DAMPING == 3:
        code_of_root = tl.where(code > 0, -3, code_of_root)
        return code_of_root, tl.minimum(code_of_root, 0)
    else:
        return code_of_root, code_of_root


# ---------------------------------------------------------------------------------------------------- matrices as lanes


@triton.jit
def _unpack(x, LEVELS: tl.constexpr):
    """Return the columns of a tile (BLOCK, 2^LEVELS) as a tuple of vectors."""
    parts = (x,)
    if LEVELS == 0:
        parts = (tl.reshape(x, [x.shape[0]]),)
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(1 << level):
            part = parts[i]
            if level < LEVELS - 1:
                part = tl.permute(tl.reshape(part, [x.shape[0], 2, 1 << (LEVELS - 1 - level)]), (0, 2, 1))
            low, high = tl.split(part)
            halves = halves + (low, high)
        parts = halves
    return parts


@triton.jit
def _pack(parts, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """Make the tile (BLOCK, 2^LEVELS) of COUNT columns, and zeros behind them."""
    for _ in tl.static_range((1 << LEVELS) - COUNT):
        parts = parts + (tl.zeros_like(parts[0]),)
    if LEVELS == 0:
        parts = (tl.expand_dims(parts[0], 1),)
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(1 << (LEVELS - 1 - level)):
            both = tl.join(parts[2 * i], parts[2 * i + 1])
            if level > 0:
                both = tl.reshape(tl.permute(both, (0, 2, 1)), [both.shape[0], 2 << level])
            joined = joined + (both,)
        parts = joined
    return parts[0]


@triton.jit
def _put(x, I: tl.constexpr, value):
    """Replace entry I of the tuple x."""
    return x[:I] + (value,) + x[I + 1 :]


@triton.jit
def _read_lanes(
    a, stride, damping, damping_ptr, m, live,
    DAMPING: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Read the entries of the damped blocks m, row by row."""
    entry = tl.arange(0, 1 << LEVELS)
    x = _unpack(_load(a + m[:, None] * stride + entry[None, :], live[:, None] & (entry < N * N)[None, :], C), LEVELS)
    if DAMPING != 0 and DAMPING != 3:
        shift = _per_block(damping, damping_ptr, m, live, C)
        for i in tl.static_range(N):
            x = _put(x, i * (N + 1), _damped(x[i * (N + 1)], shift, DAMPING))
    return x


@triton.jit
def _write_lanes(out, x, code, m, live, N: tl.constexpr, LEVELS: tl.constexpr):
    """Store the entries x of the blocks m row by row, NaN where the code says that there is no result."""
    good = ()
    for i in tl.static_range(N * N):
        good = good + (tl.where(code == 0, x[i], float("nan")),)
    entry = tl.arange(0, 1 << LEVELS)
    tile = _pack(good, N * N, LEVELS)
    tl.debug_barrier()  # out may be a, which everyone has read
    _store(out + m[:, None] * (N * N) + entry[None, :], tile, live[:, None] & (entry < N * N)[None, :])


@triton.jit
def _lower(x, i: tl.constexpr, j: tl.constexpr, N: tl.constexpr):
    """Entry (i, j) of a symmetric matrix from its lower triangle."""
    if i >= j:
        return x[i * N + j]
    else:
        return x[j * N + i]


@triton.jit
def _put_lower(x, i: tl.constexpr, j: tl.constexpr, N: tl.constexpr, value):
    """Replace entry (i, j) of the symmetric matrix in its lower triangle."""
    if i >= j:
        return _put(x, i * N + j, value)
    else:
        return _put(x, j * N + i, value)


@triton.jit
def _mirrored(x, N: tl.constexpr):
    y = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            y = y + (_lower(x, i, j, N),)
    return y


@triton.jit
def _note(code, pivot, step, POSITIVE: tl.constexpr):
    """Note this step in the code when its pivot is the first bad one."""
    if POSITIVE:
        good = (pivot > 0) & _finite(pivot)
    else:
        good = (pivot != 0) & _finite(pivot)
    return tl.where((code == 0) & ~good, step + 1, code)


@triton.jit
def _equilibrated(x, N: tl.constexpr, C: tl.constexpr):
    """S A S (its lower triangle) and the powers of two in S."""
    scale = ()
    for i in tl.static_range(N):
        scale = scale + (_diagonal_scale(x[i * (N + 1)], C),)
    y = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            y = y + (x[i * N + j] * (scale[i] * scale[j]),)
    return y, scale


@triton.jit
def _normalised(x, N: tl.constexpr, C: tl.constexpr):
    """2^e A and 2^e."""
    largest = _magnitude(x[0])
    for i in tl.static_range(1, N * N):
        largest = tl.maximum(largest, _magnitude(x[i]))
    scale = _power(_shift(largest, 1, C), C)
    y = ()
    for i in tl.static_range(N * N):
        y = y + (x[i] * scale,)
    return y, scale


@triton.jit
def _pivot_row(x, k: tl.constexpr, N: tl.constexpr):
    """Find the first row from k on with the largest entry in column k."""
    largest = _magnitude(x[k * N + k])
    chosen = tl.full(largest.shape, k, tl.int32)
    for i in tl.static_range(k + 1, N):
        candidate = _magnitude(x[i * N + k])
        chosen = tl.where(candidate > largest, i, chosen)
        largest = tl.maximum(candidate, largest)
    return chosen


@triton.jit
def _exchanged(x, chosen, k: tl.constexpr, N: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, K: tl.constexpr):
    """x with lines k and `chosen` >= k of N swapped; entry j of K in line i is x[i ROW + j COLUMN]."""
    for j in tl.static_range(K):
        old = x[k * ROW + j * COLUMN]
        new = old
        for i in tl.static_range(k + 1, N):
            here = chosen == i
            entry = x[i * ROW + j * COLUMN]
            new = tl.where(here, entry, new)
            x = _put(x, i * ROW + j * COLUMN, tl.where(here, old, entry))
        x = _put(x, k * ROW + j * COLUMN, new)
    return x


@triton.jit
def _sweep_lanes(x, code, N: tl.constexpr):
    """(A^-1, code) of positive definite matrices, lower triangles."""
    for k in tl.static_range(N):
        pivot = x[k * (N + 1)]
        code = _note(code, pivot, k, True)
        inverse = _inverse(pivot)
        y = ()
        for i in tl.static_range(N):
            factor = inverse
            if i != k:
                factor = _lower(x, i, k, N) * inverse
            for j in tl.static_range(N):
                if j > i:
                    y = y + (x[i * N + j],)
                elif i == k and j == k:
                    y = y + (-inverse,)
                elif j == k:
                    y = y + (factor,)
                elif i == k:
                    y = y + (x[k * N + j] * inverse,)
                else:
                    y = y + (x[i * N + j] - factor * _lower(x, j, k, N),)
        x = y
    y = ()
    for i in tl.static_range(N * N):
        y = y + (-x[i],)
    return y, code


@triton.jit
def _gauss_jordan_lanes(x, code, N: tl.constexpr):
    """(A^-1, code) of general matrices."""
    rows = ()
    for k in tl.static_range(N):
        chosen = _pivot_row(x, k, N)
        rows = rows + (chosen,)
        x = _exchanged(x, chosen, k, N, N, 1, N)
        pivot = x[k * (N + 1)]
        code = _note(code, pivot, k, False)
        inverse = _inverse(pivot)
        top = ()
        for j in tl.static_range(N):
            if j == k:
                top = top + (inverse,)
            else:
                top = top + (x[k * N + j] * inverse,)
        y = ()
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                if i == k:
                    y = y + (top[j],)
                elif j == k:
                    y = y + (-x[i * N + k] * inverse,)
                else:
                    y = y + (x[i * N + j] - x[i * N + k] * top[j],)
        x = y
    for k in tl.static_range(N - 1, -1, -1):
        x = _exchanged(x, rows[k], k, N, 1, N, N)
    return x, code


@triton.jit(do_not_specialize=["batch"])
def _inv_lanes(
    a, stride, damping: tl.float64, damping_ptr, out, info, batch,
    DAMPING: tl.constexpr, SPD: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Inverses of BLOCK matrices by a program."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = m < batch
    x = _read_lanes(a, stride, damping, damping_ptr, m, live, DAMPING, N, LEVELS, C)
    code = tl.zeros([BLOCK], tl.int32)
    y = ()
    if SPD:
        x, scale = _equilibrated(x, N, C)
        x, code = _sweep_lanes(x, code, N)
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                y = y + (_lower(x, i, j, N) * (scale[i] * scale[j]),)
    else:
        x, scale = _normalised(x, N, C)
        x, code = _gauss_jordan_lanes(x, code, N)
        for i in tl.static_range(N * N):
            y = y + (x[i] * scale,)
    tl.store(info + m, code, mask=live)
    _write_lanes(out, y, code, m, live, N, LEVELS)


@triton.jit
def _factor_lanes(x, code, SPD: tl.constexpr, N: tl.constexpr):
    """L D L^T (lower triangle) or P A = L U, with inverses on the diagonal; pivot rows; code."""
    rows = ()
    for k in tl.static_range(N):
        if not SPD:
            chosen = _pivot_row(x, k, N)
            rows = rows + (chosen,)
            x = _exchanged(x, chosen, k, N, N, 1, N)
        pivot = x[k * (N + 1)]
        code = _note(code, pivot, k, SPD)
        inverse = _inverse(pivot)
        y = x
        for i in tl.static_range(k + 1, N):
            factor = x[i * N + k] * inverse
            y = _put(y, i * N + k, factor)
            if SPD:
                for j in tl.static_range(k + 1, i + 1):
                    y = _put(y, i * N + j, x[i * N + j] - factor * x[j * N + k])
            else:
                for j in tl.static_range(k + 1, N):
                    y = _put(y, i * N + j, x[i * N + j] - factor * x[k * N + j])
        x = _put(y, k * (N + 1), inverse)
    return x, rows, code


@triton.jit(do_not_specialize=["batch"])
def _solve_lanes(
    a, stride, b, b_stride, damping: tl.float64, damping_ptr, out, info, batch, k,
    DAMPING: tl.constexpr, SPD: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr, COLUMNS: tl.constexpr,
    SIDE_LEVELS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Solutions for BLOCK matrices by a program, COLUMNS right-hand sides at a time."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = m < batch
    x = _read_lanes(a, stride, damping, damping_ptr, m, live, DAMPING, N, LEVELS, C)
    code = tl.zeros([BLOCK], tl.int32)
    if SPD:
        x, scale = _equilibrated(x, N, C)
    else:
        x, scale = _normalised(x, N, C)
    x, rows, code = _factor_lanes(x, code, SPD, N)
    tl.store(info + m, code, mask=live)
    entry = tl.arange(0, 1 << SIDE_LEVELS)
    row, column = entry // COLUMNS, entry % COLUMNS
    tl.debug_barrier()  # out may be a, which everyone has read
    for first in range(0, k, COLUMNS):
        inside = live[:, None] & ((row < N) & (column + first < k))[None, :]
        at = (row * k + (column + first))[None, :]
        y = _unpack(_load(b + m[:, None] * b_stride + at, inside, C), SIDE_LEVELS)
        if not SPD:
            for i in tl.static_range(N):
                y = _exchanged(y, rows[i], i, N, COLUMNS, 1, COLUMNS)
        z = ()
        for i in tl.static_range(N):
            for j in tl.static_range(COLUMNS):
                value = y[i * COLUMNS + j]
                if SPD:
                    value = value * scale[i]
                for l in tl.static_range(i):
                    value = value - x[i * N + l] * z[l * COLUMNS + j]
                z = z + (value,)
        y = ()  # holds the rows behind i
        for i in tl.static_range(N - 1, -1, -1):
            line = ()
            for j in tl.static_range(COLUMNS):
                value = z[i * COLUMNS + j]
                if SPD:
                    value = value * x[i * (N + 1)]
                    for l in tl.static_range(i + 1, N):
                        value = value - x[l * N + i] * y[(l - i - 1) * COLUMNS + j]
                else:
                    for l in tl.static_range(i + 1, N):
                        value = value - x[i * N + l] * y[(l - i - 1) * COLUMNS + j]
                    value = value * x[i * (N + 1)]
                line = line + (value,)
            y = line + y
        z = ()
        for i in tl.static_range(N):
            for j in tl.static_range(COLUMNS):
                if SPD:
                    value = y[i * COLUMNS + j] * scale[i]
                else:
                    value = y[i * COLUMNS + j] * scale
                z = z + (tl.where(code == 0, value, float("nan")),)
        tile = _pack(z, N * COLUMNS, SIDE_LEVELS)
        tl.debug_barrier()  # out may be b
        _store(out + m[:, None] * (N * k) + at, tile, inside)


@triton.jit
def _jacobi_lanes(x, v, p: tl.constexpr, q: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """Rotate rows and columns p < q. Returns x (lower triangle), v, and where it rotated."""
    off = x[q * N + p]
    low, high = x[p * (N + 1)], x[q * (N + 1)]
    live, tangent, cosine = _rotation(low, high, off, off == off, C)
    sine = tangent * cosine
    x = _put(x, p * (N + 1), low - tangent * off)
    x = _put(x, q * (N + 1), high + tangent * off)
    x = _put(x, q * N + p, tl.where(live, 0.0, off))
    for r in tl.static_range(N):
        if r != p and r != q:
            one, two = _lower(x, r, p, N), _lower(x, r, q, N)
            x = _put_lower(x, r, p, N, cosine * one - sine * two)
            x = _put_lower(x, r, q, N, sine * one + cosine * two)
        one, two = v[r * N + p], v[r * N + q]
        v = _put(v, r * N + p, cosine * one - sine * two)
        v = _put(v, r * N + q, sine * one + cosine * two)
    return x, v, live


@triton.jit(do_not_specialize=["batch"])
def _eigh_lanes(
    a, stride, damping: tl.float64, damping_ptr, floor: tl.float64, floor_ptr, values, out, info, batch,
    KIND: tl.constexpr, ROOT: tl.constexpr, DAMPING: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr, SWEEPS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Eigenvalues and vectors, or a function of the matrix, for BLOCK matrices by a program."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = m < batch
    LAST: tl.constexpr = 1023 if C.primitive_bitwidth == 64 else 127
    x = _mirrored(_read_lanes(a, stride, damping, damping_ptr, m, live, DAMPING, N, LEVELS, C), N)
    largest = _magnitude(x[0])
    for i in tl.static_range(1, N * N):
        largest = tl.maximum(largest, _magnitude(x[i]))
    bad = _exponent(largest) > LAST
    shift = _shift(largest, 4, C)
    scale = _power(shift, C)
    y = ()
    v = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            y = y + (tl.where(bad, 0.0, x[i * N + j] * scale),)
            v = v + (tl.full([BLOCK], 1.0 if i == j else 0.0, C),)
    x = y
    sweep = 0
    busy = tl.full((), 1, tl.int32)
    while busy > 0:
        rotated = tl.zeros([BLOCK], tl.int32)
        for p in tl.static_range(N):
            for q in tl.static_range(p + 1, N):
                x, v, here = _jacobi_lanes(x, v, p, q, N, C)
                rotated += here.to(tl.int32)
        sweep += 1
        busy = tl.where(sweep < SWEEPS, tl.max(rotated, axis=0), 0)
    # A block that waits for its neighbours turns by nothing, which changes at most the sign of a zero: take it away.
    w = ()
    for i in tl.static_range(N):
        w = w + (x[i * (N + 1)] + 0.0,)
    y = ()
    for i in tl.static_range(N * N):
        y = y + (v[i] + 0.0,)
    v = y
    code = tl.zeros([BLOCK], tl.int32)
    for p in tl.static_range(N):
        for q in tl.static_range(p + 1, N):
            code += _above(w[p], w[q], x[q * N + p], C).to(tl.int32)
    code = tl.where(bad, -1, code)
    if KIND == 0:
        for last in tl.static_range(N):
            for i in tl.static_range(N - 1 - last):
                swap = w[i] > w[i + 1]
                pair = (tl.where(swap, w[i + 1], w[i]), tl.where(swap, w[i], w[i + 1]))
                w = w[:i] + pair + w[i + 2 :]
                for r in tl.static_range(N):
                    one, two = v[r * N + i], v[r * N + i + 1]
                    pair = (tl.where(swap, two, one), tl.where(swap, one, two))
                    v = v[: r * N + i] + pair + v[r * N + i + 2 :]
        y = ()
        for i in tl.static_range(N):
            y = y + (tl.where(bad, float("nan"), w[i] * _power(-shift, C)),)
        index = tl.arange(0, 1 << VALUE_LEVELS)
        tile = _pack(y, N, VALUE_LEVELS)
        _store(values + m[:, None] * N + index[None, :], tile, live[:, None] & (index < N)[None, :])
        _write_lanes(out, v, tl.where(bad, -1, 0), m, live, N, LEVELS)
    else:
        level = _per_block(floor, floor_ptr, m, live, C)
        fails = code
        if KIND == 2:
            below = tl.zeros([BLOCK], tl.int32)
            top = tl.zeros([BLOCK], C)
            for i in tl.static_range(N):
                below += _counted(w[i], DAMPING).to(tl.int32)
                top = tl.maximum(top, w[i])
            code, fails = _root_code(code, below, DAMPING)
            if DAMPING == 3:
                level = _per_block(damping, damping_ptr, m, live, C) * top
        f = ()
        for i in tl.static_range(N):
            f = f + (_function(w[i], level, shift, KIND, ROOT, DAMPING, C),)
        y = ()
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                total = f[0] * (v[i * N] * v[j * N])
                for k in tl.static_range(1, N):
                    total += f[k] * (v[i * N + k] * v[j * N + k])
                y = y + (total,)
        _write_lanes(out, _mirrored(y, N), fails, m, live, N, LEVELS)
    tl.store(info + m, code, mask=live)


# ---------------------------------------------------------------------------------------------------- matrices as tiles


@triton.jit
def _read_tile(
    a, stride, damping, damping_ptr, m, live, row, column, n,
    SYMMETRIC: tl.constexpr, DAMPING: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Read the damped blocks m as a tile (M, P, P), zeros around them; from their lower triangles if symmetric."""
    inside = live[:, None, None] & (row < n) & (column < n)
    if SYMMETRIC:
        inside = inside & (column <= row)
    x = _load(a + (m * stride)[:, None, None] + (row * n + column), inside, C)
    if SYMMETRIC:
        x = tl.where(column <= row, x, tl.permute(x, (0, 2, 1)))
    if DAMPING != 0 and DAMPING != 3:
        shift = _per_block(damping, damping_ptr, m, live, C)[:, None, None]
        x = tl.where((row == column) & (row < n), _damped(x, shift, DAMPING), x)
    return x


@triton.jit
def _line(x, chosen, AXIS: tl.constexpr):
    """Take the line of x where `chosen` holds, with its axis kept."""
    return tl.sum(tl.where(chosen, x, 0.0), axis=AXIS, keep_dims=True)


@triton.jit
def _column(x, k):
    """Column k of x in all columns. A row is spread over the lanes: a gather takes one shuffle there, a sum five."""
    return tl.gather(x, tl.zeros(x.shape, tl.int32) + k, 2)


@triton.jit
def _pivot(u, order, row, column):
    """Row of the pivot, (M, 1, 1): the first of the largest in the rows that are left (`order` < 0), of column u."""
    return tl.argmax(tl.where(order < 0, _magnitude(_line(u, row == column, 1)), -1), axis=2, keep_dims=True)


@triton.jit
def _largest(x):
    """Find the largest magnitude of each block, (M, 1, 1)."""
    return tl.max(tl.max(_magnitude(x), axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _scales(x, row, column, SPD: tl.constexpr, C: tl.constexpr):
    """Powers of two: (M, P, 1) and (M, 1, P) of the diagonal, or one per block in both."""
    if SPD:
        diagonal = row == column
        return (
            _diagonal_scale(_line(x, diagonal, 2), C),
            _diagonal_scale(_line(x, diagonal, 1), C),
        )
    else:
        scale = _power(_shift(_largest(x), 1, C), C)
        return scale, scale


@triton.jit(do_not_specialize=["batch"])
def _inv_tile(
    a, stride, damping: tl.float64, damping_ptr, out, info, batch, n,
    DAMPING: tl.constexpr, SPD: tl.constexpr, M: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Inverses of M matrices by a program.

    Positive definite: with pivot d and column u at step k, u_k = -1, the new matrix is the old one, with row and column
    k zeroed, minus u u^T / d; in the end minus the inverse.

    General: elimination keeps U in the rows of the pivots and L^-1 in the columns that it empties; then U X = L^-1.
    `order` is the step at which a row held the pivot, and so the unknown it ends as, and `source` the row that did at
    the step of a column, the equation it stands for.
    """
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    live = m < batch
    row = tl.arange(0, P)[None, :, None]
    column = tl.arange(0, P)[None, None, :]
    x = _read_tile(a, stride, damping, damping_ptr, m, live, row, column, n, SPD, DAMPING, C)
    left, right = _scales(x, row, column, SPD, C)
    if SPD:
        x = x * (left * right)
    else:
        x = x * left
    code = tl.zeros([M, 1, 1], tl.int32)
    # Both along the lanes, as are rows.
    order = tl.where(column < n, -1, column) + tl.zeros([M, 1, 1], tl.int32)
    source = column + tl.zeros([M, 1, 1], tl.int32)
    for k in range(n):
        if SPD:
            w = _line(x, row == k, 1)
            pivot = _line(w, column == k, 2)
            code = _note(code, pivot, k, True)
            inverse = _inverse(pivot)
            w = tl.where(column == k, -1.0, w)
            u = tl.permute(w, (0, 2, 1))
            # The product comes first: it is what both triangles have in common, bit for bit.
            x = tl.where((row == k) | (column == k), 0.0, x) + (u * w) * -inverse
        else:
            u = _column(x, k)
            r = _pivot(u, order, row, column)
            w = _line(x, row == r, 1)
            pivot = _line(w, column == k, 2)
            code = _note(code, pivot, k, False)
            order = tl.where(column == r, k, order)
            source = tl.where(column == k, r, source)
            rest = tl.permute(order, (0, 2, 1)) < 0
            w = tl.where(column == k, 1.0, w)
            x = tl.where(rest & (column == k), 0.0, x) + tl.where(rest, u * -_inverse(pivot), 0.0) * w
    at = row * n + column
    if SPD:
        x = -x * (left * right)
    else:
        order = tl.permute(order, (0, 2, 1))
        y = tl.where(column < order, x, tl.where(column == order, 1.0, tl.zeros_like(x)))
        for back in range(n):
            k = n - 1 - back
            u = _column(x, k)
            here = order == k
            z = _line(y, here, 1) * _inverse(_line(u, here, 1))
            y = tl.where(here, z, y - tl.where(order < k, u, 0.0) * z)
        x = y * left
        at = order * n + source
    x = tl.where(code == 0, x, float("nan"))
    tl.debug_barrier()  # out may be a, which everyone has read
    _store(out + (m * n * n)[:, None, None] + at, x, live[:, None, None] & (row < n) & (column < n))
    tl.store(info + m[:, None, None], code, mask=live[:, None, None])


@triton.jit(do_not_specialize=["batch"])
def _solve_tile(
    a, stride, b, b_stride, damping: tl.float64, damping_ptr, out, info, batch, n, k, chunks,
    DAMPING: tl.constexpr, SPD: tl.constexpr, M: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Solutions for M matrices and COLUMNS right-hand sides by a program: LU or LDL^T, then back substitution.

    Rows stay where they are: `order` is the step at which a row held the pivot, and in the end the unknown it holds.
    The right-hand sides y are transposed, to have their rows along the lanes, as are `order` and the rows of x.
    """
    pid = tl.program_id(0)
    m = (pid // chunks).to(tl.int64) * M + tl.arange(0, M)
    live = m < batch
    row = tl.arange(0, P)[None, :, None]
    column = tl.arange(0, P)[None, None, :]
    side = (pid % chunks) * COLUMNS + tl.arange(0, COLUMNS)[None, :, None]
    x = _read_tile(a, stride, damping, damping_ptr, m, live, row, column, n, SPD, DAMPING, C)
    inside = live[:, None, None] & (column < n) & (side < k)
    y = _load(b + (m * b_stride)[:, None, None] + (column * k + side), inside, C)
    left, right = _scales(x, row, column, SPD, C)
    if SPD:
        x = x * (left * right)
        y = y * right
    else:
        x = x * left
    code = tl.zeros([M, 1, 1], tl.int32)
    order = tl.where(column < n, -1, column) + tl.zeros([M, 1, 1], tl.int32)
    for step in range(n):
        if SPD:
            w = _line(x, row == step, 1)
            pivot = _line(w, column == step, 2)
            order = tl.where(column == step, step, order)
            factor = tl.where(column > step, w * -_inverse(pivot), 0.0)
            x += tl.permute(factor, (0, 2, 1)) * w
            y += _line(y, column == step, 2) * factor
        else:
            u = _column(x, step)
            r = _pivot(u, order, row, column)
            w = _line(x, row == r, 1)
            pivot = _line(w, column == step, 2)
            order = tl.where(column == r, step, order)
            factor = tl.where(order < 0, _line(u, row == column, 1) * -_inverse(pivot), 0.0)
            x += tl.permute(factor, (0, 2, 1)) * w
            y += _line(y, column == r, 2) * factor
        code = _note(code, pivot, step, SPD)
    for back in range(n):
        step = n - 1 - back
        u = _line(_column(x, step), row == column, 1)
        here = order == step
        z = _line(y, here, 2) * _inverse(_line(u, here, 2))
        y = tl.where(here, z, y - tl.where(order < step, u, 0.0) * z)
    y = tl.where(code == 0, y * right, float("nan"))
    tl.debug_barrier()  # out may be a or b, which everyone has read
    _store(out + (m * n * k)[:, None, None] + (order * k + side), y, inside)
    tl.store(info + m[:, None, None], code, mask=live[:, None, None] & (pid % chunks == 0))


@triton.jit
def _partner(i, step, n):
    """Tell who meets i in this round of a tournament of n: all meet once in n - 1 rounds, n if n is odd.

    All but the last of an even number stand on a circle of odd size and meet their mirror images; who is his own meets
    the last, or nobody.
    """
    circle = n - 1 + n % 2
    mirror = step - i
    mirror = tl.where(mirror < 0, mirror + circle, mirror)
    other = tl.where((mirror == i) & (n % 2 == 0), n - 1, mirror)
    other = tl.where(i == circle, step * ((circle + 1) // 2) % circle, other)
    return tl.where(i < n, other, i)


@triton.jit(do_not_specialize=["batch"])
def _eigh_tile(
    a, stride, damping: tl.float64, damping_ptr, floor: tl.float64, floor_ptr, values, out, info, batch, n,
    KIND: tl.constexpr, ROOT: tl.constexpr, DAMPING: tl.constexpr, SWEEPS: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Eigenvalues and vectors, or a function of the matrix, for M matrices by a program.

    The tile x holds what is off the diagonal and w the diagonal. In a round everyone rotates with a partner, by the
    angle of the entry in the upper triangle.
    """
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    live = m < batch
    LAST: tl.constexpr = 1023 if C.primitive_bitwidth == 64 else 127
    row = tl.arange(0, P)[None, :, None]
    column = tl.arange(0, P)[None, None, :]
    x = _read_tile(a, stride, damping, damping_ptr, m, live, row, column, n, True, DAMPING, C)
    largest = _largest(x)
    bad = _exponent(largest) > LAST
    shift = _shift(largest, 4, C)
    x = tl.where(bad, 0.0, x * _power(shift, C))
    v = tl.where(row == column, 1.0, tl.zeros_like(x))
    w = tl.sum(tl.where(row == column, x, 0.0), axis=2)  # (M, P)
    index = tl.arange(0, P)[None, :]
    sweep = 0
    busy = tl.full((), 1, tl.int32)
    while busy > 0:
        rotated = tl.zeros([M, P], tl.int32)
        for step in range(n - 1 + n % 2):
            partner = _partner(index, step, n) + tl.zeros([M, P], tl.int32)
            first = index < partner
            rows = partner[:, :, None] + tl.zeros([M, P, P], tl.int32)
            columns = partner[:, None, :] + tl.zeros([M, P, P], tl.int32)
            off = tl.sum(tl.where(column == rows, x, 0.0), axis=2)
            off = tl.where(first, off, tl.gather(off, partner, 1))
            off = tl.where(partner == index, 0.0, off)
            here, tangent, cosine = _rotation(w, tl.gather(w, partner, 1), off, first, C)
            sine = tangent * cosine
            w -= tangent * off
            rotated = tl.maximum(rotated, here.to(tl.int32))
            x = cosine[:, :, None] * x - sine[:, :, None] * tl.gather(x, rows, 1)
            x = cosine[:, None, :] * x - sine[:, None, :] * tl.gather(x, columns, 2)
            x = tl.where(here[:, :, None] & (column == rows), 0.0, x)
            v = cosine[:, None, :] * v - sine[:, None, :] * tl.gather(v, columns, 2)
        sweep += 1
        busy = tl.where(sweep < SWEEPS, tl.max(tl.max(rotated, axis=1), axis=0), 0)
    # A block that waits for its neighbours turns by nothing, which changes at most the sign of a zero: take it away.
    w += 0.0
    v += 0.0
    # The upper triangle, as above: the lower one may differ by its rounding errors.
    above = _above(w[:, :, None], w[:, None, :], x, C) & (row < column)
    code = tl.sum(tl.sum(above.to(tl.int32), axis=2, keep_dims=True), axis=1, keep_dims=True)
    code = tl.where(bad, -1, code)
    inside = live[:, None, None] & (row < n) & (column < n)
    if KIND == 0:
        one, two = w[:, :, None], w[:, None, :]
        before = ((one < two) | ((one == two) & (row < column))) & (row < n)
        place = tl.sum(before.to(tl.int32), axis=1, keep_dims=True)  # (M, 1, P)
        v = tl.where(bad, float("nan"), v)
        two = tl.where(bad, float("nan"), two * _power(-shift, C))
        _store(values + (m * n)[:, None, None] + place, two, live[:, None, None] & (column < n))
        tl.debug_barrier()
        _store(out + (m * n * n)[:, None, None] + (row * n + place), v, inside)
    else:
        level = _per_block(floor, floor_ptr, m, live, C)[:, None, None]
        fails = code
        if KIND == 2:
            below = tl.sum((_counted(w, DAMPING) & (index < n)).to(tl.int32), axis=1)[:, None, None]
            code, fails = _root_code(code, below, DAMPING)
            if DAMPING == 3:
                top = tl.maximum(tl.max(w, axis=1), 0.0)  # the padding has eigenvalues of 0
                level = (_per_block(damping, damping_ptr, m, live, C) * top)[:, None, None]
        f = _function(w[:, None, :], level, shift, KIND, ROOT, DAMPING, C)
        x = tl.zeros_like(x)
        for k in range(n):
            one = _line(v, column == k, 2)
            # As above: the product is common to both triangles.
            x += (one * tl.permute(one, (0, 2, 1))) * _line(f, column == k, 2)
        tl.debug_barrier()  # out may be a, which everyone has read
        _store(out + (m * n * n)[:, None, None] + (row * n + column), tl.where(fails == 0, x, float("nan")), inside)
    tl.store(info + m[:, None, None], code, mask=live[:, None, None])


# ----------------------------------------------------------------------------------------------------------- launchers

_INTERPRETED = _triton_support.interpreted(_inv_tile)


def _number(x: float | Tensor | None) -> tuple[float, Tensor | None]:
    """Return a number and a pointer, of which a kernel takes one."""
    return (1.0, x) if isinstance(x, Tensor) else (float(x or 0.0), None)


def _arithmetic(a: Tensor) -> Any:
    return tl.float64 if a.dtype == torch.float64 else tl.float32


def _levels(count: int) -> int:
    return (count - 1).bit_length()


def _mode(damping: float | Tensor | None, scaled: bool) -> int:
    return _NO_DAMPING if damping is None else _SCALED if scaled else _ADDED


def _lanes(batch: int, n: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sizes of a kernel whose lanes are matrices."""
    block = max(32, min(128, _LANES_ENTRIES >> _levels(n * n)))
    sizes = {"N": n, "LEVELS": _levels(n * n), "BLOCK": block, "num_warps": block // 32}
    return (triton.cdiv(batch, block),), sizes


def _tiles(batch: int, n: int, a: Tensor, entries: int, per_thread: int) -> tuple[int, dict[str, int]]:
    """Programs and sizes of a kernel whose tiles are matrices."""
    p = 1 << _levels(n)
    many = max(1, entries // (p * p))
    threads = many * p * p // per_thread * (2 if a.dtype == torch.float64 else 1)
    return triton.cdiv(batch, many), {"M": many, "P": p, "num_warps": min(8, max(1, threads // 32))}


def inv(a: Tensor, damping: float | Tensor | None, scaled: bool, spd: bool, out: Tensor, info: Tensor) -> None:
    """out = (A + damping)^-1; see `reference.py`."""
    batch, n, _ = a.shape
    args = (a, a.stride(0), *_number(damping), out, info, batch)
    modes = {"DAMPING": _mode(damping, scaled), "SPD": spd, "C": _arithmetic(a)}
    with _triton_support.on(a.device):
        if n <= _LANES_INV:
            grid, sizes = _lanes(batch, n)
            _inv_lanes[grid](*args, **modes, **sizes)
        else:
            programs, sizes = _tiles(batch, n, a, _TILE_ENTRIES, _PER_THREAD)
            _inv_tile[(programs,)](*args, n, **modes, **sizes)


def solve(
    a: Tensor, b: Tensor, damping: float | Tensor | None, scaled: bool, spd: bool, out: Tensor, info: Tensor
) -> None:
    """out = (A + damping)^-1 b; see `reference.py`."""
    batch, n, k = b.shape
    args = (a, a.stride(0), b, b.stride(0), *_number(damping), out, info, batch)
    modes = {"DAMPING": _mode(damping, scaled), "SPD": spd, "C": _arithmetic(a)}
    with _triton_support.on(a.device):
        if n <= _LANES_SOLVE:
            grid, sizes = _lanes(batch, n)
            columns = min(1 << _levels(k), _LANES_COLUMNS)
            _solve_lanes[grid](*args, k, COLUMNS=columns, SIDE_LEVELS=_levels(n) + _levels(columns), **modes, **sizes)
        else:
            programs, sizes = _tiles(batch, n, a, _TILE_ENTRIES, _PER_THREAD)
            columns = 1 << _levels(min(k, n))  # all of them where out may be a
            chunks = triton.cdiv(k, columns)
            _solve_tile[(programs * chunks,)](*args, n, k, chunks, COLUMNS=columns, **modes, **sizes)


def _eigen(
    a: Tensor, kind: int, root: int, damping: float | Tensor | None, mode: int, floor: float | Tensor,
    values: Tensor | None, out: Tensor, info: Tensor,
) -> None:  # fmt: skip
    batch, n, _ = a.shape
    args = (a, a.stride(0), *_number(damping), *_number(floor), values, out, info, batch)
    modes = {"KIND": kind, "ROOT": root, "DAMPING": mode, "SWEEPS": _SWEEPS, "C": _arithmetic(a)}
    with _triton_support.on(a.device):
        if n <= _LANES_EIGH:
            grid, sizes = _lanes(batch, n)
            _eigh_lanes[grid](*args, VALUE_LEVELS=_levels(n), **modes, **sizes)
        else:
            programs, sizes = _tiles(batch, n, a, _EIGH_ENTRIES, _EIGH_PER_THREAD)
            _eigh_tile[(programs,)](*args, n, **modes, **sizes)


def eigh(a: Tensor, values: Tensor, vectors: Tensor, info: Tensor, basis: Tensor | None = None) -> None:
    """Compute A V = V diag(values), values ascending; see `reference.py`."""
    _eigen(a, _EIGH, 1, None, _NO_DAMPING, 0.0, values, vectors, info)


def abs_inv(a: Tensor, floor: float | Tensor, out: Tensor, info: Tensor, basis: Tensor | None = None) -> None:
    """out = V diag(1 / max(|w|, floor)) V^T; see `reference.py`."""
    _eigen(a, _ABS_INV, 1, None, _NO_DAMPING, floor, None, out, info)


def inv_root(
    a: Tensor,
    p: int,
    damping: float | Tensor | None,
    scaled: bool,
    out: Tensor,
    info: Tensor,
    clamped: bool = False,
    basis: Tensor | None = None,
) -> None:
    """out = (A + damping)^(-1/p), symmetric positive definite; see `reference.py`."""
    mode = _RELATIVE if clamped else _mode(damping, scaled)
    _eigen(a, _INV_ROOT, p, damping, mode, 0.0, None, out, info)
