"""What every backend of the `search` family offers, as types; the meaning is written down in `reference.py`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

#: Rows of `Search.numbers`, float64. LAST, LOW and HIGH are trials: t, value and slope.
NUMBERS = (
    "value", "slope", "t", "last_t", "last_value", "last_slope", "low_t", "low_value", "low_slope",
    "high_t", "high_value", "high_slope", "fraction", "size", "noise", "kept_t", "kept_value",
)  # fmt: skip
VALUE, SLOPE, T, LAST, LOW, HIGH, FRACTION, SIZE, NOISE, KEPT_T, KEPT_VALUE = 0, 1, 2, 3, 6, 9, 12, 13, 14, 15, 16

#: Rows of `Search.counts`, int32.
COUNTS = ("used", "blind", "flags", "status", "nit", "nfev")
USED, BLIND, FLAGS, STATUS, NIT, NFEV = range(6)

#: Bits of the flags.
ZOOMS, NEAR_END, LOW_IS_FIRST, ENDED = 1, 2, 4, 8

#: Trials in a bracket whose whole decrease is below the rounding of the values.
MAX_BLIND = 5

#: Status of a problem that goes on, and, by their numbers in `secant.Status`, those that a search can end with.
RUNNING = -1
CONVERGED, SMALL_CHANGE, MAX_ITER, MAX_EVAL, STALLED, NO_DESCENT = range(6)


class Search(NamedTuple):
    """Where B problems of n variables are, and their line searches.

    x, g: (B, n), the points and their gradients. d: (B, n), directions. kept: (B, n), the gradient at the trial that
    may still be chosen. trial: (B, n), what is to be evaluated next. step: (B,) float64, length of the step that the
    last call of `advance` took, 0 where it took none. numbers: (17, B) float64. counts: (6, B) int32.
    """

    x: Tensor
    g: Tensor
    d: Tensor
    kept: Tensor
    trial: Tensor
    step: Tensor
    numbers: Tensor
    counts: Tensor


class Rule(NamedTuple):
    """Constants of the searches (c1, c2, tolerance, max_trials: see `secant.solvers.strong_wolfe`) and of the ends.

    eps: noise of a value over its size. gtol: on the largest component of a gradient. ftol: on the change of a value
    over max(|f|, 1), 0 for none. max_iter, max_nfev: steps and evaluations of a problem.
    """

    c1: float
    c2: float
    tolerance: float
    max_trials: int
    eps: float
    gtol: float
    ftol: float
    max_iter: int
    max_nfev: int


class Backend(Protocol):
    """The functions of a backend."""

    def advance(self, search: Search, value: Tensor, grad: Tensor, rows: Tensor | None, rule: Rule) -> None:
        """Take what the trials brought: each search goes on, or ends and its problem steps."""

    def begin(
        self, search: Search, slope: Tensor, g_max: Tensor, t: Tensor | None, rows: Tensor | None, rule: Rule
    ) -> None:
        """Test the problems that stepped, and begin the next search of those that go on."""
