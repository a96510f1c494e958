"""Levenberg and Marquardt's method, with geodesic acceleration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import EvaluatedPoint
from secant.optim._bounds import BOUNDS, Bounds
from secant.optim._damped_optimizer import GOOD, LEAST, POOR, UNCLEAR, DampedOptimizer, Found
from secant.optim._flat_optimizer import Callback
from secant.optim._normal_equations import SOLVER, NormalEquations, Solution
from secant.optim._point_optimizer import COMMON, Advance
from secant.optim._region import Region, shrink
from secant.result import Status
from secant.solvers._robust import Robust

#: Part of d at which the second derivative along it is measured.
_PROBE = 0.1
#: |a| / |d| up to which a is believed.
_BENT = 0.75
#: Halvings of t on one curve.
_HALVINGS = 2
#: The radius after a good step, in steps.
_GROWTH = 2.0


class _Model(NamedTuple):
    """The residuals at a point, linearized, all in double precision.

    residuals: r, as the closure has them. right: u of the equations, which is r unless the loss is robust. weights: W,
    None for I. equations: of J^T W^2 J. gradient: J^T W u. grad_max: its largest component, projected.
    """

    point: EvaluatedPoint
    residuals: Tensor
    right: Tensor
    weights: Tensor | None
    equations: NormalEquations
    gradient: Tensor
    grad_max: float


#: From a right-hand side to the solution; and from the components that are free, None for all, to that.
_Solve = Callable[[Tensor], Solution]
_Solver = Callable[[Tensor | None], _Solve | None]


class _Curve(NamedTuple):
    """t d + t^2 a / 2; a None: a line. slope, curvature: g.d and |W J d|^2. inner: products that it took."""

    d: Tensor
    a: Tensor | None
    slope: float
    curvature: float
    inner: int

    def at(self, t: float) -> Tensor:
        """Return the step to t."""
        return t * self.d if self.a is None else t * self.d + (0.5 * t * t) * self.a

    def predicted(self, t: float) -> float:
        """Return the decrease that the linear model promises at t."""
        return -t * (self.slope + 0.5 * t * self.curvature)


class LevenbergMarquardt(DampedOptimizer):
    r"""Levenberg and Marquardt's method for the sum of squares of residuals, with geodesic acceleration.

        loss(x) = 1/2 |r(x)|^2,        (J^T J + lambda D) d = -J^T r,        x <- x + t d + t^2 a / 2

    The closure returns the residuals r with their graph, a tensor of any shape or several, and calls no backward; a
    mean is a factor in r, as 1 / sqrt(N). An iteration takes the Jacobian J once. Where J^T J is affordable this is the
    method of choice for a sum of squares: curve fitting, calibration, networks that solve differential equations.

    * **The curve.** a solves (J^T J + lambda D) a = -J^T r_vv with r_vv the second derivative of r along d, by one more
      evaluation, at x + d / 10, and the factor at hand. It bends the step along a narrow valley, and is left out where
      |a| > 3/4 |d|, in the norm of D.
    * **lambda** is multiplied by 0.1 where the loss fell by more than 3/4 of what the linear model promised, and by 4
      where it fell by less than 1/4. Then t = 1/2 and t = 1/4 are tried, too, before another d is computed. It is part
      of the state: with mini-batches each call of `step` is about one batch, for all its evaluations, with the lambda
      that the last has left.
    * **The radius.** With strategy "radius" lambda is found, at every trial, such that |D^(1/2) d| is at most a radius
      Delta, which is the state then: it is shortened to between 1/10 and 1/2 of d (by a parabola) where the gain ratio
      is below 1/4, and 2 |D^(1/2) d| where it is above 3/4 or lambda is 0; steps are taken above 1e-4. J is decomposed
      by singular values, once an iteration, dearer than the factor but exact also where J^T J is singular to rounding.
      With geodesic=False this is the method of MINPACK: few evaluations where J is dear or ill-conditioned.
    * **The matrix** that is factored is P x P for P <= N, else N x N (by Woodbury's identity), in double precision; see
      `solver`.
    * **Rounding.** The decrease is (r - s).(r + s) / 2 for residuals r before and s after, which has the accuracy of
      r - s. Where it, and what the model promises, cannot be told from rounding, a step is taken if the gradient
      becomes smaller; else the call ends with status STALLED, and lambda is what it was.
    * **Robust losses** 1/2 sum c^2 rho((r_i / c)^2), as in `scipy.optimize.least_squares`, c being `f_scale`: "soft_l1"
      rho(z) = 2 (sqrt(1 + z) - 1), "huber" z up to 1, then 2 sqrt(z) - 1, "cauchy" ln(1 + z). Rows of J and r are
      scaled such that J^T J keeps the second derivative of rho, as far as it is positive.
    * **Bounds** are never left: d solves for the components that are not held at a bound, and holds those that would go
      beyond. `tolerance_grad` looks at x - P(x - g).
    * **Groups** may differ in their bounds only. There is no lr: lambda says how long a step is.
    * **NaN, Inf, exceptions.** A trial whose residuals are not finite is refused, and so is one whose Jacobian is not
      (after the last iteration of a call nobody looks at that of the next); a closure that raises
      leaves parameters and state as they were before the call. p.grad is neither read nor written.
    * **Processes.** The equations are those of one process.

    Args:
        params: parameters or groups; real, dense, distinct, float32 or float64, all of one dtype and device.
        max_iter: iterations per call of `step`, >= 1; 1 for mini-batches.
        strategy: "lambda": it follows the gain ratio; "radius": it is that of a trust region.
        damping: the first lambda, relative to the largest of the diagonal of J^T J, or to D; > 0. It hardly matters.
        factor: the first radius, in |D^(1/2) x| (in 1 where x is 0), > 0; never more than the first d.
        scaling: "identity", or "marquardt": D is the largest that the diagonal of J^T J has been so far, so that the
            steps do not depend on the units of the parameters.
        geodesic: whether a is computed; it is not where the equations are solved by conjugate gradients.
        solver: "parameters" (Cholesky, P x P), "samples" (Cholesky, N x N), "cg" (conjugate gradients with products
            J v and J^T u, to a residual of 1e-3), or "auto": the smaller of the first two up to 5,000, beyond "cg".
        loss: "linear", "soft_l1", "huber" or "cauchy".
        f_scale: of a robust loss, > 0.
        bounds: None or (lower, upper), lower < upper: each a number, infinite or not, a tensor of all parameters
            flat, or a tensor for each parameter. May be set per group, for its parameters.
        max_eval: evaluations of the closure per call, >= 1; None: no limit.
        tolerance_grad: stop when the largest component of the gradient is at most this in absolute value.
        tolerance_change: stop when the loss changes by less than this, or no parameter by more.
        tolerance_grad_rel: stop also when the gradient is at most this times the first of the run.
        tolerance_change_rel: stop also when the loss changes by less than this times its magnitude.
        on_error: "raise", or "backtrack": a RuntimeError, ValueError or ArithmeticError of the closure at a trial is an
            infinite loss.
        callback: called with a `secant.result.Iteration` after each one (step: t; inner: products of conjugate
            gradients); a true value ends the call. It is not part of the state.

    Attributes:
        status: why the last call of `step` ended, a `secant.result.Status`; None before the first.

    Raises:
        TypeError, ValueError: an argument is invalid. At a step: the closure returns something else than residuals; a
            parameter is beyond its bounds.

    References:
        Marquardt, An algorithm for least-squares estimation of nonlinear parameters, J. SIAM 11 (1963). Transtrum and
        Sethna, Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization, arXiv
        1201.5885 (2012), section 4 (the acceleration; its limit there is 2 |a| / |d| < 3/4). More, The
        Levenberg-Marquardt algorithm: implementation and theory, LNM 630 (1978) (D, and the strategy "radius", whose
        constants are MINPACK's lmder). The halvings on the curve, the
        factors of lambda and the test against rounding are heuristics.

    Example:
        >>> t = torch.linspace(0, 1, 20, dtype=torch.float64)
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> optimizer = secant.optim.LevenbergMarquardt([w], max_iter=50, tolerance_grad=1e-10)
        >>> loss = optimizer.step(lambda: 3 * torch.exp(-2 * t) - w[0] * torch.exp(-w[1] * t))
        >>> [round(x, 6) for x in w.tolist()], str(optimizer.status)
        ([3.0, 2.0], 'converged')
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        **COMMON,
        "strategy": _checks.one_of("lambda", "radius"),
        "damping": _checks.positive_number(),
        "factor": _checks.positive_number(),
        "scaling": _checks.one_of("identity", "marquardt"),
        "geodesic": _checks.flag(),
        "solver": SOLVER,
        "loss": _checks.one_of("linear", "soft_l1", "huber", "cauchy"),
        "f_scale": _checks.positive_number(),
        "bounds": BOUNDS,
    }
    KINDS = ("residuals",)
    PER_GROUP = ("bounds",)
    VECTORS = ("diagonal",)
    NUMBERS: ClassVar[Mapping[str, Any]] = {
        **DampedOptimizer.NUMBERS,
        "radius": (0.0, _checks.number_from(0.0)),  # of the next step; 0: none yet
    }

    _robust: Robust
    _box: Bounds | None = None
    _model: _Model | None = None

    def __init__(
        self,
        params: Any,
        max_iter: int = 20,
        *,
        strategy: str = "lambda",
        damping: float = 1e-3,
        factor: float = 100.0,
        scaling: str = "identity",
        geodesic: bool = True,
        solver: str = "auto",
        loss: str = "linear",
        f_scale: float = 1.0,
        bounds: tuple[Any, Any] | None = None,
        callback: Callback | None = None,
        **common: Any,
    ) -> None:
        options = {
            "max_iter": max_iter,
            "strategy": strategy,
            "damping": damping,
            "factor": factor,
            "scaling": scaling,
            "geodesic": geodesic,
            "solver": solver,
            "loss": loss,
            "f_scale": f_scale,
            "bounds": bounds,
        }
        super().__init__(params, options | common, callback)

    # The loss and its model -------------------------------------------------------------------------------------------

    def _check_groups(self, op: str) -> None:
        super()._check_groups(op)
        Bounds.of(op, self.param_groups, self._first.detach())

    def _begin(self, closure: Callable[[], Any]) -> None:
        super()._begin(closure)
        options = self.param_groups[0]
        self._robust, self._model = Robust(options["loss"], options["f_scale"]), None
        box = Bounds.of(f"{self._name}.step", self.param_groups, self._start)
        self._box = None if box is None else box.take(self._inside)
        if self._box is not None:
            self._free_parameters.save(self._start_views)
            if not self._box.contains(self._start):
                raise _checks.fail(f"{self._name}.step", "params", "values within the bounds", "one beyond")

    def _loss(self, point: EvaluatedPoint) -> Tensor:
        return point.value if self._robust.name == "linear" else self._robust.value(point.residuals())

    def _modelled(self, point: EvaluatedPoint) -> _Model:
        """Return the model at a point, where the parameters are; made once."""
        if self._model is None or self._model.point is not point:
            residuals = point.residuals().double()
            right, weights = self._robust.linearized(residuals)
            size = len(residuals), point.params.n
            equations = NormalEquations(point.jacobian(), size, weights, self.param_groups[0]["solver"])
            gradient = projected = equations.pull(right)
            if self._box is not None:
                self._free_parameters.save(self._here_views)
                projected = self._box.projected(self._here.double(), gradient)
            grad_max = float(projected.abs().max())
            self._model = _Model(point, residuals, right, weights, equations, gradient, grad_max)
        return self._model

    def _project(self, x: Tensor) -> None:
        if self._box is not None:
            torch.clamp(x, self._box.lower, self._box.upper, out=x)

    # An iteration -----------------------------------------------------------------------------------------------------

    def _advance(self, point: EvaluatedPoint) -> Advance:
        if self.param_groups[0]["strategy"] == "lambda":
            return super()._advance(point)
        own, model, options = self._own, self._modelled(point), self.param_groups[0]
        before, inner, unclear = own["radius"], 0, 0
        scale, value = self._scale(model), self._value(point)
        regions = self._regions(model, scale)
        if not before:
            size = _length(self._start.double(), scale)
            own["radius"] = options["factor"] * (size if size > 0.0 else 1.0)
        while not self._is_spent():
            proposal = self._propose_within(model, scale, regions)
            size = _length(proposal.d, scale)
            if not (self._is_felt(proposal.at(1.0).to(self._start)) and proposal.predicted(1.0) > 0.0):
                break
            if not before:
                own["radius"] = min(own["radius"], size)
            if self._is_spent():
                return self._stay(Status.MAX_EVAL)
            new = self._try(proposal.at(1.0).to(self._start))
            usable = new is not None and self._is_usable(new)
            decrease = self._decrease(model, new) if new is not None and usable else -math.inf
            gain = decrease / proposal.predicted(1.0)
            gain = gain if math.isfinite(gain) else -math.inf
            self._resize(gain, decrease, proposal, size)
            blurred = self._is_unclear(model, proposal)
            if new is not None and usable:
                smaller = self._grad_max(new) < model.grad_max if blurred else True
                if gain > LEAST and (smaller or not self._blurred):
                    return self._accept(new, proposal.at(1.0), 1.0, inner)
                if blurred and smaller:
                    self._blurred = True
                    return self._accept(new, proposal.at(1.0), 1.0, inner)
            relative = options["tolerance_change_rel"] * value
            if max(abs(decrease), proposal.predicted(1.0)) < relative:
                return self._stay(Status.SMALL_CHANGE)
            unclear += blurred
            if unclear == UNCLEAR:
                break
        else:
            return self._stay(Status.MAX_EVAL)
        own["radius"] = before
        return self._stay(Status.STALLED)

    def _regions(self, model: _Model, scale: Tensor | None) -> Callable[[Tensor | None], Region]:
        """Return what makes the `Region` of the components that are free, once where those are all."""
        matrix = model.equations.matrix
        if matrix is None:
            got = "'radius', with solver 'cg', which does not know the Jacobian"
            raise _checks.fail(f"{self._name}.step", "strategy", "'lambda'", got)
        made: dict[bytes | None, Region] = {}

        def region(free: Tensor | None) -> Region:
            key = None if free is None else bytes(free.tolist())
            if key not in made:
                made[key] = Region(matrix, scale, free, weighted=model.weights is not None)
            return made[key]

        return region

    def _propose_within(
        self, model: _Model, scale: Tensor | None, regions: Callable[[Tensor | None], Region]
    ) -> _Curve:
        """Solve with the lambda of the radius, which is that of the components that are free at the start."""
        own, radius = self._own, self._own["radius"]
        own["lambda"] = -1.0

        def solver(free: Tensor | None) -> _Solve:
            region = regions(free)
            if own["lambda"] < 0.0:
                own["lambda"] = region.damping(model.right, radius)
            return lambda u: Solution(region.solve(u, own["lambda"]))

        found = self._curve(model, scale, solver)
        assert found is not None
        return found

    def _resize(self, gain: float, decrease: float, proposal: _Curve, size: float) -> None:
        """Change the radius as MINPACK does: by the gain ratio, and by the parabola through a rise of the loss."""
        own = self._own
        if gain <= POOR:
            own["radius"] = shrink(decrease, proposal.slope) * size
        elif gain >= GOOD or own["lambda"] == 0.0:
            own["radius"] = _GROWTH * size

    def _size(self, model: _Model) -> float:
        return model.equations.size(model.gradient) if self.param_groups[0]["scaling"] == "identity" else 1.0

    def _propose(self, model: _Model) -> _Curve | None:
        equations, lam, scale = model.equations, self._own["lambda"], self._scale(model)

        def solver(free: Tensor | None) -> _Solve | None:
            return equations.solve if equations.damp(lam, scale, free) else None

        return self._curve(model, scale, solver)

    def _curve(self, model: _Model, scale: Tensor | None, solver: _Solver) -> _Curve | None:
        """Compute d and a; None where a matrix cannot be factored."""
        if self._box is None:
            solve = solver(None)
            if solve is None:
                return None
            solution, inner = solve(model.right)
            d = -solution
        else:
            found = self._within(model, solver, self._box)
            if found is None:
                return None
            (d, inner), solve = found
        jd = model.equations.push(d)
        slope, curvature = float(model.gradient.dot(d)), float(jd.dot(jd))
        return _Curve(d, self._acceleration(model, d, jd, scale, solve), slope, curvature, inner)

    def _scale(self, model: _Model) -> Tensor | None:
        """Return Marquardt's D, the largest that the diagonal of J^T J has been; None for I."""
        if self.param_groups[0]["scaling"] == "identity":
            return None
        if model.equations.space == "cg":
            got = "'marquardt', with solver 'cg', which does not know the diagonal"
            raise _checks.fail(f"{self._name}.step", "scaling", "'identity'", got)
        kept = self._own["diagonal"]
        self._undo.keep("diagonal", [kept])
        diagonal = torch.maximum(self._part(kept), model.equations.diagonal().to(kept))
        self._put(kept, diagonal)
        return torch.where(diagonal > 0.0, diagonal, 1.0).double()

    def _within(self, model: _Model, solver: _Solver, box: Bounds) -> tuple[Solution, _Solve] | None:
        """Compute a d that stays within the bounds and lowers the model, by going from one minimum to the next.

        From d = 0 towards the minimum over the components that are free, as far as the first bound; what meets it is
        held there at p, and the others solve with the residuals r + J p, until a minimum lies within. The model, which
        is convex, falls all the way. The last solver comes with it.

        References:
            Lawson and Hanson, Solving Least Squares Problems (1974), section 23.3 (the walk to the first bound).
        """
        x = self._start.double()
        lower, upper = box.lower.to(x) - x, box.upper.to(x) - x
        free, d, inner = box.free(x, model.gradient), torch.zeros_like(x), 0
        solve: _Solve | None = None
        for _ in range(len(x) + 1):
            solve = solver(free)
            if solve is None:
                return None
            held = torch.where(free, 0.0, d)
            solution, products = solve(model.right + model.equations.push(held))
            inner += products
            step = torch.where(free, held - solution - d, 0.0)
            room = torch.where(step > 0.0, (upper - d) / step, torch.where(step < 0.0, (lower - d) / step, math.inf))
            room = torch.where(free & (step != 0.0), room.clamp_min(0.0), math.inf)
            t = min(1.0, float(room.min()))
            met = free & (room <= t)
            d = torch.where(met, torch.where(step > 0.0, upper, lower), d + t * step) if t < 1.0 else d + step
            if t >= 1.0 or not bool((free & ~met).any()):
                break
            free = free & ~met
        assert solve is not None
        return Solution(torch.minimum(torch.maximum(d, lower), upper), inner), solve

    def _acceleration(self, model: _Model, d: Tensor, jd: Tensor, scale: Tensor | None, solve: _Solve) -> Tensor | None:
        """Compute a, from the second difference of the residuals along d; None where it is not to be believed."""
        spare = self._own["func_evals"] + 1 < self._limit
        if not self.param_groups[0]["geodesic"] or model.equations.space == "cg" or not spare:
            return None
        probe = self._try((_PROBE * d).to(self._start))
        if probe is None:
            return None
        change = (probe.residuals().double() - model.residuals) / _PROBE
        if model.weights is not None:
            change = change * model.weights
        a = -solve((change - jd) * (2.0 / _PROBE)).x
        sizes = [x.dot(x if scale is None else x * scale) for x in (a, d)]
        return a if bool(sizes[0] <= _BENT**2 * sizes[1]) else None

    def _search(self, model: _Model, proposal: _Curve) -> Found:
        """Try t = 1, and where its gain ratio is poor smaller ones; lambda follows that of t = 1."""
        first = -math.inf
        for k in range(_HALVINGS + 1):
            t = 0.5**k
            predicted = proposal.predicted(t)
            if not predicted > 0.0:
                break
            new = self._try(proposal.at(t).to(self._start))
            gain = math.nan if new is None else self._decrease(model, new) / predicted
            gain = gain if math.isfinite(gain) else -math.inf
            if k == 0:
                first = gain
            last = k == _HALVINGS or self._is_spent()
            if new is not None and gain > (LEAST if last else POOR) and self._is_usable(new):
                return Found(new, t, first)
            if last or (gain < LEAST and self._is_unclear(model, proposal)):
                break
        return Found(None, 0.0, min(first, 0.0))

    def _decrease(self, model: _Model, new: EvaluatedPoint) -> float:
        return float(self._robust.decrease(model.residuals, new.residuals().double()))

    def _loss_rounding(self, model: _Model) -> float:
        residuals = model.residuals if model.weights is None else model.weights * model.residuals
        eps = torch.finfo(self._start.dtype).eps
        return eps * model.equations.rounding(self._start.double(), model.right, residuals)


def _length(d: Tensor, scale: Tensor | None) -> float:
    """Return |D^(1/2) d|."""
    return float((d if scale is None else d * scale.sqrt()).norm())
