"""Dense quasi-Newton: the self-scaled Broyden class, with BFGS in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from secant import _checks
from secant.ops import InverseHessian
from secant.optim._flat_optimizer import Callback, fill
from secant.optim._quasi_newton import QuasiNewton


class BFGS(QuasiNewton):
    r"""Quasi-Newton with a dense inverse Hessian H, for up to some thousands of parameters.

    Each iteration moves along d = -H g and learns from s = x_{k+1} - x_k and y = g_{k+1} - g_k:

        x_{k+1} = x_k + t d,
        H_{k+1} = (1 / tau) [H - H y y^T H / (y.Hy) + phi v v^T] + s s^T / (s.y),
        v       = (y.Hy)^(1/2) (s / (s.y) - H y / (y.Hy)),

    H_0 = I, scaled by s.y / (y.Hy) of the first pair. BFGS is phi = tau = 1. Self-scaling shrinks H where it
    overestimates (tau), and goes from BFGS towards DFP or away from it (phi), as two numbers say that cost nothing,
    b = s.Bs / s.y = -t g.s / s.y and h = y.Hy / s.y. On physics-informed networks it needs several times fewer
    iterations than BFGS, which needs fewer than limited memory.

    * **Time and memory.** One triangle of H is stored, n (n + 1) / 2 numbers, read once and written once an iteration:
      the update and the product with the new gradient are one pass (`secant.InverseHessian`). A call of `step` copies
      the triangle once, for the case that the closure raises, into memory that stays; so calls should have several
      iterations where n is large.
    * **The curvature gate**, NaN and Inf, rounding, a closure that raises, batches, frozen parameters, options in
      mid-run, max_eval, gradients, statuses and the callback are as in `secant.optim.LBFGS`. What differs: when other
      parameters are frozen than before, and when maximize changes, H starts anew. A H that does not descend any more,
      by rounding, does so, too. lr is the same in all groups.
    * **Transfers.** As `LBFGS`: on a GPU one transfer to the host per closure evaluation.

    Args:
        params: parameters or groups; real, dense, distinct, float32 or float64, all of one dtype and device.
        lr: step length that is tried first, >= 0; a number or a tensor of one element. The very first step is lr times
            min(1, 1 / |g|_1).
        max_iter: iterations per call of `step`, >= 1.
        max_eval: closure evaluations per call of `step`, >= 1, and >= 2 with a line search; None: max_iter * 5 // 4, as
            `LBFGS` counts them.
        tolerance_grad: stop when |g|_inf is at most this.
        tolerance_change: stop when the loss changes by less than this, no parameter moves by more than this, or
            g.d > -tolerance_change.
        line_search_fn: "strong_wolfe", or None: every step has length lr.
        update: "ssbroyden": tau and phi of Al-Baali; "ssbfgs": phi = 1, tau = min(1, 1 / b); "bfgs": neither.
        maximize: maximize the loss instead.
        tolerance_grad_rel: stop also when |g|_inf is at most this times its value at the first evaluation of the run.
        tolerance_change_rel: stop also when the loss changes by less than this times its magnitude.
        curvature_tol: H learns from a pair when s.y > curvature_tol |s| |y|, in [0, 1); None: the machine epsilon of
            the parameters' dtype.
        on_error: "raise" or "backtrack", as in `LBFGS`.
        callback: called with a `secant.result.Iteration` after each one, as in `LBFGS`; a true value ends the call.

    Attributes:
        status: a `secant.result.Status`, why the last call of `step` ended; None before the first.
        callback: as given; may be replaced.

    Raises:
        TypeError, ValueError: an argument is invalid, a group is empty, lr differs between groups, or the parameters
            differ in dtype or device; the message names it and says what was expected.

    References:
        Al-Baali, Spedicato, Maggioni, Broyden's quasi-Newton methods for a nonlinear system of equations and
        unconstrained optimization: a review and open problems, Optim. Methods Softw. 29 (2014), sections 4 and 5.
        Urban, Stefanou, Pons, Unveiling the optimization process of physics informed neural networks, J. Comput. Phys.
        523 (2025), arXiv 2405.04230, section 3.
        Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 6.1, p. 140; eq. 6.20, p. 143.

    Example:
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = secant.optim.BFGS([x], max_iter=100)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)      # at the start, 24.2; x is now (1, 1)
        >>> bool((x - 1).abs().max() < 1e-4)
        True
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        **QuasiNewton.STEPS,
        "update": _checks.one_of(*reversed(InverseHessian.RULES)),
    }
    PER_GROUP = ()
    LAYOUT = ("update", "curvature_tol", "line_search_fn", "maximize")

    _learner: InverseHessian
    _triangle: list[Tensor]
    _vectors: list[Tensor]  # what a step writes beside the triangle: of one dtype, and the rest
    _small: list[Tensor]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        line_search_fn: str | None = "strong_wolfe",
        *,
        update: str = "ssbroyden",
        maximize: bool = False,
        tolerance_grad_rel: float = 0.0,
        tolerance_change_rel: float = 0.0,
        curvature_tol: float | None = None,
        on_error: str = "raise",
        callback: Callback | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.OPTIONS}, callback)

    def _build(self, state: Mapping[str, Any] | None, *, mine: bool) -> dict[str, Any]:
        """Make the buffers; what H has learned of the function that is minimized stays."""
        options, flat = self.param_groups[0], self._flat
        h = InverseHessian(
            flat.n,
            rule=options["update"],
            dtype=flat.dtype,
            device=flat.device,
            curvature_tol=options["curvature_tol"],
        )
        own = self._new_state() | h.state_dict()
        if state and not mine:
            self._check_state(state, own)
            h.check_state({name: state[name] for name in h.state_dict()})
        fill(own, state or {})
        if state and mine and options["maximize"] != self._maximize:
            own["t"] = 0.0
            h.reset()
        self._learner = h
        self._set_up(own, mine=mine)
        self._triangle = [own["h"]]
        self._vectors = [*(own[name] for name in self.VECTORS), *flat.tensors]
        self._small = [own["pair"], own["coefs"], own["count"]]
        return own

    def _keep(self) -> None:
        self._undo.keep("vectors", self._vectors)
        self._undo.keep("pair", self._small)
        self._undo.keep("triangle", self._triangle)

    def _meet_other_parameters(self) -> None:
        # B s = -t g is not so for a step from which a part was taken.
        self._learner.reset()
        self._stale = True
