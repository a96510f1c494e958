"""L-BFGS within bounds: its model and Cauchy point against dense matrices, and whole runs against scipy's."""

import math

import pytest
import torch

from secant import Status
from secant.benchmarks import hock_schittkowski, mgh
from secant.solvers import lbfgs_b
from secant.solvers.box import Box, _cauchy, _Model

INF = math.inf
GTOL = {torch.float32: 1e-4, torch.float64: 1e-10}  # of gradients up to 150: a few roundings of curvature times x


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluator(value, points=None):
    """f with its gradient; every point that it is asked for is kept."""

    def evaluate(x):
        if points is not None:
            points.append(x.clone())
        x = x.detach().clone().requires_grad_()
        f = value(x)
        (g,) = torch.autograd.grad(f, x)
        return f.item(), g

    return evaluate


def test_what_falls_for_ever_has_not_converged():
    """Beyond 1e16 x - g rounds to x, which says nothing of g."""
    start, lower = torch.zeros(2, dtype=torch.float64), torch.tensor([-INF, 0.0], dtype=torch.float64)
    found = lbfgs_b(evaluator(lambda x: -x.sum()), start, lower, torch.full_like(lower, INF))
    assert found.status not in (Status.CONVERGED, Status.SMALL_CHANGE)
    assert float(found.x.min()) > 1e16


def model_and_matrix(n, pairs, size, seed=0):
    """Make the compact form, and the same matrix by the BFGS recursion from the newest theta."""
    a = randn(n, n, seed=seed)
    a = a @ a.mT / n + torch.eye(n, dtype=torch.float64)
    model = _Model(n, size, torch.device("cpu"))
    kept = []
    for k in range(pairs):
        s = randn(n, seed=seed + 10 + k)
        assert model.append(s, a @ s)
        kept = [*kept, (s, a @ s)][-size:]
    b = model.theta * torch.eye(n, dtype=torch.float64)
    for s, y in kept:
        bs = b @ s
        b = b - torch.outer(bs, bs) / (s @ bs) + torch.outer(y, y) / (s @ y)
    return model, b


@pytest.mark.parametrize(("pairs", "size"), [(1, 5), (4, 5), (5, 5), (13, 5)])
def test_the_compact_form_is_that_of_the_recursion(pairs, size):
    n = 12
    model, b = model_and_matrix(n, pairs, size)
    r = randn(n, seed=99)
    # Both solve systems whose condition is at most that of b, below 1e3; 1e4 roundings of it.
    tolerance = 1e4 * torch.finfo(torch.float64).eps * float(torch.linalg.cond(b))
    assert torch.allclose(model.newton(r, None), -torch.linalg.solve(b, r), rtol=0, atol=tolerance)
    free = torch.tensor([0, 3, 4, 7, 11])
    expected = -torch.linalg.solve(b[free][:, free], r[free])
    assert torch.allclose(model.newton(r[free], free), expected, rtol=0, atol=tolerance)


def slow_cauchy(x, g, b, lower, upper):
    """Walk the projected path from breakpoint to breakpoint, with the dense matrix at each."""
    t = torch.where(g < 0, (x - upper) / g, (x - lower) / g)
    t[g == 0] = INF
    z = x.clone()
    for now, then in zip([0.0, *sorted(t[t < INF].tolist())], [*sorted(t[t < INF].tolist()), INF], strict=True):
        d = torch.where(t > now, -g, 0.0)
        slope, curvature = float(d @ (g + b @ (z - x))), float(d @ b @ d)
        if slope >= 0.0:
            return z
        step = -slope / curvature
        if step < then - now:
            return z + step * d
        z = torch.clamp(x - then * g, lower, upper)
    return z


@pytest.mark.parametrize("pairs", [0, 1, 6])
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("n", [3, 150])
def test_the_cauchy_point_is_that_of_a_walk_with_the_dense_matrix(n, scale, pairs):
    model, b = model_and_matrix(n, pairs, 8)
    x, g = randn(n, seed=1), randn(n, seed=2)
    lower, upper = x - scale * randn(n, seed=3).abs(), x + scale * randn(n, seed=4).abs()
    lower[::7], upper[1::7] = -INF, INF
    lower[2], g[0] = x[2], 0.0
    path = _cauchy(Box(lower, upper, torch.float64), x, g, model)
    expected = slow_cauchy(x, g, b, lower, upper)
    # Sums over n breakpoints of terms of the size of b.
    tolerance = 100 * n * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(b, 2)) * max(1.0, scale)
    assert torch.allclose(path.x, expected, rtol=0, atol=tolerance)
    assert torch.allclose(path.c, model.rows @ (path.x - x), rtol=0, atol=100 * tolerance)
    inside = (expected > lower) & (expected < upper)
    assert torch.equal(path.free, inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_separable_quadratic_ends_at_the_projected_minimizer(dtype):
    n = 40
    curvature, center = torch.linspace(1.0, 50.0, n).to(dtype), 2.0 * randn(n).to(dtype)
    lower, upper = -torch.ones(n, dtype=dtype), 0.5 * torch.ones(n, dtype=dtype)
    run = lbfgs_b(
        evaluator(lambda x: 0.5 * (curvature * (x - center) ** 2).sum()), torch.zeros(n, dtype=dtype), lower, upper,
        gtol=GTOL[dtype], ftol=0.0,
    )  # fmt: skip
    assert run.status is Status.CONVERGED
    assert run.x.dtype is dtype
    expected = center.clamp(lower, upper)
    # |curvature (x - center)| <= gtol where x is free, so that |x - center| <= gtol / 1.
    assert (run.x - expected).abs().max() <= GTOL[dtype]
    bounded = (center < -1) | (center > 0.5)
    assert torch.equal(run.x[bounded], expected[bounded])


def solved(problem, value, x, gradient):
    slack = (torch.clamp(x - gradient, problem.lower, problem.upper) - x).abs().max()
    near = min(abs(value - f) / max(1.0, abs(f)) for f in problem.minima)
    return near <= 1e-5 or bool(slack <= 1e-5)


def scipy_run(value, start, lower, upper):
    optimize = pytest.importorskip("scipy.optimize")
    evaluate = evaluator(value)

    def both(x):
        f, g = evaluate(torch.from_numpy(x.copy()))
        return f, g.numpy()

    bounds = list(zip(lower.tolist(), upper.tolist(), strict=True))
    return optimize.minimize(both, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds)


def test_hock_and_schittkowski_as_scipy():
    ours = theirs = 0
    for problem in hock_schittkowski.PROBLEMS:
        points = []
        run = lbfgs_b(evaluator(problem.value, points), problem.start, problem.lower, problem.upper)
        other = scipy_run(problem.value, problem.start, problem.lower, problem.upper)
        assert run.status.ok, problem.name
        assert solved(problem, run.value, run.x, run.grad), problem.name
        assert run.value <= other.fun + 1e-5 * max(1.0, abs(other.fun)), problem.name
        assert len(points) == run.evaluations
        assert all(((x >= problem.lower) & (x <= problem.upper)).all() for x in points)
        ours, theirs = ours + run.evaluations, theirs + other.nfev
    assert ours <= theirs


BOXED = [p for p in mgh.PROBLEMS if p.solutions]


def test_the_boxes_cut_solutions_off():
    for problem in BOXED:
        lower, upper = problem.box()
        assert ((problem.start >= lower) & (problem.start <= upper)).all()
        outside = ((problem.solutions[0] < lower) | (problem.solutions[0] > upper)).any()
        assert outside == bool((problem.solutions[0] != problem.start)[::2].any())


def test_mgh_with_boxes_as_scipy():
    ours = theirs = 0
    for problem in BOXED:
        lower, upper = problem.box()
        points = []
        run = lbfgs_b(evaluator(problem.value, points), problem.start, lower, upper)
        other = scipy_run(problem.value, problem.start, lower, upper)
        assert run.status.ok, problem.name
        assert run.value <= other.fun + 1e-5 * max(1.0, abs(other.fun)), problem.name
        assert all(((x >= lower) & (x <= upper)).all() for x in points)
        if other.fun <= run.value + 1e-5 * max(1.0, abs(run.value)):  # where scipy's did not give up before
            ours, theirs = ours + run.evaluations, theirs + other.nfev
    assert ours <= theirs


def test_bounds_that_float32_does_not_have_are_not_broken():
    lower, upper = torch.full((3,), 0.1, dtype=torch.float64), torch.full((3,), 0.7, dtype=torch.float64)
    assert float(torch.tensor(0.1)) > 0.1  # so one side has to be rounded up, the other down
    assert float(torch.tensor(0.7)) < 0.7
    points = []
    target = torch.tensor([-5.0, 0.3, 5.0])
    run = lbfgs_b(evaluator(lambda x: ((x - target) ** 2).sum(), points), torch.zeros(3), lower, upper)
    assert run.status is Status.CONVERGED
    assert all(((x.double() >= lower) & (x.double() <= upper)).all() for x in points)
    box = Box(-upper, -lower, torch.float32)
    assert ((box.lower >= -upper) & (box.upper <= -lower)).all()
    assert torch.allclose(run.x, torch.tensor([0.1, 0.3, 0.7]), rtol=0, atol=1e-6)


def test_variables_with_equal_bounds_stay():
    lower = torch.tensor([1.0, -INF, 0.25], dtype=torch.float64)
    upper = torch.tensor([1.0, INF, 0.25], dtype=torch.float64)
    center = torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64)
    run = lbfgs_b(evaluator(lambda x: ((x - center) ** 2).sum()), torch.zeros(3).double(), lower, upper)
    assert run.x[0] == 1.0
    assert run.x[2] == 0.25
    assert abs(run.x[1] - 2.0) <= 1e-5  # gtol, of twice that


def box_of(n):
    return torch.full((n,), -INF), torch.full((n,), INF)


def test_a_trial_that_is_not_finite_shortens_the_step():
    def value(x):  # NaN for x < 0, and a minimum at 1 / 4
        return (x - 0.5 * x.sqrt()).sum()

    run = lbfgs_b(evaluator(value), torch.full((2,), 0.01, dtype=torch.float64), *box_of(2))
    assert run.status.ok
    assert (run.x - 1 / 16).abs().max() < 1e-4
    nowhere = lbfgs_b(evaluator(value), torch.tensor([-1.0, 1.0]), *box_of(2))
    assert nowhere.status is Status.NOT_FINITE
    assert nowhere.evaluations == 1


@pytest.mark.parametrize("limit", range(1, 12))
def test_evaluations_are_never_more_than_allowed(limit):
    points = []
    problem = mgh.PROBLEMS[0]
    run = lbfgs_b(evaluator(problem.value, points), problem.start, *box_of(2), max_evaluations=limit)
    assert run.status is Status.MAX_EVAL
    assert len(points) == run.evaluations == limit
    assert run.value == min(float(problem.value(x)) for x in points)


def test_iterations_and_the_record():
    problem = mgh.PROBLEMS[0]
    told = []
    run = lbfgs_b(evaluator(problem.value), problem.start, *box_of(2), max_iter=5, record=told.append)
    assert run.status is Status.MAX_ITER
    assert [iterate.n for iterate in told] == [0, 1, 2, 3, 4, 5]
    assert told[-1].value == run.value
    assert told[-1].evaluations == run.evaluations
    assert torch.equal(told[0].x, problem.start)
    stopped = lbfgs_b(evaluator(problem.value), problem.start, *box_of(2), record=lambda iterate: iterate.n == 3)
    assert stopped.status is Status.STOPPED
    assert stopped.n_iter == 3
    assert torch.equal(stopped.x, told[3].x)


def test_what_falls_forever_ends():
    run = lbfgs_b(evaluator(lambda x: -x.exp().sum()), torch.zeros(2, dtype=torch.float64), *box_of(2))
    assert not run.status.ok
    assert math.isfinite(run.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.zeros(2, dtype=torch.int64)}, TypeError),
        ({"lower": torch.ones(2), "upper": torch.zeros(2)}, ValueError),
        ({"lower": torch.tensor([math.nan, 0.0])}, ValueError),
        ({"lower": torch.zeros(3)}, ValueError),
        ({"history_size": 0}, ValueError),
        ({"gtol": -1.0}, ValueError),
        ({"max_iter": 1.5}, ValueError),
    ],
)
def test_invalid_arguments(change, error):
    arguments = {"x": torch.zeros(2), "lower": -torch.ones(2), "upper": torch.ones(2)} | change
    with pytest.raises(error, match=r"(lbfgs_b|Box): "):
        lbfgs_b(lambda x: (0.0, x), **arguments)
