"""The base of optimizers that ask more of a point than its gradient: products with curvature, or a Jacobian."""

from __future__ import annotations

import abc
import math
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant._parameters import FlatParameters
from secant.curvature import EvaluatedPoint
from secant.curvature._point import WrongClosure
from secant.optim import _closure
from secant.optim._flat_optimizer import NUMERICAL, OTHER, FlatOptimizer
from secant.result import Status

_TOLERANCE = _checks.number_from(0.0)

#: Options that every optimizer of this kind has.
COMMON: Mapping[str, Option] = {
    "max_iter": _checks.integer_from(1),
    "max_eval": _checks.or_none(_checks.integer_from(1)),
    "tolerance_grad": _TOLERANCE,
    "tolerance_change": _TOLERANCE,
    "tolerance_grad_rel": _TOLERANCE,
    "tolerance_change_rel": _TOLERANCE,
    "on_error": _checks.one_of("raise", "backtrack"),
}
_MODES = Option(
    "a dictionary from operators to their modes",
    lambda x: isinstance(x, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in x.items()),
)


class Advance(NamedTuple):
    """What an iteration has brought.

    point: where it has led; None: nowhere, and the parameters are where they were. status: of an iteration that led
    nowhere, why; else None. t: how much of the step that was proposed first. inner: products that it took. change: the
    largest of a parameter.
    """

    point: EvaluatedPoint | None
    status: Status | None = None
    t: float = 1.0
    inner: int = 0
    change: float = math.inf


class PointOptimizer(FlatOptimizer, abc.ABC):
    """Base of the optimizers whose closure leaves the graph, so that a model of the loss can be built at each point.

    It evaluates points, goes to others and back, tests for convergence and keeps count. A new optimizer says how one
    iteration goes:

        class Cauchy(PointOptimizer):
            OPTIONS = {**COMMON, "maximize": _checks.flag()}
            KINDS = ("loss",)

            def __init__(self, params, max_iter=20, *, maximize=False, callback=None, **common):
                super().__init__(params, {"max_iter": max_iter, "maximize": maximize, **common}, callback)

            def _advance(self, point):
                g, H = point.gradient(), point.hessian()
                step = -g * (g.dot(g) / g.dot(H @ g).abs())     # the minimum along g of the model, if there is one
                while not self._is_spent():
                    new = self._try(step)                       # None where the loss is not finite
                    if new is not None and self._value(new) < self._value(point):
                        return self._accept(new, step)
                    if not self._is_felt(step):
                        return self._stay(Status.STALLED)
                    step = step / 2
                return self._stay(Status.MAX_EVAL)

    Vectors of an iteration are those of the parameters that require a gradient, flat, (_free.n,); the others do not
    move. A point's operators belong to where it was evaluated: once the parameters are elsewhere their products are an
    error, and `_revisit` goes back and evaluates anew. What was computed of a point stays (gradient, matrices).

    The gradients p.grad are neither read nor written.
    """

    #: What the closure may return; see `EvaluatedPoint`.
    KINDS: ClassVar[tuple[str, ...]]
    PER_GROUP: ClassVar[tuple[str, ...]] = ()
    NUMBERS: ClassVar[Mapping[str, tuple[Any, Option]]] = {
        **FlatOptimizer.NUMBERS,
        "first_grad_max": (0.0, _TOLERANCE),
        "modes": ({}, _MODES),  # of products; chosen by timing, so that a run repeats only with what was chosen
    }

    _free: FlatParameters | None = None  # the parameters that require gradients
    _inside: Tensor | None = None  # their places among all; None: they are all
    _known: EvaluatedPoint | None = None  # a point over the same parameters: what was checked there holds at others
    _values: MutableMapping[EvaluatedPoint, float]  # losses that were brought to the host, of points that still exist
    _objective: Callable[[], Any]  # the closure; its loss is minimized
    _more: bool = True  # whether the call has another iteration
    _start: Tensor  # where an iteration begins
    _here: Tensor  # where it looks

    def __init__(self, params: Any, options: dict[str, Any], callback: Any) -> None:
        defaults = {
            "max_eval": None,
            "tolerance_grad": 0.0,
            "tolerance_change": 0.0,
            "tolerance_grad_rel": 0.0,
            "tolerance_change_rel": 0.0,
            "on_error": "raise",
        }
        unknown = sorted(options.keys() - self.OPTIONS.keys())
        if unknown:
            raise TypeError(f"{self._name}: {unknown[0]}: expected one of the options {', '.join(self.OPTIONS)}")
        super().__init__(params, defaults | options, callback)

    # What a subclass has of its own -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def _advance(self, point: EvaluatedPoint) -> Advance:
        """Run one iteration from a point that is finite and not optimal, where the parameters are."""

    def _kind(self) -> str:
        """Return what the closure returns, as the options have it."""
        return self.KINDS[0]

    def _grad_max(self, point: EvaluatedPoint) -> float:
        """Return the size of the gradient that convergence is about: its largest component in absolute value."""
        return float(point.gradient().abs().max())

    def _loss(self, point: EvaluatedPoint) -> Tensor:
        """Return the loss (), as it is minimized."""
        return point.value

    def _project(self, x: Tensor) -> None:
        """Bring parameters into what is allowed, in place."""

    # A step -----------------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients, as torch does."""
        torch.optim.Optimizer.zero_grad(self, set_to_none)

    def _iterate(self, closure: Callable[[], Any]) -> tuple[Any, Status]:
        self._begin(closure)
        self._values = weakref.WeakKeyDictionary()
        try:
            self._forgiving = False  # what the closure raises before anything was tried is about the closure
            point = self._evaluate_point()
            assert point is not None
            self._forgiving = self.param_groups[0]["on_error"] == "backtrack"
            loss = self._loss(point)
            return (-loss if self._maximize else loss), self._run(point)
        finally:
            del self._values
            known = self._known
            if known is not None:
                known.release()
                self._own["modes"] = {name: mode for name, mode in known.modes.items() if mode is not None}

    def _run(self, point: EvaluatedPoint) -> Status:
        own, options = self._own, self.param_groups[0]
        value = self._value(point)
        grad_max = self._grad_max(point) if math.isfinite(value) else math.nan
        if not math.isfinite(grad_max):
            return Status.NOT_FINITE
        own["first_grad_max"] = own["first_grad_max"] or grad_max
        if own["n_iter"] == 0 and self._report(value, grad_max, 0.0):
            return Status.STOPPED
        limit = max(options["tolerance_grad"], options["tolerance_grad_rel"] * own["first_grad_max"])
        small, relative = options["tolerance_change"], options["tolerance_change_rel"]
        self._undo.keep("parameters", self._flat.tensors)
        for left in reversed(range(options["max_iter"])):
            if grad_max <= limit:
                return Status.CONVERGED
            if self._is_spent():
                return Status.MAX_EVAL
            self._free_parameters.save(self._start_views)
            self._more = left > 0
            found = self._advance(point)
            own["n_iter"] += 1
            if found.point is None:
                assert found.status is not None
                return found.status
            point, before, value = found.point, value, self._value(found.point)
            self._known = point
            if left or limit > 0.0 or self.callback is not None:  # else nobody asks for the gradient at the end
                grad_max = self._grad_max(point)
                if not math.isfinite(grad_max):
                    self._free_parameters.set_(self._start_views)
                    return Status.NOT_FINITE
            if self._report(value, grad_max, found.t, found.inner):
                return Status.STOPPED
            change = abs(value - before)
            if found.change <= small or change < small or change < relative * max(abs(value), abs(before)):
                return Status.CONVERGED if grad_max <= limit else Status.SMALL_CHANGE
        return Status.CONVERGED if grad_max <= limit else Status.MAX_ITER

    def _begin(self, closure: Callable[[], Any]) -> None:
        """Get ready for the parameters that require gradients now."""
        tensors = [p for p in self._flat.tensors if p.requires_grad]
        free = self._free
        if free is None or free.moved() or [*map(id, tensors)] != [*map(id, free.tensors)]:
            free = self._free = FlatParameters(self._name, tensors)
            self._known, self._inside = None, None
            if free.n < self._flat.n:
                marks = [torch.full((p.numel(),), p.requires_grad) for p in self._flat.tensors]
                self._inside = torch.cat(marks).nonzero()[:, 0].to(free.device)
            self._start, self._here = free.vector(), free.vector()
            self._start_views, self._here_views = free.split(self._start), free.split(self._here)
        own, options = self._own, self.param_groups[0]
        self._limit = math.inf if options["max_eval"] is None else own["func_evals"] + options["max_eval"]
        self._objective = self._minimized(closure)

    def _minimized(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure whose loss is to be minimized."""
        if not self._maximize:
            return closure
        negated = _negated_pair if self._kind() == "outputs" else _negated
        return lambda: negated(closure())

    def _synchronize(self) -> None:
        self._known = None  # its modes are not those of the state

    @property
    def _free_parameters(self) -> FlatParameters:
        assert self._free is not None
        return self._free

    def _evaluate_point(self, closure: Callable[[], Any] | None = None) -> EvaluatedPoint | None:
        """Evaluate where the parameters are; None: the closure raised what stands for an infinite loss.

        Args:
            closure: another one, of the same kind, whose values do not count; None: that of the step.
        """
        own, known = self._own, self._known
        own["func_evals"] += closure is None
        try:
            point = EvaluatedPoint(
                self._objective if closure is None else self._minimized(closure),
                self._free_parameters.tensors,
                self._kind(),
                modes=own["modes"] if known is None else None,
                like=known,
                name=f"{self._name}.step",
            )
        except NUMERICAL as error:
            if self._forgiving and not isinstance(error, (WrongClosure, *OTHER)):
                return None
            raise
        self._known = point
        self._rounding = _closure.rounding(point.value, point.params.dtype)
        return point

    def _value(self, point: EvaluatedPoint) -> float:
        """Bring the loss, as it is minimized, to the host; once for each point."""
        value = self._values.get(point)
        if value is None:
            value = self._values[point] = float(self._loss(point))
        return value

    def _noise(self, value: float) -> float:
        """Bound the rounding error of a loss of this size."""
        return 4.0 * self._rounding * abs(value)

    def _is_spent(self) -> bool:
        return self._own["func_evals"] >= self._limit

    # Moves from the start of an iteration -----------------------------------------------------------------------------

    def _try(self, step: Tensor) -> EvaluatedPoint | None:
        """Go to the start plus a step, projected, and evaluate; None where that or the loss is not finite."""
        torch.add(self._start, step, out=self._here)
        self._project(self._here)
        if not bool(self._here.isfinite().all()):
            return None
        self._free_parameters.set_(self._here_views)
        point = self._evaluate_point()
        return point if point is not None and math.isfinite(self._value(point)) else None

    def _is_felt(self, step: Tensor) -> bool:
        """Tell whether a step is finite and changes any parameter, as numbers are rounded."""
        return bool((self._start + step != self._start).any() & step.isfinite().all())

    def _accept(self, new: EvaluatedPoint, step: Tensor, t: float = 1.0, inner: int = 0) -> Advance:
        """End an iteration where the last trial has led."""
        return Advance(new, None, t, inner, float(step.abs().max()))

    def _stay(self, status: Status, inner: int = 0) -> Advance:
        """End an iteration where it began."""
        self._free_parameters.set_(self._start_views)
        return Advance(None, status, 0.0, inner)

    def _revisit(self) -> EvaluatedPoint | None:
        """Go back to the start and evaluate anew; None where that is not finite now."""
        self._free_parameters.set_(self._start_views)
        point = self._evaluate_point()
        return point if point is not None and math.isfinite(self._value(point)) else None

    def _part(self, vector: Tensor) -> Tensor:
        """Take what belongs to the parameters that require gradients out of a vector of the state."""
        return vector if self._inside is None else vector[self._inside]

    def _put(self, vector: Tensor, part: Tensor) -> None:
        """Write what belongs to them into a vector of the state, and zero for the others."""
        if self._inside is None:
            vector.copy_(part)
        else:
            vector.zero_()[self._inside] = part


def _negated(loss: Any) -> Any:
    return -loss if isinstance(loss, Tensor) else loss


def _negated_pair(result: Any) -> Any:
    return (result[0], _negated(result[1])) if isinstance(result, (tuple, list)) and len(result) == 2 else result
