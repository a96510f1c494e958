"""What a user has without this library: the same directions in eager and compiled PyTorch.

`EagerHistory` does what `torch.optim.LBFGS` does, operation by operation: lists of vectors, 1 / s.y remembered from
when the pair came in, and a coefficient that goes through the host at every `add_`. `two_loop_rows` is the recursion in
a form that `torch.compile` can fuse, `two_loop_bmm` the one for batches in eager mode, and `compact` has the fewest
operations: from the Gram matrices, products with the whole history and two triangular solves.

References:
    Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 7.4, p. 178.
    Byrd, Nocedal, Schnabel, Representations of quasi-Newton matrices, Math. Program. 63 (1994), eq. 3.1.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def two_loop(g: Tensor, s: Sequence[Tensor], y: Sequence[Tensor], rho: Sequence[Tensor], gamma: Tensor) -> Tensor:
    """Compute d = -H g from lists of pairs, oldest first, as torch.optim.LBFGS computes it; flat vectors."""
    # A tensor as `alpha` is read back to the host inside add_; the annotation of torch does not know of it.
    q = g.neg()
    alpha: list[Tensor] = []
    for i in reversed(range(len(s))):
        alpha.append(s[i].dot(q) * rho[i])
        q.add_(y[i], alpha=-alpha[-1])  # type: ignore[arg-type]
    r = q.mul_(gamma)
    for i in range(len(s)):
        beta = y[i].dot(r) * rho[i]
        r.add_(s[i], alpha=alpha.pop() - beta)  # type: ignore[arg-type]
    return r


class EagerHistory:
    """The state that torch.optim.LBFGS keeps between two iterations, for `step`. Flat vectors, oldest pair first."""

    def __init__(self, s: Tensor, y: Tensor) -> None:
        self.s, self.y, self.size = list(s.unbind()), list(y.unbind()), len(s)
        curvature = [a.dot(b) for a, b in zip(self.s, self.y, strict=True)]
        self.rho = [1.0 / c for c in curvature]
        self.gamma = curvature[-1] / self.y[-1].dot(self.y[-1])

    def direction(self, g: Tensor) -> Tensor:
        """Compute d = -H g."""
        return two_loop(g, self.s, self.y, self.rho, self.gamma)

    def step(self, grad: Tensor, prev_grad: Tensor, direction: Tensor, t: float) -> Tensor:
        """Offer the pair (t d, g - g_prev), return the new direction, and set `prev_grad` to `grad`."""
        y, s = grad.sub(prev_grad), direction.mul(t)
        curvature = y.dot(s)
        if curvature > 1e-10:
            if len(self.s) == self.size:
                self.s.pop(0), self.y.pop(0), self.rho.pop(0)
            self.s.append(s)
            self.y.append(y)
            self.rho.append(1.0 / curvature)
            self.gamma = curvature / y.dot(y)
        d = self.direction(grad)
        prev_grad.copy_(grad)
        return d


def two_loop_rows(g: Tensor, s: Tensor, y: Tensor, rho: Tensor, gamma: Tensor) -> Tensor:
    """Compute d = -H g without a trip to the host: g (..., n); s, y (..., m, n); rho (..., m); gamma (...)."""
    return _rows(g, s.unbind(-2), y.unbind(-2), rho.unbind(-1), gamma)


def _rows(g: Tensor, s: Sequence[Tensor], y: Sequence[Tensor], rho: Sequence[Tensor], gamma: Tensor) -> Tensor:
    pairs = list(zip(s, y, rho, strict=True))
    q = -g
    alpha: list[Tensor] = []
    for a, b, r in reversed(pairs):
        alpha.append((a * q).sum(-1) * r)
        q = q - alpha[-1].unsqueeze(-1) * b
    d = q * gamma.unsqueeze(-1)
    for a, b, r in pairs:
        beta = (b * d).sum(-1) * r
        d = d + (alpha.pop() - beta).unsqueeze(-1) * a
    return d


def two_loop_bmm(g: Tensor, s: Tensor, y: Tensor, rho: Tensor, gamma: Tensor) -> Tensor:
    """Compute `two_loop_rows` for a batch in eager mode, dot products by torch.bmm: g (B, n); s, y (B, m, n)."""
    m = s.shape[1]
    q = g.neg().unsqueeze(2)
    alpha: list[Tensor] = []
    for i in reversed(range(m)):
        alpha.append(torch.bmm(s[:, i : i + 1], q) * rho[:, i, None, None])
        q.addcmul_(y[:, i].unsqueeze(2), alpha[-1], value=-1.0)
    r = q.mul_(gamma[:, None, None])
    for i in range(m):
        beta = torch.bmm(y[:, i : i + 1], r) * rho[:, i, None, None]
        r.addcmul_(s[:, i].unsqueeze(2), alpha.pop() - beta)
    return r.squeeze(2)


def gram(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Compute S Y^T and Y Y^T, (..., m, m)."""
    return s @ y.mT, y @ y.mT


def compact(g: Tensor, s: Tensor, y: Tensor, sy: Tensor, yy: Tensor) -> Tensor:
    """Compute d = -H g by the compact representation: g (..., n); s, y (..., m, n) oldest first; `gram(s, y)`.

    With R the upper triangle of S Y^T, D its diagonal, gamma = s.y / y.y of the newest pair and u = R^-1 S g,
    H g = gamma g + S^T R^-T ((D + gamma Y Y^T) u - gamma Y g) - gamma Y^T u.
    """
    r = sy.triu()
    gamma = sy[..., -1:, -1:] / yy[..., -1:, -1:]
    column = g.unsqueeze(-1)
    u = torch.linalg.solve_triangular(r, s @ column, upper=True)
    w = torch.diagonal(sy, dim1=-2, dim2=-1).unsqueeze(-1) * u + gamma * (yy @ u - y @ column)
    v = torch.linalg.solve_triangular(r.mT, w, upper=False)
    return -(gamma * column + s.mT @ v - gamma * (y.mT @ u)).squeeze(-1)


def compact_from_pairs(g: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Compute `compact` from the pairs alone."""
    return compact(g, s, y, *gram(s, y))


class CompiledHistory:
    """As `EagerHistory`, for `step`, as torch.compile fuses it best: no trip to the host, every pair taken."""

    def __init__(self, s: Tensor, y: Tensor) -> None:
        self.s, self.y = list(s.unbind()), list(y.unbind())
        self.rho = [1.0 / a.dot(b) for a, b in zip(self.s, self.y, strict=True)]

    def step(self, grad: Tensor, prev_grad: Tensor, direction: Tensor, t: float) -> Tensor:
        """Add the pair (t d, g - g_prev), return the new direction, and set `prev_grad` to `grad`."""
        call = compiled(step_rows)
        d, s, y, rho = call(grad, prev_grad, direction, t, self.s[1:], self.y[1:], self.rho[1:])
        self.s, self.y, self.rho = [*self.s[1:], s], [*self.y[1:], y], [*self.rho[1:], rho]
        prev_grad.copy_(grad)
        return d


def step_rows(
    g: Tensor, prev: Tensor, d: Tensor, t: float, s: list[Tensor], y: list[Tensor], rho: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the direction after the pair (t d, g - prev), and that with its rho, from those before; flat vectors."""
    new_s, new_y = t * d, g - prev
    curvature = (new_s * new_y).sum()
    new_rho = 1.0 / curvature
    gamma = curvature / (new_y * new_y).sum()
    return _rows(g, [*s, new_s], [*y, new_y], [*rho, new_rho], gamma), new_s, new_y, new_rho


#: Shapes of one function that torch.compile may meet: beyond its own limit it goes on in eager mode, without a word.
SHAPES = 64


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile the function by torch.compile, one version per shape."""
    config: Any = importlib.import_module("torch._dynamo.config")
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(SHAPES, getattr(config, name)))
    return torch.compile(function, dynamic=False)


class Exact(NamedTuple):
    """A direction in float64, and by how much it may amplify a relative rounding error made on the way."""

    d: Tensor
    amplification: float


def exact(
    g: Tensor,
    s: Sequence[Tensor],
    y: Sequence[Tensor],
    *,
    storage: torch.dtype | None = None,
    weight: Tensor | None = None,
) -> Exact:
    """Compute d = -H g in float64 from pairs of any dtype, oldest first, one of them widened at a time.

    The recursion applies each of I - rho s y^T and its transpose once, both of norm c = |s| |y| / s.y. So an error
    grows by at most prod c^2 from where it was made to d, times gamma or max |s|^2 / s.y, whichever is larger, for the
    scale that it was made at: amplification = prod c^2 max(gamma, |s|^2 / s.y) |g| / |d|, the largest of a batch.

    Args:
        g: (n,) or (B, n). s, y: m tensors like it. storage: dtype that the pairs are rounded to first.
        weight: (n,), float64: how many columns of a longer problem each column stands for; None: one.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        a = a if weight is None else a * weight
        return torch.dot(a, b)[None] if a.dim() == 1 else (a * b).sum(-1, keepdim=True)

    def wide(x: Tensor) -> Tensor:
        return (x if storage is None else x.to(storage)).double()

    q = g.double().neg()
    size = dot(q, q).sqrt()
    saved: list[tuple[Tensor, Tensor]] = []
    growth, scale, gamma = torch.ones_like(size), torch.zeros_like(size), torch.ones_like(size)
    for a, b in zip(map(wide, reversed(s)), map(wide, reversed(y)), strict=True):
        ab, aa, bb = dot(a, b), dot(a, a), dot(b, b)
        gamma = gamma if saved else ab / bb
        growth, scale = growth * (aa * bb / ab**2), torch.maximum(scale, aa / ab)
        saved.append((ab, dot(a, q) / ab))
        q.addcmul_(saved[-1][1], b, value=-1.0)
    r = q.mul_(gamma)
    for a, b in zip(map(wide, s), map(wide, y), strict=True):
        ab, alpha = saved.pop()
        r.addcmul_(alpha - dot(b, r) / ab, a)
    shrunk = size / dot(r, r).sqrt()
    return Exact(r, float((growth * torch.maximum(gamma, scale) * shrunk).max()))


def tolerance(m: int, amplification: float, dtype: torch.dtype, dots: float) -> float:
    """Bound the relative error of a direction computed in `dtype`.

    Each of the 2m steps q - alpha y makes an error of at most c (4 u + dots) |q| with u the unit roundoff: two
    roundings of either term, and `dots`, the error of a dot product relative to |s| |q|. `Exact.amplification` has the
    factor c in it already.
    """
    return 2 * m * (2 * torch.finfo(dtype).eps + dots) * amplification
