"""Natural gradient descent: closed forms, the metrics, lambda, the search, momentum."""

import math

import pytest
import torch

from secant.benchmarks.residual_problems import Poisson2d
from secant.curvature import GGN, Fisher
from secant.optim import LevenbergMarquardt, NaturalGradient
from secant.result import Status

EPS = torch.finfo(torch.float64).eps
PLAIN = {"adaptive": False, "line_search_fn": None}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeros(n):
    return torch.zeros(n, dtype=torch.float64, requires_grad=True)


class Logistic:
    """Three classes, 40 rows; labels are drawn, so that no line separates them."""

    def __init__(self):
        self.x, self.y = randn(40, 4), torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
        self.w = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)

    def closure(self):
        outputs = self.x @ self.w
        return outputs, torch.nn.functional.cross_entropy(outputs, self.y)


# One step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["parameters", "samples", "cg"])
@pytest.mark.parametrize(("n", "p"), [(20, 5), (5, 20), (1, 1)])
@pytest.mark.parametrize("lr", [1.0, 0.25])
def test_a_step_is_lr_times_the_solution(solver, n, p, lr):
    a, b = randn(n, p), randn(n, seed=1)
    x = zeros(p)
    optimizer = NaturalGradient([x], lr, 1, damping=0.5, solver=solver, **PLAIN)
    loss = optimizer.step(lambda: a @ x - b)
    assert float(loss) == pytest.approx(0.5 * float(b.square().sum()), rel=1e-14)
    matrix = a.T @ a + 0.5 * torch.eye(p, dtype=torch.float64)
    want = lr * torch.linalg.solve(matrix, a.T @ b)
    bound = 1e-3 if solver == "cg" else 100 * EPS
    assert float((x.detach() - want).norm()) <= bound * float(torch.linalg.cond(matrix)) * float(want.norm())


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("solver", ["parameters", "cg"])
def test_the_metric_of_a_likelihood(curvature, solver):
    problem = Logistic()
    before = problem.w.detach().clone()
    made = {"ggn": GGN, "fisher": Fisher}[curvature](problem.closure, [problem.w])
    matrix = made.to_dense() + 0.1 * torch.eye(12, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(problem.closure()[1], [problem.w])
    want = -torch.linalg.solve(matrix, gradient.reshape(-1))
    NaturalGradient([problem.w], 1.0, 1, curvature=curvature, damping=0.1, solver=solver, **PLAIN).step(problem.closure)
    bound = (1e-3 if solver == "cg" else 100 * EPS) * float(torch.linalg.cond(matrix))
    assert float(((problem.w.detach() - before).reshape(-1) - want).norm()) <= bound * float(want.norm())


def test_fisher_draws_labels_anew():
    """From the number of the iteration: two runs are equal, two iterations at one point are not."""
    ends = []
    for _ in range(2):
        problem = Logistic()
        optimizer = NaturalGradient([problem.w], 1.0, 1, curvature="fisher", damping=0.1, **PLAIN)
        for _ in range(2):
            with torch.no_grad():
                problem.w.zero_()
            optimizer.step(problem.closure)
            ends.append(problem.w.detach().clone())
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])
    assert not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_it_minimizes_a_likelihood(curvature):
    problem = Logistic()
    tolerance = 1e-9 if curvature == "ggn" else 1e-7  # what a metric of random labels leaves is rounding of the loss
    optimizer = NaturalGradient([problem.w], max_iter=200, curvature=curvature, tolerance_grad=tolerance)
    optimizer.step(problem.closure)
    assert optimizer.status is Status.CONVERGED
    (gradient,) = torch.autograd.grad(problem.closure()[1], [problem.w])
    assert float(gradient.abs().max()) <= tolerance


def test_maximizing_a_likelihood_is_minimizing_its_negative():
    down, up = Logistic(), Logistic()
    NaturalGradient([down.w], max_iter=4, curvature="ggn").step(down.closure)

    def negated():
        outputs, loss = up.closure()
        return outputs, -loss

    loss = NaturalGradient([up.w], max_iter=4, curvature="ggn", maximize=True).step(negated)
    assert float(loss) == pytest.approx(-math.log(3.0), rel=1e-12)
    assert torch.allclose(up.w, down.w, rtol=1e-12)


# lambda and t ---------------------------------------------------------------------------------------------------------


def test_lambda_follows_the_gain_ratio():
    a, b = randn(9, 3), randn(9, seed=1)
    x = zeros(3)
    optimizer = NaturalGradient([x], max_iter=1, damping=0.1)
    optimizer.step(lambda: a @ x - b)  # the model is exact: a gain ratio of 1
    assert optimizer.state[x]["lambda"] == pytest.approx(0.01, rel=1e-12)
    x = zeros(3)
    optimizer = NaturalGradient([x], max_iter=5, damping=0.1, adaptive=False)
    optimizer.step(lambda: a @ x - b)
    assert optimizer.state[x]["lambda"] == 0.1


def test_the_search_takes_the_best_of_its_grid():
    """r = arctan x from 10: the model's step is -101 arctan 10 = -148.6; only t <= 1/8 brings anything."""
    x = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)
    told = []
    optimizer = NaturalGradient([x], max_iter=1, damping=1e-12, adaptive=False, callback=told.append)
    optimizer.step(lambda: torch.arctan(x))
    # t = 1/8 leads to -8.6, for a tenth of what is promised; t = 1/16 to 0.71, for seven times as much.
    assert [(told[-1].step, told[-1].evaluations)] == [(1.0 / 16.0, 6)]
    assert float(x.detach()) == pytest.approx(
        10.0 - 101.0 * math.atan(10.0) / 16.0,
        rel=1e-6,  # lambda / J^2 = 1e-8 of the step
    )


def test_the_search_goes_back_to_what_was_better():
    """r(0) = 1, r'(0) = -1, r(1) = 0.8, r(1/2) = 0.95: t = 1 brings 0.36 of what is promised, t = 1/2 less."""
    x = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    told = []
    optimizer = NaturalGradient([x], max_iter=1, damping=1e-14, adaptive=False, callback=told.append)
    optimizer.step(lambda: 1.0 - x + 0.8 * x.square() + 2.0 * x.square() * (1.0 - x))
    assert [(told[-1].step, told[-1].evaluations)] == [(1.0, 4)]
    assert float(x.detach()) == pytest.approx(1.0, rel=1e-12)
    assert told[-1].value == pytest.approx(0.32, rel=1e-12)


def test_without_a_search_the_end_of_a_call_is_not_evaluated():
    a, b = randn(9, 3), randn(9, seed=1)
    x = zeros(3)
    optimizer = NaturalGradient([x], 0.5, 3, damping=0.1, **PLAIN)
    optimizer.step(lambda: a @ x - b)
    assert optimizer.state[x]["func_evals"] == 3
    assert optimizer.state[x]["n_iter"] == 3
    assert optimizer.status is Status.MAX_ITER


def test_points_drawn_anew_at_every_evaluation():
    """Nothing compares two evaluations, so that they may be of other points."""
    generator = torch.Generator().manual_seed(0)
    w = zeros(3)

    def closure():
        t = torch.rand(50, generator=generator, dtype=torch.float64)
        return (w[0] + w[1] * t + w[2] * t.square() - torch.exp(t)) / math.sqrt(50.0)

    optimizer = NaturalGradient([w], 1.0, 10, damping=1e-8, **PLAIN)
    optimizer.step(closure)
    t = torch.linspace(0, 1, 100, dtype=torch.float64)
    # The best parabola is within 0.0088 of exp, and a fit to 50 points of its own not much farther.
    found = w.detach()
    assert float((found[0] + found[1] * t + found[2] * t.square() - torch.exp(t)).abs().max()) < 0.03


# Momentum -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["parameters", "samples"])
def test_momentum_is_springs(solver):
    """phi = mu phi' + J^T (J J^T + lambda)^-1 (r - mu J phi'), theta <- theta - lr phi."""
    a, b = randn(4, 10), randn(4, seed=1)
    x, lam, mu, lr = zeros(10), 0.3, 0.9, 0.1
    optimizer = NaturalGradient([x], lr, 1, damping=lam, momentum=mu, solver=solver, **PLAIN)
    theta, phi = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    kernel = a @ a.T + lam * torch.eye(4, dtype=torch.float64)
    for _ in range(6):
        optimizer.step(lambda: a @ x - b)
        phi = mu * phi + a.T @ torch.linalg.solve(kernel, a @ theta - b - mu * (a @ phi))
        theta = theta - lr * phi
        assert torch.allclose(x.detach(), theta, rtol=1e-10, atol=1e-13)


# Where a run may go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_ends_at_the_rounding_floor(dtype):
    t = torch.linspace(0, 1, 20, dtype=dtype)
    x = torch.tensor([1.0, 0.5], dtype=dtype, requires_grad=True)
    optimizer = NaturalGradient([x], max_iter=200)
    optimizer.step(lambda: x[0] * torch.exp(x[1] * t) - 3.0 * torch.exp(-2.0 * t) - 0.1 * torch.sin(9.0 * t))
    state = optimizer.state[x]
    assert optimizer.status in (Status.STALLED, Status.CONVERGED)
    assert state["func_evals"] < 200
    assert 0.0 < state["lambda"] <= 1e-3


def test_a_trial_that_is_not_finite_is_refused():
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = NaturalGradient([x], max_iter=1, damping=1e-12, adaptive=False)
    optimizer.step(lambda: torch.stack([x + 1.0, 1e-3 * x.sqrt()]))  # the full step leads to -1
    assert 0.0 < float(x.detach()) < 1.0
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = NaturalGradient([x], max_iter=1, damping=1e-12, **PLAIN, callback=lambda iteration: None)
    optimizer.step(lambda: torch.stack([x + 1.0, 1e-3 * x.sqrt()]))
    assert float(x.detach()) == 1.0
    assert optimizer.status is Status.STALLED


def test_options_that_contradict_each_other_are_named():
    x = zeros(1)
    with pytest.raises(ValueError, match="NaturalGradient: maximize: expected False with residuals"):
        NaturalGradient([x], maximize=True)
    with pytest.raises(ValueError, match="NaturalGradient: solver: expected 'auto', 'parameters' or 'cg'"):
        NaturalGradient([x], curvature="ggn", solver="samples")


@pytest.mark.parametrize(("curvature", "kind"), [("residuals", "expected residuals"), ("ggn", "expected a pair")])
def test_a_closure_of_the_other_kind_is_named(curvature, kind):
    problem = Logistic()
    returned = problem.closure if curvature == "residuals" else lambda: problem.closure()[0]
    start = problem.w.detach().clone()
    with pytest.raises(ValueError, match=f"NaturalGradient.step: closure: {kind}"):
        NaturalGradient([problem.w], curvature=curvature).step(
            (lambda: returned()[1].detach()) if curvature == "residuals" else returned
        )
    assert torch.equal(problem.w, start)


# Beside Levenberg and Marquardt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [NaturalGradient, LevenbergMarquardt])
def test_a_differential_equation_is_solved(cls):
    """To 1e-2, where gradient descent needs tens of thousands of steps."""
    problem = Poisson2d(200, 60)
    model = problem.model(0)
    cls(model.parameters(), max_iter=60).step(lambda: problem.residuals(model))
    assert problem.error(model) < 1e-2
