"""Newton's method with the dense Hessian, made positive definite by its eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import EvaluatedPoint
from secant.optim._curvature_optimizer import CurvatureOptimizer
from secant.optim._flat_optimizer import RATE, Callback
from secant.optim._point_optimizer import COMMON, Advance
from secant.result import Status


class Newton(CurvatureOptimizer):
    r"""Newton's method for few parameters: the dense Hessian, its eigenvalues made positive, and backtracking.

        H = V diag(w) V^T,    d = -V diag(1 / w') V^T g,    x_(k+1) = x_k + t d,

    where w' is |w|, or w, or w plus a number, no smaller than `floor` times the largest |w|, and t is `lr` or the first
    shorter step with f(x + t d) <= f(x) + 1e-4 t g.d, chosen by quadratic interpolation. A quadratic with a minimum
    takes one step. With "abs" negative curvature repels: a saddle point is left, by a factor of two per iteration.

    A step costs n products and an eigendecomposition, n^3 operations in float64: for up to about a thousand parameters.

    * **Rounding.** A decrease that is lost in the rounding of the loss is judged by the gradient, until that does not
      fall any more: STALLED.
    * **NaN and Inf.** A point whose loss or gradient is not finite is never accepted: the step is shortened, and where
      nothing finite is found the parameters return (NOT_FINITE).
    * **A closure that raises** leaves parameters, gradients (p.grad, which are never written) and state as they were.
    * **Stationary points.** Where the gradient is zero the method ends, CONVERGED, saddle point or not.
    * **State:** counts, and the mode of the products, chosen by timing once; a run continues from it bit for bit.

    Args:
        params: parameters or groups; real, dense, distinct, float32 or float64, all of one dtype and device. No option
            may differ between groups.
        lr: the step that is tried first, >= 0, a number or a tensor of one element.
        modify: "abs" (|w|), "clamp" (w where it is above the floor), or "shift" (all w by as much as lifts the smallest
            to the floor: H + lambda I).
        floor: smallest w', relative to the largest |w|, > 0; at least n units of rounding.
        max_iter: iterations per call of `step`, >= 1.
        max_eval: evaluations of the closure per call, >= 1; None for any number.
        tolerance_grad: stop when |g|_inf is at most this.
        tolerance_change: stop when the loss changes by less than this, or no parameter by more.
        tolerance_grad_rel: stop also when |g|_inf is at most this times its value at the start of the run.
        tolerance_change_rel: stop also when the loss changes by less than this times its magnitude.
        maximize: maximize the loss instead.
        on_error: "raise", or "backtrack": a RuntimeError, ValueError or ArithmeticError that the closure raises at a
            trial counts as an infinite loss.
        callback: called with a `secant.result.Iteration` at the start of a run and after each iteration; a true value
            ends the call. It is not part of the state.

    Attributes:
        status: a `secant.result.Status`, why the last call of `step` ended; None before the first.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd ed., section 3.4, p. 48 (modified eigenvalues, Algorithms 3.2
        and 3.1). Greenstadt, On the relative efficiencies of gradient methods, Math. Comp. 21 (1967), for "abs".

    Example:
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = secant.optim.Newton([x], max_iter=50, tolerance_grad=1e-9)
        >>> loss = optimizer.step(lambda: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)
        >>> str(optimizer.status), [round(v, 6) for v in x.tolist()]
        ('converged', [1.0, 1.0])
    """

    KINDS = ("loss",)
    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        "lr": RATE,
        "modify": _checks.one_of("abs", "clamp", "shift"),
        "floor": _checks.Option("a number in (0, 1]", lambda x: _checks.is_number(x) and 0.0 < x <= 1.0),
        **COMMON,
        "maximize": _checks.flag(),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        modify: str = "abs",
        floor: float = 1e-8,
        max_iter: int = 20,
        max_eval: int | None = None,
        *,
        tolerance_grad: float = 0.0,
        tolerance_change: float = 0.0,
        tolerance_grad_rel: float = 0.0,
        tolerance_change_rel: float = 0.0,
        maximize: bool = False,
        on_error: str = "raise",
        callback: Callback | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.OPTIONS}, callback)

    def _advance(self, point: EvaluatedPoint) -> Advance:
        g, operator = point.gradient().double(), self._curvature(point)
        if operator is None:
            return self._stay(Status.NOT_FINITE)
        n = len(g)
        hessian = operator.to_dense().double()
        if not bool(hessian.isfinite().all()):
            return self._stay(Status.NOT_FINITE, n)
        w, v = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
        d = -(v @ ((v.mT @ g) / self._modified(w)))
        return self._backtrack(point, d.to(operator.dtype), float(g.dot(d)), inner=n)

    def _modified(self, w: Tensor) -> Tensor:
        """Return eigenvalues in place of w, ascending, that are at least the floor."""
        options = self.param_groups[0]
        largest, least = float(w.abs().max()), float(w[0])
        relative = max(options["floor"], len(w) * torch.finfo(self._flat.dtype).eps)
        # Without any curvature there is no scale: the gradient itself.
        floor = relative * largest if largest > 0.0 else 1.0
        if options["modify"] == "shift":
            return w + max(0.0, floor - least)
        return (w.abs() if options["modify"] == "abs" else w).clamp(min=floor)
