"""Losses that grow more slowly than the square of a residual, as `scipy.optimize.least_squares` has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: The least curvature of a row, relative to that of a square.
_LEAST = torch.finfo(torch.float64).eps


class Robust(NamedTuple):
    r"""1/2 sum_i c^2 rho((r_i / c)^2), with a scale c where outliers begin.

    | name | rho(z) |
    |---|---|
    | "linear" | z |
    | "soft_l1" | 2 (sqrt(1 + z) - 1) |
    | "huber" | z for z <= 1, else 2 sqrt(z) - 1 |
    | "cauchy" | ln(1 + z) |

    References:
        Triggs et al., Bundle adjustment: a modern synthesis (2000), section 4.3 (the second derivative of a row).
    """

    name: str
    scale: float
    batched: bool = False  # whether residuals are (B, k), a problem each, and losses (B,)

    def _sum(self, x: Tensor) -> Tensor:
        return x.sum(-1) if self.batched else x.sum()

    def _squares(self, residuals: Tensor) -> Tensor:
        return (residuals / self.scale).square()

    def value(self, residuals: Tensor) -> Tensor:
        """Return the loss (), or (B,)."""
        if self.name == "linear":
            return 0.5 * self._sum(residuals.square())
        z = self._squares(residuals)
        if self.name == "soft_l1":
            rho = 2.0 * z / ((1.0 + z).sqrt() + 1.0)
        elif self.name == "huber":
            rho = torch.where(z <= 1.0, z, 2.0 * z.sqrt() - 1.0)
        else:
            rho = z.log1p()
        return 0.5 * self.scale**2 * self._sum(rho)

    def decrease(self, before: Tensor, after: Tensor) -> Tensor:
        """Return value(before) - value(after), of differences that are taken row by row before anything is rounded.

        With (r - s)(r + s) in place of r^2 - s^2 it has the accuracy of r - s, which the difference of two sums has not
        near the end of a run.
        """
        product = (before - after) * (before + after)
        if self.name == "linear":
            return 0.5 * self._sum(product)
        z, y, difference = self._squares(before), self._squares(after), product / self.scale**2
        if self.name == "soft_l1":
            rho = 2.0 * difference / ((1.0 + z).sqrt() + (1.0 + y).sqrt())
        elif self.name == "huber":
            outside = 2.0 * difference / (z.sqrt() + y.sqrt()).clamp_min(1.0)
            across = torch.where(z <= 1.0, z + 1.0 - 2.0 * y.sqrt(), 2.0 * z.sqrt() - 1.0 - y)
            both, neither = (z <= 1.0) & (y <= 1.0), (z > 1.0) & (y > 1.0)
            rho = torch.where(both, difference, torch.where(neither, outside, across))
        else:
            rho = difference.sign() * (difference.abs() / (1.0 + torch.minimum(y, z))).log1p()
        return 0.5 * self.scale**2 * self._sum(rho)

    def linearized(self, residuals: Tensor) -> tuple[Tensor, Tensor | None]:
        r"""Return u and w such that the gradient is J^T W u and the curvature J^T W^2 J, W = diag(w); None for I.

        w^2 = rho' + 2 z rho'', not below the rounding unit,        u = rho' r / w
        """
        if self.name == "linear":
            return residuals, None
        z = self._squares(residuals)
        if self.name == "soft_l1":
            first = (1.0 + z).rsqrt()
            second = -0.5 * first**3
        elif self.name == "huber":
            first = torch.where(z <= 1.0, 1.0, z.clamp_min(1.0).rsqrt())
            second = torch.where(z <= 1.0, 0.0, -0.5 * z.clamp_min(1.0) ** -1.5)
        else:
            first = 1.0 / (1.0 + z)
            second = -first.square()
        weights = (first + 2.0 * z * second).clamp_min(_LEAST).sqrt()
        return first * residuals / weights, weights
