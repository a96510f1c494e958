"""Directions of L-BFGS for `batched_descent`, with a history that the caller keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from secant.ops.history import LBFGSHistory
from secant.solvers.batched_descent import Steps


class Pairs:
    """Directions -H g, of a history that learns in place."""

    def __init__(self, history: LBFGSHistory) -> None:
        self._history = history

    def next(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Offer the pairs of the steps, and return directions."""
        self._history.append(steps.s, steps.y)
        first = (1.0 / steps.g.double().abs().sum(-1)).clamp_max(1.0)
        return self._history.direction(steps.g), torch.where(self._history.count > 0, 1.0, first)

    def forget(self, which: Tensor) -> Tensor:
        """Forget pairs."""
        which = which & (self._history.count > 0)
        self._history.forget(which)
        return which

    def take(self, places: Tensor) -> Pairs:
        """Go on with some of the problems, in a history of their own."""
        return Pairs(self._history.take(places))
