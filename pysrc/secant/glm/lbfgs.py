"""Limited-memory BFGS directions in the coordinates of `DiagonalPreconditioner`."""

from __future__ import annotations

from torch import Tensor

from secant.glm.objective import FitPoint, Objective
from secant.glm.preconditioners import DiagonalPreconditioner
from secant.ops.history import LBFGSHistory
from secant.solvers.newton import Direction

HISTORY = 20


class HistorySystem:
    """Gives p = -T H T^T g from the curvature pairs of u = T^-1 theta, so that scales and offsets do not matter.

    It takes the place of a system that solves for Newton directions; the tolerances have no meaning for it.

    References:
        Liu and Nocedal, On the limited memory BFGS method for large scale optimization, Math. Program. 45 (1989).
    """

    _coordinates: DiagonalPreconditioner
    _history: LBFGSHistory
    _last: tuple[Tensor, Tensor]

    def __init__(self) -> None:
        self._started = False

    def solve(self, objective: Objective, point: FitPoint, rtol: float, atol: float) -> Direction:
        """Give the direction at the point, after the pair that led to it entered the history."""
        if not self._started:
            self._coordinates = DiagonalPreconditioner(objective, point)
        grad = self._coordinates.to_u(point.grad).reshape(-1)
        if self._started:
            theta, before = self._last
            step = self._coordinates.from_theta(point.theta - theta).reshape(-1)
            self._history.append(step, grad - before)
        else:
            self._history = LBFGSHistory(len(grad), HISTORY, dtype=grad.dtype, device=grad.device)
            self._started = True
        self._last = point.theta, grad
        d = self._history.direction(grad)
        return Direction(self._coordinates.to_theta(d.reshape(point.grad.shape)), 0)
