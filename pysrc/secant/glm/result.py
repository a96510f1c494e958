"""What a fit returns, and the record of its iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Iteration(NamedTuple):
    """One iteration, as kept in `GLMResult.history` and given to the callback.

    n: number, from 0 for the starting point. value: of the objective (the sum), an estimate while `rows` < N.
    grad_norm: largest component of the gradient of the mean objective. step: length along the direction, 1 for a full
    Newton step. inner: products with the Hessian that the direction took; 0 when a factor gave it. rows: rows of X that
    were looked at, fewer than N in the first iterations of "newton-cholesky" on many rows.
    """

    n: int
    value: float
    grad_norm: float
    step: float
    inner: int
    rows: int


@dataclass(frozen=True)
class GLMResult:
    """Outcome of `fit`.

    coef: (d,), or (d, K) for the multinomial loss, so that X @ coef + intercept are the linear predictors. intercept:
    () or (K,), zero without one. status: "converged"; "max_iter"; "stalled" (no step that decreases the objective can
    be told from rounding); "no_minimum" (the objective falls forever: separable data, say); "stopped" (by the
    callback). message: the same in a sentence. value: of the objective, the sum. grad_norm: largest component of the
    gradient of the mean objective. n_iter: iterations over all rows. solver: the one that ran. history: every
    `Iteration`.
    """

    coef: Tensor
    intercept: Tensor
    status: str
    message: str
    value: float
    grad_norm: float
    n_iter: int
    solver: str
    history: list[Iteration] = field(repr=False)

    @property
    def converged(self) -> bool:
        """Whether the gradient criterion was met at a point near which there is a minimum."""
        return self.status == "converged"


class Recorder:
    """Keeps the history and asks the callback whether to go on."""

    def __init__(self, callback: Callable[[Iteration], object] | None, total: float) -> None:
        self.history: list[Iteration] = []
        self._callback, self._total = callback, total

    def __call__(self, value: float, largest: float, step: float, inner: int, rows: int) -> bool:
        """Record an iteration; True if the callback wants to stop."""
        one = Iteration(len(self.history), value, largest / self._total, step, inner, rows)
        self.history.append(one)
        return self._callback is not None and bool(self._callback(one))
