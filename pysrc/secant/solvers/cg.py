"""Conjugate gradients for A x = b and for trust regions, of one problem or a batch, decided on the device.

Iterations are masked: once a problem has stopped, further ones change nothing about it. So the host has no need to know
whether it has, and looks only every `check_every` iterations; on a CPU, where looking is free, at each one.

The residual that the method carries along drifts from b - A x by the rounding of every step. So it is computed anew
every `refresh_every` iterations, and once more where a longer run says that it has converged: only what holds for
b - A x itself counts.

References:
    Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. NBS 49 (1952).
    Steihaug, The conjugate gradient method and trust regions in large scale optimization, SIAM J. Numer. Anal. 20
    (1983).
    Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithms 5.3, p. 119, and 7.2, p. 171.
    van der Vorst and Ye, Residual replacement strategies for Krylov subspace iterative methods for the convergence of
    true residuals, SIAM J. Sci. Comput. 22 (2000). (Here at fixed intervals, which is a heuristic.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.result import Status

#: Marks a problem that goes on; where the iterations run out it is the answer.
_RUNNING = Status.MAX_ITER
#: A run whose computed residual is not reduced to this part (squared) by iterating on has met its rounding.
_STALL = 0.25
#: Of a residual, squared: a computed one that differs by more from the carried one is where the method begins anew.
_DRIFT = 0.01


class CGResult(NamedTuple):
    """Holds what `cg` and `steihaug` found, all of it on the device; (*B) are the batch dimensions, () without them.

    x: the solution, of the shape of b. residual: b - A x, as carried along since it was last computed. iterations:
    products with A that contributed, int32 (*B); those that only compute residuals anew are not among them. status: a
    `secant.Status`, int32 (*B): CONVERGED, MAX_ITER, FLAT (a direction p with p.Ap <= min_curvature p.Mp), BOUNDARY
    (|x|_M reached the radius), STALLED (the carried residual is small, but rounding keeps b - A x from it) or
    NOT_FINITE. size: |x|_M, (*B) in the dtype of b. direction: p, the last direction that contributed to x or, with
    FLAT, the one that was found flat; it descends, p.b > 0, and was A-conjugate to x as far as x came without it.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    status: Tensor
    size: Tensor
    direction: Tensor


def cg(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    batch_dims: int = 0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 100,
    min_curvature: float = 0.0,
    refresh_every: int | None = 50,
    check_every: int | None = None,
) -> CGResult:
    """Solve A x = b for a symmetric positive semidefinite A, by preconditioned conjugate gradients from x = 0.

    Stops when sqrt(r.M^-1 r) <= rtol sqrt(b.M^-1 b) or max |r_i| <= atol, r = b - A x. The first norm does not depend
    on the units of the unknowns when M does not.

    Args:
        matvec: v -> A v, of the shape of b.
        b: right-hand side of any shape, float32 or float64; dot products run over all elements of a problem.
        batch_dims: how many leading dimensions of b number independent problems, each with its own matrix, scalars and
            stop; >= 0. On a CPU a problem gets the bits that it gets in any other batch, if `matvec` and
            `preconditioner` give its rows the same bits in both.
        preconditioner: r -> M^-1 r, symmetric positive definite; None: the identity.
        rtol: relative, in the norm of M^-1; >= 0.
        atol: absolute, on the largest component; >= 0.
        max_iter: products with A, >= 1.
        min_curvature: see `steihaug`.
        refresh_every: iterations from one computation of b - A x to the next, each of which takes a product; >= 1, None
            for never. After as many, what seems to have converged is confirmed by another. A problem that is not goes
            on from there, unless that has not halved the residual since the last time: then it is STALLED.
        check_every: iterations between two looks of the host; None: 1 on a CPU, 8 elsewhere.

    Returns:
        A `CGResult`, without a graph. With status FLAT (A is not positive definite, or b not in its range) x is where
        that was seen; if it was the first iteration, x = M^-1 b.

    Raises:
        TypeError, ValueError: an argument is invalid, or `matvec` or `preconditioner` changes the shape.

    Example:
        >>> a = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> found = secant.solvers.cg(lambda v: a @ v, torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> (11 * found.x).round(decimals=6).tolist()
        [1.0, 7.0]
        >>> scales = torch.tensor([[1.0, 2.0], [5.0, 5.0]])       # two problems, diagonal
        >>> secant.solvers.cg(lambda v: scales * v, torch.ones(2, 2), batch_dims=1).iterations.tolist()
        [2, 1]
    """
    settings = _settings("cg", rtol, atol, max_iter, min_curvature, refresh_every, check_every)
    b = _checked_vector("cg", "b", b, batch_dims)
    return _iterate("cg", matvec, b, batch_dims, None, preconditioner, settings)


def steihaug(
    matvec: Callable[[Tensor], Tensor],
    grad: Tensor,
    *,
    radius: float | Tensor,
    batch_dims: int = 0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 100,
    min_curvature: float = 0.0,
    refresh_every: int | None = 50,
    check_every: int | None = None,
) -> CGResult:
    """Minimise approximately g.x + 1/2 x.A x subject to |x|_M <= radius, for a symmetric, possibly indefinite A.

    Conjugate gradients on A x = -g until the residual is small (as in `cg`), x would leave the region, or a direction p
    has p.Ap <= min_curvature p.Mp. In the last two cases x goes along p to the boundary. |x|_M grows from iteration to
    iteration, so that the first crossing is the only one. |x|_M, x.Mp and p.Mp follow from recurrences: M itself is
    never needed.

    Args:
        matvec: v -> A v, of the shape of grad.
        grad: g, of any shape, float32 or float64.
        radius: of the region, > 0, a number, a tensor of one element, or one for each problem of a batch; may be
            infinite: then flat directions are not followed, except that the first one, p = -M^-1 g, is returned as it
            is.
        batch_dims: see `cg`.
        preconditioner: r -> M^-1 r, symmetric positive definite; None: the identity.
        rtol: see `cg`.
        atol: see `cg`.
        max_iter: products with A, >= 1.
        min_curvature: directions flatter than this count as negative curvature; >= 0.
        refresh_every: see `cg`.
        check_every: iterations between two looks of the host; None: 1 on a CPU, 8 elsewhere.

    Returns:
        A `CGResult`, without a graph, whose residual is -g - A x.

    Raises:
        TypeError, ValueError: an argument is invalid, or `matvec` or `preconditioner` changes the shape.

    References:
        Conn, Gould, Toint, Trust-Region Methods, SIAM (2000), Algorithm 7.5.1 and eqs. 7.5.5 to 7.5.7.

    Example:
        >>> hessian, g = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.5])
        >>> step = secant.solvers.steihaug(lambda v: hessian * v, g, radius=3.0)
        >>> secant.Status(step.status.item()), step.size.item()
        (<Status.BOUNDARY: 9>, 3.0)
    """
    settings = _settings("steihaug", rtol, atol, max_iter, min_curvature, refresh_every, check_every)
    grad = _checked_vector("steihaug", "grad", grad, batch_dims)
    square = _squared("steihaug", radius, grad, grad.shape[:batch_dims])
    return _iterate("steihaug", matvec, -grad, batch_dims, square, preconditioner, settings)


class _Settings(NamedTuple):
    """Holds the checked numbers that both share. None of the last two: never, and as the device needs."""

    rtol: float
    atol: float
    max_iter: int
    min_curvature: float
    refresh_every: int | None
    check_every: int | None


def _settings(
    op: str,
    rtol: float,
    atol: float,
    max_iter: int,
    min_curvature: float,
    refresh_every: int | None,
    check_every: int | None,
) -> _Settings:
    return _Settings(
        _checks.nonnegative(op, "rtol", rtol),
        _checks.nonnegative(op, "atol", atol),
        _checks.integer(op, "max_iter", max_iter, 1),
        _checks.nonnegative(op, "min_curvature", min_curvature),
        None if refresh_every is None else _checks.integer(op, "refresh_every", refresh_every, 1),
        None if check_every is None else _checks.integer(op, "check_every", check_every, 1),
    )


def _checked_vector(op: str, name: str, x: Tensor, batch_dims: int) -> Tensor:
    x = _checks.tensor(op, name, x, _checks.REAL).detach()
    if _checks.integer(op, "batch_dims", batch_dims, 0) > 0 and x.dim() <= batch_dims:
        raise _checks.fail(op, name, f"more than batch_dims = {batch_dims} dimensions", f"shape {tuple(x.shape)}")
    return x


def _squared(op: str, radius: float | Tensor, like: Tensor, batch: torch.Size) -> Tensor | None:
    """Square the radius, for each problem; None for a number that is infinite."""
    if isinstance(radius, Tensor):
        if radius.numel() != 1 and radius.shape != batch:
            expected = f"a number, one element, or shape {tuple(batch)}"
            raise _checks.fail(op, "radius", expected, f"shape {tuple(radius.shape)}")
        radius = radius.detach().to(like)
        return (radius if radius.shape == batch else radius.reshape(()).expand(batch)) ** 2
    radius = _checks.number(op, "radius", radius, "a number > 0", lambda x: x > 0.0)
    return None if radius == math.inf else like.new_full(batch, radius) ** 2


class _Device:
    """Keeps numbers and flags in tensors, one for each problem of a batch; nothing is read by the host."""

    def __init__(self, b: Tensor, batch_dims: int) -> None:
        self.batch_dims, self.batch, self._like = batch_dims, b.shape[:batch_dims], b
        self._wide = self.batch + (1,) * (b.dim() - batch_dims)

    def dot(self, u: Tensor, v: Tensor) -> Any:
        if self.batch_dims:
            return (u * v).flatten(self.batch_dims).sum(-1)
        return torch.dot(u.reshape(-1), v.reshape(-1))

    def largest(self, u: Tensor) -> Any:
        return u.abs().flatten(self.batch_dims).amax(-1)

    def number(self, x: float) -> Any:
        return self._like.new_full(self.batch, x)

    def code(self, x: int) -> Any:
        return torch.full(self.batch, x, dtype=torch.int32, device=self._like.device)

    def wide(self, x: Any) -> Any:
        """Shape for products with vectors."""
        return x.reshape(self._wide) if self.batch_dims else x

    def any(self, flag: Any) -> bool:
        return bool(flag.any() if self.batch_dims else flag)

    def finite(self, x: Any) -> Any:
        return x.abs() < math.inf

    def divide(self, x: Any, y: Any) -> Any:
        return x / y

    where = staticmethod(torch.where)
    sqrt = staticmethod(torch.sqrt)


class _Host:
    """Keeps those of one problem on a CPU as Python's own, which take a tenth of the time of tensors of one element."""

    batch_dims, batch = 0, torch.Size()

    def __init__(self, b: Tensor) -> None:
        self._like = b

    def dot(self, u: Tensor, v: Tensor) -> Any:
        return (torch.dot(u, v) if u.dim() == 1 else torch.dot(u.reshape(-1), v.reshape(-1))).item()

    def largest(self, u: Tensor) -> Any:
        return u.abs().amax().item()

    def number(self, x: float) -> Any:
        return x

    def code(self, x: int) -> Any:
        return x

    def wide(self, x: Any) -> Any:
        return x

    def any(self, flag: Any) -> bool:
        return bool(flag)

    def finite(self, x: Any) -> Any:
        return math.isfinite(x)

    def divide(self, x: Any, y: Any) -> Any:
        return x / y if y else math.nan if x == 0.0 else x * math.copysign(math.inf, y)

    def where(self, flag: Any, x: Any, y: Any) -> Any:
        return x if flag else y

    def sqrt(self, x: Any) -> Any:
        return math.sqrt(x) if x >= 0.0 else math.nan


def _iterate(
    op: str,
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    batch_dims: int,
    delta2: Any,
    preconditioner: Callable[[Tensor], Tensor] | None,
    settings: _Settings,
) -> CGResult:
    """Run both methods on A x = b; without a region (delta2 None) the boundary costs nothing."""
    rtol, atol, max_iter, min_curvature, refresh_every, check_every = settings
    on_cpu = b.device.type == "cpu"
    if check_every is None:
        check_every = 1 if on_cpu else 8
    host = on_cpu and batch_dims == 0 and check_every == 1
    of: Any = _Host(b) if host else _Device(b, batch_dims)
    where, dot, wide, divide = of.where, of.dot, of.wide, of.divide
    if host and delta2 is not None:
        delta2 = delta2.item()

    def kept(name: str, y: Tensor) -> Tensor:
        if y.shape != b.shape:
            raise _checks.fail(op, name, f"a function that keeps the shape {tuple(b.shape)}", tuple(y.shape))
        return y.detach()

    def product(v: Tensor) -> Tensor:
        return kept("matvec", matvec(v))

    def solve(r: Tensor) -> Tensor:
        return r if preconditioner is None else kept("preconditioner", preconditioner(r))

    going, converged, not_finite = of.code(_RUNNING), of.code(Status.CONVERGED), of.code(Status.NOT_FINITE)
    zero, one = of.number(0.0), of.number(1.0)

    def judge(r: Tensor, rz: Any) -> Any:
        done = rz <= target
        if atol:
            done = done | (of.largest(r) <= atol)
        return where(of.finite(rz), where(done, converged, going), not_finite)

    x, r = torch.zeros_like(b), b.clone()
    p = solve(r)
    pmp = rz = dot(r, p)
    target = rtol * rtol * rz
    xmx = xmp = zero
    iterations = of.code(0)
    status = judge(r, rz)
    left = of.code(Status.FLAT)
    if delta2 is not None:
        bounded = of.finite(delta2)
        left = where(bounded, of.code(Status.BOUNDARY), left)
    last = of.number(math.inf)  # computed residual, r.M^-1 r, where convergence was last not confirmed

    k = since = 0  # iterations, and those of them since the residuals were last computed
    limit = max_iter
    while True:
        running = status == going
        if limit != max_iter:  # problems that go on have made different numbers of iterations
            running = running & (iterations < max_iter)
        if k == limit or (k % check_every == 0 and not of.any(running)):
            if refresh_every is None or k <= refresh_every:
                break
            unsure = (status == converged) & (iterations > refresh_every)
            computed = b - product(x)
            z = solve(computed)
            rz_new = dot(computed, z)
            found = judge(computed, rz_new)
            found = where((found == going) & (rz_new > _STALL * last), of.code(Status.STALLED), found)
            status = where(unsure, found, status)
            r = where(wide(unsure), computed, r)
            running = (status == going) & (iterations < max_iter)
            if not of.any(running):
                break
            # From here as from a start, but that x.Mp = x.r is no longer zero.
            p = where(wide(unsure & running), z, p)
            last, rz, pmp = (where(unsure, rz_new, old) for old in (last, rz, pmp))
            xmp = where(unsure, dot(x, computed), xmp)
            limit, since = k + max_iter, 0
        ap = product(p)
        curvature = dot(p, ap)
        sane = of.finite(curvature)
        moving = running & sane
        alpha = divide(rz, curvature)
        leaving = curvature <= (min_curvature * pmp if min_curvature else 0.0)
        if delta2 is None:
            step = where(leaving, zero if k else one, alpha)
        else:
            outside = bounded & (xmx + alpha * (2.0 * xmp + alpha * pmp) >= delta2)
            # To the boundary: the positive root of |x + t p|_M = radius, in the form that does not cancel.
            gap = delta2 - xmx
            to_boundary = divide(gap, xmp + of.sqrt(xmp * xmp + pmp * gap))
            on_flat = where(bounded, to_boundary, zero if k else one)
            step = where(leaving, on_flat, where(outside, to_boundary, alpha))
            leaving = leaving | outside
        wide_moving, wide_step = wide(moving), wide(step)
        x = where(wide_moving, x + wide_step * p, x)
        carried = r - wide_step * ap
        since += 1
        refresh = since == refresh_every
        r = where(wide_moving, b - product(x) if refresh else carried, r)
        xmp_new = xmp + step * pmp
        xmx = where(moving, xmx + step * (xmp + xmp_new), xmx)
        iterations = iterations + moving
        z = solve(r)
        rz_new = dot(r, z)
        found = where(sane, where(leaving, left, judge(r, rz_new)), not_finite)
        status = where(running, found, status)
        # Of what has stopped only x, r, p and |x|_M are held.
        beta = divide(rz_new, rz)
        # z is M-orthogonal to every earlier direction, and so to x.
        xmp = beta * xmp_new
        if refresh:
            since = 0
            # Where rounding is much of the residual, old directions are conjugate to nothing that is left.
            drift = r - carried
            lost = dot(drift, drift) > _DRIFT * dot(r, r)
            beta, xmp = where(lost, zero, beta), where(lost, dot(x, r), xmp)
        pmp, rz = rz_new + beta * beta * pmp, rz_new
        p = where(wide(moving & (status == going)), z + wide(beta) * p, p)
        k += 1
    size = of.sqrt(xmx)
    if host:
        iterations, status = (torch.tensor(n, dtype=torch.int32) for n in (iterations, status))
        size = torch.tensor(size, dtype=b.dtype)
    return CGResult(x, r, iterations, status, size, p)
