"""Conjugate gradients and Steihaug's method, masked on the device."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secant.solvers import CGStatus, cg, steihaug


def spd(n, seed, condition=1e3):
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return (q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ q.T, torch.randn(
        n, generator=g, dtype=torch.float64
    )


@given(n=st.integers(1, 30), seed=st.integers(0, 100), every=st.sampled_from([1, 3, 100]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_solves_and_stops_by_the_norm_of_the_preconditioner(n, seed, every):
    a, b = spd(n, seed)
    m = a.diagonal()
    result = cg(lambda v: a @ v, b, preconditioner=lambda r: r / m, rtol=1e-10, max_iter=20 * n, check_every=every)
    assert int(result.status) == CGStatus.CONVERGED
    r = b - a @ result.x
    # The recurrence drifts from the true residual by rounding alone, eps cond(A).
    assert torch.sqrt(r @ (r / m)) <= 2e-10 * torch.sqrt(b @ (b / m)) + 1e-12
    assert torch.allclose(result.residual, r, rtol=0.0, atol=1e-11 * float(b.norm()) * 10)
    assert float(result.size) == pytest.approx(float(torch.sqrt(result.x @ (m * result.x))), rel=1e-6)


def test_looking_less_often_changes_nothing():
    a, b = spd(25, 0)
    # Sums rather than a product by a BLAS, whose bits may depend on where a vector lies in memory.
    one = cg(lambda v: (a * v).sum(1), b, rtol=1e-6, max_iter=60, check_every=1)
    many = cg(lambda v: (a * v).sum(1), b, rtol=1e-6, max_iter=60, check_every=60)
    for x, y in zip(one, many, strict=True):
        assert torch.equal(x, y)
    assert int(one.iterations) < 60


def test_distinct_eigenvalues_are_the_iterations():
    eigenvalues = torch.tensor([1.0, 1.0, 4.0, 4.0, 9.0], dtype=torch.float64)
    result = cg(lambda v: eigenvalues * v, torch.ones(5, dtype=torch.float64), rtol=1e-12)
    assert int(result.iterations) == 3


def test_absolute_tolerance_is_on_the_largest_component():
    a, b = spd(20, 1)
    result = cg(lambda v: a @ v, b, rtol=0.0, atol=1e-3, max_iter=100)
    assert float(result.residual.abs().max()) <= 1e-3
    before = cg(lambda v: a @ v, b, rtol=0.0, atol=0.0, max_iter=int(result.iterations) - 1)
    assert int(before.status) == CGStatus.MAX_ITER
    assert float(before.residual.abs().max()) > 1e-3


def test_any_shape():
    a, b = spd(12, 2)
    flat = cg(lambda v: (a * v).sum(1), b, rtol=1e-10)
    shaped = cg(lambda v: (a * v.reshape(-1)).sum(1).reshape(4, 3), b.reshape(4, 3), rtol=1e-10)
    assert torch.equal(flat.x.reshape(4, 3), shaped.x)


def test_singular_and_consistent():
    a, b = spd(10, 3)
    a[:, 0] = 0.0
    a[0] = 0.0
    b[0] = 0.0
    result = cg(lambda v: a @ v, b, rtol=1e-12, max_iter=100)
    assert int(result.status) == CGStatus.CONVERGED
    assert torch.allclose(a @ result.x, b, atol=1e-10)
    assert float(result.x[0]) == 0.0


def test_zero_right_hand_side():
    result = cg(lambda v: 2.0 * v, torch.zeros(4), check_every=3, max_iter=9)
    assert int(result.status) == CGStatus.CONVERGED
    assert int(result.iterations) == 0
    assert torch.equal(result.x, torch.zeros(4))
    assert float(result.size) == 0.0


def test_flat_directions_are_not_followed_without_a_radius():
    b = torch.tensor([1.0, 2.0])
    first = cg(lambda v: 0.0 * v, b)
    assert int(first.status) == CGStatus.FLAT
    assert torch.equal(first.x, b)  # M^-1 b
    # Curvature 1 and -1: the second direction is flat, and x stays where the first led.
    a = torch.tensor([4.0, -1.0], dtype=torch.float64)
    later = cg(lambda v: a * v, torch.tensor([1.0, 0.1], dtype=torch.float64), max_iter=10)
    assert int(later.status) == CGStatus.FLAT
    assert int(later.iterations) == 2
    # What is flat is relative to M.
    assert int(cg(lambda v: 1e-4 * v, b, min_curvature=1e-3).status) == CGStatus.FLAT
    assert int(cg(lambda v: 1e-4 * v, b, min_curvature=1e-5).status) == CGStatus.CONVERGED
    scaled = cg(lambda v: 1e-4 * v, b, preconditioner=lambda r: 1e4 * r, min_curvature=1e-3)
    assert int(scaled.status) == CGStatus.CONVERGED


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("every", [1, 5])
def test_products_that_are_not_finite(bad, every):
    result = cg(lambda v: v * bad, torch.ones(3), check_every=every, max_iter=10)
    assert int(result.status) == CGStatus.NOT_FINITE
    assert torch.equal(result.x, torch.zeros(3))
    assert int(cg(lambda v: v, torch.tensor([1.0, bad])).status) == CGStatus.NOT_FINITE


@given(n=st.integers(2, 20), seed=st.integers(0, 100), radius=st.floats(1e-3, 1e3), shift=st.sampled_from([0.0, 50.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_steihaug_beats_the_cauchy_point_within_the_region(n, seed, radius, shift):
    """Indefinite for shift = 50; M diagonal. The model falls at least as far as along -M^-1 g alone."""
    a, g = spd(n, seed)
    a = a - shift * torch.eye(n, dtype=a.dtype)
    m = torch.linspace(0.5, 2.0, n, dtype=a.dtype)

    def model(x):
        return float(g @ x + 0.5 * x @ (a @ x))

    result = steihaug(lambda v: a @ v, g, radius=radius, preconditioner=lambda r: r / m, rtol=1e-8, max_iter=10 * n)
    size = float(torch.sqrt(result.x @ (m * result.x)))
    assert size <= radius * (1 + 1e-6)
    assert float(result.size) == pytest.approx(size, rel=1e-5)
    if int(result.status) == CGStatus.BOUNDARY:
        assert size == pytest.approx(radius, rel=1e-6)
    p = -g / m
    reach = radius / float(torch.sqrt(p @ (m * p)))
    curvature = float(p @ (a @ p))
    t = min(reach, -float(g @ p) / curvature) if curvature > 0.0 else reach
    assert model(result.x) <= model(t * p) * (1 - 1e-9) + 1e-12


def test_steihaug_inside_the_region_is_cg():
    a, g = spd(15, 4)
    inside = steihaug(lambda v: a @ v, g, radius=1e6, rtol=1e-9, max_iter=100)
    assert int(inside.status) == CGStatus.CONVERGED
    assert torch.equal(inside.x, cg(lambda v: a @ v, -g, rtol=1e-9, max_iter=100).x)


def test_steihaug_leaves_along_negative_curvature():
    a, g = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 0.5])
    result = steihaug(lambda v: a * v, g, radius=torch.tensor(3.0))
    assert int(result.status) == CGStatus.BOUNDARY
    assert torch.allclose(result.x, torch.tensor([0.0, -3.0]))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rtol": -1.0}, "rtol"),
        ({"atol": math.nan}, "atol"),
        ({"min_curvature": math.inf}, "min_curvature"),
        ({"max_iter": 0}, "max_iter"),
        ({"radius": 0.0}, "radius"),
        ({"check_every": 0}, "check_every"),
    ],
)
def test_errors_name_the_argument(options, name):
    with pytest.raises(ValueError, match=f"steihaug: {name}: expected"):
        steihaug(lambda v: v, torch.ones(2), **{"radius": 1.0, **options})
