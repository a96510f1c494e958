"""Trust-region Newton methods: Steihaug's conjugate gradients, or More and Sorensen's exact step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from secant import _checks
from secant.curvature import EvaluatedPoint
from secant.curvature._curvature import CurvatureOperator
from secant.optim._curvature_optimizer import CURVATURE, CurvatureOptimizer, ModelStep
from secant.optim._flat_optimizer import Callback
from secant.optim._point_optimizer import Advance, PointOptimizer
from secant.optim._region import shrink
from secant.result import Status
from secant.solvers import more_sorensen, steihaug

#: Ratios below and above which the radius shrinks and grows, and by how much it grows.
_POOR, _GOOD, _GROWTH = 0.25, 0.75, 2.0


class _Step(NamedTuple):
    """A step within the region: why it ended, what the model promises, products that it took."""

    step: Tensor
    status: Status
    predicted: float
    inner: int


class TrustRegion(CurvatureOptimizer):
    r"""Trust-region Newton method: the minimum of a quadratic model within a radius that learns how far to trust it.

        s = argmin g.s + 1/2 s.B s  over |s| <= Delta,    rho = (f(x) - f(x + s)) / -(g.s + 1/2 s.B s)

        rho > eta:    x_(k+1) = x_k + s
        rho < 1/4:    Delta <- t |s|           rho > 3/4 and |s| = Delta:    Delta <- min(2 Delta, max_radius)

    t is 1/2, or where the loss has risen the minimum of the parabola through f(x), g.s and f(x + s), in [1/10, 1/2].

    B may be indefinite: negative curvature is followed to the boundary, so that saddle points are left at once. The
    subproblem is solved by

    * "steihaug": conjugate gradients until the residual is min(1/2, (|g| / |g_0|)^(1/2)) |g|, g_0 the run's first
      gradient, or the boundary: products only, any number of parameters;
    * "exact": More and Sorensen's method on the dense matrix (n products and a few Cholesky factorizations in float64),
      the hard case included: for up to about two thousand parameters, where every evaluation counts.

    An iteration lasts until a step is accepted. After one that is refused "exact" has its matrix still, "steihaug"
    evaluates the closure at the start once more, for products there.

    * **The radius** is a number of the state and survives from one mini-batch to the next. Where no step can be
      accepted (STALLED, NOT_FINITE) it is put back to what it was.
    * **Curvature on its own batch:** `step(closure, curvature_closure)`.
    * **Rounding, NaN, exceptions, stationary points:** as for `Newton`.
    * **State:** the radius, counts, the modes of the products; a run continues from it bit for bit.

    Args:
        params: as for `Newton`. There is no lr: the radius says how long a step is.
        subproblem: "steihaug" or "exact".
        curvature: "hessian" (the closure returns the loss), "ggn" or "fisher" (it returns (outputs, loss)).
        initial_radius: Delta at the start of a run, > 0.
        max_radius: > 0.
        eta: smallest rho of a step that is accepted, in [0, 1/4).
        max_inner: products per subproblem of "steihaug", >= 1.
        max_iter, max_eval, likelihood, tolerance_grad, tolerance_change, tolerance_grad_rel, tolerance_change_rel,
            maximize, on_error, callback: as for `NewtonCG`. `Iteration.step` is |s|.

    Attributes:
        status: a `secant.result.Status`, why the last call of `step` ended; None before the first.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithms 4.1, p. 69, and 7.2, p. 171. Conn, Gould, Toint,
        Trust-Region Methods, SIAM (2000), Algorithm 6.1.1 (eta), Algorithm 7.3.4, section 17.4. Dennis and Schnabel,
        Numerical Methods for Unconstrained Optimization, SIAM (1996), section 6.4.3 (t). More and Sorensen, SIAM J.
        Sci. Stat. Comput. 4 (1983). Steihaug, SIAM J. Numer. Anal. 20 (1983).

    Example:
        >>> x = torch.tensor([0.5, 0.0], dtype=torch.float64, requires_grad=True)        # a saddle point at (0, 0)
        >>> optimizer = secant.optim.TrustRegion([x], "exact", max_iter=30, tolerance_grad=1e-9)
        >>> loss = optimizer.step(lambda: x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4)
        >>> str(optimizer.status), [round(abs(v), 6) for v in x.tolist()]
        ('converged', [0.0, 1.0])
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        "subproblem": _checks.one_of("steihaug", "exact"),
        "initial_radius": _checks.positive_number(),
        "max_radius": _checks.positive_number(),
        "eta": _checks.number_from(0.0, _POOR),
        "max_inner": _checks.integer_from(1),
        **CURVATURE,
    }
    NUMBERS: ClassVar[Mapping[str, Any]] = {
        **PointOptimizer.NUMBERS,
        "radius": (0.0, _checks.number_from(0.0)),  # 0: the initial one
    }

    def __init__(
        self,
        params: Any,
        subproblem: str = "steihaug",
        curvature: str = "hessian",
        initial_radius: float = 1.0,
        max_radius: float = 1000.0,
        eta: float = 0.01,
        max_inner: int = 200,
        max_iter: int = 20,
        max_eval: int | None = None,
        *,
        likelihood: str = "categorical",
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

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        super()._check_options(op, options)
        if options["initial_radius"] > options["max_radius"]:
            got = f"{options['initial_radius']!r} and {options['max_radius']!r}"
            raise _checks.fail(op, "initial_radius", "one that is at most max_radius", got)

    def _advance(self, point: EvaluatedPoint) -> Advance:
        own, options = self._own, self.param_groups[0]
        radius = min(own["radius"] or options["initial_radius"], options["max_radius"])
        g, b = point.gradient(), self._curvature(point)
        if b is None:
            return self._stay(Status.NOT_FINITE)
        status, products = Status.CONVERGED, 0
        matrix: Tensor | None = None
        if options["subproblem"] == "exact":
            matrix, products = b.to_dense(), b.shape[0]
            matrix = 0.5 * (matrix + matrix.mT)

        def propose() -> ModelStep | Status:
            nonlocal b, status, products
            if b is None:  # refused there: products belong to where the parameters are
                b = None if self._is_spent() else self._again(point)
                if b is None:
                    return Status.MAX_EVAL if self._is_spent() else Status.NOT_FINITE
            found, inner = self._within(radius, g, b if matrix is None else matrix), products
            status, products = found.status, 0
            finite = status is not Status.NOT_FINITE
            return ModelStep(found.step, found.predicted, float(found.step.norm()), inner + found.inner, finite)

        def learn(rho: float, step: ModelStep, new: EvaluatedPoint | None) -> None:
            nonlocal b, radius
            if rho < _POOR:
                decrease = -math.inf if new is None else self._value(point) - self._value(new)
                radius = step.size * shrink(decrease, float(g.double().dot(step.step.double())))
            elif rho > _GOOD and status is Status.BOUNDARY:
                radius = min(_GROWTH * radius, float(options["max_radius"]))
            own["radius"] = radius
            b = b if matrix is not None else None

        return self._first_good(point, propose, learn, least=options["eta"], before={"radius": radius})

    def _within(self, radius: float, g: Tensor, b: CurvatureOperator | Tensor) -> _Step:
        """Minimise the model within the radius."""
        if isinstance(b, Tensor):
            exact = more_sorensen(b, g, radius=radius)
            return _Step(exact.x, exact.status, exact.decrease, 0)
        most = self.param_groups[0]["max_inner"]
        found = steihaug(b._solver_product(), g, radius=radius, rtol=self._accuracy(g), max_iter=most)
        # g.x + 1/2 x.B x, by the residual r = -g - B x.
        predicted = 0.5 * float(found.x.double().dot((found.residual - g).double()))
        return _Step(found.x, Status(int(found.status)), predicted, int(found.iterations))
