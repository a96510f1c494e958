"""Quasi-Newton within bounds on many problems at once: the minimum of a model on the variables that are free.

Each problem holds the variables at a bound that -g points beyond, and minimizes its model in the others. What goes
beyond a bound there is put on it, and the rest is minimized once more, as it is now. What comes out is projected, and a
line search goes towards it. All this is masks and small systems: nothing is sorted.

Up to 64 variables the model is a dense matrix B, scaled by itself, and each problem solves B_FF d_F = -(g + B d)_F. For
more it is the pairs of L-BFGS, whose y is zero where s is: while the held variables stay, these are the pairs of f on
the free ones.

References:
    Bertsekas, Projected Newton methods for optimization problems with simple constraints, SIAM J. Control Optim. 20
    (1982), section 2 (what is held, and that the rest descends).
    Al-Baali, Spedicato, Maggioni, Broyden's quasi-Newton methods for a nonlinear system of equations and unconstrained
    optimization: a review and open problems, Optim. Methods Softw. 29 (2014), section 4 (the scale).
    Ni and Yuan, A subspace limited memory quasi-Newton algorithm for large-scale nonlinear bound constrained
    optimization, Math. Comp. 66 (1997), section 2 (pairs of free variables).
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from secant.ops.blocks import MAX_N, block_solve
from secant.ops.history import LBFGSHistory
from secant.solvers.batched_descent import Sides, Steps, batched_descent
from secant.solvers.batched_lbfgs import BatchedFunction, BatchedMinimum

#: Sufficient decrease, as `lbfgs_b` has it.
_C1 = 1e-3
#: What a direction must have of the slope of the projected gradient, or that is taken.
_LEAST = 1e-2


class _InBox(abc.ABC):
    """Base of directions within bounds."""

    def next(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Return P(x + d) - x, by the model, or by the gradient where that does not descend."""
        x, g, sides = steps.x, steps.g, steps.sides
        assert sides is not None
        gamma = self._learn(steps.s, steps.y).to(x.dtype)[:, None]
        held = ((x <= sides.lower) & (g > 0.0)) | ((x >= sides.upper) & (g < 0.0))
        d = self._minimize(g, torch.zeros_like(x), held)
        goal = x + d
        out = (goal < sides.lower) | (goal > sides.upper)
        beyond = torch.where(out, sides.project(goal) - x, 0.0)
        d = torch.where(out, beyond, self._minimize(g, beyond, held | out))
        lost = steps.which & ~d.isfinite().all(-1)
        if bool(lost.any()):
            self.forget(lost)  # rounding has left a model without a minimum
        plain = sides.project(x - gamma * g) - x
        d = sides.project(x + d) - x
        poor = ~((g * d).sum(-1) <= _LEAST * (g * plain).sum(-1))
        d = torch.where(poor[:, None], plain, d)
        shut = sides.lower.isfinite().all(-1) & sides.upper.isfinite().all(-1)
        first = (1.0 / d.double().norm(dim=-1)).clamp_max(1.0)
        return d, torch.where(self._knows() | shut, 1.0, first)

    @abc.abstractmethod
    def _learn(self, s: Tensor, y: Tensor) -> Tensor:
        """Take pairs; return the scale s.y / y.y of the last one that was taken, (b,), 1 before the first."""

    @abc.abstractmethod
    def _minimize(self, g: Tensor, d: Tensor, held: Tensor) -> Tensor:
        """Minimize the model in the variables that are not held, where the others move by d; these get zero."""

    @abc.abstractmethod
    def _knows(self) -> Tensor:
        """Tell which problems have a pair."""

    @abc.abstractmethod
    def forget(self, which: Tensor) -> Tensor:
        """Forget pairs."""

    @abc.abstractmethod
    def take(self, places: Tensor) -> _InBox:
        """Go on with some of the problems."""


class _Dense(_InBox):
    """A matrix B (b, n, n) for each problem, by the self-scaled BFGS update.

        B+ = tau (B - B s s^T B / s.Bs) + y y^T / s.y,    tau = min(1, s.y / s.Bs)

    B is I before the first pair, then theta I, theta = y.y / s.y of that. gamma: see `_InBox._learn`.
    """

    def __init__(self, matrix: Tensor, gamma: Tensor, count: Tensor) -> None:
        self._matrix, self._gamma, self._count = matrix, gamma, count

    def _learn(self, s: Tensor, y: Tensor) -> Tensor:
        b = self._matrix
        sy, ss, yy = ((u * v).sum(-1) for u, v in ((s, y), (s, s), (y, y)))
        bs = (b * s[:, None]).sum(-1)
        sbs = (s * bs).sum(-1)
        takes = (sy > torch.finfo(s.dtype).eps * ss.sqrt() * yy.sqrt()) & (yy / sy).isfinite() & (sbs > 0.0)
        sy, sbs = torch.where(takes, sy, 1.0), torch.where(takes, sbs, 1.0)
        scale = torch.where(self._count == 0, yy / sy, (sy / sbs).clamp_max(1.0))
        # Of a multiple of B the middle term is the same multiple. Products of one vector stay symmetric in rounding.
        u, v = bs / sbs.sqrt()[:, None], y / sy.sqrt()[:, None]
        new = scale[:, None, None] * (b - u[:, :, None] * u[:, None]) + v[:, :, None] * v[:, None]
        self._matrix = torch.where(takes[:, None, None], new, b)
        moved = torch.where(s == 0.0, 0.0, y).square().sum(-1)  # what y is elsewhere is no matter of steps along s
        self._gamma = torch.where(takes, sy / moved, self._gamma)
        self._count = self._count + takes
        return self._gamma

    def _minimize(self, g: Tensor, d: Tensor, held: Tensor) -> Tensor:
        free = ~held
        right = torch.where(free, -(g + (self._matrix * d[:, None]).sum(-1)), 0.0)
        system = torch.where(free[:, :, None] & free[:, None], self._matrix, 0.0)
        system.diagonal(dim1=-2, dim2=-1).add_(held)
        return block_solve(system, right)[0]

    def _knows(self) -> Tensor:
        return self._count > 0

    def forget(self, which: Tensor) -> Tensor:
        which = which & (self._count > 0)
        eye = torch.eye(self._matrix.shape[-1], dtype=self._matrix.dtype, device=self._matrix.device)
        self._matrix = torch.where(which[:, None, None], eye, self._matrix)
        self._gamma, self._count = torch.where(which, 1.0, self._gamma), torch.where(which, 0, self._count)
        return which

    def take(self, places: Tensor) -> _Dense:
        return _Dense(*(x.index_select(0, places) for x in (self._matrix, self._gamma, self._count)))


class _FreePairs(_InBox):
    """Pairs of the variables that move."""

    def __init__(self, history: LBFGSHistory) -> None:
        self._history = history

    def _learn(self, s: Tensor, y: Tensor) -> Tensor:
        self._history.append(s, torch.where(s == 0.0, 0.0, y))
        return self._history.stats.gamma

    def _minimize(self, g: Tensor, d: Tensor, held: Tensor) -> Tensor:
        # H knows nothing of how those that are held act on the others.
        return torch.where(held, 0.0, self._history.direction(torch.where(held, 0.0, g)))

    def _knows(self) -> Tensor:
        return self._history.count > 0

    def forget(self, which: Tensor) -> Tensor:
        which = which & (self._history.count > 0)
        self._history.forget(which)
        return which

    def take(self, places: Tensor) -> _FreePairs:
        return _FreePairs(self._history.take(places))


def batched_lbfgs_b(
    evaluate: BatchedFunction,
    x0: Tensor,
    sides: Sides,
    *,
    history_size: int = 20,
    gtol: float = 1e-5,
    ftol: float = 0.0,
    max_iter: int = 15_000,
    max_nfev: int = 15_000,
    max_trials: int = 20,
    tell: Callable[[int], object] | None = None,
) -> BatchedMinimum:
    """Minimize B functions of n variables within bounds, each problem with model, search, end and failure of its own.

    Args:
        evaluate, x0, gtol, ftol, max_iter, max_nfev, max_trials, tell: see `batched_descent`.
        sides: bounds, (B, n); a lower one may equal the upper one.
        history_size: pairs, for more than 64 variables.

    References:
        See the module.
    """
    b, n = x0.shape
    directions: _InBox
    if n <= MAX_N:
        matrix = torch.eye(n, dtype=x0.dtype, device=x0.device).repeat(b, 1, 1)
        directions = _Dense(matrix, x0.new_ones(b), torch.zeros(b, dtype=torch.int32, device=x0.device))
    else:
        directions = _FreePairs(LBFGSHistory(n, history_size, batch=b, dtype=x0.dtype, device=x0.device))
    return batched_descent(
        evaluate, x0, directions, sides=sides, gtol=gtol, ftol=ftol, max_iter=max_iter, max_nfev=max_nfev,
        max_trials=max_trials, c1=_C1, tolerance=0.0, tell=tell,
    )  # fmt: skip
