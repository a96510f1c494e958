"""Preconditioners, which stand for the inverse Hessian: by its diagonal after centring, or a Cholesky factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secant.glm.objective import FitPoint, Objective


class DiagonalPreconditioner:
    """Changes to coordinates u where features are centred and of unit curvature: theta = T u, (w, b) from (u_w, u_b).

    With m the weighted means of the features, w = u_w / s and b = u_b / s_b - m.w, so that

        x.w + b = (x - m).w + u_b / s_b,      s^2 = sum_i D_i (x_i - m)^2 + l2,      s_b^2 = sum_i D_i.

    T T^T is the inverse of what the Hessian would be if the centred features were uncorrelated. Nothing is copied: T
    and T^T act on vectors of coefficients. For the multinomial loss each class has its own T.
    """

    def __init__(self, objective: Objective, point: FitPoint) -> None:
        total, first, second = objective.moments(point)
        eps = torch.finfo(second.dtype).eps
        self._d = second.shape[0]
        # Of a class or a model whose rows are all saturated nothing but the penalty is left.
        floor = torch.where(total > 0.0, total, 1.0)
        if objective.intercept:
            self._mean = first / floor
            centred = second - self._mean * first
            # What cancels up to the rounding of N terms is a constant column: any scale will do, but for a tiny one.
            lost = 8.0 * math.sqrt(objective.rows) * eps
            second = torch.where(centred > lost * second, centred, second)
        curvature = second + objective.l2
        self._inverse = torch.where(curvature > 0.0, curvature, 1.0).rsqrt()
        self._inverse_intercept = floor.rsqrt()
        self._intercept = objective.intercept

    def to_theta(self, u: Tensor) -> Tensor:
        """Compute T u."""
        w = u[: self._d] * self._inverse
        if not self._intercept:
            return w
        b = u[self._d] * self._inverse_intercept - (self._mean * w).sum(0)
        return torch.cat([w, b[None]])

    def from_theta(self, theta: Tensor) -> Tensor:
        """Compute T^-1 theta."""
        w = theta[: self._d]
        u = w / self._inverse
        if not self._intercept:
            return u
        b = (theta[self._d] + (self._mean * w).sum(0)) / self._inverse_intercept
        return torch.cat([u, b[None]])

    def to_u(self, grad: Tensor) -> Tensor:
        """Compute T^T g: the gradient with respect to u."""
        if not self._intercept:
            return grad * self._inverse
        b = grad[self._d]
        return torch.cat([(grad[: self._d] - self._mean * b) * self._inverse, (b * self._inverse_intercept)[None]])

    def solve(self, r: Tensor) -> Tensor:
        """Compute T T^T r."""
        return self.to_theta(self.to_u(r))


class CholeskyPreconditioner:
    """Factors a Gram matrix (Cholesky, float64), its intercepts eliminated and its diagonal scaled to one.

    Eliminating the intercepts centres the features, so that a large mean does not look like collinearity. What is then
    singular to the precision of its entries gets just as much added to its diagonal (more if need be, in powers of
    ten), and `exact` says that the factor is no longer of the matrix itself: the caller iterates.

    Args:
        gram: (P, P) float64, symmetric positive semidefinite.
        intercepts: how many of the last rows are eliminated.
        eps: relative error of the entries.
    """

    def __init__(self, gram: Tensor, intercepts: int, eps: float) -> None:
        size = self._size = len(gram) - intercepts
        error = 8.0 * len(gram) * eps
        finite = bool(torch.isfinite(gram).all())
        if not finite:  # second derivatives may overflow where value and gradient do not
            gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        rest, before = gram[:size, :size], gram.diagonal()[:size].clone()
        if intercepts:
            self._tail, _ = _regular_cholesky(gram[size:, size:], error)
            self._border = torch.cholesky_solve(gram[size:, :size], self._tail)
            rest = rest - gram[:size, size:] @ self._border
        else:
            rest = rest.clone()
        constant = rest.diagonal() <= error * before
        rest[constant] = 0.0
        rest[:, constant] = 0.0
        rest.diagonal()[constant] = torch.where(before > 0.0, before, 1.0)[constant]
        self._scale = rest.diagonal().rsqrt()
        self._factor, shift = _regular_cholesky(rest * self._scale[:, None] * self._scale, error)
        self.exact = finite and shift == 0.0 and not bool(constant.any())

    def solve(self, r: Tensor) -> Tensor:
        """Compute M^-1 r, in the shape and dtype of r."""
        flat = r.reshape(-1).double()
        w = flat[: self._size]
        if self._size < len(flat):
            w = w - flat[self._size :] @ self._border
        w = torch.cholesky_solve((w * self._scale)[:, None], self._factor)[:, 0] * self._scale
        if self._size < len(flat):
            b = torch.cholesky_solve(flat[self._size :, None], self._tail)[:, 0] - self._border @ w
            w = torch.cat([w, b])
        return w.reshape(r.shape).to(r.dtype)


def _regular_cholesky(a: Tensor, error: float) -> tuple[Tensor, float]:
    """Factor A plus a multiple of its diagonal, and tell it: 0 unless a pivot is lost in the error of A."""
    diagonal = a.diagonal()
    if not bool((diagonal > 0.0).all()):
        a = a + torch.diag((diagonal <= 0.0).to(a))
        diagonal = a.diagonal()
    shift = 0.0
    while True:
        factor, info = torch.linalg.cholesky_ex(a + torch.diag(shift * diagonal) if shift else a)
        if int(info) == 0 and bool((factor.diagonal() ** 2 > 0.5 * error * diagonal).all()):
            return factor, shift
        shift = max(error, 10.0 * shift)
