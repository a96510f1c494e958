"""The base of optimizers that minimise a quadratic model of the loss at each point: H, or GGN or Fisher for H."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant.curvature import EvaluatedPoint
from secant.curvature._curvature import CurvatureOperator
from secant.optim._point_optimizer import COMMON, Advance, PointOptimizer
from secant.result import Status
from secant.solvers.line_search import Trial, run, strong_wolfe

#: Trials of a strong Wolfe search.
_TRIALS = 25
#: Of the decrease that a model promises, what a line search asks for.
_SUFFICIENT = 1e-4
#: Halvings of a step that leads to no finite loss, before it is shortened by more each time.
_HALVINGS = 8

#: Options of the optimizers whose model is of a choice.
CURVATURE: Mapping[str, Option] = {
    **COMMON,
    "curvature": _checks.one_of("hessian", "ggn", "fisher"),
    "likelihood": _checks.one_of("categorical", "bernoulli", "gaussian"),
    "maximize": _checks.flag(),
}


class ModelStep(NamedTuple):
    """A step that minimises a model.

    predicted: decrease that the model promises. size: |step|. inner: products that it took. finite: False where a
    product was not.
    """

    step: Tensor
    predicted: float
    size: float
    inner: int = 0
    finite: bool = True


class CurvatureOptimizer(PointOptimizer, abc.ABC):
    """Base of the optimizers with a model m(s) = g.s + 1/2 s.B s of what a step s changes.

    B is the Hessian of the loss, its generalised Gauss-Newton matrix, or the Fisher information with labels drawn anew
    at each iteration (from its number, so that a run can be repeated); of the batch of the gradient, or of another.

    A decrease that is lost in the rounding of the loss is judged by gradients: see `_ratio`.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("loss", "outputs")
    LAYOUT = ("maximize",)

    _elsewhere: Callable[[], Any] | None = None  # the closure of the curvature, where it is another one

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any], curvature_closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run up to `max_iter` iterations.

        Args:
            closure: () -> the loss with its graph, or (outputs, loss) for a curvature other than "hessian"; it does not
                call backward. It is called with gradients enabled, and may be called several times.
            curvature_closure: the same of another batch, whose curvature is used: on the batch of the gradient both the
                curvature along a direction and the slope are biased (arXiv 2410.14325). Its loss does not count.

        Returns:
            The loss at the start, without a graph.

        Raises:
            TypeError: a closure is not callable.
            ValueError: a closure returned another kind of thing, which the message names; an option was changed to
                something invalid.
            Whatever a closure or the callback raises. After any of these the parameters, their gradients and the state
                are what they were before the call.
        """
        if curvature_closure is not None and not callable(curvature_closure):
            got = _checks.describe(curvature_closure)
            raise TypeError(f"{self._name}.step: curvature_closure: expected a function or None, got {got}")
        self._elsewhere = curvature_closure
        try:
            return super().step(closure)
        finally:
            self._elsewhere = None

    def _kind(self) -> str:
        return "loss" if self.param_groups[0].get("curvature", "hessian") == "hessian" else "outputs"

    def _curvature(self, point: EvaluatedPoint) -> CurvatureOperator | None:
        """Return B where the parameters are; None: the loss of the other batch is not finite there."""
        if self._elsewhere is not None:
            other = self._evaluate_point(self._elsewhere)
            if other is None or not math.isfinite(self._value(other)):
                return None
            point = other
        options = self.param_groups[0]
        curvature = options.get("curvature", "hessian")
        if curvature == "fisher":
            return point.fisher(likelihood=options["likelihood"], seed=self._own["n_iter"])
        return point.hessian() if curvature == "hessian" else point.ggn()

    def _try(self, step: Tensor) -> EvaluatedPoint | None:
        if self._known is not None:
            self._known.release()  # its parameters are left
        return super()._try(step)

    def _again(self, point: EvaluatedPoint) -> CurvatureOperator | None:
        """Go back to the start of the iteration, and return B there once more; None where it cannot be had now."""
        if self._elsewhere is not None:
            self._free_parameters.set_(self._start_views)
            return self._curvature(point)
        found = self._revisit()
        return None if found is None else self._curvature(found)

    def _accuracy(self, g: Tensor) -> float:
        """Return the residual, relative to |g|, to which a model is minimised: less as the run gets on.

        References:
            Conn, Gould, Toint, Trust-Region Methods (2000), eq. 7.5.4, with sizes relative to the first gradient's.
        """
        first = self._own["first_grad_max"]
        return min(0.5, (float(g.abs().max()) / first) ** 0.5) if first > 0.0 else 0.5

    # Judging a step ---------------------------------------------------------------------------------------------------

    def _is_blind(self, point: EvaluatedPoint, predicted: float) -> bool:
        """Tell whether a decrease of this size is lost in the rounding of the loss."""
        return predicted <= self._noise(self._value(point))

    def _ratio(self, point: EvaluatedPoint, new: EvaluatedPoint | None, step: Tensor, predicted: float) -> float:
        """Return what a step has lowered the loss by, over what the model promised; -inf of one that led nowhere.

        Where both are lost in rounding, gradients tell: 1 if the slope along the step has become steeper (negative
        curvature: what is lost now is not for long), or if it has not turned round and the gradient has become smaller;
        else -inf. The slopes are those of the approximate Wolfe conditions.

        References:
            Hager and Zhang, A new conjugate gradient method with guaranteed descent and an efficient line search, SIAM
            J. Optim. 16 (2005), eq. 4.1. Conn, Gould, Toint, Trust-Region Methods (2000), section 17.4.2.
        """
        if new is None:
            return -math.inf
        decrease = self._value(point) - self._value(new)
        if not (self._is_blind(point, predicted) and abs(decrease) <= self._noise(self._value(point))):
            ratio = decrease / predicted if predicted > 0.0 else -math.inf
            # No point without a finite gradient is accepted; of one that may be, it is needed anyway.
            return ratio if ratio <= 0.0 or math.isfinite(self._grad_max(new)) else -math.inf
        before, after = (float(p.gradient().double().dot(step.double())) for p in (point, new))
        smaller = after <= -(1.0 - 2.0 * _SUFFICIENT) * before and self._grad_max(new) < self._grad_max(point)
        return 1.0 if after < before or smaller else -math.inf

    def _without_norm(self, g: Tensor) -> Status | None:
        """Return why no Krylov space begins at a gradient: its norm is no number, or squared to nothing; else None."""
        norm = float(g.norm())
        return None if 0.0 < norm < math.inf else Status.STALLED if norm == 0.0 else Status.NOT_FINITE

    def _first_good(
        self,
        point: EvaluatedPoint,
        propose: Callable[[], ModelStep | Status],
        learn: Callable[[float, ModelStep, EvaluatedPoint | None], None],
        *,
        least: float,
        before: Mapping[str, float],
    ) -> Advance:
        """Take the first proposal that lowers the loss by more than a share `least` of what its model promises.

        Args:
            propose: minimises the model as the state's numbers have it now; a `Status` where that cannot be done again.
            learn: is told the ratio, the proposal, and the point where it led, and moves those numbers.
            before: what the numbers are put back to where no proposal can be accepted.
        """
        inner, refused, finite = 0, False, False
        while True:
            found = propose()
            if isinstance(found, Status):
                return self._stay(found, inner)
            inner += found.inner
            if not (self._is_felt(found.step) and found.predicted > 0.0):
                self._own.update(before)
                bad = not found.finite or (refused and not finite)
                return self._stay(Status.NOT_FINITE if bad else Status.STALLED, inner)
            if self._is_spent():
                return self._stay(Status.MAX_EVAL, inner)
            new = self._try(found.step)
            finite = finite or new is not None
            ratio = self._ratio(point, new, found.step, found.predicted)
            learn(ratio, found, new)
            if ratio > least:
                assert new is not None
                return self._accept(new, found.step, found.size, inner)
            if new is not None and self._is_blind(point, found.predicted):
                self._own.update(before)
                return self._stay(Status.STALLED, inner)
            refused = True

    def _backtrack(
        self, point: EvaluatedPoint, d: Tensor, slope: float, *, bend: float = 0.0, inner: int = 0
    ) -> Advance:
        """Take the first of t d, t = lr and then shorter, that lowers the loss by a share of what is promised.

        The promise is -(t slope + 1/2 t^2 bend), of which a shorter t is chosen by interpolation.

        Args:
            slope: g.d < 0. bend: d.B d where that is negative, else 0.
        """
        t, finite = self._lr, False
        if t == 0.0:
            return self._stay(Status.SMALL_CHANGE, inner)
        value = self._value(point)
        for k in itertools.count(1):
            step = t * d
            if not self._is_felt(step):
                bad = (k > 1 and not finite) or not bool(step.isfinite().all())
                return self._stay(Status.NOT_FINITE if bad else Status.STALLED, inner)
            if self._is_spent():
                break
            new = self._try(step)
            promised = -(t * slope + 0.5 * t * t * bend)
            if self._ratio(point, new, step, promised) >= _SUFFICIENT:
                assert new is not None
                return self._accept(new, step, t, inner)
            if new is None:
                t *= 0.5 ** max(1, k - _HALVINGS)
                continue
            finite = True
            if self._is_blind(point, promised):
                return self._stay(Status.STALLED, inner)
            # The minimum of the parabola through value and slope at 0 and the value at t.
            rise = self._value(new) - value - t * slope
            t *= min(0.5, max(0.1, -0.5 * t * slope / rise)) if rise > 0.0 else 0.5
        return self._stay(Status.MAX_EVAL, inner)

    def _search(self, point: EvaluatedPoint, d: Tensor, slope: float, *, inner: int = 0) -> Advance:
        """Take a step t d that satisfies the strong Wolfe conditions, t = lr tried first; it may be longer.

        A trial costs an evaluation and its gradient, which an accepted point needs anyway.

        Args:
            slope: g.d < 0.
        """
        own, value, finite = self._own, self._value(point), False
        if self._lr == 0.0:
            return self._stay(Status.SMALL_CHANGE, inner)
        first = self._lr * d
        if not self._is_felt(first):
            return self._stay(Status.STALLED if bool(first.isfinite().all()) else Status.NOT_FINITE, inner)
        if self._is_spent():
            return self._stay(Status.MAX_EVAL, inner)
        here: EvaluatedPoint | None = None
        last = self._lr

        def evaluate(t: float) -> Trial:
            nonlocal here, last, finite
            step = t * d
            here, last = self._try(step), t
            if here is None:
                return Trial(t, math.nan, math.nan)
            finite = finite or self._is_felt(step)
            return Trial(t, self._value(here), float(here.gradient().double().dot(d.double())))

        search = strong_wolfe(
            Trial(0.0, value, slope),
            evaluate(last),
            size=float(d.abs().max()),
            tolerance=self.param_groups[0]["tolerance_change"],
            max_evaluations=int(max(1, min(_TRIALS, self._limit - own["func_evals"]))),  # one is kept to go back by
            noise=self._noise(value),
        )
        t = run(search, evaluate).trial.t
        if t == 0.0:
            spent = Status.MAX_EVAL if own["func_evals"] + 1 >= self._limit else Status.STALLED
            return self._stay(spent if finite else Status.NOT_FINITE, inner)
        if t != last:  # an earlier trial was better, and the graph there is gone
            here = self._try(t * d)
        return self._stay(Status.NOT_FINITE, inner) if here is None else self._accept(here, t * d, t, inner)
