"""Conjugate gradients and Steihaug's method, masked on the device."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from secant.result import Status
from secant.solvers import cg, steihaug


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
    assert int(result.status) == Status.CONVERGED
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
    assert int(before.status) == Status.MAX_ITER
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
    assert int(result.status) == Status.CONVERGED
    assert torch.allclose(a @ result.x, b, atol=1e-10)
    assert float(result.x[0]) == 0.0


def test_zero_right_hand_side():
    result = cg(lambda v: 2.0 * v, torch.zeros(4), check_every=3, max_iter=9)
    assert int(result.status) == Status.CONVERGED
    assert int(result.iterations) == 0
    assert torch.equal(result.x, torch.zeros(4))
    assert float(result.size) == 0.0


def test_flat_directions_are_not_followed_without_a_radius():
    b = torch.tensor([1.0, 2.0])
    first = cg(lambda v: 0.0 * v, b)
    assert int(first.status) == Status.FLAT
    assert torch.equal(first.x, b)  # M^-1 b
    # Curvature 1 and -1: the second direction is flat, and x stays where the first led.
    a = torch.tensor([4.0, -1.0], dtype=torch.float64)
    later = cg(lambda v: a * v, torch.tensor([1.0, 0.1], dtype=torch.float64), max_iter=10)
    assert int(later.status) == Status.FLAT
    assert int(later.iterations) == 2
    # What is flat is relative to M.
    assert int(cg(lambda v: 1e-4 * v, b, min_curvature=1e-3).status) == Status.FLAT
    assert int(cg(lambda v: 1e-4 * v, b, min_curvature=1e-5).status) == Status.CONVERGED
    scaled = cg(lambda v: 1e-4 * v, b, preconditioner=lambda r: 1e4 * r, min_curvature=1e-3)
    assert int(scaled.status) == Status.CONVERGED


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("every", [1, 5])
def test_products_that_are_not_finite(bad, every):
    result = cg(lambda v: v * bad, torch.ones(3), check_every=every, max_iter=10)
    assert int(result.status) == Status.NOT_FINITE
    assert torch.equal(result.x, torch.zeros(3))
    assert int(cg(lambda v: v, torch.tensor([1.0, bad])).status) == Status.NOT_FINITE


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
    if int(result.status) == Status.BOUNDARY:
        assert size == pytest.approx(radius, rel=1e-6)
    p = -g / m
    reach = radius / float(torch.sqrt(p @ (m * p)))
    curvature = float(p @ (a @ p))
    t = min(reach, -float(g @ p) / curvature) if curvature > 0.0 else reach
    assert model(result.x) <= model(t * p) * (1 - 1e-9) + 1e-12


def test_steihaug_inside_the_region_is_cg():
    a, g = spd(15, 4)
    inside = steihaug(lambda v: a @ v, g, radius=1e6, rtol=1e-9, max_iter=100)
    assert int(inside.status) == Status.CONVERGED
    assert torch.equal(inside.x, cg(lambda v: a @ v, -g, rtol=1e-9, max_iter=100).x)


def test_steihaug_leaves_along_negative_curvature():
    a, g = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 0.5])
    result = steihaug(lambda v: a * v, g, radius=torch.tensor(3.0))
    assert int(result.status) == Status.BOUNDARY
    assert torch.allclose(result.x, torch.tensor([0.0, -3.0]))


def problems():
    """Six problems of 24 unknowns that stop at different times, for different reasons: (matrices, right-hand sides)."""
    pairs = [spd(24, seed, condition) for seed, condition in enumerate((1e1, 1e6, 1e3, 1e2, 1e2, 1e2))]
    a, b = (torch.stack(part) for part in zip(*pairs, strict=True))
    a[3] -= 40.0 * torch.eye(24, dtype=a.dtype)  # indefinite
    b[4] = 0.0
    a[5, 7, 7] = math.nan
    return a, b


def rows(a):
    """V -> A v for each problem by sums, whose bits do not depend on the other problems."""
    return lambda v: (a * v[:, None]).sum(-1)


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("refresh", [None, 5, 50])
def test_a_problem_of_a_batch_is_the_problem_alone(every, refresh):
    a, b = problems()
    m = a.diagonal(dim1=1, dim2=2).abs().nan_to_num(1.0)
    radius = torch.tensor([math.inf, math.inf, 1e-3, 2.0, 1.0, 1.0], dtype=a.dtype)
    options = {"rtol": 1e-10, "max_iter": 150, "refresh_every": refresh, "batch_dims": 1}
    both = steihaug(rows(a), -b, radius=radius, preconditioner=lambda r: r / m, check_every=every, **options)
    for i in range(len(b)):
        one = slice(i, i + 1)
        alone = steihaug(rows(a[one]), -b[one], radius=radius[one], preconditioner=lambda r, m=m[one]: r / m, **options)
        for x, y in zip(both, alone, strict=True):
            assert torch.equal(x[one], y)
    status = [Status(code) for code in both.status.tolist()]
    assert status[:1] + status[2:] == [
        Status.CONVERGED, Status.BOUNDARY, Status.BOUNDARY, Status.CONVERGED, Status.NOT_FINITE
    ]  # fmt: skip
    assert status[1] in (Status.CONVERGED, Status.MAX_ITER, Status.STALLED)
    assert len(set(both.iterations.tolist())) >= 4


def test_a_batch_solves_what_single_calls_solve():
    pairs = [spd(12, seed, 1e2) for seed in range(6)]
    a, b = (torch.stack(part) for part in zip(*pairs, strict=True))
    shaped = cg(
        lambda v: (a * v.reshape(6, 1, 12)).sum(-1).reshape(2, 3, 3, 4),
        b.reshape(2, 3, 3, 4),
        batch_dims=2,
        rtol=1e-12,
        refresh_every=4,
    )
    assert shaped.x.shape == (2, 3, 3, 4)
    assert shaped.status.shape == shaped.iterations.shape == shaped.size.shape == (2, 3)
    assert (shaped.status == Status.CONVERGED).all()
    for i in range(6):
        alone = cg(lambda v, i=i: a[i] @ v, b[i], rtol=1e-12, refresh_every=4)
        # Both are within cond(A) rtol = 1e-10 of the solution.
        assert torch.allclose(shaped.x.reshape(6, 12)[i], alone.x, rtol=0.0, atol=2e-10 * float(alone.x.norm()))
        assert float(shaped.size.reshape(6)[i]) == pytest.approx(float(alone.size), rel=1e-9)


def test_absolute_tolerance_and_flatness_are_of_each_problem():
    scales = torch.tensor([[4.0, 1.0], [1e-4, 1e-4], [4.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1e-4, 1e-4]], dtype=torch.float64)
    result = cg(lambda v: scales * v, b, batch_dims=1, rtol=0.0, atol=1e-3, min_curvature=1e-3)
    assert result.status.tolist() == [Status.CONVERGED, Status.FLAT, Status.CONVERGED]
    assert result.iterations.tolist() == [2, 1, 0]


def ill_conditioned():
    """A x = b in float32 with a condition of 1e4, its products rounded once: (product, b, true relative residual)."""
    a, _ = spd(60, 0, 1e4)
    a = (a / 1e4).float().double()
    b = torch.randn(60, generator=torch.Generator().manual_seed(1))
    return lambda v: (a @ v.double()).float(), b, lambda x: float((b - a @ x.double()).norm() / b.norm())


@pytest.mark.parametrize("every", [1, 8])
def test_what_converges_has_a_small_residual_not_a_small_recurrence(every):
    product, b, left = ill_conditioned()
    rtol = 1e-4
    lying = cg(product, b, rtol=rtol, max_iter=1000, refresh_every=None, check_every=every)
    assert int(lying.status) == Status.CONVERGED
    assert float(lying.residual.norm() / b.norm()) <= rtol
    assert left(lying.x) > 1.1 * rtol
    for refresh in (1, 10, 50):
        result = cg(product, b, rtol=rtol, max_iter=1000, refresh_every=refresh, check_every=every)
        assert int(result.status) == Status.CONVERGED
        # A computed residual is off by a rounding of A x and one of the difference, both below |b| eps.
        assert left(result.x) <= rtol + 2.0 * torch.finfo(torch.float32).eps


def test_what_rounding_does_not_allow_is_no_convergence():
    """eps cond(A) = 1e-3: no x in float32 has a residual of 1e-6. The best one there is comes back."""
    product, b, left = ill_conditioned()
    assert int(cg(product, b, rtol=1e-6, max_iter=1000, refresh_every=None).status) == Status.CONVERGED
    result = cg(product, b, rtol=1e-6, max_iter=1000)
    assert int(result.status) in (Status.STALLED, Status.MAX_ITER)
    assert left(result.x) <= left(cg(product, b, rtol=1e-6, max_iter=1000, refresh_every=None).x)


def test_what_another_start_does_not_improve_is_stalled():
    """A diagonal system in float32: below |b| eps the carried residual falls on, but x no longer moves."""
    scales = torch.logspace(0, 2, 60)
    b = torch.randn(60, generator=torch.Generator().manual_seed(2))
    result = cg(lambda v: scales * v, b, rtol=1e-10, max_iter=1000, refresh_every=10)
    assert int(result.status) == Status.STALLED
    assert int(result.iterations) < 200
    # Rounding x and rounding A x leave half a unit each.
    assert float((b.double() - scales.double() * result.x.double()).norm() / b.norm()) <= torch.finfo().eps
    assert torch.equal(result.residual, b - scales * result.x)


@pytest.mark.parametrize("refresh", [10, 50])
@pytest.mark.parametrize("most", [230, 1000])
def test_what_goes_on_from_a_computed_residual_goes_on_as_alone(refresh, most):
    """Problems in float32 whose convergence is not confirmed at first: they go on while others have long stopped."""
    pairs = [spd(60, seed, condition) for seed, condition in ((0, 1e4), (1, 1e2), (2, 2e4), (3, 3e3))]
    a, b = (torch.stack(part).float() for part in zip(*pairs, strict=True))
    options = {"rtol": 1e-4, "max_iter": most, "refresh_every": refresh, "batch_dims": 1, "check_every": 3}
    both = cg(rows(a), b, **options)
    for i in range(len(b)):
        alone = cg(rows(a[i : i + 1]), b[i : i + 1], **options)
        for x, y in zip(both, alone, strict=True):
            assert torch.equal(x[i : i + 1], y)
    assert (both.iterations <= most).all()
    once = cg(rows(a), b, **(options | {"refresh_every": None}))
    assert ((both.iterations > once.iterations) & (once.status == Status.CONVERGED)).any()


def test_short_runs_take_no_product_more():
    a, b = spd(20, 3, 1e2)
    calls = []
    result = cg(lambda v: (calls.append(1), a @ v)[1], b, rtol=1e-8)
    assert len(calls) == int(result.iterations) < 50
    calls.clear()
    result = cg(lambda v: (calls.append(1), a @ v)[1], b, rtol=1e-8, refresh_every=10)
    # One product after each ten iterations, one that confirms the end.
    assert len(calls) == int(result.iterations) + int(result.iterations) // 10 + 1


class Transfers(TorchDispatchMode):
    """Counts what is read by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("every", [1, 8])
def test_the_host_looks_every_few_iterations(batch_dims, every):
    a, b = spd(20, 3, 1e2)
    with Transfers() as seen:
        result = steihaug(
            lambda v: (a * v[..., None, :]).sum(-1),
            b[None] if batch_dims else b,
            radius=torch.tensor(1e3),
            batch_dims=batch_dims,
            check_every=every,
        )
    taken = int(result.iterations)
    assert 8 < taken < 50
    # One problem on a CPU, looked at in every iteration, is all the host's: its numbers are read as they come.
    assert (batch_dims == 0 and every == 1) or seen.count == -(-taken // every) + 1


@pytest.mark.parametrize("solver", [cg, steihaug])
def test_invalid_arguments(solver):
    name = solver.__name__

    def call(x=torch.ones(3, 2), matvec=lambda v: v, **options):  # noqa: B008
        return solver(matvec, x, **({"radius": 1.0} if solver is steihaug else {}), **options)

    with pytest.raises(TypeError, match=f"{name}: (b|grad): expected dtype float32 or float64, got torch.int64"):
        call(torch.ones(3).long())
    with pytest.raises(ValueError, match=rf"{name}: (b|grad): expected more than batch_dims = 2 dimensions, got shape"):
        call(batch_dims=2)
    with pytest.raises(ValueError, match=f"{name}: batch_dims: expected an integer, 0 or more"):
        call(batch_dims=True)
    with pytest.raises(ValueError, match=f"{name}: refresh_every: expected an integer, 1 or more"):
        call(refresh_every=0)
    with pytest.raises(ValueError, match=rf"{name}: matvec: expected a function that keeps the shape \(3, 2\)"):
        call(matvec=lambda v: v[..., None])
    with pytest.raises(ValueError, match=f"{name}: preconditioner: expected a function that keeps the shape"):
        call(preconditioner=lambda r: r[:1])


def test_a_radius_is_one_or_one_for_each_problem():
    with pytest.raises(ValueError, match=r"steihaug: radius: expected a number, one element, or shape \(3,\), got"):
        steihaug(lambda v: v, torch.ones(3, 2), radius=torch.ones(2), batch_dims=1)
    for radius in (0.5, torch.full((1, 1), 0.5), torch.full((3,), 0.5)):
        result = steihaug(lambda v: v, torch.ones(3, 2), radius=radius, batch_dims=1)
        # |x| = 0.5 along (1, 1), up to the rounding of a root and a product.
        assert torch.allclose(result.x, torch.full((3, 2), -math.sqrt(0.125)), rtol=4 * torch.finfo().eps)
        assert result.status.tolist() == [Status.BOUNDARY] * 3


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


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_the_flat_direction_is_told(batch_dims):
    """Two steps on positive eigenvalues, then the direction whose curvature is negative: conjugate, and descending."""
    gen = torch.Generator().manual_seed(4)
    q = torch.linalg.qr(torch.randn(6, 6, generator=gen, dtype=torch.float64)).Q
    a = (q * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, -0.1], dtype=torch.float64)) @ q.T
    b = q @ torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    shaped = b.reshape(1, 6) if batch_dims else b
    for found in (
        cg(lambda v: v @ a, shaped, batch_dims=batch_dims, rtol=1e-12),
        steihaug(lambda v: v @ a, -shaped, batch_dims=batch_dims, rtol=1e-12, radius=math.inf),
    ):
        assert Status(found.status.item()) is Status.FLAT
        x, p = found.x.reshape(6), found.direction.reshape(6)
        assert 1 < found.iterations.item() <= 6
        assert p.dot(a @ p) <= 0.0
        assert p.dot(b) > 0.0
        assert abs(p.dot(a @ x)) <= 1e-12 * p.norm() * x.norm() * 5.0
