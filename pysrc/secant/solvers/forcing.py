"""Forcing terms: how accurately an inexact Newton method solves for each of its steps."""

from __future__ import annotations

import math

from secant import _checks


class ForcingTerm:
    """Sets how well Newton systems are solved by how much the last step gained: Eisenstat and Walker's second choice.

    With s_k the size of the gradient in any norm, the residual of the k-th system, relative to its right-hand side, is

        eta_k = gamma (s_k / s_(k-1))^alpha,    not below gamma eta_(k-1)^alpha where that exceeds 0.1,

    and within [least, most]. Where s is the norm in which Newton's method converges, that of the inverse Hessian, the
    iterates converge with order alpha (superlinearly where `least` ends it) and few products are wasted on early steps.

    Args:
        first: eta_0. most, least: its bounds, 0 < least <= first <= most < 1.
        gamma: in (0, 1]. alpha: in (1, 2].

    Raises:
        ValueError: an argument is out of its range.

    References:
        Eisenstat and Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci. Comput. 17 (1996),
        Choice 2 and its safeguard, p. 19. The defaults of gamma and alpha are theirs, those of the bounds heuristics.

    Example:
        >>> forcing = secant.solvers.ForcingTerm(most=0.5)
        >>> forcing.update(1.0), round(forcing.update(0.3), 6)
        (0.1, 0.081)
    """

    def __init__(
        self,
        first: float = 0.1,
        *,
        most: float = 0.1,
        least: float = 1e-6,
        gamma: float = 0.9,
        alpha: float = 2.0,
    ) -> None:
        op = "ForcingTerm"
        self.most = _checks.number(op, "most", most, "a number in (0, 1)", lambda x: 0.0 < x < 1.0)
        bounded = f"a number in (0, most = {self.most}]"
        self.least = _checks.number(op, "least", least, bounded, lambda x: 0.0 < x <= self.most)
        #: eta, for the system to be solved next.
        self.value = _checks.number(
            op, "first", first, f"a number in [{self.least}, {self.most}]", lambda x: self.least <= x <= self.most
        )
        self.gamma = _checks.number(op, "gamma", gamma, "a number in (0, 1]", lambda x: 0.0 < x <= 1.0)
        self.alpha = _checks.number(op, "alpha", alpha, "a number in (1, 2]", lambda x: 1.0 < x <= 2.0)
        #: s, of the last gradient; NaN before the first. With `value` it is all that a run has to keep to go on.
        self.last = math.nan

    def update(self, size: float) -> float:
        """Take the size of the next gradient; returns eta for the system there, which `value` is from then on."""
        last, self.last = self.last, size
        if math.isfinite(last) and last > 0.0:
            eta, floor = self.gamma * (size / last) ** self.alpha, self.gamma * self.value**self.alpha
            if floor > 0.1:
                eta = max(eta, floor)
            self.value = min(self.most, max(self.least, eta))
        return self.value
