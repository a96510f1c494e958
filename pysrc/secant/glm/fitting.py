"""`fit`: the choice of solver, the start on a sample of the rows, and the verdict."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant._errors import SingularWarning
from secant.glm import arguments
from secant.glm.lbfgs import HistorySystem
from secant.glm.least_squares import smallest
from secant.glm.objective import FitPoint, Objective
from secant.glm.preconditioners import CholeskyPreconditioner
from secant.glm.recession import falls_forever, intercept_falls_forever
from secant.glm.result import FitRecorder, GLMResult
from secant.glm.systems import DiagonalSystem, FactorSystem
from secant.result import Iteration, Status
from secant.solvers.newton import DirectionSolver, NewtonResult, newton

#: Up to as many coefficients "auto" factors the Hessian of dense data.
_FACTOR_UP_TO = 2048
#: Rows of a sample per coefficient: its Hessian then differs from that of all rows by a factor within (1 +- 0.35)^2,
#: and preconditioned conjugate gradients gain a factor of three an iteration.
_SAMPLE_PER_COEFFICIENT = 8
#: A sample of N / d times this many rows has a Gram matrix that costs as much as one pass over X.
_SAMPLE_PER_PASS = 16
#: Nor need it have more than this part of the rows, and more than a quarter of them are not worth a sample at all.
_SAMPLE_PART, _MIN_STRIDE = 16, 4
#: Elements of X below which a pass costs less than the calls that make it up.
_SAMPLE_FROM = 1 << 18
_SAMPLE_ITERATIONS = 15
#: The sample's optimum is away from that of all rows by a Newton decrement g.H^-1 g of about stride * P; what is below
#: this part of it is not worth a further iteration.
_SAMPLE_ACCURACY = 0.5

#: Deltas on the way to that of a Huber loss: each this much smaller, with as many iterations and until the decrement is
#: this part of the value.
_STAGE_FACTOR, _STAGE_ITERATIONS, _STAGE_ACCURACY = 4.0, 10, 1e-2

_SYSTEMS: dict[str, Callable[[int], DirectionSolver[FitPoint]]] = {
    "newton-cholesky": FactorSystem,
    "newton-cg": DiagonalSystem,
    "lbfgs": lambda _: HistorySystem(),
    "min-norm": DiagonalSystem,
}

#: Why a fit stopped, with its figures.
_MESSAGES = {
    Status.CONVERGED: "the largest component of the gradient of the mean objective, {grad:.2e}, is within "
    "tol = {tol:.2e}",
    Status.MAX_ITER: "max_iter = {max_iter} iterations were not enough: the gradient is {grad:.2e}, tol = {tol:.2e}",
    Status.STALLED: "no step can be told from rounding in {dtype}: the gradient is {grad:.2e}, tol = {tol:.2e}; "
    "scale the features, use float64, or a larger tol",
    Status.NO_MINIMUM: "the objective has no minimum: some direction separates the targets, along which it falls "
    "forever; use l2 > 0",
    Status.STOPPED: "the callback stopped the fit at a gradient of {grad:.2e}, tol = {tol:.2e}",
}
#: Another reason for NO_MINIMUM.
_NO_INTERCEPT = (
    "the objective has no minimum: the targets of positive weight are all at one end, or a class has none, and the "
    "intercept falls forever; leave out the class, or use fit_intercept=False"
)


def fit(
    X: Any,
    y: Any,
    *,
    loss: str = "logistic",
    l2: float = 0.0,
    sample_weight: Any = None,
    fit_intercept: bool = True,
    tol: float = 1e-6,
    max_iter: int | None = None,
    max_cg_iter: int = 200,
    solver: str = "auto",
    delta: float = 1.0,
    power: float = 1.5,
    offset: Any = None,
    start: GLMResult | tuple[Any, Any] | None = None,
    callback: Callable[[Iteration], object] | None = None,
) -> GLMResult:
    r"""Fit a generalised linear model by a second-order method.

    Minimises over w and b, with z_i = x_i . w + b + o_i,

        f(w, b) = sum_i c_i l(z_i, y_i) + l2 / 2 |w|^2

    until max_j |df / d(w, b)_j| / sum_i c_i <= tol: the largest component of the gradient of the mean objective. The
    intercept is not penalised. A feature whose mean is more than 16 (float32) or 1e5 (float64) times its standard
    deviation is centred first where there is an intercept, block by block as X is read, so that neither its products
    nor the gradient, which is then that of the centred feature, drown in rounding. So are targets of the first and the
    fourth loss. The losses:

        "squared"      1/2 (z - y)^2
        "logistic"     log(1 + e^z) - y z,               y in [0, 1]
        "poisson"      e^z - y z,                        y >= 0 (log link; log y! left out)
        "huber"        1/2 r^2 if |r| <= delta, else delta (|r| - delta / 2),   r = z - y
        "gamma"        y e^-z + z,                       y > 0 (log link)
        "tweedie"      e^((2-p) z) / (2-p) - y e^((1-p) z) / (1-p),   y >= 0, 1 < p < 2 (log link)
        "multinomial"  log sum_k e^(z_k) - z_y,          y in {0, ..., K - 1}; w (d, K), b (K,)

    Solvers, all with a strong Wolfe line search:

        "newton-cholesky"  Newton systems by conjugate gradients preconditioned with a Cholesky factor of X^T D X + l2,
                           first of a sample of the rows, later of all rows when that is cheaper than more iterations.
                           Memory P^2 for P coefficients.
        "newton-cg"        the same preconditioned with the diagonal of the Hessian after centring.
        "lbfgs"            limited-memory BFGS in the coordinates of that diagonal.
        "auto"             "newton-cholesky" for dense X with at most 2048 coefficients, else "newton-cg".
        "min-norm"         for the squared loss and dense X: of all minimisers that with the smallest |w|, by the
                           singular values of the centred X, in float64; those below eps max(N, d) of the largest count
                           as zero. Takes a copy of X.

    X is not copied: the intercept is a column of ones that is never formed, rescaling and centring act on vectors of
    coefficients, Gram matrices are summed over row blocks that fit the cache. A column-major X is copied once.

    Args:
        X: (N, d) features, a tensor or array, float32 or float64; on the CPU also torch.sparse_csr.
        y: (N,) targets; integers for the multinomial loss.
        loss: see above.
        l2: penalty on the coefficients, >= 0. (scikit-learn's logistic C is 1 / l2, its Ridge alpha is l2.)
        sample_weight: (N,) c, >= 0; None: ones. Weights are the same as repeated rows.
        fit_intercept: whether b is fitted; otherwise it is zero.
        tol: of the gradient criterion, > 0.
        max_iter: iterations over all rows, >= 0 (then the result is the start); None: 100, for "lbfgs" 1000.
        max_cg_iter: products with the Hessian per Newton system, >= 1.
        solver: see above.
        delta: of the Huber loss, > 0. power: p of the Tweedie loss.
        offset: (N,), for the multinomial loss (N, K): known terms o_i of the predictors, such as the logarithm of an
            exposure. An evaluation then reads X twice. None: zeros.
        start: where to start: a `GLMResult` or (coef, intercept). None: zero, but that the intercept of a logarithmic
            link is the best one for coefficients of zero.
        callback: called with an `Iteration` after each; a true value stops the fit.

    Returns:
        A `GLMResult`. A fit that did not reach the criterion does not raise, its `status` says why. Where the Hessian
        is singular (l2 = 0 and collinear or constant columns) the minimiser found is one of many, and "newton-cholesky"
        warns with `secant.SingularWarning`. That there is no minimum is told from the targets (all at one end, or a
        class without weight), and from the last point and the Newton step there; a loose `tol` may end a fit before
        they show it.

    Raises:
        TypeError: an argument is no array of numbers, or of another dtype.
        ValueError: shapes do not fit; X, y or sample_weight have values that are not finite or not allowed for the
            loss; the objective overflows at the start; "min-norm" does not fit the loss or the layout of X.

    References:
        McCullagh and Nelder, Generalized Linear Models, 2nd ed. (1989), section 2.5. Huber, Robust estimation of a
        location parameter, Ann. Math. Stat. 35 (1964). The sample sizes and when to factor anew are heuristics.

    Example:
        >>> X, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 3.0, 5.0])
        >>> result = secant.glm.fit(X, y, loss="squared")
        >>> round(float(result.coef), 5), round(float(result.intercept), 5), str(result.status)
        (2.0, 1.0, 'converged')
    """
    if solver not in arguments.SOLVERS:
        raise _checks.fail(arguments.OP, "solver", f"one of {', '.join(arguments.SOLVERS)}", _checks.show(solver))
    tol = _checks.positive(arguments.OP, "tol", tol)
    max_cg_iter = _checks.integer(arguments.OP, "max_cg_iter", max_cg_iter, 1)
    if max_iter is not None:
        max_iter = _checks.integer(arguments.OP, "max_iter", max_iter, 0)
    objective = arguments.objective(
        X,
        y,
        loss=loss,
        l2=l2,
        sample_weight=sample_weight,
        fit_intercept=fit_intercept,
        delta=delta,
        power=power,
        offset=offset,
    )
    if solver == "min-norm":
        if objective.loss != "squared" or objective.x.layout is not torch.strided:
            got = f"loss {loss!r}, layout {objective.x.layout}"
            raise _checks.fail(arguments.OP, "solver", 'loss "squared" and dense X for "min-norm"', got)
        if start is not None:
            raise _checks.fail(arguments.OP, "start", 'None for "min-norm", which has one answer', "a start")
    if callback is not None and not callable(callback):
        raise TypeError(f"{arguments.OP}: callback: expected a function or None, got {_checks.show(callback)}")
    theta = objective.first() if start is None else _start(objective, start)
    if solver == "auto":
        solver = choose(objective)
    if max_iter is None:
        max_iter = 1000 if solver == "lbfgs" else 100

    with torch.no_grad():
        point = objective.evaluate(theta)
        if not point.finite:
            arguments.check_finite(objective.x)
        if not math.isfinite(point.value):
            raise _checks.fail(
                arguments.OP, "X, start", f"an objective that is finite at the start in {theta.dtype}", point.value
            )
        record = FitRecorder(callback)
        stop = record(objective, point, 0.0)
        system = _SYSTEMS[solver](max_cg_iter)
        if stop:
            outcome = NewtonResult(point, Status.STOPPED, 0)
        elif not point.finite:  # a gradient that overflows, of a finite objective
            outcome = NewtonResult(point, Status.STALLED, 0)
        elif solver == "min-norm":
            outcome = smallest(objective, tol, max_iter, record)
        else:
            if max_iter and solver == "newton-cholesky" and start is None and point.largest > tol * objective.total:
                point, stop = _sampled_start(objective, point, system, record)
            if stop:
                outcome = NewtonResult(point, Status.STOPPED, 0)
            else:
                if max_iter and objective.loss == "huber" and start is None and solver != "lbfgs":
                    point = _towards_delta(objective, point, system)
                outcome = newton(
                    objective,
                    point,
                    system,
                    tol=tol * objective.total,
                    max_iter=max_iter,
                    record=partial(record, objective),
                )
        point, status, n_iter, step = outcome
        newton_system = DiagonalSystem(max_cg_iter) if solver == "lbfgs" else system
        sentence = None
        if status is not Status.STOPPED and intercept_falls_forever(objective):
            status, sentence = Status.NO_MINIMUM, _NO_INTERCEPT
        elif status is not Status.STOPPED and max_iter and falls_forever(objective, point, step, newton_system):
            status = Status.NO_MINIMUM
        elif status is Status.CONVERGED and objective.l2 == 0.0 and _is_singular(objective, point, system):
            warnings.warn(
                f"{arguments.OP}: the Hessian is singular to the precision of {str(theta.dtype)[6:]}: this minimiser "
                'is one of many; use l2 > 0, or solver="min-norm" with the squared loss',
                SingularWarning,
                stacklevel=2,
            )
    grad = point.largest / objective.total
    message = sentence or _MESSAGES[status].format(grad=grad, tol=tol, max_iter=max_iter, dtype=str(theta.dtype)[6:])
    coef, intercept = objective.uncentred(point.theta)
    return GLMResult(
        coef=coef.clone(),
        intercept=intercept.clone(),
        status=status,
        message=message,
        value=point.value,
        grad_norm=grad,
        n_iter=n_iter,
        solver=solver,
        history=record.history,
    )


def _is_singular(objective: Objective, point: FitPoint, system: DirectionSolver[FitPoint]) -> bool:
    """Tell whether the Hessian at the point is, where a system has a factor that had to be made regular."""
    if not isinstance(system, FactorSystem) or system.factor is None or system.factor.exact:
        return False
    if system.at is not point:
        tail = max(1, objective.classes) if objective.intercept else 0
        return not CholeskyPreconditioner(objective.gram(point), tail, torch.finfo(point.grad.dtype).eps).exact
    return True


def choose(objective: Objective) -> str:
    """Choose the solver that "auto" stands for."""
    if objective.x.layout is torch.strided and objective.zeros().numel() <= _FACTOR_UP_TO:
        return "newton-cholesky"
    return "newton-cg"


def _start(objective: Objective, start: GLMResult | tuple[Any, Any]) -> Tensor:
    if isinstance(start, GLMResult):
        coef, intercept = start.coef, start.intercept
    elif isinstance(start, tuple | list) and len(start) == 2:
        coef, intercept = start
    else:
        raise _checks.fail(arguments.OP, "start", "a GLMResult or (coef, intercept)", _checks.show(start))
    x, d = objective.x, objective.x.shape[1]
    tail = objective.shape[1:]
    parts = []
    for name, value, shape in (("coef", coef, (d, *tail)), ("intercept", intercept, tail)):
        part = arguments.as_tensor("start", value)
        if part.shape != shape:
            raise _checks.fail(arguments.OP, "start", f"{name} of shape {shape}", f"shape {tuple(part.shape)}")
        if not bool(torch.isfinite(part).all()):
            raise _checks.fail(arguments.OP, "start", f"{name} of finite numbers", "some that are not")
        parts.append(part.to(dtype=x.dtype, device=x.device))
    return objective.centred(*parts)


def _sampled_start(
    objective: Objective, point: FitPoint, system: DirectionSolver[FitPoint], record: FitRecorder
) -> tuple[FitPoint, bool]:
    """Minimise over a sample of the rows first; a better point than the given one, or that, and whether to stop.

    The sample is every k-th row: a view. The system keeps its factor, which preconditions those of all rows.
    """
    n, coefficients = objective.rows, point.theta.numel()
    affordable = min(_SAMPLE_PER_PASS * n // coefficients, n // _SAMPLE_PART)
    stride = n // max(_SAMPLE_PER_COEFFICIENT * coefficients, affordable, 1)
    if stride < _MIN_STRIDE or objective.x.layout is not torch.strided or objective.x.numel() < _SAMPLE_FROM:
        return point, False
    part = objective.sample(stride)
    first = part.evaluate(point.theta)
    dispersion = 2.0 * first.value / part.total if objective.loss in ("squared", "huber") else 1.0
    outcome = newton(
        part,
        first,
        system,
        tol=1e-12 * part.total,
        max_iter=_SAMPLE_ITERATIONS,
        record=partial(record, part),
        decrement_tol=_SAMPLE_ACCURACY * stride * coefficients * dispersion,
    )
    found = objective.evaluate(outcome.point.theta)
    stop = outcome.status is Status.STOPPED
    if not (found.finite and found.value < point.value):
        found = point
    # Besides the evaluation at `found` there was one where the sample began.
    return found, stop or record(objective, found, 0.0, evaluations=2)


def _towards_delta(objective: Objective, point: FitPoint, system: DirectionSolver[FitPoint]) -> FitPoint:
    """Minimise for larger deltas first, down to the given one: a better point than the given one, or that.

    Newton's method takes the rows beyond delta for linear. From afar that is all of them, and there is no curvature;
    near the minimum of a delta a few times larger most of what it takes for granted is right.

    References:
        Madsen and Nielsen, A finite smoothing algorithm for linear l1 estimation, SIAM J. Optim. 3 (1993).
    """
    if point.largest == 0.0:
        return point
    theta, delta = point.theta, math.inf
    while delta > objective.delta:
        stage = replace(objective, loss="squared") if math.isinf(delta) else replace(objective, delta=delta)
        here = stage.evaluate(theta)
        accuracy = _STAGE_ACCURACY * abs(here.value)
        found = newton(
            stage,
            here,
            system,
            tol=1e-12 * stage.total,
            max_iter=_STAGE_ITERATIONS,
            decrement_tol=accuracy,
        )
        theta = found.point.theta
        if math.isinf(delta):
            z = objective.product(theta) if objective.offset is None else objective.product(theta) + objective.offset
            delta = _STAGE_FACTOR * float((z - objective.target).abs().median())
        delta /= _STAGE_FACTOR
    end = objective.evaluate(theta)
    return end if end.finite and end.value < point.value else point
