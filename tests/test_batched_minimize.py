"""`minimize(batch=True)`: the minima that scipy finds, each problem as if it were alone, and failures as data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import secant
from secant import Status
from secant.benchmarks import mgh

F64 = torch.float64


def rosenbrock(x):
    return (100.0 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1.0 - x[:, :-1]) ** 2).sum(-1)


def with_gradient(x):
    r, q = x[:, 1:] - x[:, :-1] ** 2, 1.0 - x[:, :-1]
    zero = torch.zeros_like(x[:, :1])
    g = torch.cat([zero, 200.0 * r], 1) + torch.cat([-400.0 * r * x[:, :-1] - 2.0 * q, zero], 1)
    return (100.0 * r * r + q * q).sum(-1), g


def starts(b, n, seed=0):
    return 4.0 * torch.rand(b, n, dtype=F64, generator=torch.Generator().manual_seed(seed)) - 2.0


def test_minima_are_those_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    x0 = starts(40, 6)
    found = secant.minimize(rosenbrock, x0, batch=True)
    assert bool(found.success.all())
    for i, x in enumerate(x0.numpy()):
        want = optimize.minimize(optimize.rosen, x, jac=optimize.rosen_der, method="L-BFGS-B")
        # Both go to one of two minima, 0 and 3.97 at n = 6; which of them is the path's affair.
        assert min(abs(float(found.fun[i]) - f) for f in (want.fun, 0.0, 3.973940500930295)) < 1e-6
    assert found.x.shape == found.jac.shape == (40, 6)
    assert {found.fun.shape, found.status.shape, found.nit.shape, found.nfev.shape} == {(40,)}
    torch.testing.assert_close(found.fun, rosenbrock(found.x), rtol=1e-14, atol=1e-300)
    assert float(found.jac.abs().max()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("how", ["autograd", "given"])
def test_a_problem_ends_where_it_ends_alone(dtype, how):
    """Bit for bit, with a function of elementwise operations and short sums; a permutation permutes."""
    x0 = starts(130, 5).to(dtype)
    fun, jac = (rosenbrock, None) if how == "autograd" else (with_gradient, True)
    whole = secant.minimize(fun, x0, jac=jac, batch=True)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    mixed = secant.minimize(fun, x0[order], jac=jac, batch=True)
    for name in ("x", "fun", "jac", "status", "nit", "nfev"):
        assert torch.equal(whole[name][order], mixed[name]), name
    for i in (0, 64, 129):
        alone = secant.minimize(fun, x0[i : i + 1], jac=jac, batch=True)
        for name in ("x", "fun", "jac", "status", "nit", "nfev"):
            assert torch.equal(whole[name][i : i + 1], alone[name]), name
    assert len(set(whole.nfev.tolist())) > 10


def test_it_is_the_lbfgs_of_one_problem():
    """The same steps as without batch, to rounding, as long as rounding does not tell."""
    x0 = starts(6, 4)
    options = {"maxiter": 6, "maxcor": 5, "ftol": 0.0}
    found = secant.minimize(rosenbrock, x0, batch=True, options=options)
    for i in range(6):
        one = secant.minimize(lambda x: rosenbrock(x[None])[0], x0[i], options=options)
        torch.testing.assert_close(found.x[i], one.x, rtol=1e-6, atol=1e-8)
        assert int(found.nit[i]) == one.nit == 6
        assert found.status[i] == Status.MAX_ITER


def test_what_has_stopped_is_not_evaluated():
    rows = []

    def fun(x, *, index):
        rows.append(len(index))
        assert len(x) == len(index)
        return rosenbrock(x)

    found = secant.minimize(fun, starts(60, 4), batch=True)
    assert sum(rows) == int(found.nfev.sum())
    assert rows[-1] < 10


def test_how_often_the_host_looks_changes_what_is_evaluated_alone():
    rows = []

    def fun(x, *, index):
        rows.append(len(index))
        return rosenbrock(x)

    want = secant.minimize(rosenbrock, starts(60, 4), batch=True)
    found = secant.minimize(fun, starts(60, 4), batch=True, options={"check_every": 7})
    for name in ("x", "fun", "status", "nit", "nfev"):
        assert torch.equal(found[name], want[name]), name
    assert sum(rows) > int(found.nfev.sum())
    assert len(set(rows[1:8])) == 1  # the first is at the starts
    for options, given in (({"check_every": 0}, {"batch": True}), ({"check_every": 7}, {})):
        with pytest.raises(ValueError, match="options"):
            secant.minimize(rosenbrock, starts(2, 2), options=options, **given)


def test_ends_of_all_kinds_touch_nobody_else():
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
                rosenbrock(x),
            ]
        )
        kinds = torch.arange(len(x)) % 7
        return values[kinds, torch.arange(len(x))]

    x0 = torch.tensor([[-1.2, 1.0], [0, 0], [1, 1], [-3, 0], [0, 0], [3, 1], [-1.2, 1.0]], dtype=F64)
    found = secant.minimize(fun, x0, batch=True, options={"maxiter": 60})
    kinds = [Status(s) for s in found.status.tolist()]
    assert kinds[0].ok
    assert kinds[1] is kinds[2] is Status.CONVERGED
    assert kinds[3] is Status.NOT_FINITE
    assert kinds[4] in (Status.MAX_ITER, Status.MAX_EVAL, Status.STALLED)
    assert float(found.fun[4]) < -1e6
    assert kinds[5].ok
    torch.testing.assert_close(found.x[5], torch.tensor([1.0, 0.0], dtype=F64), rtol=0, atol=1e-4)
    assert torch.equal(found.x[1:4], x0[1:4])
    alone = secant.minimize(rosenbrock, x0[:1], batch=True, options={"maxiter": 60})
    for i in (0, 6):
        assert torch.equal(found.x[i], alone.x[0])
    assert bool(found.x.isfinite().all())
    assert "1 not_finite" in found.message


def test_the_problems_of_more_garbow_and_hillstrom():
    """Many starts of each problem are solved as often as one by one."""
    for problem in mgh.PROBLEMS[:12]:
        scale = torch.tensor([[1.0], [1.1], [0.9]], dtype=F64)
        x0 = problem.start * scale
        fun = lambda x, p=problem: torch.stack([p.value(row) for row in x])  # noqa: E731
        found = secant.minimize(fun, x0, batch=True)
        for i in range(3):
            one = secant.minimize(problem.value, x0[i])
            solved = [problem.excess(float(v)) <= 1e-5 for v in (found.fun[i], one.fun)]
            assert solved[0] >= solved[1], problem.name


def test_arrays_in_arrays_out():
    found = secant.minimize(rosenbrock, starts(3, 3).numpy(), batch=True)
    assert all(isinstance(found[name], np.ndarray) for name in ("x", "fun", "jac", "status", "success", "nfev"))


def test_a_part_of_a_history():
    history = secant.LBFGSHistory(4, 3, batch=5, dtype=F64)
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        s = torch.randn(5, 4, generator=draw, dtype=F64)
        history.append(s, 2.0 * s + 0.1 * torch.randn(5, 4, generator=draw, dtype=F64))
    g = torch.randn(5, 4, generator=draw, dtype=F64)
    places = torch.tensor([4, 0, 2])
    part = history.take(places)
    assert torch.equal(part.direction(g[places]), history.direction(g)[places])
    before = history.s.clone()
    part.append(g[places], g[places])
    assert torch.equal(history.s, before)
    with pytest.raises(ValueError, match="take: self: expected a history with batch=B"):
        secant.LBFGSHistory(4, 3).take(places)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x0": torch.ones(3)}, r"x0: expected shape \(B, n\)"),
        ({"method": "cubic"}, "method: expected None or one of l-bfgs, .* with batch=True"),
        ({"bounds": [(0, 1)] * 3}, "bounds"),
        ({"callback": print}, "callback: expected None with batch=True"),
        ({"fun": lambda x: x.sum()}, r"fun: expected a real tensor \(B,\) of B = 3 values"),
        ({"fun": lambda x: x.detach().sum(-1)}, "fun: expected a tensor that autograd can follow"),
        ({"fun": rosenbrock, "jac": True}, r"fun: expected a pair \(f, g\)"),
        ({"fun": rosenbrock, "jac": lambda x: x[0]}, r"jac: expected a tensor \(3, 2\)"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    given = {"fun": rosenbrock, "x0": torch.zeros(3, 2, dtype=F64), **change}
    with pytest.raises((TypeError, ValueError), match=words):
        secant.minimize(**given, batch=True)
