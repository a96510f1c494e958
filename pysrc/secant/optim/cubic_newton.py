"""Newton's method with adaptive cubic regularisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from secant import _checks
from secant.curvature import EvaluatedPoint
from secant.optim._curvature_optimizer import CURVATURE, CurvatureOptimizer, ModelStep
from secant.optim._flat_optimizer import Callback
from secant.optim._point_optimizer import Advance, PointOptimizer
from secant.result import Status
from secant.solvers import CubicStep, cubic

#: Ratios of a step that is accepted, and of one that is as good as the model says.
_ACCEPTED, _GOOD = 0.1, 0.9
#: What becomes of sigma after a good step, after a refused one, and after one that went up, and its smallest value.
_LOWER, _RAISE, _RAISE_MUCH, _LEAST = 0.5, 2.0, 8.0, 1e-12


class CubicNewton(CurvatureOptimizer):
    r"""Newton's method with adaptive cubic regularisation (ARC), in a Krylov space.

        s = argmin m(s),    m(s) = g.s + 1/2 s.B s + sigma/3 |s|^3,    rho = (f(x) - f(x + s)) / -m(s)

        rho > 0.1:  x_(k+1) = x_k + s,  and sigma <- sigma / 2 if rho > 0.9
        else:       sigma <- 2 sigma, or 8 sigma if the loss did not fall

    With sigma / 3 at least a sixth of the Lipschitz constant of the Hessian, m is above f: the term stands for what the
    quadratic leaves out, and sigma learns it. B may be indefinite: the step has B + sigma |s| I >= 0, so that negative
    curvature is followed, as far as |lambda| / sigma, and saddle points are left at once. Of all first- and
    second-order methods this has the best known bound on evaluations, O(eps^-3/2) to a gradient of eps.

    The model is minimised in the Krylov space of g, which grows until the gradient of m there is min(1/2, (|g| /
    |g_0|)^(1/2)) |g|, g_0 the run's first gradient. A refused step takes no new product.

    * **sigma** is a number of the state and survives from one mini-batch to the next. Where no step can be accepted
      (STALLED, NOT_FINITE) it is put back to what it was.
    * **Curvature on its own batch:** `step(closure, curvature_closure)`.
    * **Rounding, NaN, exceptions, stationary points:** as for `Newton`.
    * **Memory:** a vector for each dimension of the space.
    * **State:** sigma, counts, the modes of the products; a run continues from it bit for bit.

    Args:
        params: as for `Newton`. There is no lr: sigma says how long a step is.
        curvature: "hessian" (the closure returns the loss), "ggn" or "fisher" (it returns (outputs, loss)).
        sigma: at the start of a run, > 0.
        max_inner: dimensions of the space, >= 1: products per iteration.
        max_iter, max_eval, likelihood, tolerance_grad, tolerance_change, tolerance_grad_rel, tolerance_change_rel,
            maximize, on_error, callback: as for `NewtonCG`. `Iteration.step` is |s|.

    Attributes:
        status: a `secant.result.Status`, why the last call of `step` ended; None before the first.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        Cartis, Gould, Toint, Adaptive cubic regularisation methods for unconstrained optimization, Math. Program. 127
        (2011), Algorithm 2.1, and 130 (2011) for the bound. Nesterov and Polyak, Cubic regularization of Newton method
        and its global performance, Math. Program. 108 (2006). The factors of sigma are heuristics.

    Example:
        >>> x = torch.tensor([0.5, 1e-8], dtype=torch.float64, requires_grad=True)       # a saddle point at (0, 0)
        >>> optimizer = secant.optim.CubicNewton([x], max_iter=30, tolerance_grad=1e-9)
        >>> loss = optimizer.step(lambda: x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4)
        >>> str(optimizer.status), [round(abs(v), 6) for v in x.tolist()]
        ('converged', [0.0, 1.0])
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        "sigma": _checks.positive_number(),
        "max_inner": _checks.integer_from(1),
        **CURVATURE,
    }
    NUMBERS: ClassVar[Mapping[str, Any]] = {
        **PointOptimizer.NUMBERS,
        "sigma": (0.0, _checks.number_from(0.0)),  # 0: that of the options
    }

    def __init__(
        self,
        params: Any,
        curvature: str = "hessian",
        sigma: float = 1.0,
        max_inner: int = 100,
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

    def _advance(self, point: EvaluatedPoint) -> Advance:
        own, options = self._own, self.param_groups[0]
        sigma = float(own["sigma"] or options["sigma"])
        g, b = point.gradient(), self._curvature(point)
        why = Status.NOT_FINITE if b is None else self._without_norm(g)
        if b is None or why is not None:
            return self._stay(why or Status.NOT_FINITE)
        model: CubicStep | None = None
        product, accuracy = b._solver_product(), self._accuracy(g)

        def propose() -> ModelStep:
            nonlocal model
            inner = 0
            if model is None:
                model = cubic(product, g, sigma=sigma, rtol=accuracy, max_iter=options["max_inner"])
                inner = model.iterations
            else:
                model = model.again(sigma)
            predicted = model.decrease - sigma / 3.0 * model.size**3
            return ModelStep(model.x, predicted, model.size, inner, model.status is not Status.NOT_FINITE)

        def learn(rho: float, step: ModelStep, new: EvaluatedPoint | None) -> None:
            nonlocal sigma
            if rho > _GOOD:
                sigma = max(_LOWER * sigma, _LEAST)
            elif rho <= _ACCEPTED:
                sigma *= _RAISE if rho > 0.0 else _RAISE_MUCH
            own["sigma"] = sigma

        return self._first_good(point, propose, learn, least=_ACCEPTED, before={"sigma": sigma})
