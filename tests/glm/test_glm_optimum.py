"""The optimum: that of scikit-learn on its data sets, and that of scipy for every loss and solver."""

from __future__ import annotations

import functools
import importlib

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import secant
from secant.result import Status

LOSSES = ("squared", "logistic", "poisson", "huber", "multinomial")


def test_gradient_is_within_tol_and_no_lower_value_exists(problem, oracle, flat, solver):
    for loss in LOSSES:
        x, y = problem(loss)
        weight = np.random.default_rng(1).random(len(y)) + 0.1
        for l2, c in ((0.0, None), (3.0, weight)):
            tol = 1e-9
            result = secant.glm.fit(x, y, loss=loss, l2=l2, sample_weight=c, tol=tol, solver=solver)
            assert result.status == Status.CONVERGED, (loss, l2, result.message)
            objective = oracle(x, y, loss, l2=l2, weight=c)
            value, grad = objective(flat(result))
            total = len(y) if c is None else c.sum()
            # A thousand roundings of sums of magnitude 1e2 stay below a tenth of tol.
            assert np.abs(grad).max() / total <= 1.1 * tol, (loss, l2)
            assert result.grad_norm <= tol
            assert result.value == pytest.approx(value, rel=1e-13)
            best = minimize(objective, np.zeros(grad.size), jac=True, method="BFGS", options={"gtol": 1e-6})
            # The gradient at scipy's end allows for g.H^-1 g / 2 above the minimum: 1e-6^2 times the conditioning.
            assert value <= best.fun + 1e-9 * abs(best.fun), (loss, l2)


@pytest.mark.parametrize("delta", [0.03, 1.0, 30.0, 3000.0])
def test_huber_for_every_delta(problem, oracle, flat, solver, delta):
    """The noise has deviation 30, outliers 2000: from a thousandth of the rows within delta to almost all."""
    x, y = problem("huber")
    result = secant.glm.fit(x, 5.0 + 100.0 * y, loss="huber", delta=delta, tol=1e-10 * delta, solver=solver)
    assert result.status == Status.CONVERGED
    _, grad = oracle(x, 5.0 + 100.0 * y, "huber", delta=delta)(flat(result))
    # x is of the order of ten, so that the rounding of a gradient's sum is a hundredth of this.
    assert np.abs(grad).max() / len(y) <= 1e-10 * delta + 1e-13


def test_squared_is_least_squares(problem, solver):
    x, y = problem("squared")
    result = secant.glm.fit(x, y, loss="squared", tol=1e-12, solver=solver)
    design = np.column_stack([x, np.ones(len(y))])
    want = np.linalg.lstsq(design, y, rcond=None)[0]
    # |w - w*| <= |g| / (N lambda_min of the mean Hessian).
    smallest = np.linalg.eigvalsh(design.T @ design / len(y))[0]
    bound = np.sqrt(len(want)) * 2e-12 / smallest + 1e-12 * np.abs(want).max()
    assert np.abs(np.append(result.coef, result.intercept) - want).max() <= bound


@functools.cache
def optimum_of_scikit_learn(name, fit_intercept, scaled):
    """Features, labels, coefficients (d, K or 1) and intercepts; every gradient below 1e-13 N."""
    datasets, linear_model = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.linear_model")
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    if scaled:
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    model = linear_model.LogisticRegression(solver="newton-cholesky", tol=1e-10, fit_intercept=fit_intercept)
    with importlib.import_module("threadpoolctl").threadpool_limits(1):  # two pools of threads get in each other's way
        model.fit(x, y)
    return x, y, model.coef_.T, model.intercept_


@pytest.mark.parametrize(
    ("name", "fit_intercept", "scaled"),
    [
        ("breast_cancer", True, False),
        ("breast_cancer", False, True),
        ("wine", True, False),
        ("wine", False, True),
        ("digits", True, True),
    ],
)
def test_optimum_of_scikit_learn(name, fit_intercept, scaled, solver, oracle):
    """Coefficients at C = 1 to 1e-8 of the largest, on features as they come (1e-3 to 4e3) or standardised.

    The objective, intercepts eliminated, is l2-strongly convex: |w - w*| <= |g| / l2. L-BFGS on features as they come
    stops short of that: its values no longer tell. There the objective agrees, to |g|^2 / (2 l2) and rounding.
    """
    x, y, want, intercept = optimum_of_scikit_learn(name, fit_intercept, scaled)
    binary = want.shape[1] == 1
    short = solver == "lbfgs" and not scaled
    tol = 1e-6 if short else 1e-12
    result = secant.glm.fit(
        x,
        y.astype(float) if binary else y,
        loss="logistic" if binary else "multinomial",
        l2=1.0,
        tol=tol,
        fit_intercept=fit_intercept,
        solver=solver,
    )
    assert result.grad_norm <= tol, result.message
    coef = result.coef.numpy().reshape(want.shape)
    value, _ = oracle(x, y, "logistic" if binary else "multinomial", l2=1.0)(
        np.vstack([want, np.broadcast_to(intercept, want.shape[1:])])
    )
    assert abs(result.value - value) <= 0.5 * coef.size * (tol * len(y)) ** 2 + 1e-13 * value
    if short:
        return
    bound = max(1e-8 * np.abs(want).max(), tol * len(y) * np.sqrt(coef.size))
    assert np.abs(coef - want).max() <= bound
    if binary:
        assert float(result.intercept) == pytest.approx(intercept[0], abs=1e-8 + 1e2 * bound)
    else:  # one number added to all of them changes nothing
        got = result.intercept.numpy()
        assert np.abs((got - got.mean()) - (intercept - intercept.mean())).max() <= 1e-8 + 1e2 * bound


def test_auto_chooses_by_shape():
    rng = np.random.default_rng(0)
    y = rng.random(30).round()
    small, wide = rng.standard_normal((30, 3)), rng.standard_normal((30, 3000))
    assert secant.glm.fit(small, y, l2=1.0).solver == "newton-cholesky"
    assert secant.glm.fit(wide, y, l2=1.0).solver == "newton-cg"
    sparse = torch.from_numpy(small).to_sparse_csr()
    assert secant.glm.fit(sparse, y, l2=1.0).solver == "newton-cg"


def test_many_rows_start_on_a_sample(problem, oracle, flat):
    x, y = problem("logistic", n=20_000, d=20)
    result = secant.glm.fit(x, y, l2=0.5, tol=1e-10, solver="newton-cholesky")
    assert result.status == Status.CONVERGED
    seen = [one.rows for one in result.history]
    assert min(seen[1:4]) < 20_000 // 4
    assert result.n_iter == seen[seen.index(min(seen)) :].count(20_000) - 1  # the first of them is the evaluation
    assert result.n_iter < len(seen) / 2 + 2
    _, grad = oracle(x, y, "logistic", l2=0.5)(flat(result))
    assert np.abs(grad).max() / len(y) <= 1.01e-10
    cold = secant.glm.fit(x, y, l2=0.5, tol=1e-10, solver="newton-cg")
    # Both gradients are within tol, and the Hessian is at least l2 / N: far more, as all scales are of order one.
    assert torch.allclose(cold.coef, result.coef, rtol=1e-7, atol=1e-8)


def test_a_sample_that_misleads_is_given_up():
    """Every sampled row has its label flipped: its optimum is worse than zero, and the fit starts from zero."""
    rng = np.random.default_rng(0)
    n, d = 40_000, 10
    x = rng.standard_normal((n, d))
    w = rng.standard_normal(d)
    y = (rng.random(n) < 1.0 / (1.0 + np.exp(-(x @ w)))).astype(float)
    probe = secant.glm.fit(x, y, solver="newton-cholesky")
    stride = n // min(one.rows for one in probe.history)
    y[::stride] = 1.0 - y[::stride]
    x[::stride] *= 3.0
    result = secant.glm.fit(x, y, solver="newton-cholesky", tol=1e-9)
    first = result.history[0]
    assert next(one for one in result.history[1:] if one.rows == n).value == first.value
    assert result.status == Status.CONVERGED
    assert torch.allclose(result.coef, secant.glm.fit(x, y, solver="lbfgs", tol=1e-9).coef, atol=1e-6)
