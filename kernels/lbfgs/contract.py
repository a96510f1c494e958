"""What every backend of the `lbfgs` family offers, as types; the meaning is written down in `reference.py`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

#: Sums that concern no slot, behind four for each slot in what `dots` leaves:
#: s'.y', s'.s', y'.y', s'.g, y'.g, g.g, max |g_i|, and one that is not used.
EXTRAS = 8


class State(NamedTuple):
    """A history: rings (B, m, n), Gram matrices (B, m, m), counters (B,), statistics (B, 8) of the last call."""

    s: Tensor
    y: Tensor
    sy: Tensor
    yy: Tensor
    head: Tensor
    count: Tensor  # type: ignore[assignment]  # of the pairs, not of equal members
    stats: Tensor


class Pair(NamedTuple):
    """A pair that is offered: s' = t s and y' = y - y_prev, or y where y_prev is None."""

    s: Tensor
    y: Tensor
    y_prev: Tensor | None
    t: float | Tensor


class Dense(NamedTuple):
    """A dense inverse Hessian and the update of it that is still to be made.

    h (n (n + 1) / 2,): its lower triangle, row behind row. pair (2, n): s and H y of the last accepted pair, each over
    a power of two near its length. coefs (5,), float64: of the update. count (): of pairs. stats (10,), float64: of the
    last call.
    """

    h: Tensor
    pair: Tensor
    coefs: Tensor
    count: Tensor  # type: ignore[assignment]  # of the pairs, not of equal members
    stats: Tensor


#: Members of the self-scaled Broyden class, by the number under which kernels know them.
RULES = ("bfgs", "ssbfgs", "ssbroyden")


class Backend(Protocol):
    """The functions of a backend."""

    def two_loop(self, grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor) -> None:
        """Compute a direction from pairs, oldest first."""

    def update(
        self,
        state: State,
        pair: Pair | None,
        grad: Tensor | None,
        tol: float,
        out: Tensor | None,
        prev_out: Tensor | None,
    ) -> None:
        """Offer a pair, and compute a direction: `dots`, `solve` and `combine` in one."""

    def dots(self, state: State, pair: Pair | None, grad: Tensor | None, out: Tensor) -> None:
        """Sum the products that an update needs over the elements at hand: out is (B, 4 m + EXTRAS), float64."""

    def solve(self, state: State, dots: Tensor, coefs: Tensor, tol: float, pair: bool, direction: bool) -> None:
        """Gate, counters, Gram matrices and statistics from the sums, and coefs (B, 2 m + 2), float64."""

    def combine(
        self,
        state: State,
        pair: Pair | None,
        grad: Tensor | None,
        coefs: Tensor,
        out: Tensor | None,
        prev_out: Tensor | None,
    ) -> None:
        """Write an accepted pair into its slot, and the direction that the coefficients make of the rows."""

    def dense_update(
        self,
        state: Dense,
        pair: Pair | None,
        grad: Tensor | None,
        tol: float,
        rule: int,
        out: Tensor | None,
        prev_out: Tensor | None,
    ) -> None:
        """Make the update that is due, multiply, offer a pair, and compute a direction: one pass over a triangle."""
