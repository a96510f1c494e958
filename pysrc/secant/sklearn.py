"""Linear models with the interface of scikit-learn, fitted by `secant.glm.fit`.

Needs scikit-learn; nothing else in the package imports this module.

Arrays in, arrays out; and torch tensors in, tensors out, of the dtype and on the device of X, with scikit-learn's array
API dispatch or without: whatever the type of X, attributes and predictions are of it.

Example:
    >>> from secant.sklearn import LogisticRegression
    >>> X, y = [[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1]
    >>> model = LogisticRegression(C=0.1).fit(X, y)
    >>> model.predict(X), model.predict_proba(X).shape
    (array([0, 0, 1, 1]), (4, 2))
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import nnls
from sklearn import config_context
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import d2_tweedie_score, r2_score
from sklearn.utils import Tags
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from secant import _checks, glm
from secant.result import Status

__all__ = ["GammaRegressor", "LogisticRegression", "PoissonRegressor", "Ridge", "TweedieRegressor"]


class _Linear(BaseEstimator):
    """Holds what the three have in common: arguments of a fit, and the linear predictor."""

    coef_: Any
    intercept_: Any
    n_iter_: Any

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _checked(self, X: Any, y: Any, sample_weight: Any, **options: Any) -> tuple[Any, Any, Any]:
        """X, y and the weights as arrays that share their memory; what a GPU holds is checked in a copy."""
        self._kind = _Kind(X)
        X, y, sample_weight = _array(X), _array(y), _array(sample_weight)
        with config_context(array_api_dispatch=False):
            X, y = validate_data(self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], order="C", **options)
        if sample_weight is not None:
            name = type(self).__name__
            try:
                sample_weight = np.asarray(sample_weight, dtype=X.dtype)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name}: sample_weight: expected an array of numbers ({error})") from None
            if not (np.isfinite(sample_weight).all() and (sample_weight >= 0.0).all()):
                raise ValueError(
                    f"{name}: sample_weight: expected finite numbers >= 0, got {_checks.show(sample_weight)}"
                )
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

    def _minimise(
        self, X: Any, y: Any, loss: str, l2: float, sample_weight: Any, start: Any, **options: Any
    ) -> glm.GLMResult:
        device = self._kind.device
        y, sample_weight, offset = (
            x if x is None or device is None else torch.as_tensor(x, device=device)
            for x in (y, sample_weight, options.pop("offset", None))
        )
        result = glm.fit(
            _tensor(X, device),
            y,
            loss=loss,
            l2=l2,
            sample_weight=sample_weight,
            offset=offset,
            **options,
            fit_intercept=self.fit_intercept,
            tol=self.tol,
            max_iter=self.max_iter,
            solver=self.solver,
            start=start,
        )
        if not result.converged:
            warnings.warn(f"{type(self).__name__}: {result.message}", ConvergenceWarning, stacklevel=4)
        return result

    def _iterations(self, result: glm.GLMResult) -> int:
        """At least one, by convention, unless none was allowed."""
        return 0 if self.max_iter == 0 else max(1, result.n_iter)

    def _start(self, coef_shape: tuple[int, ...]) -> tuple[Any, Any] | None:
        """(coef, intercept) of the last fit in the shapes of `fit`, when it is asked for and fits."""
        if not (self.warm_start and hasattr(self, "coef_") and tuple(self.coef_.shape) == coef_shape):
            return None
        coef, intercept = _array(self.coef_), _array(self.intercept_)
        coef, intercept = np.asarray(coef), np.asarray(intercept)
        if coef.ndim == 2:
            return (coef[0], intercept[0]) if len(coef) == 1 else (coef.T, intercept)
        return coef, intercept

    def _predictor(self, X: Any) -> Any:
        """X w + b as a tensor, whatever X is: that is what the predictions are computed from."""
        check_is_fitted(self)
        kind, array = _Kind(X), _array(X)
        with config_context(array_api_dispatch=False):
            array = validate_data(self, array, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)
        coef, intercept = np.asarray(_array(self.coef_)), np.asarray(_array(self.intercept_))
        if kind.device is None:
            array = _checked_csr(array) if sparse.issparse(array) else array
            return torch.from_numpy(np.asarray(array @ coef.T + intercept))
        x = _tensor(array, kind.device)
        w, b = (torch.as_tensor(part, device=x.device).to(x.dtype) for part in (coef, intercept))
        return x @ w.mT.squeeze(-1) + b if w.dim() > 1 else x @ w + b

    def _result(self, x: torch.Tensor, X: Any) -> Any:
        """Give a prediction in the type of X."""
        return _Kind(X)(x)


class _Kind:
    """Knows what came in: tensors on a device, or arrays (device None); called, it turns a tensor into that."""

    def __init__(self, X: Any) -> None:
        self.device = X.device if isinstance(X, torch.Tensor) else None

    def __call__(self, x: torch.Tensor) -> Any:
        """Give the tensor itself, or an array over its memory."""
        return x.numpy() if self.device is None else x.to(self.device)

    def labels(self, x: Any) -> Any:
        """Likewise of an array of labels; those that are no numbers have no tensor."""
        return x if self.device is None or x.dtype.kind not in "biuf" else torch.as_tensor(x, device=self.device)


def _array(x: Any) -> Any:
    """Take a tensor as an array, sharing its memory on a CPU; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach().resolve_neg().cpu()
    if x.layout is torch.sparse_csr:
        shape = tuple(x.shape)
        return sparse.csr_array((x.values().numpy(), x.col_indices().numpy(), x.crow_indices().numpy()), shape=shape)
    return (x.float() if x.dtype is torch.bfloat16 else x).numpy()


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
    result_status_: Status

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
        C = _checks.number("LogisticRegression", "C", self.C, "a number > 0", lambda value: value > 0)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"LogisticRegression: y: expected two classes at least, got 1 class: {self.classes_}")
        if self.class_weight is not None:
            factor = compute_class_weight(self.class_weight, classes=self.classes_, y=y, sample_weight=sample_weight)
            factor = factor.astype(X.dtype)[labels]
            sample_weight = factor if sample_weight is None else sample_weight * factor
        classes, d = len(self.classes_), X.shape[1]
        if classes == 2:
            loss, target, shape = "logistic", labels.astype(X.dtype), (1, d)
        else:
            loss, target, shape = "multinomial", labels.astype(np.int64), (classes, d)
        l2 = 0.0 if math.isinf(C) else 1.0 / C
        result = self._minimise(X, target, loss, l2, sample_weight, self._start(shape))
        self.coef_ = self._kind(result.coef.mT.contiguous().view(shape) if classes > 2 else result.coef.view(shape))
        self.intercept_ = self._kind(result.intercept.view(-1))
        self.classes_ = self._kind.labels(self.classes_)
        self.n_iter_ = np.array([self._iterations(result)], dtype=np.int32)
        self.result_status_ = result.status
        return self

    def _logits(self, X: Any) -> torch.Tensor:
        z = self._predictor(X)
        return z.view(-1) if len(self.classes_) == 2 else z

    def _log_probabilities(self, X: Any) -> torch.Tensor:
        z = self._logits(X)
        if z.dim() == 1:
            return torch.stack([torch.nn.functional.logsigmoid(-z), torch.nn.functional.logsigmoid(z)], dim=1)
        return torch.log_softmax(z, 1)

    def decision_function(self, X: Any) -> Any:
        """Compute the linear predictors: (N,) of the second class for two, else (N, K)."""
        return self._result(self._logits(X), X)

    def predict(self, X: Any) -> Any:
        """Predict the most probable label of each row."""
        z = self._logits(X)
        index = (z > 0).long() if z.dim() == 1 else z.argmax(dim=1)
        classes = _Kind(X).labels(np.asarray(_array(self.classes_)))
        return classes[index if isinstance(classes, torch.Tensor) else index.cpu().numpy()]

    def predict_log_proba(self, X: Any) -> Any:
        """Predict log-probabilities, (N, K) in the order of `classes_`; finite wherever the predictors are."""
        return self._result(self._log_probabilities(X), X)

    def predict_proba(self, X: Any) -> Any:
        """Predict the probabilities, (N, K) in the order of `classes_`."""
        return self._result(self._log_probabilities(X).exp(), X)


class _LogLink(RegressorMixin, _Linear, ABC):
    """Regresses targets whose expectation is exp(X w + b)."""

    result_status_: Status
    alpha: float
    solver: str
    max_iter: int
    tol: float
    warm_start: bool

    @abstractmethod
    def _family(self) -> tuple[str, float]:
        """Give the loss of `secant.glm.fit`, and the power of the deviance."""

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> Any:
        """Fit to X (N, d), dense or sparse, and targets y (N,).

        offset: (N,), known terms of the predictors, such as the logarithm of an exposure.
        """
        X, y, sample_weight = self._checked(X, y, sample_weight, y_numeric=True)
        total = len(y) if sample_weight is None else float(np.sum(sample_weight, dtype=np.float64))
        [alpha] = _checked_alpha(self, 1)
        offset = None if offset is None else np.asarray(_array(offset), dtype=X.dtype)
        loss, power = self._family()
        options = {"offset": offset} | ({"power": power} if loss == "tweedie" else {})
        start = self._start((X.shape[1],))
        result = self._minimise(X, y, loss, alpha * total, sample_weight, start, **options)
        self.coef_, self.intercept_ = self._kind(result.coef), self._kind(result.intercept)[()]
        self.n_iter_, self.result_status_ = self._iterations(result), result.status
        return self

    def predict(self, X: Any, offset: Any = None) -> Any:
        """Predict the expected target of each row, exp(X w + b + offset)."""
        z = self._predictor(X)
        if offset is not None:
            offset = torch.as_tensor(offset)
            if offset.shape != z.shape:
                name = type(self).__name__
                raise ValueError(f"{name}: offset: expected shape {tuple(z.shape)}, got {tuple(offset.shape)}")
            z = z + offset.to(z)
        return self._result(z.exp(), X)

    def score(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> float:
        """Share of the deviance that is explained, D^2; at most 1."""
        y, predicted, weight = (_array(x) for x in (y, self.predict(X, offset), sample_weight))
        return d2_tweedie_score(y, predicted, sample_weight=weight, power=self._family()[1])


class PoissonRegressor(_LogLink):
    r"""Poisson regression with a logarithmic link and an L2 penalty.

    Minimises sum_i c_i (exp(z_i) - y_i z_i) / sum_i c_i + alpha / 2 |w|^2 with z = X w + b + offset, y >= 0, the
    intercept not penalised: the objective of scikit-learn's class of this name up to a constant.

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

    def _family(self) -> tuple[str, float]:
        return "poisson", 1.0


class GammaRegressor(PoissonRegressor):
    r"""Regression of positive targets with a Gamma distribution, a logarithmic link and an L2 penalty.

    Minimises sum_i c_i (y_i exp(-z_i) + z_i) / sum_i c_i + alpha / 2 |w|^2 with z = X w + b + offset, y > 0, the
    intercept not penalised: the objective of scikit-learn's class of this name up to a constant. Arguments, attributes
    and errors are those of `PoissonRegressor`.
    """

    def _family(self) -> tuple[str, float]:
        return "gamma", 2.0


class TweedieRegressor(_LogLink):
    r"""Regression with a Tweedie distribution of power 1 to 2, a logarithmic link and an L2 penalty.

    Minimises sum_i c_i l(z_i, y_i) / sum_i c_i + alpha / 2 |w|^2 with z = X w + b + offset, the intercept not
    penalised, and l = exp((2 - p) z) / (2 - p) - y exp((1 - p) z) / (1 - p) for 1 < p < 2, the loss of
    `PoissonRegressor` for p = 1 and of `GammaRegressor` for p = 2: the objective of scikit-learn's class of this name
    up to a constant. For another power it is not convex in z, or has another link.

    Args:
        power: p, in [1, 2].
        alpha, fit_intercept, solver, max_iter, tol, warm_start: see `PoissonRegressor`.
        link: "auto" or "log", which are the same.

    Attributes:
        coef_, intercept_, n_iter_, result_status_: see `PoissonRegressor`.

    Raises:
        ValueError: (by `fit`) a parameter, X, y or the weights do not fit.
    """

    def __init__(
        self,
        *,
        power: float = 1.5,
        alpha: float = 1.0,
        fit_intercept: bool = True,
        link: str = "auto",
        solver: str = "auto",
        max_iter: int = 100,
        tol: float = 1e-6,
        warm_start: bool = False,
    ) -> None:
        self.power = power
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.link = link
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start

    def _family(self) -> tuple[str, float]:
        name = "TweedieRegressor"
        if self.link not in ("auto", "log"):
            raise _checks.fail(name, "link", "'auto' or 'log'", _checks.show(self.link))
        power = _checks.number(name, "power", self.power, "a number from 1 to 2", lambda p: 1.0 <= p <= 2.0)
        return {1.0: "poisson", 2.0: "gamma"}.get(power, "tweedie"), power


class Ridge(RegressorMixin, _Linear):
    r"""Least squares with an L2 penalty.

    Minimises sum_i c_i (y_i - z_i)^2 + alpha |w|^2 with z = X w + b, the intercept not penalised: the objective of
    scikit-learn's class of this name.

    Args:
        alpha: penalty, >= 0; a number, or one for each target.
        fit_intercept: whether there is an intercept.
        solver: "auto", "newton-cholesky", "newton-cg", "lbfgs" or "min-norm"; see `secant.glm.fit`.
        max_iter: iterations; what does not converge in as many warns with ConvergenceWarning.
        tol: on the largest component of the gradient of half the mean objective.
        positive: whether the coefficients are kept >= 0 (by scipy's bounded least squares, for dense X; `solver`,
            `max_iter` and `tol` then have no say).

    Attributes:
        coef_: (d,), or (T, d) for y (N, T), each column of which is a problem of its own; (d,) also for y (N, 1).
        intercept_: a number or (T,), (1,) for y (N, 1).
        n_iter_: iterations, the most of any column. result_status_: `GLMResult.status`, of the last column that did not
        converge if there is one.

    Raises:
        ValueError: (by `fit`) a parameter, X, y or the weights do not fit.
    """

    warm_start = False
    result_status_: Status

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        fit_intercept: bool = True,
        solver: str = "auto",
        max_iter: int = 100,
        tol: float = 1e-6,
        positive: bool = False,
    ) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.positive = positive

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Ridge:
        """Fit to X (N, d), dense or sparse, and y (N,) or (N, T)."""
        X, y, sample_weight = self._checked(X, y, sample_weight, y_numeric=True, multi_output=True)
        columns = y.reshape(len(y), -1).T
        penalties = _checked_alpha(self, len(columns))
        if self.positive:
            pairs = [
                _positive(X, column, l2, sample_weight, self) for column, l2 in zip(columns, penalties, strict=True)
            ]
            coef, intercept = (torch.as_tensor(np.stack(part).astype(X.dtype)) for part in zip(*pairs, strict=True))
            self.n_iter_, self.result_status_ = 1, Status.CONVERGED
        else:
            results = [
                self._minimise(X, column, "squared", l2, sample_weight, None)
                for column, l2 in zip(columns, penalties, strict=True)
            ]
            coef, intercept = torch.stack([r.coef for r in results]), torch.stack([r.intercept for r in results])
            self.n_iter_ = max(self._iterations(r) for r in results)
            self.result_status_ = next((r.status for r in reversed(results) if not r.converged), Status.CONVERGED)
        # As scikit-learn: one target in a column has coefficients of one dimension, but an intercept of one.
        self.coef_ = self._kind(coef if len(columns) > 1 else coef[0])
        self.intercept_ = self._kind(intercept) if y.ndim == 2 else self._kind(intercept[0])[()]
        return self

    def predict(self, X: Any) -> Any:
        """X w + b, (N,) or (N, T)."""
        return self._result(self._predictor(X), X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of the variance that is explained, R^2; at most 1."""
        y, predicted, weight = (_array(x) for x in (y, self.predict(X), sample_weight))
        return r2_score(y, predicted, sample_weight=weight)


def _positive(X: Any, y: Any, l2: float, weight: Any, model: Ridge) -> tuple[Any, Any]:
    """(w, b) of least squares with w >= 0: of the rows times sqrt(c), centred, with sqrt(l2) I below them."""
    if sparse.issparse(X):
        raise ValueError("Ridge: positive: expected False for sparse X, got True")
    x, y = X.astype(np.float64), y.astype(np.float64)
    c = np.ones(len(y)) if weight is None else weight.astype(np.float64)
    mean, level = (np.average(x, axis=0, weights=c), np.average(y, weights=c)) if model.fit_intercept else (0.0, 0.0)
    root = np.sqrt(c)
    rows, target = (x - mean) * root[:, None], (y - level) * root
    if l2 > 0.0:
        d = x.shape[1]
        rows, target = np.vstack([rows, math.sqrt(l2) * np.eye(d)]), np.concatenate([target, np.zeros(d)])
    w, _ = nnls(rows, target)
    return w, level - np.sum(mean * w)


def _checked_csr(X: Any) -> Any:
    """Make a CSR array over the memory of X whose indices are in range, of one dtype and without gaps in memory.

    Raises:
        ValueError: a row begins or ends where it must not, or a column is out of range.
    """
    X = sparse.csr_array(tuple(np.ascontiguousarray(part) for part in (X.data, X.indices, X.indptr)), shape=X.shape)
    X.check_format(full_check=True)
    return X


def _tensor(X: Any, device: torch.device | None) -> Any:
    """X as it is, or a CSR tensor of a scipy one, whose indices are checked, sorted and made unique."""
    if isinstance(X, np.ndarray):
        return X if device is None else torch.as_tensor(X, device=device)
    X = _checked_csr(X)
    if not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        crow, col, values = (torch.from_numpy(part) for part in (X.indptr, X.indices, X.data))
        return torch.sparse_csr_tensor(crow, col, values, X.shape, check_invariants=True)


def _checked_alpha(model: Any, targets: int) -> list[float]:
    """Give the penalty of each target."""
    name, alpha = type(model).__name__, _array(model.alpha)
    if isinstance(model, Ridge) and np.ndim(alpha) > 0:
        alpha = np.ravel(alpha)
        if len(alpha) != targets:
            raise ValueError(f"{name}: alpha: expected a number or {targets}, one for each target, got {len(alpha)}")
        return [_checks.nonnegative(name, "alpha", float(one)) for one in alpha]
    return [_checks.nonnegative(name, "alpha", alpha)] * targets
