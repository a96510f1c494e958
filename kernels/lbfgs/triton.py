"""Triton kernels of the L-BFGS direction and their launchers; the contract is in `reference.py`.

Two regimes, told apart by n alone (`_ONE_PROGRAM`):

* Short vectors: one program per problem does everything, in one launch. `_update_one`, `_two_loop_one`.
* Long vectors: many programs share a problem. A pass over the history leaves one row of float64 partial sums per
  program; the program that draws the last ticket adds the rows in a fixed order (so results repeat bit for bit), solves
  the recursion over coefficients, and the next launch combines. `_dots` and `_combine` make an update in two launches;
  `_panel` makes a `two_loop`, which has no Gram matrices to start from, in 2 ceil(m / 16) + 1.

An update in parts is `_dots` without the solve, `_solve` and `_combine`, whatever the length.

The second pass goes over the tiles in the reverse order of the first, to start with what the L2 cache still holds.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from secant.kernels import _triton_support
from secant.kernels._triton_support import load as _load
from secant.kernels._triton_support import rounded_to_bfloat16 as _rounded_to_bfloat16
from secant.kernels.lbfgs.contract import EXTRAS, Pair, State
from secant.kernels.lbfgs.triton_dense import dense_update as dense_update
from torch import Tensor

#: Longest vector that one program handles alone.
_ONE_PROGRAM = 4096
#: Most programs at work per multiprocessor, and the fewest blocks of columns worth a program of its own.
_PROGRAMS_PER_SM, _BLOCKS_PER_PROGRAM = 3, 2
#: Elements of a (slots, columns) tile, slots in it, warps: each thread holds 8 elements of a tile and as many float64
#: accumulators for each of four dot products, which is what its registers allow. With fewer slots than the fewest, the
#: scalar sums, which take a tile's columns, would need more.
_TILE, _TILE_SLOTS, _FEWEST_SLOTS, _TILE_WARPS = 1024, 16, 4, 4
#: Columns of a tile of the combining pass, and slots whose loads are in flight together.
_COMBINE_TILE, _COMBINE_WARPS, _COMBINE_UNROLL = 1024, 4, 4
#: Pairs in a panel of the two-loop recursion, columns of its tiles.
_PANEL, _PANEL_TILE, _PANEL_WARPS = 16, 128, 8
#: Elements of a tile of partial sums.
_REDUCTION_TILE = 2048
#: Sums that concern no slot, in the order of the contract.
_EXTRAS = tl.constexpr(EXTRAS)


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return _triton_support.available(_INTERPRETED)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when vectors of this device and dtype are supported, else the reason why they are not."""
    if dtype not in (torch.float32, torch.float64):
        return f"vectors are float32 or float64, not {dtype}"
    return _triton_support.supports(device, _INTERPRETED)


# --------------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _rounded(x, ring):
    """Round x to the value that `ring` will hold for it, in a type that can be computed with."""
    if ring.dtype.element_ty == tl.bfloat16:
        return _rounded_to_bfloat16(x.to(tl.float32))
    else:
        return x.to(ring.dtype.element_ty)


@triton.jit
def _step(t, t_ptr, t_stride, b):
    """Load the step length of problem b in float64, from a number or from a tensor."""
    if t_ptr is None:
        return tl.full((), t, tl.float64)
    else:
        return tl.load(t_ptr + b * t_stride)


@triton.jit
def _pick(x, index, at):
    """x[at] of a vector in registers."""
    return tl.sum(tl.where(index == at, x, 0.0), axis=0)


@triton.jit
def _only(mask, condition):
    """Masked by a scalar condition; through an integer, as the interpreter gives a scalar comparison the wrong type."""
    return mask & (condition.to(tl.int8) != 0)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _descend(u, v, rho, ok, sy, yy, ld, head, m, index):
    """First loop of the recursion, newest to oldest: alpha_i = rho_i (u_i - sum_{j newer} alpha_j s_i.y_j).

    Returns alpha and v - sum_j alpha_j y_j.y_i (v as it is when `yy` is None).
    """
    alpha = tl.zeros_like(u)
    for k in range(m):
        i = (head + (m - 1 - k)) % m
        a = tl.sum(tl.where(index == i, rho * u, 0.0), axis=0)
        # The loads do not wait for a; a pair that takes no part (a = 0) may hold NaN.
        column = tl.load(sy + index * ld + i, mask=ok, other=0.0)
        u -= tl.where(a != 0, a * column, 0.0)
        if yy is not None:
            row = tl.load(yy + i * ld + index, mask=ok, other=0.0)
            v -= tl.where(a != 0, a * row, 0.0)
        alpha = tl.where(index == i, a, alpha)
    return alpha, v


@triton.jit
def _ascend(v, alpha, rho, ok, sy, ld, head, m, index):
    """Second loop, oldest to newest: delta_i = alpha_i - rho_i (v_i + sum_{j older} delta_j s_j.y_i)."""
    delta = tl.zeros_like(v)
    for k in range(m):
        i = (head + k) % m
        d = tl.sum(tl.where(index == i, alpha - rho * v, 0.0), axis=0)
        row = tl.load(sy + i * ld + index, mask=ok, other=0.0)
        v += tl.where(d != 0, d * row, 0.0)
        delta = tl.where(index == i, d, delta)
    return delta


@triton.jit
def _validity(dsy, dyy):
    """Return which pairs count, and rho = 1 / s.y, 0 for the others."""
    ok = (dsy > 0) & _finite(dsy) & _finite(dyy)
    return ok, tl.where(ok, 1.0 / tl.where(ok, dsy, 1.0), 0.0)


@triton.jit
def _finish(
    sg, yg, sdy, ydy, new_sy, new_ss, new_yy, new_sg, new_yg, gg, gmax,
    sy, yy, head_ptr, count_ptr, stats, tol, m, index,
    HAS_G: tl.constexpr, HAS_PAIR: tl.constexpr,
):  # fmt: skip
    """From the dot products of one problem: gate, Gram matrices, ring position, recursion, stats.

    Returns the coefficients of the rows of S and Y, gamma, and the slot of the new pair, -1 when there is none.
    """
    live = index < m
    head = tl.load(head_ptr)
    count = tl.load(count_ptr)
    slot = tl.full((), -1, tl.int32)
    tl.store(stats + tl.arange(0, 8), tl.full([8], 0, tl.float64))
    tl.debug_barrier()  # everyone has read what is stored below
    if HAS_PAIR:
        s_norm, y_norm = tl.sqrt(new_ss), tl.sqrt(new_yy)
        finite = _finite(new_sy) & _finite(new_ss) & _finite(new_yy)
        ok = finite & (new_sy > tl.full((), tol, tl.float64) * (s_norm * y_norm))
        slot = tl.where(ok, head, slot)
        new = index == slot
        put = _only(live, ok)
        tl.store(sy + index * m + head, tl.where(new, new_sy, sdy), mask=put)
        tl.store(sy + head * m + index, tl.zeros_like(sdy), mask=put & (index != head))
        row = tl.where(new, new_yy, ydy)
        tl.store(yy + index * m + head, row, mask=put)
        tl.store(yy + head * m + index, row, mask=put & (index != head))
        head = tl.where(ok, (head + 1) % m, head)
        tl.store(head_ptr, head)
        tl.store(count_ptr, tl.where(ok, tl.minimum(count + 1, m), count))
        tl.store(stats + 3, new_sy)
        tl.store(stats + 4, s_norm)
        tl.store(stats + 5, y_norm)
        tl.store(stats + 6, ok.to(tl.float64))
        if HAS_G:
            sg = tl.where(new, new_sg, sg)
            yg = tl.where(new, new_yg, yg)
        tl.debug_barrier()  # the recursion reads the Gram matrices back
    cs = tl.zeros_like(sg)
    cy = tl.zeros_like(sg)
    gamma = tl.full((), 1.0, tl.float64)
    if HAS_G:
        dsy = tl.load(sy + index * (m + 1), mask=live, other=0.0)
        dyy = tl.load(yy + index * (m + 1), mask=live, other=0.0)
        ok, rho = _validity(dsy, dyy)
        age = (index - head + m) % m  # 0 for the oldest
        newest = tl.max(tl.where(ok, age, -1), axis=0)
        scale = tl.sum(tl.where(ok & (age == newest), dsy / tl.where(ok, dyy, 1.0), 0.0), axis=0)
        gamma = tl.where(newest >= 0, scale, gamma)
        alpha, v = _descend(tl.where(ok, -sg, 0.0), tl.where(ok, -yg, 0.0), rho, ok, sy, yy, m, head, m, index)
        cs = _ascend(gamma * v, alpha, rho, ok, sy, m, head, m, index)
        cy = -gamma * alpha
        gd = tl.sum(tl.where(ok, cs * sg + cy * yg, 0.0), axis=0) - gamma * gg
        tl.store(stats + 0, gd)
        tl.store(stats + 1, tl.sqrt(gg))
        tl.store(stats + 2, tl.where(gg == gg, gmax, gg))  # max may drop a NaN, the sum of squares keeps it
        tl.store(stats + 7, gamma)
    return cs, cy, gamma, slot


@triton.jit
def _store_coefficients(coef, cs, cy, gamma, slot, m, index):
    """Store what `_finish` returns in the order of the contract: -gamma, the new slot, those of S by slot, of Y."""
    tl.store(coef, -gamma)
    tl.store(coef + 1, slot.to(tl.float64))
    tl.store(coef + 2 + index, cs, mask=index < m)
    tl.store(coef + 2 + m + index, cy, mask=index < m)


@triton.jit
def _total(work, total, parts, used, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Store in `total` the sum of the rows of partial sums, in an order that depends on nothing but their number."""
    column = tl.arange(0, WIDTH)
    acc = tl.full([PARTS, WIDTH], 0, tl.float64)
    for first in range(0, parts, PARTS):
        row = first + tl.arange(0, PARTS)
        mask = (row[:, None] < parts) & (column[None, :] < used)
        acc += tl.load(work + (row[:, None] * used + column[None, :]), mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(total + column, tl.sum(acc, axis=0), mask=column < used)
    tl.debug_barrier()  # the caller reads it back


@triton.jit
def _new_pair(s, y, y_prev, gv, first, column, mask, step, s_ring, y_ring, Y_IS_G: tl.constexpr):
    """Entries of s' = t s and y' = y - y_prev as the rings will hold them."""
    sv = tl.load(s + first + column, mask=mask, other=0.0)
    if Y_IS_G:
        yv = tl.where(mask, gv, 0.0)
    else:
        yv = tl.load(y + first + column, mask=mask, other=0.0)
    if y_prev is not None:
        yv -= tl.load(y_prev + first + column, mask=mask, other=0.0)
    return _rounded(sv * step.to(sv.dtype), s_ring), _rounded(yv, y_ring)


@triton.jit
def _sums(
    s_ring, y_ring, g, s, y, y_prev, vector, step, slot, live, start, stride, n,
    Y_IS_G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dot products of K slots with g and y', and the scalar sums, over every `stride`-th column block from `start`."""
    at = slot[:, None].to(tl.int64) * n
    sg = tl.full([K, BLOCK], 0, tl.float64)
    yg = tl.full([K, BLOCK], 0, tl.float64)
    sdy = tl.full([K, BLOCK], 0, tl.float64)
    ydy = tl.full([K, BLOCK], 0, tl.float64)
    new_sy = tl.full([BLOCK], 0, tl.float64)
    new_ss = tl.full([BLOCK], 0, tl.float64)
    new_yy = tl.full([BLOCK], 0, tl.float64)
    new_sg = tl.full([BLOCK], 0, tl.float64)
    new_yg = tl.full([BLOCK], 0, tl.float64)
    gg = tl.full([BLOCK], 0, tl.float64)
    g_max = tl.full([BLOCK], 0, tl.float64)
    column = tl.arange(0, BLOCK)
    for first in range(start, n, stride):
        inside = column < tl.minimum(n - first, BLOCK).to(tl.int32)
        mask = live[:, None] & inside[None, :]
        srow = _load(s_ring + first + at + column[None, :], mask, tl.float64)
        yrow = _load(y_ring + first + at + column[None, :], mask, tl.float64)
        gv = None
        if g is not None:
            gv = tl.load(g + (vector + first) + column, mask=inside, other=0.0)
            gd = gv.to(tl.float64)
            sg += srow * gd[None, :]
            yg += yrow * gd[None, :]
            gg += gd * gd
            g_max = tl.maximum(g_max, tl.abs(gd))
        if s is not None:
            sn, yn = _new_pair(s, y, y_prev, gv, vector + first, column, inside, step, s_ring, y_ring, Y_IS_G)
            sn = sn.to(tl.float64)
            yn = yn.to(tl.float64)
            sdy += srow * yn[None, :]
            ydy += yrow * yn[None, :]
            new_sy += sn * yn
            new_ss += sn * sn
            new_yy += yn * yn
            if g is not None:
                new_sg += sn * gd
                new_yg += yn * gd
    return (
        tl.sum(sg, axis=1), tl.sum(yg, axis=1), tl.sum(sdy, axis=1), tl.sum(ydy, axis=1),
        tl.sum(new_sy, axis=0), tl.sum(new_ss, axis=0), tl.sum(new_yy, axis=0),
        tl.sum(new_sg, axis=0), tl.sum(new_yg, axis=0), tl.sum(gg, axis=0), tl.max(g_max, axis=0),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- long vectors


@triton.jit(do_not_specialize=["t_stride", "rows", "tiles", "parts"])
def _dots(
    s_ring, y_ring, sy, yy, head, count, stats, g, s, y, y_prev, t: tl.float64, t_ptr, t_stride, tol: tl.float64,
    work, coef, sums, ticket, n, m, rows, tiles, parts,
    Y_IS_G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """First launch of an update: all dot products in one pass over the history, then the solve.

    Program (b, part, tile) takes `rows` slots of problem b and every `parts`-th block of columns. A row of `work` holds
    S.g, Y.g, S.y', Y.y' by slot, then the scalars; `coef` receives what `_combine` needs. Where there are `sums`, they
    receive what `_solve` needs instead.
    """
    programs = tiles * parts
    pid = tl.program_id(0)
    b = (pid // programs).to(tl.int64)
    part = (pid % programs) // tiles
    tile = pid % tiles
    lane = tl.arange(0, K)
    slot = tile * rows + lane
    live = (lane < rows) & (slot < m)
    sg, yg, sdy, ydy, new_sy, new_ss, new_yy, new_sg, new_yg, gg, g_max = _sums(
        s_ring + b * m * n, y_ring + b * m * n, g, s, y, y_prev, b * n, _step(t, t_ptr, t_stride, b), slot, live,
        part.to(tl.int64) * BLOCK, parts * BLOCK, n, Y_IS_G, K, BLOCK,
    )  # fmt: skip
    used = 4 * m + 7
    work += b * (parts + 1) * used
    mine = work + part * used
    tl.store(mine + slot, sg, mask=live)
    tl.store(mine + m + slot, yg, mask=live)
    tl.store(mine + 2 * m + slot, sdy, mask=live)
    tl.store(mine + 3 * m + slot, ydy, mask=live)
    if tile == 0:
        scalar = mine + 4 * m
        tl.store(scalar, new_sy)
        tl.store(scalar + 1, new_ss)
        tl.store(scalar + 2, new_yy)
        tl.store(scalar + 3, new_sg)
        tl.store(scalar + 4, new_yg)
        tl.store(scalar + 5, gg)
        tl.store(scalar + 6, g_max)
    tl.debug_barrier()  # the whole row is written before the ticket is drawn
    if tl.atomic_add(ticket + b, 1, sem="acq_rel") == programs - 1:
        tl.store(ticket + b, 0)
        total = work + parts * used
        _total(work, total, parts, used, WIDTH, PARTS)
        index = tl.arange(0, M)
        keep = index < m
        scalar = total + 4 * m
        row = tl.arange(0, MAX_PARTS)
        largest = tl.load(work + (row * used + 4 * m + 6), mask=row < parts, other=0.0, cache_modifier=".cg")
        # Names of their own: a Triton before 3.7 lets no branch give a name another shape.
        s_g = tl.load(total + index, mask=keep, other=0.0)
        y_g = tl.load(total + m + index, mask=keep, other=0.0)
        s_dy = tl.load(total + 2 * m + index, mask=keep, other=0.0)
        y_dy = tl.load(total + 3 * m + index, mask=keep, other=0.0)
        g_g = tl.load(scalar + 5)
        g_top = tl.max(largest, axis=0)
        if sums is None:
            cs, cy, gamma, new = _finish(
                s_g, y_g, s_dy, y_dy, tl.load(scalar), tl.load(scalar + 1), tl.load(scalar + 2), tl.load(scalar + 3),
                tl.load(scalar + 4), g_g, g_top,
                sy + b * m * m, yy + b * m * m, head + b, count + b, stats + b * 8, tol, m, index,
                g is not None, s is not None,
            )  # fmt: skip
            _store_coefficients(coef + b * (2 * m + 2), cs, cy, gamma, new, m, index)
        else:
            sums += b * (4 * m + _EXTRAS)
            tl.store(sums + 4 * index, s_g, mask=keep)
            tl.store(sums + 4 * index + 1, y_g, mask=keep)
            tl.store(sums + 4 * index + 2, s_dy, mask=keep)
            tl.store(sums + 4 * index + 3, y_dy, mask=keep)
            extra = tl.arange(0, _EXTRAS)
            value = tl.load(scalar + extra, mask=extra < 6, other=0.0)
            # max may drop a NaN, the sum of squares keeps it
            value = tl.where(extra == 6, tl.where(g_g == g_g, g_top, g_g), value)
            tl.store(sums + 4 * m + extra, value)


@triton.jit
def _solve(
    sy, yy, head, count, stats, sums, coef, tol: tl.float64, m,
    HAS_G: tl.constexpr, HAS_PAIR: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Solve by itself, one program per problem: from the sums of `_dots` to what `_combine` needs."""
    b = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, M)
    keep = index < m
    sums += b * (4 * m + _EXTRAS)
    scalar = sums + 4 * m
    cs, cy, gamma, slot = _finish(
        tl.load(sums + 4 * index, mask=keep, other=0.0),
        tl.load(sums + 4 * index + 1, mask=keep, other=0.0),
        tl.load(sums + 4 * index + 2, mask=keep, other=0.0),
        tl.load(sums + 4 * index + 3, mask=keep, other=0.0),
        tl.load(scalar), tl.load(scalar + 1), tl.load(scalar + 2), tl.load(scalar + 3), tl.load(scalar + 4),
        tl.load(scalar + 5), tl.load(scalar + 6),
        sy + b * m * m, yy + b * m * m, head + b, count + b, stats + b * 8, tol, m, index, HAS_G, HAS_PAIR,
    )  # fmt: skip
    _store_coefficients(coef + b * (2 * m + 2), cs, cy, gamma, slot, m, index)


@triton.jit(do_not_specialize=["t_stride"])
def _combine(
    s_ring, y_ring, g, s, y, y_prev, t: tl.float64, t_ptr, t_stride, coef, out, prev_out, n, m,
    Y_IS_G: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Second launch of an update: d = -gamma g + sum_j (cs_j s_j + cy_j y_j), and the accepted pair enters its slot."""
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    first = (pid % blocks).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < tl.minimum(n - first, BLOCK).to(tl.int32)
    s_ring += b * m * n + first
    y_ring += b * m * n + first
    first += b * n
    coef += b * (2 * m + 2)
    slot = tl.load(coef + 1).to(tl.int32)
    gv = None
    if g is not None:
        gv = tl.load(g + first + column, mask=inside, other=0.0)
        T: tl.constexpr = gv.dtype
        d = tl.load(coef).to(T) * gv
        for base in range(0, m, UNROLL):
            for u in tl.static_range(UNROLL):
                j = base + u
                old = (j < m) & (j != slot)
                cs = tl.load(coef + 2 + j, mask=old, other=0.0).to(T)
                cy = tl.load(coef + 2 + m + j, mask=old, other=0.0).to(T)
                at = tl.full((), 1, tl.int64) * j * n
                # Rows that take no part are not read: they may hold NaN.
                d += cs * _load(s_ring + at + column, _only(inside, cs != 0), T)
                d += cy * _load(y_ring + at + column, _only(inside, cy != 0), T)
    if s is not None:
        keep = _only(inside, slot >= 0)
        step = _step(t, t_ptr, t_stride, b)
        sn, yn = _new_pair(s, y, y_prev, gv, first, column, keep, step, s_ring, y_ring, Y_IS_G)
        at = slot.to(tl.int64) * n
        tl.store(s_ring + at + column, sn.to(s_ring.dtype.element_ty), mask=keep)
        tl.store(y_ring + at + column, yn.to(y_ring.dtype.element_ty), mask=keep)
        if g is not None:
            d += tl.load(coef + 2 + slot, mask=slot >= 0, other=0.0).to(T) * sn.to(T)
            d += tl.load(coef + 2 + m + slot, mask=slot >= 0, other=0.0).to(T) * yn.to(T)
    if g is not None:
        tl.debug_barrier()  # out may be s or g, and prev_out may be y_prev
        tl.store(out + first + column, d, mask=inside)
        if prev_out is not None:
            tl.store(prev_out + first + column, gv, mask=inside)


@triton.jit(do_not_specialize=["first", "size", "before", "before_size", "parts"])
def _panel(
    g, s, y, s_batch, s_row, y_batch, y_row, out, gamma: tl.float64, state, gram, work, ticket,
    n, m, first, size, before, before_size, parts,
    FROM_G: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, AUTO: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One pass of the two-loop recursion over panels of K pairs.

    With v the running vector, which starts as -g (FROM_G) and lives in `out`: first finish the panel at slot `before`,

        BEFORE 1: v -= sum_j alpha_j y_j    2: the same, then v *= gamma    3: v += sum_j delta_j s_j    0: nothing

    then take the dot products of the panel at slot `first` and let the last program solve for its coefficients,

        AFTER 1: s_i.v, s_i.y_j, y_i.y_i -> rho, alpha (and gamma)    2: y_i.v -> delta    0: nothing

    `state` holds alpha, rho, delta by slot, then gamma and whether it has been found; `gram` K s_i.y_j by slot i.
    """
    pid = tl.program_id(0)
    b = (pid // parts).to(tl.int64)
    part = pid % parts
    s += b * s_batch
    y += b * y_batch
    g += b * n
    out += b * n
    state += b * (3 * m + 2)
    gram += b * m * K
    T: tl.constexpr = out.dtype.element_ty
    lane = tl.arange(0, K)
    slot = first + lane
    live = lane < size
    if BEFORE > 0:
        old = before + lane
        if BEFORE == 3:
            c = tl.load(state + 2 * m + old, mask=lane < before_size, other=0.0).to(T)
        else:
            c = -tl.load(state + old, mask=lane < before_size, other=0.0).to(T)
        used_row = (c != 0)[:, None]
    if BEFORE == 2:
        scale = tl.full((), gamma, tl.float64)
        if AUTO:
            scale = tl.load(state + 3 * m)
    dots = tl.full([K], 0, tl.float64)
    squares = tl.full([K], 0, tl.float64)
    products = tl.full([K, K], 0, tl.float64)
    column = tl.arange(0, BLOCK)
    for start in range(part.to(tl.int64) * BLOCK, n, parts * BLOCK):
        inside = column < tl.minimum(n - start, BLOCK).to(tl.int32)
        if FROM_G:
            v = -tl.load(g + start + column, mask=inside, other=0.0)
        else:
            v = tl.load(out + start + column, mask=inside, other=0.0)
        if BEFORE == 3:
            row = s + start + old[:, None].to(tl.int64) * s_row + column[None, :]
            v += tl.sum(c[:, None] * _load(row, used_row & inside[None, :], T), axis=0)
        elif BEFORE > 0:
            row = y + start + old[:, None].to(tl.int64) * y_row + column[None, :]
            v += tl.sum(c[:, None] * _load(row, used_row & inside[None, :], T), axis=0)
        if BEFORE == 2:
            v *= scale.to(T)
        if BEFORE > 0:
            tl.debug_barrier()  # out may be g
            tl.store(out + start + column, v, mask=inside)
        if AFTER > 0:
            wide = v.to(tl.float64)
            mask = live[:, None] & inside[None, :]
            yrow = _load(y + start + slot[:, None].to(tl.int64) * y_row + column[None, :], mask, tl.float64)
            if AFTER == 1:
                squares += tl.sum(yrow * yrow, axis=1)
                srow = _load(s + start + slot[:, None].to(tl.int64) * s_row + column[None, :], mask, tl.float64)
                dots += tl.sum(srow * wide[None, :], axis=1)
                other = y + start + tl.full((), 1, tl.int64) * first * y_row
                for j in range(size):
                    product = tl.sum(srow * _load(other + column, inside, tl.float64)[None, :], axis=1)
                    products += tl.where(lane[None, :] == j, product[:, None], 0.0)
                    other += y_row
            else:
                dots += tl.sum(yrow * wide[None, :], axis=1)
    if AFTER > 0:
        USED: tl.constexpr = K * (K + 2) if AFTER == 1 else K
        work += b * (parts + 1) * USED
        mine = work + part * USED
        tl.store(mine + lane, dots)
        if AFTER == 1:
            tl.store(mine + K + lane, squares)
            tl.store(mine + 2 * K + lane[:, None] * K + lane[None, :], products)
        tl.debug_barrier()  # the whole row is written before the ticket is drawn
        if tl.atomic_add(ticket + b, 1, sem="acq_rel") == parts - 1:
            tl.store(ticket + b, 0)
            total = work + parts * USED
            _total(work, total, parts, USED, WIDTH, PARTS)
            dot = tl.load(total + lane)
            gram += first * K
            if AFTER == 1:
                yy = tl.load(total + K + lane, mask=live, other=0.0)
                sy = tl.load(total + 2 * K + lane * (K + 1), mask=live, other=0.0)
                ok, rho = _validity(sy, yy)
                found = first + size < m  # the newest panel finds gamma unknown
                if found:
                    found = tl.load(state + 3 * m + 1) != 0
                newest = tl.max(tl.where(ok, lane, -1), axis=0)
                if not found:
                    ratio = tl.sum(tl.where(ok & (lane == newest), sy / tl.where(ok, yy, 1.0), 0.0), axis=0)
                    tl.store(state + 3 * m, tl.where(newest >= 0, ratio, 1.0))
                    tl.store(state + 3 * m + 1, (newest >= 0).to(tl.float64))
                square = lane[:, None] * K + lane[None, :]
                tl.store(gram + square, tl.load(total + 2 * K + square), mask=live[:, None])
                alpha, _ = _descend(tl.where(ok, dot, 0.0), dot, rho, ok, total + 2 * K, None, K, 0, size, lane)
                tl.store(state + slot, alpha, mask=live)
                tl.store(state + m + slot, rho, mask=live)
            else:
                alpha = tl.load(state + slot, mask=live, other=0.0)
                rho = tl.load(state + m + slot, mask=live, other=0.0)
                ok = rho != 0
                delta = _ascend(tl.where(ok, dot, 0.0), alpha, rho, ok, gram, K, 0, size, lane)
                tl.store(state + 2 * m + slot, delta, mask=live)


# ------------------------------------------------------------------------------------------------------- short vectors


@triton.jit(do_not_specialize=["t_stride"])
def _update_one(
    s_ring, y_ring, sy, yy, head, count, stats, g, s, y, y_prev, t: tl.float64, t_ptr, t_stride, tol: tl.float64,
    out, prev_out, n, m, Y_IS_G: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update by one program per problem: dot products, solve, and the combination in reverse order."""
    b = tl.program_id(0).to(tl.int64)
    s_ring += b * m * n
    y_ring += b * m * n
    index = tl.arange(0, M)
    live = index < m
    step = _step(t, t_ptr, t_stride, b)
    sg, yg, sdy, ydy, new_sy, new_ss, new_yy, new_sg, new_yg, gg, g_max = _sums(
        s_ring, y_ring, g, s, y, y_prev, b * n, step, index, live, 0, BLOCK, n, Y_IS_G, M, BLOCK
    )
    cs, cy, gamma, slot = _finish(
        sg, yg, sdy, ydy, new_sy, new_ss, new_yy, new_sg, new_yg, gg, g_max,
        sy + b * m * m, yy + b * m * m, head + b, count + b, stats + b * 8, tol, m, index,
        g is not None, s is not None,
    )  # fmt: skip
    at = index[:, None].to(tl.int64) * n
    blocks = tl.cdiv(n, BLOCK)
    for k in range(blocks):
        column = (blocks - 1 - k) * BLOCK + tl.arange(0, BLOCK)
        inside = column < n
        gv = None
        if g is not None:
            gv = tl.load(g + (b * n + column), mask=inside, other=0.0)
            T: tl.constexpr = gv.dtype
            # Rows that take no part are not read: they may hold NaN. The new pair is not in its slot yet.
            row_s = tl.where(index == slot, 0.0, cs).to(T)[:, None]
            row_y = tl.where(index == slot, 0.0, cy).to(T)[:, None]
            rows = row_s * _load(s_ring + at + column[None, :], (row_s != 0) & inside[None, :], T)
            rows += row_y * _load(y_ring + at + column[None, :], (row_y != 0) & inside[None, :], T)
            d = tl.sum(rows, axis=0) - gamma.to(T) * gv
        if s is not None:
            keep = _only(inside, slot >= 0)
            sn, yn = _new_pair(s, y, y_prev, gv, b * n, column, keep, step, s_ring, y_ring, Y_IS_G)
            to = slot.to(tl.int64) * n
            tl.store(s_ring + (to + column), sn.to(s_ring.dtype.element_ty), mask=keep)
            tl.store(y_ring + (to + column), yn.to(y_ring.dtype.element_ty), mask=keep)
            if g is not None:
                d += _pick(cs, index, slot).to(T) * sn.to(T) + _pick(cy, index, slot).to(T) * yn.to(T)
        if g is not None:
            tl.debug_barrier()  # out may be s or g, and prev_out may be y_prev
            tl.store(out + (b * n + column), d, mask=inside)
            if prev_out is not None:
                tl.store(prev_out + (b * n + column), gv, mask=inside)


@triton.jit
def _two_loop_one(
    g, s, y, s_batch, s_row, y_batch, y_row, out, gamma: tl.float64, n, m,
    AUTO: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run the two-loop recursion by one program per problem, with the running vector in registers."""
    b = tl.program_id(0).to(tl.int64)
    s += b * s_batch
    y += b * y_batch
    T: tl.constexpr = out.dtype.element_ty
    index = tl.arange(0, M)
    column = tl.arange(0, BLOCK)
    inside = column < n
    v = -tl.load(g + (b * n + column), mask=inside, other=0.0)
    alphas = tl.full([M], 0, tl.float64)
    rhos = tl.full([M], 0, tl.float64)
    scale = tl.full((), gamma, tl.float64)
    found = tl.full((), 0, tl.int32)
    for k in range(m):
        i = m - 1 - k
        srow = _load(s + tl.full((), 1, tl.int64) * i * s_row + column, inside, tl.float64)
        yrow = _load(y + tl.full((), 1, tl.int64) * i * y_row + column, inside, tl.float64)
        sy = tl.sum(srow * yrow, axis=0)
        yy = tl.sum(yrow * yrow, axis=0)
        sv = tl.sum(srow * v.to(tl.float64), axis=0)
        ok, rho = _validity(sy, yy)
        alpha = tl.where(ok, rho * sv, 0.0)
        v -= tl.where(ok, alpha.to(T) * yrow.to(T), 0.0)
        if AUTO:
            scale = tl.where(ok & (found == 0), sy / tl.where(ok, yy, 1.0), scale)
            found = tl.where(ok, 1, found)
        alphas = tl.where(index == i, alpha, alphas)
        rhos = tl.where(index == i, rho, rhos)
    v *= scale.to(T)
    for i in range(m):
        rho = _pick(rhos, index, i)
        used = _only(inside, rho != 0)
        yv = tl.sum(
            _load(y + tl.full((), 1, tl.int64) * i * y_row + column, used, tl.float64) * v.to(tl.float64), axis=0
        )
        delta = _pick(alphas, index, i) - tl.where(rho != 0, rho * yv, 0.0)
        v += delta.to(T) * _load(s + tl.full((), 1, tl.int64) * i * s_row + column, used, T)
    tl.store(out + (b * n + column), v, mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers

_INTERPRETED = _triton_support.interpreted(_combine)

_ticket_cache: dict[tuple[int, int], Tensor] = {}


def _tickets(device: torch.device, batch: int) -> Tensor:
    """Zeroed counters, one per problem; every kernel leaves them zeroed.

    They are kept per stream, where launches follow one another. A CUDA graph may be replayed on any stream, so one that
    is being captured gets its own, zeroed by a node of the graph.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(batch, dtype=torch.int32, device=device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    found = _ticket_cache.get(key)
    if found is None or found.numel() < batch:
        found = _ticket_cache[key] = torch.zeros(batch, dtype=torch.int32, device=device)
    return found


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that fill the device."""
    if device.type != "cuda":
        return 4
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _share(device: torch.device, n: int, block: int, others: int) -> int:
    """Programs among which the columns of one problem are divided, when the grid has `others` in its other axes."""
    return max(1, min(_programs(device) // others, triton.cdiv(n, _BLOCKS_PER_PROGRAM * block)))


def _reduction(used: int) -> dict[str, int]:
    """Tile of `_total` for rows of `used` entries."""
    width = triton.next_power_of_2(used)
    return {"WIDTH": width, "PARTS": max(1, _REDUCTION_TILE // width)}


def two_loop(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor) -> None:
    """Compute -H grad into `out`; see `reference.two_loop`."""
    if s.dim() == 2:
        s, y = s[None], y[None]
    batch, m, n = s.shape
    strides = (s.stride(0), s.stride(1), y.stride(0), y.stride(1))
    auto, gamma = gamma is None, 1.0 if gamma is None else float(gamma)
    with _triton_support.on(grad.device):
        if n <= _ONE_PROGRAM:
            block = triton.next_power_of_2(n)
            _two_loop_one[(batch,)](
                grad, s, y, *strides, out, gamma, n, m,
                AUTO=auto, M=triton.next_power_of_2(m), BLOCK=block, num_warps=min(16, max(1, block // 256)),
            )  # fmt: skip
            return
        parts = _share(grad.device, n, _PANEL_TILE, batch)
        row = _PANEL * (_PANEL + 2)
        sizes = (batch * (3 * m + 2), batch * m * _PANEL, batch * (parts + 1) * row)
        state, gram, work = torch.empty(sum(sizes), dtype=torch.float64, device=grad.device).split(sizes)
        ticket = _tickets(grad.device, batch)

        def launch(before: int, after: int, finish: int, start: int, from_g: bool) -> None:
            first, old = max(start, 0) * _PANEL, max(finish, 0) * _PANEL
            _panel[(batch * parts,)](
                grad, s, y, *strides, out, gamma, state, gram, work, ticket,
                n, m, first, min(_PANEL, m - first), old, min(_PANEL, m - old), parts,
                FROM_G=from_g, BEFORE=before, AFTER=after, AUTO=auto, K=_PANEL, BLOCK=_PANEL_TILE,
                num_warps=_PANEL_WARPS, **_reduction(row if after == 1 else _PANEL),
            )  # fmt: skip

        panels = triton.cdiv(m, _PANEL)
        for p in reversed(range(panels)):  # newest to oldest
            launch(min(1, panels - 1 - p), 1, p + 1 if p + 1 < panels else -1, p, from_g=p + 2 >= panels)
        launch(2, 2, 0, 0, from_g=panels == 1)
        for p in range(1, panels):  # oldest to newest
            launch(3, 2, p - 1, p, from_g=False)
        launch(3, 0, panels - 1, -1, from_g=False)


class _Operands(NamedTuple):
    """Arguments of a kernel that a pair and a gradient make; `same`: y is g, and is read once."""

    vectors: tuple[Tensor | None, ...]
    step: tuple[Any, ...]
    same: bool


def _operands(pair: Pair | None, g: Tensor | None) -> _Operands:
    """Take a pair apart."""
    s, y, y_prev, t = (None, None, None, 1.0) if pair is None else pair
    same = g is not None and y is not None and y.data_ptr() == g.data_ptr()
    step = (1.0, t, int(t.numel() > 1)) if isinstance(t, Tensor) else (float(t), None, 0)
    return _Operands((g, s, None if same else y, y_prev), step, same)


def _slots(m: int) -> int:
    """Slots of a tile that has them all."""
    return max(_FEWEST_SLOTS, triton.next_power_of_2(m))


def _launch_dots(state: State, x: _Operands, tol: float, sums: Tensor | None) -> Tensor:
    """Launch the first pass, which ends in the coefficients that this returns, or else in `sums`."""
    device = state.s.device
    batch, m, n = state.s.shape
    tiles = triton.cdiv(m, _TILE_SLOTS)
    rows = triton.cdiv(m, tiles)
    k = max(_FEWEST_SLOTS, triton.next_power_of_2(rows))
    parts = _share(device, n, _TILE // k, tiles * batch)
    sizes = (batch * (2 * m + 2), batch * (parts + 1) * (4 * m + 7))
    coef, work = torch.empty(sum(sizes), dtype=torch.float64, device=device).split(sizes)
    _dots[(batch * tiles * parts,)](
        *state, *x.vectors, *x.step, tol, work, coef, sums, _tickets(device, batch), n, m, rows, tiles, parts,
        Y_IS_G=x.same, K=k, BLOCK=_TILE // k, M=_slots(m), num_warps=_TILE_WARPS, **_reduction(4 * m + 7),
        MAX_PARTS=triton.next_power_of_2(_programs(device)),
    )  # fmt: skip
    return coef


def _launch_combine(state: State, x: _Operands, coef: Tensor, out: Tensor | None, prev_out: Tensor | None) -> None:
    """Launch the second pass; a short vector gets a tile and warps of its size."""
    batch, m, n = state.s.shape
    block = min(_COMBINE_TILE, max(32, triton.next_power_of_2(n)))
    _combine[(batch * triton.cdiv(n, block),)](
        state.s, state.y, *x.vectors, *x.step, coef, out, prev_out, n, m,
        Y_IS_G=x.same, BLOCK=block, UNROLL=_COMBINE_UNROLL, num_warps=max(1, _COMBINE_WARPS * block // _COMBINE_TILE),
    )  # fmt: skip


def update(
    state: State,
    pair: Pair | None,
    grad: Tensor | None,
    tol: float,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """Offer a pair to the ring and compute the direction, either of them or both; see `reference.update`."""
    batch, m, n = state.s.shape
    g = grad if out is not None else None
    if g is None and pair is None:
        state.stats.zero_()
        return
    prev_out = prev_out if g is not None else None
    x = _operands(pair, g)
    with _triton_support.on(state.s.device):
        if n <= _ONE_PROGRAM:
            # 8 elements of a tile a thread, as above; rows of at least 8, which is a sector of memory in float32.
            slots = _slots(m)
            warps = max(1 if n <= 32 else 2 if n <= 128 else 4 if n <= 1024 else 8, slots // 32)
            block = max(8, min(triton.next_power_of_2(n), 256 * warps // slots))
            _update_one[(batch,)](
                *state, *x.vectors, *x.step, float(tol), out, prev_out, n, m,
                Y_IS_G=x.same, M=slots, BLOCK=block, num_warps=warps,
            )  # fmt: skip
            return
        _launch_combine(state, x, _launch_dots(state, x, float(tol), None), out, prev_out)


def dots(state: State, pair: Pair | None, grad: Tensor | None, out: Tensor) -> None:
    """Sum products over the elements at hand; see `reference.dots`."""
    if grad is None and pair is None:
        out.zero_()
        return
    with _triton_support.on(state.s.device):
        _launch_dots(state, _operands(pair, grad), 0.0, out)


def solve(state: State, dots: Tensor, coefs: Tensor, tol: float, pair: bool, direction: bool) -> None:
    """Compute coefficients from sums; see `reference.solve`."""
    batch, m, _ = state.s.shape
    slots = _slots(m)
    with _triton_support.on(state.s.device):
        _solve[(batch,)](
            *state[2:], dots, coefs, float(tol), m,
            HAS_G=direction, HAS_PAIR=pair, M=slots, num_warps=max(1, slots // 32),
        )  # fmt: skip


def combine(
    state: State,
    pair: Pair | None,
    grad: Tensor | None,
    coefs: Tensor,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """Write an accepted pair and the direction; see `reference.combine`."""
    if out is None and pair is None:
        return
    with _triton_support.on(state.s.device):
        _launch_combine(state, _operands(pair, grad if out is not None else None), coefs, out, prev_out)
