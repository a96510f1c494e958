"""`minimize(batch=True, bounds=...)`: the minima of L-BFGS-B in each problem, and never a point outside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import secant
from secant import Status
from secant.benchmarks import hock_schittkowski
from test_batched_minimize import rosenbrock, starts

F64 = torch.float64
INF = math.inf
FIELDS = ("x", "fun", "jac", "status", "nit", "nfev")


def test_the_problems_of_hock_and_schittkowski_as_one_by_one():
    """Each from eight starts: as many at a known minimum, in no more evaluations than a tenth above."""
    draw = torch.Generator().manual_seed(0)
    ours = alone = 0
    for problem in hock_schittkowski.PROBLEMS:
        scale = 1.0 + 0.1 * torch.randn(8, len(problem.start), dtype=F64, generator=draw)
        scale[0] = 1.0
        x0, seen = problem.start * scale, []

        def fun(x, value=problem.value, seen=seen):
            seen.append(x.detach().clone())
            return torch.stack([value(row) for row in x])

        found = secant.minimize(fun, x0, bounds=(problem.lower, problem.upper), batch=True)
        pairs = list(zip(problem.lower.tolist(), problem.upper.tolist(), strict=True))
        singles = [secant.minimize(problem.value, x, bounds=pairs) for x in x0]
        solved = [
            sum(any(abs(float(f) - m) <= 1e-5 * max(1.0, abs(m)) for m in problem.minima) for f in values)
            for values in (found.fun, [one.fun for one in singles])
        ]
        assert solved[0] >= solved[1], problem.name
        assert bool(found.success.all()), problem.name
        assert all(bool(((x >= problem.lower) & (x <= problem.upper)).all()) for x in seen), problem.name
        ours, alone = ours + int(found.nfev.sum()), alone + sum(one.nfev for one in singles)
    assert ours <= 1.1 * alone


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_separable_quadratic_ends_at_the_projected_minimizer(dtype):
    """With bounds of each problem: at the start inside, at a bound, outside; at the end inside, at one, on it."""
    draw = torch.Generator().manual_seed(0)
    b, n = 50, 12
    curvature = torch.logspace(0, 2, n, dtype=dtype)
    center, x0 = (2.0 * torch.randn(b, n, dtype=F64, generator=draw).to(dtype) for _ in range(2))
    lower = -torch.rand(b, n, dtype=F64, generator=draw).to(dtype)
    upper = torch.rand(b, n, dtype=F64, generator=draw).to(dtype)
    lower[:, 0], upper[:, 1] = -INF, INF
    lower[:, 2], upper[:, 2] = -INF, INF
    upper[:, 3] = lower[:, 3]
    x0[:, 4], center[:, 5] = upper[:, 4], lower[:, 5]  # the minimum is on the bound, and the gradient there zero
    gtol = 1e-3 if dtype is torch.float32 else 1e-9  # float32: eight roundings of curvature times x, 100
    found = secant.minimize(
        lambda x: 0.5 * (curvature * (x - center) ** 2).sum(-1), x0, bounds=(lower, upper), batch=True,
        options={"gtol": gtol, "ftol": 0.0},
    )  # fmt: skip
    assert found.x.dtype is dtype
    assert found.status.tolist() == [Status.CONVERGED] * b
    expected = torch.minimum(torch.maximum(center, lower), upper)
    # |curvature (x - center)| <= gtol where x is free, so that |x - center| <= gtol / 1.
    assert float((found.x - expected).abs().max()) <= gtol
    outside = (center < lower) | (center > upper)
    assert torch.equal(found.x[outside], expected[outside])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("takes_index", [False, True])
def test_a_problem_ends_where_it_ends_alone(dtype, takes_index):
    x0 = starts(70, 5).to(dtype)
    draw = torch.Generator().manual_seed(2)
    lower = (x0 - torch.rand(70, 5, dtype=F64, generator=draw)).to(dtype)
    upper = (x0 + 2.0 * torch.rand(70, 5, dtype=F64, generator=draw)).to(dtype)
    rows = []

    def indexed(x, *, index):
        rows.append(len(x))
        return rosenbrock(x)

    fun = indexed if takes_index else rosenbrock
    whole = secant.minimize(fun, x0, bounds=(lower, upper), batch=True)
    if takes_index:
        assert sum(rows) == int(whole.nfev.sum())  # nothing is spent on what has stopped
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    mixed = secant.minimize(fun, x0[order], bounds=(lower[order], upper[order]), batch=True)
    for name in FIELDS:
        assert torch.equal(whole[name][order], mixed[name]), name
    for i in (0, 33, 69):
        alone = secant.minimize(fun, x0[i : i + 1], bounds=(lower[i : i + 1], upper[i : i + 1]), batch=True)
        for name in FIELDS:
            assert torch.equal(whole[name][i : i + 1], alone[name]), name
    at = (whole.x == lower) | (whole.x == upper)
    assert 0 < int(at.sum()) < at.numel()
    assert len(set(whole.nfev.tolist())) > 5


def test_bounds_in_every_form():
    optimize = pytest.importorskip("scipy.optimize")
    x0 = starts(6, 2)
    want = secant.minimize(rosenbrock, x0, bounds=[(-0.5, 0.5), (None, 0.2)], batch=True)
    lower, upper = torch.tensor([-0.5, -INF], dtype=F64), torch.tensor([0.5, 0.2], dtype=F64)
    forms = [
        (lower, upper),
        (lower.expand(6, 2), upper),
        (lower.numpy(), upper.numpy()),
        optimize.Bounds(lower.numpy(), upper.numpy()),
        optimize.Bounds(lower.expand(6, 2).numpy(), upper.expand(6, 2).numpy()),
        np.array([[-0.5, 0.5], [-INF, 0.2]]),
    ]
    for bounds in forms:
        found = secant.minimize(rosenbrock, x0, bounds=bounds, batch=True)
        for name in FIELDS:
            assert torch.equal(found[name], want[name]), bounds
    one = secant.minimize(rosenbrock, x0, bounds=(-INF, upper), batch=True)
    assert bool((one.x <= upper).all())


def test_without_bounds_it_is_as_good():
    found = secant.minimize(rosenbrock, starts(20, 4), method="L-BFGS-B", batch=True)
    assert bool(found.success.all())
    assert float(found.jac.abs().max()) < 1e-2


def test_optimal_at_a_vertex_from_the_start():
    """A start whose negative gradient points out of the box takes one evaluation; others are not touched."""
    x0 = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]], dtype=F64)
    slopes = torch.tensor([[1.0, 2.0], [-1.0, -3.0], [1.0, -1.0]], dtype=F64)
    found = secant.minimize(lambda x: (slopes * x).sum(-1), x0, bounds=[(0, 1)] * 2, batch=True)
    assert found.nfev.tolist()[:2] == [1, 1]
    assert found.status.tolist() == [Status.CONVERGED] * 3
    assert torch.equal(found.x, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=F64))


def test_ends_of_all_kinds_touch_nobody_else():
    def fun(x):
        a, b = x.unbind(-1)
        values = torch.stack(
            [
                rosenbrock(x),
                0.0 * a + 3.0,  # flat
                (a + 2.0).log() + b * b,  # undefined at its start
                -a,  # falls for ever
                torch.where(a < 0.5, math.nan, (a - 1.0) ** 2 + b * b),  # undefined on the way
                torch.where(a < 3.0, math.inf, 1e200 * a + b * b),  # at its bound, and it cannot be left
                rosenbrock(x),
            ]
        )
        return values[torch.arange(7), torch.arange(7)]

    x0 = torch.tensor([[-1.2, 1.0], [1, 1], [-3, 0], [0, 0], [3, 1], [3, 1], [-1.2, 1.0]], dtype=F64)
    lower = torch.tensor([[-2.0, -INF], [0, 0], [-5, -5], [-1, -INF], [-4, -4], [2, 0], [-2, -INF]], dtype=F64)
    upper = torch.tensor([[INF, 0.5], [2, 2], [5, 5], [INF, INF], [4, 4], [4, 1], [INF, 0.5]], dtype=F64)
    found = secant.minimize(fun, x0, bounds=(lower, upper), batch=True, options={"maxiter": 60})
    kinds = [Status(s) for s in found.status.tolist()]
    assert kinds[0].ok
    assert kinds[6].ok
    assert kinds[1] is Status.CONVERGED
    assert kinds[2] is Status.NOT_FINITE
    assert not kinds[3].ok
    assert float(found.fun[3]) < -1e6
    assert kinds[4].ok
    torch.testing.assert_close(found.x[4], torch.tensor([1.0, 0.0], dtype=F64), rtol=0, atol=1e-4)
    assert kinds[5] in (Status.STALLED, Status.NOT_FINITE)
    assert bool(found.x.isfinite().all())
    alone = secant.minimize(
        rosenbrock, x0[:1], bounds=(lower[:1], upper[:1]), batch=True, options={"maxiter": 60}
    )  # fmt: skip
    for i in (0, 6):
        assert torch.equal(found.x[i], alone.x[0])


def test_inverse_kinematics_within_joint_limits():
    """A planar arm of five joints reaches as many of 300 goals as scipy's L-BFGS-B, one by one."""
    optimize = pytest.importorskip("scipy.optimize")
    draw = torch.Generator().manual_seed(3)
    limit = torch.tensor([2.5, 1.6, 1.2, 1.0, 0.8], dtype=F64)
    hands = lambda q: torch.stack([q.cumsum(-1).cos().sum(-1), q.cumsum(-1).sin().sum(-1)], -1)  # noqa: E731
    goals = hands(limit * (2.0 * torch.rand(300, 5, dtype=F64, generator=draw) - 1.0))
    fun = lambda q, *, index: (hands(q) - goals[index]).square().sum(-1)  # noqa: E731
    options = {"gtol": 1e-8, "ftol": 0.0}
    x0 = torch.full((300, 5), 0.1, dtype=F64)
    found = secant.minimize(fun, x0, bounds=(-limit, limit), batch=True, options=options)
    assert bool((found.x.abs() <= limit).all())

    def single(q, goal):
        angles = np.cumsum(q)
        c, s = np.cos(angles), np.sin(angles)
        r = np.array([c.sum(), s.sum()]) - goal
        arms = np.stack([-s[::-1].cumsum()[::-1], c[::-1].cumsum()[::-1]])
        return r @ r, 2.0 * r @ arms

    bounds = list(zip((-limit).tolist(), limit.tolist(), strict=True))
    theirs = 0
    for x, goal in zip(x0.numpy(), goals.numpy(), strict=True):
        one = optimize.minimize(single, x, (goal,), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        theirs += one.fun < 1e-8
    assert int((found.fun < 1e-8).sum()) >= theirs - 3  # one in a hundred may fall into another valley
    assert theirs > 100


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([(0, 1)] * 3, r"bounds: expected 2 pairs"),
        ((torch.ones(2), torch.zeros(2)), r"bounds\[0\]: expected lower <= upper"),
        ((torch.zeros(5, 2), 1.0), r"bounds\[0\]: expected a shape that broadcasts to \(3, 2\)"),
        ([(0, math.nan)] * 2, r"bounds\[0\]: expected lower <= upper"),
        (3.0, "bounds: expected pairs"),
    ],
)
def test_wrong_bounds_are_named(bounds, words):
    with pytest.raises((TypeError, ValueError), match=words):
        secant.minimize(rosenbrock, torch.zeros(3, 2, dtype=F64), bounds=bounds, batch=True)


def test_another_method_knows_no_bounds():
    with pytest.raises(ValueError, match="bounds: expected None: 'l-bfgs' knows no bounds"):
        secant.minimize(rosenbrock, torch.zeros(3, 2), method="l-bfgs", bounds=[(0, 1)] * 2, batch=True)
