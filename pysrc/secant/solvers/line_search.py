"""Line search for the strong Wolfe conditions, as a generator on plain numbers.

Along a descent direction write phi(t) = f(x + t d). A step t > 0 satisfies the strong Wolfe conditions when

    phi(t) <= phi(0) + c1 t phi'(0)     sufficient decrease        (Nocedal and Wright, eq. 3.7a)
    |phi'(t)| <= c2 |phi'(0)|           curvature                  (eq. 3.7b)

The search first brackets such a step by growing t, then zooms into the bracket. It never touches a tensor: it yields
the step it wants tried and receives the value and the slope there, so that one piece of code serves any device, any
layout of the parameters and any test function.

References:
    Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithms 3.5 and 3.6, pp. 60-61; eq. 3.59, p. 59.
    Hager and Zhang, A new conjugate gradient method with guaranteed descent and an efficient line search, SIAM J.
    Optim. 16 (2005), section 4 (the approximate Wolfe conditions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import NamedTuple

#: Trials where the decrease to be expected is below the rounding of the values.
_MAX_BLIND_TRIALS = 5


class Trial(NamedTuple):
    """Holds one point of the line: t, phi(t) and phi'(t)."""

    t: float
    value: float
    slope: float


class LineSearchResult(NamedTuple):
    """Holds what a search found.

    trial: the point chosen, always finite; the start itself (t = 0) when nothing better was found. wolfe: whether it
    was seen to satisfy the strong Wolfe conditions. evaluations: trials made, the first one included.
    """

    trial: Trial
    wolfe: bool
    evaluations: int


#: A search: yields (t, best), is sent the `Trial` at t, returns its result.
LineSearch = Generator[tuple[float, float], Trial, LineSearchResult]


def cubic_minimizer(a: Trial, b: Trial, low: float, high: float) -> float:
    """Minimize the cubic through the values and slopes of two points, clamped to [low, high].

    With a left of b,

        d1 = a' + b' - 3 (f(a) - f(b)) / (a - b),    d2 = sqrt(d1^2 - a' b'),
        t = b - (b - a) (b' + d2 - d1) / (b' - a' + 2 d2).

    Args:
        a: one point, finite.
        b: another one, finite.
        low: left end of the interval that the answer must lie in.
        high: its right end.

    Returns:
        The clamped minimizer, which for a straight line is the end that it falls to; the middle of [low, high] where
        the cubic has no minimum, where it cannot be computed in double precision, or where both points are one.

    References:
        Nocedal and Wright, eq. 3.59.
    """
    if a.t > b.t:
        a, b = b, a
    width = b.t - a.t
    if width == 0.0:
        return 0.5 * (low + high)
    d1 = a.slope + b.slope + 3.0 * (a.value - b.value) / width
    square = d1 * d1 - a.slope * b.slope
    if square >= 0.0:
        d2 = math.sqrt(square)
        numerator, denominator = b.slope + d2 - d1, b.slope - a.slope + 2.0 * d2
        if denominator != 0.0:
            t = b.t - width * (numerator / denominator)
        else:  # a straight line, say
            t = -math.copysign(math.inf, numerator) if numerator != 0.0 else math.nan
        if not math.isnan(t):
            return min(max(t, low), high)
    return 0.5 * (low + high)


def strong_wolfe(
    start: Trial,
    first: Trial,
    *,
    size: float = 1.0,
    c1: float = 1e-4,
    c2: float = 0.9,
    tolerance: float = 1e-9,
    max_evaluations: int = 25,
    noise: float = 0.0,
) -> LineSearch:
    """Search for a step that satisfies the strong Wolfe conditions, beginning with a trial already made.

    A generator: it yields pairs (t, best), where t is the step to try next and `best` is the t of the one earlier trial
    that may still be returned (0 for the start), so the caller knows which gradient to keep. It is sent the `Trial` at
    t. Its return value is a `LineSearchResult`.

    On finite problems the steps are those of `torch.optim.LBFGS`: cubic extrapolation, to at least a hundredth of the
    last increment beyond the last trial and at most ten times as far, then cubic interpolation, put a tenth of the
    bracket inwards when it lands on an end, or near one twice in a row. These factors are heuristics.

    A trial whose value or slope is NaN or infinite counts as infinitely high. So it ends a bracket, it is never
    returned, and while an end is infinite the next trial is taken at 1/2, 1/8, 1/64, ... of the distance from the good
    end: a step too long by a little costs one evaluation, one too long by 1e9 costs eight.

    Args:
        start: (0, phi(0), phi'(0)), finite with phi'(0) < 0.
        first: the first trial, t > 0.
        size: largest component of the direction in absolute value; with `tolerance` it turns a bracket's width into a
            change of the parameters.
        c1: of sufficient decrease; 0 < c1 < c2.
        c2: of curvature; c1 < c2 < 1.
        tolerance: a bracket in which no parameter moves by as much as this ends the search.
        max_evaluations: trials allowed, `first` included.
        noise: rounding error of the difference of two values near phi(0), >= 0. With noise > 0 values that differ by
            less are equal, and the approximate Wolfe conditions of Hager and Zhang do, too:
            phi(t) <= phi(0) + noise, phi'(t) <= (2 c1 - 1) phi'(0), and |phi'(t)| <= c2 |phi'(0)|. A trial with the
            value and the slope of the last one did not move the parameters: the next is ten times as far, or, in a
            bracket, there is none; neither is there after five trials in it whose whole decrease, -t phi'(0), is at
            most noise. With 0 the steps are those of `torch.optim.LBFGS` to the last comparison.

    Returns:
        A `LineSearchResult`; its `wolfe` is of the approximate conditions where they decided.
        When the trials run out while bracketing, the last one if it is lower than the start, else the start;
        while zooming, the low end of the bracket.

    Raises:
        ValueError: `start` is not finite or does not descend, `first.t` is not positive, the constants are out of
            order, or `max_evaluations` is below 1. Raised at the first `next`.

    Example:
        >>> phi = lambda t: secant.solvers.Trial(t, (t - 3.0) ** 2, 2.0 * (t - 3.0))
        >>> search = secant.solvers.strong_wolfe(phi(0.0), phi(0.01))
        >>> secant.solvers.run(search, phi)
        LineSearchResult(trial=Trial(t=1.0, value=4.0, slope=-4.0), wolfe=True, evaluations=3)
    """
    if not (math.isfinite(start.value) and -math.inf < start.slope < 0.0):
        raise ValueError(f"strong_wolfe: start: expected a finite value and a negative slope, got {start}")
    if not 0.0 < first.t < math.inf:
        raise ValueError(f"strong_wolfe: first: expected a positive finite t, got {first}")
    if not 0.0 < c1 < c2 < 1.0:
        raise ValueError(f"strong_wolfe: c1, c2: expected 0 < c1 < c2 < 1, got {c1} and {c2}")
    if not 0.0 <= noise < math.inf:
        raise ValueError(f"strong_wolfe: noise: expected a finite number >= 0, got {noise}")
    if max_evaluations < 1:
        raise ValueError(f"strong_wolfe: max_evaluations: expected at least 1, got {max_evaluations}")

    def decreases(trial: Trial) -> bool:
        if trial.value <= start.value + c1 * trial.t * start.slope:
            return True
        return noise > 0.0 and trial.value <= start.value + noise and trial.slope <= (2.0 * c1 - 1.0) * start.slope

    def is_same(a: Trial, b: Trial) -> bool:
        return noise > 0.0 and a.value == b.value and a.slope == b.slope

    def minimizer(a: Trial, b: Trial, least: float, most: float) -> float:
        if not abs(a.value - b.value) <= noise or noise == 0.0:
            return cubic_minimizer(a, b, least, most)
        # Equal values tell a cubic to turn back; the secant through the slopes knows better.
        return min(max(b.t - b.slope * (b.t - a.t) / (b.slope - a.slope), least), most) if a.slope != b.slope else most

    def is_blind(t: float) -> bool:
        return -t * start.slope <= noise

    def is_flat(trial: Trial) -> bool:
        return abs(trial.slope) <= -c2 * start.slope

    # Algorithm 3.5: lengthen the step until a bracket or an acceptable point appears.
    last, new, used = start, _checked(first), 1
    while used < max_evaluations:
        if not decreases(new) or (used > 2 and new.value >= last.value + noise):
            break
        if is_flat(new):
            return LineSearchResult(new, True, used)
        if new.slope >= 0.0:
            break
        if is_same(new, last):
            t = 10.0 * new.t
        else:
            t = minimizer(last, new, new.t + 0.01 * (new.t - last.t), 10.0 * new.t)
        last = new
        new, used = _checked((yield t, last.t)), used + 1
    else:
        best = new if new.value < start.value + noise and not is_same(new, start) else start
        return LineSearchResult(best, best is new and decreases(new) and is_flat(new), used)

    # Algorithm 3.6: shrink the bracket. Which end is the low one matters only by value, but a tie goes to ends[0].
    ends = [last, new]
    low = 0 if ends[0].value <= ends[1].value else 1
    fraction, near_end, blind = 1.0, False, 0
    while used < max_evaluations:
        left, right = sorted((ends[0].t, ends[1].t))
        if (right - left) * size < tolerance or right == left:
            break
        if ends[1 - low].value == math.inf:
            fraction *= 0.5
            t = ends[low].t + fraction * (ends[1 - low].t - ends[low].t)
        else:
            t = minimizer(ends[0], ends[1], left, right)
            t, near_end = _move_inwards(t, left, right, near_end)
        blind += is_blind(t)
        if blind > _MAX_BLIND_TRIALS:
            break
        new, used = _checked((yield t, ends[low].t)), used + 1
        if is_same(new, ends[low]):
            break
        if not decreases(new) or new.value >= ends[low].value + noise:
            ends[1 - low] = new
            low = 0 if ends[0].value <= ends[1].value else 1
            continue
        if is_flat(new):
            return LineSearchResult(new, True, used)
        if new.slope * (ends[1 - low].t - ends[low].t) >= 0.0:
            ends[1 - low] = ends[low]
        ends[low], fraction = new, 1.0
    best = ends[low]
    gained = best.value < start.value or abs(best.slope) < -start.slope
    return LineSearchResult(best if gained or noise == 0.0 else start, False, used)


def run(
    search: LineSearch, evaluate: Callable[[float], Trial], keep: Callable[[float], object] | None = None
) -> LineSearchResult:
    """Drive a line search to its end.

    Args:
        search: a search that has not begun, such as `strong_wolfe(...)`.
        evaluate: t -> the `Trial` there. What it raises passes, and the search is over.
        keep: called before each trial with the t of the one earlier trial that may still be returned, 0 for the start:
            what was kept of all the others (points, gradients) may go. Only the trial to come may be returned besides.

    Returns:
        The `LineSearchResult` of the search.

    Example:
        >>> from math import cos, sin
        >>> phi = lambda t: secant.solvers.Trial(t, -sin(t), -cos(t))
        >>> search = secant.solvers.strong_wolfe(phi(0.0), phi(0.1), c2=0.1)
        >>> round(secant.solvers.run(search, phi).trial.t, 1)       # pi / 2 is where the slope is zero
        1.5
    """
    trial: Trial | None = None
    while True:
        try:
            t, best = next(search) if trial is None else search.send(trial)
        except StopIteration as end:  # of the search: what `evaluate` raises is outside
            result: LineSearchResult = end.value
            break
        if keep is not None:
            keep(best)
        trial = evaluate(t)
    return result


def _checked(trial: Trial) -> Trial:
    """Put an infinitely high trial in place of one when its value or slope is not finite."""
    if math.isfinite(trial.value) and math.isfinite(trial.slope):
        return trial
    return Trial(trial.t, math.inf, math.nan)


def _move_inwards(t: float, left: float, right: float, near_end: bool) -> tuple[float, bool]:
    """Keep the trials of a zoom from creeping along one end of the bracket.

    A trial within a tenth of the width of an end is let through once; on the end itself, or the second time in a row,
    it is put a tenth away from that end. Returns the trial and whether it was let through near an end.
    """
    margin = 0.1 * (right - left)
    if min(right - t, t - left) >= margin:
        return t, False
    if not near_end and left < t < right:
        return t, True
    return (right - margin if right - t < t - left else left + margin), False
