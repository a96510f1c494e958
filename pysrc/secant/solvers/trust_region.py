"""The trust-region subproblem of a dense matrix, solved exactly by Cholesky factors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.result import Status

#: Where a new multiplier is put in its interval when nothing better is known.
_SHARE = 0.01
#: Inverse iterations for the smallest eigenvalue of a factored matrix.
_INVERSE_ITERATIONS = 3


class TrustRegionStep(NamedTuple):
    """Holds what `more_sorensen` found.

    x: the step, (n,) in the dtype of the gradient. status: CONVERGED (inside the region), BOUNDARY (on it), MAX_ITER
    (the best so far, within the region) or NOT_FINITE (x is zero). multiplier: lambda. decrease: of the model,
    -(g.x + 1/2 x.A x). size: |x|. factorizations: how many it took.
    """

    x: Tensor
    status: Status
    multiplier: float
    decrease: float
    size: float
    factorizations: int


def more_sorensen(
    hessian: Tensor,
    grad: Tensor,
    *,
    radius: float,
    easy: float = 0.1,
    hard: float = 0.2,
    max_iter: int = 100,
) -> TrustRegionStep:
    """Minimise g.x + 1/2 x.A x subject to |x| <= radius, for a dense symmetric A that may be indefinite.

    The minimiser is the x with

        (A + lambda I) x = -g,    A + lambda I positive semidefinite,    lambda >= 0,    lambda (radius - |x|) = 0,

    found by Newton's method on 1/|x(lambda)| = 1/radius, within an interval that each Cholesky factorization shrinks.
    In the hard case (g has no part in the eigenspace of the smallest eigenvalue, and x(lambda) is short) a multiple of
    an eigenvector, from inverse iterations with the factor, leads to the boundary; so it does where g = 0 and A is
    indefinite. Directions that are flat to the rounding of A are not followed.

    Everything is computed in float64, whatever the dtype; each factorization is followed by one transfer to the host.

    Args:
        hessian: A, (n, n), float32 or float64; the lower triangle is read.
        grad: g, (n,), of its dtype and device.
        radius: finite, > 0.
        easy: relative error of |x| on the boundary, in (0, 1).
        hard: relative error of the model's decrease in the hard case, in (0, 1).
        max_iter: factorizations, >= 1.

    Returns:
        A `TrustRegionStep`, without a graph; `decrease` is at least (1 - easy)^2 (1 - hard) of the largest.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        More and Sorensen, Computing a trust region step, SIAM J. Sci. Stat. Comput. 4 (1983), Algorithm 3.14.
        Conn, Gould, Toint, Trust-Region Methods, SIAM (2000), Algorithm 7.3.4, p. 190. The defaults of easy and hard
        are theirs; inverse iterations stand for their estimate of a singular vector.

    Example:
        >>> a = torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> g = torch.tensor([3.0, 0.0], dtype=torch.float64)
        >>> step = secant.solvers.more_sorensen(a, g, radius=2.0, hard=1e-6)     # the hard case: -3/3, +-sqrt(4 - 1)
        >>> [round(abs(x), 3) for x in step.x.tolist()], round(step.multiplier, 3)
        ([1.0, 1.732], 2.0)
    """
    op = "more_sorensen"
    grad = _checks.tensor(op, "grad", grad, _checks.REAL).detach()
    if grad.dim() != 1 or len(grad) == 0:
        raise _checks.fail(op, "grad", "shape (n,), n >= 1", f"shape {tuple(grad.shape)}")
    n = len(grad)
    hessian = _checks.shaped(op, "hessian", hessian, (n, n), grad.dtype, grad.device).detach()
    radius = _checks.positive(op, "radius", radius)
    in_unit = "a number in (0, 1)"
    easy = _checks.number(op, "easy", easy, in_unit, lambda x: 0.0 < x < 1.0)
    hard = _checks.number(op, "hard", hard, in_unit, lambda x: 0.0 < x < 1.0)
    max_iter = _checks.integer(op, "max_iter", max_iter, 1)
    g, lower = grad.double(), torch.tril(hessian.double())
    a = lower + torch.tril(lower, -1).mT
    eps = torch.finfo(grad.dtype).eps
    x, status, multiplier, count = _Search(a, g, radius, easy, hard, max(n, 10) * eps).run(max_iter)
    decrease = float(-(g.dot(x) + 0.5 * x.dot(a @ x))) if status is not Status.NOT_FINITE else 0.0
    return TrustRegionStep(x.to(grad.dtype), status, multiplier, decrease, float(x.norm()), count)


class _Search:
    """Looks for the multiplier, in [low, high].

    Args:
        relative: rounding of A, of the size of its norm.
    """

    def __init__(self, a: Tensor, g: Tensor, radius: float, easy: float, hard: float, relative: float) -> None:
        self.a, self.g, self.radius, self.easy, self.hard = a, g, radius, easy, hard
        diagonal = a.diagonal()
        off = a.abs().sum(1) - diagonal.abs()
        numbers = [g.norm(), a.norm(), (off + diagonal.abs()).max(), (diagonal - off).min(), (diagonal + off).max(),
                   diagonal.min()]  # fmt: skip
        self.size, self.norm, largest, least, most, corner = torch.stack(numbers).tolist()
        self.finite = all(map(math.isfinite, (self.size, self.norm)))
        self.relative = relative
        self.flat = relative * self.norm  # multipliers below are lost in the largest elements
        self.small = relative**0.5 * self.norm
        bound, pull = min(self.norm, largest), self.size / radius
        self.high = max(0.0, pull + min(-least, bound))
        self.low = max(0.0, -corner, pull - min(most, bound))

    def run(self, max_iter: int) -> tuple[Tensor, Status, float, int]:
        """Return the step, the status, the multiplier and the number of factorizations."""
        g, radius = self.g, self.radius
        best, best_at = torch.zeros_like(g), 0.0
        if not self.finite:
            return best, Status.NOT_FINITE, 0.0, 0
        if self.size == self.norm == 0.0:
            return best, Status.CONVERGED, 0.0, 0
        shift = 0.0 if self.low == 0.0 else self._within()
        for count in range(1, max_iter + 1):
            matrix = self.a.clone()
            matrix.diagonal().add_(shift)
            factor, info = torch.linalg.cholesky_ex(matrix)
            refused, pivot = torch.stack((info.double(), factor.diagonal().square().min())).tolist()
            pivots = int(refused)
            if shift == 0.0 and not pivots and pivot <= self.small:
                curvature, vector = self._smallest(factor)
                if curvature <= self._rounding(vector):
                    shift = self._within()  # singular, whatever rounding says
                    continue
            if pivots:
                self._refused(matrix, pivots, shift)
                shift = self._within()
                continue
            x = -torch.cholesky_solve(g[:, None], factor)[:, 0]
            size = float(x.norm())
            if not math.isfinite(size):  # singular to rounding
                self.low = max(self.low, shift)
                shift = self._within()
                continue
            if size <= radius:
                if shift == 0.0:
                    return x, Status.CONVERGED, 0.0, count
                best, best_at = x, shift
            settled = self.high - self.low <= 2.0 * self.flat
            if abs(size - radius) <= self.easy * radius or (size > radius and settled):
                # What rounding leaves of the region's boundary is cut, so that |x| is never above the radius.
                return x * min(1.0, radius / size), Status.BOUNDARY, shift, count
            if size > radius:
                self.low = shift
            else:
                self.high = min(self.high, shift)
                curvature, vector = self._smallest(factor)
                rounding = self._rounding(vector)
                if curvature >= -rounding:
                    # Where A is singular, a smaller multiplier would magnify the rounding of g.
                    if (curvature <= rounding and shift <= self.small) or settled:
                        return x, Status.CONVERGED, shift, count
                else:
                    extra, along = curvature + shift, self._to_boundary(x, vector)
                    total = float(x.dot(self.a @ x)) + shift * radius * radius
                    if along * along * extra <= self.hard * total or settled:
                        return x + along * vector, Status.BOUNDARY, shift, count
                    self.low = max(self.low, -curvature)
            shift = self._newton(factor, x, size, shift) if size > 0.0 else -math.inf
            if not self.low <= shift <= self.high:
                shift = self._within()
        return best, Status.MAX_ITER, best_at, max_iter

    def _within(self) -> float:
        """Choose a multiplier inside the interval."""
        self.high = max(self.high, self.low + self.flat)  # where A + lambda I is singular it has no factor
        inside = max(math.sqrt(self.low * self.high), self.low + _SHARE * (self.high - self.low))
        # One that is smaller than half of this is lost in A.
        return max(inside if inside > self.low else self.high, 0.5 * self.flat)

    def _newton(self, factor: Tensor, x: Tensor, size: float, shift: float) -> float:
        """Make a step of Newton's method on 1/|x| = 1/radius."""
        w = torch.linalg.solve_triangular(factor, x[:, None], upper=False)[:, 0]
        return shift + (size / float(w.norm())) ** 2 * (size - self.radius) / self.radius

    def _refused(self, matrix: Tensor, pivots: int, shift: float) -> None:
        """Raise the lower end, by how much more makes the leading block of this size singular."""
        block = matrix[:pivots, :pivots]
        inner, column = block[:-1, :-1], block[:-1, -1]
        v = block.new_ones(pivots)
        if pivots > 1:
            factor, _ = torch.linalg.cholesky_ex(inner)
            v[:-1] = -torch.cholesky_solve(column[:, None], factor)[:, 0]
        lacking = float(-(v.dot(block @ v)) / v.dot(v))
        self.low = max(self.low, shift + lacking if math.isfinite(lacking) and lacking > 0.0 else shift)

    def _smallest(self, factor: Tensor) -> tuple[float, Tensor]:
        """Estimate the smallest eigenvalue of A from above, and its vector."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(len(self.g), 1, dtype=torch.float64, generator=generator).to(self.g.device)
        for _ in range(_INVERSE_ITERATIONS):
            v = torch.cholesky_solve(v, factor)
            v = v / v.norm()
        v = v[:, 0]
        return float(v.dot(self.a @ v)), v

    def _rounding(self, v: Tensor) -> float:
        """Bound what rounding the elements of A does to v.A v; where variables differ in scale less than to |A|."""
        return self.relative * float(v.abs().dot(self.a.abs() @ v.abs()))

    def _to_boundary(self, x: Tensor, v: Tensor) -> float:
        """Return the smaller t, in absolute value, with |x + t v| = radius, |v| = 1."""
        b, gap = float(x.dot(v)), self.radius**2 - float(x.dot(x))
        root = b + math.copysign(math.sqrt(b * b + gap), b)
        return gap / root if root else 0.0
