"""What trust regions have in common: how a radius shrinks; and the step of least squares within one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: |D^(1/2) d| is the radius up to this part of it.
_EASY = 0.1
#: Where in its interval a lambda is put by nothing better than the interval.
_SHARE = 1e-3
#: Newton steps for one lambda; three are usual.
_STEPS = 50

#: The least and the most that is left of a step whose gain ratio was poor.
MOST, LEAST = 0.5, 0.1


def shrink(decrease: float, slope: float) -> float:
    """Return the radius after a step that was poor, in steps.

    It is where the parabola with the value and the slope at the start, and the value at the end, has its minimum, and
    1/2 where the loss has not risen.

    Args:
        decrease: of the loss along the step; infinite where it has none. slope: g.s < 0.

    References:
        Dennis and Schnabel, Numerical Methods for Unconstrained Optimization, SIAM (1996), section 6.4.3; MINPACK.
    """
    if not decrease < 0.0:
        return MOST
    return min(max(0.5 * slope / (slope + decrease), LEAST), MOST) if math.isfinite(decrease) else LEAST


class Region:
    r"""The d(lambda) with (J^T J + lambda D) d = -J^T u, of which one is as long as a radius.

        J D^(-1/2) = U S V^T,    d(lambda) = -D^(-1/2) V (S^2 + lambda)^-1 S U^T u

    One singular value decomposition, 2 N P^2 and more operations, gives it for every lambda, as exactly for a small one
    as for a large one: J^T J, whose condition is the square of that of J, is never made. Singular values that are zero
    to rounding have no part in d(0).

    Args:
        matrix: J (N, P), times the weights, float64. scale: the diagonal of D (P,), positive; None: I. free: marks the
            components of d that are not to be zero; None: all. weighted: whether the weights differ by so much that the
            small rows of U are lost: then S U^T u is V^T D^(-1/2) J^T u.
    """

    def __init__(
        self, matrix: Tensor, scale: Tensor | None, free: Tensor | None = None, *, weighted: bool = False
    ) -> None:
        self._inverse = None if scale is None else scale.rsqrt()
        if free is not None:
            self._inverse = free.double() if self._inverse is None else self._inverse * free
        if self._inverse is not None:
            matrix = matrix * self._inverse
        self._matrix = matrix if weighted else None
        self._u, self._s, self._v = torch.linalg.svd(matrix, full_matrices=False)
        self._rounding = max(matrix.shape) * torch.finfo(torch.float64).eps * self._s[0]

    def solve(self, u: Tensor, damping: float) -> Tensor:
        """Return -d(lambda)."""
        x = self._v.mT @ self._filtered(self._part(u), damping)
        return x if self._inverse is None else x * self._inverse

    def _part(self, u: Tensor) -> Tensor:
        """Return S U^T u."""
        return self._s * (self._u.mT @ u) if self._matrix is None else self._v @ (self._matrix.mT @ u)

    def _filtered(self, part: Tensor, damping: float) -> Tensor:
        squares = self._s.square()
        if damping > 0.0:
            return part / (squares + damping)
        return torch.where(self._s > self._rounding, part / squares, 0.0)

    def damping(self, u: Tensor, radius: float) -> float:
        """Find the lambda >= 0 whose d is as long as the radius; 0 where d(0) is not longer.

        References:
            More, The Levenberg-Marquardt algorithm: implementation and theory, LNM 630 (1978), Algorithm 5.5: Newton on
            1/|d| = 1/radius in an interval that every step shrinks.
        """
        part = self._part(u)
        excess = float(self._filtered(part, 0.0).norm()) - radius
        if excess <= _EASY * radius:
            return 0.0
        low, high = 0.0, float(part.norm()) / radius
        damping = _SHARE * high
        if bool(self._s[-1] > self._rounding):
            low = damping = self._newton(part, 0.0, radius)
        for _ in range(_STEPS):
            size = float(self._filtered(part, damping).norm())
            if abs(size - radius) <= _EASY * radius:
                break
            if size > radius:
                low = damping
            else:
                high = damping
            damping = self._newton(part, damping, radius)
            if not low < damping < high:
                damping = max(_SHARE * high, math.sqrt(low * high))
        return damping

    def _newton(self, part: Tensor, damping: float, radius: float) -> float:
        q = self._filtered(part, damping)
        size = q.norm()
        return damping + float(
            (size - radius) / radius * size.square() / (q.square() / (self._s.square() + damping)).sum()
        )
