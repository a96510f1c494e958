"""Many least-squares problems in one call: `least_squares(batch=True)` and `curve_fit`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant._compiled_fits import CompiledRows, Data, Model
from secant._functions import Malformed, batched_start, check_functions, start
from secant._sides import at_bounds, limits, pair, scales, side
from secant.ops.blocks import MAX_N, block_inv
from secant.result import OptimizeResult, Status
from secant.solvers._robust import Robust
from secant.solvers.batched_least_squares import (
    BatchedFit,
    Equations,
    Rows,
    Tolerances,
    Trial,
    batched_least_squares,
    normal_equations,
)

#: Bytes of a Jacobian, about, up to which problems are fitted together: what is made of it stays in a cache.
_CHUNK = 2**22

#: The same of residuals, where there is no Jacobian; many make up for the calls.
_COMPILED_CHUNK = 2**24

#: Losses of residuals.
LOSS = _checks.one_of("linear", "soft_l1", "huber", "cauchy")
_NAN = _checks.one_of("propagate", "omit", "raise")

#: Fits on which it is tried whether a model is elementwise.
_TRIED = 64

Evaluate = Callable[[Tensor, Tensor], Any]


class UserRows:
    """Evaluates functions of a user for some of B problems.

    Args:
        op: for messages. fun: (x (b, p), places (b,)) -> r (b, k). jac: the same to J (b, k, p); None: by autograd.
        like: a tensor of the dtype and device that all is brought to.
    """

    def __init__(self, op: str, fun: Evaluate, jac: Evaluate | None, like: Tensor) -> None:
        self._op, self._fun, self._jac, self._like = op, fun, jac, like
        self._forward = True  # until it is known that forward mode does not go through `fun`

    def residuals(self, x: Tensor, index: Tensor) -> Tensor:
        """Evaluate without a graph."""
        with torch.no_grad():
            return self._checked(self._fun(x, index), x).detach()

    def trial(self, x: Tensor, index: Tensor, before: Tensor | None, robust: Robust) -> Trial:
        """Evaluate r, the loss and how much less it is than before."""
        r = self.residuals(x, index)
        value = robust.value(r)
        return Trial(r, value, value if before is None else robust.decrease(before, r))

    def equations(self, x: Tensor, index: Tensor, r: Tensor, robust: Robust) -> Equations:
        """Evaluate J and what is made of it."""
        return normal_equations(self.jacobian(x, index), r, robust)

    def jacobian(self, x: Tensor, index: Tensor) -> Tensor:
        """Evaluate the given Jacobian, or make it of p products, as every problem is its own row."""
        if self._jac is not None:
            with torch.no_grad():
                found = self._jac(x, index)
            if found is not None:
                return self._checked_jacobian(found, x)
            self._jac = None
        if self._forward:
            try:
                return self._by_columns(x, index)
            except (NotImplementedError, RuntimeError):
                self._forward = (
                    False  # an operation without a forward derivative; if it is something else, it is raised below
                )
        return self._by_two_backward_passes(x, index)

    def _checked_jacobian(self, j: Any, x: Tensor) -> Tensor:
        b, p = x.shape
        if isinstance(j, Tensor) and j.dim() == 3 and (j.shape[0], j.shape[2]) == (b, p):
            return j.detach().to(self._like)
        raise Malformed(f"{self._op}: jac: expected a tensor (B, k, p) = ({b}, k, {p}), got {_checks.describe(j)}")

    def _checked(self, r: Any, x: Tensor) -> Tensor:
        if not isinstance(r, Tensor) or r.dim() < 1 or len(r) != len(x) or r.is_complex():
            got = _checks.describe(r)
            raise Malformed(f"{self._op}: fun: expected a real tensor (B, k) of B = {len(x)} rows, got {got}")
        return r.reshape(len(x), -1).to(self._like.device, self._like.dtype)

    def _by_columns(self, x: Tensor, index: Tensor) -> Tensor:
        """Differentiate by one parameter of all problems after the other, all p in one vectorized pass."""

        def column(tangent: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(lambda z: self._checked(self._fun(z, index), z), (x,), (tangent,))[1]
            return found

        p = x.shape[1]
        tangents = torch.eye(p, dtype=x.dtype, device=x.device)[:, None].expand(p, *x.shape)
        return torch.func.vmap(column)(tangents).permute(1, 2, 0).detach()

    def _by_two_backward_passes(self, x: Tensor, index: Tensor) -> Tensor:
        """Differentiate u -> J^T u, which is linear, by u."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            r = self._checked(self._fun(x, index), x)
            if not r.requires_grad:
                raise Malformed(f"{self._op}: fun: expected residuals that autograd can follow (or give jac)")
            u = torch.ones_like(r).requires_grad_()
            (back,) = torch.autograd.grad(r, x, u, create_graph=True)
            columns = [
                torch.autograd.grad(back[:, i].sum(), u, retain_graph=True, materialize_grads=True)[0]
                for i in range(x.shape[1])
            ]
        return torch.stack(columns, -1).detach()


def by_place(
    fun: Callable[..., Any], x0: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Evaluate, bool]:
    """Make a function of some problems from one of all of them, or from one that takes `index`; tell which it was."""
    try:
        takes_index = "index" in inspect.signature(fun).parameters
    except (TypeError, ValueError):
        takes_index = False
    if takes_index:
        return lambda x, index: fun(x, *args, index=index, **kwargs), True

    def evaluated(x: Tensor, index: Tensor) -> Any:
        if len(index) == len(x0):
            return fun(x, *args, **kwargs)
        # What has stopped is evaluated where it began, and thrown away.
        found = fun(x0.index_copy(0, index, x), *args, **kwargs)
        return tuple(map(some, found, [index] * len(found))) if isinstance(found, tuple) else some(found, index)

    def some(rows: Any, index: Tensor) -> Any:
        fits = isinstance(rows, Tensor) and rows.dim() > 0 and len(rows) == len(x0)
        return rows.index_select(0, index) if fits else rows

    return evaluated, False


def fit_in_chunks(
    op: str,
    rows_of: Callable[[int, int], Rows],
    x0: Tensor,
    *,
    chunk: int,
    progress: bool,
    lower: Tensor | None,
    upper: Tensor | None,
    **options: Any,
) -> BatchedFit:
    """Fit `chunk` problems at once; rows_of: (begin, end) -> what evaluates those, with places from 0."""
    b = len(x0)
    parts: list[BatchedFit] = []
    with _bar(op, b, progress) as advance:
        for begin in range(0, b, chunk):
            end = min(begin + chunk, b)
            low, high = (None if side is None else side[begin:end] for side in (lower, upper))
            rows, tell = rows_of(begin, end), functools.partial(_add, advance, begin)
            parts.append(batched_least_squares(rows, x0[begin:end], tell=tell, lower=low, upper=high, **options))
    return parts[0] if len(parts) == 1 else BatchedFit(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _fitting(like: Tensor, numbers: int, most: int) -> int:
    """Count the fits of which that many numbers each take `most` bytes, so that what is made of them stays in a cache.

    On a GPU all are made together.
    """
    if like.device.type != "cpu":
        return max(1, len(like))
    return max(64, most // (max(numbers, 1) * like.element_size()))


def _moved(function: Evaluate, begin: int) -> Evaluate:
    return lambda x, index: function(x, index + begin)


def _add(advance: Callable[[int], object], begin: int, stopped: int) -> None:
    advance(begin + stopped)


@contextlib.contextmanager
def _bar(op: str, total: int, wanted: bool) -> Iterator[Callable[[int], object]]:
    """Show how many problems have ended."""
    if not wanted:
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task(op, total=total)
        yield lambda done: progress.update(task, completed=done)


def summary(status: Tensor) -> tuple[Tensor, str]:
    """Return which problems have converged, and a sentence about all."""
    counts = torch.bincount(status.long(), minlength=len(Status)).tolist()
    good = (status == Status.CONVERGED) | (status == Status.SMALL_CHANGE)
    parts = [f"{count:,} {Status(code)}" for code, count in enumerate(counts) if count]
    return good, f"{len(status):,} problems: {', '.join(parts)}"


def batched_fit(
    op: str,
    fun: Callable[..., Any],
    x0: Any,
    jac: Any,
    bounds: Any,
    *,
    ftol: float,
    xtol: float,
    gtol: float,
    x_scale: Any,
    loss: str,
    f_scale: float,
    max_nfev: int | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    geodesic: bool,
    chunk: int | None,
    progress: bool,
) -> OptimizeResult:
    """Run `least_squares` on B problems; the arguments are those."""
    check_functions(op, fun, jac)
    if isinstance(jac, bool):
        raise _checks.fail(op, "jac", "None (by autograd) or a function, with batch=True", _checks.describe(jac))
    _checks.options(op, {"loss": LOSS, "geodesic": _checks.flag()}, {"loss": loss, "geodesic": geodesic})
    x, form = batched_start(op, x0, "p")
    box = limits(op, bounds, x)
    scale, scaling = scales(op, x_scale, x[0])
    if scaling == "identity":
        scale = x.new_ones(x.shape[1]) if scale is None else scale
    evaluate, takes_index = by_place(fun, x, args, kwargs)
    if chunk is not None and not takes_index:
        raise _checks.fail(op, "chunk", "None, as fun takes no index", chunk)
    derivative = None if jac is None else by_place(jac, x, args, kwargs)[0]

    def rows_of(begin: int, end: int) -> UserRows:
        return UserRows(op, _moved(evaluate, begin), None if derivative is None else _moved(derivative, begin), x)

    if not takes_index:
        chunk = len(x)
    elif chunk is None:  # `fun` is asked how many residuals there are
        k = rows_of(0, 1).residuals(x[:1], torch.zeros(1, dtype=torch.int64, device=x.device)).shape[1]
        chunk = _fitting(x, k * x.shape[1], _CHUNK)
    found = fit_in_chunks(
        op, rows_of, x, chunk=chunk, progress=progress,
        lower=None if box is None else box[0], upper=None if box is None else box[1], loss=loss,
        f_scale=_checks.positive(op, "f_scale", f_scale), x_scale=scale, geodesic=geodesic,
        tolerances=_tolerances(op, ftol, xtol, gtol), max_nfev=_limit(op, max_nfev, x.shape[1]),
    )  # fmt: skip
    good, message = summary(found.status)
    mask, optimality = at_bounds(found.x, found.grad, box)
    return OptimizeResult(
        x=form.give(found.x),
        cost=form.give(found.cost),
        fun=form.give(found.residuals),
        curvature=form.give(found.curvature),
        grad=form.give(found.grad),
        optimality=form.give(optimality.abs().amax(-1)),
        active_mask=form.give(mask),
        nit=form.give(found.nit),
        nfev=form.give(found.nfev),
        njev=form.give(found.njev),
        status=form.give(found.status),
        message=message,
        success=form.give(good),
    )


def _tolerances(op: str, ftol: object, xtol: object, gtol: object) -> Tolerances:
    given = {"ftol": ftol, "xtol": xtol, "gtol": gtol}
    return Tolerances(**{name: _checks.nonnegative(op, name, x) for name, x in given.items()})


def _limit(op: str, max_nfev: int | None, p: int) -> int:
    return 100 * p if max_nfev is None else _checks.integer(op, "max_nfev", max_nfev, 1)


class CurveFit(NamedTuple):
    """Holds parameters, their covariance and how each fit has ended.

    popt (B, p). pcov (B, p, p). status (B,), int32: a `secant.Status`; as tensors or arrays, as the data were. Without
    the batch dimension where ydata has none.
    """

    popt: Any
    pcov: Any
    status: Any


def curve_fit(
    f: Callable[..., Any],
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    bounds: Any = (-math.inf, math.inf),
    *,
    jac: Callable[..., Any] | None = None,
    loss: str = "linear",
    f_scale: float = 1.0,
    fixed: Sequence[bool] | None = None,
    nan_policy: str = "propagate",
    ftol: float = 1e-8,
    xtol: float = 1e-8,
    gtol: float = 1e-8,
    max_nfev: int | None = None,
    geodesic: bool = False,
    compile: bool = False,
    chunk: int | None = None,
    progress: bool = False,
) -> CurveFit:
    r"""Fit a curve to each of B sets of data, in the shape of `scipy.optimize.curve_fit`.

    popt_b minimizes 1/2 sum_i ((f(x_i, p) - y_bi) / sigma_bi)^2, by Levenberg and Marquardt's method, each problem with
    its own lambda and its own end; see `secant.least_squares`. A fit that fails changes nothing of the others.

    Args:
        f: (x, *parameters) -> the model, written in torch. Each parameter comes as a tensor (b, 1), for the b fits that
            go on; what it returns must broadcast to (b, k). So a function for one fit mostly does as it is.
        xdata: given to f: a tensor or array, or a tuple of such. One of the shape of ydata, (B, k), is taken to have a
            row for each fit, every other goes to all fits.
        ydata: (B, k), or (k,) for one fit; float32 or float64. NaN: see nan_policy.
        p0: (p,) or (B, p), where to start; None: as many as f has parameters, ones, or within their bounds.
        sigma: None, a number, (k,) or (B, k): standard deviations; or covariances (k, k), where that is no (B, k), or
            (B, k, k).
        absolute_sigma: whether sigma is in the units of y; if not, pcov is scaled so that chi^2 is k - p.
        bounds: (lower, upper), each a number, (p,) or (B, p).
        jac: (x, *parameters) -> df/dp, that broadcasts to (b, k, p); None: by autograd, in forward mode where f allows.
        loss, f_scale: as for `secant.least_squares`.
        fixed: p flags, which parameters stay at p0; their rows and columns of pcov are 0.
        nan_policy: "propagate": a fit with NaN ends as NOT_FINITE; "omit": NaN in y counts as no datum; "raise".
        ftol, xtol, gtol, max_nfev: as for `secant.least_squares`; max_nfev of each fit.
        geodesic: whether steps are bent by the second derivative along them, which takes another evaluation for each:
            for long curved valleys.
        compile: whether torch.compile makes loops of f, its derivatives and the normal equations, so that no Jacobian
            is ever in memory. Every value of f must depend on its own parameters alone, and f be something that
            torch.compile goes through; jac, geodesic and covariances are not for it. The first call of an f takes
            seconds to compile (on a CPU with a C++ compiler); the same f, not one made anew, is compiled once.
        chunk: fits made together; None: as many as keep their Jacobian in the cache (with `compile`, their residuals),
            on a GPU all.
        progress: show a bar (needs rich).

    Returns:
        `CurveFit`, which unpacks as (popt, pcov, status). pcov = (J^T J)^-1, and infinite where that is singular or
        nothing is left to estimate its scale from, as scipy has it.

    Raises:
        TypeError, ValueError: an argument is invalid, or f returns something else.

    References:
        See `secant.least_squares`. Press et al., Numerical Recipes, 3rd ed., section 15.6 (the covariance).

    Example:
        >>> t = torch.linspace(0, 1, 30, dtype=torch.float64)
        >>> rates = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
        >>> popt, pcov, status = secant.curve_fit(lambda t, a, k: a * torch.exp(-k * t), t, 5 * torch.exp(-rates * t))
        >>> popt.round(decimals=6).tolist(), status.tolist()
        ([[5.0, 1.0], [5.0, 2.0], [5.0, 3.0]], [0, 0, 0])
    """
    op = "curve_fit"
    _checks.options(op, {"loss": LOSS, "nan_policy": _NAN}, {"loss": loss, "nan_policy": nan_policy})
    tolerances = _tolerances(op, ftol, xtol, gtol)
    y, form = start(op, ydata)
    if y.dim() > 2:
        raise _checks.fail(op, "ydata", "shape (B, k) or (k,)", f"shape {tuple(y.shape)}")
    single, y = y.dim() == 1, y.reshape(-1, y.shape[-1])
    b, k = y.shape
    given = xdata if isinstance(xdata, tuple) else (xdata,)
    inputs = [torch.as_tensor(x, dtype=None if hasattr(x, "dtype") else y.dtype, device=y.device) for x in given]
    inputs = [x.detach().to(y.dtype) if x.is_floating_point() else x for x in inputs]
    start_at = _first_parameters(op, f, p0, bounds, y)
    p = start_at.shape[1]
    if p > MAX_N:
        raise _checks.fail(op, "p0", f"at most {MAX_N} parameters", p)
    box = limits(op, bounds, start_at, "p0")
    free = None
    if fixed is not None:
        held = torch.as_tensor(fixed, device=y.device)
        if held.shape != (p,) or held.dtype != torch.bool:
            raise _checks.fail(op, "fixed", f"{p} flags", _checks.show(fixed))
        free = ~held
    gone = y.isnan()
    if nan_policy == "raise" and bool(gone.any()):
        raise _checks.fail(op, "ydata", "no NaN, as nan_policy='raise' says", f"{int(gone.sum())}")
    there = ~gone if nan_policy == "omit" and bool(gone.any()) else None
    curve = _Curve(op, f, jac, inputs, isinstance(xdata, tuple), y, there, _weighing(op, sigma, y))
    flags = {"geodesic": geodesic, "compile": compile}
    _checks.options(op, dict.fromkeys(flags, _checks.flag()), flags)
    curve.residuals(start_at[:1], torch.zeros(1, dtype=torch.int64, device=y.device))  # what f returns is seen on one
    if compile:
        curve.check_compiled(start_at, geodesic=geodesic)

    def rows_of(begin: int, end: int) -> Rows:
        if compile:
            return curve.compiled(begin, end)
        return UserRows(op, _moved(curve.residuals, begin), _moved(curve.jacobian, begin), y)

    if chunk is None:
        chunk = _fitting(y, k, _COMPILED_CHUNK) if compile else _fitting(y, k * p, _CHUNK)
    found = fit_in_chunks(
        op, rows_of, start_at, chunk=_checks.integer(op, "chunk", chunk, 1), progress=progress,
        lower=None if box is None else box[0], upper=None if box is None else box[1], free=free, loss=loss,
        f_scale=_checks.positive(op, "f_scale", f_scale), geodesic=geodesic, tolerances=tolerances,
        max_nfev=_limit(op, max_nfev, p), residuals=False,
    )  # fmt: skip
    count = torch.full((b,), k, device=y.device) if there is None else there.sum(-1)
    pcov = _covariance(found, free, None if absolute_sigma else count)
    parts = [found.x, pcov, found.status]
    if single:
        parts = [x[0] for x in parts]
    return CurveFit(*(x.cpu().numpy() if form.arrays else x for x in parts))


class _Curve:
    """The residuals of a model of one variable or several, for some of the fits.

    Args:
        inputs: what f gets before the parameters, as one tuple if `packed`. there (B, k): which data count; None: all.
        weigh: see `_weighing`.
    """

    def __init__(
        self,
        op: str,
        f: Callable[..., Any],
        jac: Callable[..., Any] | None,
        inputs: list[Tensor],
        packed: bool,
        y: Tensor,
        there: Tensor | None,
        weigh: _Weights,
    ) -> None:
        self._op, self._f, self._jac = op, f, jac
        self._inputs, self._packed = [(x, x.shape == y.shape and len(y) > 1) for x in inputs], packed
        self._y = y if there is None else torch.where(there, y, 0.0)
        self._there, self._weigh = there, weigh
        self._is_elementwise: bool | None = None  # whether a value of f depends on no other's parameters; not known yet

    def _call(self, f: Callable[..., Any], parameters: Sequence[Tensor], index: Tensor) -> Any:
        own = [x.index_select(0, index) if each else x for x, each in self._inputs]
        return f(tuple(own) if self._packed else own[0], *parameters)

    def _model(self, parameters: Sequence[Tensor], index: Tensor) -> Tensor:
        shape = (len(index), self._y.shape[1])
        found = self._call(self._f, parameters, index)
        if isinstance(found, Tensor):
            with contextlib.suppress(RuntimeError):
                return found.expand(shape)
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else _checks.describe(found)
        raise Malformed(f"{self._op}: f: expected a tensor that broadcasts to {shape}, got {got}")

    def _rows(self, r: Tensor, index: Tensor) -> Tensor:
        """Leave out what is no datum, and weigh the rest; (b, k, any)."""
        if self._there is not None:
            r = torch.where(self._there.index_select(0, index)[..., None], r, 0.0)
        return self._weigh(r, index)

    def check_compiled(self, x: Tensor, *, geodesic: bool) -> None:
        """Refuse what `compiled` cannot do; x (B, p)."""
        some = x[:_TRIED]
        elementwise = self._jac is not None or self._agrees(some, torch.arange(len(some), device=x.device))
        for wrong, expected, got in (
            (self._jac is not None, "no jac, as derivatives are compiled, too", "one"),
            (geodesic, "geodesic=False", "True"),
            (self._weigh.factor is not None, "a sigma of standard deviations", "covariances"),
            (not elementwise, "an f whose values each depend on their own parameters alone", "another"),
        ):
            if wrong:
                raise _checks.fail(self._op, "compile", expected, got)

    def compiled(self, begin: int, end: int) -> CompiledRows:
        """Make what evaluates some of the fits, in loops."""
        own = slice(begin, end)
        inputs = tuple(x[own] if each else x for x, each in self._inputs)
        scale, there = (None if x is None else x[own] for x in (self._weigh.scale, self._there))
        model = Model(self._f, self._packed, tuple(each for _, each in self._inputs))
        return CompiledRows(self._op, model, Data(inputs, self._y[own], scale, there))

    def residuals(self, x: Tensor, index: Tensor) -> Tensor:
        """Evaluate r (b, k)."""
        r = self._model(x[:, :, None].unbind(1), index) - self._y.index_select(0, index)
        return self._rows(r[..., None], index)[..., 0]

    def jacobian(self, x: Tensor, index: Tensor) -> Tensor | None:
        """Evaluate J (b, k, p); None: it is to be made of the residuals."""
        shape = (len(index), self._y.shape[1], x.shape[1])
        if self._jac is None:
            if self._is_elementwise is None:
                self._is_elementwise = self._agrees(x, index)
            return self._rows(self._elementwise(x, index), index) if self._is_elementwise else None
        j = self._call(self._jac, x[:, :, None].unbind(1), index)
        if isinstance(j, Tensor):
            with contextlib.suppress(RuntimeError):
                return self._rows(j.expand(shape), index)
        raise Malformed(f"{self._op}: jac: expected a tensor that broadcasts to {shape}, got {_checks.describe(j)}")

    @torch.enable_grad()
    def _elementwise(self, x: Tensor, index: Tensor) -> Tensor:
        """Differentiate every value by parameters of its own, all in one backward pass."""
        b, p = x.shape
        x = x.detach().requires_grad_()
        own = [x[:, i, None].expand(b, self._y.shape[1]) for i in range(p)]
        found = torch.autograd.grad(self._model(own, index).sum(), own, materialize_grads=True, allow_unused=True)
        return torch.stack(found, 1).mT  # each column in one piece

    def _agrees(self, x: Tensor, index: Tensor) -> bool:
        """Tell whether that is the Jacobian, by a product with a random vector on its left."""
        try:
            j = self._elementwise(x, index)
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                values = self._model(x[:, :, None].unbind(1), index)
                draw = torch.Generator().manual_seed(0)
                u = torch.randn(values.shape, generator=draw, dtype=torch.float64).to(values)
                (product,) = torch.autograd.grad(values, x, u)
        except RuntimeError:
            return False  # such as of shapes; it is raised again where there is no other way
        known = values.isfinite().all(-1)
        error, size = ((u[:, None] @ j)[:, 0] - product).abs(), (u.abs()[:, None] @ j.abs())[:, 0]
        return bool((error <= torch.finfo(x.dtype).eps ** 0.75 * size)[known].all())


def _first_parameters(op: str, f: Callable[..., Any], p0: Any, bounds: Any, y: Tensor) -> Tensor:
    """Read p0 as (B, p)."""
    if p0 is None:
        names = list(inspect.signature(f).parameters.values())
        if any(x.kind is x.VAR_POSITIONAL for x in names) or len(names) < 2:
            raise _checks.fail(op, "p0", "where to start, as f does not say how many parameters it has", "None")
        ones = y.new_ones(len(y), len(names) - 1)
        lower, upper = (side(op, f"bounds[{i}]", bound, ones).to(ones) for i, bound in enumerate(pair(op, bounds)))
        inside = torch.where(lower.isfinite(), lower + 1.0, torch.where(upper.isfinite(), upper - 1.0, ones))
        return torch.where(lower.isfinite() & upper.isfinite(), 0.5 * (lower + upper), inside)
    x = torch.as_tensor(p0, dtype=y.dtype, device=y.device).detach()
    if x.dim() == 0:
        x = x[None]
    if x.dim() > 2 or x.shape[-1] == 0 or (x.dim() == 2 and len(x) not in (1, len(y))):
        raise _checks.fail(op, "p0", f"shape (p,) or ({len(y)}, p)", f"shape {tuple(x.shape)}")
    return x.expand(len(y), x.shape[-1]).clone()


class _Weights(NamedTuple):
    """What divides residuals or rows of J, (b, k, any), by standard deviations.

    scale: (B, k), their inverses; factor: (k, k) or (B, k, k), Cholesky's of covariances; None and None: nothing.
    """

    scale: Tensor | None = None
    factor: Tensor | None = None

    def __call__(self, r: Tensor, index: Tensor) -> Tensor:
        if self.factor is not None:
            own = self.factor if self.factor.dim() == 2 else self.factor.index_select(0, index)
            return torch.linalg.solve_triangular(own, r, upper=False)
        return r if self.scale is None else r * self.scale.index_select(0, index)[..., None]


def _weighing(op: str, sigma: Any, y: Tensor) -> _Weights:
    """Read sigma."""
    if sigma is None:
        return _Weights()
    b, k = y.shape
    s = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).detach()
    if s.shape == (b, k, k) or (s.shape == (k, k) and s.shape != y.shape):
        factor, info = torch.linalg.cholesky_ex(s)
        if bool((info != 0).any()):
            raise _checks.fail(op, "sigma", "positive definite covariances", "one that is not")
        return _Weights(factor=factor)
    if not (s.dim() == 0 or s.shape in ((k,), (1, k), (b, k), (b, 1))):
        shapes = f"a number, ({k},), ({b}, {k}), ({k}, {k}) or ({b}, {k}, {k})"
        raise _checks.fail(op, "sigma", shapes, f"shape {tuple(s.shape)}")
    if not bool((s > 0).all()):
        raise _checks.fail(op, "sigma", "numbers > 0", "one that is not")
    return _Weights(scale=(1.0 / s).expand(b, k))


def _covariance(found: BatchedFit, free: Tensor | None, count: Tensor | None) -> Tensor:
    """Invert J^T J, scaled by its diagonal; times the variance of the residuals of `count` data, if that is wanted."""
    a = found.curvature
    p = a.shape[-1]
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    if free is not None:
        scale = torch.where(free, scale, 0.0)
    scaled = a * scale[:, :, None] * scale[:, None, :]
    if free is not None:
        scaled = scaled + torch.diag((~free).to(a))
    # Below rounding a pivot is zero: what it says is noise.
    factor, info = torch.linalg.cholesky_ex(scaled)
    least = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    singular = (info != 0) | ~(least > p * torch.finfo(a.dtype).eps)
    pcov = block_inv(scaled)[0] * scale[:, :, None] * scale[:, None, :]
    if count is not None:
        moving = p if free is None else int(free.sum())
        spare = (count - moving).to(a)
        variance = torch.where(spare > 0, 2.0 * found.cost / spare, math.inf)
        singular = singular | (spare <= 0)
        pcov = pcov * variance[:, None, None]
    pcov = torch.where(singular[:, None, None], math.inf, pcov)
    pcov = torch.where((found.status == Status.NOT_FINITE)[:, None, None], math.nan, pcov)
    return pcov if free is None else torch.where(free[:, None] & free, pcov, 0.0)
