"""Exact trust-region steps: against the multiplier found from all eigenvalues, in the easy case and the hard one."""

from __future__ import annotations

import math

import pytest
import torch

from secant import Status
from secant.solvers import more_sorensen

F64 = torch.float64


def problem(kind: str, seed: int):
    """Eigenvalues, vectors, gradient and radius."""
    gen = torch.Generator().manual_seed(seed)
    n = 1 + seed % 11
    q = torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=F64)).Q
    w = torch.randn(n, generator=gen, dtype=F64) * 10.0 ** float(torch.randn((), generator=gen))
    gamma = torch.randn(n, generator=gen, dtype=F64)
    if kind in ("convex", "flat"):
        w = w.abs()
    if kind == "flat":
        w[0] = gamma[0] = 0.0
    if kind == "hard":
        gamma[w.argmin()] = 0.0
        gamma *= 1e-3
    if kind == "no gradient":
        gamma *= 0.0
    radius = 10.0 ** float(2.0 * torch.randn((), generator=gen))
    return w, q, gamma, radius


def largest_decrease(w, gamma, radius):
    """-min (gamma.u + 1/2 w.u^2), |u| <= radius, by bisection for the multiplier; parts of 0/0 are free."""

    def at(multiplier):
        return torch.where(gamma == 0.0, 0.0, -gamma / (w + multiplier))

    low = max(0.0, -float(w.min()))
    u = at(low)
    if not (torch.isfinite(u).all() and u.norm() <= radius):
        high = low + float(gamma.norm()) / radius
        for _ in range(300):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if at(middle).norm() <= radius else (middle, high)
        u = at(high)
    elif float(w.min()) < 0.0:
        i = w.argmin()
        u[i] = math.sqrt(radius**2 - float(u.square().sum() - u[i] ** 2))
    return -float(gamma.dot(u) + 0.5 * w.dot(u * u))


@pytest.mark.parametrize("kind", ["indefinite", "convex", "flat", "hard", "no gradient"])
def test_it_finds_the_minimum_of_the_model(kind):
    for seed in range(40):
        w, q, gamma, radius = problem(kind, seed)
        a, g = (q * w) @ q.T, q @ gamma
        a = 0.5 * (a + a.T)
        step = more_sorensen(a, g, radius=radius)
        best = largest_decrease(w, gamma, radius)
        assert step.size <= radius * (1 + 1e-12)
        assert step.decrease == pytest.approx(-float(g.dot(step.x) + 0.5 * step.x.dot(a @ step.x)))
        # (1 - easy)^2 (1 - hard) of the best is promised; rounding of A counts where nothing else does.
        assert step.decrease >= 0.81 * 0.8 * best - 1e-13 * float(w.abs().max()) * radius**2
        assert step.status in (Status.CONVERGED, Status.BOUNDARY)
        assert step.factorizations <= 30
        tight = more_sorensen(a, g, radius=radius, easy=1e-8, hard=1e-8)
        assert tight.decrease >= (1 - 4e-8) * best - 1e-13 * float(w.abs().max()) * radius**2


def test_inside_it_is_newtons_step():
    w, q, gamma, _ = problem("convex", 9)
    a, g = (q * w) @ q.T, q @ gamma
    step = more_sorensen(a, g, radius=1e6)
    assert step.status is Status.CONVERGED
    assert (step.multiplier, step.factorizations) == (0.0, 1)
    condition = float(w.max() / w.min())
    error = (step.x + torch.linalg.solve(a, g)).norm() / step.x.norm()
    assert float(error) <= 1e-15 * 10 * condition


def test_flat_directions_are_not_followed():
    """A is singular and g in its range: the shortest minimiser, not one at the boundary."""
    for seed in range(1, 30):
        w, q, gamma, _ = problem("flat", seed)
        if len(w) == 1:
            continue
        a, g = (q * w) @ q.T, q @ gamma
        step = more_sorensen(0.5 * (a + a.T), g, radius=1e8)
        want = q @ torch.where(gamma == 0.0, 0.0, -gamma / w)
        least = float(w[w > 0.0].min())
        # The multiplier is at most (max(n, 10) eps)^1/2 |A|, and the rounding of g is divided by a hundredth of that.
        n, norm, eps = len(w), float(w.norm()), torch.finfo(F64).eps
        small = (max(n, 10) * eps) ** 0.5 * norm
        assert step.multiplier <= small
        bound = small / least * float(want.norm()) + 10 * n * eps * float(g.norm()) / (0.01 * small)
        assert float((step.x - want).norm()) <= bound


def test_a_matrix_is_not_singular_for_the_units_of_its_variables():
    """Its condition is 1e15, in units of its variables 1 + sqrt(2): the step is Newton's, each component exact."""
    units = torch.tensor([1e7, 1e2, 10.0**-0.5], dtype=F64)
    tridiagonal = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]], dtype=F64)
    want = torch.tensor([1.0, -2.0, 3.0], dtype=F64) / units
    a = units[:, None] * tridiagonal * units
    step = more_sorensen(a, -(a @ want), radius=100.0)
    assert (step.status, step.multiplier) == (Status.CONVERGED, 0.0)
    assert torch.allclose(step.x, want, rtol=1e-13)
    # The same of a matrix that is singular: the direction is flat, whatever the units.
    tridiagonal[0, 0] = 2.0 / 3.0
    flat = units[:, None] * tridiagonal * units
    assert more_sorensen(flat, -(flat @ want), radius=100.0).multiplier > 0.0


def test_both_dtypes_and_what_is_not_finite():
    a, g = torch.tensor([[2.0, 1.0], [1.0, -1.0]]), torch.tensor([1.0, 1.0])
    step, wide = more_sorensen(a, g, radius=0.5), more_sorensen(a.double(), g.double(), radius=0.5)
    assert step.x.dtype is torch.float32
    assert torch.equal(step.x, wide.x.float())
    for bad in (math.nan, math.inf):
        found = more_sorensen(a, g * bad, radius=0.5)
        assert found.status is Status.NOT_FINITE
        assert torch.equal(found.x, torch.zeros(2))
        assert more_sorensen(a * bad, g, radius=0.5).status is Status.NOT_FINITE
    nothing = more_sorensen(torch.zeros(2, 2), torch.zeros(2), radius=0.5)
    assert (nothing.status, nothing.size) == (Status.CONVERGED, 0.0)
    slope = more_sorensen(torch.zeros(2, 2), torch.tensor([3.0, 4.0]), radius=0.5)
    assert torch.allclose(slope.x, torch.tensor([-0.3, -0.4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "radius: expected a finite number > 0"),
        ({"radius": math.inf}, "radius: expected a finite number > 0"),
        ({"easy": 1.0}, r"easy: expected a number in \(0, 1\)"),
        ({"hard": 0}, r"hard: expected a number in \(0, 1\)"),
        ({"max_iter": True}, "max_iter: expected an integer"),
        ({"hessian": torch.ones(2, 3)}, r"hessian: expected shape \(2, 2\)"),
        ({"grad": torch.ones(2, 2)}, r"grad: expected shape \(n,\)"),
    ],
)
def test_invalid_arguments(change, message):
    arguments = {"hessian": torch.eye(2), "grad": torch.ones(2), "radius": 1.0} | change
    with pytest.raises(ValueError, match=f"more_sorensen: {message}"):
        more_sorensen(arguments.pop("hessian"), arguments.pop("grad"), **arguments)
