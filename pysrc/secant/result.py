"""What every solver, fit and optimizer says of itself: why it stopped, and how each iteration went."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple


class Status(IntEnum):
    """Why an iteration stopped.

    A number, so that it can be kept in an int32 tensor on the device, one for each problem or column. As in scipy,
    0 is success. `str` of it is its name in lower case, `message` a sentence, and `ok` tells whether what was asked for
    was reached.

    Example:
        >>> secant.Status(torch.tensor(0, dtype=torch.int32).item()).message
        'converged: the gradient or residual is within its tolerance'
    """

    message: str

    CONVERGED = 0, "converged: the gradient or residual is within its tolerance"
    SMALL_CHANGE = 1, "the last step changed the value or the parameters by less than the tolerance"
    MAX_ITER = 2, "the iterations allowed were not enough"
    MAX_EVAL = 3, "the evaluations allowed were not enough"
    STALLED = 4, "no step that decreases the value can be told from rounding"
    NO_DESCENT = 5, "the direction does not descend"
    NOT_FINITE = 6, "no finite value, gradient or product was found"
    NO_MINIMUM = 7, "the objective falls forever"
    FLAT = 8, "a direction without positive curvature was found"
    BOUNDARY = 9, "the boundary of the trust region was reached"
    STOPPED = 10, "the callback stopped it"

    def __new__(cls, value: int, message: str = "") -> Status:
        """Make a member of a number and its sentence."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.message = message
        return member

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def ok(self) -> bool:
        """Tell whether a tolerance was met: CONVERGED or SMALL_CHANGE."""
        return self in (Status.CONVERGED, Status.SMALL_CHANGE)


class Iteration(NamedTuple):
    """One iteration, as it is recorded and given to a callback.

    n: number, 0 for the starting point. value: of the objective. grad_norm: largest component of the gradient in
    absolute value. step: length along the direction. inner: products with the Hessian that the direction took, 0 where
    there was no inner solver. rows: rows of the data that were looked at, 0 where it is not about rows. evaluations: of
    the objective since the run began.
    """

    n: int
    value: float
    grad_norm: float
    step: float
    inner: int = 0
    rows: int = 0
    evaluations: int = 0


class Recorder:
    """Numbers the iterations of a run, keeps them, and asks the callback whether to go on.

    Args:
        callback: called with each `Iteration`; a true value stops the run, whose status is then `Status.STOPPED`.
        keep: whether the iterations are kept in `history`.
        first: number of the next iteration, for a run that is continued.

    Example:
        >>> record = secant.result.Recorder(lambda iteration: iteration.value < 2.0)
        >>> record(value=3.0, grad_norm=1.0, step=0.0), record(value=1.0, grad_norm=0.5, step=1.0)
        (False, True)
        >>> [iteration.n for iteration in record.history]
        [0, 1]
    """

    def __init__(
        self, callback: Callable[[Iteration], object] | None = None, *, keep: bool = True, first: int = 0
    ) -> None:
        self.history: list[Iteration] = []
        self._callback, self._keep, self._next = callback, keep, first

    def __call__(
        self, *, value: float, grad_norm: float, step: float, inner: int = 0, rows: int = 0, evaluations: int = 0
    ) -> bool:
        """Record an iteration, in the terms of `Iteration`; True if the callback wants to stop."""
        one = Iteration(self._next, value, grad_norm, step, inner, rows, evaluations)
        self._next += 1
        if self._keep:
            self.history.append(one)
        return self._callback is not None and bool(self._callback(one))


class OptimizeResult(dict[str, Any]):
    """Holds what a minimization found, as `scipy.optimize.OptimizeResult` does: a dictionary with attributes.

    Example:
        >>> found = secant.result.OptimizeResult(x=1.0, status=secant.Status.CONVERGED)
        >>> found.x, found["x"], str(found.status)
        (1.0, 1.0, 'converged')
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:>{width}}: {_indented(value, width + 2)}" for name, value in self.items())

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]


def _indented(value: object, width: int) -> str:
    return repr(value).replace("\n", "\n" + " " * width)
