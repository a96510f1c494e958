"""What cannot be fitted is refused by name or reported; nothing is silently wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import secant
from secant.result import Status

X = np.random.default_rng(0).standard_normal((120, 4))
Z = X @ np.array([1.0, -2.0, 0.5, 0.0]) + 0.3
SIDE = (Z > 0).astype(float)
NOISY = (np.random.default_rng(1).random(120) < 1.0 / (1.0 + np.exp(-Z))).astype(float)


def test_separable_classes_have_no_minimum(solver):
    result = secant.glm.fit(X, SIDE, solver=solver)
    assert result.status == Status.NO_MINIMUM
    assert not result.converged
    assert "separates" in result.message
    # Also when it is the iterations that end it, and for all classes of a multinomial model.
    assert secant.glm.fit(X, SIDE, solver=solver, max_iter=8).status == Status.NO_MINIMUM
    classes = np.digitize(Z, [-1.0, 1.0])
    line = np.column_stack([Z, Z**2])
    assert secant.glm.fit(line, classes, loss="multinomial", solver=solver).status == Status.NO_MINIMUM


@pytest.mark.parametrize("solver", ["newton-cholesky", "newton-cg"])
def test_quasi_separable_classes_have_no_minimum(solver):
    """One column separates the rows where it is not zero; the others overlap, and have a finite optimum."""
    x = np.column_stack([X, np.where(np.arange(120) < 20, 1.0 + np.abs(X[:, 0]), 0.0)])
    y = np.where(np.arange(120) < 20, 1.0, NOISY)
    assert secant.glm.fit(x, y, solver=solver).status == Status.NO_MINIMUM
    # One row on the wrong side, and there is a minimum.
    y[0] = 0.0
    assert secant.glm.fit(x, y, solver=solver).status == Status.CONVERGED


def test_a_penalty_makes_separable_classes_a_problem(solver):
    result = secant.glm.fit(X, SIDE, l2=1e-4, solver=solver)
    assert result.status == Status.CONVERGED
    assert result.grad_norm <= 1e-6


def test_counts_of_zero_have_no_minimum_without_an_intercept(solver):
    result = secant.glm.fit(np.abs(X), np.zeros(120), loss="poisson", fit_intercept=False, solver=solver)
    assert result.status == Status.NO_MINIMUM


def test_overlapping_classes_are_not_called_separable(solver):
    for tol in (0.2, 1e-2, 1e-10):
        result = secant.glm.fit(X, NOISY, tol=tol, solver=solver)
        assert result.status == Status.CONVERGED
        assert result.grad_norm <= tol


def test_iterations_run_out(solver):
    result = secant.glm.fit(X, NOISY, l2=1.0, tol=1e-13, max_iter=2, solver=solver)
    assert result.status == Status.MAX_ITER
    assert result.n_iter == 2
    assert "max_iter = 2" in result.message
    assert result.grad_norm > 1e-13


def test_a_tolerance_below_rounding_is_reported(solver):
    result = secant.glm.fit(X.astype(np.float32), NOISY, l2=1.0, tol=1e-12, solver=solver)
    assert result.status == Status.STALLED
    assert "float32" in result.message
    # It got as far as float32 can: a gradient is a mean of terms of order one.
    assert result.grad_norm < 16 * np.finfo(np.float32).eps


def test_collinear_and_constant_columns(solver):
    """The minimiser is not unique; its predictions are, and they are those without the superfluous columns."""
    x = np.column_stack([X, X[:, 0] + 2.0 * X[:, 1], np.full(120, 7.0), np.zeros(120)])
    for loss, y in (("logistic", NOISY), ("squared", Z), ("poisson", NOISY)):
        result = secant.glm.fit(x, y, loss=loss, tol=1e-9, solver=solver)
        assert result.status == Status.CONVERGED, result.message
        plain = secant.glm.fit(X, y, loss=loss, tol=1e-9, solver=solver)
        got = x @ result.coef.numpy() + float(result.intercept)
        # Gradients of 1e-9 against a mean curvature of at least 0.05 in the directions that the data span.
        assert np.abs(got - X @ plain.coef.numpy() - float(plain.intercept)).max() < 1e-6
        assert result.coef[-1] == 0.0


def test_fewer_rows_than_columns(solver):
    x, y = np.random.default_rng(0).standard_normal((10, 30)), Z[:10]
    result = secant.glm.fit(x, y, loss="squared", solver=solver, tol=1e-10)
    assert result.status == Status.CONVERGED
    assert np.abs(x @ result.coef.numpy() + float(result.intercept) - y).max() < 1e-8
    assert secant.glm.fit(x, SIDE[:10], solver=solver).status == Status.NO_MINIMUM
    assert secant.glm.fit(x, SIDE[:10], l2=0.1, solver=solver).status == Status.CONVERGED


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_of_x_that_are_not_finite(solver, value):
    for column in (0, 3):
        x = X.copy()
        x[17, column] = value
        with pytest.raises(
            ValueError, match=rf"glm.fit: X: expected finite values, got -?(nan|inf) in row 17, column {column}"
        ):
            secant.glm.fit(x, NOISY, solver=solver)
        with pytest.raises(ValueError, match=r"glm.fit: X: expected finite values"):
            secant.glm.fit(torch.from_numpy(x).to_sparse_csr(), NOISY)


def test_one_class():
    for y, name in ((np.zeros(120), "zeros"), (np.ones(120), "ones")):
        result = secant.glm.fit(X, y, l2=1.0)
        assert result.status == Status.NO_MINIMUM, name
        assert "the intercept falls forever" in result.message
        assert torch.isfinite(result.coef).all()
        assert (torch.sigmoid(torch.tensor(X) @ result.coef + result.intercept) - y[0]).abs().max() < 1e-4
        # Without an intercept there is a minimum.
        assert secant.glm.fit(X, y, l2=1.0, fit_intercept=False).status == Status.CONVERGED
    assert secant.glm.fit(X, NOISY, sample_weight=NOISY).status == Status.NO_MINIMUM
    for l2 in (0.0, 1.0):
        assert secant.glm.fit(X, np.zeros(120), loss="poisson", l2=l2).status == Status.NO_MINIMUM
        result = secant.glm.fit(X, np.where(NOISY > 0, 2, 0), loss="multinomial", l2=l2)
        assert result.status == Status.NO_MINIMUM
        # What is left is the problem of the two classes: coefficients of half the size, of either sign, of (2, 0).
        two = secant.glm.fit(X, NOISY, l2=l2 / 2)
        assert torch.allclose(result.coef[:, 2] - result.coef[:, 0], two.coef, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"X": X[0]}, ValueError, "X: expected shape"),
        ({"X": X[:0], "y": NOISY[:0]}, ValueError, "X: expected shape"),
        ({"X": X.astype(np.float16)}, TypeError, "X: expected dtype"),
        ({"X": X.astype(complex)}, TypeError, "X: expected dtype"),
        ({"X": "text"}, TypeError, "X: expected a tensor or an array"),
        ({"X": torch.from_numpy(X).to_sparse()}, ValueError, "X: expected a dense or CSR tensor"),
        ({"y": NOISY[:-1]}, ValueError, r"y: expected shape \(120,\)"),
        ({"y": NOISY[:, None]}, ValueError, r"y: expected shape \(120,\)"),
        ({"y": np.where(NOISY > 0, np.nan, 0.0)}, ValueError, "y: expected finite values, got nan at"),
        ({"y": NOISY + 0.5}, ValueError, r"y: expected values in \[0, 1\]"),
        ({"y": NOISY - 1.0}, ValueError, r"y: expected values in \[0, 1\]"),
        ({"y": NOISY - 1.0, "loss": "poisson"}, ValueError, "y: expected values >= 0"),
        ({"loss": "multinomial"}, TypeError, "y: expected integer classes"),
        ({"y": SIDE.astype(int) - 1, "loss": "multinomial"}, ValueError, "y: expected classes 0, 1"),
        ({"y": SIDE.astype(int) * 0, "loss": "multinomial"}, ValueError, "y: expected classes 0, 1"),
        ({"sample_weight": -np.ones(120)}, ValueError, "sample_weight: expected finite numbers >= 0, got -1.0 at 0"),
        ({"sample_weight": np.full(120, np.nan)}, ValueError, "sample_weight: expected finite numbers >= 0, got nan"),
        ({"sample_weight": np.zeros(120)}, ValueError, "sample_weight: expected at least one positive"),
        ({"sample_weight": np.ones(3)}, ValueError, "sample_weight: expected shape"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of"),
        ({"solver": "sgd"}, ValueError, "solver: expected one of"),
        ({"l2": -1.0}, ValueError, "l2: expected a finite number >= 0"),
        ({"l2": math.inf}, ValueError, "l2: expected a finite number"),
        ({"tol": 0.0}, ValueError, "tol: expected a finite number > 0"),
        ({"delta": 0.0}, ValueError, "delta: expected a finite number > 0"),
        ({"max_iter": -1}, ValueError, "max_iter: expected an integer, 0 or more"),
        ({"max_iter": True}, ValueError, "max_iter: expected an integer, 0 or more"),
        ({"max_cg_iter": 1.5}, ValueError, "max_cg_iter: expected an integer, 1 or more"),
        ({"l2": 10**400}, ValueError, "l2: expected a finite number >= 0"),
        ({"l2": "a"}, ValueError, "l2: expected a finite number >= 0, got str 'a'"),
        ({"l2": True}, ValueError, "l2: expected a finite number >= 0"),
        ({"tol": math.nan}, ValueError, "tol: expected a finite number > 0"),
        ({"delta": 10**400}, ValueError, "delta: expected a finite number > 0"),
        ({"power": 2.0}, ValueError, "power: expected a number between 1 and 2"),
        ({"loss": "gamma"}, ValueError, "y: expected values > 0 for loss 'gamma'"),
        ({"loss": "tweedie", "y": NOISY - 1.0}, ValueError, "y: expected values >= 0 for loss 'tweedie'"),
        ({"offset": np.zeros(3)}, ValueError, r"offset: expected shape \(120,\), got shape \(3,\)"),
        ({"offset": np.full(120, np.inf)}, ValueError, "offset: expected finite values, got inf"),
        ({"solver": "min-norm"}, ValueError, 'solver: expected loss "squared" and dense X'),
        (
            {"X": torch.from_numpy(X).to("meta")},
            TypeError,
            "X: expected a tensor or an array of numbers, got",
        ),
        ({"X": X.astype(object)}, TypeError, "X: expected a tensor or an array of numbers"),
        ({"start": (np.zeros(3), 0.0)}, ValueError, r"start: expected coef of shape \(4,\)"),
        ({"start": (np.zeros(4), np.zeros(1))}, ValueError, r"start: expected intercept of shape \(\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"X": X, "y": NOISY, **change}
    with pytest.raises(error, match=f"glm.fit: {message}"):
        secant.glm.fit(arguments.pop("X"), arguments.pop("y"), **arguments)


def test_an_objective_that_overflows_at_the_start_is_refused():
    with pytest.raises(ValueError, match=r"glm.fit: X, start: expected an objective that is finite at the start"):
        secant.glm.fit(X, NOISY, loss="poisson", start=(np.full(4, 1e4), 0.0))


def test_huge_logits_are_safe(solver):
    """Features of 1e4 and a start that misclassifies: logits of 1e4 on the wrong side."""
    result = secant.glm.fit(
        1e4 * X, NOISY, l2=1e-2, start=(np.array([-1.0, 2.0, -0.5, 0.0]), 0.0), solver=solver, tol=1e-5
    )
    assert result.status == Status.CONVERGED
    cold = secant.glm.fit(1e4 * X, NOISY, l2=1e-2, solver=solver, tol=1e-5)
    assert torch.allclose(result.coef * 1e4, cold.coef * 1e4, atol=1e-3)
