"""BFGS on many problems at once, each with a dense inverse Hessian of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secant.solvers.batched_descent import Steps, batched_descent
from secant.solvers.batched_lbfgs import BatchedFunction, BatchedMinimum


class _InverseHessians:
    """Directions -H g. H (b, n, n), which is gamma I before the first pair, gamma = s.y / y.y of that."""

    def __init__(self, h: Tensor, count: Tensor) -> None:
        self._h, self._count = h, count

    def next(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Make the update where s.y > eps |s| |y|, and return -H g.

        Products are sums of elementwise products: their bits do not depend on how many problems there are.
        """
        s, y, g, h = steps.s, steps.y, steps.g, self._h
        sy, ss, yy = ((a * b).sum(-1) for a, b in ((s, y), (s, s), (y, y)))
        learns = (sy > torch.finfo(s.dtype).eps * ss.sqrt() * yy.sqrt()) & (yy / sy).isfinite()
        sy = torch.where(learns, sy, 1.0)
        gamma = torch.where(learns & (self._count == 0), sy / yy, 1.0)
        hy = gamma[:, None] * (h * y[:, None]).sum(-1)
        factor = (1.0 + (y * hy).sum(-1) / sy) / sy
        # H - (s (H y)^T + (H y) s^T) / s.y + (1 + y.H y / s.y) s s^T / s.y, as u s^T + s u^T
        u = 0.5 * factor[:, None] * s - hy / sy[:, None]
        outer = u[:, :, None] * s[:, None]
        updated = gamma[:, None, None] * h + (outer + outer.mT)
        self._h = h = torch.where(learns[:, None, None], updated, h)
        self._count = self._count + learns
        first = (1.0 / g.double().abs().sum(-1)).clamp_max(1.0)
        return -(h * g[:, None]).sum(-1), torch.where(self._count > 0, 1.0, first)

    def forget(self, which: Tensor) -> Tensor:
        """Put I in the place of H."""
        which = which & (self._count > 0)
        eye = torch.eye(self._h.shape[-1], dtype=self._h.dtype, device=self._h.device)
        self._h = torch.where(which[:, None, None], eye, self._h)
        self._count = torch.where(which, 0, self._count)
        return which

    def take(self, places: Tensor) -> _InverseHessians:
        """Go on with some of the problems."""
        return _InverseHessians(self._h.index_select(0, places), self._count.index_select(0, places))


def batched_bfgs(
    evaluate: BatchedFunction,
    x0: Tensor,
    *,
    gtol: float = 1e-5,
    ftol: float = 0.0,
    max_iter: int = 15_000,
    max_nfev: int = 15_000,
    tell: Callable[[int], object] | None = None,
) -> BatchedMinimum:
    """Minimize B functions of n variables by BFGS; the arguments are those of `batched_descent`.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 6.1, p. 140; eq. 6.20 (the first scale).
    """
    b, n = x0.shape
    h = torch.eye(n, dtype=x0.dtype, device=x0.device).repeat(b, 1, 1)
    directions = _InverseHessians(h, torch.zeros(b, dtype=torch.int32, device=x0.device))
    return batched_descent(
        evaluate, x0, directions, gtol=gtol, ftol=ftol, max_iter=max_iter, max_nfev=max_nfev, tell=tell
    )
