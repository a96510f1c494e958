"""Newton systems of generalised linear models, H p = -g, solved along the iterates.

By conjugate gradients preconditioned with either

* the diagonal of the centred Hessian ("newton-cg"), or
* a Cholesky factor of the Hessian ("newton-cholesky"): of this iterate, and then it is the solution and no iteration is
  needed, of an earlier one, or of a sample of the rows. It is replaced when iterating costs as much as a new one.

References:
    Nocedal and Wright, Numerical Optimization, 2nd ed., section 7.1.
    Byrd, Chin, Neveitt, Nocedal, On the use of stochastic Hessian information in optimization methods for machine
    learning, SIAM J. Optim. 21 (2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secant.glm.objective import FitPoint, Objective
from secant.glm.preconditioners import CholeskyPreconditioner, DiagonalPreconditioner
from secant.result import Status
from secant.solvers.cg import CGResult, cg
from secant.solvers.newton import Direction

#: One product with the Hessian costs as much as forming this many columns of it. Products are bound by memory, the
#: Gram matrix by arithmetic: measured 14 at (150k, 200) and 55 at (30k, 900), two cores.
_COLUMNS_PER_PRODUCT = 16
#: Multiply-adds of a Gram matrix that take less time than the calls of a few iterations.
_CHEAP_GRAM = 1 << 24
#: Curvature relative to that of the upper bound of a Hessian below which a direction counts as flat.
_FLAT = 1e-7
#: A diagonal is computed anew after a system that took as many products.
_SLOW = 20


def _solve(
    objective: Objective,
    point: FitPoint,
    preconditioner: DiagonalPreconditioner | CholeskyPreconditioner,
    rtol: float,
    atol: float,
    most: int,
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
    """Solves by conjugate gradients with a `DiagonalPreconditioner`, which is kept as long as it serves."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._preconditioner: DiagonalPreconditioner | None = None

    def solve(self, objective: Objective, point: FitPoint, rtol: float, atol: float) -> Direction:
        """See `DirectionSolver`."""
        if self._preconditioner is None:
            self._preconditioner = DiagonalPreconditioner(objective, point)
        found = _solve(objective, point, self._preconditioner, rtol, atol, self._most)
        inner = int(found.iterations)
        if inner >= _SLOW:
            self._preconditioner = None
        return Direction(found.x, inner)


@dataclass
class FactorSystem:
    """Solves by a Cholesky factor, with conjugate gradients where it is not that of the Hessian at the point."""

    most: int
    factor: CholeskyPreconditioner | None = None
    at: FitPoint | None = None

    def solve(self, objective: Objective, point: FitPoint, rtol: float, atol: float) -> Direction:
        """See `DirectionSolver`."""
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
            self.factor, self.at = CholeskyPreconditioner(objective.gram(point), tail, eps), point
        if self.factor.exact and not objective.majorised:
            return Direction(self.factor.solve(-point.grad), inner)
        found = _solve(objective, point, self.factor, rtol, atol, self.most)
        return Direction(found.x, inner + int(found.iterations))
