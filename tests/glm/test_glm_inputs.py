"""Features and targets far from zero, known offsets, memory of other layouts, singular and overflowing problems."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import optimize

import secant
from secant.glm.arguments import _shift
from secant.result import Status

RNG = np.random.default_rng(0)
X = RNG.standard_normal((400, 3))
OFFSET = RNG.standard_normal(400)
Z = X @ np.array([0.5, -0.3, 0.2]) + 0.1 + OFFSET
TARGETS = {
    "squared": Z + 0.1 * RNG.standard_normal(400),
    "huber": Z + RNG.standard_normal(400),
    "logistic": (RNG.random(400) < 1 / (1 + np.exp(-Z))).astype(float),
    "poisson": RNG.poisson(np.exp(Z)).astype(float),
    "gamma": RNG.gamma(2.0, np.exp(Z) / 2.0),
    "tweedie": RNG.poisson(np.exp(Z)) * RNG.gamma(2.0, 0.5, 400),
}


def test_a_time_stamp_as_feature(solver):
    """y = 3 + 0.002 t, t in milliseconds since 1970: the slope to the last digits, and a status that says so."""
    t = 1.6e12 + 1000.0 * np.arange(2000)
    result = secant.glm.fit(t[:, None], 3 + 0.002 * t, loss="squared", solver=solver)
    assert result.status == Status.CONVERGED
    # Targets of 3.2e9 are rounded to 5e-7, and their sum to more; their spread is 1e6.
    assert float(result.coef) == pytest.approx(0.002, rel=1e-12)
    assert float(result.intercept) + 0.002 * 1.6e12 == pytest.approx(3 + 0.002 * 1.6e12, rel=1e-12)


@pytest.mark.parametrize("loss", ["squared", "huber", "logistic", "poisson", "gamma", "tweedie"])
@pytest.mark.parametrize("far", [1e3, -1e4])
def test_features_far_from_zero_in_float32(loss, far, solver):
    """Rounding X to float32 changes it by 6e-8 far; the answer must not change by more than that makes of it."""
    x = (X + far).astype(np.float32)
    want = secant.glm.fit(x.astype(float) - far, TARGETS[loss], loss=loss, tol=1e-10)
    result = secant.glm.fit(x, TARGETS[loss], loss=loss, solver=solver)
    assert result.status == Status.CONVERGED
    assert np.abs(result.coef.numpy() - want.coef.numpy()).max() < 2e-4 * np.abs(want.coef.numpy()).max()
    z = (x.astype(float) @ result.coef.double().numpy()) + float(result.intercept)
    right = (x.astype(float) - far) @ want.coef.numpy() + float(want.intercept)
    # The intercept alone, about 1e4, is known to 5e-4.
    assert np.abs(z - right).max() < 2e-3


def test_all_classes_and_a_start_far_from_zero(solver):
    classes = np.digitize(Z, [-1.0, 1.0])
    want = secant.glm.fit(X, classes, loss="multinomial", l2=0.5, tol=1e-10)
    result = secant.glm.fit(X + 1e7, classes, loss="multinomial", l2=0.5, tol=1e-9, solver=solver)
    assert result.status == Status.CONVERGED
    assert torch.allclose(result.coef, want.coef, atol=1e-6)
    again = secant.glm.fit(X + 1e7, classes, loss="multinomial", l2=0.5, start=result, max_iter=0)
    assert again.grad_norm < 1e-6
    assert torch.allclose(again.intercept, result.intercept, rtol=1e-12)


def test_sparse_columns_far_from_zero():
    x = X + np.array([1e7, 0.0, 0.0])
    x[::2, 1:] = 0.0
    csr = torch.from_numpy(x).to_sparse_csr()
    dense, sparse = (secant.glm.fit(data, TARGETS["logistic"], tol=1e-8) for data in (x, csr))
    assert dense.status == sparse.status == Status.CONVERGED
    assert torch.allclose(sparse.coef, dense.coef, atol=1e-7)


def test_which_features_are_centred():
    one = torch.ones(400, 1, dtype=torch.float64)
    assert _shift(torch.from_numpy(X)) is None
    assert _shift(torch.from_numpy(X + 1e4)) is None
    assert _shift(one) is None
    assert _shift(torch.from_numpy(X).to_sparse_csr()) is None
    shift = _shift(torch.cat([torch.from_numpy(X), 1e9 * one], 1))
    assert shift.tolist() == [0.0, 0.0, 0.0, 1e9]


@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_an_offset_is_a_known_term(loss, fit_intercept, solver):
    """The minimum is that of the definition, by scipy."""
    y, weight, l2 = TARGETS[loss], RNG.random(400) + 0.1, 0.3

    def objective(theta):
        z = torch.tensor(X @ theta[:3] + (theta[3] if fit_intercept else 0.0) + OFFSET)
        one = torch.ones(1, dtype=torch.float64)
        value, _, _ = secant.ops.glm_value_grad(
            z[:, None], torch.tensor(y), one, loss=loss, sample_weight=torch.tensor(weight)
        )
        return float(value) + l2 / 2 * theta[:3] @ theta[:3]

    options = {"loss": loss, "l2": l2, "sample_weight": weight, "offset": OFFSET, "fit_intercept": fit_intercept}
    result = secant.glm.fit(X, y, tol=1e-10, solver=solver, **options)
    assert result.status == Status.CONVERGED
    theta = np.append(result.coef.numpy(), [float(result.intercept)] * fit_intercept)
    assert result.value == pytest.approx(objective(theta), rel=1e-12)
    found = optimize.minimize(objective, np.zeros(len(theta)), tol=1e-10)
    assert result.value <= found.fun + 1e-12 * abs(found.fun)
    assert np.allclose(theta, found.x, atol=1e-4)
    sparse = secant.glm.fit(torch.from_numpy(X).to_sparse_csr(), y, tol=1e-10, solver=solver, **options)
    assert torch.allclose(sparse.coef, result.coef, atol=1e-8)


def test_an_offset_of_every_class(solver):
    classes, offset = np.digitize(Z, [-1.0, 1.0]), RNG.standard_normal((400, 3))
    result = secant.glm.fit(X, classes, loss="multinomial", l2=0.4, offset=offset, solver=solver, tol=1e-10)
    assert result.status == Status.CONVERGED
    p = torch.softmax(torch.tensor(X) @ result.coef + result.intercept + torch.tensor(offset), 1)
    r = p - torch.nn.functional.one_hot(torch.tensor(classes), 3)
    grad = torch.tensor(X).mT @ r + 0.4 * result.coef
    assert max(float(grad.abs().max()), float(r.sum(0).abs().max())) / 400 <= 1.0001e-10 + 1e-15 * 400


def test_an_exposure_is_its_logarithm():
    exposure = np.exp(OFFSET)
    one = secant.glm.fit(X, TARGETS["poisson"], loss="poisson", offset=OFFSET, tol=1e-12)
    rates = secant.glm.fit(X, TARGETS["poisson"] / exposure, loss="poisson", sample_weight=exposure, tol=1e-12)
    assert torch.allclose(one.coef, rates.coef, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e200, 1e300, 1e-200])
@pytest.mark.parametrize("loss", ["squared", "logistic", "poisson", "huber"])
def test_products_that_overflow_end_in_a_status(loss, scale, solver):
    y = np.minimum(TARGETS["poisson"], 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", secant.SingularWarning)  # squares of 1e-200 are zero
        result = secant.glm.fit(X * scale, y, loss=loss, solver=solver)
    assert result.status in (Status.STALLED, Status.CONVERGED, Status.MAX_ITER)
    assert torch.isfinite(result.coef).all()


def test_arrays_of_any_memory():
    y = TARGETS["logistic"]
    want = secant.glm.fit(X, y, sample_weight=np.arange(400.0) + 1)
    reverse = X[::-1].copy()[::-1]
    assert reverse.strides[0] < 0
    for x in (reverse, X[:, ::-1].copy()[:, ::-1], X.astype(">f8"), np.asfortranarray(X), np.repeat(X, 2, 0)[::2]):
        for target in (y[::-1].copy()[::-1], y.astype(">f4"), y.astype(bool), y.astype(np.int8)):
            weight = (np.arange(400.0) + 1)[::-1].copy()[::-1].astype(">f8")
            result = secant.glm.fit(x, target, sample_weight=weight)
            assert torch.allclose(result.coef, want.coef, rtol=1e-9)
    assert torch.allclose(secant.glm.fit(torch._neg_view(-torch.from_numpy(X)), y).coef, secant.glm.fit(X, y).coef)
    one = np.ones((1, 2))[:, ::-1]
    assert secant.glm.fit(one, [2.0], loss="squared", l2=1.0).coef.tolist() == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("rows", [400, 4])
def test_the_smallest_of_many_minimisers(fit_intercept, rows):
    x = np.column_stack([X, X[:, 0] - 2 * X[:, 1], np.full(400, 7.0), X[:, 2]])[:rows]
    y, c = TARGETS["squared"][:rows], RNG.random(rows) + 0.1
    with pytest.warns(secant.SingularWarning, match="one of many"):
        other = secant.glm.fit(x, y, loss="squared", sample_weight=c, fit_intercept=fit_intercept)
    result = secant.glm.fit(x, y, loss="squared", sample_weight=c, fit_intercept=fit_intercept, solver="min-norm")
    assert result.status == Status.CONVERGED
    mean, level = (np.average(x, 0, c), np.average(y, weights=c)) if fit_intercept else (0.0, 0.0)
    root = np.sqrt(c)[:, None]
    want = np.linalg.pinv((x - mean) * root, rcond=1e-12) @ ((y - level)[:, None] * root)
    assert np.allclose(result.coef.numpy(), want[:, 0], atol=1e-9)
    assert result.value == pytest.approx(other.value, abs=1e-9)
    assert result.coef.norm() <= other.coef.norm() + 1e-12


def test_no_warning_where_there_is_one_minimiser():
    x = np.column_stack([X, X[:, 0] - 2 * X[:, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", secant.SingularWarning)
        secant.glm.fit(X, TARGETS["squared"], loss="squared")
        secant.glm.fit(x, TARGETS["squared"], loss="squared", l2=1e-3)


def test_no_iteration_is_the_start(solver):
    result = secant.glm.fit(X, TARGETS["logistic"], max_iter=0, solver=solver)
    assert result.status == Status.MAX_ITER
    assert result.n_iter == 0
    assert not result.coef.any()
    start = (np.array([0.1, 0.2, 0.3]), 0.4)
    result = secant.glm.fit(X, TARGETS["logistic"], max_iter=0, start=start, solver=solver)
    assert result.coef.tolist() == [0.1, 0.2, 0.3]
    assert float(result.intercept) == 0.4


def test_the_means_are_those_of_rows_with_weight(solver):
    x = np.concatenate([np.zeros(390), 1e8 + np.arange(10.0)])[:, None]
    weight = np.repeat([0.0, 1.0], [390, 10])
    y = 2 * (x[:, 0] - 1e8) + 1
    result = secant.glm.fit(x, y, loss="squared", sample_weight=weight, solver=solver)
    assert result.status == Status.CONVERGED
    assert float(result.coef) == pytest.approx(2.0, rel=1e-9)


@pytest.mark.parametrize("loss", ["poisson", "gamma", "tweedie"])
@pytest.mark.parametrize("far", [690.0, -690.0])
def test_logarithms_far_from_zero(loss, far, solver):
    """A scale of the targets, or an offset, is the intercept's; Newton's method does not walk there."""
    want = secant.glm.fit(X, TARGETS[loss], loss=loss, tol=1e-10, solver=solver)
    shifted = secant.glm.fit(X, TARGETS[loss], loss=loss, offset=np.full(400, far), tol=1e-10, solver=solver)
    assert shifted.status == Status.CONVERGED
    assert torch.allclose(shifted.coef, want.coef, atol=1e-7)
    assert float(shifted.intercept) == pytest.approx(float(want.intercept) - far, abs=1e-6)


def test_a_gradient_that_overflows_is_a_status():
    result = secant.glm.fit(X * 1e307, TARGETS["logistic"])
    assert result.status == Status.STALLED
    assert torch.isfinite(result.coef).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"start": 3}, ValueError, "start: expected a GLMResult or"),
        ({"start": (1,)}, ValueError, "start: expected a GLMResult or"),
        ({"start": (np.full(3, np.nan), 0.0)}, ValueError, "start: expected coef of finite numbers"),
        ({"callback": 3}, TypeError, "callback: expected a function or None"),
        ({"fit_intercept": "yes"}, ValueError, "fit_intercept: expected True or False"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=f"glm.fit: {message}"):
        secant.glm.fit(X, TARGETS["logistic"], **change)


def test_numbers_of_more_bits():
    wide = secant.glm.fit(X, TARGETS["logistic"].astype(np.longdouble))
    assert torch.equal(wide.coef, secant.glm.fit(X, TARGETS["logistic"]).coef)
