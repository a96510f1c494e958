"""The base of optimizers that move along directions -H g, where H learns from the pairs of the run."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.ops._takes_pairs import TakesPairs
from secant.optim._closure import Closure
from secant.optim._flat_optimizer import RATE, FlatOptimizer
from secant.optim._line import Line, Tried
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
TOLERANCE = _checks.number_from(0.0)


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


class QuasiNewton(FlatOptimizer):
    """Base of the methods that move along d = -H g by a step of length lr, or one that a search along d finds.

        x_{k+1} = x_k + t d,    s = x_{k+1} - x_k,    y = g_{k+1} - g_k,    H learns from (s, y)

    A subclass says what H is: something that takes pairs (`_learner`, made in `_build`), and what of it a step that
    fails has to put back (`_keep`). It has the options of `STEPS` besides its own.
    """

    #: Options of all of them.
    STEPS: ClassVar[Mapping[str, _checks.Option]] = {
        "lr": RATE,
        "max_iter": _checks.integer_from(1),
        "max_eval": _checks.or_none(_checks.integer_from(1)),
        "tolerance_grad": TOLERANCE,
        "tolerance_change": TOLERANCE,
        "line_search_fn": _checks.one_of(None, "strong_wolfe"),
        "maximize": _checks.flag(),
        "tolerance_grad_rel": TOLERANCE,
        "tolerance_change_rel": TOLERANCE,
        "curvature_tol": _checks.or_none(_checks.number_from(0.0, 1.0)),
        "on_error": _checks.one_of("raise", "backtrack"),
    }
    VECTORS = ("prev_grad", "direction", "start")
    NUMBERS: ClassVar[Mapping[str, Any]] = {
        **FlatOptimizer.NUMBERS,
        "t": (0.0, TOLERANCE),  # of a step that is not a pair yet
        "first_grad_max": (0.0, TOLERANCE),
    }

    _learner: TakesPairs
    _scale: Tensor | None = None  # the diagonal of R^(1/2); None: the identity
    _counters: tuple[Tensor, ...] = ()  # to be read with the numbers of a direction
    _prev_grad: Tensor
    _direction: Tensor
    _direction_views: list[Tensor]
    _start: list[Tensor]
    _searching: bool
    _unread: tuple[Tensor, ...] = ()  # what describes the direction, while it is only on the device
    _about: _Direction
    _absent: tuple[int, ...] | None  # parameters that do not move; None: not known yet
    _absent_before: tuple[int, ...] | None  # when the call began
    _stale: bool  # whether d is not what H and lr make of the last gradient
    _offered: float  # t of the pair that was offered last

    # What a subclass has of its own -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def _keep(self) -> None:
        """Keep what the next direction overwrites, and with it the parameters."""

    def _learn(self, t: float) -> None:
        """Offer the pair s = t d, y = g - g_prev; then d = -H g and g_prev = g, in place."""
        self._learner.step(self._grad, self._prev_grad, self._direction, t)

    def _begin(self) -> None:
        """Mend what a step that someone else made has left."""

    def _note(self, values: list[float]) -> list[float]:
        """Take `_counters` from the front of what was read; return the rest."""
        return values

    def _meet_other_parameters(self) -> None:
        """Take note that other parameters are without a gradient than before."""

    def _set_up(self, own: dict[str, Any], *, mine: bool) -> None:
        """Keep at hand what a step needs of a state."""
        flat = self._flat
        self._stale = mine
        self._prev_grad, self._direction, start = (own[name] for name in self.VECTORS)
        self._direction_views, self._start = flat.split(self._direction), flat.split(start)
        self._searching = self.param_groups[0]["line_search_fn"] is not None
        if self._searching:
            self._line = Line(flat, self._grad, self._prev_grad, self._start, self._direction_views)
        # x + s cannot overflow for any finite x when |s| is below half a unit in the last place of the largest number,
        # max * eps / 4; half of that leaves room for the rounding of s.
        info = torch.finfo(flat.dtype)
        self._longest = 0.125 * info.max * info.eps
        self._absent = self._absent_before = self._absent if mine else None

    def _synchronize(self) -> None:
        self._unread, self._absent = (), self._absent_before

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        super()._check_options(op, options)
        if options["line_search_fn"] is not None and options["max_eval"] == 1:
            raise _checks.fail(op, "max_eval", "None or an integer >= 2 (a line search needs one trial)", 1)

    # The algorithm ----------------------------------------------------------------------------------------------------

    def _iterate(self, closure: Closure) -> tuple[Any, Status]:
        own, options = self._own, self.param_groups[0]
        searching, max_iter = self._searching, options["max_iter"]
        self._limit = own["func_evals"] + (options["max_eval"] or max_iter * 5 // 4)
        self._absent_before = self._absent
        self._begin()

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
        own, g, d, stats = self._own, self._grad, self._direction, self._learner.stats
        others = self._absent != self._flat.absent
        if others:
            others = self._absent is not None
            if others:
                own["t"] = 0.0
            self._absent = self._flat.absent
        t = self._offered = own["t"]
        self._keep()
        if others:
            self._meet_other_parameters()
        stale, self._stale = self._stale, False
        if t == 0.0 and not stale and self._is_current():
            low, high = torch.aminmax(g)
            stats.g_max.copy_(torch.maximum(-low, high))
            stats.y_norm.zero_()
        else:
            maybe = t == 0.0 and not stale and self._packed and self._scale is None
            before = (d.clone(), (g == self._prev_grad).all()) if maybe else None
            self._learn(t)
            if before is not None:
                torch.where(before[1], before[0], d, out=d)
        self._flat.freeze_(self._direction_views)
        own["t"] = 0.0
        self._unread = (stats.g_max, stats.y_norm, self._slope(g), *torch.aminmax(d), *self._counters)
        if own["n_iter"] == 0:
            self._unread += (d.abs().sum(dtype=torch.float64),)

    def _know(self, loss: Any = None, *scalars: Tensor) -> list[float]:
        """Read a loss and other scalars, and what is not yet known of the direction."""
        values = self._read(loss, *scalars, *self._unread)
        if self._unread:
            known = len(scalars) + (loss is not None)
            grad_max, y_norm, slope, low, high, *rest = values[known:]
            values = values[:known]
            total = self._note(rest)
            self._about = _Direction(slope, grad_max, y_norm != 0.0, max(-low, high), total[0] if total else 0.0)
            self._unread = ()
            own = self._own
            if (own["n_iter"] == 0 or own["first_grad_max"] == 0.0) and math.isfinite(grad_max):
                own["first_grad_max"] = grad_max
        return values

    def _is_current(self) -> bool:
        """Tell whether d is -H g already, since this is the point where the last call ended.

        Computed once more, without the pair that was new then, d would differ by rounding from what a call that had
        gone on would use. Where numbers travel together, the device decides.
        """
        if self._packed or self._scale is not None:
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
            scale = self._scale
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
        self._learner.reset()
        self._prev_grad.fill_(math.nan)  # so that d is never taken for the direction here


def _remainders() -> Iterator[float]:
    """Yield what is left of a step that is too long: half, a few times, then less each time, until nothing is."""
    return (0.5 ** max(1, k - _HALVINGS) for k in itertools.count(1))
