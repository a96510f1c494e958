"""Levenberg-Marquardt on many small problems at once, each with its own lambda, bounds, stop and failure.

All problems that go on make one iteration together: the residuals are evaluated once for all of them, and the normal
equations are solved as one batch of blocks. What has stopped is taken out, so that nothing is evaluated for it any
more. Decisions are masks; the host reads one tensor of flags in each iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secant.ops.blocks import MAX_N, block_solve
from secant.result import Status
from secant.solvers._robust import Robust

#: Gain ratios: below the first a step is refused, below the second lambda rises, above the third it falls.
_LEAST, _POOR, _GOOD = 1e-4, 0.25, 0.75
_RISE, _FALL = 4.0, 0.1
#: What a refused step that is not even finite does to lambda.
_ESCAPE = 100.0
#: The first lambda, of the largest diagonal of the scaled normal equations; and the least.
_FIRST = 1e-3
_SMALLEST = 1e-15
#: Of a step, where the second difference of the residuals is taken, and how long the acceleration may be beside it.
_PROBE, _BENT = 0.1, 0.75

_RUNNING = -1


class Rows(Protocol):
    """Evaluates some of the problems, without a graph: x (b, p) and their places among all (b,), int64."""

    def residuals(self, x: Tensor, index: Tensor) -> Tensor:
        """Return r (b, k)."""

    def trial(self, x: Tensor, index: Tensor, before: Tensor | None, robust: Robust) -> Trial:
        """Evaluate, and compare with the residuals before; None: with nothing."""

    def equations(self, x: Tensor, index: Tensor, r: Tensor, robust: Robust) -> Equations:
        """Return what `normal_equations` makes of J at x and of r, for a trial that has none."""


class Equations(NamedTuple):
    """Holds J^T W u (b, p), J^T W^2 J (b, p, p), the squared columns of J (b, p), and W J (b, k, p) if there is one."""

    g: Tensor
    a: Tensor
    squares: Tensor
    j: Tensor | None = None


class Trial(NamedTuple):
    """Holds r (b, k), the loss and how much less it is than before, (b,) each, and the equations if they are known."""

    r: Tensor
    value: Tensor
    decrease: Tensor
    equations: Equations | None = None


def normal_equations(j: Tensor, r: Tensor, robust: Robust) -> Equations:
    """Compute them for W and u of the loss; j (b, k, p).

    The columns are of J without W: where all residuals are beyond the scale of the loss, W is nearly zero, and a lambda
    that fits such columns would be far too large for those that come later.
    """
    right, weights = robust.linearized(r)
    squares = None
    if weights is not None:
        squares = j.square().sum(1)
        j = j * weights[..., None]
    a = j.mT @ j
    return Equations((right[:, None] @ j)[:, 0], a, a.diagonal(dim1=-2, dim2=-1) if squares is None else squares, j)


class Tolerances(NamedTuple):
    """When a problem has converged; as `secant.least_squares` has them."""

    ftol: float
    xtol: float
    gtol: float


class BatchedFit(NamedTuple):
    """Holds where all problems have ended, each of them by itself.

    x (B, p). residuals (B, k). cost (B,): 1/2 c^2 sum rho. grad (B, p). curvature (B, p, p): J^T J, with the weights of
    the loss. status, nit, nfev, njev (B,), int32: a `Status`, accepted steps, evaluations of residuals and Jacobian.
    """

    x: Tensor
    residuals: Tensor
    cost: Tensor
    grad: Tensor
    curvature: Tensor
    status: Tensor
    nit: Tensor
    nfev: Tensor
    njev: Tensor


class _Active(NamedTuple):
    """The problems that go on, and what is known where they are."""

    problem: Tensor  # its place among all
    x: Tensor
    r: Tensor
    cost: Tensor
    j: Tensor  # times the weights of the loss; (b, 0, p) where nobody asks for it again
    g: Tensor
    a: Tensor
    d2: Tensor  # squared scale of each variable: the largest that the diagonal of J^T J has been
    lam: Tensor
    status: Tensor
    nit: Tensor
    nfev: Tensor
    njev: Tensor

    def take(self, places: Tensor) -> _Active:
        return _Active(*(x.index_select(0, places) for x in self))


def batched_least_squares(
    rows: Rows,
    x0: Tensor,
    *,
    tolerances: Tolerances,
    max_nfev: int,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    free: Tensor | None = None,
    loss: str = "linear",
    f_scale: float = 1.0,
    x_scale: Tensor | None = None,
    geodesic: bool = True,
    residuals: bool = True,
    tell: Callable[[int], object] | None = None,
) -> BatchedFit:
    r"""Minimize 1/2 c^2 sum_i rho(r_i^2 / c^2) for each of B problems, by Levenberg and Marquardt's method.

    For each problem, with D = diag(d), u and W of the loss, A = J^T W^2 J and g = J^T W u,

        (A + lambda D^2) s = -g,    step = s + a / 2,    (A + lambda D^2) a = -J^T W^2 r''[s, s],

    in the components that are free: those that are not held, nor at a bound that -g points beyond. x + step is
    projected onto the bounds. A step counts if it lowers the cost by more than a ten-thousandth of what the quadratic
    model says; lambda falls tenfold above 3/4, and rises fourfold below 1/4. The acceleration a, from a second
    difference along s, counts where |D a| <= 3/4 |D s|.

    Args:
        rows: evaluates. x0: (B, p), within the bounds. lower, upper: (p,) or (B, p). free: bool (p,), what may move.
        max_nfev: evaluations for each problem. x_scale: (p,), sizes of the variables; None: Marquardt's scaling, by the
            largest that the columns of J have been.
        loss, f_scale: see `Robust`. residuals: whether they are asked for; if not, they are (B, 0).
        tell: is told how many have stopped, after each iteration.

    References:
        Moré, The Levenberg-Marquardt algorithm: implementation and theory, Lecture Notes in Mathematics 630 (1978).
        Transtrum, Sethna, Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization,
        arXiv 1201.5885, sections 3 and 4 (the acceleration). Kanzow, Yamashita, Fukushima, Levenberg-Marquardt methods
        with strong local convergence properties for solving nonlinear equations with convex constraints, J. Comput.
        Appl. Math. 172 (2004), Algorithm 2.11 (the projection).
    """
    robust = Robust(loss, f_scale, batched=True)
    b, p = x0.shape
    every = torch.arange(b, device=x0.device)
    eps = torch.finfo(x0.dtype).eps
    boxed = lower is not None and upper is not None

    def side(bound: Tensor | None, index: Tensor) -> Tensor:
        assert bound is not None
        return bound.expand(b, p).index_select(0, index)

    def shown(r: Tensor) -> Tensor:
        return r if residuals else r[:, :0]

    def projected(x: Tensor, index: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, side(lower, index)), side(upper, index)) if boxed else x

    def movable(x: Tensor, g: Tensor, index: Tensor) -> Tensor | None:
        """Return which components are free at x; None: all."""
        if not boxed:
            return None if free is None else free.expand_as(x)
        found = ~(((x <= side(lower, index)) & (g > 0)) | ((x >= side(upper, index)) & (g < 0)))
        return found if free is None else found & free

    def modelled(x: Tensor, r: Tensor, index: Tensor, known: Equations | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute W J, if it is asked for again, g, A, and the squared scale of each variable."""
        g, a, squares, j = rows.equations(x, index, r, robust) if known is None else known
        d2 = squares if x_scale is None else (1.0 / x_scale).square().expand_as(x)
        return j if geodesic and j is not None else x.new_empty(len(x), 0, p), g, a, d2

    def optimality(x: Tensor, g: Tensor, index: Tensor) -> Tensor:
        size = g if not boxed else x - projected(x - g, index)
        return (size if free is None else torch.where(free, size, 0.0)).abs().amax(-1)

    def solve(now: _Active, right: Tensor, mask: Tensor | None) -> Tensor:
        """Solve (A + lambda D^2) s = right in the components that are free."""
        inverse = torch.where(now.d2 > 0, now.d2, 1.0).rsqrt()
        if mask is not None:
            inverse = torch.where(mask, inverse, 0.0)
        scaled = now.a * inverse[:, :, None] * inverse[:, None, :]
        scaled.diagonal(dim1=-2, dim2=-1).add_(now.lam[:, None])
        return _solved(scaled, right * inverse) * inverse

    r0, cost0, _, known = rows.trial(x0, every, None, robust)
    zeros = torch.zeros(b, dtype=torch.int32, device=x0.device)
    j0, g0, a0, d2 = modelled(x0, r0, every, known)
    # Of the scaled diagonal, which is 1 where the columns are the scale.
    largest = (a0.diagonal(dim1=-2, dim2=-1) / torch.where(d2 > 0, d2, 1.0)).amax(-1)
    lam = _FIRST * torch.where(largest > 0, largest, 1.0)
    usable = cost0.isfinite() & g0.isfinite().all(-1) & a0.isfinite().all(-1).all(-1)
    status = torch.where(usable, _RUNNING, int(Status.NOT_FINITE)).to(torch.int32)
    status = torch.where(usable & (optimality(x0, g0, every) <= tolerances.gtol), int(Status.CONVERGED), status)
    now = _Active(
        every, x0, r0, cost0, j0, g0, a0, d2, lam, status.to(torch.int32),
        zeros, zeros + 1, zeros + 1,
    )  # fmt: skip
    whole = BatchedFit(
        x0.clone(), shown(r0).clone(), cost0.clone(), g0, a0, now.status.clone(), zeros.clone(), zeros + 1, zeros + 1
    )

    def settle(now: _Active, stopped: Tensor) -> None:
        """Write what has stopped to its place."""
        which = now.problem[stopped]
        parts = (now.x, shown(now.r), now.cost, now.g, now.a, now.status, now.nit, now.nfev, now.njev)
        for target, part in zip(whole, parts, strict=True):
            target[which] = part[stopped]

    stopped_before = 0
    while True:
        going = now.status == _RUNNING
        places = going.nonzero()[:, 0]
        if len(places) < len(going):
            settle(now, (~going).nonzero()[:, 0])
            now = now.take(places)
        if tell is not None and b - len(places) > stopped_before:
            stopped_before = b - len(places)
            tell(stopped_before)
        if len(places) == 0:
            return whole
        mask = movable(now.x, now.g, now.problem)
        s = solve(now, -now.g, mask)
        step, nfev = s, now.nfev
        if geodesic:
            probe = rows.residuals(projected(now.x + _PROBE * s, now.problem), now.problem)
            bend = (probe - now.r) / _PROBE
            if loss != "linear":
                weights = robust.linearized(now.r)[1]
                assert weights is not None
                bend = bend * weights
            bend = (bend - (now.j @ s[..., None])[..., 0]) * (2.0 / _PROBE)
            acceleration = -solve(now, (bend[:, None] @ now.j)[:, 0], mask)
            lengths = [(now.d2 * x.square()).sum(-1) for x in (acceleration, s)]
            step = torch.where((lengths[0] <= _BENT**2 * lengths[1])[:, None], s + 0.5 * acceleration, s)
            nfev = nfev + 1
        x = projected(now.x + step, now.problem)
        r, cost, decrease, known = rows.trial(x, now.problem, now.r, robust)
        nfev, moved = nfev + 1, x - now.x
        if boxed:
            s = projected(now.x + s, now.problem) - now.x  # what the model speaks of
        predicted = -((now.g + 0.5 * (now.a @ s[..., None])[..., 0]) * s).sum(-1)
        gain = torch.where(predicted > 0.0, decrease / predicted, -math.inf)
        finite = decrease.isfinite()
        gain = torch.where(finite & ~gain.isnan(), gain, -math.inf)
        accepted = gain > _LEAST
        lam = torch.where(gain > _GOOD, _FALL * now.lam, torch.where(gain < _POOR, _RISE * now.lam, now.lam))
        lam = torch.where(finite, lam, _ESCAPE * now.lam).clamp_min(_SMALLEST)  # a lambda of no effect

        size, length = now.x.norm(dim=-1), moved.norm(dim=-1)
        least = tolerances.ftol * now.cost
        little = (decrease.abs() <= least) & ((gain > _POOR) | (predicted.abs() <= least))
        short = length <= tolerances.xtol * (tolerances.xtol + size)
        blurred = ~accepted & (predicted.abs() <= 4.0 * eps * now.cost)
        status = now.status
        status = torch.where(nfev >= max_nfev, int(Status.MAX_EVAL), status)
        status = torch.where(blurred, int(Status.STALLED), status)
        # A step that was refused for being nowhere finite says nothing by its length.
        status = torch.where(little | (short & finite), int(Status.SMALL_CHANGE), status)
        status = torch.where(~lam.isfinite(), int(Status.STALLED), status).to(torch.int32)

        at = accepted.nonzero()[:, 0]
        every_one, kept = len(at) == len(accepted), accepted[:, None]
        j, g, a, d2 = now.j, now.g, now.a, now.d2
        njev = now.njev
        if len(at):
            old = (j, g, a, d2)
            if every_one:
                j, g, a, scale = modelled(x, r, now.problem, known)
            elif known is not None:
                fresh = modelled(x, r, now.problem, known)
                j, g, a, scale = (
                    torch.where(kept if new.dim() == 2 else kept[..., None], new, one)
                    for one, new in zip(old, fresh, strict=True)
                )
            else:
                fresh = modelled(x.index_select(0, at), r.index_select(0, at), now.problem.index_select(0, at), None)
                j, g, a, scale = (one.index_copy(0, at, new) for one, new in zip(old, fresh, strict=True))
            njev = njev + accepted
            usable = g.isfinite().all(-1) & a.isfinite().all(-1).all(-1)
            d2 = torch.where(usable[:, None], torch.maximum(d2, scale), d2)
            status = torch.where(accepted & ~usable, int(Status.NOT_FINITE), status)
            new_x = torch.where(kept, x, now.x)
            done = accepted & (optimality(new_x, g, now.problem) <= tolerances.gtol)
            status = torch.where(done, int(Status.CONVERGED), status).to(torch.int32)
        now = _Active(
            now.problem, torch.where(kept, x, now.x), r if every_one else torch.where(kept, r, now.r),
            torch.where(accepted, cost, now.cost), j, g, a, d2, lam, status,
            now.nit + accepted, nfev, njev,
        )  # fmt: skip


def _solved(a: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric positive definite systems (b, p, p); NaN where one is not."""
    if a.shape[-1] <= MAX_N:
        return block_solve(a, right)[0]
    factor, info = torch.linalg.cholesky_ex(a)
    found = torch.cholesky_solve(right[..., None], factor)[..., 0]
    return torch.where((info == 0)[:, None], found, math.nan)
