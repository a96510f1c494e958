"""The base of optimizers whose step is held back by lambda, which follows how good the last one was."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import EvaluatedPoint
from secant.optim._point_optimizer import Advance, PointOptimizer
from secant.result import Status

#: Gain ratios above which lambda falls, below which it rises, and of a step that is taken.
GOOD, POOR, LEAST = 0.75, 0.25, 1e-4
_FALL, _RISE = 0.1, 4.0
#: Lambdas of one iteration, each of which that failed doubles the next rise, and trials where the loss is rounding.
_LAMBDAS, UNCLEAR = 20, 3
#: Changes of the loss below this many times its rounding cannot be told from it.
_NOISE = 4.0
#: lambda never falls below this part of what it is relative to.
_LOWEST = torch.finfo(torch.float64).eps


class Model(Protocol):
    """What is known of a point: the gradient g of the loss, and its size as convergence looks at it."""

    @property
    def gradient(self) -> Tensor: ...
    @property
    def grad_max(self) -> float: ...


class Proposal(Protocol):
    """Steps along a curve, for 0 < t, and what a model of the loss promises of them."""

    @property
    def d(self) -> Tensor: ...
    @property
    def inner(self) -> int: ...
    def at(self, t: float) -> Tensor: ...
    def predicted(self, t: float) -> float: ...


class Found(NamedTuple):
    """What a search has found: the point, None for none, its t, and the gain ratio that lambda follows."""

    point: EvaluatedPoint | None
    t: float
    gain: float


class DampedOptimizer(PointOptimizer, abc.ABC):
    """Base of the methods that solve (B + lambda D) d = -g, and change lambda by the gain ratio of the step.

    The gain ratio is the decrease of the loss over what the model promised. Where both are lost in rounding, a step is
    taken that makes the gradient smaller, and from then on no other; where there is none, lambda is what it was, and
    the status STALLED.
    """

    NUMBERS: ClassVar[Mapping[str, Any]] = {
        **PointOptimizer.NUMBERS,
        "lambda": (0.0, _checks.number_from(0.0)),  # of the next step; 0: none yet
    }

    _good: ClassVar[float] = GOOD
    _blurred: bool = False  # whether a step of this call was taken for its gradient

    def _begin(self, closure: Callable[[], Any]) -> None:
        super()._begin(closure)
        self._blurred = False

    @abc.abstractmethod
    def _modelled(self, point: EvaluatedPoint) -> Any:
        """Return the `Model` at a point, where the parameters are; made once."""

    @abc.abstractmethod
    def _size(self, model: Any) -> float:
        """Return what the first lambda is relative to."""

    @abc.abstractmethod
    def _propose(self, model: Any) -> Any:
        """Return a `Proposal` for the lambda of the state; None where the matrix cannot be factored."""

    @abc.abstractmethod
    def _search(self, model: Any, proposal: Any) -> Found:
        """Try steps of a proposal."""

    @abc.abstractmethod
    def _loss_rounding(self, model: Any) -> float:
        """Estimate what rounding does to the loss."""

    @property
    def _is_adaptive(self) -> bool:
        """Tell whether lambda moves."""
        return True

    def _grad_max(self, point: EvaluatedPoint) -> float:
        return float(self._modelled(point).grad_max)

    def _advance(self, point: EvaluatedPoint) -> Advance:
        own, model, rise, inner, unclear = self._own, self._modelled(point), _RISE, 0, 0
        adaptive, size = self._is_adaptive, self._size(model)
        first = own["lambda"] or self.param_groups[0]["damping"] * size
        own["lambda"] = max(first, _LOWEST * size) if adaptive else self.param_groups[0]["damping"]
        for _ in range(_LAMBDAS if adaptive else 1):
            if self._is_spent():
                return self._stay(Status.MAX_EVAL, inner)
            proposal = self._propose(model)
            if proposal is None:  # not positive definite as it is rounded
                own["lambda"] *= 10.0
                continue
            inner += proposal.inner
            lam = own["lambda"]
            new, t, gain = self._search(model, proposal)
            if adaptive and gain > self._good:
                own["lambda"] *= _FALL
            elif adaptive and gain < POOR:
                own["lambda"] *= rise
                rise *= 2.0
            if new is not None:
                if self._blurred and self._is_unclear(model, proposal) and self._grad_max(new) >= model.grad_max:
                    break  # back to where a smaller gradient has led away from
                return self._accept(new, proposal.at(t), t, inner)
            if not self._is_felt(proposal.d.to(self._start)):
                break
            if self._is_unclear(model, proposal):
                new = self._smoothed(model, proposal)
                if new is not None:
                    own["lambda"], self._blurred = lam, True
                    return self._accept(new, proposal.at(self._lr), self._lr, inner)
                unclear += 1
                if unclear == UNCLEAR:
                    break
        own["lambda"] = first
        return self._stay(Status.STALLED, inner)

    def _is_unclear(self, model: Any, proposal: Any) -> bool:
        """Tell whether what is promised cannot be told from rounding."""
        return 0.0 <= proposal.predicted(1.0) <= _NOISE * self._loss_rounding(model)

    def _is_usable(self, new: EvaluatedPoint) -> bool:
        """Tell whether an iteration can begin at a point, where one will; its gradient is then needed anyway."""
        return not self._more or math.isfinite(self._grad_max(new))

    def _smoothed(self, model: Any, proposal: Any) -> EvaluatedPoint | None:
        """Go along d, by what is tried first, if the gradient becomes smaller."""
        if self._is_spent():
            return None
        new = self._try(proposal.at(self._lr).to(self._start))
        return new if new is not None and self._grad_max(new) < model.grad_max else None
