"""Line searches on many problems at once, along directions that one of several methods chooses, within bounds or not.

In each round every problem that goes on makes one trial of its search; all are evaluated in one call. Where searches
have ended the method is told of the steps, and says where to go next. What has stopped is not evaluated any more, and
is taken out of the state once it is a quarter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secant.ops.search import BatchedLines
from secant.result import Status
from secant.solvers.batched_lbfgs import BatchedFunction, BatchedMinimum, few
from secant.solvers.box import projected_gradient, room

RUNNING = -1
#: Iterations that neither the value nor the gradient shows to be of use; then the rest is rounding.
_PATIENCE = 20


class Sides(NamedTuple):
    """Bounds of some problems, (b, n) each, of the dtype of the points; infinite where there is none."""

    lower: Tensor
    upper: Tensor

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest points within."""
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def longest(self, x: Tensor, d: Tensor) -> Tensor:
        """Return the largest t (b,), float64, with x + t d within."""
        return room(x, d, self.lower, self.upper).amin(-1).double()

    def take(self, places: Tensor) -> Sides:
        """Go on with some of the problems."""
        return Sides(self.lower.index_select(0, places), self.upper.index_select(0, places))


class Steps(NamedTuple):
    """Tells a method where problems are, and how they came there.

    problem: (b,), places among all. x, g: (b, n). s, y: likewise, the last step and the change of the gradient along
    it, zero where there was none. which: (b,), what wants a direction; what is returned for the others does not matter.
    sides: the bounds, or None.
    """

    problem: Tensor
    x: Tensor
    g: Tensor
    s: Tensor
    y: Tensor
    which: Tensor
    sides: Sides | None


class Directions(Protocol):
    """Chooses directions for b problems, and learns from their steps."""

    def next(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Return directions (b, n), and the step that is tried first, float64 (b,)."""

    def forget(self, which: Tensor) -> Tensor:
        """Begin anew where the mask is set; return where there was something to forget."""

    def take(self, places: Tensor) -> Directions:
        """Go on with some of the problems."""


class _Running(NamedTuple):
    """What is known of the problems in the state; of a search, also the best trial but for the last."""

    problem: Tensor
    x: Tensor
    value: Tensor
    g: Tensor
    d: Tensor
    goal: Tensor  # where t = 1 leads, within the bounds
    longest: Tensor
    t_kept: Tensor
    value_kept: Tensor
    g_kept: Tensor
    seen: Tensor  # whether any trial of the search was finite
    lowest: Tensor
    flattest: Tensor
    since: Tensor  # iterations since one of these two fell
    status: Tensor
    nit: Tensor
    nfev: Tensor

    def take(self, places: Tensor) -> _Running:
        return _Running(*(x.index_select(0, places) for x in self))


class _Lines(NamedTuple):
    """Lines to search along: d (b, n), where t = 1 leads, the largest t and the slope (b,); whether it descends."""

    d: Tensor
    goal: Tensor
    longest: Tensor
    slope: Tensor
    descends: Tensor


def optimality(x: Tensor, g: Tensor, sides: Sides | None) -> Tensor:
    """Return the largest component of g, or with bounds of P(x - g) - x, (b,)."""
    step = g if sides is None else projected_gradient(x, g, sides.lower, sides.upper)
    return step.abs().amax(-1)


class _Known(Protocol):
    """What is known of the problems in a state; see `BatchedMinimum`."""

    @property
    def problem(self) -> Tensor: ...
    @property
    def x(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def g(self) -> Tensor: ...
    @property
    def status(self) -> Tensor: ...
    @property
    def nit(self) -> Tensor: ...
    @property
    def nfev(self) -> Tensor: ...


class Ends:
    """Where problems have ended, one after the other.

    Args:
        now: all of them, at the start. tell: is told how many have stopped, where that has changed.
    """

    def __init__(self, now: _Known, tell: Callable[[int], object] | None) -> None:
        self.found = BatchedMinimum(*(part.clone() for part in self._parts(now)))
        self._told, self._tell = 0, tell

    def settle(self, now: _Known) -> Tensor:
        """Write down what has stopped, and return the places of what goes on."""
        running = now.status == RUNNING
        places = running.nonzero()[:, 0]
        if len(places) < len(running):
            stopped = (~running).nonzero()[:, 0]
            which = now.problem[stopped]
            for target, part in zip(self.found, self._parts(now), strict=True):
                target[which] = part[stopped]
            count = len(self.found.x) - len(places)
            if self._tell is not None and count > self._told:
                self._told = count
                self._tell(count)
        return places

    @staticmethod
    def _parts(now: _Known) -> tuple[Tensor, ...]:
        return now.x, now.value, now.g, now.status, now.nit, now.nfev


def evaluated(evaluate: BatchedFunction, x: Tensor, now: _Known, places: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate at x what goes on; the value of the rest is NaN."""
    if len(places) == len(now.problem):
        value, g = evaluate(x, now.problem)
        return value.double(), g
    some_values, some_g = evaluate(x[places], now.problem[places])
    value = torch.full_like(now.value, torch.nan).index_copy_(0, places, some_values.double())
    return value, now.g.index_copy(0, places, some_g)


def begun(value: Tensor, g: Tensor, slack: Tensor, gtol: float) -> tuple[Tensor, Tensor]:
    """Return the statuses of the starts, and their gradients, zero where something is not finite."""
    usable = value.isfinite() & g.isfinite().all(-1)
    status = torch.where(usable, RUNNING, int(Status.NOT_FINITE))
    status = torch.where(usable & (slack <= gtol), int(Status.CONVERGED), status).to(torch.int32)
    return status, torch.where(usable[:, None], g, 0.0).contiguous()


def batched_descent(
    evaluate: BatchedFunction,
    x0: Tensor,
    directions: Directions,
    *,
    sides: Sides | None = None,
    gtol: float = 1e-5,
    ftol: float = 0.0,
    max_iter: int = 15_000,
    max_nfev: int = 15_000,
    max_trials: int = 25,
    c1: float = 1e-4,
    tolerance: float = 1e-9,
    compact: bool = True,
    record: Callable[[Tensor, Tensor, Tensor], bool] | None = None,
    tell: Callable[[int], object] | None = None,
) -> BatchedMinimum:
    """Minimize B functions of n variables by strong Wolfe searches along the directions of a method.

    Within bounds a search goes from x towards the projection of x + d, and beyond it as far as the bounds allow, so
    that nothing is evaluated outside. Where a search finds nothing, or a direction does not descend, the method is told
    to forget; where it has nothing to forget, the problem has ended.

    Args:
        evaluate: as for `batched_lbfgs`. x0: (B, n), float32 or float64; projected.
        gtol: on the largest component of a gradient, with bounds of P(x - g) - x. ftol: see `secant.minimize`.
        max_iter, max_nfev: of each problem; evaluations are counted after each search. max_trials: of one search.
        c1: of sufficient decrease. tolerance: a bracket in which no variable moves by as much ends the search.
        compact: whether what has stopped may be taken out of the state; else `directions` stays one object.
        record: told values, sizes of gradients and steps t, (B,) float64 each, where any problem has taken a step (t is
            zero where it has not); a true value stops all. Not with compact.
        tell: is told how many have stopped, where that has changed.
    """
    b = len(x0)
    device, dtype, eps = x0.device, x0.dtype, torch.finfo(x0.dtype).eps
    every = torch.arange(b, device=device)
    x = x0.clone() if sides is None else sides.project(x0)
    value, g = evaluate(x, every)
    value, counts = value.double(), torch.zeros(b, dtype=torch.int32, device=device)
    status, g = begun(value, g, optimality(x, g, sides), gtol)
    search = BatchedLines(b, device, c1=c1, tolerance=tolerance, max_trials=max_trials)

    def lines(x: Tensor, g: Tensor, d: Tensor) -> _Lines:
        longest = torch.full_like(value, torch.inf)
        goal = x + d
        if sides is not None:
            goal = sides.project(goal)
            d = goal - x
            longest = sides.longest(x, d).clamp_min(1.0)
        slope = (g * d).sum(-1).double()
        return _Lines(d, goal, longest, slope, (slope < 0.0) & slope.isfinite() & d.isfinite().all(-1))

    def chosen(steps: Steps, status: Tensor) -> tuple[_Lines, Tensor, Tensor]:
        """Ask for directions, twice where the first does not descend; return lines, first steps and statuses."""
        d, t = directions.next(steps)
        found = lines(steps.x, steps.g, d)
        poor = steps.which & ~found.descends
        if bool(poor.any()):
            again = directions.forget(poor)
            nothing = torch.zeros_like(steps.s)
            d2, t2 = directions.next(steps._replace(s=nothing, y=nothing, which=again))
            d, t = torch.where(again[:, None], d2, d), torch.where(again, t2, t)
            found = lines(steps.x, steps.g, d)
            poor = steps.which & ~found.descends
            numbers = found.slope.isfinite() & found.d.isfinite().all(-1)
            why = torch.where(numbers, int(Status.NO_DESCENT), int(Status.NOT_FINITE))
            status = torch.where(poor, why, status).to(torch.int32)
        return found, t, status

    def begin(which: Tensor, value: Tensor, line: _Lines, t: Tensor) -> None:
        size = line.d.abs().amax(-1).double()
        search.begin(which, value, line.slope, torch.minimum(t, line.longest), size, eps * value.abs())

    def reached(x: Tensor, goal: Tensor, d: Tensor, t: Tensor) -> Tensor:
        """Compute x + t d, and the goal itself where t = 1."""
        point = x + t.to(dtype)[:, None] * d
        return point if sides is None else torch.where((t == 1.0)[:, None], goal, sides.project(point))

    nothing = torch.zeros_like(g)
    line, t, status = chosen(Steps(every, x, g, nothing, nothing, status == RUNNING, sides), status)
    begin(status == RUNNING, value, line, t)
    now = _Running(
        every, x, value, g, line.d, line.goal, line.longest, torch.zeros_like(value), value, g.clone(), counts.bool(),
        value, optimality(x, g, sides), counts, status, counts, counts + 1,
    )  # fmt: skip
    ends = Ends(now, tell)
    while True:
        places = ends.settle(now)
        if len(places) == 0:
            return ends.found
        if compact and few(places, now.problem):
            now, directions = now.take(places), directions.take(places)
            sides = None if sides is None else sides.take(places)
            value = now.value
            search.take(places)
            places = torch.arange(len(places), device=device)

        t = search.t
        new_value, new_g = evaluated(evaluate, reached(now.x, now.goal, now.d, t), now, places)
        running = now.status == RUNNING
        slope = (new_g * now.d).sum(-1).double()
        seen = now.seen | (new_value.isfinite() & slope.isfinite())
        t = t.clone()
        outcome = search.advance(new_value, slope)
        nfev = now.nfev + running
        done, new = outcome.done, outcome.takes_new
        if sides is not None:  # it still falls where the box ends
            at_end = ~done & (search.t > now.longest) & (t >= now.longest)
            done, new = done | at_end, new | at_end
            torch.minimum(search.t, now.longest, out=search.t)

        keeps = outcome.keeps_new
        t_kept = torch.where(keeps, t, now.t_kept)
        value_kept = torch.where(keeps, new_value, now.value_kept)
        g_kept = torch.where(keeps[:, None], new_g, now.g_kept)
        done = done & running
        if not bool(done.any()):
            now = now._replace(t_kept=t_kept, value_kept=value_kept, g_kept=g_kept, seen=seen, nfev=nfev)
            continue
        t = torch.where(new, t, torch.where(outcome.takes_start, 0.0, t_kept))
        t = torch.where(done, t, 0.0)
        moved = t > 0.0
        x = torch.where(moved[:, None], reached(now.x, now.goal, now.d, t), now.x)
        value = torch.where(moved, torch.where(new, new_value, value_kept), now.value)
        g = torch.where(moved[:, None], torch.where(new[:, None], new_g, g_kept), now.g)
        nit = now.nit + moved
        slack = optimality(x, g, sides)
        gains = moved & ((value < now.lowest) | (slack < now.flattest))
        since = torch.where(gains, 0, now.since + moved).to(torch.int32)

        failed = done & ~moved
        hopeless = failed
        if bool(failed.any()):
            hopeless = failed & ~directions.forget(failed)
        size = torch.maximum(torch.maximum(value.abs(), now.value.abs()), torch.ones_like(value))
        status = torch.where(done & (nfev >= max_nfev), int(Status.MAX_EVAL), now.status)
        status = torch.where(hopeless, torch.where(seen, int(Status.STALLED), int(Status.NOT_FINITE)), status)
        status = torch.where(done & (nit >= max_iter), int(Status.MAX_ITER), status)
        status = torch.where(done & (since >= _PATIENCE), int(Status.STALLED), status)
        if ftol > 0.0:
            status = torch.where(moved & (now.value - value <= ftol * size), int(Status.SMALL_CHANGE), status)
        status = torch.where(moved & (slack <= gtol), int(Status.CONVERGED), status).to(torch.int32)
        if record is not None and bool(moved.any()) and record(value, slack.double(), t):
            status = torch.where(status == RUNNING, int(Status.STOPPED), status).to(torch.int32)
        steps = Steps(now.problem, x, g, x - now.x, g - now.g, done & (status == RUNNING), sides)
        line, first, status = chosen(steps, status)
        going = done & (status == RUNNING)
        begin(going, value, line, first)
        wide = going[:, None]
        now = _Running(
            now.problem, x, value, g, torch.where(wide, line.d, now.d), torch.where(wide, line.goal, now.goal),
            torch.where(going, line.longest, now.longest), torch.where(going, 0.0, t_kept),
            torch.where(going, value, value_kept), torch.where(wide, g, g_kept), seen & ~going,
            torch.where(gains, torch.minimum(value, now.lowest), now.lowest),
            torch.where(gains, torch.minimum(slack, now.flattest), now.flattest), since, status, nit, nfev,
        )  # fmt: skip
