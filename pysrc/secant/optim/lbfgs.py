"""Limited-memory BFGS, a drop-in for `torch.optim.LBFGS`."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant._parameters import FlatParameters
from secant.ops.lbfgs import LBFGSHistory, Stats
from secant.optim._gradients import FlatGradients
from secant.optim._options import LAYOUT, RATE, SHARED, check_groups, check_options, is_integer, rate
from secant.optim._state import NUMBERS, OP, Pairs, check_state, from_torch, is_of_torch, offer, pairs_of
from secant.optim._undo import Undo
from secant.solvers.line_search import Trial, strong_wolfe

_G_MAX, _Y_NORM = Stats._fields.index("g_max"), Stats._fields.index("y_norm")
#: What the statistics say of the pair that was offered.
_OF_PAIR = slice(Stats._fields.index("sy"), Stats._fields.index("accepted") + 1)
#: Trials beyond the default max_eval for a search whose first trial is not finite; eight undo a step 1e9 too long.
_SPARE_TRIALS = 10
#: Rounding of a loss relative to it, in units of its dtype.
_NOISE = 1.0
#: Halvings of a step, without a search, before it is shortened by more each time, as a search does.
_HALVINGS = 8
#: Options that states of earlier versions lack.
_LATER = {"on_error": "raise"}
_VECTORS = ("prev_grad", "direction", "start")
#: What on_error="backtrack" takes for an infinite loss, and what of it is no matter of numbers after all.
_NUMERICAL = (RuntimeError, ValueError, ArithmeticError)
_OTHER = (torch.OutOfMemoryError, NotImplementedError, RecursionError)


class _Direction(NamedTuple):
    """What the host knows of the direction d at the current point, with gradient g.

    slope: g.d. grad_max: |g|_inf. learned: whether the gradient has changed since the last point. size: |d|_inf.
    total: |d|_1, computed for the first iteration of a run only.
    """

    slope: float
    grad_max: float
    learned: bool
    size: float
    total: float


class _Moved(NamedTuple):
    """A step that was taken: the loss where it led, the largest change of a parameter, and whether y.d is not 0."""

    value: float
    change: float
    learned: bool = True


class LBFGS(torch.optim.Optimizer):
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
      that raises may have to undo takes 5 vectors more, and, during a call, 2 for each pair that a full ring gives up.
    * **Transfers.** On a GPU there is one transfer to the host per closure evaluation. For this a line search reads g.d
      and |g|_inf together with the loss of its first trial; so a call that stops because of them has, unlike on a CPU,
      evaluated the closure once more before it puts the parameters back.

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
            of a call, unless that is the end of a step that the last call has not evaluated.

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
        >>> optimizer.step(closure)     # the loss at the start, 24.2; x is now (1, 1) to 1e-4
    """

    _own: dict[str, Any]  # the state, filed in self.state under the first parameter
    _layout: tuple[Any, ...] | None = None
    _seen: list[Any]  # options as they were checked
    _flat: FlatGradients
    _adopted: bool = False  # whether the last step was made by torch
    _history: LBFGSHistory
    _stats: Tensor
    _counters: tuple[Tensor, Tensor]
    _grad: Tensor  # of the function that is minimized, at the current point
    _prev_grad: Tensor
    _best_grad: Tensor
    _direction: Tensor
    _direction_views: list[Tensor]
    _start: list[Tensor]
    _scale: Tensor | None
    _unread: tuple[Tensor, ...]  # what describes the direction, while it is only on the device
    _about: _Direction
    _undo: Undo
    _absent: tuple[int, ...] | None  # parameters that do not move; None: not known yet
    _lr: float  # the largest
    _stale: bool  # whether d is not what the pairs and lr make of the last gradient
    _slot: int  # where the next pair goes
    _full: bool  # whether another pair is there
    _maximize: bool
    _searching: bool
    _forgiving: bool
    _unit: float  # of rounding: of the loss, and of the parameters
    _rounding: float
    _packed: bool
    _away: bool
    _longest: float
    _limit: int

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
    ) -> None:
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
            "maximize": maximize,
            "tolerance_grad_rel": tolerance_grad_rel,
            "tolerance_change_rel": tolerance_change_rel,
            "history_dtype": history_dtype,
            "curvature_tol": curvature_tol,
            "on_error": on_error,
        }
        check_options("LBFGS", defaults)
        self._forget()
        super().__init__(params, defaults)

    # The algorithm ----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Run up to `max_iter` iterations.

        Under `torch.compile` this is run as it is; a closure that is itself compiled stays so.

        Args:
            closure: computes the loss, calls backward on it and returns it: a real number or a tensor of one element.
                It is called several times, with gradients enabled. It need not call backward, if the gradients are
                already there; then the step is not a pair until the next call has brought the gradient at its end.

        Returns:
            What the closure returned at its first evaluation: the loss at the start. With on_error="backtrack", the
            first that it returned, and NaN if there is none.

        Raises:
            TypeError: `closure` is not callable, or returns None or something that is no real number.
            ValueError: a gradient is sparse, or an option was changed to something invalid.
            Whatever the closure raises, see on_error. After any of these the parameters, their gradients and the state
                are what they were before the call.
        """
        if not callable(closure):
            raise TypeError(f"LBFGS.step: closure: expected a function that returns the loss, got {closure!r}")
        first = not self.state.get(self._params[0])
        self._bind()
        self._undo.begin()
        try:
            return self._iterate(closure)
        except BaseException:
            if self._undo.restore():
                self._synchronize()
                if first:
                    self.state.pop(self._params[0])
                    self._forget()
            raise
        finally:
            self._undo.end()

    def _iterate(self, closure: Callable[[], Any]) -> Any:
        state, options = self._own, self.param_groups[0]
        searching, max_iter = options["line_search_fn"] is not None, options["max_iter"]
        lr = self._lr
        self._limit = state["func_evals"] + _evaluations(options)
        if self._adopted:  # where that step began, torch does not say: if its end is not finite, it stays
            self._flat.save(self._start)
            self._adopted = False

        # A step that ended the last call without a gradient at its end.
        pending = state["t"]
        self._forgiving = pending != 0.0 and options["on_error"] == "backtrack"
        original, value, _ = self._observe(closure)
        self._forgiving = options["on_error"] == "backtrack"
        if not math.isfinite(value):
            other, value = self._step_back(closure, pending) if pending else (None, value)
            original = other if original is None else original
            if not math.isfinite(value):
                return self._direction.new_tensor(math.nan) if original is None else original

        new = None
        for iteration in range(1, max_iter + 1):
            if self._is_optimal():
                break
            state["n_iter"] += 1
            t = lr * min(1.0, 1.0 / self._about.total) if state["n_iter"] == 1 else lr
            if t == 0.0 or not self._descends():
                break
            self._flat.save(self._start)
            if searching:
                new = self._search(closure, value, t)
            else:
                new = self._move(closure, t, last=iteration == max_iter)
            if new is None or iteration == max_iter or self._is_spent() or self._is_small(value, new):
                break
            value = new.value
            if searching:
                self._update_direction()
                if not self._packed:
                    self._read()
        if searching and new is not None and new.learned:
            # The gradient at the end is of this call's batch; the next call may bring another.
            self._undo.end()
            self._update_direction()
        return original

    def _observe(self, closure: Callable[[], Any], *scalars: Tensor) -> tuple[Any, float, list[float]]:
        """Evaluate at the parameters and go on to the next direction: what the closure returned, f, and other scalars.

        Everything is read back in one transfer. f is NaN when the gradient is not finite; then the pair was rejected,
        and the direction means nothing. A closure that failed and may returned None: f is NaN, nothing else changed.
        """
        loss = self._evaluate(closure)
        if loss is None:
            return None, math.nan, [x.item() for x in scalars]
        if self._may_evaluate():
            self._undo.keep_vectors()
        else:
            self._undo.end()
        offered = self._update_direction()
        value, *others = self._read(loss, *scalars)
        if not self._about.learned:  # the gradient was left as it was, and so is d: the next one makes the pair
            self._own["t"] = offered
        return loss, value if math.isfinite(self._about.grad_max) else math.nan, others

    def _update_direction(self) -> float:
        """Offer the pair of the last step, s = t d, y = g - g_prev, to the history; then d = -H g and g_prev = g.

        Nothing is read back. With unequal lr, all this is done for R^(-1/2) x.
        Parameters without a gradient do not move, and a step that ended with others of them than it began with is no
        pair: what y is there, nobody knows. Returns the t of the pair that was offered.
        """
        state, g, d, history = self._own, self._grad, self._direction, self._history
        if self._absent != self._flat.absent:
            if self._absent is not None:
                state["t"] = 0.0
            self._absent = self._flat.absent
        t = state["t"]
        if t != 0.0 and self._may_evaluate():
            self._undo.keep_pair(self._slot, full=self._full)
        stale, self._stale = self._stale, False
        if t == 0.0 and not stale and self._is_current():
            self._stats[_G_MAX], self._stats[_Y_NORM] = g.abs().max(), 0.0
        elif self._scale is None:
            before = (d.clone(), (g == self._prev_grad).all()) if t == 0.0 and not stale and self._packed else None
            history.step(g, self._prev_grad, d, t)
            if before is not None:
                torch.where(before[1], before[0], d, out=d)
        else:
            history.append(*self._pair(self._scale))
            offer = self._stats.clone()
            self._prev_grad.copy_(g)
            history.direction(torch.mul(g, self._scale, out=d), out=d)
            d.mul_(self._scale)
            self._stats[_OF_PAIR] = offer[_OF_PAIR]
        for i in self._absent:
            self._direction_views[i].zero_()
        state["t"] = 0.0
        self._unread = (self._stats, *self._counters, self._slope(g), *torch.aminmax(d))
        if state["n_iter"] == 0:
            self._unread += (d.abs().sum(dtype=torch.float64),)
        return t

    def _is_current(self) -> bool:
        """Whether d is -H g already, since this is the point where the last call ended.

        Computed once more, without the pair that was new then, d would differ by rounding from what a call that had
        gone on would use. Where numbers travel together, the device decides.
        """
        return not self._packed and self._scale is None and torch.equal(self._grad, self._prev_grad)

    def _pair(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The last step and the change of the gradient on the way, in R^(-1/2) x."""
        s, y = self._direction * self._own["t"], self._grad - self._prev_grad
        return torch.where(scale != 0, s / scale, 0.0), y.mul_(scale)

    def _move(self, closure: Callable[[], Any], t: float, *, last: bool) -> _Moved | None:
        """Move by t d, and evaluate there unless this is the last step of the call.

        While the loss or the gradient is not finite the move is shortened; when the evaluations run out before it is,
        or the move is at most tolerance_change or below rounding, the parameters return to the start. None: nothing
        more is known than that this call ends here.
        """
        state, change = self._own, t * self._about.size
        if not change < self._longest:
            self._drop_pairs()
            return None
        self._flat.add_(self._direction_views, t)
        state["t"] = t
        if last or self._is_spent():
            return None
        _, value, _ = self._observe(closure)
        for share in _shares():
            if math.isfinite(value):
                break
            change *= share
            apart = change > self.param_groups[0]["tolerance_change"] and not self._is_spent()
            if apart:
                _, value, apart = self._shorten(closure, share)
            if not apart:
                self._flat.set_(self._start)
                state["t"] = 0.0
                return None
        return _Moved(value, change)

    def _step_back(self, closure: Callable[[], Any], unseen: float) -> tuple[Any, float]:
        """Shorten the unevaluated step that ended the last call, until the loss is finite.

        With evaluations spent (max_iter = 1 allows for one), one more halving is left for the next call to look at.
        Returns what the closure returned first, and the loss or NaN.
        """
        state, original = self._own, None
        for share in _shares():
            if self._is_spent():
                break
            loss, value, apart = self._shorten(closure, share)
            original = loss if original is None else original
            if math.isfinite(value):
                return original, value
            if not apart:
                self._flat.set_(self._start)
                state["t"] = 0.0
                return original, math.nan
        self._flat.toward_(self._start, 0.5)
        if state["t"] == 0.0:  # evaluated in vain: there is still a step to shorten, but no pair
            self._direction.zero_()
            state["t"] = 2.0 * unseen
        state["t"] *= 0.5
        return original, math.nan

    def _shorten(self, closure: Callable[[], Any], share: float) -> tuple[Any, float, bool]:
        """Leave of the last step only a share, and evaluate there.

        Returns what the closure returned, the loss or NaN, and whether a step is left. Where numbers travel together
        this is known after an evaluation at the start.
        """
        self._flat.toward_(self._start, 1.0 - share)
        self._own["t"] *= share
        apart = self._flat.differs(self._start)
        if not self._packed and not apart:
            return None, math.nan, False
        loss, value, (left,) = self._observe(closure, apart)
        return loss, value, bool(left)

    def _search(self, closure: Callable[[], Any], value: float, t: float) -> _Moved | None:
        """Strong Wolfe search along d from the parameters; they, and `_grad`, end at the step it chose.

        None: only the first trial told (see `_packed`) that the run was at its end; the parameters are back.
        """
        options = self.param_groups[0]
        trials = self._limit - self._own["func_evals"] + (options["max_eval"] is None)
        self._away = False
        here = self._try(closure, t)
        if options["max_eval"] is None and not (math.isfinite(here.value) and math.isfinite(here.slope)):
            trials += _SPARE_TRIALS
        if self._is_optimal() or not self._descends():  # known before the search unless numbers travel together
            self._return_to(0.0)
            return None
        search = strong_wolfe(
            Trial(0.0, value, self._about.slope),
            here,
            size=self._about.size,
            tolerance=options["tolerance_change"],
            max_evaluations=trials,
            noise=_NOISE * self._unit * abs(value),
        )
        try:
            t, best = next(search)
            while True:
                if best == here.t:
                    self._best_grad.copy_(self._grad)
                here = self._try(closure, t)
                t, best = search.send(here)
        except StopIteration as end:
            chosen = end.value.trial
        if chosen.t != here.t:
            self._return_to(chosen.t)
        self._own["t"] = chosen.t
        return _Moved(chosen.value, chosen.t * self._about.size, chosen.slope != self._about.slope)

    def _try(self, closure: Callable[[], Any], t: float) -> Trial:
        """Evaluate at start + t d.

        A step that could overflow a parameter counts as non-finite and is not evaluated; one where the closure failed
        and may counts likewise.
        """
        if not self._unread and not t * self._about.size < self._longest:
            return Trial(t, math.nan, math.nan)
        self._place(t)
        loss = self._evaluate(closure)
        if loss is None:
            if self._unread:
                self._read()
            return Trial(t, math.nan, math.nan)
        value, slope = self._read(loss, self._slope(self._grad))
        return Trial(t, value, slope) if t * self._about.size < self._longest else Trial(t, math.nan, math.nan)

    def _slope(self, grad: Tensor) -> Tensor:
        """g.d, in float64 where the products of finite numbers overflow in float32."""
        if not self._packed:
            slope = torch.dot(grad, self._direction)
            if grad.dtype is torch.float64 or math.isfinite(slope.item()):
                return slope
        return torch.dot(grad.double(), self._direction.double())

    def _place(self, t: float) -> None:
        """Set the parameters to start + t d, rounded as torch rounds it."""
        if self._away:
            self._flat.set_(self._start)
        if t != 0.0:
            self._flat.add_(self._direction_views, t)
        self._away = t != 0.0

    def _return_to(self, t: float) -> None:
        """Back to a point seen before: the start, or the best trial, with its gradient."""
        self._place(t)
        self._grad.copy_(self._prev_grad if t == 0.0 else self._best_grad)

    # Tests ------------------------------------------------------------------------------------------------------------

    def _is_optimal(self) -> bool:
        options = self.param_groups[0]
        relative = options["tolerance_grad_rel"] * self._own["first_grad_max"]
        return not self._unread and self._about.grad_max <= max(options["tolerance_grad"], relative)

    def _descends(self) -> bool:
        """Whether d is worth a step; a direction that does not descend at all has spoilt pairs, which are dropped."""
        if self._unread:
            return True
        slope = self._about.slope
        if not (-math.inf < slope < 0.0 and self._about.size < math.inf):
            self._drop_pairs()
            return False
        return slope <= -self.param_groups[0]["tolerance_change"]

    def _is_small(self, value: float, new: _Moved) -> bool:
        options = self.param_groups[0]
        change = abs(new.value - value)
        return (
            new.change <= options["tolerance_change"]
            or change < options["tolerance_change"]
            or change < options["tolerance_change_rel"] * max(abs(value), abs(new.value))
        )

    def _is_spent(self) -> bool:
        return self._own["func_evals"] >= self._limit

    def _may_evaluate(self) -> bool:
        """Whether an evaluation may follow in this call; a search may go one over the limit."""
        return self._searching or not self._is_spent()

    def _drop_pairs(self) -> None:
        """Forget all pairs; the call ends with this."""
        self._undo.end()
        self._history.reset()
        self._prev_grad.fill_(math.nan)  # so that d is never taken for the direction here

    # Evaluation and transfer ------------------------------------------------------------------------------------------

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call the closure; its gradient is then in `_grad`, its loss still where it was computed.

        None: it raised something that stands for an infinite loss (see on_error).
        """
        self._own["func_evals"] += 1
        try:
            with torch.enable_grad():
                loss = closure()
        except _NUMERICAL as error:
            if self._forgiving and not isinstance(error, _OTHER):
                return None
            raise
        _check_loss(loss)
        self._unit = self._rounding
        if _is_floating(loss) and loss.dtype is not self._flat.dtype:
            self._unit = torch.finfo(loss.dtype).eps
        self._flat.gather_grad()
        if self._maximize:
            torch.neg(self._flat.grad, out=self._grad)
        return loss

    def _read(self, loss: Any = None, *scalars: Tensor) -> list[float]:
        """Bring a loss and other scalars to the host, and what is not yet known of the direction: one transfer."""
        tensors = (*scalars, *self._unread)
        values: list[float] = []
        if isinstance(loss, Tensor) and loss.device == self._flat.device:
            tensors = (loss, *tensors)
        elif loss is not None:
            values.append(_as_float(_number(loss)))
        if self._packed:
            values += torch.cat([x.reshape(-1) for x in tensors]).tolist() if tensors else []
        else:
            for x in tensors:
                values += (x.item(),) if x.dim() == 0 else x.tolist() if x.dim() == 1 else x.reshape(-1).tolist()
        if self._maximize and loss is not None:
            values[0] = -values[0]
        if self._unread:
            known = len(scalars) + (loss is not None)
            values, about = values[:known], values[known:]
            head, count, slope, low, high, *total = about[len(Stats._fields) :]
            self._slot, self._full = int(head), count == self._history.history_size
            self._about = _Direction(
                slope, about[_G_MAX], about[_Y_NORM] != 0.0, max(-low, high), total[0] if total else 0.0
            )
            self._unread = ()
            state = self._own
            if (state["n_iter"] == 0 or state["first_grad_max"] == 0.0) and math.isfinite(self._about.grad_max):
                state["first_grad_max"] = self._about.grad_max
        return values

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients.

        Before the first evaluation this is what torch does. From then on every `p.grad` is, and stays, a view of one
        vector; zeroing that is one call.

        Args:
            set_to_none: has its meaning in torch before the first evaluation, none afterwards.
        """
        if self._layout is None:
            super().zero_grad(set_to_none)
        else:
            self._flat.zero_grad()

    # State ------------------------------------------------------------------------------------------------------------

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. What was learned so far is forgotten, because the vector of parameters has changed its length.

        Raises:
            TypeError, ValueError: the group has no parameters, an invalid option, an option other than lr that differs
                from the first group's, or parameters of another dtype or device.
        """
        super().add_param_group(param_group)
        try:
            if not self.param_groups[-1]["params"]:
                raise _checks.fail("LBFGS", "params", "at least one parameter in every group", "an empty group")
            check_groups("LBFGS", self.param_groups)
            FlatParameters("LBFGS", self._params)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._forget()
        self.__dict__.pop("_flat", None)
        self.state.clear()

    def _rates(self) -> list[float]:
        rates = []
        for group in self.param_groups:
            rates.append(rate(group["lr"]))
            if math.isnan(rates[-1]):
                raise _checks.fail("LBFGS", "lr", RATE, repr(group["lr"]))
        return rates

    def _root_of(self, shares: tuple[float, ...]) -> Tensor:
        """The diagonal of R^(1/2)."""
        return torch.cat(
            [
                torch.full((p.numel(),), math.sqrt(share), dtype=p.dtype, device=p.device)
                for share, group in zip(shares, self.param_groups, strict=True)
                for p in group["params"]
            ]
        )

    def _rescaled(self, pairs: Pairs, scale: Tensor | None) -> Pairs:
        """Pairs of R^(-1/2) x for another R; where one of the two lr is 0 there is nothing left of them."""
        if scale is None and self._scale is None:
            return pairs
        old, new = (torch.ones_like(self._prev_grad) if x is None else x for x in (self._scale, scale))
        up, down = (torch.where((old != 0) & (new != 0), a / b, 0.0) for a, b in ((old, new), (new, old)))
        return [(s.to(up) * up, y.to(down) * down) for s, y in pairs]

    def _bind(self) -> dict[str, Any]:
        """Build the buffers, at the first step, after a load and after a change of options; return the state.

        Like torch's, the state is global and filed under the first parameter. Pairs of another length of history or
        another dtype are offered to the new history, newest last.

        Raises:
            TypeError, ValueError: an option is invalid, or the state in `self.state` does not fit the parameters and
                options. Then nothing has changed.
        """
        self._check_changes()
        options, key = self.param_groups[0], self.param_groups[0]["params"][0]
        rates = self._rates()
        self._lr = max(rates)
        shares = tuple(each / self._lr for each in rates) if min(rates) != self._lr else None
        layout = (*(options[name] for name in LAYOUT), shares)
        state = self.state.get(key)
        mine = bool(state) and state is self._own
        stayed = hasattr(self, "_flat") and not self._flat.moved()
        if mine and stayed and layout == self._layout:
            return self._own
        flat = self._flat if stayed else FlatGradients("LBFGS", self._params)
        history = LBFGSHistory(
            flat.n,
            options["history_size"],
            dtype=flat.dtype,
            device=flat.device,
            storage_dtype=options["history_dtype"],
            curvature_tol=options["curvature_tol"],
        )
        scale = None if shares is None else self._root_of(shares)
        vectors = {name: flat.vector() for name in _VECTORS}
        numbers, adopted = dict(NUMBERS), False
        if state:
            if mine:
                numbers = {name: state[name] for name in NUMBERS}
                if options["maximize"] == self._maximize:
                    offer(history, self._rescaled(pairs_of(self._history), scale))
                else:  # the curvature of the function that is minimized now is the opposite
                    numbers["t"] = 0.0
                adopted = self._adopted
            elif is_of_torch(state):
                state, pairs = from_torch(state, flat.grad)
                numbers, adopted = {name: state[name] for name in NUMBERS}, True
                offer(history, pairs)
            else:
                check_state(state, vectors | history.state_dict())
                history.load_state_dict({name: state[name] for name in history.state_dict()})
                numbers = {name: state[name] for name in NUMBERS}
            for name, x in vectors.items():
                if name in state:
                    x.copy_(state[name])

        self._own = self.state[key] = vectors | history.state_dict() | numbers
        self._layout, self._flat, self._history, self._adopted = layout, flat, history, adopted
        self._prev_grad, self._direction, start = vectors.values()
        self._direction_views, self._start = flat.split(self._direction), flat.split(start)
        self._undo = Undo(flat, history, self._own, list(vectors.values()))
        self._stats, self._counters = history.stats_tensor, (history.head, history.count)
        self._maximize, self._searching = options["maximize"], options["line_search_fn"] is not None
        self._grad = flat.vector() if self._maximize else flat.grad
        if self._searching:
            self._best_grad = flat.vector()
        # Where a transfer costs nothing every number is read at once; elsewhere they travel together.
        self._packed = flat.device.type != "cpu"
        # x + s cannot overflow for any finite x when |s| is below half a unit in the last place of the largest number,
        # max * eps / 4; half of that leaves room for the rounding of s.
        info = torch.finfo(flat.dtype)
        self._longest, self._rounding = 0.125 * info.max * info.eps, info.eps
        self._absent = self._absent if mine else None
        self._scale, self._stale = scale, mine
        self._synchronize()
        return self._own

    def _synchronize(self) -> None:
        """Learn from the state what the host keeps in mind of it."""
        self._slot, self._full = int(self._history.head), int(self._history.count) == self._history.history_size
        self._unread = ()

    def _check_changes(self) -> None:
        """Check options that someone changed since the last step; what the first group says goes for all."""
        values = [group[name] for group in self.param_groups for name in SHARED]
        seen = self._seen
        if len(seen) == len(values) and all(map(operator.is_, values, seen)):
            return
        first, *others = self.param_groups
        check_options("LBFGS", first)
        for group in others:
            for name, old in zip(SHARED, seen, strict=False):
                if group[name] is old:
                    group[name] = first[name]
        check_groups("LBFGS", self.param_groups)
        self._seen = [group[name] for group in self.param_groups for name in SHARED]

    def _forget(self) -> None:
        """Let the next step look at `self.state` anew."""
        self._layout, self._own, self._seen = None, {}, []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for key in ("lr", *SHARED):
                group.setdefault(key, self.defaults.get(key, _LATER.get(key)))

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as `torch.optim.Optimizer.state_dict`; for the options as they are now."""
        if self._layout is not None and self.state.get(self._params[0]):
            self._bind()
        return super().state_dict()

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
        before = dict(self.__dict__)
        try:
            self._load(state_dict)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        given: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, final: given.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, loaded in zip(self.param_groups, given["param_groups"], strict=True):
            if "curvature_tol" not in loaded:  # a group of torch.optim.LBFGS
                group["maximize"] = False
                if is_integer(group["max_iter"], 1) and group["max_eval"] == group["max_iter"] * 5 // 4:
                    group["max_eval"] = None
        check_groups(OP, self.param_groups)
        # torch casts every tensor of the state to the dtype of the parameters; the float64 ones must stay as they are.
        key = given["param_groups"][0]["params"][0]
        if key in given["state"]:
            state = given["state"][key]
            if not isinstance(state, dict):
                raise _checks.fail(OP, "state", "a dictionary", _checks.describe(state))
            self.state[self._params[0]] = dict(state)
            self._bind()


def _evaluations(options: dict[str, Any]) -> int:
    return options["max_iter"] * 5 // 4 if options["max_eval"] is None else options["max_eval"]


def _shares() -> Iterator[float]:
    """What is left of a step that is too long: half, a few times, then less each time, until nothing is."""
    return (0.5 ** max(1, k - _HALVINGS) for k in itertools.count(1))


def _check_loss(loss: Any) -> None:
    if loss is None:
        raise TypeError("LBFGS.step: closure: expected it to return the loss, got None")
    one = loss.numel() == 1 and not loss.is_complex() if isinstance(loss, Tensor) else isinstance(_number(loss), Real)
    if not one:
        raise TypeError(
            f"LBFGS.step: closure: expected it to return a number or a tensor of one, got {_checks.describe(loss)}"
        )


def _number(x: Any) -> Any:
    """What a tensor or an array of one element holds; anything else as it is."""
    if isinstance(x, Tensor) or (not isinstance(x, Real) and getattr(x, "size", None) == 1 and hasattr(x, "item")):
        return x.item()
    return x


def _is_floating(loss: Any) -> bool:
    return isinstance(loss, Tensor) and loss.is_floating_point()


def _as_float(x: Any) -> float:
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf
