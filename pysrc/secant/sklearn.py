"""Linear models with the interface of scikit-learn, fitted by `secant.glm.fit`.

Needs scikit-learn; nothing else in the package imports this module.

Example:
    >>> from secant.sklearn import LogisticRegression
    >>> model = LogisticRegression(C=0.1).fit(X, y)
    >>> model.predict_proba(X)
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import d2_tweedie_score
from sklearn.utils import Tags
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from secant import glm

__all__ = ["LogisticRegression", "PoissonRegressor", "Ridge"]


class _Linear(BaseEstimator):
    """What the three have in common: arguments of a fit, and the linear predictor."""

    coef_: Any
    intercept_: Any
    n_iter_: Any

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _checked(self, X: Any, y: Any, sample_weight: Any, **options: Any) -> tuple[Any, Any, Any]:
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], order="C", **options)
        if sample_weight is not None:
            sample_weight = np.asarray(sample_weight, dtype=X.dtype)
            if sample_weight.ndim == 0:
                sample_weight = np.full(len(y), sample_weight)
            if sample_weight.shape != (len(y),):
                raise ValueError(
                    f"{type(self).__name__}: sample_weight: expected shape ({len(y)},), got {sample_weight.shape}"
                )
            if not sample_weight.any():
                raise ValueError(
                    f"{type(self).__name__}: sample_weight: expected at least one positive weight, got only zeros"
                )
        return X, y, sample_weight

    def _minimise(self, X: Any, y: Any, loss: str, l2: float, sample_weight: Any, start: Any) -> glm.GLMResult:
        result = glm.fit(
            _tensor(X),
            y,
            loss=loss,
            l2=l2,
            sample_weight=sample_weight,
            fit_intercept=self.fit_intercept,
            tol=self.tol,
            max_iter=self.max_iter,
            solver=self.solver,
            start=start,
        )
        if not result.converged:
            warnings.warn(f"{type(self).__name__}: {result.message}", ConvergenceWarning, stacklevel=4)
        return result

    def _start(self, coef_shape: tuple[int, ...]) -> tuple[Any, Any] | None:
        """(coef, intercept) of the last fit in the shapes of `fit`, when it is asked for and fits."""
        if not (self.warm_start and hasattr(self, "coef_") and self.coef_.shape == coef_shape):
            return None
        coef, intercept = np.asarray(self.coef_), np.asarray(self.intercept_)
        if coef.ndim == 2:
            return (coef[0], intercept[0]) if len(coef) == 1 else (coef.T, intercept)
        return coef, intercept

    def _predictor(self, X: Any) -> Any:
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)
        return X @ self.coef_.T + self.intercept_


class LogisticRegression(ClassifierMixin, _Linear):
    r"""Logistic regression, binary or multinomial, with an L2 penalty.

    Minimises sum_i c_i l(z_i, y_i) + 1 / (2 C) |w|^2 with z = X w + b, the intercept not penalised, and l the logistic
    loss for two classes and the multinomial one for more: the objective of scikit-learn's class of this name.

    Args:
        C: inverse of the penalty, > 0; infinity for none.
        tol: on the largest component of the gradient of the mean objective.
        fit_intercept: whether there is an intercept.
        class_weight: None, "balanced" or a dict from class to factor; multiplies the sample weights.
        solver: "auto", "newton-cholesky", "newton-cg" or "lbfgs"; see `secant.glm.fit`.
        max_iter: iterations; what does not converge in as many warns with ConvergenceWarning.
        warm_start: whether a further `fit` starts from the coefficients of the last.

    Attributes:
        classes_: (K,) labels. coef_: (1, d) for two classes, else (K, d). intercept_: (1,) or (K,). n_iter_: (1,).
        result_status_: `GLMResult.status`.

    Raises:
        ValueError: (by `fit`) a parameter, X, y or the weights do not fit, or there are rows of one class only.
    """

    classes_: Any
    result_status_: str

    def __init__(
        self,
        *,
        C: float = 1.0,
        tol: float = 1e-6,
        fit_intercept: bool = True,
        class_weight: Any = None,
        solver: str = "auto",
        max_iter: int = 100,
        warm_start: bool = False,
    ) -> None:
        self.C = C
        self.tol = tol
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.solver = solver
        self.max_iter = max_iter
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LogisticRegression:
        """Fit to X (N, d), dense or sparse, and labels y (N,)."""
        X, y, sample_weight = self._checked(X, y, sample_weight)
        if not (isinstance(self.C, (int, float, np.number)) and self.C > 0):
            raise ValueError(f"LogisticRegression: C: expected a number > 0, got {self.C!r}")
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        used = self.classes_ if sample_weight is None else np.unique(y[sample_weight > 0])
        if len(used) < 2:
            raise ValueError(
                f"LogisticRegression: y: expected rows of positive weight in two classes at least, got 1 class: {used}"
            )
        if self.class_weight is not None:
            factor = compute_class_weight(self.class_weight, classes=self.classes_, y=y, sample_weight=sample_weight)
            factor = factor.astype(X.dtype)[labels]
            sample_weight = factor if sample_weight is None else sample_weight * factor
        classes, d = len(self.classes_), X.shape[1]
        if classes == 2:
            loss, target, shape = "logistic", labels.astype(X.dtype), (1, d)
        else:
            loss, target, shape = "multinomial", labels.astype(np.int64), (classes, d)
        l2 = 0.0 if math.isinf(self.C) else 1.0 / float(self.C)
        result = self._minimise(X, target, loss, l2, sample_weight, self._start(shape))
        self.coef_ = np.ascontiguousarray(result.coef.numpy().T).reshape(shape)
        self.intercept_ = result.intercept.numpy().reshape(-1)
        self.n_iter_ = np.array([max(1, result.n_iter)], dtype=np.int32)
        self.result_status_ = result.status
        return self

    def decision_function(self, X: Any) -> Any:
        """Linear predictors: (N,) of the second class for two, else (N, K)."""
        z = self._predictor(X)
        return z[:, 0] if len(self.classes_) == 2 else z

    def predict(self, X: Any) -> Any:
        """The most probable label of each row."""
        z = self.decision_function(X)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(axis=1)]

    def predict_log_proba(self, X: Any) -> Any:
        """Logarithms of the probabilities, (N, K) in the order of `classes_`; finite wherever the predictors are."""
        z = self.decision_function(X)
        if z.ndim == 1:
            return np.stack([-np.logaddexp(0.0, z), -np.logaddexp(0.0, -z)], axis=1)
        z = z - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    def predict_proba(self, X: Any) -> Any:
        """Probabilities, (N, K) in the order of `classes_`."""
        return np.exp(self.predict_log_proba(X))


class PoissonRegressor(RegressorMixin, _Linear):
    r"""Poisson regression with a logarithmic link and an L2 penalty.

    Minimises sum_i c_i (exp(z_i) - y_i z_i) / sum_i c_i + alpha / 2 |w|^2 with z = X w + b, the intercept not
    penalised: the objective of scikit-learn's class of this name up to a constant.

    Args:
        alpha: penalty, >= 0.
        fit_intercept: whether there is an intercept.
        solver: "auto", "newton-cholesky", "newton-cg" or "lbfgs"; see `secant.glm.fit`.
        max_iter: iterations; what does not converge in as many warns with ConvergenceWarning.
        tol: on the largest component of the gradient of the mean objective.
        warm_start: whether a further `fit` starts from the coefficients of the last.

    Attributes:
        coef_: (d,). intercept_: a number. n_iter_: iterations. result_status_: `GLMResult.status`.

    Raises:
        ValueError: (by `fit`) a parameter, X, y or the weights do not fit.
    """

    result_status_: str

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        fit_intercept: bool = True,
        solver: str = "auto",
        max_iter: int = 100,
        tol: float = 1e-6,
        warm_start: bool = False,
    ) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PoissonRegressor:
        """Fit to X (N, d), dense or sparse, and counts or rates y (N,) >= 0."""
        X, y, sample_weight = self._checked(X, y, sample_weight, y_numeric=True)
        total = len(y) if sample_weight is None else float(np.sum(sample_weight, dtype=np.float64))
        l2 = _checked_alpha(self) * total
        result = self._minimise(X, y, "poisson", l2, sample_weight, self._start((X.shape[1],)))
        self.coef_, self.intercept_ = result.coef.numpy(), result.intercept.numpy()[()]
        self.n_iter_, self.result_status_ = max(1, result.n_iter), result.status
        return self

    def predict(self, X: Any) -> Any:
        """The expected count of each row, exp(X w + b)."""
        return np.exp(self._predictor(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of the Poisson deviance that is explained, D^2; at most 1."""
        return d2_tweedie_score(y, self.predict(X), sample_weight=sample_weight, power=1)


class Ridge(RegressorMixin, _Linear):
    r"""Least squares with an L2 penalty.

    Minimises sum_i c_i (y_i - z_i)^2 + alpha |w|^2 with z = X w + b, the intercept not penalised: the objective of
    scikit-learn's class of this name.

    Args:
        alpha: penalty, >= 0.
        fit_intercept: whether there is an intercept.
        solver: "auto", "newton-cholesky", "newton-cg" or "lbfgs"; see `secant.glm.fit`.
        max_iter: iterations; what does not converge in as many warns with ConvergenceWarning.
        tol: on the largest component of the gradient of half the mean objective.

    Attributes:
        coef_: (d,), or (T, d) for y (N, T), each column of which is a problem of its own. intercept_: a number or (T,).
        n_iter_: iterations, the most of any column. result_status_: `GLMResult.status`, of the last column that did not
        converge if there is one.

    Raises:
        ValueError: (by `fit`) a parameter, X, y or the weights do not fit.
    """

    warm_start = False
    result_status_: str

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        fit_intercept: bool = True,
        solver: str = "auto",
        max_iter: int = 100,
        tol: float = 1e-6,
    ) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Ridge:
        """Fit to X (N, d), dense or sparse, and y (N,) or (N, T)."""
        X, y, sample_weight = self._checked(X, y, sample_weight, y_numeric=True, multi_output=True)
        l2, columns = _checked_alpha(self), y.reshape(len(y), -1).T
        results = [self._minimise(X, column, "squared", l2, sample_weight, None) for column in columns]
        coef = np.stack([one.coef.numpy() for one in results])
        intercept = np.stack([one.intercept.numpy() for one in results])
        self.coef_, self.intercept_ = (coef, intercept) if y.ndim == 2 else (coef[0], intercept[0])
        self.n_iter_ = max(1, *(one.n_iter for one in results))
        self.result_status_ = next((one.status for one in reversed(results) if not one.converged), "converged")
        return self

    def predict(self, X: Any) -> Any:
        """X w + b, (N,) or (N, T)."""
        return self._predictor(X)


def _tensor(X: Any) -> Any:
    """X as it is, or a CSR tensor over the memory of a scipy one."""
    if isinstance(X, np.ndarray):
        return X
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        crow, col, values = (torch.from_numpy(part) for part in (X.indptr, X.indices, X.data))
        return torch.sparse_csr_tensor(crow, col, values, X.shape, check_invariants=False)


def _checked_alpha(model: Any) -> float:
    alpha = model.alpha
    if not (isinstance(alpha, (int, float, np.number)) and 0 <= alpha < math.inf):
        raise ValueError(f"{type(model).__name__}: alpha: expected a finite number >= 0, got {alpha!r}")
    return float(alpha)
