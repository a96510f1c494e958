"""Newton's method on many problems at once: Hessians whose eigenvalues are made positive, and strong Wolfe searches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secant.ops.blocks import MAX_N, block_eigh
from secant.solvers.batched_descent import Steps, batched_descent
from secant.solvers.batched_lbfgs import BatchedFunction, BatchedMinimum

#: The smallest eigenvalue that is divided by, relative to the largest, as `secant.optim.Newton` has it.
_FLOOR = 1e-8

#: (x (b, n), places among all (b,)) -> Hessians (b, n, n), without a graph.
BatchedHessian = Callable[[Tensor, Tensor], Tensor]


def eigenvalues(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose symmetric matrices (b, n, n) in float64, (b, n) ascending and (b, n, n); NaN where not finite."""
    a = hessian.double()
    a = 0.5 * (a + a.mT)
    if a.shape[-1] <= MAX_N:
        w, v, _ = block_eigh(a)
        return w, v
    finite = a.isfinite().all(-1).all(-1)
    w, v = torch.linalg.eigh(torch.where(finite[:, None, None], a, 0.0))
    return torch.where(finite[:, None], w, torch.nan), v


def turned(v: Tensor, x: Tensor) -> Tensor:
    """Return V^T x of each problem; its bits do not depend on how many there are."""
    return (v * x[:, :, None]).sum(1)


def back(v: Tensor, x: Tensor) -> Tensor:
    """Return V x of each problem."""
    return (v * x[:, None]).sum(-1)


class _Newton:
    """Directions -V |W|^-1 V^T g of the Hessians where the problems are."""

    def __init__(self, hessian: BatchedHessian, n: int, dtype: torch.dtype) -> None:
        self._hessian = hessian
        self._floor = max(_FLOOR, n * torch.finfo(dtype).eps)

    def next(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Evaluate Hessians where a direction is wanted, and nowhere else."""
        d = torch.zeros_like(steps.x)
        places = steps.which.nonzero()[:, 0]
        if len(places):
            g = steps.g[places]
            w, v = eigenvalues(self._hessian(steps.x[places], steps.problem[places]))
            largest = w.abs().amax(-1, keepdim=True)
            # Without any curvature there is no scale: the gradient itself.
            w = torch.maximum(w.abs(), torch.where(largest > 0.0, self._floor * largest, 1.0))
            d[places] = -back(v, turned(v, g.double()) / w).to(d.dtype)
        return d, torch.ones_like(steps.which, dtype=torch.float64)

    def forget(self, which: Tensor) -> Tensor:
        """Return that there is nothing to forget."""
        return torch.zeros_like(which)

    def take(self, places: Tensor) -> _Newton:
        """Go on with some of the problems."""
        return self


def batched_newton(
    evaluate: BatchedFunction,
    hessian: BatchedHessian,
    x0: Tensor,
    *,
    gtol: float = 1e-5,
    ftol: float = 0.0,
    max_iter: int = 15_000,
    max_nfev: int = 15_000,
    tell: Callable[[int], object] | None = None,
) -> BatchedMinimum:
    """Minimize B functions of n variables by Newton's method.

    H = V diag(w) V^T,  d = -V diag(1 / max(|w|, floor)) V^T g: a saddle point repels. The step 1 is tried first.

    Args:
        hessian: evaluates (b, n, n). evaluate, x0, gtol, ftol, max_iter, max_nfev, tell: see `batched_descent`.

    References:
        Those of `secant.optim.Newton`.
    """
    return batched_descent(
        evaluate, x0, _Newton(hessian, x0.shape[1], x0.dtype), gtol=gtol, ftol=ftol, max_iter=max_iter,
        max_nfev=max_nfev, tell=tell,
    )  # fmt: skip
