"""Limited-memory BFGS, a drop-in for `torch.optim.LBFGS`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.ops import LBFGSHistory
from secant.ops.lbfgs import MAX_HISTORY, STORAGE
from secant.optim._closure import Closure
from secant.optim._flat_optimizer import RATE, Callback, FlatOptimizer, fill
from secant.optim._line import Line, Tried
from secant.optim._pairs import Pairs, ScaledHistory
from secant.optim._torch_state import from_torch, is_of_torch
from secant.result import Status
from secant.solvers.line_search import Trial, strong_wolfe

#: Trials beyond the default max_eval for a search whose first trial is not finite; eight undo a step 1e9 too long.
_SPARE_TRIALS = 10
#: Rounding of a loss relative to it, in units of its dtype.
_NOISE = 1.0
#: Halvings of a step, without a search, before it is shortened by more each time, as a search does.
_HALVINGS = 8
#: Components that tell two gradients apart, when they are of two batches.
_FEW = 1024
_TOLERANCE = _checks.number_from(0.0)


class _Direction(NamedTuple):
    """Numbers that the host knows of the direction d at the current point, with gradient g.

    slope: g.d. grad_max: |g|_inf. learned: whether the gradient has changed since the last point. size: |d|_inf.
    total: |d|_1, computed for the first iteration of a run only.
    """

    slope: float
    grad_max: float
    learned: bool
    size: float
    total: float


class _Moved(NamedTuple):
    """A step that was taken.

    t: its length along d. value: the loss where it led. grad_max: |g|_inf there, NaN where nobody asked. change: the
    largest of a parameter. learned: whether y.d is not 0.
    """

    t: float
    value: float
    grad_max: float
    change: float
    learned: bool = True


class LBFGS(FlatOptimizer):
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
        "lr": RATE,
        "max_iter": _checks.integer_from(1),
        "max_eval": _checks.or_none(_checks.integer_from(1)),
        "tolerance_grad": _TOLERANCE,
        "tolerance_change": _TOLERANCE,
        "history_size": _checks.integer_from(1, MAX_HISTORY),
        "line_search_fn": _checks.one_of(None, "strong_wolfe"),
        "maximize": _checks.flag(),
        "tolerance_grad_rel": _TOLERANCE,
        "tolerance_change_rel": _TOLERANCE,
        "history_dtype": _checks.one_of(None, *STORAGE),
        "curvature_tol": _checks.or_none(_checks.number_from(0.0, 1.0)),
        "on_error": _checks.one_of("raise", "backtrack"),
    }
    LAYOUT = ("history_size", "history_dtype", "curvature_tol", "line_search_fn", "maximize")
    LATER: ClassVar[Mapping[str, Any]] = {"on_error": "raise"}
    VECTORS = ("prev_grad", "direction", "start")
    NUMBERS: ClassVar[Mapping[str, Any]] = {
        **FlatOptimizer.NUMBERS,
        "t": (0.0, _TOLERANCE),  # of a step that is not a pair yet
        "first_grad_max": (0.0, _TOLERANCE),
    }

    _pairs: ScaledHistory
    _direction: Tensor
    _start: list[Tensor]
    _searching: bool
    _vectors: list[Tensor]  # what a step writes, but for pairs and gradients: of one dtype, and the rest
    _small: list[Tensor]
    _unread: tuple[Tensor, ...] = ()  # what describes the direction, while it is only on the device
    _about: _Direction
    _absent: tuple[int, ...] | None  # parameters that do not move; None: not known yet
    _adopted: bool = False  # whether the last step was made by torch
    _stale: bool  # whether d is not what the pairs and lr make of the last gradient
    _offered: float  # t of the pair that was offered last
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

    # The algorithm ----------------------------------------------------------------------------------------------------

    def _iterate(self, closure: Closure) -> tuple[Any, Status]:
        own, options = self._own, self.param_groups[0]
        searching, max_iter = self._searching, options["max_iter"]
        self._limit = own["func_evals"] + (options["max_eval"] or max_iter * 5 // 4)
        if self._adopted:  # where that step began, torch does not say: if its end is not finite, it stays
            self._flat.save(self._start)
            self._adopted = False

        # A step that ended the last call without a gradient at its end.
        pending = own["t"]
        self._forgiving = pending != 0.0 and options["on_error"] == "backtrack"
        original, value, _ = self._observe(closure)
        self._forgiving = options["on_error"] == "backtrack"
        if not math.isfinite(value):
            other, value = self._step_back(closure, pending) if pending else (None, value)
            original = other if original is None else original
            if not math.isfinite(value):
                return self._direction.new_tensor(math.nan) if original is None else original, Status.NOT_FINITE
        untold = pending != 0.0 or own["n_iter"] == 0
        if untold and self._report(value, self._about.grad_max, self._offered if pending else 0.0):
            return original, Status.STOPPED

        iteration = 0
        while True:
            iteration += 1
            t = self._lr * (1.0 / max(1.0, self._about.total)) if own["n_iter"] == 0 else self._lr
            status = self._stopped(t)
            own["n_iter"] += status is not Status.CONVERGED
            if status is not None:
                return original, status
            self._flat.save(self._start)
            if searching:
                new = self._search(closure, value, t)
            else:
                new = self._move(closure, t, last=iteration == max_iter)
            if isinstance(new, Status):
                return original, new
            if self._report(new.value, new.grad_max, new.t):
                status = Status.STOPPED
            elif self._is_small(value, new):
                status = Status.SMALL_CHANGE
            elif not searching and self._is_optimal():
                status = Status.CONVERGED
            elif iteration == max_iter:
                status = Status.MAX_ITER
            elif self._is_spent():
                status = Status.MAX_EVAL
            if status is not None:
                if searching and new.learned:  # the gradient is of this call's batch; the next call may bring another
                    self._undo.end()
                    self._update_direction()
                return original, status
            value = new.value
            if searching:
                self._update_direction()
                if not self._packed:
                    self._know()

    def _observe(self, closure: Closure, *scalars: Tensor) -> tuple[Any, float, list[float]]:
        """Evaluate at the parameters and go on to the next direction: what the closure returned, f, and other scalars.

        Everything is read back in one transfer. f is NaN when the gradient is not finite; then the pair was rejected,
        and the direction means nothing. A closure that failed and may returned None: f is NaN, nothing else changed.
        """
        loss = self._evaluate(closure)
        if loss is None:
            self._keep()
            return None, math.nan, [x.item() for x in scalars]
        if not self._searching and self.callback is None and self._is_spent():
            self._undo.end()  # nothing follows that could raise; a search may go one evaluation over the limit
        self._update_direction()
        value, *others = self._know(loss, *scalars)
        if not self._about.learned:  # the gradient was left as it was, and so is d: the next one makes the pair
            self._own["t"] = self._offered
        return loss, value if math.isfinite(self._about.grad_max) else math.nan, others

    def _update_direction(self) -> None:
        """Offer the pair of the last step, s = t d, y = g - g_prev, to the history; then d = -H g and g_prev = g.

        Nothing is read back. With unequal lr, all this is done for R^(-1/2) x.
        Parameters without a gradient do not move, and a step that ended with others of them than it began with is no
        pair: what y is there, nobody knows.
        """
        own, g, d, stats = self._own, self._grad, self._direction, self._pairs.history.stats
        if self._absent != self._flat.absent:
            if self._absent is not None:
                own["t"] = 0.0
            self._absent = self._flat.absent
        t = self._offered = own["t"]
        self._keep()
        stale, self._stale = self._stale, False
        if t == 0.0 and not stale and self._is_current():
            low, high = torch.aminmax(g)
            stats.g_max.copy_(torch.maximum(-low, high))
            stats.y_norm.zero_()
        else:
            maybe = t == 0.0 and not stale and self._packed and self._pairs.scale is None
            before = (d.clone(), (g == self._prev_grad).all()) if maybe else None
            self._pairs.step(g, self._prev_grad, d, t)
            if before is not None:
                torch.where(before[1], before[0], d, out=d)
        self._flat.freeze_(self._direction_views)
        own["t"] = 0.0
        self._unread = (stats.g_max, stats.y_norm, *self._counters, self._slope(g), *torch.aminmax(d))
        if own["n_iter"] == 0:
            self._unread += (d.abs().sum(dtype=torch.float64),)

    def _know(self, loss: Any = None, *scalars: Tensor) -> list[float]:
        """Read a loss and other scalars, and what is not yet known of the direction."""
        values = self._read(loss, *scalars, *self._unread)
        if self._unread:
            known = len(scalars) + (loss is not None)
            grad_max, y_norm, head, count, slope, low, high, *total = values[known:]
            values = values[:known]
            self._slot, self._full = int(head), count == self._pairs.history.history_size
            self._about = _Direction(slope, grad_max, y_norm != 0.0, max(-low, high), total[0] if total else 0.0)
            self._unread = ()
            own = self._own
            if (own["n_iter"] == 0 or own["first_grad_max"] == 0.0) and math.isfinite(grad_max):
                own["first_grad_max"] = grad_max
        return values

    def _keep(self) -> None:
        """Keep what the next direction overwrites, and with it the parameters: a pair when a full ring gives it up."""
        undo, slot = self._undo, self._slot
        undo.keep("vectors", self._vectors)
        undo.keep("counters", self._small)
        if self._own["t"] != 0.0 and undo.lacks("pair", slot):
            undo.keep("pair", self._rows[slot], slot, zero=not self._full)

    def _is_current(self) -> bool:
        """Tell whether d is -H g already, since this is the point where the last call ended.

        Computed once more, without the pair that was new then, d would differ by rounding from what a call that had
        gone on would use. Where numbers travel together, the device decides.
        """
        if self._packed or self._pairs.scale is not None:
            return False
        g, p = self._grad, self._prev_grad
        if not torch.equal(g[:_FEW], p[:_FEW]):  # another batch: no need to look further
            return False
        low, high = torch.aminmax(g - p)  # a third of the time of torch.equal
        return low.item() == high.item() == 0.0

    def _move(self, closure: Closure, t: float, *, last: bool) -> _Moved | Status:
        """Move by t d, and evaluate there unless this is the last step of the call.

        While the loss or the gradient is not finite the move is shortened; when the evaluations run out before it is,
        or the move is at most tolerance_change or below rounding, the parameters return to the start.
        """
        own, change = self._own, t * self._about.size
        if not change < self._longest:
            self._drop_pairs()
            return Status.NOT_FINITE
        self._flat.add_(self._direction_views, t)
        own["t"] = t
        if last or self._is_spent():
            return Status.MAX_ITER if last else Status.MAX_EVAL
        _, value, _ = self._observe(closure)
        for share in _remainders():
            if math.isfinite(value):
                break
            change *= share
            apart = change > self.param_groups[0]["tolerance_change"] and not self._is_spent()
            if apart:
                _, value, apart = self._shorten(closure, share)
            if not apart:
                self._flat.set_(self._start)
                own["t"] = 0.0
                return Status.NOT_FINITE
        return _Moved(self._offered, value, self._about.grad_max, change)

    def _step_back(self, closure: Closure, unseen: float) -> tuple[Any, float]:
        """Shorten the unevaluated step that ended the last call, until the loss is finite.

        With evaluations spent (max_iter = 1 allows for one), one more halving is left for the next call to look at.
        Returns what the closure returned first, and the loss or NaN.
        """
        own, original = self._own, None
        for share in _remainders():
            if self._is_spent():
                break
            loss, value, apart = self._shorten(closure, share)
            original = loss if original is None else original
            if math.isfinite(value):
                return original, value
            if not apart:
                self._flat.set_(self._start)
                own["t"] = 0.0
                return original, math.nan
        self._flat.toward_(self._start, 0.5)
        if own["t"] == 0.0:  # evaluated in vain: there is still a step to shorten, but no pair
            self._direction.zero_()
            own["t"] = 2.0 * unseen
        own["t"] *= 0.5
        return original, math.nan

    def _shorten(self, closure: Closure, share: float) -> tuple[Any, float, bool]:
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

    def _search(self, closure: Closure, value: float, t: float) -> _Moved | Status:
        """Search along d for a strong Wolfe step; the parameters and `_grad` end at the one it chose."""
        options, line = self.param_groups[0], self._line
        trials = self._limit - self._own["func_evals"] + (options["max_eval"] is None)
        line.begin()
        first = self._try(closure, t)
        if options["max_eval"] is None and not first.finite:
            trials += _SPARE_TRIALS
        status = self._stopped(t)  # known before the search unless numbers travel together
        if status is not None:
            line.return_to_start()
            return status
        slope, size = self._about.slope, self._about.size
        search = strong_wolfe(
            Trial(0.0, value, slope),
            first.trial,
            size=size,
            tolerance=options["tolerance_change"],
            max_evaluations=trials,
            noise=_NOISE * self._rounding * abs(value),
        )
        (chosen, grad_max), finite = line.search(search, first, lambda t: self._try(closure, t))
        self._own["t"] = chosen.t
        if chosen.t == 0.0:
            return Status.NOT_FINITE if not finite else Status.MAX_EVAL if self._is_spent() else Status.STALLED
        return _Moved(chosen.t, chosen.value, grad_max, chosen.t * size, chosen.slope != slope)

    def _try(self, closure: Closure, t: float) -> Tried:
        """Evaluate at start + t d: what the search asks for, and |g|_inf there, for the callback if there is one.

        A step that could overflow a parameter counts as non-finite and is not evaluated; one where the closure failed
        and may counts likewise.
        """
        refused = Tried(Trial(t, math.nan, math.nan), math.nan)
        if not self._unread and not t * self._about.size < self._longest:
            return refused
        self._line.place(t)
        loss = self._evaluate(closure)
        if loss is None:
            if self._unread:
                self._know()
            return refused
        scalars = [self._slope(self._grad)]
        if self.callback is not None:
            scale = self._pairs.scale
            scalars.append((self._grad if scale is None else self._grad * scale).abs().max())
        value, slope, *grad_max = self._know(loss, *scalars)
        if not t * self._about.size < self._longest:
            return refused
        return Tried(Trial(t, value, slope), grad_max[0] if grad_max else math.nan)

    def _slope(self, grad: Tensor) -> Tensor:
        """Compute g.d, in float64 where the products of finite numbers overflow in float32."""
        if not self._packed:
            slope = torch.dot(grad, self._direction)
            if grad.dtype is torch.float64 or math.isfinite(slope.item()):
                return slope
        return torch.dot(grad.double(), self._direction.double())

    # Tests ------------------------------------------------------------------------------------------------------------

    def _is_optimal(self) -> bool:
        options = self.param_groups[0]
        relative = options["tolerance_grad_rel"] * self._own["first_grad_max"]
        return not self._unread and self._about.grad_max <= max(options["tolerance_grad"], relative)

    def _stopped(self, t: float) -> Status | None:
        """Say why no step is taken from here, as far as that is known; None: d is worth one of t."""
        if self._unread:
            return None
        if self._is_optimal():
            return Status.CONVERGED
        if t == 0.0:
            return Status.SMALL_CHANGE
        slope, size = self._about.slope, self._about.size
        if not (-math.inf < slope < 0.0 and size < math.inf):  # spoilt pairs
            self._drop_pairs()
            return Status.NO_DESCENT if math.isfinite(slope) and size < math.inf else Status.NOT_FINITE
        return Status.SMALL_CHANGE if slope > -self.param_groups[0]["tolerance_change"] else None

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

    def _drop_pairs(self) -> None:
        """Forget all pairs; the call ends with this."""
        self._undo.end()
        self._pairs.history.reset()
        self._prev_grad.fill_(math.nan)  # so that d is never taken for the direction here

    # State ------------------------------------------------------------------------------------------------------------

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        super()._check_options(op, options)
        if options["line_search_fn"] is not None and options["max_eval"] == 1:
            raise _checks.fail(op, "max_eval", "None or an integer >= 2 (a line search needs one trial)", 1)

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

        self._pairs, self._adopted, self._stale = new, adopted, mine
        self._prev_grad, self._direction, start = vectors
        self._rows = [[s, y] for s, y in zip(history.s, history.y, strict=True)]
        self._counters = (history.head, history.count)
        self._vectors, self._small = [*vectors, *flat.tensors], [history.sy, history.yy, *self._counters]
        self._direction_views, self._start = flat.split(self._direction), flat.split(start)
        self._searching = options["line_search_fn"] is not None
        if self._searching:
            self._line = Line(flat, self._grad, self._prev_grad, self._start, self._direction_views)
        # x + s cannot overflow for any finite x when |s| is below half a unit in the last place of the largest number,
        # max * eps / 4; half of that leaves room for the rounding of s.
        info = torch.finfo(flat.dtype)
        self._longest = 0.125 * info.max * info.eps
        self._absent = self._absent if mine else None
        return own

    def _synchronize(self) -> None:
        head, count = map(int, self._counters)
        self._slot, self._full = head, count == self._pairs.history.history_size
        self._unread = ()

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


def _remainders() -> Iterator[float]:
    """Yield what is left of a step that is too long: half, a few times, then less each time, until nothing is."""
    return (0.5 ** max(1, k - _HALVINGS) for k in itertools.count(1))
