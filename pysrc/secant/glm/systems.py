"""Newton's method for generalised linear models, and the search that ends each of its iterations.

The Newton system H p = -g is solved by conjugate gradients preconditioned with either

* the diagonal of the centred Hessian ("newton-cg"), or
* a Cholesky factor of the Hessian ("newton-cholesky"): of this iterate, and then it is the solution and no iteration is
  needed, of an earlier one, or of a sample of the rows. It is replaced when iterating costs as much as a new one.

References:
    Nocedal and Wright, Numerical Optimization, 2nd ed., section 7.1.
    Eisenstat and Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci. Comput. 17 (1996).
    Byrd, Chin, Neveitt, Nocedal, On the use of stochastic Hessian information in optimization methods for machine
    learning, SIAM J. Optim. 21 (2011).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secant.glm.objective import Objective, Point
from secant.glm.preconditioners import Diagonal, Factor
from secant.glm.result import Recorder
from secant.result import Status
from secant.solvers.cg import CGResult, cg
from secant.solvers.line_search import Trial, strong_wolfe

#: Forcing terms: the residual of a Newton system relative to its right-hand side. Between the bounds, Eisenstat and
#: Walker's second choice.
_FORCING_FIRST, _FORCING_MAX, _FORCING_MIN = 0.1, 0.1, 1e-6
#: The last system is solved to this part of the tolerance, so that the curvature's change has the rest.
_LAST = 0.25
#: Trials of a line search; Newton steps take one.
_MAX_TRIALS = 30
#: The same where values cannot tell.
_MAX_BLIND_TRIALS = 5
#: Iterations that neither the value nor the gradient, in either norm, shows to be of use; then the rest is rounding.
_PATIENCE = 20
#: One product with the Hessian costs as much as forming this many columns of it. Products are bound by memory, the
#: Gram matrix by arithmetic: measured 14 at (150k, 200) and 55 at (30k, 900), two cores.
_COLUMNS_PER_PRODUCT = 16
#: Multiply-adds of a Gram matrix that take less time than the calls of a few iterations.
_CHEAP_GRAM = 1 << 24
#: Curvature relative to that of the upper bound of a Hessian below which a direction counts as flat.
_FLAT = 1e-7
#: A diagonal is computed anew after a system that took as many products.
_SLOW = 20


class Direction(NamedTuple):
    """p, and the products that it took."""

    p: Tensor
    inner: int


class Outcome(NamedTuple):
    """Where a solver ended, why, after how many iterations, and the last of its steps (None when there was none)."""

    point: Point
    status: str
    n_iter: int
    step: Tensor | None = None


class System(Protocol):
    """Solves Newton systems, one after the other along the iterates."""

    def solve(self, objective: Objective, point: Point, rtol: float, atol: float) -> Direction:
        """P with H p = -g up to the tolerances."""


def _solve(
    objective: Objective, point: Point, preconditioner: Diagonal | Factor, rtol: float, atol: float, most: int
) -> CGResult:
    eps = torch.finfo(point.grad.dtype).eps
    return cg(
        lambda v: objective.hvp(point, v),
        -point.grad,
        preconditioner=preconditioner.solve,
        rtol=rtol,
        atol=atol,
        max_iter=most,
        min_curvature=max(16.0 * eps, _FLAT if objective.majorised else 0.0),
    )


class DiagonalSystem:
    """Conjugate gradients with a `Diagonal`, which is kept as long as it serves."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._preconditioner: Diagonal | None = None

    def solve(self, objective: Objective, point: Point, rtol: float, atol: float) -> Direction:
        """See `System`."""
        if self._preconditioner is None:
            self._preconditioner = Diagonal(objective, point)
        found = _solve(objective, point, self._preconditioner, rtol, atol, self._most)
        inner = int(found.iterations)
        if inner >= _SLOW:
            self._preconditioner = None
        return Direction(found.x, inner)


@dataclass
class FactorSystem:
    """A Cholesky factor, with conjugate gradients where it is not that of the Hessian at the point."""

    most: int
    factor: Factor | None = None
    at: Point | None = None

    def solve(self, objective: Objective, point: Point, rtol: float, atol: float) -> Direction:
        """See `System`."""
        inner = 0
        cheap = objective.rows * point.grad.numel() ** 2 <= _CHEAP_GRAM and not objective.majorised
        if self.factor is not None and not cheap and (objective.majorised or self.at is not point):
            patience = max(4, point.grad.numel() // _COLUMNS_PER_PRODUCT)
            found = _solve(objective, point, self.factor, rtol, atol, min(patience, self.most))
            inner = int(found.iterations)
            if int(found.status) == Status.CONVERGED:
                return Direction(found.x, inner)
        if self.factor is None or self.at is not point:
            tail = max(1, objective.classes) if objective.intercept else 0
            eps = torch.finfo(point.grad.dtype).eps
            self.factor, self.at = Factor(objective.gram(point), tail, eps), point
        if self.factor.exact and not objective.majorised:
            return Direction(self.factor.solve(-point.grad), inner)
        found = _solve(objective, point, self.factor, rtol, atol, self.most)
        return Direction(found.x, inner + int(found.iterations))


def newton(
    objective: Objective,
    point: Point,
    system: System,
    *,
    tol: float,
    max_iter: int,
    record: Recorder,
    decrement_tol: float = 0.0,
) -> Outcome:
    """Newton's method with a line search, from an evaluated finite point.

    Args:
        objective: what to minimise.
        point: where to start.
        system: how to solve for directions.
        tol: on the largest component of the gradient of the mean objective.
        max_iter: iterations.
        record: is told of every iteration and may stop them.
        decrement_tol: stop also when g.H^-1 g is at most this.

    Returns:
        An `Outcome` with status "converged", "max_iter", "stalled" or "stopped".
    """
    target = tol * objective.total
    forcing, size = _FORCING_FIRST, math.nan
    best, least, since = point, math.inf, 0
    step: Tensor | None = None
    for n in range(max_iter):
        if point.largest <= target:
            return Outcome(point, "converged", n, step)
        p, inner = system.solve(objective, point, forcing, _LAST * target)
        slope = _dot(point.grad, p)
        found = search(objective, point, p, slope)
        if found is None or since == _PATIENCE:
            return Outcome(best, "stalled", n, step)
        point, t, told = found
        step = t * p
        stop = record(point.value, point.largest, t, inner, objective.rows)
        since = 0 if told or point.largest < best.largest or -slope < least else since + 1
        if told or point.largest < best.largest:
            best = point
        least = min(least, -slope)
        last, size = size, math.sqrt(-slope)
        if math.isfinite(last):
            forcing = min(_FORCING_MAX, max(_FORCING_MIN, 0.9 * (size / last) ** 2))
        if stop:
            return Outcome(point, "stopped", n + 1, step)
        if -slope <= decrement_tol:
            return Outcome(point, "converged", n + 1, step)
    return Outcome(point, "converged" if point.largest <= target else "max_iter", max_iter, step)


class Step(NamedTuple):
    """Where a search ended, how far along the direction, and whether the value told (else the slope did)."""

    point: Point
    t: float
    told: bool


def search(objective: Objective, point: Point, p: Tensor, slope: float) -> Step | None:
    """A point along p that satisfies the strong Wolfe conditions, t = 1 tried first; None if there is no better one.

    When the decrease to be expected is below the rounding of the value, the slope alone decides.

    References:
        Hager and Zhang, A new conjugate gradient method with guaranteed descent and an efficient line search, SIAM J.
        Optim. 16 (2005), section 4 (the approximate Wolfe conditions).
    """
    if not -math.inf < slope < 0.0:  # products that overflow may tell nothing of a finite objective
        return None
    trials = {0.0: point}

    def look(t: float) -> Trial:
        trials[t] = objective.evaluate(point.theta + t * p)
        return Trial(t, trials[t].value, _dot(trials[t].grad, p))

    new = look(1.0)
    noise = 16.0 * torch.finfo(point.grad.dtype).eps * max(abs(point.value), objective.total)
    if -slope <= noise:
        for _ in range(_MAX_BLIND_TRIALS):
            if not math.isfinite(new.value + new.slope):
                break
            if new.value - point.value <= noise and abs(new.slope) <= 0.9 * -slope:
                return Step(trials[new.t], new.t, False)
            # The secant through the two slopes, no further than ten times as far.
            t = new.t * min(10.0, slope / (slope - new.slope)) if new.slope > slope else 10.0 * new.t
            new = look(t)
        return None
    walk = strong_wolfe(Trial(0.0, point.value, slope), new, tolerance=0.0, max_evaluations=_MAX_TRIALS)
    try:
        t, best = next(walk)
        while True:
            for other in trials.keys() - {0.0, best}:
                del trials[other]
            t, best = walk.send(look(t))
    except StopIteration as end:
        t = end.value.trial.t
    return Step(trials[t], t, True) if t > 0.0 else None


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))
