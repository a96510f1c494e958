"""The test problems: values at the start, gradients, minima, against what is published."""

import math

import pytest
import torch

from secant.benchmarks import hock_schittkowski, mgh

#: f at the standard start where the literature or a closed form gives it.
AT_START = {
    "rosenbrock": 24.2, "freudenstein and roth": 400.5, "powell badly scaled": 1.13526, "beale": 14.203125,
    "helical valley": 2500.0, "powell singular": 215.0, "wood": 19192.0, "brown and dennis": 7926693.336997432,
    "watson": 30.0, "extended rosenbrock": 121.0, "extended powell singular": 645.0, "gulf": 12.1107,
    "meyer": 1.69361e9, "jennrich and sampson": 4171.306, "broyden tridiagonal": 21.0, "broyden banded": 360.0,
    "brown almost-linear": 273.248, "linear, full rank": 50.0,
}  # fmt: skip


def named(problems):
    return pytest.mark.parametrize("problem", problems, ids=lambda p: p.name)


def test_there_are_all_of_them():
    assert [p.number for p in mgh.PROBLEMS] == list(range(1, 36))
    assert len({p.name for p in mgh.PROBLEMS}) == 35
    assert [p.name for p in hock_schittkowski.PROBLEMS] == [f"hs{k}" for k in (1, 2, 3, 4, 5, 25, 38, 45, 110)]


@named(mgh.PROBLEMS)
def test_residuals_have_their_shape_and_value_at_the_start(problem):
    r = problem.residuals(problem.start)
    assert r.shape == (problem.m,)
    assert r.dtype is torch.float64
    if problem.name in AT_START:
        assert problem.value(problem.start).item() == pytest.approx(AT_START[problem.name], rel=5e-6)


@named(mgh.PROBLEMS)
def test_derivatives_are_those_of_differences(problem):
    torch.manual_seed(0)
    x = problem.start + 0.01 * torch.rand(problem.n, dtype=torch.float64) * problem.start.abs().clamp_min(1.0)
    jacobian = torch.autograd.functional.jacobian(problem.residuals, x)
    h = 1e-6 * x.abs().clamp_min(1.0)
    columns = [(problem.residuals(x + e) - problem.residuals(x - e)) / (2 * e.sum()) for e in torch.diag(h)]
    differences = torch.stack(columns, 1)
    # Rounding of a difference, 1e-16 |r| / h, and its curvature, h^2; h is 1e-6 and more.
    scale = float(jacobian.abs().max() + problem.residuals(x).abs().max())
    assert torch.allclose(jacobian, differences, rtol=0, atol=1e-8 * scale)


@named([p for p in mgh.PROBLEMS if p.solutions])
def test_known_solutions_have_the_minimum(problem):
    for solution in problem.solutions:
        x = solution.clone().requires_grad_()
        value = problem.value(x)
        assert value.item() == pytest.approx(problem.minima[0], rel=1e-12, abs=1e-24)
        (gradient,) = torch.autograd.grad(value, x)
        rows = torch.autograd.functional.jacobian(problem.residuals, solution)
        assert gradient.abs().max() <= 1e-12 * max(1.0, float(rows.square().sum()))


@named(mgh.PROBLEMS)
def test_minima_are_reached(problem):
    """From the start, by scipy's trust region: the global minimum, or one of the others listed."""
    optimize = pytest.importorskip("scipy.optimize")
    found = optimize.least_squares(
        lambda x: problem.residuals(torch.from_numpy(x)).numpy(),
        problem.start.numpy(),
        lambda x: torch.autograd.functional.jacobian(problem.residuals, torch.from_numpy(x)).numpy(),
        xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=3000,
    )  # fmt: skip
    assert min(abs(2.0 * found.cost - f) - 1e-6 * abs(f) for f in problem.minima) <= 1e-15


@named(hock_schittkowski.PROBLEMS)
def test_solutions_in_boxes(problem):
    x = problem.solution.clone().requires_grad_()
    value = problem.value(x)
    assert value.item() == pytest.approx(problem.minima[0], rel=1e-9, abs=1e-12)
    (g,) = torch.autograd.grad(value, x)
    assert ((problem.solution >= problem.lower) & (problem.solution <= problem.upper)).all()
    slack = torch.clamp(problem.solution - g, problem.lower, problem.upper) - problem.solution
    assert slack.abs().max() <= 1e-6
    if problem.name == "hs2":
        assert value.item() == pytest.approx(0.0504261879, rel=1e-8)
    if problem.name == "hs5":
        assert value.item() == pytest.approx(-1.91322295, rel=1e-8)
    assert math.isfinite(float(problem.value(problem.start)))
