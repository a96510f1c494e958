"""`secant.minimize` and `secant.least_squares`: against scipy's, and what goes in, comes out, stops and fails."""

import importlib
import math
import subprocess
import sys
import types

import pytest
import torch

import secant
from secant import Status, least_squares, minimize
from secant._functions import Objective, Residuals, start
from secant.benchmarks import hock_schittkowski, mgh

# The module; its name in the package is the function's.
METHODS = importlib.import_module("secant.minimize").METHODS


EVERY = list(METHODS)
OF_GRADIENTS = [name for name, m in METHODS.items() if m.closure == "gradient"]
OF_GRAPHS = [name for name, m in METHODS.items() if m.closure == "loss"]


def rosenbrock(x):
    """Sum over pairs: one minimum, at ones."""
    return ((1 - x[0::2]) ** 2 + 100 * (x[1::2] - x[0::2] ** 2) ** 2).sum()


def rosenbrock_gradient(x):
    """Its gradient for arrays and tensors alike."""
    g = 0.0 * x
    g[0::2] = -2 * (1 - x[0::2]) - 400 * x[0::2] * (x[1::2] - x[0::2] ** 2)
    g[1::2] = 200 * (x[1::2] - x[0::2] ** 2)
    return g


def x0(n=4, dtype=torch.float64):
    return torch.tensor([-1.2, 1.0] * (n // 2), dtype=dtype)


# The names -----------------------------------------------------------------------------------------------------------


def test_the_name_is_the_function():
    code = "from secant import minimize; import secant, secant.minimize as m; print(callable(minimize), callable(m))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "True"]
    assert isinstance(secant.minimize, types.FunctionType)
    assert isinstance(secant.least_squares, types.FunctionType)


# Whole runs -----------------------------------------------------------------------------------------------------------


def of_scipy(value, start, **more):
    optimize = pytest.importorskip("scipy.optimize")

    def both(x):
        x = torch.from_numpy(x.copy()).requires_grad_()
        f = value(x)
        (g,) = torch.autograd.grad(f, x)
        return f.item(), g.numpy()

    return optimize.minimize(both, start.numpy(), jac=True, method="L-BFGS-B", **more)


def is_solved(problem, value, gradient):
    """f is that of a known minimum to 1e-5, or the gradient is small beside f."""
    largest = max(abs(g) for g in gradient.tolist())
    return problem.excess(value) <= 1e-5 or largest <= 1e-5 * max(1.0, abs(value))


@pytest.mark.parametrize("name", OF_GRADIENTS[:2])
def test_what_scipy_solves_of_the_35_problems_in_as_few_evaluations(name):
    solved = ours = theirs = 0
    for problem in mgh.PROBLEMS:
        found = minimize(problem.value, problem.start, method=name)
        other = of_scipy(problem.value, problem.start)
        if is_solved(problem, other.fun, other.jac):
            solved += 1
            ours, theirs = ours + found.nfev, theirs + other.nfev
            assert is_solved(problem, found.fun, found.jac), problem.name
    assert solved >= 25
    assert ours <= theirs


@pytest.mark.parametrize("name", EVERY[2:])
def test_what_scipy_solves_is_solved(name):
    for problem in mgh.PROBLEMS:
        other = of_scipy(problem.value, problem.start)
        if is_solved(problem, other.fun, other.jac):
            found = minimize(problem.value, problem.start, method=name)
            assert is_solved(problem, found.fun, found.jac), problem.name


def test_trust_exact_in_as_few_evaluations_as_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    ours = theirs = 0
    for problem in mgh.PROBLEMS:
        hess = lambda x, p=problem: torch.autograd.functional.hessian(p.value, torch.as_tensor(x))  # noqa: E731
        grad = lambda x, p=problem: torch.autograd.functional.jacobian(p.value, torch.as_tensor(x))  # noqa: E731
        found = minimize(problem.value, problem.start, method="trust-exact", jac=grad, hess=hess)
        other = optimize.minimize(
            lambda x, p=problem: float(p.value(torch.from_numpy(x))), problem.start.numpy(), method="trust-exact",
            jac=lambda x, f=grad: f(x).numpy(), hess=lambda x, f=hess: f(x).numpy(), options={"gtol": 1e-5},
        )  # fmt: skip
        if is_solved(problem, other.fun, other.jac):
            assert is_solved(problem, found.fun, found.jac), problem.name
            ours, theirs = ours + found.nfev, theirs + other.nfev
    assert ours <= theirs


@pytest.mark.parametrize("name", EVERY)
def test_a_quadratic(name):
    a = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found = minimize(lambda x: 0.5 * x @ a @ x - b @ x, torch.zeros(3, dtype=torch.float64), method=name, tol=1e-9)
    assert found.success
    # |A x - b| <= 1e-9 up to ftol, whose change of f is at most 1e-9: |x - x*|^2 <= 2e-9 / lambda_min of .6.
    assert (found.x - torch.linalg.solve(a, b)).abs().max() <= 1e-4
    assert torch.allclose(found.jac, a @ found.x - b, rtol=0, atol=1e-13)
    assert found.fun == pytest.approx(float(0.5 * found.x @ a @ found.x - b @ found.x), rel=1e-14)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rosenbrock_of_any_shape_and_dtype(name, dtype):
    start = x0(6, dtype).view(2, 3)
    kept = start.clone()
    found = minimize(lambda x: rosenbrock(x.reshape(-1)), start, method=name, options={"maxiter": 500})
    assert found.x.shape == found.jac.shape == (2, 3)
    assert found.x.dtype is found.jac.dtype is dtype
    assert not found.x.requires_grad
    assert torch.equal(start, kept)
    # Curvature along the valley is about .4, and f ends below 1e-7 (float32: below 1e-4): |dx|^2 = 2 f / .4.
    assert (found.x - 1).abs().max() <= (5e-2 if dtype is torch.float32 else 1e-3)


def test_bounded_problems_as_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    ours = theirs = 0
    for problem in hock_schittkowski.PROBLEMS:
        bounds = optimize.Bounds(problem.lower.numpy(), problem.upper.numpy())
        seen = []

        def value(x, problem=problem, seen=seen):
            seen.append(x.detach().clone())
            return problem.value(x)

        found = minimize(value, problem.start, bounds=bounds)
        other = of_scipy(problem.value, problem.start, bounds=bounds)
        assert found.success, problem.name
        assert found.fun <= other.fun + 1e-5 * max(1.0, abs(other.fun)), problem.name
        assert all(((x >= problem.lower) & (x <= problem.upper)).all() for x in seen)
        assert found.nfev == len(seen)
        ours, theirs = ours + found.nfev, theirs + other.nfev
    assert ours <= theirs


# What goes in and comes out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_arrays_and_lists_come_back_as_arrays(name):
    np = pytest.importorskip("numpy")
    for given, dtype in (([-1, 1], np.float64), (np.array([-1.0, 1.0], dtype=np.float32), np.float32)):
        found = minimize(rosenbrock, given, method=name)  # by autograd: fun gets a tensor
        assert isinstance(found.x, np.ndarray)
        assert found.x.dtype == found.jac.dtype == dtype
        assert found.x.shape == (2,)
        assert isinstance(found.fun, float)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_functions_of_arrays_with_their_gradient(name, together):
    np = pytest.importorskip("numpy")
    start, types = np.array([-1.2, 1.0, 0.5, 0.5]), set()

    def fun(x):
        types.add(type(x))
        x_, x[:] = x.copy(), np.nan  # an array of its own
        return (rosenbrock(x_), rosenbrock_gradient(x_)) if together else rosenbrock(x_)

    found = minimize(fun, start, method=name, jac=True if together else rosenbrock_gradient)
    assert types == {np.ndarray}
    assert start.tolist() == [-1.2, 1.0, 0.5, 0.5]
    assert np.abs(found.x - 1).max() < 1e-3
    assert np.allclose(found.jac, rosenbrock_gradient(found.x), rtol=0, atol=0)
    reference = minimize(rosenbrock, torch.from_numpy(start), method=name)
    assert found.nfev == found.njev == reference.nfev
    assert np.allclose(found.x, reference.x.numpy(), rtol=0, atol=1e-6)


def test_tensors_with_a_gradient_of_their_own():
    seen = []

    def jac(x):
        seen.append(x)
        return rosenbrock_gradient(x)

    found = minimize(rosenbrock, x0(), jac=jac)
    assert all(isinstance(x, torch.Tensor) and not x.requires_grad for x in seen)
    assert found.njev == len(seen)
    assert (found.x - minimize(rosenbrock, x0()).x).abs().max() < 1e-6


def test_more_arguments():
    fun = lambda x, a, b: (a * (x - b) ** 2).sum()  # noqa: E731
    found = minimize(fun, torch.zeros(2, dtype=torch.float64), (2.0, 3.0))
    assert (found.x - 3).abs().max() < 1e-5
    found = minimize(lambda x, a: ((x - a) ** 2).sum(), torch.zeros(2, dtype=torch.float64), 5.0)
    assert (found.x - 5).abs().max() < 1e-5
    pair = minimize(lambda x, a: ((x - a) ** 2).sum(), [0.0], (1.5,), jac=lambda x, a: 2 * (x - a))
    assert pair.x[0] == pytest.approx(1.5, abs=1e-5)


def test_what_a_result_is():
    found = minimize(rosenbrock, x0(), method="L-BFGS-B")
    assert {*found} == {"x", "fun", "jac", "nit", "nfev", "njev", "nhev", "status", "message", "success"}
    assert found["x"] is found.x
    assert found.status == found["status"]
    assert found.success is found.status.ok
    assert found.message == found.status.message
    assert "nfev: " in repr(found)
    assert "nfev" in dir(found)
    with pytest.raises(AttributeError, match="y"):
        found.y  # noqa: B018
    found.y = 3
    assert found["y"] == 3


@pytest.mark.parametrize(
    ("spelling", "same"), [("L-BFGS-B", "l-bfgs-b"), ("L-BFGS", "l-bfgs"), (None, "l-bfgs"), ("l-Bfgs", "l-bfgs")]
)
def test_spellings(spelling, same):
    a, b = minimize(rosenbrock, x0(), method=spelling), minimize(rosenbrock, x0(), method=same)
    assert torch.equal(a.x, b.x)
    assert a.nfev == b.nfev


def test_bounds_choose_the_method_and_have_three_forms():
    pairs = [(None, 0.5), (-1.0, None), (None, None), (None, None)]
    lower = [-math.inf, -1.0, -math.inf, -math.inf]
    upper = [0.5, math.inf, math.inf, math.inf]
    begin = torch.zeros(4, dtype=torch.float64)
    first = minimize(rosenbrock, begin, bounds=pairs)
    assert first.x[0] == 0.5
    assert torch.equal(first.x, minimize(rosenbrock, begin, method="L-BFGS-B", bounds=pairs).x)
    box = types.SimpleNamespace(lb=lower, ub=torch.tensor(upper))
    assert torch.equal(first.x, minimize(rosenbrock, begin, bounds=box).x)
    scalar = types.SimpleNamespace(lb=-2.0, ub=0.5)
    found = minimize(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, 2), bounds=scalar)
    assert torch.equal(found.x, torch.full((2, 2), 0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", EVERY)
def test_the_device_is_kept(name):
    found = minimize(rosenbrock, x0().cuda(), method=name)
    assert found.x.device == found.jac.device == x0().cuda().device
    assert (found.x - 1).abs().max() < 1e-3


# Second derivatives of the user ---------------------------------------------------------------------------------------


def hessian(x):
    return torch.autograd.functional.hessian(rosenbrock, torch.as_tensor(x))


def second_order(form, given):
    """Objectives whose second derivatives come from autograd, a gradient, a Hessian or its products."""
    arrays = form.arrays
    give = (lambda y: y.numpy()) if arrays else (lambda y: y)
    jac = {"jac": rosenbrock_gradient, "pair": True}.get(given.split("+")[0])
    fun = (lambda x: (rosenbrock(x), rosenbrock_gradient(x))) if jac is True else rosenbrock
    hess = (lambda x: give(hessian(x))) if "hess" in given.split("+") else None
    hessp = (lambda x, v: give(hessian(x) @ torch.as_tensor(v))) if "hessp" in given.split("+") else None
    return Objective("test", form, fun, (), jac, hess, hessp)


CASES = [("tensor", "none"), ("tensor", "none+hess"), ("tensor", "none+hessp"), ("tensor", "jac"), ("tensor", "pair"),
         ("tensor", "jac+hess"), ("array", "jac+hess"), ("array", "jac+hessp"), ("array", "pair+hessp"),
         ("array", "none")]  # fmt: skip


@pytest.mark.parametrize(("kind", "given"), CASES)
def test_a_graph_of_given_derivatives_is_that_of_autograd(kind, given):
    x, form = start("test", x0() if kind == "tensor" else x0().numpy())
    objective = second_order(form, given)
    x.requires_grad_()
    loss = objective.loss(x)
    exact = x.detach().clone().requires_grad_()
    f = rosenbrock(exact)
    (g,) = torch.autograd.grad(f, exact)
    assert torch.allclose(loss.detach(), f.detach(), rtol=1e-15)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.allclose(gradient, g, rtol=1e-13)
    v = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    (product,) = torch.autograd.grad(gradient, x, v, retain_graph=True)
    assert torch.allclose(product, hessian(x.detach()) @ v, rtol=1e-12)
    assert objective.nfev == 1
    assert objective.nhev == (given.split("+")[-1] in ("hess", "hessp"))
    point = secant.curvature.EvaluatedPoint(lambda: objective.loss(x), [x])
    assert torch.allclose(point.hessian() @ v, product, rtol=1e-12)
    assert torch.allclose(point.hessian().to_dense(), hessian(x.detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OF_GRAPHS)
def test_second_derivatives_of_the_user_are_used(name):
    np = pytest.importorskip("numpy")
    found = minimize(rosenbrock, x0().numpy(), method=name, jac=rosenbrock_gradient, hess=lambda x: hessian(x).numpy())
    assert isinstance(found.x, np.ndarray)
    assert found.nhev > 0
    assert np.abs(found.x - 1).max() < 1e-4
    products = minimize(rosenbrock, x0(), method=name, hessp=lambda x, v: hessian(x) @ v)
    assert products.nhev > 0
    assert (products.x - 1).abs().max() < 1e-4


def test_no_evaluation_but_those_of_points():
    """Not for the gradient where a run ends, and not to choose among ways to the Hessian, which differ in time only."""
    x, form = start("test", x0())
    objective = Objective("test", form, rosenbrock, (), None, None, None)
    x.requires_grad_()
    point = secant.curvature.EvaluatedPoint(lambda: objective.loss(x), [x])
    v = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    assert torch.allclose(point.hessian() @ v, hessian(x.detach()) @ v, rtol=1e-12)
    end = x.detach().clone()
    with torch.no_grad():
        x.mul_(2.0)  # as an optimizer moves, and comes back
        x.copy_(end)
    value, gradient = objective.found(x.detach())
    assert objective.nfev == objective.njev == 1
    assert value == float(rosenbrock(end))
    assert torch.allclose(gradient, rosenbrock_gradient(end), rtol=1e-13)
    assert torch.allclose(objective.found(2.0 * end)[1], rosenbrock_gradient(2.0 * end), rtol=1e-13)
    assert objective.nfev == 2


def test_a_graph_of_a_given_jacobian():
    fun = mgh.PROBLEMS[7]
    exact = lambda x: torch.autograd.functional.jacobian(fun.residuals, torch.as_tensor(x))  # noqa: E731
    x, form = start("test", fun.start.numpy())
    calls = []
    residuals = Residuals(
        "test", form, lambda x: fun.residuals(torch.from_numpy(x)).numpy(), (), {},
        lambda x: calls.append(x) or exact(x),
    )  # fmt: skip
    x.requires_grad_()
    r = residuals.residuals(x)
    assert not calls  # not before it is asked for
    u = torch.linspace(-1, 1, fun.m, dtype=torch.float64)
    (product,) = torch.autograd.grad(r, x, u, retain_graph=True)
    assert torch.allclose(product, exact(x.detach()).T @ u, rtol=1e-13)
    found, jacobian = residuals.found(x.detach())
    assert torch.equal(found, fun.residuals(x.detach()))
    assert torch.equal(jacobian, exact(x.detach()))
    point = secant.curvature.EvaluatedPoint(lambda: residuals.residuals(x), [x], "residuals")
    assert torch.allclose(point.jacobian().T @ u, product, rtol=1e-13)
    assert torch.allclose(point.jacobian().to_dense(), exact(x.detach()), rtol=1e-13)
    assert len(calls) == residuals.njev == residuals.nfev == 1


class Cube(torch.autograd.Function):
    """x^3, whose derivative autograd takes for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * u.detach().numpy())


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: torch.cat([x.sin(), (x * x.roll(1)).exp(), x[:2] * 0.0 + 1.0]),
        lambda x: torch.cat([x, 2.0 * x]),  # linear
        lambda x: (x[:2] ** 3).prod().reshape(1),  # fewer rows than columns
        lambda x: torch.cat([Cube.apply(x), x.roll(1) ** 2]),  # of which a column has only a part
        lambda x: Cube.apply(x).repeat(2),
    ],
)
def test_a_small_jacobian_is_that_of_the_evaluation(fun):
    at, calls = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64), []
    x, form = start("test", at)
    residuals = Residuals("test", form, lambda x: calls.append(1) or fun(x), (), {}, None)
    x.requires_grad_()
    point = secant.curvature.EvaluatedPoint(lambda: residuals.residuals(x), [x], "residuals")
    rows = []
    for i in range(len(fun(at))):
        leaf = at.clone().requires_grad_()
        rows.append(torch.autograd.grad(fun(leaf)[i], leaf)[0])
    assert torch.allclose(point.jacobian().to_dense(), torch.stack(rows), rtol=1e-13, atol=1e-15)
    assert torch.equal(residuals.found(at)[1], point.jacobian().to_dense())
    assert len(calls) == residuals.nfev == residuals.njev == 1


def test_least_squares_evaluates_every_point_once():
    for problem in (mgh.PROBLEMS[0], mgh.PROBLEMS[25], mgh.PROBLEMS[29]):
        seen = []
        fun = lambda x, p=problem, seen=seen: seen.append(tuple(x.tolist())) or p.residuals(x)  # noqa: E731
        found = least_squares(fun, problem.start)
        assert len(seen) == len(set(seen)) == found.nfev


def test_least_squares_of_many_variables(monkeypatch):
    """Above the bound nothing is decomposed by singular values."""
    target = torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "svd", None)
    found = least_squares(lambda x: (x - target).exp()[:40] - 1.0, torch.zeros(1001, dtype=torch.float64))
    assert found.success
    assert (found.x - target)[:40].abs().max() <= 1e-6


def test_the_first_radius_is_the_size_of_x0():
    """A step from x0 to a minimum that is far away is as long as x0, or as the option says."""
    for x0, option, length in ((30.0, {}, 30.0), (0.0, {}, 1.0), (30.0, {"initial_trust_radius": 2.0}, 2.0),
                               (30.0, {"max_trust_radius": 5.0}, 5.0)):  # fmt: skip
        for name in ("trust-ncg", "trust-exact"):
            points = []
            start = torch.tensor([x0, 0.0], dtype=torch.float64)
            minimize(lambda x: ((x - 1e4) ** 2).sum(), start, method=name, callback=points.append,
                     options={"maxiter": 1, **option})  # fmt: skip
            assert 0.9 * length <= float((points[0] - start).norm()) <= length * (1 + 1e-12)


# What goes wrong ------------------------------------------------------------------------------------------------------


def walled(failure):
    """log x / x from its zero on: at x <= 0 there is none. The minimum of x - log x is at 1."""

    def fun(x):
        if bool((x <= 0).any()):
            if isinstance(failure, type):
                raise failure("no logarithm")
            return (x * failure).sum()
        return (x - x.log()).sum()

    return fun


FAILURES = [math.nan, math.inf, ValueError, RuntimeError, ZeroDivisionError, torch.linalg.LinAlgError]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", EVERY)
def test_failures_on_the_way_are_survived(name, failure):
    start = torch.tensor([0.02, 3.0, 40.0], dtype=torch.float64)
    tried = []

    def fun(x):
        tried.append(bool((x <= 0).any()))
        return walled(failure)(x)

    found = minimize(fun, start, method=name)
    assert found.success
    assert (found.x - 1).abs().max() < 1e-3
    if name in ("l-bfgs", "l-bfgs-b"):
        assert any(tried)  # or this shows nothing


def test_failures_of_arrays_on_the_way():
    np = pytest.importorskip("numpy")

    def fun(x):
        if (x <= 0).any():
            raise FloatingPointError("no logarithm")
        return (x - np.log(x)).sum()

    for name in ("l-bfgs", "l-bfgs-b"):
        found = minimize(fun, [0.02, 3.0, 40.0], method=name, jac=lambda x: 1 - 1 / x)
        assert np.abs(found.x - 1).max() < 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_failures_at_the_start(name):
    bad = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="no logarithm"):
        minimize(walled(ValueError), bad, method=name)
    found = minimize(walled(math.nan), bad, method=name)
    assert found.status is Status.NOT_FINITE
    assert not found.success
    assert torch.equal(found.x, bad)
    assert found.nfev == 1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("error", [TypeError, KeyError, NotImplementedError])
def test_other_errors_pass(name, error):
    calls = []

    def fun(x):
        calls.append(1)
        if len(calls) > 2:
            raise error("a mistake")
        return rosenbrock(x)

    with pytest.raises(error, match="a mistake"):
        minimize(fun, x0(), method=name)


@pytest.mark.parametrize("name", EVERY)
def test_limits(name):
    found = minimize(rosenbrock, x0(), method=name, options={"maxiter": 3})
    assert found.status is Status.MAX_ITER
    assert found.nit == 3
    assert not found.success
    for limit in (2, 5, 9):
        calls = []
        found = minimize(lambda x, calls=calls: calls.append(1) or rosenbrock(x), x0(), method=name,
                         options={"maxfun": limit})  # fmt: skip
        assert found.status is Status.MAX_EVAL
        assert found.nfev == len(calls)
        assert found.nfev <= limit
    assert minimize(rosenbrock, x0(), method="l-bfgs-b", options={"maxfun": 1}).nfev == 1


def test_tolerances():
    loose, tight = (minimize(rosenbrock, x0(), tol=tol) for tol in (1e-2, 1e-12))
    assert loose.nfev < tight.nfev
    assert tight.fun <= 1e-12 < loose.fun  # the last step changed it by less
    # tol is gtol and ftol here; an option wins over it.
    same = minimize(rosenbrock, x0(), options={"gtol": 1e-2, "ftol": 1e-2})
    assert torch.equal(same.x, loose.x)
    other = minimize(rosenbrock, x0(), tol=1e-2, options={"gtol": 1e-12, "ftol": 1e-12})
    assert torch.equal(other.x, tight.x)
    by_gradient = minimize(rosenbrock, x0(), method="l-bfgs-b", options={"ftol": 0.0, "gtol": 1e-7})
    assert by_gradient.status is Status.CONVERGED
    assert by_gradient.jac.abs().max() <= 1e-7


# Callbacks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_callbacks_have_two_signatures(name):
    points, results = [], []
    found = minimize(rosenbrock, x0(), method=name, callback=points.append)

    def callback(intermediate_result):
        results.append(intermediate_result)

    again = minimize(rosenbrock, x0(), method=name, callback=callback)
    assert len(points) == len(results) == found.nit == again.nit
    assert torch.equal(points[-1], found.x)
    assert torch.equal(results[-1].x, again.x)
    assert results[-1].fun == again.fun
    assert len({id(x) for x in points}) == len(points)
    assert all(float(rosenbrock(r.x)) == pytest.approx(r.fun, rel=1e-12) for r in results)
    plain = minimize(rosenbrock, x0(), method=name)
    assert torch.equal(plain.x, found.x)
    assert plain.nfev == found.nfev


@pytest.mark.parametrize("name", EVERY)
def test_stop_iteration_ends_a_run(name):
    points = []

    def callback(xk):
        points.append(xk)
        xk = xk.zero_()  # a copy: the run does not notice
        if len(points) == 4:
            raise StopIteration

    found = minimize(rosenbrock, x0(), method=name, callback=callback)
    assert found.status is Status.STOPPED
    assert found.nit == 4
    assert torch.equal(found.x, minimize(rosenbrock, x0(), method=name, options={"maxiter": 4}).x)
    with pytest.raises(KeyError):
        minimize(rosenbrock, x0(), method=name, callback=lambda x: {}["no"])


def test_the_message_is_printed(capsys):
    minimize(rosenbrock, x0(), options={"disp": True})
    assert "f = " in capsys.readouterr().out
    minimize(rosenbrock, x0(), options={"disp": False})
    assert capsys.readouterr().out == ""


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fun": 3}, "minimize: fun: expected a function, got int 3"),
        ({"x0": torch.zeros(2, dtype=torch.int64)}, "minimize: x0: expected dtype float32 or float64"),
        ({"x0": torch.zeros(0)}, "minimize: x0: expected at least one number"),
        ({"x0": ["a"]}, "minimize: x0: expected a tensor, or an array"),
        ({"x0": [1 + 2j]}, "minimize: x0: expected a tensor, or an array"),
        ({"x0": [[1.0], [2.0, 3.0]]}, "minimize: x0: expected a tensor, or an array"),
        ({"x0": True}, "minimize: x0: expected a tensor, or an array"),
        ({"method": "nelder-mead"}, "minimize: method: expected None or one of l-bfgs, .*got 'nelder-mead'"),
        ({"method": 3}, "minimize: method: expected None or one of l-bfgs"),
        ({"jac": "2-point"}, r"minimize: jac: expected None \(by autograd\), True, or a function, got str '2-point'"),
        ({"hess": rosenbrock}, "minimize: hess: expected None: 'l-bfgs' uses no second derivatives"),
        ({"hessp": rosenbrock}, "minimize: hessp: expected None: 'l-bfgs' uses no second derivatives"),
        ({"method": "l-bfgs", "bounds": [(0, 1)] * 4}, "minimize: bounds: expected None: 'l-bfgs' knows no bounds"),
        ({"bounds": [(0, 1)]}, "minimize: bounds: expected 4 pairs, one for each element of x0, got 1"),
        ({"bounds": [(0, 1), (2, 1)] * 2}, r"minimize: bounds\[1\]: expected lower <= upper, got \(2.0, 1.0\)"),
        ({"bounds": 3}, r"minimize: bounds: expected pairs \(lower, upper\), or an object with lb and ub, got 3"),
        ({"bounds": types.SimpleNamespace(lb=[0, 0], ub=1)}, "minimize: bounds.lb: expected a shape that broadcasts"),
        ({"tol": -1}, "minimize: tol: expected a finite number >= 0"),
        ({"callback": 3}, "minimize: callback: expected None or a function, got 3"),
        ({"options": [1]}, "minimize: options: expected None or a dictionary"),
        ({"options": {"maxit": 3, "zeal": 1}}, "minimize: options: expected among maxiter, .*got 'maxit', 'zeal'"),
        ({"options": {"maxiter": 0}}, r"minimize: options\['maxiter'\]: expected an integer >= 1, got 0"),
        ({"options": {"gtol": True}}, r"minimize: options\['gtol'\]: expected a finite number >= 0, got True"),
        ({"options": {"maxfun": 1}}, r"minimize: options\['maxfun'\]: expected an integer >= 2"),
        ({"options": {"maxls": 3}}, "minimize: options: expected among .* for 'l-bfgs', got 'maxls'"),
        ({"method": "newton", "x0": [0.0, 1.0], "jac": rosenbrock}, "minimize: hess or hessp: expected a function"),
    ],
)  # fmt: skip
def test_invalid_arguments(change, words):
    arguments = {"fun": rosenbrock, "x0": x0()} | change
    with pytest.raises((TypeError, ValueError), match=words):
        minimize(**arguments)


@pytest.mark.parametrize("name", OF_GRADIENTS)
@pytest.mark.parametrize(
    ("fun", "jac", "words"),
    [
        (lambda x: x**2, None, "fun: expected a real number or a tensor of one, got a tensor of shape"),
        (lambda x: None, None, "fun: expected a real number or a tensor of one, got NoneType"),
        (lambda x: 3.0, None, r"fun: expected a tensor that autograd can follow \(or give jac\), got float 3.0"),
        (
            lambda x: x.detach().sum(),
            None,
            "fun: expected a tensor that autograd .* got one without a graph",
        ),
        (lambda x: x.sum(), True, r"fun: expected a pair \(f, g\), as jac=True says"),
        (lambda x: x.sum(), lambda x: x[:2], r"jac: expected shape \(4,\), got shape \(2,\)"),
    ],
)
def test_functions_that_return_something_else(name, fun, jac, words):
    with pytest.raises(TypeError, match="minimize: " + words):
        minimize(fun, x0(), jac=jac, method=name)


# Least squares --------------------------------------------------------------------------------------------------------


def decay(x, t, y):
    return x[0] * torch.exp(-x[1] * t) + x[2] - y


def data(outliers=False):
    t = torch.linspace(0, 3, 30, dtype=torch.float64)
    y = 2.0 * torch.exp(-1.5 * t) + 0.5 + 0.05 * torch.sin(37.0 * t)
    if outliers:
        y[::7] += 2.0
    return t, y


def of_scipy_residuals(fun, start, args=(), **more):
    optimize = pytest.importorskip("scipy.optimize")
    value = lambda x: fun(torch.from_numpy(x), *args)  # noqa: E731
    return optimize.least_squares(
        lambda x: value(x).numpy(),
        start.numpy(),
        lambda x: torch.autograd.functional.jacobian(lambda z: fun(z, *args), torch.from_numpy(x)).numpy(),
        **more,
    )


@pytest.mark.parametrize("loss", ["linear", "soft_l1", "huber", "cauchy"])
def test_robust_losses_as_scipy(loss):
    args, first = data(outliers=True), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    tight = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-10}
    ours = least_squares(decay, first, args=args, loss=loss, f_scale=0.1, **tight)
    theirs = of_scipy_residuals(decay, first, args, loss=loss, f_scale=0.1, **tight)
    assert ours.success
    assert ours.cost == pytest.approx(theirs.cost, rel=1e-8)
    # Both end where J^T J dx = g with |g| <= 1e-8; the least eigenvalue of J^T J is above 1e-2.
    assert (ours.x - torch.from_numpy(theirs.x)).abs().max() < 1e-5
    assert torch.allclose(ours.fun, decay(ours.x, *args), rtol=0, atol=1e-14)
    assert torch.allclose(ours.grad, torch.from_numpy(theirs.grad), rtol=0, atol=1e-6)
    assert torch.allclose(ours.jac, torch.from_numpy(theirs.jac), rtol=0, atol=1e-3)
    assert ours.optimality == pytest.approx(float(ours.grad.abs().max()))
    assert ours.active_mask.tolist() == [0, 0, 0]


def test_bounds_of_least_squares_as_scipy():
    args, first = data(), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    bounds = ([0.0, 0.0, -1.0], [1.5, 10.0, 1.0])
    ours = least_squares(decay, first, args=args, bounds=bounds)
    theirs = of_scipy_residuals(decay, first, args, bounds=bounds)
    assert ours.cost == pytest.approx(theirs.cost, rel=1e-5)
    assert ours.active_mask.tolist() == [1, 0, 0]
    assert ours.x[0] == 1.5
    with pytest.raises(ValueError, match="least_squares: x0: expected a point within the bounds"):
        least_squares(decay, first, args=args, bounds=(2.0, 3.0))


def test_least_squares_of_arrays():
    np = pytest.importorskip("numpy")
    t, y = (z.numpy() for z in data())
    fun = lambda x, t, y=None: x[0] * np.exp(-x[1] * t) + x[2] - y  # noqa: E731
    jac = lambda x, t, y=None: np.stack([np.exp(-x[1] * t), -x[0] * t * np.exp(-x[1] * t), 1.0 + 0.0 * t], 1)  # noqa: E731
    ours = least_squares(fun, [1.0, 1.0, 0.0], jac, args=t, kwargs={"y": y})
    reference = least_squares(decay, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), args=data())
    assert isinstance(ours.x, np.ndarray)
    assert ours.jac.shape == (30, 3)
    assert np.allclose(ours.x, reference.x.numpy(), rtol=0, atol=1e-6)
    assert np.allclose(ours.jac, jac(ours.x, t), rtol=1e-12)


@pytest.mark.parametrize("x_scale", [[2.0, 1.0, 0.1], "jac", 10.0])
def test_scales_change_the_way_and_not_the_end(x_scale):
    first = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    plain = least_squares(decay, first, args=data())
    scaled = least_squares(decay, first, args=data(), x_scale=x_scale)
    assert (scaled.x - plain.x).abs().max() < 1e-6
    assert torch.allclose(scaled.jac, plain.jac, rtol=0, atol=1e-5)


def test_the_35_problems_of_residuals():
    ours = theirs = 0
    for problem in mgh.PROBLEMS:
        found = least_squares(problem.residuals, problem.start)
        other = of_scipy_residuals(problem.residuals, problem.start)
        if problem.excess(2.0 * other.cost) <= 1e-5:
            assert problem.excess(2.0 * found.cost) <= 1e-5, problem.name
            ours, theirs = ours + found.nfev, theirs + other.nfev
    assert ours <= theirs


def test_least_squares_stops_and_survives():
    args, first = data(), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert least_squares(decay, first, args=args, max_nfev=2).status is Status.MAX_EVAL
    points = []
    whole = least_squares(decay, first, args=args, callback=points.append)
    assert torch.equal(points[-1], whole.x)
    with pytest.raises(ValueError, match="no"):
        least_squares(lambda x: (_ for _ in ()).throw(ValueError("no")), first)
    with pytest.raises(TypeError, match="least_squares: fun: expected a tensor of real residuals"):
        least_squares(lambda x: 3, first)
    wrong = {"loss": "l2", "f_scale": 0.0, "x_scale": -1.0, "ftol": -1.0, "max_nfev": 0, "bounds": (1.0, 0.0)}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"least_squares: {name}: "):
            least_squares(decay, first, args=args, **{name: value})


# What a review has found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e9])
def test_the_units_of_x_do_not_end_a_run(scale):
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64) * scale
    found = minimize(lambda x: rosenbrock(x / scale), start, options={"gtol": 1e-5 / scale})
    assert found.success
    assert found.fun < 1e-9


def test_a_jac_without_a_graph_is_no_hessian_of_zeros():
    for name in ("newton", "newton-cg", "trust-exact", "trust-ncg", "cubic"):
        with pytest.raises(TypeError, match="minimize: jac: expected a gradient that autograd can follow"):
            minimize(rosenbrock, x0(), jac=lambda x: rosenbrock_gradient(x).detach(), method=name)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_at_their_ends(name):
    """A gradient whose norm overflows, and a start that is NaN, end with a status."""
    found = minimize(lambda x: torch.exp(x).sum(), torch.full((2,), 400.0, dtype=torch.float64), method=name)
    assert isinstance(found.status, Status)
    found = minimize(lambda x: x.square().sum(), torch.tensor([math.nan, 1.0], dtype=torch.float64), method=name)
    assert found.status is Status.NOT_FINITE


def test_a_gradient_that_is_squared_to_nothing():
    found = minimize(lambda x: x.square().sum(), [1e-170], bounds=[(-1, 1)], options={"gtol": 0.0})
    assert isinstance(found.status, Status)
