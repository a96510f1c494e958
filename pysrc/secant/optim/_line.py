"""A search along start + t d, which moves the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant.optim._gradients import FlatGradients
from secant.solvers.line_search import LineSearch, Trial, run


class Tried(NamedTuple):
    """A trial, and |g|_inf there; NaN where nobody asked."""

    trial: Trial
    grad_max: float

    @property
    def finite(self) -> bool:
        """Tell whether value and slope are finite."""
        return math.isfinite(self.trial.value) and math.isfinite(self.trial.slope)


class Line:
    """The points start + t d: the parameters are at one of them, and the gradient of the best one is kept.

    Args:
        flat: the parameters.
        grad: vector with the gradient at the point that was evaluated last.
        start_grad: vector with the gradient at the start.
        start: views of the vector that keeps where the line begins.
        direction: views of d.
    """

    def __init__(
        self, flat: FlatGradients, grad: Tensor, start_grad: Tensor, start: list[Tensor], direction: list[Tensor]
    ) -> None:
        self._flat, self._start, self._direction = flat, start, direction
        self._grad, self._start_grad, self._best_grad = grad, start_grad, torch.empty_like(grad)
        self._away = False

    def begin(self) -> None:
        """Begin where the parameters are; the start has been saved."""
        self._away = False

    def place(self, t: float) -> None:
        """Set the parameters to start + t d, rounded as torch rounds it."""
        if self._away:
            self._flat.set_(self._start)
        if t != 0.0:
            self._flat.add_(self._direction, t)
        self._away = t != 0.0

    def return_to_start(self) -> None:
        """Go back to the start, with its gradient."""
        self.place(0.0)
        self._grad.copy_(self._start_grad)

    def search(self, search: LineSearch, first: Tried, evaluate: Callable[[float], Tried]) -> tuple[Tried, bool]:
        """Run a search whose first trial is made; parameters and gradient end at the step it chose.

        Returns what it chose, and whether any trial was finite.
        """
        here, best, finite = first, first, first.finite

        def keep(t: float) -> None:
            nonlocal best
            if t == here.trial.t:
                self._best_grad.copy_(self._grad)
                best = here

        def try_(t: float) -> Trial:
            nonlocal here, finite
            here = evaluate(t)
            finite = finite or here.finite
            return here.trial

        chosen = run(search, try_, keep).trial
        if chosen.t == 0.0:
            self.return_to_start()
            return Tried(chosen, math.nan), finite
        if chosen.t != here.trial.t:
            self.place(chosen.t)
            self._grad.copy_(self._best_grad)
            return best, finite
        return here, finite
