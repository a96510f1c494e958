"""Limited-memory BFGS, a drop-in for `torch.optim.LBFGS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant.ops import LBFGSHistory
from secant.ops.lbfgs import MAX_HISTORY, STORAGE
from secant.optim._flat_optimizer import Callback, fill
from secant.optim._pairs import Pairs, ScaledHistory
from secant.optim._quasi_newton import QuasiNewton
from secant.optim._torch_state import from_torch, is_of_torch


class LBFGS(QuasiNewton):
    r"""Limited-memory BFGS with the arguments, the closure and the iterates of `torch.optim.LBFGS`.

    Each iteration moves along d = -H g, where H approximates the inverse Hessian from the last `history_size` pairs
    s = x_{k+1} - x_k, y = g_{k+1} - g_k:

        x_{k+1} = x_k + t d,    t = lr, or a step found by a strong Wolfe search that tries lr first;

    the very first step is scaled by min(1, 1 / |g|_1). In float64 the iterates are those of `torch.optim.LBFGS` up to
    rounding. What differs:

    * **The curvature gate** is relative, s.y > curvature_tol |s| |y|, where torch asks for s.y > 1e-10. So a small
      loss or a run near its end keeps learning curvature.
    * **NaN and Inf.** A trial with a non-finite loss or gradient is never accepted: the search shortens the step, and
      if nothing finite is found the parameters return to where the iteration began. Without a line search the step is
      halved, after eight times shortened by more, until it is at most tolerance_change or below rounding. The last step
      of a call without line search is not evaluated, as in torch; if the next call finds it non-finite, it halves it
      then. No step turns a finite parameter into a non-finite one.
    * **Rounding.** A search takes values that are equal to the rounding of the loss's dtype for equal, and goes by the
      slope; it ends when the parameters no longer move. So in float32, in narrow valleys and near the end of a run, it
      takes steps where torch's fails, and where there is none it ends after a few evaluations.
    * **A closure that raises** leaves parameters, gradients and state as they were before the call; then the exception
      passes. See on_error.
    * **Batches.** With a line search the last pair of a call is formed before the call ends, from gradients of this
      call alone, so that each call may be about another batch. Without one the last step of a call has no gradient at
      its end, and is made a pair by the next call, as in torch; so it is when the closure leaves the gradients as they
      are, because backward is called outside.
    * **Frozen parameters.** A parameter whose gradient is None, or that stopped requiring a gradient in mid-run, does
      not move; the others move along their part of d. The pairs stay, with the one under way left out. torch moves it.
    * **Options** may be changed in `param_groups` in mid-run, those of the first group for all; they are checked at the
      next step. With another history_size, history_dtype or curvature_tol the newest pairs that fit and pass are kept;
      changing maximize forgets them.
    * **max_eval** given as a number is never exceeded. The default None means max_iter * 5 // 4, counted as torch does,
      which lets the last line search of a call go one evaluation over, and ten more if its first trial is not finite.
    * **Parameter groups.** lr may differ between groups, everything else is shared. With R = diag(lr_k / max lr) the
      run is one in R^(-1/2) x, tried at t = max lr: its H_0 is gamma R in place of gamma I. It always descends, the
      first step is lr_k times the gradient, lr = 0 freezes a group as if it were not there, and what the pairs have
      learned does not depend on R. With unequal lr, `tolerance_grad` looks at R^(1/2) g. When the ratios change, the
      pairs are rescaled.
    * **Gradients** live in one vector of which every `p.grad` is a view from the first evaluation on. `zero_grad`
      zeroes that vector in one call and keeps the views, also for set_to_none=True. A gradient replaced by someone
      else (such as `model.zero_grad()`) is copied into it; None counts as zero.
    * **The state** has a fixed shape from the first step: `history_size` pairs, two Gram matrices, three vectors and a
      few numbers, about 2 history_size + 4 times the parameters. A run continues from it bit for bit. What a closure
      that raises may have to undo takes 5 vectors more, and, during a call, 2 for each pair that a full ring gives up
      (on a CPU that memory stays for the next call).
    * **Vectors.** Of n elements an iteration reads and writes, besides the closure: (4 history_size + 10) n in
      `LBFGSHistory.step`, 3 n to move, 2 n to keep where it began, 3 n for g.d and |d|_inf, and 4 n for a pair that a
      full ring gives up; a search 2 n for g.d at a trial, and 5 n or 7 n for each after the first. A call copies 5
      vectors once.
    * **Transfers.** On a GPU there is one transfer to the host per closure evaluation. For this a line search reads g.d
      and |g|_inf together with the loss of its first trial; so a call that stops because of them has, unlike on a CPU,
      evaluated the closure once more before it puts the parameters back.
    * **status** says why the last call of `step` ended: CONVERGED for tolerance_grad, SMALL_CHANGE for
      tolerance_change, MAX_ITER or MAX_EVAL, STALLED for a search that found no better point, NO_DESCENT for a
      direction that does not descend, NOT_FINITE where nothing finite was found, STOPPED by the callback. The
      iterations of a call can be used up in the one that meets tolerance_grad; the next call says so.
    * **A callback** is told each iterate once, when its loss is known, with no evaluation and no transfer more: the
      start of a run as number 0, and the end of every iteration that moved. Without a line search the last step of a
      call is not evaluated, and is told by the next call. An exception in it is one in the closure.

    Args:
        params: parameters or groups; real, dense, distinct, float32 or float64, all of one dtype and device.
        lr: step length that is tried first, >= 0; a number or a tensor of one element. May be set per group.
        max_iter: iterations per call of `step`, >= 1 (torch takes 0, too, and then only evaluates).
        max_eval: closure evaluations per call of `step`, >= 1, and >= 2 with a line search; None: see above.
        tolerance_grad: stop when |g|_inf is at most this.
        tolerance_change: stop when the loss changes by less than this, no parameter moves by more than this, or
            g.d > -tolerance_change.
        history_size: pairs kept, 1 to 256.
        line_search_fn: None or "strong_wolfe".
        maximize: maximize the loss instead.
        tolerance_grad_rel: stop also when |g|_inf is at most this times its value at the first evaluation of the run.
        tolerance_change_rel: stop also when the loss changes by less than this times its magnitude.
        history_dtype: of the stored pairs: float32, float64 or bfloat16; None: that of the parameters.
        curvature_tol: of the gate, in [0, 1); None: the machine epsilon of the parameters' dtype.
        on_error: "raise", or "backtrack": a RuntimeError (such as `torch.linalg.LinAlgError`), ValueError or
            ArithmeticError that the closure raises at a trial counts as an infinite loss, and the step is shortened.
            OutOfMemoryError, NotImplementedError and RecursionError pass, and everything does at the first evaluation
            of a call, unless that is the end of a step that the last call has not evaluated. `step` then returns the
            first loss that was computed, NaN if there is none.
        callback: called with a `secant.result.Iteration` (n: iterations of the run; value: what the closure returned;
            grad_norm: |g|_inf, as tolerance_grad looks at it; step: t; evaluations: of the run); a true value ends the
            call. It is not part of state_dict, and a copy of the optimizer has none.

    Attributes:
        status: a `secant.result.Status`, why the last call of `step` ended; None before the first.
        callback: as given; may be replaced.

    Raises:
        TypeError, ValueError: an argument is invalid, a group is empty, or the parameters differ in dtype or device;
            the message names it and says what was expected.

    References:
        Liu and Nocedal, On the limited memory BFGS method for large scale optimization, Math. Program. 45 (1989).
        Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 7.5, p. 179; Algorithms 3.5 and 3.6, pp. 60-61.

    Example:
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = secant.optim.LBFGS([x], max_iter=100, line_search_fn="strong_wolfe")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)      # at the start, 24.2; x is now (1, 1) to 1e-4
        >>> str(optimizer.status)
        'small_change'
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        **QuasiNewton.STEPS,
        "history_size": _checks.integer_from(1, MAX_HISTORY),
        "history_dtype": _checks.one_of(None, *STORAGE),
    }
    LAYOUT = ("history_size", "history_dtype", "curvature_tol", "line_search_fn", "maximize")
    LATER: ClassVar[Mapping[str, Any]] = {"on_error": "raise"}

    _pairs: ScaledHistory
    _vectors: list[Tensor]  # what a step writes, but for pairs and gradients: of one dtype, and the rest
    _small: list[Tensor]
    _adopted: bool = False  # whether the last step was made by torch
    _slot: int  # where the next pair goes
    _full: bool  # whether another pair is there

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        maximize: bool = False,
        tolerance_grad_rel: float = 0.0,
        tolerance_change_rel: float = 0.0,
        history_dtype: torch.dtype | None = None,
        curvature_tol: float | None = None,
        on_error: str = "raise",
        callback: Callback | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.OPTIONS}, callback)

    def _learn(self, t: float) -> None:
        self._pairs.step(self._grad, self._prev_grad, self._direction, t)

    def _begin(self) -> None:
        if self._adopted:  # where that step began, torch does not say: if its end is not finite, it stays
            self._flat.save(self._start)
            self._adopted = False

    def _note(self, values: list[float]) -> list[float]:
        head, count, *rest = values
        self._slot, self._full = int(head), count == self._pairs.history.history_size
        return rest

    def _keep(self) -> None:
        """Keep what the next direction overwrites, and with it the parameters: a pair when a full ring gives it up."""
        undo, slot = self._undo, self._slot
        undo.keep("vectors", self._vectors)
        undo.keep("counters", self._small)
        if self._own["t"] != 0.0 and undo.lacks("pair", slot):
            undo.keep("pair", self._rows[slot], slot, zero=not self._full)

    # State ------------------------------------------------------------------------------------------------------------

    def _build(self, state: Mapping[str, Any] | None, *, mine: bool) -> dict[str, Any]:
        """Make the buffers; pairs of another length, dtype or loaded from torch are offered to the new history."""
        options, flat = self.param_groups[0], self._flat
        history = LBFGSHistory(
            flat.n,
            options["history_size"],
            dtype=flat.dtype,
            device=flat.device,
            storage_dtype=options["history_dtype"],
            curvature_tol=options["curvature_tol"],
        )
        new = ScaledHistory(history, self._root_of_shares())
        own = self._new_state()
        vectors = [own[name] for name in self.VECTORS]
        pairs: Pairs = []
        adopted = False
        if state and mine:
            adopted = self._adopted
            state = {name: x for name, x in state.items() if name in own}
            if options["maximize"] == self._maximize:
                pairs = self._pairs.pairs_at(new.scale)
            else:  # the curvature of the function that is minimized now is the opposite
                state["t"] = 0.0
        elif state and is_of_torch(state):
            found, pairs = from_torch(state, flat.grad)
            state, adopted = {**own, **found}, True
            self._check_numbers(state)
        own |= history.state_dict()
        if state and not mine and not adopted:
            self._check_state(state, own)
            history.check_state({name: state[name] for name in history.state_dict()})
        fill(own, state or {})
        new.offer(pairs)

        self._pairs, self._learner, self._scale, self._adopted = new, history, new.scale, adopted
        self._set_up(own, mine=mine)
        self._rows = [[s, y] for s, y in zip(history.s, history.y, strict=True)]
        self._counters = (history.head, history.count)
        self._vectors, self._small = [*vectors, *flat.tensors], [history.sy, history.yy, *self._counters]
        return own

    def _synchronize(self) -> None:
        super()._synchronize()
        head, count = map(int, self._counters)
        self._slot, self._full = head, count == self._pairs.history.history_size

    def _migrate(self, group: dict[str, Any], loaded: Mapping[str, Any]) -> None:
        if "curvature_tol" not in loaded:  # a group of torch.optim.LBFGS
            group["maximize"] = False
            if self.OPTIONS["max_iter"].accept(group["max_iter"]) and group["max_eval"] == group["max_iter"] * 5 // 4:
                group["max_eval"] = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the run continues from it bit for bit.

        The state of a `torch.optim.LBFGS` is taken, too: the run continues as torch would have, with the options that
        torch does not have at their defaults. A max_eval that is what torch makes of None becomes None.

        Args:
            state_dict: of an `LBFGS` with the same parameters. It is copied, not referenced.

        Raises:
            TypeError, ValueError: the state is of something else, its tensors have other shapes or dtypes, or an option
                or a number in it is invalid. Then nothing has changed.
        """
        super().load_state_dict(state_dict)
