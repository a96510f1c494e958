"""One entry in scipy's shape: `minimize` drives the optimizers of `secant.optim`, `least_squares` one of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant import _checks, optim
from secant._batches import BATCHED, batched_minimize
from secant._checks import Option
from secant._fits import LOSS, batched_fit
from secant._functions import Form, Objective, Residuals, forgiven, start
from secant._sides import at_bounds, limits, pairs, scales
from secant.ops.lbfgs import MAX_HISTORY
from secant.result import Iteration, OptimizeResult, Status
from secant.solvers._robust import Robust
from secant.solvers.box import BoxIterate, lbfgs_b

_TOLERANCE = _checks.number_from(0.0)
_COUNT = _checks.integer_from(1)
_UNLIMITED = 2**62
_FTOL = 1e7 * torch.finfo(torch.float64).eps  # scipy's, of L-BFGS-B

#: Variables up to which `least_squares` decomposes J by singular values, and keeps to a trust region.
_DECOMPOSED = 1_000

#: Options of every method.
_COMMON: Mapping[str, Option] = {
    "maxiter": _COUNT,
    "maxfun": _COUNT,
    "gtol": _TOLERANCE,
    "ftol": _TOLERANCE,
    "disp": _checks.flag(),
}


#: Options of methods with batch=True alone.
_OF_BATCHES: Mapping[str, Mapping[str, Option]] = {"l-bfgs": {"check_every": _COUNT}}


class _Method(NamedTuple):
    """Tells how a method is built on an optimizer.

    optimizer: its name in `secant.optim`; None: it is no optimizer. closure: what it asks for, "gradient" or "loss".
    arguments: that the optimizer is given. options: of the method alone: what they may be, and under which name they go
    to the optimizer. defaults: of options. tol: options that `tol` sets.
    """

    optimizer: str | None
    closure: str
    arguments: Mapping[str, Any] = {}
    options: Mapping[str, tuple[Option, str]] = {}
    defaults: Mapping[str, Any] = {}
    tol: tuple[str, ...] = ("gtol",)


_PAIRS = {"maxcor": (_checks.integer_from(1, MAX_HISTORY), "history_size")}
_LIMITED: dict[str, Any] = {"maxcor": 20, "ftol": _FTOL, "maxiter": 15_000, "maxfun": 15_000}
_MAX_RADIUS = 1000.0
_RADIUS = _checks.positive_number()
_RADII = {
    "initial_trust_radius": (_RADIUS, "initial_radius"),
    "max_trust_radius": (_RADIUS, "max_radius"),
    "eta": (_checks.number_from(0.0, 0.25), "eta"),
}

#: From a method's name to how it is run. Another optimizer is one more line.
METHODS: Mapping[str, _Method] = {
    "l-bfgs": _Method(
        "LBFGS", "gradient", {"line_search_fn": "strong_wolfe"}, _PAIRS, _LIMITED, ("gtol", "ftol")
    ),
    "l-bfgs-b": _Method(
        None, "gradient", {}, {**_PAIRS, "maxls": (_COUNT, "max_trials")}, {"maxls": 20, **_LIMITED}, ("gtol", "ftol")
    ),
    "bfgs": _Method("BFGS", "gradient", {"update": "bfgs"}),
    "ssbroyden": _Method("BFGS", "gradient"),
    "newton": _Method("Newton", "loss"),
    "newton-cg": _Method("NewtonCG", "loss", {"line_search_fn": "strong_wolfe", "forcing": 0.3}),
    "trust-ncg": _Method("TrustRegion", "loss", {"subproblem": "steihaug"}, _RADII),
    "trust-exact": _Method("TrustRegion", "loss", {"subproblem": "exact"}, _RADII),
    "cubic": _Method("CubicNewton", "loss"),
}  # fmt: skip


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: str | None = None,
    jac: Any = None,
    *,
    hess: Callable[..., Any] | None = None,
    hessp: Callable[..., Any] | None = None,
    bounds: Any = None,
    tol: float | None = None,
    callback: Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
    batch: bool = False,
    offsets: Any = None,
) -> OptimizeResult:
    """Minimize a function of one tensor or array, in the shape of `scipy.optimize.minimize`.

    | method | how | derivatives |
    |---|---|---|
    | "l-bfgs" | `secant.optim.LBFGS`, strong Wolfe search; the default | gradient |
    | "l-bfgs-b" | projected, within bounds (`secant.solvers.lbfgs_b`); the default with bounds | gradient |
    | "bfgs", "ssbroyden" | `secant.optim.BFGS`, plain, and self-scaled Broyden | gradient |
    | "newton" | `secant.optim.Newton`, dense | Hessian |
    | "newton-cg" | `secant.optim.NewtonCG`, strong Wolfe search | products |
    | "trust-ncg", "trust-exact" | `secant.optim.TrustRegion`, by Steihaug's CG, and dense | products, Hessian |
    | "cubic" | `secant.optim.CubicNewton` | products |

    Args:
        fun: (x, *args) -> f(x). With jac=None, written in torch: it gets a tensor and returns one of one element that
            autograd can follow.
        x0: where to start: a tensor float32 or float64 of any shape, on any device; or an array or list of such or of
            integers (float64 then). What comes back is of the same type, shape, dtype and device (of a list, an array).
        args: more arguments of `fun`, `jac`, `hess` and `hessp`; what is no tuple is one argument.
        method: of the table, in any case.
        jac: None: by autograd. True: `fun` returns (f, g). A function: (x, *args) -> g. If x0 is no tensor, functions
            then get arrays and may return them; `fun` need not be of torch.
        hess: (x, *args) -> the Hessian (n, n), n the number of elements of x; None: by autograd, or from `hessp`.
        hessp: (x, v, *args) -> its product with v, of the shape of x.
        bounds: for "l-bfgs-b": n pairs (lower, upper), None or infinite for none; or what has `lb` and `ub`, such as
            `scipy.optimize.Bounds`. x0 is projected, and nothing is evaluated outside.
        tol: sets gtol, and for "l-bfgs" and "l-bfgs-b" ftol, unless the options do.
        callback: after each iteration called with `intermediate_result`, an `OptimizeResult` with x and fun, if that is
            its one parameter's name, with x otherwise; both are copies. Raising StopIteration ends the run.
        options: maxiter (15,000 for "l-bfgs" and "l-bfgs-b", else 200 n) and maxfun (15,000, else no limit); gtol
            (1e-5), on the largest component of the gradient (with bounds: of P(x - g) - x); ftol: the run ends when f
            changes by at most ftol max(|f|, 1) (2.2e-9 for "l-bfgs" and "l-bfgs-b", else 0); disp: print the message;
            maxcor: pairs kept (20, "l-bfgs" and "l-bfgs-b"); maxls: evaluations of one search (20, "l-bfgs-b");
            initial_trust_radius (|x0|, 1 where that is 0), max_trust_radius (1000), eta (0.01) ("trust-...").

        batch: whether x0, (B, n), holds many problems that have nothing to do with each other: `fun` then maps (B, n)
            to (B,), row for row, and is written in torch. Methods "l-bfgs" (the default), "l-bfgs-b" (with bounds),
            "bfgs", "newton" and "trust-exact": each problem has its own model, strong Wolfe search or radius, end and
            failure, and all that go on are evaluated together. A `fun` with a parameter `index`, which it gets by name,
            is called for those alone that go on: x (b, n) and their places (b,). hess gives (B, n, n); without it n
            backward passes make it. bounds: n pairs for all problems; or what has `lb` and `ub`, or a tuple (lower,
            upper) with a tensor or array, that broadcast to (B, n). maxiter and maxfun are of each problem. Up to 64
            variables "l-bfgs-b" keeps a dense matrix there, and maxcor does not matter. One more option of "l-bfgs":
            check_every, evaluations between two looks of the host at which problems go on (1 on a CPU, 8 on a GPU).
        offsets: with batch, B + 1 integers from 0 to the length of x0, which is then flat: problem i has the entries
            offsets[i] to offsets[i + 1]. `fun` maps such a vector to (B,); one with a parameter `index` gets the
            entries of those that go on, and, if it has a parameter `offsets`, theirs. Inside all are padded with zeros
            to the size of the largest. No hess.

    Returns:
        With batch the same fields but nhev, for each problem, and a message that counts the statuses. Else
        `secant.result.OptimizeResult`: x, fun, jac, nit, nfev, njev, nhev (calls of `hess` or `hessp`), status (a
        `secant.Status`), message and success. A trial where `fun` raises a RuntimeError, ValueError or ArithmeticError
        or is NaN counts as infinite, and the step is shortened. NaN at x0 ends as NOT_FINITE; an error there passes.

    Raises:
        TypeError, ValueError: an argument or option is invalid, or a function returns something else; the message names
            it.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd ed.; and those of the optimizers.

    Example:
        >>> def rosenbrock(x):
        ...     return ((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2).sum()
        >>> found = secant.minimize(rosenbrock, torch.zeros(5, dtype=torch.float64))
        >>> found.success, bool((found.x - 1).abs().max() < 1e-4)
        (True, True)
        >>> found = secant.minimize(rosenbrock, torch.zeros(2), bounds=[(None, 0.5), (None, None)])
        >>> found.x
        tensor([0.5000, 0.2500])
    """
    op = "minimize"
    name, chosen = _method(op, method, bounds)
    settings = _settings(op, name, chosen, tol, options, _OF_BATCHES.get(name, {}) if batch else {})
    args = args if isinstance(args, tuple) else (args,)
    if batch:
        if name not in BATCHED:
            raise _checks.fail(op, "method", f"None or one of {', '.join(BATCHED)} with batch=True", repr(name))
        if hess is not None and chosen.closure == "gradient":
            raise _checks.fail(op, "hess", f"None: {name!r} uses no second derivatives", _checks.describe(hess))
        for which, given in (("hessp", hessp), ("callback", callback)):
            if given is not None:
                raise _checks.fail(op, which, "None with batch=True", _checks.describe(given))
        settings.setdefault("max_trust_radius", _MAX_RADIUS)
        return batched_minimize(op, fun, x0, args, jac, hess, name, bounds, offsets, settings)
    if offsets is not None:
        raise _checks.fail(op, "offsets", "None without batch=True", _checks.describe(offsets))
    x, form = start(op, x0)
    if chosen.closure == "gradient":
        for which, given in (("hess", hess), ("hessp", hessp)):
            if given is not None:
                raise _checks.fail(op, which, f"None: {name!r} uses no second derivatives", _checks.describe(given))
    elif form.arrays and jac is not None and jac is not False and hess is None and hessp is None:
        raise _checks.fail(op, "hess or hessp", f"a function, as jac is one and {name!r} uses the Hessian", "None")
    objective = Objective(op, form, fun, args, jac, hess, hessp)
    told = _callback(op, callback, form)
    settings.setdefault("maxiter", 200 * x.numel())
    if "initial_trust_radius" in chosen.options:
        most = settings.setdefault("max_trust_radius", _MAX_RADIUS)
        size = float(x.norm())
        settings.setdefault("initial_trust_radius", min(size if 0.0 < size < math.inf else 1.0, most))
    if chosen.optimizer is None:
        found = _in_box(op, objective, x, form, bounds, settings, told)
    else:
        found = _drive(op, chosen, name, objective, x, form, settings, told)
    if settings.get("disp"):
        print(f"{op}: {found.message}; f = {found.fun:.6g}, {found.nit} iterations, {found.nfev} evaluations")
    return found


def _method(op: str, method: object, bounds: object) -> tuple[str, _Method]:
    """Look up a method, in scipy's spelling or any other case."""
    if method is None:
        method = "l-bfgs" if bounds is None else "l-bfgs-b"
    chosen = METHODS.get(method.lower()) if isinstance(method, str) else None
    if chosen is None or not isinstance(method, str):
        raise _checks.fail(op, "method", f"None or one of {', '.join(METHODS)}", _checks.show(method))
    name = method.lower()
    if bounds is not None and name != "l-bfgs-b":
        raise _checks.fail(op, "bounds", f"None: {name!r} knows no bounds ('l-bfgs-b' does)", _checks.describe(bounds))
    return name, chosen


def _settings(
    op: str, name: str, chosen: _Method, tol: object, options: Any, more: Mapping[str, Option]
) -> dict[str, Any]:
    """Check the options, of which this call may have more, and add what `tol` and the method say."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{op}: options: expected None or a dictionary, got {_checks.show(options)}")
    given = dict(options or {})
    table = {**_COMMON, **{option: may_be for option, (may_be, _) in chosen.options.items()}, **more}
    unknown = sorted(map(str, given.keys() - table.keys()))
    if unknown:
        expected = f"among {', '.join(table)} for {name!r}"
        raise _checks.fail(op, "options", expected, ", ".join(map(repr, unknown)))
    for option, value in given.items():
        if not table[option].accept(value):
            raise _checks.fail(op, f"options[{option!r}]", table[option].expected, _checks.show(value))
    if chosen.optimizer in ("LBFGS", "BFGS") and given.get("maxfun") == 1:
        raise _checks.fail(op, "options['maxfun']", "an integer >= 2 (a line search needs one trial)", 1)
    if tol is not None:
        value = _checks.nonnegative(op, "tol", tol)
        for option in chosen.tol:
            given.setdefault(option, value)
    return {"gtol": 1e-5, "ftol": 0.0, **chosen.defaults, **given}


def _callback(op: str, callback: Any, form: Form) -> Callable[[Tensor, float], bool] | None:
    """Make a function that calls a callback in scipy's way, and tells whether it wants to stop."""
    if callback is None:
        return None
    if not callable(callback):
        raise TypeError(f"{op}: callback: expected None or a function, got {_checks.show(callback)}")
    try:
        whole = set(inspect.signature(callback).parameters) == {"intermediate_result"}
    except (TypeError, ValueError):  # a builtin
        whole = False

    def told(x: Tensor, value: float) -> bool:
        x = form.give(x)
        try:
            if whole:
                callback(intermediate_result=OptimizeResult(x=x, fun=value))
            else:
                callback(x)
        except StopIteration:
            return True
        return False

    return told


def _drive(
    op: str,
    chosen: _Method,
    name: str,
    objective: Objective,
    x: Tensor,
    form: Form,
    settings: Mapping[str, Any],
    told: Callable[[Tensor, float], bool] | None,
) -> OptimizeResult:
    """Run an optimizer on x, by one call of its step."""
    assert chosen.optimizer is not None
    cls = getattr(optim, chosen.optimizer)
    x.requires_grad_()

    def gradient_closure() -> Any:
        value, x.grad = objective.value_and_gradient(x)
        return value

    def loss_closure() -> Tensor:
        return objective.loss(x)

    n_iter = 0

    before, flat = math.inf, False

    def report(iteration: Iteration) -> bool:
        """Tell the callback, and stop where f falls by less than ftol max(|f|, 1), as scipy does."""
        nonlocal n_iter, before, flat
        n_iter, last, before = iteration.n, before, iteration.value
        stop = n_iter > 0 and told is not None and told(x, iteration.value)
        size = max(abs(last), abs(before), 1.0)
        flat = not stop and size < math.inf and ftol > 0.0 and abs(last - before) <= ftol * size
        return stop or flat

    ftol = settings["ftol"]
    optimizer = cls(
        [x],
        **chosen.arguments,
        **{argument: settings[option] for option, (_, argument) in chosen.options.items() if option in settings},
        max_iter=settings["maxiter"],
        max_eval=settings.get("maxfun", _UNLIMITED),
        tolerance_grad=settings["gtol"],
        tolerance_change=0.0,
        on_error="backtrack",
        callback=report,
    )
    optimizer.step(gradient_closure if chosen.closure == "gradient" else loss_closure)
    objective.raise_first_error()
    x = x.detach()
    value, gradient = objective.found(x)
    status = Status.SMALL_CHANGE if flat else optimizer.status
    return _result(objective, form, x, value, gradient, status, n_iter)


def _in_box(
    op: str,
    objective: Objective,
    x: Tensor,
    form: Form,
    bounds: Any,
    settings: Mapping[str, Any],
    told: Callable[[Tensor, float], bool] | None,
) -> OptimizeResult:
    """Run L-BFGS-B."""
    lower, upper = pairs(op, bounds, x)

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        try:
            value, gradient = objective.value_and_gradient(x)
        except Exception as error:
            if objective.nfev == 1 or not forgiven(error):
                raise
            return math.inf, torch.zeros_like(x)
        return float(value), gradient

    def record(iterate: BoxIterate) -> bool:
        return iterate.n > 0 and told is not None and told(iterate.x, iterate.value)

    found = lbfgs_b(
        evaluate,
        x,
        lower,
        upper,
        history_size=settings["maxcor"],
        gtol=settings["gtol"],
        ftol=settings["ftol"],
        max_iter=settings["maxiter"],
        max_evaluations=settings["maxfun"],
        max_trials=settings["maxls"],
        record=record,
    )
    gradient = found.grad.to(x.dtype)
    return _result(objective, form, found.x, found.value, gradient, found.status, found.n_iter)


def _result(
    objective: Objective, form: Form, x: Tensor, value: float, gradient: Tensor, status: Status, n_iter: int
) -> OptimizeResult:
    return OptimizeResult(
        x=form.give(x),
        fun=value,
        jac=form.give(gradient),
        nit=n_iter,
        nfev=objective.nfev,
        njev=objective.njev,
        nhev=objective.nhev,
        status=status,
        message=status.message,
        success=status.ok,
    )


def least_squares(
    fun: Callable[..., Any],
    x0: Any,
    jac: Any = None,
    bounds: Any = (-math.inf, math.inf),
    *,
    ftol: float = 1e-8,
    xtol: float = 1e-8,
    gtol: float = 1e-8,
    x_scale: Any = 1.0,
    loss: str = "linear",
    f_scale: float = 1.0,
    max_nfev: int | None = None,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    callback: Callable[..., Any] | None = None,
    batch: bool = False,
    geodesic: bool = True,
    chunk: int | None = None,
    progress: bool = False,
) -> OptimizeResult:
    """Minimize 1/2 sum_i c^2 rho(r_i(x)^2 / c^2), in the shape of `scipy.optimize.least_squares`.

    It drives `secant.optim.LevenbergMarquardt`, for up to 1,000 variables with the strategy "radius" and no geodesic
    acceleration; c is `f_scale`, and rho is that of `loss`.

    With batch=True x0 is (B, p), B problems that have nothing to do with each other: `fun` maps (B, p) to (B, k), row
    for row, and each problem has its own lambda, bounds, end and failure. All that go on are evaluated together, and
    their normal equations are solved as one batch of blocks. A `fun` with a parameter `index`, which it gets by name,
    is called for those alone that go on: x (b, p) and their places (b,), by which it finds the data of each. One
    without is called for all B every time. Each problem ends where it would have ended alone.

    Args:
        fun: (x, *args, **kwargs) -> the residuals r, a tensor or array of any shape with m elements. With jac=None,
            written in torch, as for `minimize`.
        x0: where to start, as for `minimize`, within the bounds.
        jac: None: by autograd. True: `fun` returns (r, J). A function: (x, *args, **kwargs) -> J (m, n).
        bounds: (lower, upper), each a number or of the shape of x0, lower < upper; or what has `lb` and `ub`.
        ftol: the run ends when the cost changes by less than this times the cost.
        xtol: and when a step is shorter than xtol (xtol + |x|).
        gtol: and when the largest component of the gradient (with bounds: of x - P(x - gradient)) is at most this.
        x_scale: the size of each variable, a number or of the shape of x0; the method then works on x / x_scale. "jac":
            by the columns of the Jacobian, after Marquardt.
        loss: rho: "linear" z, "soft_l1" 2 ((1 + z)^1/2 - 1), "huber" z up to 1, then 2 z^1/2 - 1, "cauchy" ln(1 + z).
        f_scale: c, the residual where outliers begin.
        max_nfev: evaluations; None: 100 n.
        args, kwargs: more arguments of `fun` and `jac`; `args` that is no tuple is one argument.
        callback: as for `minimize`; `fun` is there the cost. Not with batch.
        batch: whether x0 holds many problems; `fun` and `jac`, to (B, k, p), are then of torch, and jac=True is not
            known. x_scale is then 1, (p,) or "jac".
        geodesic, chunk, progress: with batch only. geodesic: bend steps by the second derivative of the residuals along
            them, which takes an evaluation more for each. chunk: problems solved together, if `fun` takes `index`;
            None: as many as keep their Jacobian in the cache of a processor. progress: show a bar (needs rich).

    Returns:
        With batch the same fields for each problem, (B,), (B, p) and (B, k) tensors or arrays, but `curvature`,
        J^T J (B, p, p), in place of jac, and a message that counts the statuses. Else
        `secant.result.OptimizeResult`: x, cost, fun (the residuals), jac (J (m, n), each row times what makes J^T J the
        curvature of the cost where the loss is not "linear"), grad, optimality (what gtol is about), active_mask (-1 at
        a lower bound, 1 at an upper one, else 0), nit, nfev, njev, status, message, success.

    Raises:
        TypeError, ValueError: an argument is invalid, or a function returns something else.

    References:
        Moré, The Levenberg-Marquardt algorithm: implementation and theory, Lecture Notes in Mathematics 630 (1978).
        Triggs et al., Bundle adjustment: a modern synthesis (2000), section 4.3.
    """
    op = "least_squares"
    if batch:
        if callback is not None:
            raise _checks.fail(op, "callback", "None with batch=True", _checks.describe(callback))
        return batched_fit(
            op, fun, x0, jac, bounds, ftol=ftol, xtol=xtol, gtol=gtol, x_scale=x_scale, loss=loss, f_scale=f_scale,
            max_nfev=max_nfev, args=args if isinstance(args, tuple) else (args,), kwargs=dict(kwargs or {}),
            geodesic=geodesic, chunk=chunk, progress=progress,
        )  # fmt: skip
    cls = optim.LevenbergMarquardt
    for name, tolerance in (("ftol", ftol), ("xtol", xtol), ("gtol", gtol)):
        _checks.nonnegative(op, name, tolerance)
    if max_nfev is not None:
        _checks.integer(op, "max_nfev", max_nfev, 1)
    _checks.options(op, {"loss": LOSS}, {"loss": loss})
    _checks.positive(op, "f_scale", f_scale)
    x, form = start(op, x0)
    args = args if isinstance(args, tuple) else (args,)
    function = Residuals(op, form, fun, args, dict(kwargs or {}), jac)
    told = _callback(op, callback, form)
    scale, scaling = scales(op, x_scale, x)
    box = limits(op, bounds, x)
    limit = 100 * x.numel() if max_nfev is None else max_nfev
    z = (x if scale is None else x / scale).requires_grad_()
    last, n_iter, short = x.detach().clone(), 0, False

    def unscaled(z: Tensor) -> Tensor:
        return z if scale is None else z * scale

    def report(iteration: Iteration) -> bool:
        nonlocal last, n_iter, short
        n_iter = iteration.n
        if n_iter == 0:
            return False
        now = unscaled(z).detach().clone()
        change, size = float((now - last).norm()), float(now.norm())
        last, short = now, change < xtol * (xtol + size)
        return (told is not None and told(now, iteration.value)) or short

    lower, upper = (None, None) if box is None else ((b if scale is None else b / scale).reshape(-1) for b in box)
    few = x.numel() <= _DECOMPOSED
    optimizer = cls(
        [z],
        max_iter=limit,
        max_eval=limit,
        tolerance_grad=gtol,
        tolerance_change_rel=ftol,
        loss=loss,
        f_scale=float(f_scale),
        scaling=scaling,
        strategy="radius" if few else "lambda",
        geodesic=not few,
        bounds=None if box is None else (lower, upper),
        on_error="backtrack",
        callback=report,
    )
    optimizer.step(lambda: function.residuals(unscaled(z)))
    function.raise_first_error()
    x = unscaled(z).detach()
    assert optimizer.status is not None
    status = Status.SMALL_CHANGE if short and optimizer.status is Status.STOPPED else optimizer.status

    r, j = function.found(x)
    robust = Robust(loss, float(f_scale))
    right, weights = robust.linearized(r.reshape(-1).to(x.dtype))
    if weights is not None:
        j = j * weights[:, None]
    grad = (j.mT @ right).view(x.shape)
    mask, optimality = at_bounds(x, grad, box)
    return OptimizeResult(
        x=form.give(x),
        cost=float(robust.value(r)),
        fun=form.give(r),
        jac=form.give(j),
        grad=form.give(grad),
        optimality=float(optimality.abs().max()),
        active_mask=form.give(mask),
        nit=n_iter,
        nfev=function.nfev,
        njev=function.njev,
        status=status,
        message=status.message,
        success=status.ok,
    )
