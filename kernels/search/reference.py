"""Line searches and convergence of many problems in plain PyTorch: the definition that all others are tested against.

A problem minimizes f from x along d: phi(t) = f(x + t d). Its search is `secant.solvers.strong_wolfe` as a machine of
states, and the tests hold it to the steps of that generator. A round of B problems is

    evaluate f and its gradient at `trial`
    advance(...)      searches go on or end; where one ends, x, f and g move to the point that it chose
    ...               the directions that follow from it, such as `LBFGSHistory.step(g, previous_g, d, step)`
    begin(...)        tests of convergence; the next searches, and the next trials

Every backend module of this family has `available`, `supports` and the functions below, with these signatures. The
public functions of `secant.ops.search` check and allocate; what arrives here is valid:

* `search` is a `contract.Search` of B >= 1 problems of n >= 1 variables, all contiguous and on one device; x, g, d,
  kept and trial (B, n) of T in {float32, float64}; the rows of numbers and counts are named in `contract`.
* `rows` is (b,) int64 on the device: the problems that a call is for, each once. A number that is no place is passed
  over. None stands for all of them, b = B.
* `value` (b,) float64 and `grad` (b, n) of T, contiguous, belong to those rows, in their order.
* `slope`, `g_max` and, where there is one, `t` are (B,) float64, of any stride.
* No two tensors overlap.

`advance`, of the rows whose status is RUNNING and whose flags have no ENDED:

    phi' = grad . d in float64; a value or phi' that is not finite counts as infinitely high
    nfev <- nfev + 1; the trial (t, value, phi') goes through the machine (`machine`)
    where it is to be kept: kept_t, kept_value, kept <- t, value, grad
    where the search goes on: step <- 0, trial <- x + t d for the next t
    where it ends:
        flags <- ENDED. step <- t of this trial, or of what was kept, or 0 for the start.
        If step > 0: x <- x + step d, value and g <- those of the chosen trial, nit <- nit + 1
        status <- MAX_EVAL if nfev >= max_nfev, MAX_ITER if nit >= max_iter, STALLED if step = 0, SMALL_CHANGE if
        step > 0, ftol > 0 and |change of value| <= ftol max(|old|, |new|, 1); each overrides those before it

`begin`, of the rows whose flags have ENDED, with slope = g . d and g_max = |g|_inf at the new x and d:

    status <- NO_DESCENT if not slope < 0, and it is RUNNING, MAX_EVAL or MAX_ITER
    status <- CONVERGED if step > 0 and g_max <= gtol
    where it is RUNNING: a search begins. size <- |d|_inf, noise <- eps |value|, t <- the argument's or 1,
        trial <- x + t d, used <- 0, flags <- 0
    where it is not: step <- 0, trial <- x, flags <- 0

What every backend owes:

* The machine is arithmetic of float64, rounded operation by operation as written here, whatever T: no fused
  multiply-add, no reassociation. So, of one phi', all backends take the same decisions with the same numbers, to the
  last bit. x + t d is rounded as in torch too: t to T, product, sum. The order of the sum in phi' is a backend's own.
* A row depends on nothing but itself: the same bits wherever it stands and whatever its neighbours do.
* Rows that a function is not for are not touched; nor are the members of a state that mean nothing for the phase it is
  in (`last` and `kept_t` before the second trial, `low`, `high` and `fraction` before the zoom, kept before kept_t).
  What these hold differs from one backend to the other.
* No function reads a value back to the host, and none allocates by values.

References:
    Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithms 3.5 and 3.6, pp. 60-61; eq. 3.59, p. 59.
    Hager and Zhang, A new conjugate gradient method with guaranteed descent and an efficient line search, SIAM J.
    Optim. 16 (2005), section 4 (the approximate Wolfe conditions).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from secant.kernels.search.contract import (
    BLIND,
    CONVERGED,
    ENDED,
    FLAGS,
    FRACTION,
    HIGH,
    KEPT_T,
    KEPT_VALUE,
    LAST,
    LOW,
    LOW_IS_FIRST,
    MAX_BLIND,
    MAX_EVAL,
    MAX_ITER,
    NEAR_END,
    NFEV,
    NIT,
    NO_DESCENT,
    NOISE,
    RUNNING,
    SIZE,
    SLOPE,
    SMALL_CHANGE,
    STALLED,
    STATUS,
    USED,
    VALUE,
    ZOOMS,
    Rule,
    Search,
    T,
)  # fmt: skip
from torch import Tensor


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when tensors of this device and dtype are supported, else the reason why they are not."""
    return None


class _Points(NamedTuple):
    """Trials, one for each problem: t, phi(t), phi'(t), all float64."""

    t: Tensor
    value: Tensor
    slope: Tensor

    def where(self, mask: Tensor, other: _Points) -> _Points:
        """Take these where the mask is set, else the others."""
        return _Points(*(torch.where(mask, x, y) for x, y in zip(self, other, strict=True)))


class Outcome(NamedTuple):
    """What a trial has brought.

    done: the search has ended. takes_new, takes_start: it ended with this trial, or with the start; else with what was
    kept. keeps_new: this trial is the one that may be returned later, in place of what was kept.
    """

    done: Tensor
    takes_new: Tensor
    takes_start: Tensor
    keeps_new: Tensor


def _points(numbers: Tensor, row: int) -> _Points:
    return _Points(*numbers[row : row + 3])


def machine(numbers: Tensor, counts: Tensor, value: Tensor, slope: Tensor, rule: Rule) -> Outcome:
    """Take the values and slopes at t, and move the state, (17, b) and (6, b), on; see `strong_wolfe`."""
    finite = value.isfinite() & slope.isfinite()
    t, noise = numbers[T].clone(), numbers[NOISE]
    new = _Points(t, torch.where(finite, value, torch.inf), torch.where(finite, slope, torch.nan))
    start = _Points(torch.zeros_like(t), numbers[VALUE], numbers[SLOPE])
    last = start.where(counts[USED] == 0, _points(numbers, LAST))
    used, flags = counts[USED] + 1, counts[FLAGS]
    zooms, near_end, low_is_first = ((flags & bit) != 0 for bit in (ZOOMS, NEAR_END, LOW_IS_FIRST))
    noisy, spent = noise > 0.0, used.long() >= rule.max_trials
    fine = (new.value <= start.value + noise) & (new.slope <= (2.0 * rule.c1 - 1.0) * start.slope)
    decreases = (new.value <= start.value + rule.c1 * new.t * start.slope) | (noisy & fine)
    is_flat = new.slope.abs() <= -rule.c2 * start.slope

    # Algorithm 3.5: lengthen the step until a bracket or an acceptable point appears.
    brackets = ~zooms
    rises = ~decreases | ((used > 2) & (new.value >= last.value + noise))
    meets = brackets & ~spent & ~rises & is_flat
    enters = brackets & ~spent & ~meets & (rises | (new.slope >= 0.0))
    grows = brackets & ~spent & ~meets & ~enters
    same_start = noisy & (new.value == start.value) & (new.slope == start.slope)
    lower = (new.value < start.value + noise) & ~same_start
    ran_out = brackets & spent
    same_last = noisy & (new.value == last.value) & (new.slope == last.slope)
    longer = _minimizer(last, new, new.t + 0.01 * (new.t - last.t), 10.0 * new.t, noise)
    longer = torch.where(same_last, 10.0 * new.t, longer)

    # Algorithm 3.6: shrink the bracket. Which end is low is a matter of values alone, but a tie goes to the first.
    low, high = _points(numbers, LOW), _points(numbers, HIGH)
    stands = zooms & noisy & (new.value == low.value) & (new.slope == low.slope)
    worse = zooms & ~stands & (~decreases | (new.value >= low.value + noise))
    found = zooms & ~stands & ~worse & is_flat
    better = zooms & ~stands & ~worse & ~found
    turns = better & (new.slope * (high.t - low.t) >= 0.0)
    # `worse`: the new trial takes the place of the high end, and may be the low one from then on.
    swaps = worse & torch.where(low_is_first, new.value < low.value, new.value <= low.value)
    # Entering: the ends are (last, new).
    first_lower = last.value <= new.value
    next_high = low.where(turns | swaps, new.where(worse, high))
    next_high = new.where(enters & first_lower, last.where(enters, next_high))
    next_low = new.where(better | swaps, low)
    next_low = last.where(enters & first_lower, new.where(enters, next_low))
    low_is_first = torch.where(enters, first_lower, low_is_first ^ swaps)
    fraction = torch.where(enters | better, 1.0, numbers[FRACTION])
    near_end = near_end & ~enters
    blind = torch.where(enters, 0, counts[BLIND])

    going = enters | worse | better
    low, high = next_low, next_high
    left, right = torch.minimum(low.t, high.t), torch.maximum(low.t, high.t)
    narrow = ((right - left) * numbers[SIZE] < rule.tolerance) | (right == left)
    infinite = high.value == torch.inf
    fraction = torch.where(going & ~narrow & infinite, 0.5 * fraction, fraction)
    inner = _minimizer(low.where(low_is_first, high), high.where(low_is_first, low), left, right, noise)
    # Trials may come within a tenth of the width of an end once, and are then put a tenth away from it.
    margin = 0.1 * (right - left)
    inside = torch.minimum(right - inner, inner - left) >= margin
    once = ~inside & ~near_end & (left < inner) & (inner < right)
    moved = torch.where(right - inner < inner - left, right - margin, left + margin)
    inner = torch.where(inside | once, inner, moved)
    near_end = torch.where(going & ~narrow & ~infinite, once, near_end)
    inner = torch.where(infinite, low.t + fraction * (high.t - low.t), inner)
    blind = blind + (going & ~narrow & (-inner * start.slope <= noise)).int()
    ends = stands | (going & (narrow | (blind > MAX_BLIND) | spent))
    gained = (low.value < start.value) | (low.slope.abs() < -start.slope) | ~noisy

    numbers[T] = torch.where(grows, longer, torch.where(going & ~ends, inner, t))
    for row, points in ((LAST, new.where(grows, last)), (LOW, low), (HIGH, high)):
        numbers[row : row + 3] = torch.stack(points)
    numbers[FRACTION] = fraction
    counts[USED], counts[BLIND] = used, blind
    counts[FLAGS] = (zooms | enters) * ZOOMS + near_end * NEAR_END + low_is_first * LOW_IS_FIRST
    takes_new = meets | found | (ran_out & lower)
    takes_start = (ran_out & ~lower) | (ends & ~gained)
    # An end may be this very trial.
    keeps_new = grows | better | swaps | (enters & ~first_lower)
    return Outcome(takes_new | takes_start | ends, takes_new, takes_start, keeps_new)


def _minimizer(a: _Points, b: _Points, least: Tensor, most: Tensor, noise: Tensor) -> Tensor:
    """Minimize the cubic, or, where the values are equal, follow the secant through the slopes."""
    cubic = _cubic_minimizers(a, b, least, most)
    equal = (noise > 0.0) & ((a.value - b.value).abs() <= noise)
    secant = b.t - b.slope * (b.t - a.t) / (b.slope - a.slope)
    secant = torch.minimum(torch.maximum(secant, least), most)
    return torch.where(equal, torch.where(a.slope != b.slope, secant, most), cubic)


def _cubic_minimizers(a: _Points, b: _Points, low: Tensor, high: Tensor) -> Tensor:
    """Minimize the cubic through the values and slopes of two points of each problem; see `cubic_minimizer`."""
    ordered = a.t <= b.t
    a, b = a.where(ordered, b), b.where(ordered, a)
    width = b.t - a.t
    d1 = a.slope + b.slope + 3.0 * (a.value - b.value) / width
    square = d1 * d1 - a.slope * b.slope
    d2 = _root(square.clamp_min(0.0))
    numerator, denominator = b.slope + d2 - d1, b.slope - a.slope + 2.0 * d2
    straight = torch.where(numerator == 0.0, torch.nan, -torch.copysign(torch.full_like(width, torch.inf), numerator))
    t = torch.where(denominator != 0.0, b.t - width * (numerator / denominator), straight)
    t = torch.where((square >= 0.0) & (width != 0.0), t, torch.nan)
    return torch.where(t.isnan(), 0.5 * (low + high), torch.minimum(torch.maximum(t, low), high))


def _root(x: Tensor) -> Tensor:
    """Compute the square root to nearest, from that of torch, which on some CPUs may be the number beside it.

    One step of Newton from the exact x - s^2 (Dekker, A floating-point technique for extending the available precision,
    Numer. Math. 18 (1971)).
    """
    s = x.sqrt()
    top = (2.0**27 + 1.0) * s
    top = top - (top - s)
    low = s - top
    square = s * s
    rest = (x - square) - (((top * top - square) + 2.0 * top * low) + low * low)
    step = rest / (2.0 * s)
    return torch.where(step.isfinite(), s + step, s)


def _chosen(search: Search, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which of the rows are places, and those places."""
    b = len(search.x)
    if rows is None:
        rows = torch.arange(b, device=search.x.device)
    here = (rows >= 0) & (rows < b)
    return here, rows.where(here, 0)


def _put(target: Tensor, places: Tensor, mask: Tensor, new: Tensor) -> None:
    """Write rows of the masked places, without a choice by values: the others are sent to a row that is cut off."""
    b = len(target)
    wide = torch.cat([target, target[:1]])
    wide[places.where(mask, b)] = new
    target.copy_(wide[:b])


def advance(search: Search, value: Tensor, grad: Tensor, rows: Tensor | None, rule: Rule) -> None:
    """Take what the trials brought: each search goes on, or ends and its problem steps."""
    here, at = _chosen(search, rows)
    numbers, counts, x, d = search.numbers[:, at], search.counts[:, at], search.x[at], search.d[at]
    here = here & (counts[STATUS] == RUNNING) & ((counts[FLAGS] & ENDED) == 0)
    t, old = numbers[T].clone(), numbers[VALUE].clone()
    kept_t = torch.where(counts[USED] == 0, 0.0, numbers[KEPT_T])
    outcome = machine(numbers, counts, value, (grad.double() * d.double()).sum(-1), rule)
    numbers[KEPT_T] = torch.where(outcome.keeps_new, t, kept_t)
    numbers[KEPT_VALUE] = torch.where(outcome.keeps_new, value, numbers[KEPT_VALUE])
    _put(search.kept, at, here & outcome.keeps_new, grad)

    step = torch.where(outcome.takes_new, t, torch.where(outcome.takes_start, 0.0, numbers[KEPT_T]))
    step = torch.where(outcome.done, step, 0.0)
    moved = step > 0.0
    numbers[VALUE] = torch.where(moved, torch.where(outcome.takes_new, value, numbers[KEPT_VALUE]), old)
    chosen = torch.where(outcome.takes_new[:, None], grad, search.kept[at])
    _put(search.g, at, here & moved, chosen)
    _put(search.x, at, here & moved, x + step.to(x.dtype)[:, None] * d)
    _put(search.trial, at, here & ~outcome.done, x + numbers[T].to(x.dtype)[:, None] * d)

    counts[NFEV] += 1
    counts[NIT] += moved.int()
    status = torch.where(counts[NFEV].long() >= rule.max_nfev, MAX_EVAL, RUNNING)
    status = torch.where(counts[NIT].long() >= rule.max_iter, MAX_ITER, status)
    status = torch.where(moved, status, STALLED)
    if rule.ftol > 0.0:
        size = torch.maximum(numbers[VALUE].abs(), old.abs()).clamp_min(1.0)
        little = moved & ((numbers[VALUE] - old).abs() <= rule.ftol * size)
        status = torch.where(little, SMALL_CHANGE, status)
    counts[STATUS] = torch.where(outcome.done, status, RUNNING).int()
    counts[FLAGS] = torch.where(outcome.done, ENDED, counts[FLAGS])
    _put(search.step, at, here, step)
    _put(search.numbers.T, at, here, numbers.T)
    _put(search.counts.T, at, here, counts.T)


def begin(search: Search, slope: Tensor, g_max: Tensor, t: Tensor | None, rows: Tensor | None, rule: Rule) -> None:
    """Test the problems that stepped, and begin the next search of those that go on."""
    here, at = _chosen(search, rows)
    numbers, counts, x, d = search.numbers[:, at], search.counts[:, at], search.x[at], search.d[at]
    here = here & ((counts[FLAGS] & ENDED) != 0)
    slope, status, step = slope[at], counts[STATUS], search.step[at]
    # No descent tells more than a limit, and less than how the step went.
    open_ended = (status == RUNNING) | (status == MAX_EVAL) | (status == MAX_ITER)
    status = torch.where(open_ended & ~(slope < 0.0), NO_DESCENT, status)
    status = torch.where((step > 0.0) & (g_max[at] <= rule.gtol), CONVERGED, status)
    goes_on = status == RUNNING
    first = torch.ones_like(slope) if t is None else t[at]
    size, noise = d.abs().amax(-1).double(), rule.eps * numbers[VALUE].abs()
    for row, new in ((SLOPE, slope), (T, first), (SIZE, size), (NOISE, noise)):
        numbers[row] = torch.where(goes_on, new, numbers[row])
    counts[STATUS], counts[FLAGS] = status.int(), 0
    counts[USED] = torch.where(goes_on, 0, counts[USED])
    trial = torch.where(goes_on[:, None], x + first.to(x.dtype)[:, None] * d, x)
    _put(search.trial, at, here, trial)
    _put(search.step, at, here & ~goes_on, torch.zeros_like(step))
    _put(search.numbers.T, at, here, numbers.T)
    _put(search.counts.T, at, here, counts.T)
