"""Newton's method with a line search, for anything that has values, gradients and a way to solve for directions.

    H_k p_k = -g_k up to a forcing term,    x_(k+1) = x_k + t_k p_k,    t_k by a strong Wolfe search that tries 1 first.

References:
    Nocedal and Wright, Numerical Optimization, 2nd ed., section 7.1, Algorithm 7.1, p. 169.
    Eisenstat and Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci. Comput. 17 (1996).
    Hager and Zhang, A new conjugate gradient method with guaranteed descent and an efficient line search, SIAM J.
    Optim. 16 (2005), section 4 (the approximate Wolfe conditions).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from secant.result import Status
from secant.solvers.forcing import ForcingTerm
from secant.solvers.line_search import Trial, run, strong_wolfe

#: The last system is solved to this part of the tolerance, so that the curvature's change has the rest.
_LAST = 0.25
#: Trials of a line search; Newton steps take one.
_MAX_TRIALS = 30
#: The same where values cannot tell: more of them end at a lower gradient, after more iterations.
_MAX_BLIND_TRIALS = 3
#: Iterations that neither the value nor the gradient, in either norm, shows to be of use; then the rest is rounding.
_PATIENCE = 20


class Iterate(Protocol):
    """Holds what is known of the objective at one point.

    value: of the objective. grad: of any shape. largest: its largest component in absolute value.
    """

    @property
    def value(self) -> float:
        """Give the value of the objective."""

    @property
    def grad(self) -> Tensor:
        """Give its gradient, of any shape."""

    @property
    def largest(self) -> float:
        """Give the largest component of the gradient in absolute value; NaN or infinite where one is."""


P = TypeVar("P", bound=Iterate)
_P = TypeVar("_P", bound=Iterate, contravariant=True)


class Objective(Protocol[P]):
    """Evaluates what `newton` minimises."""

    def move(self, point: P, p: Tensor, t: float) -> P:
        """Evaluate at the point plus t p; p has the shape of the gradient."""

    def noise(self, point: P) -> float:
        """Bound the rounding error of the difference of two values near the point, >= 0."""


class Direction(NamedTuple):
    """Holds p, of the shape of the gradient, and how many products with the Hessian it took."""

    p: Tensor
    inner: int


class DirectionSolver(Protocol[_P]):
    """Solves Newton systems, one after the other along the iterates."""

    def solve(self, objective: Any, point: _P, rtol: float, atol: float) -> Direction:
        """Solve H p = -g at a point of the objective, up to a relative or a largest component of the residual."""


class NewtonResult(NamedTuple, Generic[P]):
    """Tells where a Newton method ended, why, after how many iterations, and its last step (None without one)."""

    point: P
    status: Status
    n_iter: int
    step: Tensor | None = None


def newton(
    objective: Objective[P],
    point: P,
    directions: DirectionSolver[P],
    *,
    tol: float,
    max_iter: int,
    decrement_tol: float = 0.0,
    forcing: ForcingTerm | None = None,
    record: Callable[[P, float, int, int], bool] | None = None,
) -> NewtonResult[P]:
    """Minimise by Newton's method with a line search, from an evaluated finite point.

    Args:
        objective: what to minimise.
        point: where to start.
        directions: how to solve for directions. They should descend; the method ends at one that does not.
        tol: on the largest component of the gradient.
        max_iter: iterations.
        decrement_tol: stop also when g.H^-1 g is at most this.
        forcing: relative residuals of the systems, told the sizes (g.H^-1 g)^1/2; None: a new `ForcingTerm()`.
        record: called after each iteration with (point, t, products that the direction took, evaluations that the
            search took); true to stop.

    Returns:
        A `NewtonResult` with status CONVERGED, MAX_ITER, STALLED (the search finds no better point, or twenty
        iterations did not help) or STOPPED. STALLED comes with the best point, the others with the last.

    Example: the minimum of x^4 / 4 + x^2 / 2 - 2 x, where x^3 + x = 2.
        >>> from types import SimpleNamespace
        >>> class Quartic:
        ...     def at(self, x):
        ...         value, grad = x**4 / 4 + x**2 / 2 - 2 * x, x**3 + x - 2
        ...         return SimpleNamespace(x=x, value=value.item(), grad=grad, largest=grad.abs().item())
        ...     def move(self, point, p, t):
        ...         return self.at(point.x + t * p)
        ...     def noise(self, point):
        ...         return 1e-15
        ...     def solve(self, objective, point, rtol, atol):
        ...         return secant.solvers.Direction(-point.grad / (3 * point.x**2 + 1), 0)
        >>> f = Quartic()
        >>> found = secant.solvers.newton(f, f.at(torch.tensor(3.0, dtype=torch.float64)), f, tol=1e-9, max_iter=20)
        >>> found.status, round(found.point.x.item(), 9)
        (<Status.CONVERGED: 0>, 1.0)
    """
    forcing = ForcingTerm() if forcing is None else forcing
    best, least, since = point, math.inf, 0
    step: Tensor | None = None
    for n in range(max_iter):
        if point.largest <= tol:
            return NewtonResult(point, Status.CONVERGED, n, step)
        p, inner = directions.solve(objective, point, forcing.value, _LAST * tol)
        slope = _dot(point.grad, p)
        found = search(objective, point, p, slope)
        if found is None or since == _PATIENCE:
            return NewtonResult(best, Status.STALLED, n, step)
        point, t, told, evaluations = found
        step = t * p
        stop = record is not None and record(point, t, inner, evaluations)
        since = 0 if told or point.largest < best.largest or -slope < least else since + 1
        if told or point.largest < best.largest:
            best = point
        least = min(least, -slope)
        forcing.update(math.sqrt(-slope))
        if stop:
            return NewtonResult(point, Status.STOPPED, n + 1, step)
        if -slope <= decrement_tol:
            return NewtonResult(point, Status.CONVERGED, n + 1, step)
    status = Status.CONVERGED if point.largest <= tol else Status.MAX_ITER
    return NewtonResult(point, status, max_iter, step)


class Move(NamedTuple, Generic[P]):
    """Tells where a search led, how far along p, whether the value told (else the slope), and its evaluations."""

    point: P
    t: float
    told: bool
    evaluations: int


def search(objective: Objective[P], point: P, p: Tensor, slope: float) -> Move[P] | None:
    """Find a point along p that satisfies the strong Wolfe conditions, t = 1 tried first; None if none is better.

    Where the decrease to be expected is below the rounding of the value, the slope decides: there only a point that
    satisfies the approximate conditions is one.
    """
    if not -math.inf < slope < 0.0:  # products that overflow may tell nothing of a finite objective
        return None
    trials = {0.0: point}

    def evaluate(t: float) -> Trial:
        trials[t] = objective.move(point, p, t)
        return Trial(t, trials[t].value, _dot(trials[t].grad, p))

    def keep(best: float) -> None:
        for other in trials.keys() - {0.0, best}:
            del trials[other]

    noise = objective.noise(point)
    blind = -slope <= noise
    walk = strong_wolfe(
        Trial(0.0, point.value, slope),
        evaluate(1.0),
        tolerance=0.0,
        max_evaluations=_MAX_BLIND_TRIALS if blind else _MAX_TRIALS,
        noise=noise,
    )
    found = run(walk, evaluate, keep)
    t = found.trial.t
    if t == 0.0 or (blind and not found.wolfe):
        return None
    return Move(trials[t], t, not blind and found.trial.value < point.value, found.evaluations)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))
