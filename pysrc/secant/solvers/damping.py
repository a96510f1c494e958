"""Damping: how strongly a step is held back, by how good the last one was."""

from __future__ import annotations

from secant import _checks


class NielsenDamping:
    """Moves the damping parameter lambda of Levenberg and Marquardt's method by Nielsen's rule.

    Of a step that the model promised to lower the objective by `predicted`, and that lowers it by `decrease`, let
    rho = decrease / predicted be the gain ratio. Then

        decrease > 0:   lambda <- lambda max(1/3, 1 - (2 rho - 1)^3),   nu <- 2         (the step is taken)
        otherwise:      lambda <- lambda nu,                            nu <- 2 nu      (it is refused)

    so that lambda changes little where rho is about 1/2, falls by at most a factor of three, and rises the faster the
    more steps in a row are refused.

    Args:
        value: the first lambda, > 0.
        growth: the first nu, > 1.

    Raises:
        ValueError: an argument is out of its range.

    References:
        Nielsen, Damping parameter in Marquardt's method, report IMM-REP-1999-05, Technical University of Denmark
        (1999), eq. 2.5. Madsen, Nielsen, Tingleff, Methods for non-linear least squares problems, 2nd ed., IMM (2004),
        Algorithm 3.16.

    Example:
        >>> damping = secant.solvers.NielsenDamping(0.3)
        >>> damping.update(decrease=2.0, predicted=2.0), round(damping.value, 9)
        (True, 0.1)
        >>> damping.update(decrease=-1.0, predicted=2.0), round(damping.value, 9)
        (False, 0.2)
    """

    def __init__(self, value: float, growth: float = 2.0) -> None:
        #: lambda, of the next step.
        self.value = _checks.positive("NielsenDamping", "value", value)
        #: nu, by which it grows if that step is refused.
        self.growth = _checks.number(
            "NielsenDamping", "growth", growth, "a finite number > 1", lambda x: 1.0 < x < float("inf")
        )

    def update(self, decrease: float, predicted: float) -> bool:
        """Take what a step has brought, and tell whether it should be taken; of a NaN it should not.

        Args:
            decrease: of the objective by the step.
            predicted: decrease that the model promised, > 0.
        """
        if decrease > 0.0 and predicted > 0.0:
            self.value *= max(1.0 / 3.0, 1.0 - (2.0 * decrease / predicted - 1.0) ** 3)
            self.growth = 2.0
            return True
        self.value *= self.growth
        self.growth *= 2.0
        return False
