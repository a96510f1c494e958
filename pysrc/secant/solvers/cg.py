"""Conjugate gradients for A x = b and for trust regions, with every number and decision on the device.

Iterations are masked: once the method has stopped, further ones change nothing. So the host has no need to know
whether it has, and looks only every `check_every` iterations; on a CPU, where looking is free, at each one.

References:
    Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. NBS 49 (1952).
    Steihaug, The conjugate gradient method and trust regions in large scale optimization, SIAM J. Numer. Anal. 20
    (1983).
    Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithms 5.3, p. 119, and 7.2, p. 171.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class CGStatus(IntEnum):
    """Why conjugate gradients stopped."""

    MAX_ITER = 0
    CONVERGED = 1
    FLAT = 2  # a direction p with p.Ap <= min_curvature p.Mp
    BOUNDARY = 3  # |x|_M reached the radius
    NOT_FINITE = 4


class CGResult(NamedTuple):
    """What `cg` and `steihaug` return, all of it on the device.

    x: the solution, of the shape of b. residual: b - A x as the recurrence has it. iterations: products with A that
    contributed, int32 (). status: a `CGStatus`, int32 (). size: |x|_M, () in the dtype of b.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    status: Tensor
    size: Tensor


def cg(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 100,
    min_curvature: float = 0.0,
    check_every: int | None = None,
) -> CGResult:
    """Solve A x = b for a symmetric positive semidefinite A, by preconditioned conjugate gradients from x = 0.

    Stops when sqrt(r.M^-1 r) <= rtol sqrt(b.M^-1 b) or max |r_i| <= atol, r = b - A x. The first norm does not depend
    on the units of the unknowns when M does not.

    Args:
        matvec: v -> A v, of the shape of b.
        b: right-hand side of any shape, float32 or float64; dot products run over all its elements.
        preconditioner: r -> M^-1 r, symmetric positive definite; None: the identity.
        rtol: relative, in the norm of M^-1; >= 0.
        atol: absolute, on the largest component; >= 0.
        max_iter: products with A, >= 1.
        min_curvature: see `steihaug`.
        check_every: iterations between two looks of the host; None: 1 on a CPU, 8 elsewhere.

    Returns:
        A `CGResult`. With status FLAT (A is not positive definite, or b not in its range) x is where that was seen; if
        it was the first iteration, x = M^-1 b.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> a = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> secant.solvers.cg(lambda v: a @ v, torch.tensor([1.0, 2.0])).x      # (1 / 11, 7 / 11)
    """
    return steihaug(
        matvec,
        -b,
        radius=math.inf,
        preconditioner=preconditioner,
        rtol=rtol,
        atol=atol,
        max_iter=max_iter,
        min_curvature=min_curvature,
        check_every=check_every,
    )


def steihaug(
    matvec: Callable[[Tensor], Tensor],
    grad: Tensor,
    *,
    radius: float | Tensor,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 100,
    min_curvature: float = 0.0,
    check_every: int | None = None,
) -> CGResult:
    """Approximately minimise g.x + 1/2 x.A x subject to |x|_M <= radius, for a symmetric, possibly indefinite A.

    Conjugate gradients on A x = -g until the residual is small (as in `cg`), x would leave the region, or a direction p
    has p.Ap <= min_curvature p.Mp. In the last two cases x goes along p to the boundary. |x|_M grows from iteration to
    iteration, so that the first crossing is the only one. |x|_M, x.Mp and p.Mp follow from recurrences: M itself is
    never needed.

    Args:
        matvec: v -> A v, of the shape of grad.
        grad: g, of any shape, float32 or float64.
        radius: of the region, > 0, a number or a tensor of one element; may be infinite: then flat directions are not
            followed, except that the first one, p = -M^-1 g, is returned as it is.
        preconditioner: r -> M^-1 r, symmetric positive definite; None: the identity.
        rtol: see `cg`.
        atol: see `cg`.
        max_iter: products with A, >= 1.
        min_curvature: directions flatter than this count as negative curvature; >= 0.
        check_every: iterations between two looks of the host; None: 1 on a CPU, 8 elsewhere.

    Returns:
        A `CGResult`, whose residual is -g - A x.

    Raises:
        ValueError: an argument is out of its range.

    References:
        Conn, Gould, Toint, Trust-Region Methods, SIAM (2000), Algorithm 7.5.1 and eqs. 7.5.5 to 7.5.7.

    Example:
        >>> hessian, g = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.5])
        >>> secant.solvers.steihaug(lambda v: hessian * v, g, radius=3.0)      # ends on the boundary, |x| = 3
    """
    for name, value in (("rtol", rtol), ("atol", atol), ("min_curvature", min_curvature)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"steihaug: {name}: expected a finite number >= 0, got {value!r}")
    if max_iter < 1:
        raise ValueError(f"steihaug: max_iter: expected at least 1, got {max_iter!r}")
    if not isinstance(radius, Tensor) and not radius > 0.0:
        raise ValueError(f"steihaug: radius: expected a positive number, got {radius!r}")
    if check_every is None:
        check_every = 1 if grad.device.type == "cpu" else 8
    elif check_every < 1:
        raise ValueError(f"steihaug: check_every: expected at least 1, got {check_every!r}")

    solve = preconditioner if preconditioner is not None else torch.clone
    delta2 = torch.as_tensor(radius, dtype=grad.dtype, device=grad.device).reshape(()) ** 2
    bounded = torch.isfinite(delta2)
    x, r = torch.zeros_like(grad), -grad
    p = solve(r)
    rz = _dot(r, p)
    target = rtol * rtol * rz
    xmx, xmp, pmp = torch.zeros_like(rz), torch.zeros_like(rz), rz
    iterations = torch.zeros((), dtype=torch.int32, device=grad.device)
    status = _status(r, rz, target, atol)
    for k in range(max_iter):
        if k % check_every == 0 and int(status) != CGStatus.MAX_ITER:
            break
        ap = matvec(p)
        curvature = _dot(p, ap)
        finite = torch.isfinite(curvature)
        running = (status == CGStatus.MAX_ITER) & finite
        status = torch.where(finite, status, int(CGStatus.NOT_FINITE))
        flat = curvature <= min_curvature * pmp
        alpha = rz / curvature
        outside = bounded & (xmx + alpha * (2.0 * xmp + alpha * pmp) >= delta2)
        # To the boundary: the positive root of |x + t p|_M = radius, in the form that does not cancel.
        gap = delta2 - xmx
        to_boundary = gap / (xmp + torch.sqrt(xmp * xmp + pmp * gap))
        on_flat = torch.where(bounded, to_boundary, float(k == 0))
        step = torch.where(flat, on_flat, torch.where(outside, to_boundary, alpha))
        x = torch.where(running, x + step * p, x)
        r = torch.where(running, r - step * ap, r)
        xmx = torch.where(running, xmx + step * (2.0 * xmp + step * pmp), xmx)
        iterations = iterations + running.int()
        z = solve(r)
        rz_new = _dot(r, z)
        left = torch.where(bounded, int(CGStatus.BOUNDARY), int(CGStatus.FLAT))
        new = torch.where(flat | outside, left, _status(r, rz_new, target, atol))
        status = torch.where(running, new, status).int()
        beta = rz_new / rz
        # z is M-orthogonal to every earlier direction, and so to x.
        xmp = torch.where(running, beta * (xmp + step * pmp), xmp)
        pmp = torch.where(running, rz_new + beta * beta * pmp, pmp)
        p = torch.where(running, z + beta * p, p)
        rz = torch.where(running, rz_new, rz)
    return CGResult(x, r, iterations, status, torch.sqrt(xmx))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _status(r: Tensor, rz: Tensor, target: Tensor, atol: float) -> Tensor:
    done = (rz <= target) | (r.abs().amax() <= atol)
    status = torch.where(done, int(CGStatus.CONVERGED), int(CGStatus.MAX_ITER))
    return torch.where(torch.isfinite(rz), status, int(CGStatus.NOT_FINITE)).int()
