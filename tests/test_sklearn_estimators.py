"""The estimators: scikit-learn's own conventions, its optima and its parameters."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")

from scipy import sparse
from sklearn import datasets, linear_model
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from secant.sklearn import LogisticRegression, PoissonRegressor, Ridge


@parametrize_with_checks([LogisticRegression(), PoissonRegressor(), Ridge()])
def test_conventions_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def cancer():
    return datasets.load_breast_cancer(return_X_y=True)


@pytest.fixture(scope="module")
def wine():
    return datasets.load_wine(return_X_y=True)


def test_importing_the_package_does_not_import_scikit_learn():
    code = "import sys, secant, secant.glm; raise SystemExit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("C", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0, 1: 0.5}])
def test_binary_is_that_of_scikit_learn(cancer, C, class_weight):
    x, y = cancer
    x = StandardScaler().fit_transform(x)
    options = {"C": C, "class_weight": class_weight}
    ours = LogisticRegression(**options, tol=1e-12).fit(x, y)
    theirs = linear_model.LogisticRegression(**options, solver="newton-cholesky", tol=1e-11).fit(x, y)
    # |w - w*| <= C |g|, |g| <= 1e-12 sum c.
    bound = 2e-8 * np.abs(theirs.coef_).max() + C * 1e-8
    assert np.abs(ours.coef_ - theirs.coef_).max() <= bound
    assert ours.intercept_ == pytest.approx(theirs.intercept_, rel=1e-6)
    assert ours.coef_.shape == theirs.coef_.shape
    assert ours.intercept_.shape == theirs.intercept_.shape
    assert ours.n_iter_.shape == theirs.n_iter_.shape
    assert np.array_equal(ours.predict(x), theirs.predict(x))
    for method in ("decision_function", "predict_proba"):
        assert np.allclose(getattr(ours, method)(x), getattr(theirs, method)(x), rtol=1e-5, atol=1e-6)


def test_logarithms_of_probabilities_do_not_underflow(wine):
    x, y = wine
    for target in (y, y == 1):
        model = LogisticRegression(C=1e4, solver="newton-cholesky").fit(x, target)
        log_p = model.predict_log_proba(1e3 * x)
        assert np.isfinite(log_p).all()
        assert log_p.min() < -1e3
        assert np.allclose(np.exp(log_p).sum(1), 1.0)
        assert np.allclose(np.exp(model.predict_log_proba(x)), model.predict_proba(x))


def test_multinomial_is_that_of_scikit_learn(wine):
    x, y = wine
    labels = np.array(["c", "a", "b"])[y]
    weight = np.random.default_rng(0).random(len(y)) + 0.1
    ours = LogisticRegression(C=0.3, tol=1e-12).fit(x, labels, sample_weight=weight)
    theirs = linear_model.LogisticRegression(C=0.3, solver="newton-cholesky", tol=1e-11)
    theirs.fit(x, labels, sample_weight=weight)
    assert list(ours.classes_) == ["a", "b", "c"]
    assert ours.coef_.shape == (3, 13)
    assert np.abs(ours.coef_ - theirs.coef_).max() <= 1e-8 * np.abs(theirs.coef_).max()
    assert np.array_equal(ours.predict(x), theirs.predict(x))
    assert np.allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-6, atol=1e-9)
    assert np.allclose(ours.predict_proba(x).sum(1), 1.0)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_poisson_is_that_of_scikit_learn(fit_intercept):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 5))
    y = rng.poisson(np.exp(x @ rng.standard_normal(5) * 0.5 + 0.2))
    weight = rng.random(400)
    options = {"alpha": 0.3, "fit_intercept": fit_intercept}
    ours = PoissonRegressor(**options, tol=1e-12).fit(x, y, sample_weight=weight)
    theirs = linear_model.PoissonRegressor(**options, solver="newton-cholesky", tol=1e-10)
    theirs.fit(x, y, sample_weight=weight)
    assert np.allclose(ours.coef_, theirs.coef_, rtol=1e-8, atol=1e-10)
    assert ours.intercept_ == pytest.approx(theirs.intercept_, rel=1e-8)
    assert np.allclose(ours.predict(x), theirs.predict(x), rtol=1e-8)
    assert ours.score(x, y, weight) == pytest.approx(theirs.score(x, y, weight), rel=1e-8)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_ridge_is_that_of_scikit_learn(fit_intercept, alpha):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 6)) * np.exp(rng.standard_normal(6)) + 5.0
    y = x @ rng.standard_normal((6, 3)) + rng.standard_normal((200, 3))
    weight = rng.random(200)
    for target in (y, y[:, 0]):
        options = {"alpha": alpha, "fit_intercept": fit_intercept}
        ours = Ridge(**options, tol=1e-11).fit(x, target, sample_weight=weight)
        theirs = linear_model.Ridge(**options, solver="cholesky").fit(x, target, sample_weight=weight)
        assert ours.coef_.shape == theirs.coef_.shape
        assert np.shape(ours.intercept_) == (np.shape(theirs.intercept_) if fit_intercept else target.shape[1:])
        assert np.allclose(ours.coef_, theirs.coef_, rtol=1e-8, atol=1e-9)
        assert np.allclose(ours.predict(x), theirs.predict(x), rtol=1e-8, atol=1e-8)
        assert ours.score(x, target) == pytest.approx(theirs.score(x, target), rel=1e-8)


@pytest.mark.parametrize("solver", ["newton-cholesky", "newton-cg", "lbfgs"])
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array, sparse.csc_array])
def test_sparse_is_dense(wine, solver, kind):
    x, y = wine
    x = np.where(x > np.median(x, axis=0), x / x.max(axis=0), 0.0)
    for model, target in (
        (LogisticRegression(solver=solver, tol=1e-10), y),
        (LogisticRegression(solver=solver, tol=1e-10), y == 1),
        (Ridge(solver=solver, tol=1e-10), y),
        (PoissonRegressor(solver=solver, tol=1e-10, alpha=0.1), y),
    ):
        dense = model.fit(x, target).coef_.copy()
        predicted = model.predict(x)
        model.fit(kind(x), target)
        assert np.allclose(model.coef_, dense, rtol=1e-6, atol=1e-7)
        assert np.allclose(model.predict(kind(x)), predicted, rtol=1e-6)


def test_warm_start(wine):
    """One iteration at a time gets there; without it, every fit begins again."""
    x, y = wine
    for model, target in ((LogisticRegression(), y), (LogisticRegression(), y == 1), (PoissonRegressor(), y)):
        model.set_params(warm_start=True, max_iter=1, solver="newton-cholesky")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for _ in range(40):
                model.fit(x, target)
        assert model.result_status_ == "converged"
        model.set_params(warm_start=False)
        with pytest.warns(ConvergenceWarning, match="max_iter = 1 iterations were not enough"):
            model.fit(x, target)


def test_separable_classes_warn():
    x, y = np.array([[-1.0], [-2.0], [1.0], [3.0]]), np.array([0, 0, 1, 1])
    with pytest.warns(ConvergenceWarning, match="LogisticRegression: the objective has no minimum"):
        model = LogisticRegression(C=np.inf).fit(x, y)
    assert model.result_status_ == "no_minimum"


def test_in_a_pipeline_with_a_grid(cancer):
    x, y = cancer
    search = GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [0.01, 1.0]})
    search.fit(x, y)
    assert search.best_score_ > 0.97
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(again.predict_proba(x), search.predict_proba(x))


def test_float32_stays_float32(cancer):
    x, y = cancer
    x = StandardScaler().fit_transform(x).astype(np.float32)
    model = LogisticRegression().fit(x, y)
    assert model.coef_.dtype == model.intercept_.dtype == np.float32
    assert model.predict_proba(x).dtype == np.float32


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LogisticRegression(C=0.0), "LogisticRegression: C: expected a number > 0"),
        (LogisticRegression(solver="saga"), "solver: expected one of"),
        (LogisticRegression(tol=-1.0), "tol: expected"),
        (PoissonRegressor(alpha=-1.0), "PoissonRegressor: alpha: expected a finite number >= 0"),
        (Ridge(alpha=np.inf), "Ridge: alpha: expected a finite number >= 0"),
    ],
)
def test_errors_name_the_parameter(cancer, model, message):
    with pytest.raises(ValueError, match=message):
        model.fit(*cancer)


def test_one_class_of_positive_weight(cancer):
    x, y = cancer
    with pytest.raises(ValueError, match="two classes at least"):
        LogisticRegression().fit(x, y, sample_weight=y)
