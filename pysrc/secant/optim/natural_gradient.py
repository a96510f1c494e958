"""Natural gradient descent, for residuals and for likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import EvaluatedPoint
from secant.curvature._curvature import CurvatureOperator
from secant.optim._damped_optimizer import LEAST, DampedOptimizer, Found
from secant.optim._flat_optimizer import RATE, Callback
from secant.optim._normal_equations import GRAM_SIDE, SOLVER, NormalEquations, Solution, conjugate_gradients, damped
from secant.optim._point_optimizer import COMMON, Advance
from secant.result import Status

#: Halvings of a step.
_HALVINGS = 10
#: Part of what the model promised that ends a search at once.
_PLENTY = 0.5


class _Squares(NamedTuple):
    """G = J^T J of residuals r, in double precision; gradient: J^T r."""

    point: EvaluatedPoint
    residuals: Tensor
    equations: NormalEquations
    gradient: Tensor
    grad_max: float

    def size(self) -> float:
        """Return how large G is."""
        return self.equations.size(self.gradient)

    def curvature(self, d: Tensor) -> float:
        """Return d.G d."""
        along = self.equations.push(d)
        return float(along.dot(along))

    def solve(self, lam: float, before: Tensor | None) -> Solution | None:
        """Return the least of |J d + r|^2 + lambda |d - before|^2; None where it cannot be had."""
        if not self.equations.damp(lam):
            return None
        right = self.residuals if before is None else self.residuals + self.equations.push(before)
        found, inner = self.equations.solve(right)
        return Solution(-found if before is None else before - found, inner)

    def decrease(self, new: EvaluatedPoint) -> float:
        """Return what the loss has lost, to the accuracy of the residuals."""
        after = new.residuals().double()
        return 0.5 * float((self.residuals - after).dot(self.residuals + after))

    def rounding(self, x: Tensor) -> float:
        """Estimate what rounding does to the loss."""
        return torch.finfo(x.dtype).eps * self.equations.rounding(x.double(), self.residuals, self.residuals)


class _Likelihood(NamedTuple):
    """G = J^T H J of outputs, or their Fisher information; dense where a matrix is given."""

    point: EvaluatedPoint
    operator: CurvatureOperator
    matrix: Tensor | None
    gradient: Tensor
    grad_max: float
    noise: float

    def _product(self, v: Tensor) -> Tensor:
        if self.matrix is not None:
            return self.matrix @ v
        return self.operator.matvec(v.to(self.operator.dtype)).double()

    def size(self) -> float:
        """Return how large G is: its largest diagonal, or the part along the gradient."""
        if self.matrix is not None:
            return float(self.matrix.diagonal().max())
        return self.curvature(self.gradient / torch.linalg.vector_norm(self.gradient))

    def curvature(self, d: Tensor) -> float:
        """Return d.G d."""
        return float(d.dot(self._product(d)))

    def solve(self, lam: float, before: Tensor | None) -> Solution | None:
        """Return the least of g.d + 1/2 d.G d + 1/2 lambda |d - before|^2; None where it cannot be had."""
        right = self.gradient if before is None else self.gradient + self._product(before)
        if self.matrix is not None:
            factor = damped(self.matrix, lam)
            if factor is None:
                return None
            found = Solution(torch.cholesky_solve(right.unsqueeze(1), factor)[:, 0])
        else:
            found = conjugate_gradients(lambda v: self._product(v).add_(v, alpha=lam), right)
        return Solution(-found.x if before is None else before - found.x, found.inner)

    def decrease(self, new: EvaluatedPoint) -> float:
        """Return what the loss has lost."""
        return float(self.point.value.double() - new.value.double())

    def rounding(self, x: Tensor) -> float:
        """Estimate what rounding does to the loss."""
        return self.noise


class _Step(NamedTuple):
    """t d. slope, curvature: g.d and d.G d. inner: products that it took."""

    d: Tensor
    slope: float
    curvature: float
    inner: int

    def at(self, t: float) -> Tensor:
        """Return t d."""
        return t * self.d

    def predicted(self, t: float) -> float:
        """Return the decrease that the model promises."""
        return -t * (self.slope + 0.5 * t * self.curvature)


class NaturalGradient(DampedOptimizer):
    r"""Natural gradient descent: the gradient in the metric that the outputs or residuals give the parameters.

        (G + lambda I) d = -g,        x <- x + t d

    | curvature | the closure returns, without calling backward | G |
    |---|---|---|
    | "residuals" | residuals r, a tensor of any shape or several | J^T J; the loss is 1/2 abs(r)^2 |
    | "ggn" | (outputs, loss) | J^T H J, H the Hessian of the loss by the outputs: the Fisher information of a softmax |
    | "fisher" | (outputs, loss) | J^T F J, with labels drawn anew from the model at each iteration |

    Of residuals of a differential equation this is energy natural gradient descent.

    * **t** is lr, or with a search the best of lr, lr / 2, lr / 4, ... down to the first that is worse than the one
      before it, or to one that brings half of what the model promises.
    * **lambda** is `damping`, or moves from there: by 0.1 where the t that is taken brings half of what the model
      promises, by 4 where it brings less than 1/4, or none brings anything. It is part of the state.
    * **Without both** a step is Newton's for the model, and its end is evaluated only where another iteration of the
      call begins. That is for points or batches drawn anew at every evaluation.
    * **Momentum** mu (SPRING) is for many more parameters than residuals: d is the least of
      abs(J d + r)^2 + lambda abs(d - mu d')^2, d' being the last one, so that what other batches have said of
      directions that this one does not see is kept. Steps then add up: lr is about 1 - mu. A d that does not descend is
      computed anew without.
    * **Rounding, NaN, exceptions, groups**: as `LevenbergMarquardt`. Groups may not differ.

    Args:
        params: parameters or groups; real, dense, distinct, float32 or float64, all of one dtype and device.
        lr: t that is tried first, >= 0; a number or a tensor of one element.
        max_iter: iterations per call of `step`, >= 1; 1 for mini-batches.
        curvature: see the table.
        damping: lambda, or the first one; > 0.
        adaptive: whether lambda moves.
        line_search_fn: "halving", or None.
        momentum: mu, in [0, 1).
        solver: "parameters" (Cholesky, P x P), "samples" (Cholesky, N x N; of residuals only), "cg" (conjugate
            gradients, to a residual of 1e-3), or "auto": the smaller of the first two up to 5,000, beyond "cg".
        likelihood: of "fisher", as `secant.curvature.Fisher` has it.
        maximize: maximize the loss instead; not of residuals.
        max_eval, tolerance_grad, tolerance_change, tolerance_grad_rel, tolerance_change_rel, on_error, callback: as of
            `LevenbergMarquardt`.

    Attributes:
        status: why the last call of `step` ended, a `secant.result.Status`; None before the first.

    Raises:
        TypeError, ValueError: an argument is invalid. At a step: the closure returns something else.

    References:
        Amari, Natural gradient works efficiently in learning, Neural Computation 10 (1998). Mueller and Zeinhofer,
        Achieving high accuracy with PINNs via energy natural gradient descent, ICML (2023), arXiv 2302.13163 (the
        search on a grid of 2^-k). Goldshlager, Abrahamsen, Lin, A Kaczmarz-inspired approach to accelerate the
        optimization of neural network wavefunctions, arXiv 2401.10190 (2024), Algorithm 1 (momentum). The factors of
        lambda are heuristics.

    Example:
        >>> x, y = torch.randn(100, 3), torch.randint(2, (100,))
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = secant.optim.NaturalGradient(model.parameters(), curvature="ggn", max_iter=20)
        >>> def closure():
        ...     outputs = model(x)
        ...     return outputs, torch.nn.functional.cross_entropy(outputs, y)
        >>> loss = optimizer.step(closure)
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        **COMMON,
        "lr": RATE,
        "curvature": _checks.one_of("residuals", "ggn", "fisher"),
        "damping": _checks.positive_number(),
        "adaptive": _checks.flag(),
        "line_search_fn": _checks.one_of(None, "halving"),
        "momentum": _checks.number_from(0.0, 1.0),
        "solver": SOLVER,
        "likelihood": _checks.one_of("categorical", "bernoulli", "gaussian"),
        "maximize": _checks.flag(),
    }
    KINDS = ("residuals", "outputs")
    PER_GROUP = ()
    VECTORS = ("velocity",)
    _good = _PLENTY

    _known_model: _Squares | _Likelihood | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        *,
        curvature: str = "residuals",
        damping: float = 1e-3,
        adaptive: bool = True,
        line_search_fn: str | None = "halving",
        momentum: float = 0.0,
        solver: str = "auto",
        likelihood: str = "categorical",
        maximize: bool = False,
        callback: Callback | None = None,
        **common: Any,
    ) -> None:
        options = {
            "lr": lr,
            "max_iter": max_iter,
            "curvature": curvature,
            "damping": damping,
            "adaptive": adaptive,
            "line_search_fn": line_search_fn,
            "momentum": momentum,
            "solver": solver,
            "likelihood": likelihood,
            "maximize": maximize,
        }
        super().__init__(params, options | common, callback)
        self._check_maximize(self._name)

    def _check_maximize(self, op: str) -> None:
        options = self.param_groups[0]
        if options["curvature"] == "residuals" and options["maximize"]:
            raise _checks.fail(op, "maximize", "False with residuals, whose squares are minimized", "True")

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        super()._check_options(op, options)
        if options["curvature"] != "residuals" and options["solver"] == "samples":
            raise _checks.fail(
                op, "solver", "'auto', 'parameters' or 'cg' where curvature is no 'residuals'", "'samples'"
            )

    def _kind(self) -> str:
        return "residuals" if self.param_groups[0]["curvature"] == "residuals" else "outputs"

    def _begin(self, closure: Callable[[], Any]) -> None:
        self._check_maximize(f"{self._name}.step")
        super()._begin(closure)
        self._known_model = None

    @property
    def _is_adaptive(self) -> bool:
        return bool(self.param_groups[0]["adaptive"])

    def _modelled(self, point: EvaluatedPoint) -> _Squares | _Likelihood:
        """Return the model at a point, made once."""
        model = self._known_model
        if model is None or model.point is not point:
            options = self.param_groups[0]
            model = self._known_model = (
                self._of_residuals(point, options["solver"])
                if options["curvature"] == "residuals"
                else self._of_outputs(point, options)
            )
        return model

    def _of_residuals(self, point: EvaluatedPoint, solver: str) -> _Squares:
        residuals = point.residuals().double()
        equations = NormalEquations(point.jacobian(), (len(residuals), point.params.n), None, solver)
        gradient = equations.pull(residuals)
        return _Squares(point, residuals, equations, gradient, float(gradient.abs().max()))

    def _of_outputs(self, point: EvaluatedPoint, options: Mapping[str, Any]) -> _Likelihood:
        gradient = point.gradient().double()
        if options["curvature"] == "ggn":
            operator: CurvatureOperator = point.ggn()
        else:
            operator = point.fisher(likelihood=options["likelihood"], seed=self._own["n_iter"])
        dense = options["solver"] == "parameters" or (options["solver"] == "auto" and point.params.n <= GRAM_SIDE)
        grad_max = float(gradient.abs().max())
        matrix = operator.to_dense().double() if dense and math.isfinite(grad_max) else None
        return _Likelihood(point, operator, matrix, gradient, grad_max, self._noise(self._value(point)))

    # An iteration -----------------------------------------------------------------------------------------------------

    def _size(self, model: _Squares | _Likelihood) -> float:
        return 1.0

    def _propose(self, model: _Squares | _Likelihood) -> _Step | None:
        momentum, before = self.param_groups[0]["momentum"], None
        if momentum > 0.0:
            before = momentum * self._part(self._own["velocity"]).double()
        step = self._step_from(model, before)
        if step is not None and before is not None and not step.slope < 0.0:
            step = self._step_from(model, None)
        return step

    def _step_from(self, model: _Squares | _Likelihood, before: Tensor | None) -> _Step | None:
        found = model.solve(self._own["lambda"], before)
        if found is None:
            return None
        return _Step(found.x, float(model.gradient.dot(found.x)), model.curvature(found.x), found.inner)

    def _advance(self, point: EvaluatedPoint) -> Advance:
        options = self.param_groups[0]
        if self._lr == 0.0:
            return self._stay(Status.SMALL_CHANGE)
        if self._more or self.callback or options["adaptive"] or options["line_search_fn"]:
            return super()._advance(point)
        # Nobody asks where the step leads.
        self._own["lambda"] = options["damping"]
        step = self._propose(self._modelled(point))
        if step is not None:
            torch.add(self._start, step.at(self._lr).to(self._start), out=self._here)
        if step is None or not bool(self._here.isfinite().all()):
            return self._stay(Status.NOT_FINITE)
        self._remember(step)
        self._free_parameters.set_(self._here_views)
        return Advance(None, Status.MAX_ITER, self._lr, step.inner)

    def _remember(self, step: _Step) -> None:
        if self.param_groups[0]["momentum"] > 0.0:
            velocity = self._own["velocity"]
            self._undo.keep("velocity", [velocity])
            self._put(velocity, step.d.to(velocity))

    def _search(self, model: _Squares | _Likelihood, proposal: _Step) -> Found:
        """Try lr, lr / 2, ...; lambda follows the gain ratio of the t that is taken."""
        options = self.param_groups[0]
        searching = options["line_search_fn"] is not None
        judging = searching or options["adaptive"]
        best: tuple[float, float, float] | None = None  # the largest decrease, its t, its gain ratio
        new: EvaluatedPoint | None = None
        for k in range(_HALVINGS + 1 if searching else 1):
            t = self._lr * 0.5**k
            predicted = proposal.predicted(t)
            new = self._try(proposal.at(t).to(self._start))
            decrease = math.nan if new is None else model.decrease(new)
            gain = decrease / predicted if predicted > 0.0 and math.isfinite(decrease) else -math.inf
            if best is not None and not decrease > best[0]:  # back to the best, for which an evaluation was left
                new = None if self._is_spent() else self._try(proposal.at(best[1]).to(self._start))
                break
            if gain >= LEAST or not judging:
                best = decrease, t, gain
            spare = self._limit - self._own["func_evals"]
            if (
                gain >= _PLENTY
                or spare < (1 if best is None else 2)
                or (best is None and self._is_unclear(model, proposal))
            ):
                break
        if new is None or best is None or not self._is_usable(new):
            return Found(None, 0.0, -math.inf)
        self._remember(proposal)
        return Found(new, best[1], best[2])

    def _loss_rounding(self, model: _Squares | _Likelihood) -> float:
        return model.rounding(self._start)
