"""The smallest minimiser of a least-squares problem that has many."""

from __future__ import annotations

import torch

from secant.glm.objective import FitPoint, Objective
from secant.glm.result import FitRecorder
from secant.result import Status
from secant.solvers.newton import NewtonResult


def smallest(objective: Objective, tol: float, max_iter: int, record: FitRecorder) -> NewtonResult[FitPoint]:
    """Find, of all (w, b) that minimise the objective with the squared loss, that with the smallest |w|.

    With X_c the rows minus their weighted mean (with an intercept), times sqrt(c), and X_c = U S V^T,

        w = V f(S) U^T y_c,    f(s) = s / (s^2 + l2), and 0 where s <= eps max(N, d) max(S).

    References:
        Golub and Van Loan, Matrix Computations, 4th ed., section 5.5.
    """
    if max_iter == 0:
        point = objective.evaluate(objective.zeros())
        status = Status.CONVERGED if point.largest <= tol * objective.total else Status.MAX_ITER
        return NewtonResult(point, status, 0)
    x, y = objective.x.double(), objective.target.double()
    if objective.offset is not None:
        y = y - objective.offset
    if objective.shift is not None:
        x = x - objective.shift
    c = torch.ones_like(y) if objective.sample_weight is None else objective.sample_weight.double()
    mean, level = x.new_zeros(x.shape[1]), y.new_zeros(())
    if objective.intercept:
        mean, level = c @ x / c.sum(), c @ y / c.sum()
    root = c.sqrt()
    u, s, vt = torch.linalg.svd((x - mean) * root[:, None], full_matrices=False)
    kept = s > torch.finfo(objective.x.dtype).eps * max(x.shape) * s[:1]
    gain = torch.where(kept, s / (s * s + objective.l2).where(kept, 1.0), 0.0)
    w = vt.mT @ (gain * (u.mT @ ((y - level) * root)))
    theta = torch.cat([w, (level - mean @ w)[None]]) if objective.intercept else w
    point = objective.evaluate(theta.to(objective.x.dtype))
    stop = record(objective, point, 1.0)
    missed = Status.STOPPED if stop else Status.STALLED
    return NewtonResult(point, Status.CONVERGED if point.largest <= tol * objective.total else missed, 1)
