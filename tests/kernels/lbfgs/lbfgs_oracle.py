"""What the tests of this family share: problems, the float64 reference, and error bounds derived from them."""

from __future__ import annotations

import math
from typing import Any

import torch
from secant.kernels.lbfgs import reference
from torch import Tensor

VECTORS = (torch.float32, torch.float64)
RINGS = (torch.float32, torch.float64, torch.bfloat16)


def pairs(m: int, n: int, batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Steps and gradient differences of a quadratic with eigenvalues in [0.5, 1.5]: s.y >= 0.86 |s| |y|."""
    generator = torch.Generator().manual_seed(seed + 1000 * m + n)
    s = torch.randn(batch, m, n, generator=generator, dtype=torch.float64)
    hessian = 0.5 + torch.rand(batch, 1, n, generator=generator, dtype=torch.float64)
    return s.to(dtype), (hessian * s).to(dtype)


def vector(n: int, batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(7919 * seed + n)
    return torch.randn(batch, n, generator=generator, dtype=torch.float64).to(dtype)


def exact(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None = None) -> Tensor:
    """The reference direction in float64 of the values as given."""
    out = torch.empty_like(grad, dtype=torch.float64)
    reference.two_loop(grad.double(), s, y, gamma, out)
    return out


#: The products of a backend that sums runs of 256 of them in float32, in 2 x 4 chains on its narrowest vectors: 32
#: additions in a chain and 2 between them, each off by half an epsilon.
FLOAT_RUNS = 17 * torch.finfo(torch.float32).eps


def bound(grad: Tensor, s: Tensor, y: Tensor, dtype: torch.dtype, products: float = 0.0) -> Tensor:
    """Bound on |d - exact d| per problem, for vectors combined in `dtype` and everything else in float64.

    `products`: error of the dot products relative to sum |x_i y_i|, beyond that of float64.

    The direction is a sum of 2m + 1 rows, each rounded once as it is added, so one pass errs by at most
    (2m + 2) u sum |c_j| |row_j|. Where a partial sum is stored and read again, its error goes through the remaining
    factors I - rho y s^T and I - rho s y^T, oblique projections of norm 1 / cos(s, y) each. The coefficients come from
    float64 and err by u64 times the same sum, which is why u64 / u enters for float64 only.
    """
    g, s, y = grad.double(), s.double(), y.double()
    m = s.shape[-2]
    sy, yy, ss = (s * y).sum(-1), (y * y).sum(-1), (s * s).sum(-1)
    ok = torch.isfinite(sy) & torch.isfinite(yy) & (sy > 0)
    s, y = torch.where(ok[..., None], s, 0.0), torch.where(ok[..., None], y, 0.0)
    amplification = torch.where(ok, (ss * yy).sqrt() / sy, 1.0).prod(-1) ** 2
    q, r, size = -g, None, g.abs()
    alpha = []
    for i in reversed(range(m)):
        a = torch.where(ok[..., i], (s[..., i, :] * q).sum(-1) / sy[..., i], 0.0)
        q = q - a[..., None] * y[..., i, :]
        size = size + (a[..., None] * y[..., i, :]).abs()
        alpha.insert(0, a)
    newest = torch.where(ok, torch.arange(1, m + 1), 0).argmax(-1, keepdim=True)
    gamma = torch.where(ok.any(-1), (sy / yy).gather(-1, newest)[..., 0], 1.0)
    r, size = gamma[..., None] * q, gamma.abs()[..., None] * size
    for i in range(m):
        b = torch.where(ok[..., i], (y[..., i, :] * r).sum(-1) / sy[..., i], 0.0)
        r = r + (alpha[i] - b)[..., None] * s[..., i, :]
        size = size + ((alpha[i].abs() + b.abs())[..., None] * s[..., i, :]).abs()
    eps = torch.finfo(dtype).eps
    return (2 * m + 2) * (eps + m * torch.finfo(torch.float64).eps + products) * amplification * size.norm(dim=-1)


def check_direction(d: Tensor, grad: Tensor, s: Tensor, y: Tensor) -> None:
    """Fail unless every problem of `d` is within `bound` of the float64 reference."""
    error = (d.double() - exact(grad, s, y)).norm(dim=-1)
    limit = bound(grad, s, y, d.dtype)
    assert torch.all(error <= limit), f"error {error.max().item():.3e}, bound {limit.min().item():.3e}"


def new_state(batch: int, m: int, n: int, ring: torch.dtype) -> dict[str, Tensor]:
    """An empty history, by the names of `reference.update`."""
    return {
        "s_ring": torch.zeros(batch, m, n, dtype=ring),
        "y_ring": torch.zeros(batch, m, n, dtype=ring),
        "sy": torch.zeros(batch, m, m, dtype=torch.float64),
        "yy": torch.zeros(batch, m, m, dtype=torch.float64),
        "head": torch.zeros(batch, dtype=torch.int32),
        "count": torch.zeros(batch, dtype=torch.int32),
        "stats": torch.full((batch, 8), math.nan, dtype=torch.float64),
    }


def copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in state.items()}


def ordered(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The pairs of a state, oldest first."""
    m = state["s_ring"].shape[1]
    order = (state["head"][:, None] + torch.arange(m)) % m
    take = order[..., None].expand_as(state["s_ring"]).long()
    return state["s_ring"].gather(1, take), state["y_ring"].gather(1, take)


def check_state(state: dict[str, Tensor], want: dict[str, Tensor], products: float = 0.0) -> None:
    """Rings and counters to the bit, Gram matrices to float64 rounding of sums of n terms, and that of the products."""
    for name in ("s_ring", "y_ring", "head", "count"):
        assert torch.equal(state[name], want[name]), name
    n = state["s_ring"].shape[-1]
    s, y = want["s_ring"].double(), want["y_ring"].double()
    u = 2 * n * torch.finfo(torch.float64).eps + products
    assert torch.all((state["sy"] - want["sy"]).abs() <= u * s.abs() @ y.abs().mT), "sy"
    assert torch.all((state["yy"] - want["yy"]).abs() <= u * y.abs() @ y.abs().mT), "yy"


def check_stats(stats: Tensor, want: Tensor, n: int, size: Any = None) -> None:
    """Counters exactly, sums to float64 rounding (those of n terms of mixed sign relative to their norms)."""
    gd, g, top, sy, sn, yn, accepted, gamma = range(8)
    u = 8 * max(n, 8) * torch.finfo(torch.float64).eps
    assert torch.equal(stats[:, accepted], want[:, accepted])
    assert torch.equal(stats[:, top].nan_to_num(nan=-1), want[:, top].nan_to_num(nan=-1))
    for column in (g, sn, yn, gamma):
        torch.testing.assert_close(stats[:, column], want[:, column], rtol=u, atol=0, equal_nan=True)
    torch.testing.assert_close(
        stats[:, sy],
        want[:, sy],
        rtol=0,
        atol=float(u * (want[:, sn] * want[:, yn]).nan_to_num(0, 0, 0).max()),
        equal_nan=True,
    )
    if size is not None:
        assert torch.all((stats[:, gd] - want[:, gd]).abs() <= size), "g.d"
