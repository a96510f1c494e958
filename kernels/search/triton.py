"""Triton kernels of line searches; the contract is in `reference.py`.

One launch a call: a program of one warp has 32 problems, one for each thread, which runs the machine as masked
arithmetic, as in the reference, and goes over its own rows entry by entry: 32 rows lie in the cache while that lasts.
(With rows shared by threads the compiler lays the machine out as it does the rows, many problems a thread, and spills.)
Nothing is fused (`enable_fp_fusion`), so that the decisions are those of every backend.
What a program has read it may overwrite once all of its threads have read it: hence the barrier before each store.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from secant.kernels import _triton_support
from secant.kernels.search.contract import Rule, Search
from torch import Tensor

#: Problems of a program.
_PROBLEMS = 32


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return _triton_support.available(_INTERPRETED)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when tensors of this device and dtype are supported, else the reason why they are not."""
    if dtype not in (torch.float32, torch.float64):
        return f"points of float32 and float64, not {dtype}"
    return _triton_support.supports(device, _INTERPRETED)


@triton.jit
def _not(mask):
    """Negate; through an integer, as the interpreter's masks are of several types."""
    return mask.to(tl.int8) == 0


@triton.jit
def _is_finite(x):
    return x - x == 0.0


@triton.jit
def _clamped(t, low, high):
    """As torch's minimum(maximum(t, low), high): what is not a number stays so."""
    t = tl.where(t < low, low, t)
    return tl.where(t > high, high, t)


@triton.jit
def _cubic_minimizer(at, av, a_slope, bt, bv, b_slope, low, high):
    ordered = at <= bt
    left_t, right_t = tl.where(ordered, at, bt), tl.where(ordered, bt, at)
    left, right = tl.where(ordered, av, bv), tl.where(ordered, bv, av)
    left_slope, right_slope = tl.where(ordered, a_slope, b_slope), tl.where(ordered, b_slope, a_slope)
    width = right_t - left_t
    d1 = left_slope + right_slope + 3.0 * (left - right) / width
    square = d1 * d1 - left_slope * right_slope
    good = (square >= 0.0) & (width != 0.0)
    d2 = tl.sqrt(tl.where(good, square, 0.0))
    numerator, denominator = right_slope + d2 - d1, right_slope - left_slope + 2.0 * d2
    t = right_t - width * (numerator / tl.where(denominator != 0.0, denominator, 1.0))
    straight = tl.where(numerator > 0.0, low, tl.where(numerator < 0.0, high, float("nan")))
    t = tl.where(denominator != 0.0, t, straight)
    return tl.where(good & (t == t), _clamped(t, low, high), 0.5 * (low + high))


@triton.jit
def _minimizer(at, av, a_slope, bt, bv, b_slope, least, most, noise):
    """Minimize the cubic, or, where the values are equal, follow the secant through the slopes."""
    cubic = _cubic_minimizer(at, av, a_slope, bt, bv, b_slope, least, most)
    equal = (noise > 0.0) & (tl.abs(av - bv) <= noise)
    differ = a_slope != b_slope
    secant = bt - b_slope * (bt - at) / tl.where(differ, b_slope - a_slope, 1.0)
    return tl.where(equal, tl.where(differ, _clamped(secant, least, most), most), cubic)


@triton.jit
def _seats(rows, count, batch, P: tl.constexpr):
    """Find the places of a program's rows: among the rows, among all problems, and whether they are any."""
    i = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = i < count
    if rows is None:
        p = i
    else:
        p = tl.load(rows + i, mask=inside, other=-1)
    here = inside & (p >= 0) & (p < batch)
    return i, tl.where(here, p, 0), here


@triton.jit(do_not_specialize=["count", "batch", "max_trials", "max_iter", "max_nfev"])
def _advance(
    x, g, d, kept, trial, step, numbers, counts, rows, value, grad, count, batch, n,
    c1: tl.float64, c2: tl.float64, tolerance: tl.float64, ftol: tl.float64, max_trials, max_iter, max_nfev,
    P: tl.constexpr,
):  # fmt: skip
    """Take what the trials of P problems brought."""
    i, p, here = _seats(rows, count, batch, P)
    apart = tl.zeros([1], tl.int64) + batch
    number, counter = numbers + p, counts + p
    status = tl.load(counter + 3 * apart, mask=here, other=0)
    flags = tl.load(counter + 2 * apart, mask=here, other=0)
    here = here & (status == -1) & ((flags & 8) == 0)
    slope = tl.zeros([P], tl.float64)
    for k in range(n):
        a = tl.load(grad + i * n + k, mask=here, other=0.0).to(tl.float64)
        slope += a * tl.load(d + p * n + k, mask=here, other=0.0).to(tl.float64)

    start, start_slope = tl.load(number, mask=here, other=0.0), tl.load(number + apart, mask=here, other=0.0)
    t, noise = tl.load(number + 2 * apart, mask=here, other=0.0), tl.load(number + 14 * apart, mask=here, other=0.0)
    size = tl.load(number + 13 * apart, mask=here, other=0.0)
    last_t, last = tl.load(number + 3 * apart, mask=here, other=0.0), tl.load(number + 4 * apart, mask=here, other=0.0)
    last_slope = tl.load(number + 5 * apart, mask=here, other=0.0)
    low_t, low = tl.load(number + 6 * apart, mask=here, other=0.0), tl.load(number + 7 * apart, mask=here, other=0.0)
    low_slope = tl.load(number + 8 * apart, mask=here, other=0.0)
    high_t, high = tl.load(number + 9 * apart, mask=here, other=0.0), tl.load(number + 10 * apart, mask=here, other=0.0)
    high_slope = tl.load(number + 11 * apart, mask=here, other=0.0)
    fraction = tl.load(number + 12 * apart, mask=here, other=0.0)
    kept_t = tl.load(number + 15 * apart, mask=here, other=0.0)
    kept_value = tl.load(number + 16 * apart, mask=here, other=0.0)
    used, blind = tl.load(counter, mask=here, other=0), tl.load(counter + apart, mask=here, other=0)
    nit, nfev = tl.load(counter + 4 * apart, mask=here, other=0), tl.load(counter + 5 * apart, mask=here, other=0)
    brought = tl.load(value + i, mask=here, other=0.0)

    finite = _is_finite(brought) & _is_finite(slope)
    new, slope = tl.where(finite, brought, float("inf")), tl.where(finite, slope, float("nan"))
    is_first = used == 0
    last_t, last = tl.where(is_first, 0.0, last_t), tl.where(is_first, start, last)
    last_slope = tl.where(is_first, start_slope, last_slope)
    kept_t = tl.where(is_first, 0.0, kept_t)
    used, nfev = used + 1, nfev + 1
    zooms, near_end, low_is_first = (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0
    noisy, spent = noise > 0.0, used >= max_trials
    fine = (new <= start + noise) & (slope <= (2.0 * c1 - 1.0) * start_slope)
    decreases = (new <= start + c1 * t * start_slope) | (noisy & fine)
    is_flat = tl.abs(slope) <= -c2 * start_slope

    # Algorithm 3.5: lengthen the step until a bracket or an acceptable point appears.
    brackets = _not(zooms) & _not(spent)
    rises = _not(decreases) | ((used > 2) & (new >= last + noise))
    meets = brackets & _not(rises) & is_flat
    enters = brackets & _not(meets) & (rises | (slope >= 0.0))
    grows = brackets & _not(meets) & _not(enters)
    same_start = noisy & (new == start) & (slope == start_slope)
    lower = (new < start + noise) & _not(same_start)
    ran_out = _not(zooms) & spent
    same_last = noisy & (new == last) & (slope == last_slope)
    longer = _minimizer(last_t, last, last_slope, t, new, slope, t + 0.01 * (t - last_t), 10.0 * t, noise)
    longer = tl.where(same_last, 10.0 * t, longer)

    # Algorithm 3.6: shrink the bracket. Which end is low is a matter of values alone, but a tie goes to the first.
    stands = zooms & noisy & (new == low) & (slope == low_slope)
    shrinks = zooms & _not(stands)
    worse = shrinks & (_not(decreases) | (new >= low + noise))
    found = shrinks & _not(worse) & is_flat
    better = shrinks & _not(worse) & _not(found)
    turns = better & (slope * (high_t - low_t) >= 0.0)
    swaps = worse & ((low_is_first & (new < low)) | (_not(low_is_first) & (new <= low)))
    first_lower = last <= new
    from_low, takes = turns | swaps, better | swaps
    high_t = tl.where(from_low, low_t, tl.where(worse, t, high_t))
    high = tl.where(from_low, low, tl.where(worse, new, high))
    high_slope = tl.where(from_low, low_slope, tl.where(worse, slope, high_slope))
    low_t, low = tl.where(takes, t, low_t), tl.where(takes, new, low)
    low_slope = tl.where(takes, slope, low_slope)
    # Entering: the ends are (last, new).
    of_new, of_last = enters & _not(first_lower), enters & first_lower
    high_t = tl.where(of_last, t, tl.where(of_new, last_t, high_t))
    high = tl.where(of_last, new, tl.where(of_new, last, high))
    high_slope = tl.where(of_last, slope, tl.where(of_new, last_slope, high_slope))
    low_t = tl.where(of_last, last_t, tl.where(of_new, t, low_t))
    low = tl.where(of_last, last, tl.where(of_new, new, low))
    low_slope = tl.where(of_last, last_slope, tl.where(of_new, slope, low_slope))
    kept_order = (low_is_first & _not(swaps)) | (_not(low_is_first) & swaps)
    low_is_first = (enters & first_lower) | (_not(enters) & kept_order)
    fraction = tl.where(enters | better, 1.0, fraction)
    near_end = near_end & _not(enters)
    blind = tl.where(enters, 0, blind)

    going = enters | worse | better
    left, right = tl.where(high_t < low_t, high_t, low_t), tl.where(high_t < low_t, low_t, high_t)
    narrow = ((right - left) * size < tolerance) | (right == left)
    infinite = high == float("inf")
    fraction = tl.where(going & _not(narrow) & infinite, 0.5 * fraction, fraction)
    inner = _minimizer(
        tl.where(low_is_first, low_t, high_t), tl.where(low_is_first, low, high),
        tl.where(low_is_first, low_slope, high_slope), tl.where(low_is_first, high_t, low_t),
        tl.where(low_is_first, high, low), tl.where(low_is_first, high_slope, low_slope), left, right, noise,
    )  # fmt: skip
    # Trials may come within a tenth of the width of an end once, and are then put a tenth away from it.
    margin = 0.1 * (right - left)
    inside = (right - inner >= margin) & (inner - left >= margin)
    once = _not(inside) & _not(near_end) & (left < inner) & (inner < right)
    away = tl.where(right - inner < inner - left, right - margin, left + margin)
    inner = tl.where(inside | once, inner, away)
    settles = going & _not(narrow) & _not(infinite)
    near_end = (settles & once) | (_not(settles) & near_end)
    inner = tl.where(infinite, low_t + fraction * (high_t - low_t), inner)
    blind += (going & _not(narrow) & (-inner * start_slope <= noise)).to(tl.int32)
    ends = stands | (going & (narrow | (blind > 5) | spent))
    gained = (low < start) | (tl.abs(low_slope) < -start_slope) | _not(noisy)

    takes_new = meets | found | (ran_out & lower)
    takes_start = (ran_out & _not(lower)) | (ends & _not(gained))
    done = takes_new | takes_start | ends
    keeps = grows | takes | of_new
    kept_t, kept_value = tl.where(keeps, t, kept_t), tl.where(keeps, brought, kept_value)
    length = tl.where(done, tl.where(takes_new, t, tl.where(takes_start, 0.0, kept_t)), 0.0)
    moved = length > 0.0
    next_of_start = tl.where(moved, tl.where(takes_new, brought, kept_value), start)
    nit += moved.to(tl.int32)
    last_t, last = tl.where(grows, t, last_t), tl.where(grows, new, last)
    last_slope = tl.where(grows, slope, last_slope)
    t = tl.where(grows, longer, tl.where(going & _not(ends), inner, t))

    status = tl.where(nfev >= max_nfev, 3, -1)
    status = tl.where(nit >= max_iter, 2, status)
    most = tl.where(tl.abs(next_of_start) > tl.abs(start), tl.abs(next_of_start), tl.abs(start))
    most = tl.where(most > 1.0, most, 1.0)
    little = moved & (ftol + tl.zeros_like(t) > 0.0) & (tl.abs(next_of_start - start) <= ftol * most)
    status = tl.where(moved, tl.where(little, 1, status), 4)
    status = tl.where(done, status, -1)
    zooms = zooms | enters
    flags = zooms.to(tl.int32) + 2 * near_end.to(tl.int32) + 4 * low_is_first.to(tl.int32)
    flags = tl.where(done, 8, flags)

    tl.debug_barrier()  # all has been read
    tl.store(step + p, length, mask=here)
    tl.store(number, next_of_start, mask=here)
    tl.store(number + 2 * apart, t, mask=here)
    tl.store(number + 3 * apart, last_t, mask=here)
    tl.store(number + 4 * apart, last, mask=here)
    tl.store(number + 5 * apart, last_slope, mask=here)
    tl.store(number + 6 * apart, low_t, mask=here)
    tl.store(number + 7 * apart, low, mask=here)
    tl.store(number + 8 * apart, low_slope, mask=here)
    tl.store(number + 9 * apart, high_t, mask=here)
    tl.store(number + 10 * apart, high, mask=here)
    tl.store(number + 11 * apart, high_slope, mask=here)
    tl.store(number + 12 * apart, fraction, mask=here)
    tl.store(number + 15 * apart, kept_t, mask=here)
    tl.store(number + 16 * apart, kept_value, mask=here)
    tl.store(counter, used, mask=here)
    tl.store(counter + apart, blind, mask=here)
    tl.store(counter + 2 * apart, flags, mask=here)
    tl.store(counter + 3 * apart, status, mask=here)
    tl.store(counter + 4 * apart, nit, mask=here)
    tl.store(counter + 5 * apart, nfev, mask=here)

    goes_on, moved, keeps = here & _not(done), here & moved, here & keeps
    from_grad = takes_new | keeps
    along = tl.where(goes_on, t, length).to(x.dtype.element_ty)
    goes_or_moved = goes_on | moved
    for k in range(n):
        at = p * n + k
        fresh = tl.load(grad + i * n + k, mask=here, other=0.0)
        of_kept = tl.load(kept + at, mask=moved & _not(from_grad), other=0.0)
        there = tl.load(x + at, mask=goes_or_moved, other=0.0)
        there += along * tl.load(d + at, mask=goes_or_moved, other=0.0)
        tl.store(kept + at, fresh, mask=keeps & goes_on)
        tl.store(g + at, tl.where(from_grad, fresh, of_kept), mask=moved)
        tl.store(x + at, there, mask=moved)
        tl.store(trial + at, there, mask=goes_on)


@triton.jit(do_not_specialize=["count", "batch", "slope_stride", "g_max_stride", "t_stride"])
def _begin(
    x, d, trial, step, numbers, counts, rows, slope, slope_stride, g_max, g_max_stride, t, t_stride, count, batch, n,
    eps: tl.float64, gtol: tl.float64, P: tl.constexpr,
):  # fmt: skip
    """Test P problems, and begin their next searches."""
    _, p, here = _seats(rows, count, batch, P)
    apart = tl.zeros([1], tl.int64) + batch
    number, counter = numbers + p, counts + p
    here = here & ((tl.load(counter + 2 * apart, mask=here, other=0) & 8) != 0)
    size = tl.zeros([P], tl.float64)
    for k in range(n):
        size_of = tl.abs(tl.load(d + p * n + k, mask=here, other=0.0)).to(tl.float64)
        size = tl.where(size_of > size, size_of, size)

    status, length = tl.load(counter + 3 * apart, mask=here, other=0), tl.load(step + p, mask=here, other=0.0)
    start = tl.load(number, mask=here, other=0.0)
    new_slope = tl.load(slope + p * slope_stride, mask=here, other=0.0)
    of_g = tl.load(g_max + p * g_max_stride, mask=here, other=0.0)
    first_t = tl.full([P], 1.0, tl.float64)
    if t is not None:
        first_t = tl.load(t + p * t_stride, mask=here, other=0.0)
    # No descent tells more than a limit, and less than how the step went.
    open_ended = (status == -1) | (status == 2) | (status == 3)
    status = tl.where(open_ended & _not(new_slope < 0.0), 5, status)
    status = tl.where((length > 0.0) & (of_g <= gtol), 0, status)
    begins = here & (status == -1)

    tl.debug_barrier()  # all has been read
    zero = tl.zeros([P], tl.int32)
    tl.store(counter, zero, mask=begins)
    tl.store(counter + 2 * apart, zero, mask=here)
    tl.store(counter + 3 * apart, status, mask=here)
    tl.store(step + p, tl.zeros([P], tl.float64), mask=here & _not(begins))
    tl.store(number + apart, new_slope, mask=begins)
    tl.store(number + 2 * apart, first_t, mask=begins)
    tl.store(number + 13 * apart, size, mask=begins)
    tl.store(number + 14 * apart, eps * tl.abs(start), mask=begins)
    along = first_t.to(x.dtype.element_ty)
    for k in range(n):
        at = p * n + k
        old = tl.load(x + at, mask=here, other=0.0)
        there = old + along * tl.load(d + at, mask=here, other=0.0)
        tl.store(trial + at, tl.where(begins, there, old), mask=here)


_INTERPRETED = _triton_support.interpreted(_advance)


def advance(search: Search, value: Tensor, grad: Tensor, rows: Tensor | None, rule: Rule) -> None:
    """Take what the trials brought: see `reference.advance`."""
    batch, n = search.x.shape
    count = batch if rows is None else len(rows)
    if count == 0:
        return
    with _triton_support.on(search.x.device):
        _advance[(triton.cdiv(count, _PROBLEMS),)](
            *search, rows, value, grad, count, batch, n, rule.c1, rule.c2, rule.tolerance, rule.ftol,
            rule.max_trials, rule.max_iter, rule.max_nfev, P=_PROBLEMS, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def begin(search: Search, slope: Tensor, g_max: Tensor, t: Tensor | None, rows: Tensor | None, rule: Rule) -> None:
    """Test the problems that stepped, and begin the next searches: see `reference.begin`."""
    batch, n = search.x.shape
    count = batch if rows is None else len(rows)
    if count == 0:
        return
    scalars: list[Any] = [y for x in (slope, g_max, t) for y in (x, 0 if x is None else x.stride(0))]
    with _triton_support.on(search.x.device):
        _begin[(triton.cdiv(count, _PROBLEMS),)](
            search.x, search.d, search.trial, search.step, search.numbers, search.counts, rows, *scalars, count, batch,
            n, rule.eps, rule.gtol, P=_PROBLEMS, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
