"""Levenberg and Marquardt's method: closed forms, scipy's answers, and where a run may go wrong."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from secant.benchmarks.residual_problems import Poisson2d, Sinc
from secant.curvature import EvaluatedPoint
from secant.optim import LevenbergMarquardt
from secant.optim._bounds import Bounds
from secant.optim._normal_equations import NormalEquations
from secant.optim._region import Region, shrink
from secant.result import Status
from secant.solvers._robust import Robust

EPS, INF = torch.finfo(torch.float64).eps, math.inf
LOSSES = ["linear", "soft_l1", "huber", "cauchy"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(n, p, seed=0):
    return randn(n, p, seed=seed), randn(n, seed=seed + 1)


def parameter(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


class Exponentials:
    """y = x_0 exp(-x_1 t) + x_2 at 40 points, noise and some outliers."""

    def __init__(self, outliers=0):
        self.t = torch.linspace(0.0, 2.0, 40, dtype=torch.float64)
        self.y = 2.5 * torch.exp(-1.3 * self.t) + 0.5 + 0.02 * randn(40)
        self.y[: 7 * outliers : 7] += 2.0

    def residuals(self, x):
        return x[0] * torch.exp(-x[1] * self.t) + x[2] - self.y

    def scipy(self, x0, **options):
        """The answer, to the tolerance of its own gradient."""

        def jac(x):
            return torch.func.jacrev(self.residuals)(torch.tensor(x)).numpy()

        return least_squares(
            lambda x: self.residuals(torch.tensor(x)).numpy(), x0, jac, xtol=1e-15, ftol=1e-15, gtol=1e-13, **options
        )


# Closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(20, 5), (5, 20), (7, 7), (1, 1), (1, 4), (4, 1)])
def test_a_linear_problem_takes_one_iteration(n, p):
    """x - x* = lambda (J^T J + lambda)^-1 (x_0 - x*), that is lambda / sigma^2 at most relative to the start."""
    a, b = linear(n, p)
    x = torch.zeros(p, dtype=torch.float64, requires_grad=True)
    lam = 1e-12
    optimizer = LevenbergMarquardt([x], 1, damping=lam)
    optimizer.step(lambda: a @ x - b)
    want = torch.linalg.lstsq(a, b.unsqueeze(1), driver="gelsd").solution[:, 0]
    sigma = torch.linalg.svdvals(a)
    condition = float((sigma[0] / sigma[-1]) ** 2)
    bound = (lam * float(a.square().sum(0).max()) / float(sigma[-1] ** 2) + 100 * EPS * condition) * float(want.norm())
    assert float((x.detach() - want).norm()) <= bound


@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
@pytest.mark.parametrize(("n", "p"), [(30, 6), (6, 30)])
def test_the_space_does_not_matter(n, p, scaling):
    """Woodbury's identity: both solve (J^T J + lambda D) d = -J^T r, with errors of the condition of the matrix."""
    a, b = linear(n, p)
    a[:, 0] *= 30.0
    ends = []
    for solver in ("parameters", "samples", "cg"):
        if solver == "cg" and scaling == "marquardt":
            continue
        x = torch.zeros(p, dtype=torch.float64, requires_grad=True)
        LevenbergMarquardt([x], 1, damping=1e-2, scaling=scaling, solver=solver).step(lambda x=x: a @ x - b)
        ends.append(x.detach())
    eye = torch.eye(p, dtype=torch.float64)
    lam = 1e-2 * (eye * a.square().sum(0) if scaling == "marquardt" else eye * a.square().sum(0).max())
    want = torch.linalg.solve(a.T @ a + lam, a.T @ b)
    for x in ends[:2]:
        assert float((x - want).norm()) <= 1e4 * EPS * float(want.norm())
    for x in ends[2:]:  # to a residual of 1e-3
        assert float((x - want).norm()) <= 1e-3 * float(torch.linalg.cond(a.T @ a + lam)) * float(want.norm())


def test_marquardts_scaling_does_not_depend_on_the_units():
    problem = Exponentials()
    units = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)
    plain, scaled = parameter(1.0, 1.0, 0.0), parameter(1e3, 1.0, 0.0)
    LevenbergMarquardt([plain], 4, scaling="marquardt").step(lambda: problem.residuals(plain))
    LevenbergMarquardt([scaled], 4, scaling="marquardt").step(lambda: problem.residuals(scaled * units))
    assert torch.allclose(scaled.detach() * units, plain.detach(), rtol=1e-9)


def test_d_is_the_largest_that_the_diagonal_has_been():
    problem = Exponentials()
    x = parameter(1.0, 1.0, 0.0)
    optimizer = LevenbergMarquardt([x], 1, scaling="marquardt")
    largest = torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        j = torch.func.jacrev(problem.residuals)(x.detach())
        largest = torch.maximum(largest, j.square().sum(0))
        optimizer.step(lambda: problem.residuals(x))
        assert torch.allclose(optimizer.state[x]["diagonal"], largest, rtol=1e-12)


def test_the_acceleration_is_the_second_derivative_along_the_step():
    """Of r quadratic in x the difference quotient is exact: a = -(J^T J + lambda)^-1 J^T d.r''.d."""
    a, b = linear(12, 3)
    c = randn(12, 3, 3, seed=5)
    c = c + c.mT
    scale = 0.05

    def residuals(x):
        return a @ x - b + 0.5 * scale * torch.einsum("nij,i,j->n", c, x, x)

    x = parameter(0.1, -0.2, 0.3)
    start = x.detach().clone()
    lam = 0.3 * float(torch.func.jacrev(residuals)(start).square().sum(0).max())
    optimizer = LevenbergMarquardt([x], 1, damping=0.3)
    optimizer.step(lambda: residuals(x))
    j, r = torch.func.jacrev(residuals)(start), residuals(start)
    matrix = j.T @ j + lam * torch.eye(3, dtype=torch.float64)
    d = -torch.linalg.solve(matrix, j.T @ r)
    bend = -torch.linalg.solve(matrix, j.T @ (scale * torch.einsum("nij,i,j->n", c, d, d)))
    assert float(bend.norm()) > 1e-3 * float(d.norm())
    # The second difference divides rounding by h^2 = 1e-2.
    assert torch.allclose(x.detach() - start, d + 0.5 * bend, rtol=0.0, atol=1e4 * EPS)
    straight = start.clone().requires_grad_()
    LevenbergMarquardt([straight], 1, damping=0.3, geodesic=False).step(lambda: residuals(straight))
    assert torch.allclose(straight.detach() - start, d, rtol=0.0, atol=100 * EPS)


def test_lambda_follows_the_gain_ratio():
    a, b = linear(9, 3)
    x = parameter(0.0, 0.0, 0.0)
    optimizer = LevenbergMarquardt([x], 1, damping=1e-2)
    size = float(a.square().sum(0).max())
    optimizer.step(lambda: a @ x - b)  # the model is exact: a ratio of 1
    assert optimizer.state[x]["lambda"] == pytest.approx(1e-2 * size * 0.1, rel=1e-12)
    # A wall behind which everything is worse: r = x there too, but ten times steeper.
    y = parameter(1.0)
    optimizer = LevenbergMarquardt([y], 1, damping=1e-6, geodesic=False)
    optimizer.step(lambda: torch.where(y < 0.9, 10.0 * (1.9 - y), y))
    assert float(y.detach()) >= 0.9
    assert optimizer.state[y]["lambda"] > 1e-6
    assert optimizer.status is Status.MAX_ITER


def test_several_residuals_of_any_shape_are_one():
    problem = Exponentials()
    one, several = parameter(1.0, 1.0, 0.0), parameter(1.0, 1.0, 0.0)
    LevenbergMarquardt([one], 5).step(lambda: problem.residuals(one))

    def parts():
        r = problem.residuals(several)
        return r[:10].reshape(2, 5), r[10:11].squeeze(), r[11:].reshape(29, 1)

    LevenbergMarquardt([several], 5).step(parts)
    assert torch.allclose(one.detach(), several.detach(), rtol=1e-12)


# Robust losses and bounds, as scipy has them --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_robust_loss_is_scipys(name):
    problem = Exponentials(outliers=5)
    x = parameter(1.0, 1.0, 0.0)
    optimizer = LevenbergMarquardt([x], 200, loss=name, f_scale=0.1, tolerance_grad=1e-11)
    before = optimizer.step(lambda: problem.residuals(x))
    want = problem.scipy([1.0, 1.0, 0.0], loss=name, f_scale=0.1)
    start = problem.scipy([1.0, 1.0, 0.0], loss=name, f_scale=0.1, max_nfev=1)
    assert float(before) == pytest.approx(start.cost, rel=1e-12)
    assert optimizer.status is Status.CONVERGED
    # Both have a gradient of 1e-11 or so, times the inverse of the smallest curvature.
    assert np.allclose(x.detach().numpy(), want.x, rtol=0.0, atol=1e-7)
    again = LevenbergMarquardt([x], 1, loss=name, f_scale=0.1).step(lambda: problem.residuals(x))
    assert float(again) == pytest.approx(want.cost, rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_a_robust_loss_has_its_derivatives(name):
    """The gradient is that of autograd, the decrease the difference of the values, the weights what Triggs has."""
    robust = Robust(name, 0.7)
    r = torch.linspace(-3.0, 3.0, 40, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(robust.value(r), r, create_graph=True)
    right, weights = robust.linearized(r.detach())
    weights = torch.ones_like(right) if weights is None else weights
    assert torch.allclose(right * weights, gradient.detach(), rtol=1e-12, atol=1e-15)
    if name != "linear":
        (curvature,) = torch.autograd.grad(gradient.sum(), r)
        assert torch.allclose(weights.square(), curvature.clamp_min(EPS), rtol=1e-10, atol=1e-12)
    for other in (r.detach().flip(0), r.detach() + 1e-9, 2.0 * r.detach().roll(3)):
        difference = float(robust.value(r.detach()) - robust.value(other))
        assert float(robust.decrease(r.detach(), other)) == pytest.approx(difference, abs=1e-12)
    tiny = r.detach() * (1.0 + 1e-12)  # a difference of 1e-12, found to 3 digits where values have none
    want = float((gradient.detach() * (r.detach() - tiny)).sum())
    assert float(robust.decrease(r.detach(), tiny)) == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("form", ["numbers", "flat", "tensors"])
@pytest.mark.parametrize("solver", ["parameters", "samples"])
@pytest.mark.parametrize(
    ("lower", "upper"),
    [([-9.0, -9.0, 0.7], [9.0, 9.0, 9.0]), ([-9.0, 0.5, -9.0], [2.0, 1.0, 0.4]), ([-9.0, -9.0, -9.0], [9.0, 9.0, 9.0])],
)
def test_a_bounded_minimum_is_scipys(lower, upper, form, solver):
    problem = Exponentials()
    if form == "numbers":
        lower, upper = [0.45] * 3, [1.5] * 3
    x0 = [min(max(v, a), b) for v, a, b in zip([1.0, 0.8, 0.8], lower, upper, strict=True)]
    x0 = [0.5 * (a + b) if v in (a, b) else v for v, a, b in zip(x0, lower, upper, strict=True)]
    want = problem.scipy(x0, bounds=(lower, upper))
    params = [parameter(v) for v in x0]
    low, high = torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64)
    bounds = {
        "numbers": (0.45, 1.5),
        "flat": (low, high),
        "tensors": (list(low.split(1)), tuple(high.split(1))),
    }[form]
    seen = []

    def closure():
        x = torch.cat(params)
        seen.append(x.detach().clone())
        return problem.residuals(x)

    # In the space of the 40 residuals the part of r that no parameter reaches is divided by lambda, and cancels.
    tolerance = 1e-10 if solver == "parameters" else 1e-7
    optimizer = LevenbergMarquardt(params, 200, bounds=bounds, tolerance_grad=tolerance, solver=solver)
    optimizer.step(closure)
    assert optimizer.status is Status.CONVERGED
    assert np.allclose(torch.cat(params).detach().numpy(), want.x, rtol=0.0, atol=2e-6)  # scipy stays inside
    assert all(bool(((x >= low) & (x <= high)).all()) for x in seen)


def test_bounds_of_groups_and_a_frozen_parameter():
    a, b = linear(12, 4)
    x, y, z = parameter(0.0), parameter(0.0, 0.0), parameter(0.0)
    groups = [{"params": [x], "bounds": (-math.inf, 0.01)}, {"params": [z]}, {"params": [y], "bounds": (0.0, 0.02)}]
    optimizer = LevenbergMarquardt(groups, 30, tolerance_grad=1e-12)
    z.requires_grad_(False)
    optimizer.step(lambda: a @ torch.cat([x, y, z]) - b)
    assert optimizer.status is Status.CONVERGED
    want = least_squares(
        lambda v: a[:, :3].numpy() @ v - b.numpy(),
        [0.0, 0.01, 0.01],
        bounds=([-np.inf, 0.0, 0.0], [0.01, 0.02, 0.02]),
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    assert np.allclose(torch.cat([x, y]).detach().numpy(), want.x, rtol=0.0, atol=1e-7)
    assert float(z.detach()) == 0.0


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0.0,), "bounds: expected None or a pair"),
        ((0.0, "1"), "bounds: expected None or a pair"),
        ((math.nan, 1.0), "bounds: expected None or a pair"),
        ((1.0, 1.0), "bounds: expected lower < upper everywhere"),
        ((torch.zeros(2), 1.0), r"bounds: lower: expected shape \(3,\)"),
        ((0.0, [torch.ones(2)]), r"bounds: upper\[0\]: expected shape \(3,\)"),
        ((0.0, [torch.ones(3), torch.ones(3)]), "bounds: upper: expected 1 tensors"),
    ],
)
def test_bounds_that_are_none_are_named(bounds, message):
    with pytest.raises(ValueError, match=f"LevenbergMarquardt: {message}"):
        LevenbergMarquardt([parameter(0.0, 0.0, 0.0)], bounds=bounds)


def test_parameters_beyond_the_bounds_are_refused():
    x = parameter(2.0)
    optimizer = LevenbergMarquardt([x], bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"LevenbergMarquardt\.step: params: expected values within the bounds"):
        optimizer.step(lambda: x)
    assert float(x.detach()) == 2.0


def test_a_projected_gradient_is_zero_where_a_bound_holds():
    box = Bounds(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
    x, g = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([3.0, -3.0, 1e-9])
    assert box.projected(x, g).tolist() == [0.0, 0.0, pytest.approx(1e-9)]
    assert box.projected(x, -g).tolist() == [-1.0, 1.0, pytest.approx(-1e-9)]
    assert box.free(x, g).tolist() == [False, False, True]


# The strategy "radius" ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "rank"), [(20, 6, 6), (6, 20, 6), (20, 6, 3), (1, 1, 1)])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_lambda_of_a_radius(n, p, rank, scaled):
    a, u = randn(n, rank) @ randn(rank, p, seed=1), randn(n, seed=2)
    scale = randn(p, seed=3).exp() if scaled else None
    d = torch.ones(p, dtype=torch.float64) if scale is None else scale
    region = Region(a, scale)
    for lam in (1e-8, 1.0, 100.0):
        x = region.solve(u, lam)
        residual = a.T @ (a @ x - u) + lam * d * x
        assert residual.abs().max() <= 1e3 * EPS * float((a.T @ u).abs().max()) * n
    shortest = region.solve(u, 0.0)
    whole = float((d * shortest * shortest).sum().sqrt())
    want = torch.linalg.lstsq(a / d.sqrt(), u[:, None], driver="gelsd", rcond=1e-12).solution[:, 0] / d.sqrt()
    assert torch.allclose(shortest, want, rtol=0.0, atol=1e-10 * float(want.abs().max()))
    assert region.damping(u, whole) == region.damping(u, whole / 1.09) == 0.0
    for part in (0.5, 1e-2, 1e-6):
        lam = region.damping(u, part * whole)
        size = float((d * region.solve(u, lam).square()).sum().sqrt())
        assert lam > 0.0
        assert abs(size - part * whole) <= 0.1 * part * whole


def test_components_that_are_not_free_are_zero():
    a, u, free = randn(8, 4), randn(8, seed=1), torch.tensor([True, False, True, False])
    x = Region(a, None, free).solve(u, 0.3)
    part = a[:, free]
    want = torch.linalg.solve(part.T @ part + 0.3 * torch.eye(2, dtype=torch.float64), part.T @ u)
    assert torch.allclose(x[free], want, rtol=1e-12)
    assert not x[~free].any()


def test_a_poor_step_is_shortened_to_the_minimum_of_the_parabola():
    # f(t) = 1 - 3 t + 5 t^2: f(1) = 3, the decrease is -2, the minimum at .3.
    assert shrink(-2.0, -3.0) == pytest.approx(0.3)
    assert shrink(0.1, -3.0) == 0.5
    assert shrink(-1e9, -3.0) == shrink(-math.inf, -3.0) == 0.1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
@pytest.mark.parametrize("bounds", [None, ([-INF, 0.0, -INF], [2.0, 1.0, INF])])
def test_within_a_radius_it_finds_what_scipy_finds(loss, scaling, bounds):
    problem, x = Exponentials(outliers=3), parameter(1.0, 0.5, 0.0)
    more = {} if bounds is None else {"bounds": bounds}
    want = problem.scipy([1.0, 0.5, 0.0], loss=loss, f_scale=0.1, **more)
    if bounds is not None:
        more = {"bounds": tuple(torch.tensor(b, dtype=torch.float64) for b in bounds)}
    optimizer = LevenbergMarquardt(
        [x], 60, strategy="radius", geodesic=False, scaling=scaling, loss=loss, f_scale=0.1, tolerance_grad=1e-9, **more
    )
    optimizer.step(lambda: problem.residuals(x))
    assert optimizer.status is Status.CONVERGED
    # |g| <= 1e-9, and the least eigenvalue of the curvature is above 1e-2.
    assert np.abs(x.detach().numpy() - want.x).max() <= 1e-6


def test_an_iteration_evaluates_each_point_once_and_units_do_not_matter():
    """With D of Marquardt a power of two as a unit changes no digit of a residual."""
    paths = []
    for unit in (1.0, 2.0**20):
        x, seen = parameter(-1.2 * unit, 1.0), []

        def residuals(x=x, seen=seen, unit=unit):
            seen.append((x.detach() * torch.tensor([1.0 / unit, 1.0], dtype=torch.float64)).tolist())
            a = x[0] / unit
            return torch.stack([10.0 * (x[1] - a * a), 1.0 - a])

        optimizer = LevenbergMarquardt(
            [x], 60, strategy="radius", geodesic=False, scaling="marquardt", tolerance_grad=1e-12
        )
        optimizer.step(residuals)
        assert optimizer.status is Status.CONVERGED
        assert len(seen) == len({tuple(point) for point in seen})
        assert optimizer.state_dict()["state"][0]["radius"] > 0.0
        paths.append(seen)
    assert len(paths[0]) == len(paths[1])
    assert torch.allclose(*map(torch.tensor, paths), rtol=1e-9, atol=1e-9)


def test_a_radius_needs_the_jacobian(monkeypatch):
    x = parameter(1.0, 1.0)
    optimizer = LevenbergMarquardt([x], strategy="radius", solver="cg")
    monkeypatch.setattr("secant.optim._normal_equations._ENTRIES", 0)
    with pytest.raises(ValueError, match=r"LevenbergMarquardt\.step: strategy: expected 'lambda', got 'radius'"):
        optimizer.step(lambda: x * x)
    assert x.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_within_a_radius_it_ends_at_the_rounding_floor(dtype):
    t = torch.linspace(0.0, 1.0, 30, dtype=dtype)
    x, calls = parameter(1.0, 1.0, dtype=dtype), []
    optimizer = LevenbergMarquardt([x], 200, strategy="radius", geodesic=False)
    optimizer.step(lambda: calls.append(1) or x[0] * torch.exp(-x[1] * t) - 1.0 / (1.0 + t))
    assert optimizer.status in (Status.STALLED, Status.SMALL_CHANGE)
    assert len(calls) <= 40
    assert math.isfinite(optimizer.state_dict()["state"][0]["radius"])


# Where a run may go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(20, 6), (6, 20)])
def test_a_jacobian_of_less_than_full_rank(n, p):
    a, b = randn(n, 2) @ randn(2, p, seed=1), randn(n, seed=2)
    x = torch.zeros(p, dtype=torch.float64, requires_grad=True)
    optimizer = LevenbergMarquardt([x], 30, tolerance_grad=1e-9)
    optimizer.step(lambda: a @ x - b)
    assert optimizer.status is Status.CONVERGED
    want = torch.linalg.lstsq(a, b.unsqueeze(1), driver="gelsd").solution[:, 0]  # of all the shortest, as from zero
    assert torch.allclose(x.detach(), want, rtol=0.0, atol=1e-8 * float(want.norm()))


def test_flat_directions_and_unused_parameters_stay():
    for scaling in ("identity", "marquardt"):
        x, unused = parameter(1.0, 2.0, 3.0), parameter(5.0)
        optimizer = LevenbergMarquardt([x, unused], 30, scaling=scaling, tolerance_grad=1e-12)
        optimizer.step(lambda x=x: torch.stack([x[0] * x[0] - 4.0, x[1] - 1.0]))
        assert optimizer.status is Status.CONVERGED
        assert torch.allclose(x.detach(), torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64), rtol=1e-12)
        assert float(unused.detach()) == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
def test_it_ends_at_the_rounding_floor(dtype, scaling):
    """Run on and on it stops with a status, after few evaluations, and lambda is what it was."""
    problem = Poisson2d(60, 20, dtype=dtype)
    model = problem.model(0, dtype)
    optimizer = LevenbergMarquardt(model.parameters(), 400 if dtype is torch.float32 else 20, scaling=scaling)
    lams, evaluations = [], []

    def told(iteration):
        if iteration.n > 0:
            lams.append(optimizer.state[next(model.parameters())]["lambda"])
        evaluations.append(iteration.evaluations)

    optimizer.callback = told
    optimizer.step(lambda: problem.residuals(model))
    state = optimizer.state[next(model.parameters())]
    if dtype is torch.float32:
        assert optimizer.status is Status.STALLED
        for _ in range(3):
            before = state["func_evals"]
            optimizer.step(lambda: problem.residuals(model))
            assert optimizer.status in (Status.STALLED, Status.MAX_ITER)
            assert optimizer.status is not Status.STALLED or state["func_evals"] - before < 100
    assert max(lams) < 1e6 * lams[0]
    assert 0.0 < state["lambda"] <= max(lams)


def test_a_perfect_fit_ends():
    for dtype in (torch.float32, torch.float64):
        t = torch.linspace(0, 1, 20, dtype=dtype)
        x = parameter(1.0, 0.5, dtype=dtype)
        optimizer = LevenbergMarquardt([x], 100)
        optimizer.step(lambda t=t, x=x: x[0] * torch.exp(x[1] * t) - 3.0 * torch.exp(-2.0 * t))
        assert optimizer.status in (Status.STALLED, Status.CONVERGED)
        eps = torch.finfo(dtype).eps
        assert torch.allclose(x.detach().double(), torch.tensor([3.0, -2.0]).double(), rtol=0.0, atol=100 * eps)


def test_residuals_or_a_jacobian_that_is_not_finite():
    """sqrt has no derivative at 0, where the full step leads, and is NaN beyond."""
    for target in (0.0, -1.0):
        x = parameter(1.0)
        optimizer = LevenbergMarquardt([x], 10, damping=1e-12, geodesic=False)

        def closure(x=x, target=target):
            return torch.stack([x - target, 1e-3 * x.clamp_max(0.0) + 1e-6 * x.sqrt()])

        optimizer.step(lambda x=x: closure(x)[..., 0])
        assert torch.isfinite(x).all()
        assert 0.0 < float(x.detach()) < 1.0
    x = parameter(0.0)
    optimizer = LevenbergMarquardt([x])
    optimizer.step(lambda: x.sqrt() + 1.0)  # a Jacobian that is infinite at the start
    assert optimizer.status is Status.NOT_FINITE
    assert float(x.detach()) == 0.0


def test_a_trial_that_raises():
    def closure(x):
        if float(x.detach()) < 0.5:
            raise torch.linalg.LinAlgError("singular")
        return x * torch.ones(2, dtype=torch.float64)

    x = parameter(1.0)
    with pytest.raises(torch.linalg.LinAlgError):
        LevenbergMarquardt([x]).step(lambda: closure(x))
    assert float(x.detach()) == 1.0
    LevenbergMarquardt([x], 5, on_error="backtrack").step(lambda: closure(x))
    assert 0.5 <= float(x.detach()) < 0.75


def test_max_eval_is_never_exceeded():
    problem = Exponentials()
    for most in range(1, 8):
        x = parameter(1.0, 1.0, 0.0)
        optimizer = LevenbergMarquardt([x], 100, max_eval=most)
        optimizer.step(lambda x=x: problem.residuals(x))
        assert optimizer.state[x]["func_evals"] <= most
        assert optimizer.status is Status.MAX_EVAL


def test_there_is_no_lr():
    x = parameter(1.0)
    with pytest.raises(ValueError, match="LevenbergMarquardt: lr: expected none"):
        LevenbergMarquardt([{"params": [x], "lr": 0.1}])
    with pytest.raises(TypeError, match="LevenbergMarquardt: lr: expected one of the options"):
        LevenbergMarquardt([x], lr=0.1)


def test_marquardts_scaling_needs_the_diagonal():
    a, b = linear(5, 3)
    x = parameter(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="scaling: expected 'identity', got 'marquardt', with solver 'cg'"):
        LevenbergMarquardt([x], scaling="marquardt", solver="cg").step(lambda: a @ x - b)


# Equations ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["parameters", "samples", "cg"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_equations_are_solved(space, weighted, masked):
    a, u = linear(11, 7)
    x = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(11, generator=torch.Generator().manual_seed(3), dtype=torch.float64) if weighted else None
    free = torch.tensor([True, False, True, True, False, True, True]) if masked else None
    scale = torch.linspace(1.0, 2.0, 7, dtype=torch.float64)
    equations = NormalEquations(EvaluatedPoint(lambda: a @ x, [x], "residuals").jacobian(), (11, 7), weights, space)
    assert equations.damp(0.1, scale, free)
    wa = a if weights is None else weights.unsqueeze(1) * a
    keep = torch.arange(7) if free is None else free.nonzero()[:, 0]
    part = wa[:, keep]
    want = torch.zeros(7, dtype=torch.float64)
    want[keep] = torch.linalg.solve(part.T @ part + 0.1 * torch.diag(scale[keep]), part.T @ u)
    got = equations.solve(u).x
    if space == "cg":
        assert float((equations.pull(equations.push(got)) + 0.1 * scale * got - wa.T @ u)[keep].norm()) < 2e-3 * float(
            (wa.T @ u)[keep].norm()
        )
        assert torch.equal(got == 0.0, want == 0.0)
    else:
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-14)
    assert torch.allclose(equations.push(got), wa @ got, rtol=1e-12, atol=1e-14)
    assert torch.allclose(equations.diagonal(), wa.square().sum(0), rtol=1e-12)


# Mini-batches ---------------------------------------------------------------------------------------------------------


def test_mini_batches_fit_a_curve():
    """A curve of 61 parameters, 1,000 of 20,000 points at a time: plain gradient methods are at 1e-2 after as much."""
    problem = Sinc()
    model = problem.model(0)
    optimizer = LevenbergMarquardt(model.parameters(), 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for rows in torch.randperm(20_000, generator=generator).split(1_000):
            optimizer.step(lambda rows=rows: problem.residuals(model, rows))
    assert problem.mse(model) < 1e-3


def test_all_evaluations_of_a_step_are_of_one_batch():
    a, b = linear(40, 3)
    x = parameter(0.0, 0.0, 0.0)
    optimizer = LevenbergMarquardt([x], 1)
    lams = []
    for rows in torch.arange(40).split(10):
        optimizer.step(lambda rows=rows: a[rows] @ x - b[rows])
        lams.append(optimizer.state[x]["lambda"])
    assert lams == [pytest.approx(lams[0] * 0.1**k) for k in range(4)]  # linear: a gain ratio of 1 on each batch


@pytest.mark.parametrize("strategy", ["lambda", "radius"])
def test_correlated_columns_within_bounds(strategy):
    """Several components go beyond at once: clipped together they would climb, one by one they do not."""
    lsq_linear = pytest.importorskip("scipy.optimize").lsq_linear
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        a, b = a + 3.0 * a[:, :1], 3.0 * torch.randn(6, generator=generator, dtype=torch.float64)
        low, high = (-torch.rand(4, generator=generator).double(), torch.rand(4, generator=generator).double())
        x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        LevenbergMarquardt([x], 200, bounds=(low, high), strategy=strategy).step(lambda a=a, x=x, b=b: a @ x - b)
        found = x.detach()
        assert ((low <= found) & (found <= high)).all()
        best = lsq_linear(a.numpy(), b.numpy(), (low.numpy(), high.numpy()), tol=1e-12).cost
        assert 0.5 * float((a @ found - b).square().sum()) <= best * (1 + 1e-6)


def test_a_trial_without_a_finite_jacobian_shortens_the_radius():
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    count = 0

    def closure():
        nonlocal count
        count += 1
        assert count < 100
        return x.sqrt()

    LevenbergMarquardt([x], 5, bounds=(0.0, math.inf), strategy="radius", geodesic=False).step(closure)
    assert 0.0 < float(x.detach()) < 1.0
