"""The methods of `minimize(batch=True)` but for L-BFGS, problems of different sizes, and what vmap is told."""

from __future__ import annotations

import math

import pytest
import torch
from test_batched_minimize import rosenbrock, starts, with_gradient

import secant
from secant import Status
from secant.benchmarks import mgh
from secant.solvers.batched_newton import eigenvalues
from secant.solvers.batched_trust_region import within

F64 = torch.float64
FIELDS = ("x", "fun", "jac", "status", "nit", "nfev")
METHODS = ("bfgs", "newton", "trust-exact")
methods = pytest.mark.parametrize("method", METHODS)
OPTIONS = {"gtol": 1e-8}


def hessian(x):
    """That of Rosenbrock's function."""
    b, n = x.shape
    h = x.new_zeros(b, n, n)
    i = torch.arange(n - 1)
    h[:, i, i] = 1200.0 * x[:, :-1] ** 2 - 400.0 * x[:, 1:] + 2.0
    h[:, i + 1, i + 1] += 200.0
    h[:, i, i + 1] = h[:, i + 1, i] = -400.0 * x[:, :-1]
    return h


@methods
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_problem_ends_where_it_ends_alone(method, dtype):
    """Bit for bit; a permutation permutes; and with `index` nothing is spent on what has stopped."""
    x0 = starts(70, 5).to(dtype)
    rows = []

    def fun(x, *, index):
        rows.append(len(x))
        return rosenbrock(x)

    options = {"gtol": 1e-3 if dtype is torch.float32 else 1e-8}
    jac = lambda x: with_gradient(x)[1]  # noqa: E731
    given = {} if method == "bfgs" else {"hess": hessian}
    whole = secant.minimize(fun, x0, method=method, jac=jac, **given, batch=True, options=options)
    assert sum(rows) == int(whole.nfev.sum())
    assert bool((whole.status <= (1 if dtype is F64 else 4)).all())
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    run = lambda x: secant.minimize(rosenbrock, x, method=method, jac=jac, **given, batch=True, options=options)  # noqa: E731
    mixed = run(x0[order])
    for name in FIELDS:
        assert torch.equal(whole[name][order], mixed[name]), name
    for i in (0, 33, 69):
        alone = run(x0[i : i + 1])
        for name in FIELDS:
            assert torch.equal(whole[name][i : i + 1], alone[name]), name
    assert len(set(whole.nfev.tolist())) > 5


@methods
def test_it_is_as_good_as_the_method_of_one_problem(method):
    x0 = starts(12, 4)
    found = secant.minimize(rosenbrock, x0, method=method, batch=True, options=OPTIONS)
    assert found.status.tolist() == [Status.CONVERGED] * 12
    assert float(found.jac.abs().max()) <= 1e-8
    torch.testing.assert_close(found.jac, with_gradient(found.x)[1], rtol=0, atol=1e-11)
    singles = [secant.minimize(lambda x: rosenbrock(x[None])[0], x, method=method, options=OPTIONS) for x in x0]
    assert int(found.nfev.sum()) <= 1.25 * sum(one.nfev for one in singles)
    # It has two minima, 0 and 3.70; which of them is the path's affair.
    assert all(min(abs(f), abs(f - 3.7014287)) < 1e-6 for f in found.fun.tolist())


def test_the_steps_of_a_trust_region_are_those_of_one_problem():
    x0 = starts(8, 4)
    options = {"maxiter": 5, "gtol": 0.0}
    found = secant.minimize(rosenbrock, x0, method="trust-exact", batch=True, options=options)
    for i in range(8):
        one = secant.minimize(lambda x: rosenbrock(x[None])[0], x0[i], method="trust-exact", options=options)
        # There a step on the boundary may be a tenth too short, so that values are alike, no more.
        assert float(found.fun[i]) <= 2.0 * one.fun + 0.1
        assert int(found.nit[i]) == one.nit == 5


@pytest.mark.parametrize("method", ["newton", "trust-exact"])
def test_hessians_by_autograd_are_those_that_are_given(method):
    x0 = starts(9, 3)
    runs = [
        secant.minimize(rosenbrock, x0, method=method, batch=True, options=OPTIONS),
        secant.minimize(rosenbrock, x0, method=method, hess=hessian, batch=True, options=OPTIONS),
        secant.minimize(with_gradient, x0, method=method, jac=True, batch=True, options=OPTIONS),
    ]
    for other in runs[1:]:
        torch.testing.assert_close(runs[0].x, other.x, rtol=0, atol=1e-8)
        assert other.status.tolist() == [Status.CONVERGED] * 9


def test_newton_takes_one_step_on_quadratics_and_leaves_saddles():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(20, 6, 6, dtype=F64, generator=draw)
    a = a @ a.mT + torch.eye(6, dtype=F64)
    center = torch.randn(20, 6, dtype=F64, generator=draw)
    fun = lambda x, *, index: 0.5 * ((x - center[index])[:, None] @ a[index] @ (x - center[index])[..., None]).flatten()  # noqa: E731
    found = secant.minimize(fun, torch.zeros(20, 6, dtype=F64), method="newton", batch=True, options=OPTIONS)
    assert found.nfev.tolist() == [2] * 20
    # The condition of a is at most 1e3, and its inverse at most 1.
    torch.testing.assert_close(found.x, center, rtol=0, atol=1e-10)
    saddle = lambda x: 0.5 * x[:, 0] ** 2 - 0.5 * x[:, 1] ** 2 + 0.25 * x[:, 1] ** 4  # noqa: E731
    x0 = torch.tensor([[0.5, 1e-3], [0.5, -1e-3]], dtype=F64)
    for method in ("newton", "trust-exact"):
        found = secant.minimize(saddle, x0, method=method, batch=True, options=OPTIONS)
        torch.testing.assert_close(found.x.abs(), torch.tensor([[0.0, 1.0]] * 2, dtype=F64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("n", [1, 3, 70])
def test_steps_within_a_radius_are_the_best(n):
    """The conditions of More and Sorensen, over definite, indefinite, singular and hard cases."""
    draw = torch.Generator().manual_seed(n)
    b = 60
    a = torch.randn(b, n, n, dtype=F64, generator=draw)
    a = 0.5 * (a + a.mT)
    a[: b // 3] = a[: b // 3] @ a[: b // 3] + 0.1 * torch.eye(n, dtype=F64)
    g = torch.randn(b, n, dtype=F64, generator=draw)
    w, v = eigenvalues(a)
    g[-10:] -= v[-10:, :, 0] * (v[-10:, :, 0] * g[-10:]).sum(-1, keepdim=True)  # hard, to rounding
    g[-1] = 0.0
    radius = torch.logspace(-2, 2, b, dtype=F64)[torch.randperm(b, generator=draw)]
    step = within(w, v, g, radius, torch.finfo(F64).eps)
    size = step.s.norm(dim=-1)
    assert bool((size <= radius * (1.0 + 1e-12)).all())
    assert torch.equal(step.at_boundary, size > radius * (1.0 - 1e-9)) or n == 1
    gs = (g * step.s).sum(-1)
    ass = (a @ step.s[..., None])[..., 0]
    torch.testing.assert_close(step.predicted, -(gs + 0.5 * (step.s * ass).sum(-1)), rtol=1e-9, atol=1e-9)
    # (A + lambda I) s = -g with lambda >= max(0, -w_1), and lambda = 0 inside.
    lam = torch.where(step.at_boundary, -((g + ass) * step.s).sum(-1) / size.square(), 0.0)
    scale = w.abs().amax(-1) + g.norm(dim=-1) / radius
    assert bool((lam >= -w[:, 0] - 1e-7 * scale).all())
    assert bool((lam >= -1e-7 * scale).all())
    residual = (ass + lam[:, None] * step.s + g).norm(dim=-1)
    assert bool((residual <= 1e-6 * scale * radius).all())


@methods
def test_ends_of_all_kinds_touch_nobody_else(method):
    def fun(x):
        a, b = x.unbind(-1)
        values = torch.stack(
            [
                rosenbrock(x),
                a * a + b * b,  # optimal at the start
                0.0 * a + 3.0,  # flat
                (a + 2.0).log() + b * b,  # undefined at its start
                -a,  # falls for ever
                torch.where(a < 0.5, math.nan, (a - 1.0) ** 2 + b * b),  # undefined on the way
                torch.where(a == a, math.inf, a) + b,  # infinite
                rosenbrock(x),
            ]
        )
        return values[torch.arange(8), torch.arange(8)]

    x0 = torch.tensor([[-1.2, 1.0], [0, 0], [1, 1], [-3, 0], [0, 0], [3, 1], [1, 1], [-1.2, 1.0]], dtype=F64)
    found = secant.minimize(fun, x0, method=method, batch=True, options={"maxiter": 60})
    kinds = [Status(s) for s in found.status.tolist()]
    assert kinds[0].ok
    assert kinds[1] is kinds[2] is Status.CONVERGED
    assert kinds[3] is kinds[6] is Status.NOT_FINITE
    assert not kinds[4].ok
    assert float(found.fun[4]) < -50.0
    assert kinds[5].ok
    torch.testing.assert_close(found.x[5], torch.tensor([1.0, 0.0], dtype=F64), rtol=0, atol=1e-4)
    assert torch.equal(found.x[1:4], x0[1:4])
    assert bool(found.x.isfinite().all())
    alone = secant.minimize(rosenbrock, x0[:1], method=method, batch=True, options={"maxiter": 60})
    for i in (0, 7):
        assert torch.equal(found.x[i], alone.x[0])
    assert "2 not_finite" in found.message


@methods
def test_the_problems_of_more_garbow_and_hillstrom(method):
    """From three starts each, as many are solved as one by one, but for one in thirty."""
    solved = [0, 0]
    for problem in mgh.PROBLEMS[:10]:
        x0 = problem.start * torch.tensor([[1.0], [1.1], [0.9]], dtype=F64)
        fun = lambda x, p=problem: torch.stack([p.value(row) for row in x])  # noqa: E731
        found = secant.minimize(fun, x0, method=method, batch=True)
        for i in range(3):
            one = secant.minimize(problem.value, x0[i], method=method)
            solved[0] += problem.excess(float(found.fun[i])) <= 1e-5
            solved[1] += problem.excess(float(one.fun)) <= 1e-5
    assert solved[0] >= solved[1] - 1


# Problems of different sizes ------------------------------------------------------------------------------------------

SIZES = (3, 1, 7, 4)


def ragged():
    offsets = torch.tensor([0, *SIZES]).cumsum(0)
    draw = torch.Generator().manual_seed(5)
    x0, center = (torch.randn(int(offsets[-1]), dtype=F64, generator=draw) for _ in range(2))
    return x0, center, offsets


def sums(values, offsets):
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    return torch.zeros(len(offsets) - 1, dtype=values.dtype).index_add(0, rows, values)


@pytest.mark.parametrize("method", ["l-bfgs", "l-bfgs-b", *METHODS])
@pytest.mark.parametrize("how", ["all", "index", "given"])
def test_problems_of_different_sizes_are_those_of_each_size(method, how):
    x0, center, offsets = ragged()
    bounds = {"bounds": (-0.5, torch.full_like(x0, 0.75))} if method == "l-bfgs-b" else {}
    term = lambda x, c: (x - c).cosh() + 0.1 * (x - c) ** 4  # noqa: E731
    lengths, places = offsets.diff(), offsets[:-1]

    def whole(x):
        assert x.shape == x0.shape
        return sums(term(x, center), offsets)

    def some(x, *, index, offsets):
        own = torch.cat([torch.arange(int(places[i]), int(places[i] + lengths[i])) for i in index])
        assert len(x) == len(own) == int(offsets[-1])
        return sums(term(x, center[own]), offsets)

    def slope(x):
        return (x - center).sinh() + 0.4 * (x - center) ** 3

    options = {"gtol": 1e-8, "ftol": 0.0}
    fun, jac = (some if how == "index" else whole), (slope if how == "given" else None)
    found = secant.minimize(fun, x0, method=method, jac=jac, batch=True, offsets=offsets, options=options, **bounds)
    assert found.x.shape == found.jac.shape == x0.shape
    assert found.fun.shape == found.status.shape == (4,)
    assert bool(found.success.all())
    for i, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        side = {"bounds": (-0.5, torch.full((b - a,), 0.75, dtype=F64))} if bounds else {}
        alone = secant.minimize(
            lambda x, a=a, b=b: term(x, center[a:b]).sum(-1), x0[None, a:b], method=method, batch=True,
            options=options, **side,
        )  # fmt: skip
        # Sums over a row of another length differ by roundings; at the end |g| <= 1e-8 and the curvature is >= 1.
        torch.testing.assert_close(found.x[a:b], alone.x[0], rtol=0, atol=2e-8)
        assert found.status[i] == alone.status[0]


@pytest.mark.parametrize("offsets", [[0, 3], [0, 3, 3, 15], [1, 15], [0.0, 15.0], 15, [0, 20]])
def test_wrong_offsets_are_named(offsets):
    x0, _, right = ragged()
    with pytest.raises(ValueError, match="offsets: expected B \\+ 1 integers that increase from 0 to 15"):
        secant.minimize(lambda x: sums(x**2, right), x0, batch=True, offsets=offsets)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": False}, "offsets: expected None without batch=True"),
        ({"x0": torch.zeros(2, 3)}, r"x0: expected shape \(total,\)"),
        ({"jac": lambda x: x[:2]}, r"jac: expected a tensor \(15,\)"),
        ({"method": "newton", "hess": hessian}, "hess: expected None with offsets"),
    ],
)
def test_wrong_arguments_of_ragged_problems_are_named(change, words):
    x0, _, offsets = ragged()
    given = {"x0": x0, "batch": True, **change}
    with pytest.raises((TypeError, ValueError), match=words):
        secant.minimize(lambda x: sums(x**2, offsets), offsets=offsets, **given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "bfgs", "hess": hessian}, "hess: expected None: 'bfgs' uses no second derivatives"),
        ({"method": "newton", "hess": lambda x: x}, r"hess: expected a tensor \(B, n, n\) = \(3, 2, 2\)"),
        ({"method": "newton", "hess": 3}, "hess: expected None or a function"),
        ({"method": "newton", "hessp": hessian}, "hessp: expected None with batch=True"),
        ({"method": "newton", "jac": lambda x: with_gradient(x.detach())[1]}, "jac: expected a gradient that autograd"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        secant.minimize(rosenbrock, torch.zeros(3, 2, dtype=F64), **change, batch=True)


# vmap -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [secant.minimize, secant.least_squares])
def test_vmap_is_told_of_batch(call):
    fun = (lambda x: (x**2).sum()) if call is secant.minimize else (lambda x: x)
    with pytest.raises(ValueError, match=r"x0: expected a tensor outside of torch.func transforms .*batch=True"):
        torch.func.vmap(lambda x: call(fun, x).x)(torch.ones(3, 2))
