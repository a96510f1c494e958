"""Inexact Newton's method: truncated conjugate gradients, negative curvature as a direction, backtracking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import KFAC, EvaluatedPoint
from secant.curvature._curvature import CurvatureOperator
from secant.optim._curvature_optimizer import CURVATURE, CurvatureOptimizer
from secant.optim._flat_optimizer import RATE, Callback
from secant.optim._point_optimizer import Advance, PointOptimizer
from secant.result import Status
from secant.solvers import ForcingTerm, cg, nystrom

#: How a length along negative curvature grows when a whole step of it was good, and where it starts.
_GROWTH, _REACH = 2.0, 1.0
_LEAST, _MOST = 1e-10, 1e3
#: Gain ratios above and below which lambda changes, and the factors.
_GOOD, _POOR = 0.75, 0.25
_FALL, _RISE = 2.0 / 3.0, 3.0 / 2.0
#: The first lambda, relative to the curvature along the gradient, where none is given.
_START = 0.1
_FORCING = _checks.Option("a number in [1e-6, 1)", lambda x: _checks.is_number(x, 1e-6, 1.0))


class NewtonCG(CurvatureOptimizer):
    r"""Newton's method by truncated conjugate gradients: products with the curvature, never the matrix.

        (B + lambda I) d = -g  by CG, to |B d + lambda d + g| <= eta_k |g|,    x_(k+1) = x_k + t d,

    B the Hessian, the generalised Gauss-Newton matrix or the Fisher information, lambda = `damping` (0 by default),
    eta_k the forcing term of Eisenstat and Walker, and t = `lr` or the first shorter step with sufficient decrease. A
    quadratic of n parameters with a positive definite Hessian takes n products, if eta allows no fewer.

    * **Negative curvature.** Where CG meets a direction p with p.B p <= 0 it ends, and the step goes on along p:

          d = x + (l c / |p|) p,    l the reach,    c = min(1, |p.Bp / p.p| / |g.Bg / g.g|),

      x what CG had found, or 0 if p is the first direction. p is conjugate to x and descends, so that the model falls
      along both; c keeps curvature that is negative by rounding alone from counting. The reach is a number of the
      state: it doubles after a whole step, and shrinks with a step that was shortened. So a saddle point is left at
      once, not by a constant factor per iteration.
    * **line_search_fn="strong_wolfe"** asks for a slope that has become flatter, too, and lengthens steps that are too
      short: two thirds of the products on the problems of More, Garbow and Hillstrom. A trial costs a gradient. Steps
      along negative curvature are shortened only.
    * **adaptive=True** moves lambda by Levenberg and Marquardt's rule as Martens has it: with the gain ratio

          rho = (f(x) - f(x + t d)) / (q(0) - q(t d)),    q(s) = g.s + 1/2 s.B s,    t = lr,

      where a search has lengthened the step with the t taken, lambda is multiplied by 2/3 where rho > 3/4, and by 3/2
      where rho < 1/4 or the step had to be shortened. f and g are those of the batch of the gradient. It starts at
      `damping`, or where that is 0 at a tenth of g.Bg / g.g, and is a number of the state. Where lambda keeps a step so
      short that its decrease is lost in the rounding of the loss and the step is refused, the call ends with status
      STALLED, but lambda is multiplied by 2/3: the next call goes on with a longer one. Steps along negative curvature
      leave it as it is.
    * **preconditioner="kronecker"**, for networks of Linear layers, convolutions and embeddings and the curvature "ggn"
      or "fisher": the inverse of `secant.curvature.KFAC`, one Kronecker product of two small matrices per layer, of the
      batch of the curvature and one random vector above the outputs, for the time of about three products with B.
      Together with `adaptive`, which keeps the systems well-posed, an iteration takes 3 or 4 products where it takes 15
      without it (a deep autoencoder, 5,544 parameters).
    * **preconditioner="nystrom"** spends `rank` products at once on a low-rank approximation of B at each iteration,
      which CG uses as a preconditioner: for systems that otherwise take many times `rank` products. Of a Hessian the
      positive part is used.
    * **Curvature on its own batch:** `step(closure, curvature_closure)`.
    * **Rounding, NaN, exceptions, stationary points:** as for `Newton`.
    * **State:** the forcing term and the size of the last gradient, the reach, counts, the modes of the products; a run
      continues from it bit for bit.

    Args:
        params: as for `Newton`.
        lr: the step that is tried first, >= 0, a number or a tensor of one element.
        curvature: "hessian" (the closure returns the loss), "ggn" or "fisher" (it returns (outputs, loss)).
        damping: lambda, or the first one, >= 0.
        max_inner: products per system, >= 1.
        forcing: largest eta, in [1e-6, 1).
        preconditioner: None, "nystrom" or "kronecker".
        rank: of the preconditioner "nystrom", >= 1 (n where that is less).
        max_iter, max_eval: per call of `step`, as for `Newton`.
        adaptive: whether lambda moves.
        line_search_fn: "backtracking" or "strong_wolfe".
        likelihood: of the outputs, for "fisher"; see `secant.curvature.Fisher`.
        tolerance_grad, tolerance_change, tolerance_grad_rel, tolerance_change_rel, maximize, on_error, callback: as for
            `Newton`.

    Attributes:
        status: a `secant.result.Status`, why the last call of `step` ended; None before the first.

    Raises:
        TypeError, ValueError: an argument is invalid. In `step`: "kronecker" does not know the layers of the model.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithms 7.1, p. 169, and 3.5, p. 60. Eisenstat and
        Walker, SIAM J. Sci. Comput. 17 (1996). Royer and Wright, Complexity analysis of second-order line-search
        algorithms for smooth nonconvex optimization, SIAM J. Optim. 28 (2018), for steps along negative curvature (the
        reach in place of a Lipschitz constant is a heuristic). Frangella, Tropp, Udell, SIAM J. Matrix Anal. Appl. 44
        (2023). Martens, Deep learning via Hessian-free optimization, ICML (2010), section 4.1 (lambda; where it starts,
        and what becomes of it where the loss tells nothing, are heuristics). Martens and Grosse, Optimizing neural
        networks with Kronecker-factored approximate curvature, ICML (2015).

    Example:
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(50, 3), torch.randint(2, (50,))
        >>> def closure():
        ...     outputs = model(x)
        ...     return outputs, torch.nn.functional.cross_entropy(outputs, y)
        >>> optimizer = secant.optim.NewtonCG(model.parameters(), curvature="ggn", tolerance_grad=1e-5)
        >>> loss = optimizer.step(closure)
        >>> optimizer.status.ok or optimizer.status is secant.Status.STALLED
        True
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        "lr": RATE,
        "damping": _checks.number_from(0.0),
        "adaptive": _checks.flag(),
        "max_inner": _checks.integer_from(1),
        "forcing": _FORCING,
        "preconditioner": _checks.one_of(None, "nystrom", "kronecker"),
        "rank": _checks.integer_from(1),
        "line_search_fn": _checks.one_of("backtracking", "strong_wolfe"),
        **CURVATURE,
    }
    LATER: ClassVar[Mapping[str, Any]] = {"adaptive": False, "line_search_fn": "backtracking"}
    NUMBERS: ClassVar[Mapping[str, Any]] = {
        **PointOptimizer.NUMBERS,
        "eta": (0.0, _checks.number_from(0.0, 1.0)),  # of the last system; 0: there was none
        "size": (0.0, _checks.number_from(0.0)),  # of its gradient
        "lambda": (0.0, _checks.number_from(0.0)),  # of the next system, where it moves; 0: none yet
        "reach": (_REACH, _checks.number_from(0.0)),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        curvature: str = "hessian",
        damping: float = 0.0,
        max_inner: int = 200,
        forcing: float = 0.5,
        preconditioner: str | None = None,
        rank: int = 20,
        max_iter: int = 20,
        max_eval: int | None = None,
        *,
        adaptive: bool = False,
        line_search_fn: str = "backtracking",
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
        if b is None:
            return self._stay(Status.NOT_FINITE)
        plain, damping = b._solver_product(), self._damping(b, g)

        def product(v: Tensor) -> Tensor:
            return plain(v).add_(v, alpha=damping) if damping else plain(v)

        preconditioner, extra = self._preconditioner(b, damping)
        found = cg(
            product,
            -g,
            preconditioner=preconditioner,
            rtol=self._forcing_term(g),
            max_iter=min(options["max_inner"], 10 * b.shape[0]),
        )
        status, iterations = Status(int(found.status)), int(found.iterations)
        inner = iterations + extra
        if status is Status.NOT_FINITE:
            return self._stay(status, inner)
        if status is not Status.FLAT:
            slope = _dot(g, found.x)
            if not slope < 0.0:  # -g itself is below rounding
                return self._stay(Status.STALLED, inner)
            search = self._search if options["line_search_fn"] == "strong_wolfe" else self._backtrack
            advance = search(point, found.x, slope, inner=inner)
            if options["adaptive"]:
                # x.B x by the residual -g - (B + lambda I) x.
                bend = -slope - _dot(found.x, found.residual) - damping * _dot(found.x, found.x)
                t = max(advance.t, self._lr)
                self._adapt(point, advance, t * found.x, -(t * slope + 0.5 * t**2 * bend))
            return advance

        # Along the negative curvature that was found.
        p, first = found.direction, iterations == 1
        bp, bg = product(p), product(g)
        bend = _dot(p, bp)
        relative = abs(_ratio(bend, _dot(p, p))) / (abs(_ratio(_dot(g, bg), _dot(g, g))) or math.inf)
        share = 1.0 if first else min(1.0, relative)
        size = float(p.norm())
        length = own["reach"] * share / size if size > 0.0 else 0.0
        d = length * p if first else torch.add(found.x, p, alpha=length)
        # x.B x by the residual -g - B x, and x.B p = 0.
        bend *= length * length
        if not first:
            bend += _dot(found.x, -g - found.residual)
        advance = self._backtrack(point, d, _dot(g, d), bend=min(bend, 0.0), inner=inner + 2)
        if advance.point is not None:
            reach = own["reach"] * (_GROWTH if advance.t >= self._lr else advance.t / self._lr)
            own["reach"] = min(max(reach, _LEAST), _MOST)
        return advance

    def _forcing_term(self, g: Tensor) -> float:
        """Return eta for the system of this gradient."""
        own, most = self._own, float(self.param_groups[0]["forcing"])
        forcing = ForcingTerm(min(max(own["eta"] or most, 1e-6), most), most=most)
        forcing.last = own["size"] or math.nan
        size = float(g.norm())
        own["eta"], own["size"] = forcing.update(size), size
        return own["eta"]

    def _damping(self, b: CurvatureOperator, g: Tensor) -> float:
        """Return lambda of the system at hand."""
        own, options = self._own, self.param_groups[0]
        if not options["adaptive"]:
            return float(options["damping"])
        own["lambda"] = own["lambda"] or options["damping"] or _START * abs(_ratio(_dot(g, b @ g), _dot(g, g)))
        return float(own["lambda"])

    def _adapt(self, point: EvaluatedPoint, advance: Advance, step: Tensor, predicted: float) -> None:
        """Move lambda by what the step that was tried first, or a longer one, has brought of what was predicted."""
        if advance.status is Status.MAX_EVAL:
            return  # it is not known
        if advance.status is Status.STALLED and self._is_blind(point, predicted):
            ratio = math.inf  # so short that nothing is seen of it
        elif advance.point is None or advance.t < self._lr:
            ratio = -math.inf  # it had to be shortened
        else:
            ratio = self._ratio(point, advance.point, step, predicted)
        factor = _FALL if ratio > _GOOD else _RISE if ratio < _POOR else 1.0
        self._own["lambda"] = max(self._own["lambda"] * factor, _LEAST)

    def _preconditioner(self, b: CurvatureOperator, damping: float) -> tuple[Callable[[Tensor], Tensor] | None, int]:
        """Make the preconditioner of a system; return it, and the products that it took."""
        options, n, seed = self.param_groups[0], b.shape[0], self._own["n_iter"]
        if options["preconditioner"] is None:
            return None, 0
        if options["preconditioner"] == "kronecker":
            found = KFAC._around(b, seed)
            if found is None:
                expected = '\'kronecker\' with "ggn" or "fisher" of layers, see KFAC'
                raise _checks.fail(self._name, "preconditioner", expected, "a model without them")
            return found.inverse(damping=damping)._vector, 0
        rank = min(options["rank"], n)
        sketch = nystrom(b.matmat, n, rank, dtype=b.dtype, device=b.device, seed=seed)
        return sketch.preconditioner(damping), rank


def _dot(u: Tensor, v: Tensor) -> float:
    return float(u.double().dot(v.double()))


def _ratio(x: float, y: float) -> float:
    return x / y if y else 0.0
