"""Differential equations and a curve: the exact solution has no residuals, and the error is relative."""

import math

import pytest
import torch

from secant.benchmarks.residual_problems import EQUATIONS, Sinc, network

EPS = torch.finfo(torch.float64).eps
SIZES = {"poisson-2d": 257, "heat-1+1d": 257, "poisson-5d": 449, "heat-4+1d": 449, "reaction-2d": 161}


@pytest.mark.parametrize("name", SIZES)
def test_the_exact_solution_has_no_residuals(name):
    problem = EQUATIONS[name](50, 30)
    inside, outside = problem.residuals(lambda x: problem.exact(x).unsqueeze(1))
    # Second derivatives are sums of a few terms of at most 2 pi^2 exp(1), each rounded.
    assert float(inside.detach().abs().max()) <= 100 * EPS * 2 * math.pi**2
    assert float(outside.detach().abs().max()) == 0.0
    assert problem.error(lambda x: problem.exact(x).unsqueeze(1)) == 0.0


@pytest.mark.parametrize("name", SIZES)
def test_residuals_are_of_the_equation(name):
    """Of u + 1 they are L 1 inside, and 1 at the boundary, each over the root of the count of points."""
    problem = EQUATIONS[name](50, 30)
    inside, outside = problem.residuals(lambda x: problem.exact(x).unsqueeze(1) + 1.0)
    shift = -3.0 if name == "reaction-2d" else 0.0
    assert torch.allclose(inside.detach(), torch.full((50,), shift / math.sqrt(50.0), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(outside.detach(), torch.full((30,), 1.0 / math.sqrt(30.0), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("name", SIZES)
def test_points_of_the_boundary_are_on_its_faces(name):
    problem = EQUATIONS[name](20, 60)
    assert all(any(float(x[i]) == value for i, value in problem.faces) for x in problem.outside)
    assert bool(((problem.inside > 0.0) & (problem.inside < 1.0)).all())


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_the_sizes_that_are_told(name):
    problem = EQUATIONS[name](20, 20)
    assert sum(p.numel() for p in problem.model().parameters()) == SIZES[name]
    state = torch.get_rng_state()
    one, other, third = problem.model(1), problem.model(1), problem.model(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[0].weight, third[0].weight)
    assert network(3, 4, dtype=torch.float32)[0].weight.dtype is torch.float32


def test_the_error_is_relative():
    problem = EQUATIONS["heat-4+1d"](20, 20)
    assert problem.error(lambda x: 1.25 * problem.exact(x).unsqueeze(1)) == pytest.approx(0.25, rel=1e-12)


def test_the_curve():
    problem = Sinc(101)
    assert sum(p.numel() for p in problem.model().parameters()) == 61
    assert problem.mse(lambda x: problem.exact(x).unsqueeze(1) + 0.5) == pytest.approx(0.25, rel=1e-12)
    (rows,) = problem.residuals(lambda x: problem.exact(x).unsqueeze(1) + 0.5, torch.arange(0, 100, 4))
    assert torch.allclose(rows, torch.full((25,), 0.1, dtype=torch.float64), rtol=1e-12)
    (whole,) = problem.residuals(lambda x: problem.exact(x).unsqueeze(1) + 0.5)
    assert float(whole.square().sum()) == pytest.approx(0.25, rel=1e-12)
