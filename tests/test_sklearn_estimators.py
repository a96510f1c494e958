"""The estimators: scikit-learn's own conventions, its optima and its parameters."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", minversion="1.6")

from scipy import sparse
from sklearn import datasets, linear_model
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from secant.result import Status
from secant.sklearn import GammaRegressor, LogisticRegression, PoissonRegressor, Ridge, TweedieRegressor


@parametrize_with_checks([LogisticRegression(), PoissonRegressor(), GammaRegressor(), TweedieRegressor(), Ridge()])
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
        assert model.result_status_ == Status.CONVERGED
        model.set_params(warm_start=False)
        with pytest.warns(ConvergenceWarning, match="max_iter = 1 iterations were not enough"):
            model.fit(x, target)


def test_separable_classes_warn():
    x, y = np.array([[-1.0], [-2.0], [1.0], [3.0]]), np.array([0, 0, 1, 1])
    with pytest.warns(ConvergenceWarning, match="LogisticRegression: the objective has no minimum"):
        model = LogisticRegression(C=np.inf).fit(x, y)
    assert model.result_status_ == Status.NO_MINIMUM


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


def test_one_class(cancer):
    x, y = cancer
    with pytest.raises(ValueError, match="two classes at least"):
        LogisticRegression().fit(x, np.ones_like(y))


@pytest.mark.parametrize(("indices", "indptr"), [(np.int64, np.int32), (np.int32, np.int64)])
def test_indices_of_two_widths(indices, indptr):
    x = sparse.random(40, 6, 0.5, format="csr", random_state=0)
    y = np.random.default_rng(0).standard_normal(40)
    mixed = x.copy()
    mixed.indices, mixed.indptr = x.indices.astype(indices), x.indptr.astype(indptr)
    for model, target in ((Ridge(), y), (LogisticRegression(), y > 0), (PoissonRegressor(), np.abs(y))):
        want = model.fit(x.toarray(), target).coef_
        assert np.allclose(model.fit(mixed, target).coef_, want, atol=1e-5)
        assert np.allclose(model.predict(mixed), model.predict(x.toarray()), atol=1e-4)


@pytest.mark.parametrize(("part", "place", "value"), [("indices", 3, 6), ("indices", 3, -1), ("indptr", 5, 10**6)])
def test_hostile_indices_are_refused(part, place, value):
    x = sparse.random(40, 6, 0.5, format="csr", random_state=0)
    getattr(x, part)[place] = value
    for model in (Ridge(), LogisticRegression(), PoissonRegressor()):
        with pytest.raises(ValueError, match=r"(indices|indptr) must be"):
            model.fit(x, np.arange(40) % 2)


def test_entries_that_stand_twice_are_added():
    x = sparse.csr_array(([1.0, 2.0, 3.0, 4.0], [1, 0, 1, 0], [0, 3, 4]), shape=(2, 2))
    assert not x.has_canonical_format
    model = Ridge(alpha=0.1, tol=1e-12)
    assert np.allclose(model.fit(x, [1.0, 2.0]).coef_, model.fit(x.toarray(), [1.0, 2.0]).coef_)
    assert not x.has_canonical_format


def test_arrays_of_any_memory():
    rng = np.random.default_rng(0)
    x, y, weight = rng.standard_normal((60, 4)), rng.standard_normal(60), rng.random(60)
    for model, target in ((Ridge(), y), (LogisticRegression(), (y > 0).astype(float)), (PoissonRegressor(), np.abs(y))):
        want = model.fit(x, target, weight).coef_

        def reversed_memory(z):
            z = z[::-1].copy()[::-1]
            assert z.strides[0] < 0
            return z

        for other in (reversed_memory, np.asfortranarray, lambda z: z.astype(">f8")):
            assert np.allclose(model.fit(other(x), other(target), weight).coef_, want, rtol=1e-9)
        assert np.allclose(model.fit(x.astype(object), target, weight).coef_, want, rtol=1e-9)
        for other in (reversed_memory, lambda z: z.astype(">f8")):
            assert np.allclose(model.fit(x, target, other(weight)).coef_, want, rtol=1e-9)
        locked = x.copy()
        locked.flags.writeable = False
        assert np.allclose(model.fit(locked, target, weight).coef_, want, rtol=1e-12)


def test_a_class_without_weight_is_fitted_as_scikit_learn_does(wine):
    x, y = StandardScaler().fit_transform(wine[0]), wine[1]
    for target, weight in ((y, (y != 1) * 1.0), (y == 1, (y == 1) * 1.0)):
        theirs = linear_model.LogisticRegression(tol=1e-10, max_iter=1000).fit(x, target, sample_weight=weight)
        with pytest.warns(ConvergenceWarning, match="the intercept falls forever"):
            ours = LogisticRegression().fit(x, target, sample_weight=weight)
        assert ours.result_status_ == Status.NO_MINIMUM
        assert np.abs(ours.predict_proba(x) - theirs.predict_proba(x)).max() < 1e-4
    with pytest.warns(ConvergenceWarning, match="the intercept falls forever"):
        model = PoissonRegressor().fit(x, np.zeros(len(x)))
    assert model.predict(x).max() < 1e-4  # scikit-learn's are 0


def test_one_target_in_a_column_as_scikit_learn():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 4)), rng.standard_normal((60, 1))
    ours, theirs = Ridge(tol=1e-12).fit(x, y), linear_model.Ridge().fit(x, y)
    assert ours.coef_.shape == theirs.coef_.shape
    assert ours.intercept_.shape == theirs.intercept_.shape
    assert ours.predict(x).shape == theirs.predict(x).shape
    assert np.allclose(ours.coef_, theirs.coef_)


def test_a_penalty_for_each_target():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 4)), rng.standard_normal((60, 3))
    alpha = np.array([0.1, 1.0, 10.0])
    assert np.allclose(Ridge(alpha=alpha, tol=1e-12).fit(x, y).coef_, linear_model.Ridge(alpha=alpha).fit(x, y).coef_)
    with pytest.raises(ValueError, match="alpha: expected a number or 3, one for each target, got 2"):
        Ridge(alpha=alpha[:2]).fit(x, y)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_coefficients_that_are_not_negative(fit_intercept, alpha):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((60, 4)) + 1.0, rng.random(60)
    y = x @ rng.standard_normal((4, 2)) + rng.standard_normal((60, 2))
    options = {"alpha": alpha, "positive": True, "fit_intercept": fit_intercept}
    for target in (y, y[:, 0]):
        ours = Ridge(**options).fit(x, target, weight)
        theirs = linear_model.Ridge(**options, tol=1e-12, max_iter=10_000).fit(x, target, weight)
        assert (ours.coef_ >= 0).all()
        assert (ours.coef_ == 0).any()
        assert np.allclose(ours.coef_, theirs.coef_, atol=1e-6)
        assert np.allclose(ours.predict(x), theirs.predict(x), atol=1e-5)
    with pytest.raises(ValueError, match="Ridge: positive: expected False for sparse X"):
        Ridge(positive=True).fit(sparse.csr_array(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_in_tensors_out(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 4)).astype(np.float32 if dtype is torch.float32 else np.float64)
    z = x @ [1.0, -2.0, 0.5, 0.0]
    for model, y in (
        (LogisticRegression(), (z > 0).astype(int)),
        (LogisticRegression(), np.digitize(z, [-1, 1])),
        (PoissonRegressor(), rng.poisson(np.exp(z / 4))),
        (GammaRegressor(), np.exp(z / 4)),
        (Ridge(), z),
        (Ridge(), np.stack([z, -z], 1)),
    ):
        model.fit(x, y)
        names = [name for name in ("predict", "predict_proba", "decision_function") if hasattr(model, name)]
        want = {name: getattr(model, name)(x) for name in names} | {"coef": model.coef_, "intercept": model.intercept_}
        score = model.score(x, y)
        tx, ty = torch.from_numpy(x), torch.from_numpy(y)
        model.fit(tx, ty)
        got = {name: getattr(model, name)(tx) for name in names} | {"coef": model.coef_, "intercept": model.intercept_}
        for name, value in got.items():
            assert isinstance(value, torch.Tensor), name
            # A few terms of one size, added in any order.
            assert np.allclose(value.numpy(), want[name], rtol=0, atol=100 * torch.finfo(dtype).eps), name
            assert value.dtype is dtype or name == "predict"
        assert model.score(tx, ty) == pytest.approx(score)
        # A model of tensors answers arrays with arrays.
        assert np.allclose(model.predict(x), want["predict"], rtol=0, atol=100 * torch.finfo(dtype).eps)
        assert isinstance(model.predict(x), np.ndarray)
        csr = tx.to_sparse_csr()
        again = model.fit(csr, ty).predict(csr)
        assert torch.allclose(again.to(dtype), got["predict"].to(dtype), atol=1e-3)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("power", [1.0, 1.3, 1.9, 2.0])
def test_tweedie_is_that_of_scikit_learn(power, fit_intercept):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 5))
    y = rng.gamma(2.0, np.exp(x @ rng.standard_normal(5) * 0.5 + 0.2) / 2.0)
    if power < 2.0:
        y *= rng.random(400) < 0.8
    weight, offset = rng.random(400), rng.standard_normal(400)
    options = {"alpha": 0.3, "fit_intercept": fit_intercept}
    theirs = linear_model.TweedieRegressor(**options, power=power, solver="newton-cholesky", tol=1e-10, link="log")
    theirs.fit(x, y, sample_weight=weight)
    models = [TweedieRegressor(**options, power=power, tol=1e-12)]
    models += [GammaRegressor(**options, tol=1e-12)] if power == 2.0 else []
    for ours in models:
        ours.fit(x, y, sample_weight=weight)
        assert np.allclose(ours.coef_, theirs.coef_, rtol=1e-7, atol=1e-9)
        assert ours.intercept_ == pytest.approx(theirs.intercept_, rel=1e-7)
        assert ours.score(x, y, weight) == pytest.approx(theirs.score(x, y, weight), rel=1e-7)
        shifted = ours.fit(x, y * np.exp(1.5), sample_weight=weight, offset=np.full(400, 1.5))
        # A scale a of the targets is log a in the predictors and a^(2 - p) of the loss.
        again = type(ours)(**ours.get_params() | {"alpha": 0.3 / np.exp(1.5 * (2.0 - power))})
        assert np.allclose(shifted.coef_, again.fit(x, y, sample_weight=weight).coef_, rtol=1e-6, atol=1e-8)
        assert np.allclose(shifted.predict(x, offset), shifted.predict(x) * np.exp(offset))


@pytest.mark.parametrize("bad", [10**400, True, "a", -1.0, np.nan, None])
def test_what_is_no_number_is_named(cancer, bad):
    x, y = cancer
    for model, name in (
        (LogisticRegression(C=bad), "C"), (Ridge(alpha=bad), "alpha"), (PoissonRegressor(alpha=bad), "alpha"),
        (TweedieRegressor(power=bad), "power"), (Ridge(tol=bad), "tol"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            model.fit(x, y)


@pytest.mark.parametrize(("part", "place", "value"), [("indptr", -1, 10**6), ("indices", 3, 6), ("indices", 3, -1)])
def test_predictions_read_no_hostile_indices(part, place, value):
    x = sparse.random(40, 6, 0.5, format="csr", random_state=0)
    for model in (Ridge(), LogisticRegression(), PoissonRegressor()):
        model.fit(x, np.arange(40) % 2)
        damaged = x.copy()
        getattr(damaged, part)[place] = value
        with pytest.raises(ValueError, match=r"(indices|indptr|index|Last value)"):
            model.predict(damaged)


def test_indices_of_any_memory():
    x = sparse.random(40, 6, 0.5, format="csr", random_state=0)
    want = Ridge().fit(x, np.arange(40.0)).coef_
    x.indices = x.indices[::-1].copy()[::-1]
    assert np.allclose(Ridge().fit(x, np.arange(40.0)).coef_, want)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0, "a"])
def test_weights_that_are_none_are_named(cancer, weight):
    x, y = cancer
    for model in (LogisticRegression(), PoissonRegressor(), Ridge()):
        with pytest.raises((TypeError, ValueError), match="sample_weight: expected"):
            model.fit(x, y, sample_weight=[weight] * len(y))


def test_offsets_of_another_length(cancer):
    x, y = cancer
    model = PoissonRegressor().fit(StandardScaler().fit_transform(x), y, offset=np.zeros(len(y)))
    with pytest.raises(ValueError, match=r"PoissonRegressor: offset: expected shape \(569,\), got \(3,\)"):
        model.predict(x, offset=np.zeros(3))
