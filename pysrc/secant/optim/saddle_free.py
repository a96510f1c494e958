"""The saddle-free Newton method: the absolute value of the curvature, in a Krylov space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from secant import _checks
from secant.curvature import EvaluatedPoint
from secant.optim._curvature_optimizer import CURVATURE, CurvatureOptimizer, ModelStep
from secant.optim._flat_optimizer import Callback
from secant.optim._point_optimizer import Advance, PointOptimizer
from secant.result import Status
from secant.solvers import KrylovModel, NielsenDamping

#: Smallest ratio of a step that is accepted: any decrease will do, but for one that is lost in rounding.
_ACCEPTED = 1e-4


class SaddleFreeNewton(CurvatureOptimizer):
    r"""Newton's method with |B| in place of B, so that saddle points repel, with adaptive damping.

        s = -Q (|T| + lambda I)^-1 Q^T g,    T = Q^T B Q,    |T| = S diag(|theta|) S^T

    with Q the Lanczos basis of the Krylov space span(g, B g, B^2 g, ...), of `subspace` dimensions. Along a direction
    of positive curvature this is Newton's step; along one of negative curvature it is as long, and leads down, so that
    the distance from a saddle point doubles with each iteration. g lies in the space, so that nothing of it is lost.

    With rho = (f(x) - f(x + s)) / -(g.s + 1/2 s.B s) the damping follows Nielsen's rule (`solvers.NielsenDamping`); a
    step with rho > 1e-4 is taken, and a refused one takes no new product.

    * **lambda** and its rate of growth are numbers of the state and survive from one mini-batch to the next. Where no
      step can be accepted (STALLED, NOT_FINITE) they are put back to what they were.
    * **Curvature on its own batch:** `step(closure, curvature_closure)`.
    * **Rounding, NaN, exceptions, stationary points:** as for `Newton`.
    * **Memory:** a vector for each dimension of the space.
    * **State:** lambda and its growth, counts, the modes of the products; a run continues from it bit for bit.

    Args:
        params: as for `Newton`. There is no lr: the damping says how long a step is.
        curvature: "hessian" (the closure returns the loss), "ggn" or "fisher" (it returns (outputs, loss)); the last
            two have no negative curvature.
        subspace: dimensions of the space, >= 1: products per iteration.
        damping: lambda at the start of a run, relative to the largest |theta|, > 0.
        max_iter, max_eval, likelihood, tolerance_grad, tolerance_change, tolerance_grad_rel, tolerance_change_rel,
            maximize, on_error, callback: as for `NewtonCG`. `Iteration.step` is |s|.

    Attributes:
        status: a `secant.result.Status`, why the last call of `step` ended; None before the first.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, Identifying and attacking the saddle point problem in
        high-dimensional non-convex optimization, NeurIPS (2014), Algorithm 1. Nielsen, report IMM-REP-1999-05 (1999),
        for the damping.

    Example:
        >>> x = torch.tensor([0.5, 1e-8], dtype=torch.float64, requires_grad=True)       # a saddle point at (0, 0)
        >>> optimizer = secant.optim.SaddleFreeNewton([x], max_iter=60, tolerance_grad=1e-9)
        >>> loss = optimizer.step(lambda: x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4)
        >>> str(optimizer.status), [round(abs(v), 6) for v in x.tolist()]
        ('converged', [0.0, 1.0])
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        "subspace": _checks.integer_from(1),
        "damping": _checks.positive_number(),
        **CURVATURE,
    }
    NUMBERS: ClassVar[Mapping[str, Any]] = {
        **PointOptimizer.NUMBERS,
        "lambda": (0.0, _checks.number_from(0.0)),  # 0: that of the options
        "growth": (2.0, _checks.number_from(1.0)),
    }

    def __init__(
        self,
        params: Any,
        curvature: str = "hessian",
        subspace: int = 30,
        damping: float = 1e-3,
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
        g, b = point.gradient(), self._curvature(point)
        why = Status.NOT_FINITE if b is None else self._without_norm(g)
        if b is None or why is not None:
            return self._stay(why or Status.NOT_FINITE)
        model = KrylovModel(b._solver_product(), g, max_iter=options["subspace"])
        while model.grow():
            pass
        if not model.finite:
            return self._stay(Status.NOT_FINITE, model.iterations)
        sizes, products = model.values.abs(), model.iterations
        # Without any curvature there is no scale: the gradient itself.
        scale = float(sizes.max()) or 1.0 / options["damping"]
        least = torch.finfo(g.dtype).eps * scale
        before = {"lambda": own["lambda"], "growth": own["growth"]}
        damping = NielsenDamping(max(own["lambda"] or options["damping"] * scale, least), own["growth"])

        def propose() -> ModelStep:
            nonlocal products
            u = -model.slopes / (sizes + damping.value)
            step, inner, products = model.combine(u), products, 0
            return ModelStep(step, model.decrease(u), float(step.norm()), inner)

        def learn(rho: float, step: ModelStep, new: EvaluatedPoint | None) -> None:
            damping.update(rho if rho > _ACCEPTED else -1.0, 1.0)
            own["lambda"], own["growth"] = max(damping.value, least), damping.growth

        return self._first_good(point, propose, learn, least=_ACCEPTED, before=before)
