"""Results of fits, and the record of their iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from secant.glm.objective import FitPoint, Objective
from secant.result import Iteration, Recorder, Status


@dataclass(frozen=True)
class GLMResult:
    """Holds what `fit` found.

    coef: (d,), or (d, K) for the multinomial loss, so that X @ coef + intercept are the linear predictors. intercept:
    () or (K,), zero without one. status: a `secant.Status`: CONVERGED; MAX_ITER; STALLED (no step that decreases the
    objective can be told from rounding); NO_MINIMUM (the objective falls forever: separable data, say); STOPPED (by the
    callback). message: the same in a sentence, with the figures. value: of the objective, the sum. grad_norm: largest
    component of the gradient of the mean objective. n_iter: iterations over all rows. solver: the one that ran.
    history: every `secant.Iteration`: `value` is of the sum, an estimate where `rows` < N; `grad_norm` of the mean
    objective; `step` 1 for a full Newton step; `inner` 0 where a factor gave the direction; `rows` fewer than N in the
    first iterations of "newton-cholesky" on many rows.
    """

    coef: Tensor
    intercept: Tensor
    status: Status
    message: str
    value: float
    grad_norm: float
    n_iter: int
    solver: str
    history: list[Iteration] = field(repr=False)

    @property
    def converged(self) -> bool:
        """Tell whether the gradient criterion was met at a point near which there is a minimum."""
        return self.status is Status.CONVERGED


class FitRecorder:
    """Records the iterations of a fit, whose criterion is about the mean objective, and counts its evaluations."""

    def __init__(self, callback: Callable[[Iteration], object] | None) -> None:
        self._recorder, self._evaluations = Recorder(callback), 0

    @property
    def history(self) -> list[Iteration]:
        """List what was recorded."""
        return self._recorder.history

    def __call__(
        self, objective: Objective, point: FitPoint, step: float, inner: int = 0, evaluations: int = 1
    ) -> bool:
        """Record where a step of an objective, of all rows or a sample, led; True if the callback wants to stop."""
        self._evaluations += evaluations
        return self._recorder(
            value=point.value,
            grad_norm=point.largest / objective.total,
            step=step,
            inner=inner,
            rows=objective.rows,
            evaluations=self._evaluations,
        )
