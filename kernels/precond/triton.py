"""Triton kernels of preconditioned steps and of the Newton iterations; the contract is in `reference.py`.

`_tile`: tiles of at most 64 x 64 (of float64 32 x 32), one a program at a time, and as many programs as fill the
device. A program has room for four tiles in global memory, where it keeps what it multiplies: 16 rows and 16 terms at a
time, as a `tl.dot` of whole tiles in exact arithmetic is unrolled beyond the registers there are. `_entries`: one
program a tile that has no sides, of any size, in two passes of which the second finds its operands in the cache. One
launch a tensor: a kernel takes no array of pointers without a table of them on the device, which would have to be
copied there in every step. Tensors with larger tiles are stepped by `reference.py`, whose products are those of cuBLAS,
and larger matrices are iterated by torch's products.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from secant.kernels import _triton_support
from secant.kernels._triton_support import load as _load
from secant.kernels._triton_support import store as _store
from secant.kernels.precond import reference
from secant.kernels.precond.contract import APPLY, FIXED_RMS, GRAMS, GROWTH, SQUARINGS, Rule, Tensors, eps_of
from secant.kernels.precond.plan import large_newton_inv_root, large_newton_schulz
from torch import Tensor

#: Largest side of a tile, of a tile of float64, and of a matrix that is iterated.
_SIDE, _WIDE_SIDE, _ITERATED = 64, 32, 32
#: Rows of a product at a time.
_ROWS = 16
#: Entries that a program of `_entries` has at a time.
_BLOCK = 1024


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return _triton_support.available(_INTERPRETED)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when tensors of this device and dtype are supported, else the reason why they are not."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"tensors of float32, float64, bfloat16 and float16, not {dtype}"
    return _triton_support.supports(device, _INTERPRETED)


@triton.jit
def _only(mask, condition):
    """Masked by a scalar condition; through an integer, as the interpreter gives a scalar comparison the wrong type."""
    return mask & (condition.to(tl.int8) != 0)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)


@triton.jit
def _multiply(
    to, a, a_row, a_column, b, b_row, b_column, r, k, w,
    ROWS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, LINE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Leave A (r, k) B (k, w) in memory, rows of LINE entries, by ROWS rows and 16 terms at a time."""
    j = tl.arange(0, W)
    for first_row in range(0, R, ROWS):
        i = first_row + tl.arange(0, ROWS)
        acc = tl.zeros([ROWS, W], C)
        for first in range(0, k, 16):
            t = first + tl.arange(0, 16)
            left = _load(a + i[:, None] * a_row + t[None, :] * a_column, (i < r)[:, None] & (t < k)[None, :], C)
            right = _load(b + t[:, None] * b_row + j[None, :] * b_column, (t < k)[:, None] & (j < w)[None, :], C)
            acc += _dot(left, right)
        tl.store(to + i[:, None] * LINE + j[None, :], acc)
    tl.debug_barrier()


@triton.jit
def _kept(at, R: tl.constexpr, W: tl.constexpr, LINE: tl.constexpr):
    """Read a tile that has been left in memory."""
    return tl.load(at + tl.arange(0, R)[:, None] * LINE + tl.arange(0, W)[None, :])


@triton.jit
def _keep(to, x, R: tl.constexpr, W: tl.constexpr, LINE: tl.constexpr):
    """Leave a tile where all threads of the program read it."""
    tl.store(to + tl.arange(0, R)[:, None] * LINE + tl.arange(0, W)[None, :], x)
    tl.debug_barrier()


@triton.jit
def _squares(x):
    return tl.sum(tl.sum(x * x, axis=1), axis=0)


@triton.jit
def _root_of(x):
    """Compute the square root to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _over(x, y):
    """Divide, to nearest."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _begin(size, pieces, i):
    """Compute where a piece of a side begins."""
    return i * (size // pieces) + tl.minimum(i, size % pieces)


@triton.jit
def _number(value, ptr):
    """Read a number, or what a tensor holds, in float64."""
    if ptr is None:
        return tl.full((), value, tl.float64)
    else:
        return tl.load(ptr).to(tl.float64)


@triton.jit
def _unbias(beta: tl.float64, t):
    """1 / (1 - beta^t)."""
    power = tl.exp(tl.log(tl.full((), beta, tl.float64)) * t)
    return 1.0 / (1.0 - tl.where(tl.full((), beta, tl.float64) > 0.0, power, 0.0))


@triton.jit
def _mixed(old, new, beta: tl.float64, C: tl.constexpr):
    """Beta old + (1 - beta) new."""
    return tl.full((), beta, tl.float64).to(C) * old + (1.0 - tl.full((), beta, tl.float64)).to(C) * new


@triton.jit
def _average(packed, product, size, i, LINE: tl.constexpr, good, beta_gram: tl.float64, C: tl.constexpr):
    """Update a Gram average, of which the lower triangle is stored."""
    at = packed + (i[:, None] * (i[:, None] + 1) // 2 + i[None, :])
    mask = _only((i[:, None] < size) & (i[None, :] <= i[:, None]), good)
    new = tl.load(product + i[:, None] * LINE + i[None, :])
    _store(at, _mixed(_load(at, mask, C), new, beta_gram, C), mask)


@triton.jit
def _adam(m, v, mask, unbias1, unbias2, eps: tl.float64, C: tl.constexpr):
    """Compute A = M^ / (sqrt(V^) + eps), zero outside."""
    below = _root_of(v * unbias2.to(C)) + tl.full((), eps, tl.float64).to(C)
    return tl.where(mask, _over(m * unbias1.to(C), tl.where(mask, below, 1.0)), 0.0)


@triton.jit(do_not_specialize=["count", "lr"])
def _tile(
    param, grad, exp_avg, exp_avg_sq, left, right, left_root, right_root, count: tl.float64, count_ptr,
    lr: tl.float64, lr_ptr, skipped, beta1: tl.float64, beta2: tl.float64, beta_gram: tl.float64, eps: tl.float64,
    weight_decay: tl.float64, rms: tl.float64, scratch, tiles,
    rows, columns, down, across, row_stride, column_stride,
    GRAFT: tl.constexpr, ROTATE: tl.constexpr, MAXIMIZE: tl.constexpr, APPLY: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Step tiles with a side that is preconditioned, one after the other."""
    nl, nr = (rows + down - 1) // down, (columns + across - 1) // across
    i, j = tl.arange(0, R), tl.arange(0, W)
    P: tl.constexpr = R if R > W else W
    SIZE: tl.constexpr = P * P
    kept_g = scratch + tl.program_id(0).to(tl.int64) * (4 * SIZE)
    kept_m, kept, other = kept_g + SIZE, kept_g + 2 * SIZE, kept_g + 3 * SIZE
    for number in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        first_row, first_column = _begin(rows, down, number // across), _begin(columns, across, number % across)
        r = (_begin(rows, down, number // across + 1) - first_row).to(tl.int32)
        w = (_begin(columns, across, number % across + 1) - first_column).to(tl.int32)
        inside = (i < r)[:, None] & (j < w)[None, :]
        row, column = (first_row + i)[:, None].to(tl.int64), (first_column + j)[None, :].to(tl.int64)
        g = _load(grad + (row * row_stride + column * column_stride), inside, C)
        if MAXIMIZE:
            g = -g
        good = _squares(g) < float("inf")
        tl.debug_barrier()  # the last tile has been read
        if APPLY:
            m = _mixed(_load(exp_avg + (row * columns + column), inside, C), g, beta1, C)
            _keep(kept_m, m, R, W, P)
        _keep(kept_g, g, R, W, P)
        if left is not None:
            _multiply(kept, kept_g, P, 1, kept_g, 1, P, r, w, r, ROWS, R, R, P, C)
            _average(left + number * (nl * (nl + 1) // 2), kept, r, i, P, good, beta_gram, C)
        if right is not None:
            _multiply(other, kept_g, 1, P, kept_g, P, 1, w, r, w, ROWS, W, W, P, C)
            _average(right + number * (nr * (nr + 1) // 2), other, w, j, P, good, beta_gram, C)
        if APPLY:
            t = _number(count, count_ptr)
            unbias1, unbias2 = _unbias(beta1, t), _unbias(beta2, t)
            # What becomes the step, and of SOAP the gradient whose squares V averages.
            a, b = left_root, right_root
            at, of_g = kept_m, kept_g
            tl.debug_barrier()  # both products have been read
            if right_root is not None:
                b += number * nr * nr
                _multiply(kept, kept_m, P, 1, b, nr, 1, r, w, w, ROWS, R, W, P, C)
                at = kept
                if ROTATE:
                    _multiply(other, kept_g, P, 1, b, nr, 1, r, w, w, ROWS, R, W, P, C)
                    of_g = other
            if left_root is not None:
                a += number * nl * nl
                if ROTATE:
                    # Into the places of M and G, which are made again from what they are made of.
                    to_m = kept_m if right_root is not None else kept
                    to_g = kept_g if right_root is not None else other
                    _multiply(to_m, a, 1, nl, at, P, 1, r, r, w, ROWS, R, W, P, C)
                    _multiply(to_g, a, 1, nl, of_g, P, 1, r, r, w, ROWS, R, W, P, C)
                    at, of_g = to_m, to_g
                else:
                    _multiply(other, a, nl, 1, at, P, 1, r, r, w, ROWS, R, W, P, C)
                    at = other
            row, column = (first_row + i)[:, None].to(tl.int64), (first_column + j)[None, :].to(tl.int64)
            held = row * columns + column
            scale = unbias1.to(C)
            if ROTATE:
                p, turned = _kept(at, R, W, P), _kept(of_g, R, W, P)
                v = _mixed(_load(exp_avg_sq + held, inside, C), turned * turned, beta2, C)
                p = _adam(p, v, inside, unbias1, unbias2, eps, C)
                tl.debug_barrier()
                _keep(kept, p, R, W, P)
                at = kept
                if left_root is not None:
                    _multiply(other, a, nl, 1, kept, P, 1, r, r, w, ROWS, R, W, P, C)
                    at = other
                if right_root is not None:
                    to = kept if left_root is not None else other
                    _multiply(to, at, P, 1, b, 1, nr, r, w, w, ROWS, R, W, P, C)
                    at = to
                p = _kept(at, R, W, P)
                scale = tl.full((), 1.0, C)
            elif GRAFT > 0:
                m = _kept(kept_m, R, W, P)
                if GRAFT == 1:
                    g = _kept(kept_g, R, W, P)
                    v = _mixed(_load(exp_avg_sq + held, inside, C), g * g, beta2, C)
                    length = _root_of(_squares(_adam(m, v, inside, unbias1, unbias2, eps, C)))
                elif GRAFT == 2:
                    length = unbias1.to(C) * _root_of(_squares(m))
                else:
                    length = (tl.full((), rms, tl.float64) * tl.sqrt(r.to(tl.float64) * w.to(tl.float64))).to(C)
                tl.debug_barrier()  # what follows is read again, as it would not all stay in registers
                p = _kept(at, R, W, P)
                own = _root_of(_squares(p))
                scale = tl.where(own == 0.0, 0.0, _over(length, tl.where(own == 0.0, 1.0, own)))
            else:
                p = _kept(at, R, W, P)
            good = good & (scale * scale * _squares(p) < float("inf"))
            mask = _only(inside, good)
            if exp_avg_sq is not None:
                if not ROTATE:
                    g = _kept(kept_g, R, W, P)
                    v = _mixed(_load(exp_avg_sq + held, inside, C), g * g, beta2, C)
                _store(exp_avg_sq + held, v, mask)
            rate = _number(lr, lr_ptr)
            given = row * row_stride + column * column_stride
            old = _load(param + given, mask, C)
            decay = (1.0 - rate * tl.full((), weight_decay, tl.float64)).to(C)
            _store(param + given, decay * old - rate.to(C) * scale * p, mask)
            if ROTATE:
                g = _load(grad + given, inside, C)
                if MAXIMIZE:
                    g = -g
                m = _mixed(_load(exp_avg + held, inside, C), g, beta1, C)
            else:
                m = _kept(kept_m, R, W, P)
            _store(exp_avg + held, m, mask)
            tl.atomic_add(skipped, 1 - good.to(tl.int64))


@triton.jit(do_not_specialize=["count", "lr"])
def _entries(
    param, grad, exp_avg, exp_avg_sq, count: tl.float64, count_ptr, lr: tl.float64, lr_ptr, skipped,
    beta1: tl.float64, beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64,
    rows, columns, down, across, row_stride, column_stride,
    MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Step one tile by Adam."""
    number = tl.program_id(0).to(tl.int64)
    first_row, first_column = _begin(rows, down, number // across), _begin(columns, across, number % across)
    r = _begin(rows, down, number // across + 1) - first_row
    w = _begin(columns, across, number % across + 1) - first_column
    t, rate = _number(count, count_ptr), _number(lr, lr_ptr)
    unbias1, unbias2 = _unbias(beta1, t), _unbias(beta2, t)
    decay = (1.0 - rate * tl.full((), weight_decay, tl.float64)).to(C)
    of_g, of_p = tl.zeros([BLOCK], C), tl.zeros([BLOCK], C)
    good = tl.full((), 1, tl.int8) != 0
    for turn in tl.static_range(2):
        for first in range(0, r * w, BLOCK):
            k = first + tl.arange(0, BLOCK)
            mask = k < r * w
            row, column = first_row + k // w, first_column + k % w
            given, held = row * row_stride + column * column_stride, row * columns + column
            g = _load(grad + given, mask, C)
            if MAXIMIZE:
                g = -g
            m = _mixed(_load(exp_avg + held, mask, C), g, beta1, C)
            v = _mixed(_load(exp_avg_sq + held, mask, C), g * g, beta2, C)
            p = _adam(m, v, mask, unbias1, unbias2, eps, C)
            if turn == 0:
                of_g += g * g
                of_p += p * p
            else:
                mask = _only(mask, good)
                old = _load(param + given, mask, C)
                _store(param + given, decay * old - rate.to(C) * p, mask)
                _store(exp_avg + held, m, mask)
                _store(exp_avg_sq + held, v, mask)
        if turn == 0:
            good = (tl.sum(of_g, axis=0) < float("inf")) & (tl.sum(of_p, axis=0) < float("inf"))
            tl.debug_barrier()
    tl.atomic_add(skipped, 1 - good.to(tl.int64))


@triton.jit
def _newton_schulz(
    x, out, m, n, row, column, steps, a: tl.float64, b: tl.float64, c: tl.float64, eps: tl.float64,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Iterate one matrix of m rows, m <= n, in registers."""
    start = tl.program_id(0).to(tl.int64) * m * n
    i, j = tl.arange(0, M), tl.arange(0, N)
    mask = (i < m)[:, None] & (j < n)[None, :]
    at = start + i[:, None] * row + j[None, :] * column
    y = _load(x + at, mask, C)
    # The norm from scaled entries, so that squares neither overflow nor vanish.
    top = tl.max(tl.max(tl.abs(y), axis=1), axis=0)
    y = _over(y, tl.where(top > 0.0, top, 1.0).to(C) + tl.zeros_like(y))
    top = tl.where(top > 0.0, top, 1.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(tl.sum(y.to(tl.float64) * y.to(tl.float64), axis=1), axis=0)) * top
    small = tl.full((), eps, tl.float64)
    y *= (top / tl.where(norm <= small, small, norm)).to(C)
    of_x, of_gram = tl.full((), a, tl.float64).to(C), tl.full((), b, tl.float64).to(C)
    of_square = tl.full((), c, tl.float64).to(C)
    for _ in range(steps):
        gram = _dot(y, tl.trans(y))
        y = of_x * y + _dot(of_gram * gram + of_square * _dot(gram, gram), y)
    _store(out + at, y, mask)


@triton.jit
def _norm(x):
    """|x|_F, in float64."""
    wide = x.to(tl.float64)
    return tl.sqrt(_squares(wide))


@triton.jit
def _newton_root(
    a, out, info, n, steps, damping: tl.float64, tolerance: tl.float64, growth: tl.float64, most: tl.float64,
    POWER: tl.constexpr, SQUARE: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Iterate one matrix of n rows in registers."""
    start = tl.program_id(0).to(tl.int64) * n * n
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    inside = (i < n) & (j < n)
    eye = tl.where((i == j) & inside, 1.0, 0.0).to(C)
    x = _load(a + start + tl.maximum(i, j) * n + tl.minimum(i, j), inside, C)
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    finite = tl.sum(tl.sum(x - x, axis=1), axis=0) == 0.0  # else NaN
    there = finite & (largest > 0.0)
    top = tl.where(there, largest, 1.0)
    m = tl.where(there, _over(x, top + tl.zeros_like(x)), eye)
    factor = _norm(m)
    size, part, t = factor, tl.full((), 1.0, tl.float64), m
    for _ in tl.static_range(SQUARE):
        t *= (1.0 / factor).to(C)
        t = _dot(t, t)
        factor = _norm(t)
        part *= 0.5
        size *= tl.exp(tl.log(factor) * part)
    shift = tl.full((), damping, tl.float64)
    z = (POWER + 1) / (2.0 * (1.0 + shift) * size)
    m = z.to(C) * (m + (shift * size).to(C) * eye)
    x = eye
    k = 0
    code = steps
    last = tl.full((), float("inf"), tl.float64)
    busy = tl.full((), 1, tl.int32)
    while busy > 0:
        t = (eye - m) * (1.0 / POWER)
        error = POWER * _norm(t)
        grown = (error <= growth * last).to(tl.int32) == 0
        t += eye
        x = tl.where(grown, x, _dot(x, t))
        reached = (error <= tolerance) & (grown.to(tl.int32) == 0)
        if POWER > 1:
            t = _dot(t, t)
        if POWER > 2:
            t = _dot(t, t)
        m = _dot(t, m)
        code = tl.where(grown, k, tl.where(reached, 0, code))
        last = error
        k += 1
        busy = tl.where(grown | reached | (k >= steps), 0, 1)
    scale = z / top.to(tl.float64)
    if POWER > 1:
        scale = tl.sqrt(scale)
    if POWER > 2:
        scale = tl.sqrt(scale)
    half = (tl.minimum(scale, tl.full((), most, tl.float64)) * 0.5).to(C)
    x = tl.where(there, half * (x + tl.trans(x)), 0.0)
    _store(out + start + i * n + j, x, inside)
    tl.store(info + tl.program_id(0), tl.where(there, code, tl.where(finite, 0, -1)))


_INTERPRETED = _triton_support.interpreted(_tile)


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that fill the device."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _given(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _scalar(x: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """Return the value of a number or of a tensor on the host, or else the tensor, whose value stays where it is."""
    if not isinstance(x, Tensor):
        return float(x), None
    return (1.0, x) if x.device == device and device.type != "cpu" else (x.item(), None)


def step(tensors: Tensors, layout: Tensor, lr: float | Tensor, rule: Rule, phases: int, skipped: Tensor) -> None:
    """Update Gram averages and momenta, precondition, graft, and write the parameters back; see `reference.step`."""
    device, dtype = tensors.params[0].device, tensors.params[0].dtype
    arithmetic = tl.float64 if dtype is torch.float64 else tl.float32
    rate, eps = _scalar(lr, device), eps_of(rule, dtype)
    with _triton_support.on(device):
        for k, place in enumerate(layout.tolist()):
            param, grad, exp_avg, exp_avg_sq, *sides, count = (members[k] for members in tensors)
            rows, columns, down, across = place[:4]
            left, right, left_root, right_root = (_given(x) for x in sides)
            numbers = (*_scalar(count, device), *rate, skipped)
            if left_root is None and right_root is None:
                if phases & APPLY:
                    _entries[(down * across,)](
                        param, grad, exp_avg, exp_avg_sq, *numbers, rule.beta1, rule.beta2, eps, rule.weight_decay,
                        *place, MAXIMIZE=rule.maximize, BLOCK=_BLOCK, C=arithmetic, num_warps=4,
                    )  # fmt: skip
                continue
            r, w = -(-rows // down), -(-columns // across)
            if max(r, w) > (_WIDE_SIDE if dtype is torch.float64 else _SIDE):
                one = Tensors(*([members[k]] for members in tensors))
                reference.step(one, layout[k : k + 1], lr, rule, phases, skipped)
                continue
            if not phases & GRAMS:
                left = right = None
            sizes = {"R": max(16, triton.next_power_of_2(r)), "W": max(16, triton.next_power_of_2(w))}
            warps = min(8, sizes["R"] * sizes["W"] // 256)
            tiles = down * across
            programs = min(tiles, _programs(device))
            scratch = torch.empty(
                4 * programs * max(sizes["R"], sizes["W"]) ** 2,
                dtype=torch.float64 if dtype is torch.float64 else torch.float32,
                device=device,
            )
            _tile[(programs,)](
                param, grad, exp_avg, _given(exp_avg_sq), left, right, left_root, right_root, *numbers,
                rule.beta1, rule.beta2, rule.beta_gram, eps, rule.weight_decay, FIXED_RMS, scratch, tiles, *place,
                GRAFT=rule.graft, ROTATE=rule.rotate, MAXIMIZE=rule.maximize, APPLY=bool(phases & APPLY),
                C=arithmetic, ROWS=min(_ROWS, sizes["R"], sizes["W"]), num_warps=warps, **sizes,
            )  # fmt: skip


def newton_schulz(x: Tensor, steps: int, a: float, b: float, c: float, eps: float, out: Tensor) -> None:
    """Iterate X <- a X + (b A + c A^2) X with A = X X^T, from x / |x|_F; see `reference.newton_schulz`."""
    batch, m, n = x.shape
    short, long = sorted((m, n))
    if long > _ITERATED:
        large_newton_schulz(x, steps, a, b, c, eps, out)
        return
    strides = (n, 1) if m <= n else (1, n)
    sizes: dict[str, Any] = {"M": max(16, triton.next_power_of_2(short)), "N": max(16, triton.next_power_of_2(long))}
    sizes["C"] = tl.float64 if x.dtype is torch.float64 else tl.float32
    warps = sizes["M"] * sizes["N"] // 256
    with _triton_support.on(x.device):
        _newton_schulz[(batch,)](x, out, short, long, *strides, steps, a, b, c, eps, num_warps=warps, **sizes)


def newton_inv_root(a: Tensor, p: int, damping: float, steps: int, tolerance: float, out: Tensor, info: Tensor) -> None:
    """out = (A + damping |A| I)^(-1/p) by the coupled Newton iteration; see `reference.newton_inv_root`."""
    batch, n, _ = a.shape
    if n > _ITERATED:
        large_newton_inv_root(a, p, damping, steps, tolerance, out, info)
        return
    side = max(16, triton.next_power_of_2(n))
    arithmetic, dtype = (tl.float64, torch.float64) if a.dtype is torch.float64 else (tl.float32, torch.float32)
    with _triton_support.on(a.device):
        _newton_root[(batch,)](
            a, out, info, n, steps, damping, tolerance, GROWTH, torch.finfo(dtype).max,
            POWER=p, SQUARE=SQUARINGS, N=side, C=arithmetic, num_warps=side * side // 256,
        )  # fmt: skip
