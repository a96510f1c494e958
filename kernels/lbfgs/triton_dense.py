"""Triton kernels of the dense update; the contract is `reference.dense_update`.

Three launches. `_pass`: one program a tile of the triangle makes the update that is due and multiplies the tile by the
vectors, along its rows and along its columns. A tile (i, j) leaves the sums of its rows in line j of a workspace and
those of its columns in line i, so that every entry has one writer: no atomic additions, and results repeat bit for bit.
`_reduce`: adds the lines and takes the dot products; the program that draws the last ticket decides. `_finish`: the
direction and the pair. Bytes: the triangle once in and once out, and 16 n^2 / 64 a vector for the workspace.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from secant.kernels import _triton_support
from secant.kernels.lbfgs.contract import Dense, Pair
from torch import Tensor

#: Rows and columns of a tile, warps; elements of a vector that a program of the other launches takes.
_TILE, _TILE_WARPS, _BLOCK = 64, 8, 256
#: What `_reduce` leaves for `_finish`: accepted, spoilt, scale of H g (gamma of g if spoilt), along s, along H y, and
#: the powers of two over which s and H y are kept.
_DECISION = 7
_SUMS = tl.constexpr(11)  # sy ss yy yw ww s.y_prev sg wg pg gg max|g|
_SMALL = tl.constexpr(torch.finfo(torch.float64).eps)
_TINY = tl.constexpr(torch.finfo(torch.float64).tiny)
_REDUCE_ROWS = 32


@triton.jit
def _only(mask, condition):
    """Masked by a scalar condition; through an integer, as the interpreter gives a scalar comparison the wrong type."""
    return mask & (condition.to(tl.int8) != 0)


@triton.jit
def _change(y, y_prev, at, mask):
    """Entries of y'."""
    v = tl.load(y + at, mask=mask, other=0.0)
    if y_prev is not None:
        v -= tl.load(y_prev + at, mask=mask, other=0.0)
    return v


@triton.jit
def _products(h, strict, v_row, v_column, row, column, inside_row, inside_column, work, n, bi, bj, B: tl.constexpr):
    """Leave the sums of a tile with one vector, in float64, each over B products in the dtype of H."""
    along = tl.sum(h * v_column[None, :], axis=1).to(tl.float64)
    down = tl.sum(tl.where(strict, h, 0.0) * v_row[:, None], axis=0).to(tl.float64)
    if bi == bj:
        tl.store(work + bi * n + row, along + down, mask=inside_row)
    else:
        tl.store(work + bj * n + row, along, mask=inside_row)
        tl.store(work + bi * n + column, down, mask=inside_column)


@triton.jit
def _pass(h, pair, coefs, g, y, y_prev, work, n, blocks, B: tl.constexpr):
    """Make the update that is due on one tile, and multiply."""
    pid = tl.program_id(0).to(tl.int64)
    bi = ((tl.sqrt(8.0 * pid.to(tl.float64) + 1.0) - 1.0) * 0.5).to(tl.int64)
    bi -= (bi * (bi + 1) // 2 > pid).to(tl.int64)
    bi += ((bi + 1) * (bi + 2) // 2 <= pid).to(tl.int64)
    bj = pid - bi * (bi + 1) // 2
    lane = tl.arange(0, B)
    row = bi * B + lane
    column = bj * B + lane
    inside_row = row < n
    inside_column = column < n
    a = tl.load(coefs)
    c_ss = tl.load(coefs + 1)
    c_sw = tl.load(coefs + 2)
    c_ww = tl.load(coefs + 3)
    due = (a != 1.0) | (c_ss != 0.0) | (c_sw != 0.0) | (c_ww != 0.0)
    old = (a != 0.0) & due
    T: tl.constexpr = h.dtype.element_ty
    strict = (row[:, None] > column[None, :]) & inside_row[:, None]
    mask = (row[:, None] >= column[None, :]) & inside_row[:, None]
    at = (row * (row + 1) // 2)[:, None] + column[None, :]
    x = a.to(T) * tl.load(h + at, mask=_only(mask, a != 0.0), other=0.0)
    # What no update reads may hold anything.
    sr = tl.load(pair + row, mask=_only(inside_row, old), other=0.0)
    wr = tl.load(pair + n + row, mask=_only(inside_row, old), other=0.0)
    sc = tl.load(pair + column, mask=_only(inside_column, old), other=0.0)
    wc = tl.load(pair + n + column, mask=_only(inside_column, old), other=0.0)
    c = (c_ss * sr + c_sw * wr).to(T)
    e = (c_sw * sr + c_ww * wr).to(T)
    x += c[:, None] * sc[None, :] + e[:, None] * wc[None, :]
    x += tl.where((row[:, None] == column[None, :]) & mask, tl.load(coefs + 4).to(T), 0.0)
    x = tl.where(mask, x, 0.0)
    tl.store(h + at, x, mask=_only(mask, due))
    if g is not None:
        gr = tl.load(g + row, mask=inside_row, other=0.0)
        gc = tl.load(g + column, mask=inside_column, other=0.0)
        _products(x, strict, gr, gc, row, column, inside_row, inside_column, work, n, bi, bj, B)
        work += blocks * n
    if y is not None:
        yr = _change(y, y_prev, row, inside_row)
        yc = _change(y, y_prev, column, inside_column)
        _products(x, strict, yr, yc, row, column, inside_row, inside_column, work, n, bi, bj, B)


@triton.jit
def _scaling(sy, sbs, yhy, first, power, RULE: tl.constexpr):
    """tau and phi: see `reference.scaling`."""
    one = tl.full((), 1.0, tl.float64)
    tau = one
    phi = one
    if RULE > 0:
        b = sbs / sy
        plain = first | (b <= 0.0) | (tl.abs(b) == float("inf")) | (b != b)
        b = tl.where(plain, one, b)
        shrink = tl.minimum(1.0 / b, one)
        tau = shrink
        if RULE > 1:
            h = yhy / sy
            a = tl.maximum(b * h - 1.0, tl.full((), _SMALL, tl.float64))
            rho = tl.minimum(h / ((1.0 + a) * (1.0 + tl.sqrt(a / (1.0 + a)))), one)
            theta = tl.maximum((rho - 1.0) / a, tl.minimum(1.0 / rho, (1.0 - b) / b))
            sigma = 1.0 + a * theta
            root = tl.exp(tl.log(sigma) * power)
            above = shrink * tl.minimum(root, 1.0 / tl.where(theta > 0.0, theta, one))
            tau = tl.where(theta > 0.0, above, tl.minimum(shrink * root, sigma))
            phi = (1.0 - theta) / sigma
        tau = tl.where(plain, one, tau)
        phi = tl.where(plain, one, phi)
    return tau, phi


@triton.jit
def _power_of_two(square):
    """Halve the exponent: see `reference.power_of_two`."""
    k = ((square.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    return (((k >> 1) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["tol", "power", "t"])
def _reduce(
    work, coefs, count, stats, g, s, y, y_prev, t: tl.float64, t_ptr, hg, wy, partial, decision, ticket,
    tol: tl.float64, power: tl.float64, largest: tl.float64, n, blocks, programs,
    RULE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the lines of the workspace, take the dot products; the last program decides."""
    pid = tl.program_id(0)
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    step = tl.full((), t, tl.float64)
    if t_ptr is not None:
        step = tl.load(t_ptr)
    line = partial + pid * _SUMS
    gd = tl.zeros([BLOCK], tl.float64)
    if g is not None:
        p = tl.zeros([BLOCK], tl.float64)
        at = work + i
        for _ in range(blocks):
            p += tl.load(at, mask=inside, other=0.0)
            at += n
        gd = tl.load(g + i, mask=inside, other=0.0).to(tl.float64)
        tl.store(hg + i, p, mask=inside)
        tl.store(line + 8, tl.sum(p * gd, axis=0))
        tl.store(line + 9, tl.sum(gd * gd, axis=0))
        tl.store(line + 10, tl.max(tl.abs(gd), axis=0))
        work += blocks * n
    if s is not None:
        q = tl.zeros([BLOCK], tl.float64)
        at = work + i
        for _ in range(blocks):
            q += tl.load(at, mask=inside, other=0.0)
            at += n
        sv = tl.load(s + i, mask=inside, other=0.0)
        sd = (sv * step.to(sv.dtype)).to(tl.float64)
        yd = _change(y, y_prev, i, inside).to(tl.float64)
        w = q.to(sv.dtype).to(tl.float64)
        tl.store(wy + i, w, mask=inside)
        tl.store(line + 0, tl.sum(sd * yd, axis=0))
        tl.store(line + 1, tl.sum(sd * sd, axis=0))
        tl.store(line + 2, tl.sum(yd * yd, axis=0))
        tl.store(line + 3, tl.sum(yd * w, axis=0))
        tl.store(line + 4, tl.sum(w * w, axis=0))
        if y_prev is not None:
            before = tl.load(y_prev + i, mask=inside, other=0.0).to(tl.float64)
            tl.store(line + 5, tl.sum(sd * before, axis=0))
        tl.store(line + 6, tl.sum(sd * gd, axis=0))
        tl.store(line + 7, tl.sum(w * gd, axis=0))
    tl.debug_barrier()  # the whole line is written before the ticket is drawn
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        tl.store(ticket, 0)
        column = tl.arange(0, 16)
        acc = tl.zeros([ROWS, 16], tl.float64)
        top = tl.zeros([ROWS, 16], tl.float64)
        for first in range(0, programs, ROWS):
            r = first + tl.arange(0, ROWS)
            mask = (r[:, None] < programs) & (column[None, :] < _SUMS)
            x = tl.load(partial + r[:, None] * _SUMS + column[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            acc += x
            top = tl.maximum(top, x)
        total = tl.sum(acc, axis=0)
        g_max = tl.sum(tl.where(column == 10, tl.max(top, axis=0), 0.0), axis=0)
        one = tl.full((), 1.0, tl.float64)
        zero = tl.full((), 0.0, tl.float64)
        a, c_ss, c_sw, c_ww, delta, gamma, s_unit, w_unit = one, zero, zero, zero, zero, one, one, one
        accepted = tl.full((), 0, tl.int32)
        spoilt = tl.full((), 0, tl.int32)
        held = tl.load(count)
        tl.store(stats + column, tl.zeros([16], tl.float64), mask=column < 10)
        tl.debug_barrier()
        sg = zero
        wg = zero
        if s is not None:
            sy = _pick(total, column, 0)
            ss = _pick(total, column, 1)
            yy = _pick(total, column, 2)
            yhy = _pick(total, column, 3)
            ww = _pick(total, column, 4)
            sbs = zero
            if y_prev is not None:
                sbs = -step * _pick(total, column, 5)
            first = held == 0
            tau, phi = _scaling(sy, sbs, yhy, first, power, RULE)
            scale = tl.where(first, sy / yhy, one) / tau
            n_ss = scale * phi * yhy / sy / sy + 1.0 / sy
            n_sw = -scale * phi / sy
            n_ww = -scale * (1.0 - phi) / yhy
            size = tl.abs(n_ss) * ss + 2.0 * tl.abs(n_sw) * (tl.sqrt(ss) * tl.sqrt(ww)) + tl.abs(n_ww) * ww + scale
            ok = (sy > tl.full((), tol, tl.float64) * (tl.sqrt(ss) * tl.sqrt(yy))) & (yhy > 0.0)
            ok = ok & (yy < float("inf")) & (ss < float("inf")) & (size < tl.full((), largest, tl.float64))
            ok = ok & (ss >= tl.full((), _TINY, tl.float64)) & (ww >= tl.full((), _TINY, tl.float64))
            accepted = ok.to(tl.int32)
            a = tl.where(ok, scale, one)
            c_ss = tl.where(ok, n_ss, zero)
            c_sw = tl.where(ok, n_sw, zero)
            c_ww = tl.where(ok, n_ww, zero)
            gamma = tl.where(ok, sy / yy, one)
            s_unit = tl.where(ok, _power_of_two(ss), one)
            w_unit = tl.where(ok, _power_of_two(ww), one)
            held += accepted
            sg = tl.where(ok, _pick(total, column, 6), zero)
            wg = tl.where(ok, _pick(total, column, 7), zero)
            tl.store(stats + 3, sy)
            tl.store(stats + 4, tl.sqrt(ss))
            tl.store(stats + 5, tl.sqrt(yy))
            tl.store(stats + 6, accepted.to(tl.float64))
            tl.store(stats + 7, yhy)
            tl.store(stats + 8, tl.where(ok, tau, zero))
            tl.store(stats + 9, tl.where(ok, phi, zero))
        along_s = c_ss * sg + c_sw * wg
        along_w = c_sw * sg + c_ww * wg
        if g is not None:
            pg = _pick(total, column, 8)
            gg = _pick(total, column, 9)
            slope = -(a * pg + along_s * sg + along_w * wg)
            descends = slope < 0.0
            bad = (descends.to(tl.int32) == 0) & (gg > 0.0) & (gg < float("inf"))
            spoilt = bad.to(tl.int32)
            tl.store(stats + 0, tl.where(bad, -gamma * gg, slope))
            tl.store(stats + 1, tl.sqrt(gg))
            tl.store(stats + 2, tl.where(gg == gg, g_max, gg))  # max may drop a NaN, the sum of squares keeps it
            tl.store(decision + 2, tl.where(bad, gamma, a))
            a = tl.where(bad, zero, a)
            c_ss = tl.where(bad, zero, c_ss)
            c_sw = tl.where(bad, zero, c_sw)
            c_ww = tl.where(bad, zero, c_ww)
            delta = tl.where(bad, gamma, zero)
            held = tl.where(bad, 0, held)
        tl.store(coefs + 0, a)
        tl.store(coefs + 1, c_ss * (s_unit * s_unit))
        tl.store(coefs + 2, c_sw * (s_unit * w_unit))
        tl.store(coefs + 3, c_ww * (w_unit * w_unit))
        tl.store(coefs + 4, delta)
        tl.store(count, held)
        tl.store(decision + 0, accepted.to(tl.float64))
        tl.store(decision + 1, spoilt.to(tl.float64))
        tl.store(decision + 3, along_s)
        tl.store(decision + 4, along_w)
        tl.store(decision + 5, s_unit)
        tl.store(decision + 6, w_unit)


@triton.jit
def _pick(x, index, at):
    """x[at] of a vector in registers."""
    return tl.sum(tl.where(index == at, x, 0.0), axis=0)


@triton.jit(do_not_specialize=["t"])
def _finish(pair, g, s, t: tl.float64, t_ptr, hg, wy, decision, out, prev_out, n, BLOCK: tl.constexpr):
    """Write the direction, and an accepted pair."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    accepted = tl.load(decision) != 0.0
    spoilt = tl.load(decision + 1) != 0.0
    sd = tl.zeros([BLOCK], tl.float64)
    w = tl.zeros([BLOCK], tl.float64)
    if s is not None:
        step = tl.full((), t, tl.float64)
        if t_ptr is not None:
            step = tl.load(t_ptr)
        keep = _only(inside, accepted)
        sv = tl.load(s + i, mask=keep, other=0.0)
        sv = tl.where(keep, sv * step.to(sv.dtype), 0.0)
        w = tl.load(wy + i, mask=keep, other=0.0)
        sd = sv.to(tl.float64)
        tl.store(pair + i, (sd / tl.load(decision + 5)).to(sv.dtype), mask=keep)
        tl.store(pair + n + i, (w / tl.load(decision + 6)).to(sv.dtype), mask=keep)
    if g is not None:
        gv = tl.load(g + i, mask=inside, other=0.0)
        # Of a spoilt H the products are of no meaning, NaN perhaps.
        p = tl.load(hg + i, mask=_only(inside, spoilt.to(tl.int8) == 0), other=0.0)
        used = spoilt.to(tl.float64)
        p = tl.where(used != 0.0, gv.to(tl.float64), p)
        low = tl.load(decision + 3) * sd + tl.load(decision + 4) * w
        low = tl.where(used != 0.0, 0.0, low)
        d = -(tl.load(decision + 2) * p + low)
        tl.debug_barrier()  # out may be s or g, and prev_out may be y_prev
        tl.store(out + i, d.to(gv.dtype), mask=inside)
        if prev_out is not None:
            tl.store(prev_out + i, gv, mask=inside)


_INTERPRETED = _triton_support.interpreted(_pass)
_ticket_cache: dict[tuple[int, int], Tensor] = {}


def _ticket(device: torch.device) -> Tensor:
    """Return a zeroed counter, one per stream, which every call leaves zeroed; under capture one of the graph."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    if key not in _ticket_cache:
        _ticket_cache[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _ticket_cache[key]


def dense_update(
    state: Dense,
    pair: Pair | None,
    grad: Tensor | None,
    tol: float,
    rule: int,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """Update a dense inverse Hessian and compute the direction; see `reference.dense_update`."""
    device, n = state.h.device, state.pair.shape[-1]
    g = grad if out is not None else None
    prev_out = prev_out if g is not None else None
    s, y, y_prev, t = (None, None, None, 1.0) if pair is None else pair
    step: tuple[Any, ...] = (1.0, t) if isinstance(t, Tensor) else (float(t), None)
    blocks, programs = triton.cdiv(n, _TILE), triton.cdiv(n, _BLOCK)
    products = (g is not None) + (s is not None)
    sizes = (products * blocks * n, n, n, programs * 11, _DECISION)
    work, hg, wy, partial, decision = torch.empty(sum(sizes), dtype=torch.float64, device=device).split(sizes)
    if s is None or y_prev is None or g is None:
        partial.zero_()  # not every sum is taken
    with _triton_support.on(device):
        _pass[(blocks * (blocks + 1) // 2,)](
            state.h, state.pair, state.coefs, g, y, y_prev, work, n, blocks, B=_TILE, num_warps=_TILE_WARPS
        )
        _reduce[(programs,)](
            work, state.coefs, state.count, state.stats, g, s, y, y_prev, *step, hg, wy, partial, decision,
            _ticket(device), float(tol), -1.0 / (n - 1) if n > 1 else 0.0, 0.25 * torch.finfo(state.h.dtype).max,
            n, blocks, programs, RULE=rule, BLOCK=_BLOCK, ROWS=_REDUCE_ROWS, num_warps=4,
        )  # fmt: skip
        _finish[(programs,)](
            state.pair, g, s, *step, hg, wy, decision, out, prev_out, n, BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip
