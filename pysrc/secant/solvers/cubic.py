"""The cubically regularised quadratic model, in a Krylov space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.result import Status
from secant.solvers.krylov import KrylovModel

#: Relative error of the multiplier; the equation has one unknown, so that precision costs little.
_PRECISION = 1e-14
_MAX_ITER = 100
#: What |u| may lack, squared and relative, before it is made up.
_HARD = 1e-6


class CubicStep(NamedTuple):
    """Holds what `cubic` found.

    x: the step, (n,). status: CONVERGED, MAX_ITER (the best of a space of max_iter dimensions) or NOT_FINITE (a product
    was not; x is zero). multiplier: lambda = sigma |x|. decrease: of the quadratic model, -(g.x + 1/2 x.A x). size:
    |x|. iterations: products with A. model: the space, and m in it.
    """

    x: Tensor
    status: Status
    multiplier: float
    decrease: float
    size: float
    iterations: int
    model: KrylovModel

    def again(self, sigma: float) -> CubicStep:
        """Minimise with another sigma in the same space, without a product; a larger one needs no larger space.

        Raises:
            ValueError: `sigma` is not positive.
        """
        sigma = _checks.positive("CubicStep.again", "sigma", sigma)
        return self if self.status is Status.NOT_FINITE else _step(self.model, sigma, self.status)


def cubic(
    matvec: Callable[[Tensor], Tensor], grad: Tensor, *, sigma: float, rtol: float = 1e-6, max_iter: int = 100
) -> CubicStep:
    """Minimise g.x + 1/2 x.A x + sigma/3 |x|^3 for a symmetric A that may be indefinite, in a growing Krylov space.

    The global minimiser is the x with (A + lambda I) x = -g, A + lambda I positive semidefinite, lambda = sigma |x|. In
    the Krylov space of g it is found exactly, by Newton's method on 1/|x(lambda)| = sigma / lambda; the space grows
    until the gradient of the cubic model, which is then orthogonal to it, is at most rtol |g| (min(1, |x|) is left to
    the caller, because it depends on units).

    Args:
        matvec: v -> A v, of the shape of grad.
        grad: g, (n,), float32 or float64, not zero.
        sigma: > 0.
        rtol: see above, >= 0.
        max_iter: dimensions of the space, >= 1.

    Returns:
        A `CubicStep`, without a graph.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        Cartis, Gould, Toint, Adaptive cubic regularisation methods for unconstrained optimization, part I, Math.
        Program. 127 (2011), section 6. Griewank (1981) and Nesterov and Polyak, Math. Program. 108 (2006), eq. 2.4.

    Example:
        >>> a = torch.tensor([1.0, -2.0], dtype=torch.float64)
        >>> step = secant.solvers.cubic(lambda v: a * v, torch.tensor([0.0, 1e-3], dtype=torch.float64), sigma=1.0)
        >>> round(step.size, 2), round(step.multiplier, 2)      # along the negative curvature, |x| = 2 / sigma
        (2.0, 2.0)
    """
    op = "cubic"
    sigma = _checks.positive(op, "sigma", sigma)
    rtol = _checks.nonnegative(op, "rtol", rtol)
    model = KrylovModel(matvec, grad, max_iter=max_iter)
    status = Status.MAX_ITER
    while status is Status.MAX_ITER and model.grow():
        if not model.finite:
            return CubicStep(torch.zeros_like(grad), Status.NOT_FINITE, 0.0, 0.0, 0.0, model.iterations, model)
        residual = model.residual(_minimizer(model.values, model.slopes, sigma))
        if model.complete or residual <= rtol * float(model.slopes.norm()):
            status = Status.CONVERGED
    return _step(model, sigma, status)


def _step(model: KrylovModel, sigma: float, status: Status) -> CubicStep:
    u = _minimizer(model.values, model.slopes, sigma)
    size = float(u.norm())
    return CubicStep(model.combine(u), status, sigma * size, model.decrease(u), size, model.iterations, model)


def _minimizer(theta: Tensor, gamma: Tensor, sigma: float) -> Tensor:
    """Minimise sum_i (gamma_i u_i + 1/2 theta_i u_i^2) + sigma/3 |u|^3, theta ascending."""
    least, size = float(theta[0]), float(gamma.norm())
    low = max(0.0, -least)
    above = theta + low  # the multiplier is low + delta: close to low, delta keeps the digits that their sum would lose

    def at(delta: float) -> tuple[Tensor, float]:
        u = -gamma / (above + delta)
        return u, float(u.norm())

    # |u| <= |gamma| / (lambda + least), so that here |u| <= lambda / sigma.
    left, right = 0.0, 2.0 * sigma * size / (math.sqrt(least * least + 4.0 * sigma * size) + abs(least))
    delta = right
    for _ in range(_MAX_ITER):
        u, length = at(delta)
        target = (low + delta) / sigma
        if abs(length - target) <= _PRECISION * target:
            return u
        if length > target or not math.isfinite(length):
            left = delta
        else:
            right = delta
        if right - left <= _PRECISION * right:
            break
        # Newton on sigma / lambda - 1 / |u(lambda)|.
        new = math.nan
        if 0.0 < length < math.inf:
            slope = float((u * u / (above + delta)).sum()) / length**3
            new = delta + (1.0 / target - 1.0 / length) / (1.0 / (target * (low + delta)) + slope)
        if not left < new < right:
            new = math.sqrt(left * right) if left > 0.0 else 1e-4 * right
        delta = new
    u, length = at(right)
    if not math.isfinite(length):
        u = torch.where(above > 0.0, u, 0.0)
        length = float(u.norm())
    missing = ((low + right) / sigma) ** 2 - length**2
    if least < 0.0 and missing > _HARD * length**2:
        # The hard case to rounding: what gamma lacks along the lowest direction is made up along it.
        u = u.clone()
        u[0] = -math.copysign(math.sqrt(float(u[0]) ** 2 + missing), float(gamma[0]))
    return u
