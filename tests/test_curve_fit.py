"""`curve_fit` and `least_squares(batch=True)`: against scipy, each problem as if it were alone, and what fails."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

import secant
from secant import Status, _compiled_fits

optimize = pytest.importorskip("scipy.optimize")

F64 = torch.float64
T = torch.linspace(0.0, 2.0, 25, dtype=F64)


def decay(t, a, k, c):
    return a * torch.exp(-k * t) + c


def decay_numpy(t, a, k, c):
    return a * np.exp(-k * t) + c


def decays(b=8, noise=0.02, seed=0):
    draw = torch.Generator().manual_seed(seed)
    true = torch.rand(b, 3, generator=draw, dtype=F64) * torch.tensor([3.0, 2.0, 0.5]) + torch.tensor([1.0, 0.5, 0.0])
    y = decay(T, *true[:, :, None].unbind(1))
    return y + noise * torch.randn(y.shape, generator=draw, dtype=F64)


def matches(found, want, bound=1e-6):
    np.testing.assert_allclose(found, want, rtol=bound, atol=bound * np.abs(want).max())


SIGMAS = {
    "none": lambda y: None,
    "number": lambda y: 0.3,
    "each": lambda y: 0.1 + 0.2 * T,
    "each-of-each": lambda y: 0.1 + 0.05 * torch.arange(len(y))[:, None] + 0.2 * T,
    "covariance": lambda y: torch.diag(0.1 + T) + 0.05,
}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("how", ["autograd", "jac"])
def test_parameters_and_covariances_are_those_of_scipy(sigma, absolute, how):
    y = decays()
    sigma = SIGMAS[sigma](y)

    def jac(t, a, k, c):
        e = torch.exp(-k * t)
        return torch.stack([e, -a * t * e, torch.ones_like(e)], -1)

    given = {"jac": jac} if how == "jac" else {}
    popt, pcov, status = secant.curve_fit(
        decay, T, y, sigma=sigma, absolute_sigma=absolute, xtol=1e-12, ftol=1e-14, **given
    )
    assert status.dtype == torch.int32
    assert all(Status(s).ok for s in status.tolist())
    for i, row in enumerate(y.numpy()):
        own = sigma[i] if isinstance(sigma, torch.Tensor) and sigma.shape == y.shape else sigma
        own = np.full(len(T), own) if isinstance(own, float) else own
        own = own.numpy() if isinstance(own, torch.Tensor) else own
        want = optimize.curve_fit(
            decay_numpy, T.numpy(), row, sigma=own, absolute_sigma=absolute, xtol=1e-12, ftol=1e-14
        )
        matches(popt[i].numpy(), want[0])
        matches(pcov[i].numpy(), want[1], 1e-5)


@pytest.mark.parametrize("bounds", [((0, 0, 0.3), (9, 9, 9)), ((0, 0, 0), (2.0, 9, 9)), ((-9, 1.9, -9), (9, 2.0, 0.1))])
def test_bounds_are_those_of_scipy(bounds):
    y = decays(12)
    p0 = [min(max(1.0, low), high) for low, high in zip(*bounds, strict=True)]
    popt, _, status = secant.curve_fit(decay, T, y, p0, bounds=bounds, xtol=1e-12, ftol=1e-14)
    lower, upper = (torch.tensor(b, dtype=F64) for b in bounds)
    assert bool(((popt >= lower) & (popt <= upper)).all())
    assert all(Status(s).ok for s in status.tolist())
    for i, row in enumerate(y.numpy()):
        inside = 0.5 * (np.maximum(bounds[0], -9) + np.minimum(bounds[1], 9))
        want = optimize.curve_fit(
            decay_numpy, T.numpy(), row, inside, bounds=bounds, xtol=1e-14, ftol=1e-14, gtol=1e-14
        )[0]
        costs = [0.5 * ((decay_numpy(T.numpy(), *p) - row) ** 2).sum() for p in (popt[i].numpy(), want)]
        # Of one minimum: scipy's stays inside, ours may lie on the bound, which is a little lower.
        assert costs[0] <= costs[1] * (1 + 1e-6)
        matches(popt[i].numpy(), want, 1e-3)


def test_what_is_fixed_stays():
    y = decays()
    p0 = torch.tensor([1.0, 1.3, 0.25], dtype=F64)
    popt, pcov, _ = secant.curve_fit(decay, T, y, p0, fixed=[False, True, False], xtol=1e-12, ftol=1e-14)
    assert bool((popt[:, 1] == 1.3).all())
    assert bool((pcov[:, 1] == 0).all())
    assert bool((pcov[:, :, 1] == 0).all())
    for i, row in enumerate(y.numpy()):
        want = optimize.curve_fit(lambda t, a, c: decay_numpy(t, a, 1.3, c), T.numpy(), row, [1.0, 0.25])
        matches(popt[i, [0, 2]].numpy(), want[0])
        matches(pcov[i][[0, 2]][:, [0, 2]].numpy(), want[1], 1e-5)


def test_a_sum_over_the_data_is_not_taken_for_an_elementwise_model():
    """Its Jacobian by parameters of each value would leave out what the sum brings."""
    y = decays(4) / decays(4).sum(-1, keepdim=True)

    def normalized(t, k, c):
        e = torch.exp(-k * t) + c
        return e / e.sum(-1, keepdim=True)

    popt, _, status = secant.curve_fit(normalized, T, y, [1.0, 0.5], xtol=1e-12, ftol=1e-14)
    assert all(Status(s).ok for s in status.tolist())

    def numpy_model(t, k, c):
        e = np.exp(-k * t) + c
        return e / e.sum()

    for i, row in enumerate(y.numpy()):
        matches(popt[i].numpy(), optimize.curve_fit(numpy_model, T.numpy(), row, [1.0, 0.5], xtol=1e-12)[0], 1e-5)


def test_one_fit_and_arrays():
    y = decays(1)[0]
    popt, pcov, status = secant.curve_fit(decay, T.numpy(), y.numpy())
    assert isinstance(popt, np.ndarray)
    assert (popt.shape, pcov.shape) == ((3,), (3, 3))
    assert Status(int(status)).ok
    matches(popt, optimize.curve_fit(decay_numpy, T.numpy(), y.numpy())[0], 1e-5)


def test_several_variables_and_a_variable_of_each():
    x, z = torch.rand(30, dtype=F64, generator=torch.Generator().manual_seed(1)), torch.linspace(0, 1, 30, dtype=F64)
    own = x + torch.arange(4)[:, None]
    model = lambda xs, a, b: a * xs[0] + b * xs[1] ** 2  # noqa: E731
    y = 2.0 * own - 3.0 * z**2
    popt, _, _ = secant.curve_fit(model, (own, z), y)
    matches(popt.numpy(), np.tile([2.0, -3.0], (4, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_fit_is_what_it_is_alone(dtype):
    """Bit for bit: of rows of elementwise functions; and a permutation permutes."""
    y = decays(300).to(dtype)
    t = T.to(dtype)
    whole = secant.curve_fit(decay, t, y)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    mixed = secant.curve_fit(decay, t, y[order], chunk=70)
    for a, b in zip(whole, mixed, strict=True):
        assert torch.equal(a[order], b)
    for i in (0, 17, 299):
        alone = secant.curve_fit(decay, t, y[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


def test_failures_are_data_and_touch_nobody_else():
    y = decays(6)
    want = secant.curve_fit(decay, T, y)
    bad = y.clone()
    bad[2, 4] = math.nan
    bad[4] = math.inf
    popt, pcov, status = secant.curve_fit(decay, T, bad)
    assert status[2] == status[4] == Status.NOT_FINITE
    assert bool(pcov[2].isnan().all())
    good = [0, 1, 3, 5]
    assert torch.equal(popt[good], want.popt[good])
    assert torch.equal(pcov[good], want.pcov[good])
    omitted = secant.curve_fit(decay, T, bad[:4], nan_policy="omit", xtol=1e-12)
    keep = np.arange(25) != 4
    reference = optimize.curve_fit(decay_numpy, T.numpy()[keep], y[2].numpy()[keep], xtol=1e-12)
    matches(omitted.popt[2].numpy(), reference[0])
    matches(omitted.pcov[2].numpy(), reference[1], 1e-5)
    with pytest.raises(ValueError, match="ydata: expected no NaN"):
        secant.curve_fit(decay, T, bad[:4], nan_policy="raise")


def test_where_nothing_is_known_the_covariance_is_infinite():
    two = lambda t, a, b, c: (a + b) * t + c  # noqa: E731
    _, pcov, status = secant.curve_fit(two, T, decays(2))
    assert all(Status(s).ok for s in status.tolist())
    assert bool(pcov.isinf().all())
    exact = secant.curve_fit(lambda t, a, b, c: a * t * t + b * t + c, T[:3], decays(2)[:, :3])
    assert bool(exact.pcov.isinf().all()), "as many parameters as data"


# least_squares --------------------------------------------------------------------------------------------------------


def rosenbrock(x):
    return torch.stack([10.0 * (x[:, 1] - x[:, 0] ** 2), 1.0 - x[:, 0]], -1)


@pytest.mark.parametrize("geodesic", [False, True])
def test_rosenbrock_from_many_starts(geodesic):
    x0 = 4.0 * torch.rand(200, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) - 2.0
    found = secant.least_squares(rosenbrock, x0, batch=True, geodesic=geodesic, gtol=1e-10)
    assert bool(found.success.all())
    assert found.message == "200 problems: 200 converged"
    assert float((found.x - 1.0).abs().max()) < 1e-7
    assert torch.equal(found.fun, rosenbrock(found.x))
    torch.testing.assert_close(found.cost, 0.5 * found.fun.square().sum(-1), rtol=1e-14, atol=0)


def test_nothing_is_evaluated_for_what_has_stopped():
    rows = []

    def fun(x, *, index):
        rows.append(len(index))
        return rosenbrock(x)

    def jac(x, *, index):
        zero = torch.zeros_like(x[:, 0])
        return torch.stack([torch.stack([-20.0 * x[:, 0], zero + 10], -1), torch.stack([zero - 1, zero], -1)], 1)

    x0 = 4.0 * torch.rand(100, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) - 2.0
    found = secant.least_squares(fun, x0, jac, batch=True, chunk=100)
    assert sum(rows) == int(found.nfev.sum())
    assert len(set(found.nfev.tolist())) > 3
    same = secant.least_squares(rosenbrock, x0, batch=True)  # all are evaluated, and what has stopped is thrown away
    torch.testing.assert_close(found.x, same.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", ["linear", "soft_l1", "huber", "cauchy"])
def test_losses_are_those_of_scipy(loss):
    y = decays(5)
    y[:, ::6] += 2.0
    first, ends = [3.0, 1.5, 0.3], {"loss": loss, "f_scale": 0.1, "xtol": 1e-12, "ftol": 1e-14}
    found = secant.least_squares(
        lambda x: decay(T, *x[:, :, None].unbind(1)) - y, torch.tensor(first, dtype=F64).expand(5, 3), batch=True,
        x_scale="jac", **ends,
    )  # fmt: skip
    assert bool(found.success.all())
    for i, row in enumerate(y.numpy()):
        want = optimize.least_squares(lambda p, row=row: decay_numpy(T.numpy(), *p) - row, first, **ends)
        assert float(found.cost[i]) == pytest.approx(want.cost, rel=1e-6)


def test_ends_of_all_kinds():
    """Optimal at the start, flat, without a finite value, falling for ever, few evaluations; each for itself."""

    def fun(x):
        a, b = x.unbind(-1)
        kinds = torch.arange(len(x))
        optimal = torch.stack([a, b], -1)
        flat = torch.stack([0 * a + 3.0, 0 * b], -1)
        undefined = torch.stack([a.log(), b], -1)
        forever = torch.stack([torch.exp(-a), 0 * b], -1)
        table = torch.stack([optimal, flat, undefined, forever, rosenbrock(x)])
        return table[kinds, kinds]

    x0 = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.2, 1.0]], dtype=F64)
    found = secant.least_squares(fun, x0, batch=True, max_nfev=12, geodesic=False, gtol=1e-8)
    kinds = [Status(s) for s in found.status.tolist()]
    assert kinds[:3] == [Status.CONVERGED, Status.CONVERGED, Status.NOT_FINITE]
    assert kinds[3] in (Status.CONVERGED, Status.MAX_EVAL)
    assert kinds[4] is Status.MAX_EVAL
    assert torch.equal(found.x[:3], x0[:3])
    assert int(found.nfev.max()) == 12


def test_a_step_into_nan_is_shortened():
    found = secant.least_squares(
        lambda x: torch.where(x > -0.5, x.exp() - 0.7, math.nan), torch.full((3, 1), 4.0, dtype=F64), batch=True
    )
    assert bool(found.success.all())
    torch.testing.assert_close(found.x, torch.full((3, 1), math.log(0.7), dtype=F64), rtol=1e-7, atol=0)


def test_a_million_to_one_in_scale():
    y = decays(4)
    found = secant.curve_fit(lambda t, a, k, c: 1e-6 * a * torch.exp(-1e6 * k * t) + c, T, y, [1e6, 1e-6, 0.1])
    plain = secant.curve_fit(decay, T, y, [1.0, 1.0, 0.1])
    matches((found.popt * torch.tensor([1e-6, 1e6, 1.0])).numpy(), plain.popt.numpy(), 1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"p0": torch.ones(3, 3)}, r"p0: expected shape \(p,\) or \(8, p\)"),
        ({"sigma": -1.0}, "sigma: expected numbers > 0"),
        ({"sigma": torch.ones(7)}, "sigma: expected a number"),
        ({"fixed": [True]}, "fixed: expected 3 flags"),
        ({"bounds": (1.0, 0.0)}, "lower < upper"),
        ({"nan_policy": "drop"}, "nan_policy"),
        ({"ftol": -1.0}, "ftol"),
        ({"f": lambda t, a: torch.ones(4)}, r"f: expected a tensor that broadcasts to \(1, 25\)"),
        ({"f": lambda t, *p: t}, "p0: expected where to start"),
        ({"jac": lambda t, a, k, c: t}, r"jac: expected a tensor that broadcasts to \(8, 25, 3\)"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    given = {"f": decay, "xdata": T, "ydata": decays(), **change}
    with pytest.raises((TypeError, ValueError), match=words):
        secant.curve_fit(**given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x0": torch.ones(3)}, r"x0: expected shape \(B, p\)"),
        ({"jac": True}, "jac: expected None"),
        ({"callback": print}, "callback: expected None"),
        ({"chunk": 3}, "chunk: expected None, as fun takes no index"),
        ({"fun": lambda x: x.sum()}, r"fun: expected a real tensor \(B, k\)"),
        ({"x0": 2 * torch.ones(3, 2), "bounds": (0.0, 1.0)}, "x0: expected a point within the bounds"),
    ],
)
def test_wrong_arguments_of_a_batch_are_named(change, words):
    given = {"fun": rosenbrock, "x0": torch.zeros(3, 2, dtype=F64), **change}
    with pytest.raises((TypeError, ValueError), match=words):
        secant.least_squares(**given, batch=True)


@pytest.fixture
def uncompiled(monkeypatch):
    """Trace, but leave out the compiler, which takes seconds for each model."""
    monkeypatch.setattr(_compiled_fits, "_BACKEND", "eager")
    _compiled_fits._compiled.cache_clear()
    yield
    _compiled_fits._compiled.cache_clear()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "soft_l1", "f_scale": 0.05},
        {"sigma": 0.1 + 0.2 * T, "absolute_sigma": True},
        {"bounds": ([0.0, 0.0, 0.1], [3.0, 2.0, 1.0]), "p0": [1.0, 1.0, 0.5]},
        {"fixed": [False, True, False], "p0": [2.0, 1.5, 0.1]},
        {"nan_policy": "omit"},
        {"chunk": 3},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_loops_give_what_operations_give(uncompiled, options):
    """The same sums in another order: the ends are those of the same iterates, but for rounding."""
    y = decays(b=7)
    if "nan_policy" in options:
        y[2, 4:9] = math.nan
    want = secant.curve_fit(decay, T, y, **options)
    found = secant.curve_fit(decay, T, y, compile=True, **options)
    assert torch.equal(found.status <= 1, want.status <= 1)
    torch.testing.assert_close(found.popt, want.popt, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.pcov, want.pcov, rtol=1e-4, atol=1e-8)


def test_loops_of_variables_of_each(uncompiled):
    y, own = decays(b=5), T + 0.1 * torch.arange(5, dtype=F64)[:, None]
    for x, f in ((own, decay), ((T, own), lambda x, a, k, c: decay(x[0] + x[1], a, k, c))):
        want = secant.curve_fit(f, x, y)
        found = secant.curve_fit(f, x, y, compile=True)
        torch.testing.assert_close(found.popt, want.popt, rtol=1e-6, atol=1e-6)


def test_a_model_is_compiled_once(uncompiled, monkeypatch):
    made = []
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: made.append(args) or compiled(*args, **options))
    for count in (7, 1, 4):
        secant.curve_fit(decay, T, decays(b=count), compile=True)
    assert len(made) == 1


def test_many_models_are_compiled(uncompiled):
    """A compiler gives up after some versions of one piece of code: each model has its own."""
    for power in range(12):
        y = 1.5 * (T + 1) ** power + 0.5

        def f(t, a, c, power=power):
            return a * (t + 1) ** power + c * torch.cos(t)

        popt, _, _ = secant.curve_fit(f, T, y + 0.0 * T, p0=[1.0, 0.1], compile=True)
        want = secant.curve_fit(f, T, y, p0=[1.0, 0.1])[0]
        torch.testing.assert_close(popt, want, rtol=1e-6, atol=1e-6)


def test_a_compiler_makes_the_loops():
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    y = decays(b=50)
    want, found = (secant.curve_fit(decay, T, y, compile=compile) for compile in (False, True))
    assert torch.equal(found.status <= 1, want.status <= 1)
    torch.testing.assert_close(found.popt, want.popt, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"jac": lambda t, *p: t}, "expected no jac, as derivatives are compiled, too, got one"),
        ({"geodesic": True}, "expected geodesic=False, got True"),
        ({"sigma": torch.eye(25, dtype=F64)}, "expected a sigma of standard deviations, got covariances"),
        ({"f": lambda t, a, k, c: decay(t, a, k, c).cumsum(-1) * a.sum()}, "each depend on their own parameters alone"),
        ({"f": lambda t, a, k, c: (torch._dynamo.graph_break(), decay(t, a, k, c))[1]}, "torch.compile goes through"),
    ],
)
def test_what_cannot_be_compiled_says_so(uncompiled, change, words):
    options = {"f": decay, "xdata": T, "ydata": decays(), "compile": True, **change}
    with pytest.raises((TypeError, ValueError), match=f"curve_fit: compile: .*{words}"):
        secant.curve_fit(**options)
