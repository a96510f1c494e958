"""Parameters on the line start + t d, for a search."""

from __future__ import annotations

import torch
from torch import Tensor

from secant.optim._gradients import FlatGradients


class Line:
    """The points start + t d: the parameters are at one of them, and the gradient of the best one can be kept.

    Args:
        flat: the parameters.
        start: views of the vector that keeps where the line begins.
        direction: views of d.
    """

    def __init__(self, flat: FlatGradients, start: list[Tensor], direction: list[Tensor]) -> None:
        self._flat, self._start, self._direction = flat, start, direction
        self._best_grad = torch.empty_like(flat.grad)
        self._away = False

    def begin(self) -> None:
        """Begin where the parameters are, which is the start."""
        self._away = False

    def place(self, t: float) -> None:
        """Set the parameters to start + t d, rounded as torch rounds it."""
        if self._away:
            self._flat.set_(self._start)
        if t != 0.0:
            self._flat.add_(self._direction, t)
        self._away = t != 0.0

    def keep(self, grad: Tensor) -> None:
        """Keep the gradient here, of the best point so far."""
        self._best_grad.copy_(grad)

    def return_to(self, t: float, grad: Tensor, start_grad: Tensor) -> None:
        """Go back to the start or to the best point; `grad` becomes its gradient."""
        self.place(t)
        grad.copy_(start_grad if t == 0.0 else self._best_grad)
