"""Trust-region Newton on many problems at once, each with its own radius; subproblems by eigenvalues, all in one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant.result import Status
from secant.solvers.batched_descent import RUNNING, Ends, begun, evaluated
from secant.solvers.batched_lbfgs import BatchedFunction, BatchedMinimum, few
from secant.solvers.batched_newton import BatchedHessian, back, eigenvalues, turned

#: Ratios below and above which the radius shrinks and grows, and by how much it grows; as `secant.optim.TrustRegion`.
_POOR, _GOOD, _GROWTH = 0.25, 0.75, 2.0
#: The most and the least that is left of a step that was poor.
_MOST, _LEAST = 0.5, 0.1
#: Newton steps for a multiplier. The first is at most n^(1/2) radii off, and each squares what is left.
_STEPS = 12
#: Changes of f below this many roundings of it cannot be told from them.
_NOISE = 4.0


class RegionSteps(NamedTuple):
    """Steps within a radius, (b, n) float64, the decrease that the model promises, and which end on the boundary."""

    s: Tensor
    predicted: Tensor
    at_boundary: Tensor


def within(w: Tensor, v: Tensor, g: Tensor, radius: Tensor, eps: float) -> RegionSteps:
    r"""Minimize g.s + 1/2 s.A s subject to |s| <= radius for each problem, A = V diag(w) V^T.

    With c = V^T g and mu = lambda + w_1 >= max(0, w_1), s = -V z, z_i = c_i / (w_i - w_1 + mu). Newton's method on
    1/|z| = 1/radius begins at the largest mu where a single |z_i| is the radius: |z| is there between the radius and
    n^(1/2) times it, and from there on falls to it. Where c has no part in the eigenspace of w_1 < 0 (the hard case)
    and |z| is below the radius at mu = 0, v_1 leads to the boundary.

    Args:
        w, v: eigenvalues (b, n), ascending, and eigenvectors. g: (b, n), float64. radius: (b,). eps: of the dtype of x.

    References:
        More and Sorensen, Computing a trust region step, SIAM J. Sci. Stat. Comput. 4 (1983), section 3.
    """
    c = turned(v, g)
    gaps = w - w[:, :1]
    least = w[:, 0].clamp_min(0.0)
    flat = w.shape[1] * eps * w.abs().amax(-1)

    def solved(mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z, |z| and the denominators."""
        below = gaps + mu[:, None]
        z = torch.where(c == 0.0, 0.0, c / below)
        return z, z.norm(dim=-1), below

    z0, size0, _ = solved(least)
    inside = (size0 <= radius) & ~(w[:, 0] < -flat)
    mu = torch.maximum((c.abs() / radius[:, None] - gaps).amax(-1), least)
    for _ in range(_STEPS):
        z, size, below = solved(mu)
        slope = torch.where(z == 0.0, 0.0, z.square() / below).sum(-1)
        step = size.square() * (size - radius) / (radius * slope)
        mu = torch.where((size > radius) & step.isfinite(), mu + step, mu)
    z, size, _ = solved(mu)
    z = torch.where((size > radius)[:, None], z * (radius / size)[:, None], z)
    # What is missing where even mu = 0 gives too short a step; |z_1| is zero there, but for rounding.
    lacking = (radius.square() - z[:, 1:].square().sum(-1)).clamp_min(0.0).sqrt()
    hard = ~inside & (mu <= 0.0) & (lacking > z[:, 0].abs())
    z = torch.cat([torch.where(hard, lacking, z[:, 0])[:, None], z[:, 1:]], -1)
    z = torch.where(inside[:, None], z0, z)
    return RegionSteps(-back(v, z), (z * (c - 0.5 * w * z)).sum(-1), ~inside)


class _Running(NamedTuple):
    """What is known of the problems in the state."""

    problem: Tensor
    x: Tensor
    value: Tensor
    g: Tensor
    w: Tensor
    v: Tensor
    radius: Tensor
    status: Tensor
    nit: Tensor
    nfev: Tensor

    def take(self, places: Tensor) -> _Running:
        return _Running(*(x.index_select(0, places) for x in self))


def batched_trust_region(
    evaluate: BatchedFunction,
    hessian: BatchedHessian,
    x0: Tensor,
    radius: Tensor,
    *,
    max_radius: float = 1000.0,
    eta: float = 0.01,
    gtol: float = 1e-5,
    ftol: float = 0.0,
    max_iter: int = 15_000,
    max_nfev: int = 15_000,
    tell: Callable[[int], object] | None = None,
) -> BatchedMinimum:
    """Minimize B functions of n variables by a trust-region method with exact steps.

    The rules of the radius are those of `secant.optim.TrustRegion`. Where what the model promises is lost in the
    rounding of f, a step counts that lowers the largest component of the gradient; where it does not, the problem has
    STALLED.

    Args:
        radius: (B,), float64, the first ones. max_radius, eta: as there.
        hessian: evaluates (b, n, n), once for each point that a step leads to.
        evaluate, x0, gtol, ftol, max_iter, max_nfev, tell: see `batched_descent`.

    References:
        Those of `secant.optim.TrustRegion`; see `within` for the steps.
    """
    b, n = x0.shape
    device, dtype, eps = x0.device, x0.dtype, torch.finfo(x0.dtype).eps
    every = torch.arange(b, device=device)
    value, g = evaluate(x0, every)
    value, counts = value.double(), torch.zeros(b, dtype=torch.int32, device=device)
    status, g = begun(value, g, g.abs().amax(-1), gtol)
    w = torch.zeros(b, n, dtype=torch.float64, device=device)
    v = torch.zeros(b, n, n, dtype=torch.float64, device=device)
    now = _Running(every, x0, value, g, w, v, radius.clamp_max(max_radius), status, counts, counts + 1)
    fresh = status == RUNNING  # where the Hessian is still to be made
    ends = Ends(now, tell)
    while True:
        at = fresh.nonzero()[:, 0]
        if len(at):
            w, v = eigenvalues(hessian(now.x[at], now.problem[at]))
            lost = torch.zeros_like(fresh).index_copy_(0, at, ~w.isfinite().all(-1))
            now = now._replace(
                w=now.w.index_copy(0, at, w), v=now.v.index_copy(0, at, v),
                status=torch.where(lost, int(Status.NOT_FINITE), now.status).to(torch.int32),
            )  # fmt: skip
        places = ends.settle(now)
        if len(places) == 0:
            return ends.found
        if few(places, now.problem):
            now = now.take(places)
            places = torch.arange(len(places), device=device)

        running = now.status == RUNNING
        s, predicted, at_boundary = within(now.w, now.v, now.g.double(), now.radius, eps)
        x = torch.where(running[:, None], now.x + s.to(dtype), now.x)
        value, g = evaluated(evaluate, x, now, places)
        nfev = now.nfev + running
        finite = value.isfinite() & g.isfinite().all(-1)
        decrease = torch.where(finite, now.value - value, -math.inf)
        rho = torch.where(predicted > 0.0, decrease / predicted, -math.inf)
        before, after = now.g.abs().amax(-1), g.abs().amax(-1)
        noise = _NOISE * eps * now.value.abs()
        blurred = (predicted <= noise) & finite & (decrease.abs() <= 2.0 * noise)
        accepted = running & torch.where(blurred, after < before, rho > eta)
        felt = (x != now.x).any(-1)

        size, slope = s.norm(dim=-1), (now.g.double() * s).sum(-1)
        parabola = (0.5 * slope / (slope + decrease)).clamp(_LEAST, _MOST)
        part = torch.where(decrease < 0.0, torch.where(decrease.isfinite(), parabola, _LEAST), _MOST)
        radius = torch.where((rho > _GOOD) & at_boundary, (_GROWTH * now.radius).clamp_max(max_radius), now.radius)
        radius = torch.where((rho < _POOR) & ~blurred, size * part, radius)

        nit = now.nit + accepted
        status = torch.where(running & (nfev >= max_nfev), int(Status.MAX_EVAL), now.status)
        useless = running & ~accepted & (blurred | ~felt)
        status = torch.where(useless, torch.where(felt | finite, int(Status.STALLED), int(Status.NOT_FINITE)), status)
        status = torch.where(accepted & (nit >= max_iter), int(Status.MAX_ITER), status)
        if ftol > 0.0:
            most = torch.maximum(torch.maximum(value.abs(), now.value.abs()), torch.ones_like(value))
            status = torch.where(accepted & (decrease.abs() <= ftol * most), int(Status.SMALL_CHANGE), status)
        status = torch.where(accepted & (after <= gtol), int(Status.CONVERGED), status).to(torch.int32)
        kept = accepted[:, None]
        fresh = accepted & (status == RUNNING)
        now = now._replace(
            x=torch.where(kept, x, now.x), value=torch.where(accepted, value, now.value),
            g=torch.where(kept, g, now.g), radius=radius, status=status, nit=nit, nfev=nfev,
        )  # fmt: skip
