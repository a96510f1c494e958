"""Limited-memory BFGS, a drop-in for `torch.optim.LBFGS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant.ops import _gate
from secant.ops.lbfgs import MAX_HISTORY, STORAGE, LBFGSHistory, Stats
from secant.optim._flat import FlatParameters, check_parameters
from secant.solvers.line_search import Trial, strong_wolfe

#: The options that decide which buffers there are, and all that the groups share.
_LAYOUT = ("history_size", "history_dtype", "curvature_tol", "line_search_fn", "maximize")
_TOLERANCES = ("tolerance_grad", "tolerance_change", "tolerance_grad_rel", "tolerance_change_rel")
_SHARED = (*_LAYOUT, *_TOLERANCES, "max_iter", "max_eval")
_GD, _G_MAX = Stats._fields.index("gd"), Stats._fields.index("g_max")
#: Trials beyond the default max_eval for a search whose first trial is not finite; eight undo a step 1e9 too long.
_SPARE_TRIALS = 10
_VECTORS = ("prev_grad", "direction", "start")


class _Direction(NamedTuple):
    """What the host knows of the direction d at the current point, with gradient g.

    slope: g.d. grad_max: |g|_inf. size: |d|_inf. total: |d|_1, computed for the first iteration of a run only.
    """

    slope: float
    grad_max: float
    size: float
    total: float


class _Moved(NamedTuple):
    """A step that was taken: the loss where it led, and the largest change of a parameter."""

    value: float
    change: float


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
      halved. The last step of a call without line search is not evaluated, as in torch; if the next call finds it
      non-finite, it halves it then. No step turns a finite parameter into a non-finite one.
    * **max_eval** given as a number is never exceeded. The default None means max_iter * 5 // 4, counted as torch does,
      which lets the last line search of a call go one evaluation over, and ten more if its first trial is not finite.
    * **Parameter groups.** lr may differ between groups, everything else is shared. With R = diag(lr_k / max lr) the
      direction is d = -R^(1/2) H R^(1/2) g and the step is tried at t = max lr: it always descends, the first step is
      lr_k times the gradient, and lr = 0 freezes a group as if it were not there. With unequal lr, `tolerance_grad`
      looks at R^(1/2) g.
    * **Gradients** live in one vector of which every `p.grad` is a view from the first evaluation on. `zero_grad`
      zeroes that vector in one call and keeps the views, also for set_to_none=True. A gradient replaced by someone
      else (such as `model.zero_grad()`) is copied into it; None counts as zero.
    * **The state** has a fixed shape from the first step: `history_size` pairs, two Gram matrices, three vectors and a
      few numbers, about 2 history_size + 4 times the parameters. A run continues from it bit for bit.
    * **Transfers.** On a GPU there is one transfer to the host per closure evaluation. For this a line search reads g.d
      and |g|_inf together with the loss of its first trial; so a call that stops because of them has, unlike on a CPU,
      evaluated the closure once more before it puts the parameters back.

    Args:
        params: parameters or groups; real, dense, distinct, float32 or float64, all of one dtype and device.
        lr: step length that is tried first, >= 0; a number or a tensor of one element. May be set per group.
        max_iter: iterations per call of `step`, >= 1.
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
    _flat: FlatParameters
    _history: LBFGSHistory
    _stats: Tensor
    _grad: Tensor  # of the function that is minimized, at the current point
    _prev_grad: Tensor
    _best_grad: Tensor
    _direction: Tensor
    _direction_views: list[Tensor]
    _start: list[Tensor]
    _scale: Tensor | None
    _unread: tuple[Tensor, ...]  # what describes the direction, while it is only on the device
    _about: _Direction
    _maximize: bool
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
        }
        _check_options(defaults)
        self._layout: tuple[Any, ...] | None = None
        super().__init__(params, defaults)

    # The algorithm ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Run up to `max_iter` iterations.

        Args:
            closure: computes the loss, calls backward on it and returns it: a real number or a tensor of one element.
                It is called several times, with gradients enabled.

        Returns:
            What the closure returned at its first evaluation: the loss at the start.

        Raises:
            TypeError: `closure` is not callable, or returns None or something that is no real number.
            ValueError: a gradient is sparse.
        """
        if not callable(closure):
            raise TypeError(f"LBFGS.step: closure: expected a function that returns the loss, got {closure!r}")
        state, options = self._bind(), self.param_groups[0]
        searching, max_iter = options["line_search_fn"] is not None, options["max_iter"]
        lr = self._learning_rate()
        self._limit = state["func_evals"] + _evaluations(options)

        unseen = 0.0 if searching else state["t"]
        original, value = self._observe(closure)
        if not math.isfinite(value):
            value = self._step_back(closure, unseen)
            if not math.isfinite(value):
                return original

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
        return original

    def _observe(self, closure: Callable[[], Any]) -> tuple[Any, float]:
        """Evaluate at the parameters and go on to the next direction: what the closure returned, and f.

        Everything is read back in one transfer. f is NaN when the gradient is not finite; then the pair was rejected,
        and the direction means nothing.
        """
        loss = self._evaluate(closure)
        self._update_direction()
        (value,) = self._read(loss)
        return loss, value if math.isfinite(self._about.grad_max) else math.nan

    def _update_direction(self) -> None:
        """Offer the pair of the last step, s = t d, y = g - g_prev, to the history; then d = -H g and g_prev = g.

        Nothing is read back. With unequal lr, d = -R^(1/2) H R^(1/2) g, and y is taken on the groups that move.
        """
        state, g, d = self._own, self._grad, self._direction
        if self._scale is None:
            self._history.step(g, self._prev_grad, d, state["t"])
        else:
            self._history.append(d * state["t"], (g - self._prev_grad).mul_(self._scale != 0))
            self._prev_grad.copy_(g)
            self._history.direction(torch.mul(g, self._scale, out=d), out=d)
            d.mul_(self._scale)
        state["t"] = 0.0
        self._unread = (self._stats, *torch.aminmax(d))
        if state["n_iter"] == 0:
            self._unread += (d.abs().sum(),)

    def _move(self, closure: Callable[[], Any], t: float, *, last: bool) -> _Moved | None:
        """Move by t d, and evaluate there unless this is the last step of the call.

        While the loss or the gradient is not finite the move is halved; when the evaluations run out before it is, the
        parameters return to the start. None: nothing more is known than that this call ends here.
        """
        state, change = self._own, t * self._about.size
        if not change < self._longest:
            self._history.reset()
            return None
        self._flat.add_(self._direction_views, t)
        state["t"] = t
        if last or self._is_spent():
            return None
        _, value = self._observe(closure)
        while not math.isfinite(value):
            if self._is_spent():
                self._flat.set_(self._start)
                return None
            self._flat.toward_(self._start, 0.5)
            change *= 0.5
            _, value = self._observe(closure)
        return _Moved(value, change)

    def _step_back(self, closure: Callable[[], Any], unseen: float) -> float:
        """Halve the unevaluated step that ended the last call, until the loss is finite: that loss, or NaN.

        With evaluations spent (max_iter = 1 allows for one), one more halving is left for the next call to look at.
        """
        if unseen == 0.0:
            return math.nan
        while not self._is_spent():
            self._flat.toward_(self._start, 0.5)
            _, value = self._observe(closure)
            if math.isfinite(value):
                return value
        self._flat.toward_(self._start, 0.5)
        self._own["t"] = unseen
        return math.nan

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
        return _Moved(chosen.value, chosen.t * self._about.size)

    def _try(self, closure: Callable[[], Any], t: float) -> Trial:
        """Evaluate at start + t d. A step that could overflow a parameter counts as non-finite and is not evaluated."""
        if not self._unread and not t * self._about.size < self._longest:
            return Trial(t, math.nan, math.nan)
        self._place(t)
        loss = self._evaluate(closure)
        value, slope = self._read(loss, torch.dot(self._grad, self._direction))
        return Trial(t, value, slope) if t * self._about.size < self._longest else Trial(t, math.nan, math.nan)

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
            self._history.reset()
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

    # Evaluation and transfer ------------------------------------------------------------------------------------------

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call the closure; its gradient is then in `_grad`, its loss still where it was computed."""
        with torch.enable_grad():
            loss = closure()
        self._own["func_evals"] += 1
        if loss is None:
            raise TypeError("LBFGS.step: closure: expected it to return the loss, got None")
        self._flat.gather_grad()
        if self._maximize:
            torch.neg(self._flat.grad, out=self._grad)
        return loss

    def _read(self, loss: Any = None, *scalars: Tensor) -> list[float]:
        """Bring a loss and other scalars to the host, and what is not yet known of the direction: one transfer."""
        tensors = (*scalars, *self._unread)
        values: list[float] = []
        if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
            if loss.device == self._flat.device:
                tensors = (loss, *tensors)
            else:
                values.append(loss.item())
        elif isinstance(loss, Real):
            values.append(float(loss))
        elif loss is not None:
            raise TypeError(
                f"LBFGS.step: closure: expected it to return a number or a tensor of one, got {_gate.describe(loss)}"
            )
        if self._packed:
            values += torch.cat([x.reshape(-1) for x in tensors]).tolist()
        else:
            for x in tensors:
                values += x.tolist() if x.dim() else (x.item(),)
        if self._maximize and loss is not None:
            values[0] = -values[0]
        if self._unread:
            known = len(scalars) + (loss is not None)
            values, about = values[:known], values[known:]
            low, high, *total = about[len(Stats._fields) :]
            self._about = _Direction(about[_GD], about[_G_MAX], max(-low, high), total[0] if total else 0.0)
            self._unread = ()
            if self._own["n_iter"] == 0:
                self._own["first_grad_max"] = self._about.grad_max
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
        group, first = self.param_groups[-1], self.param_groups[0]
        try:
            if not group["params"]:
                raise _gate.fail("LBFGS", "params", "at least one parameter in every group", "an empty group")
            _check_options(group)
            for key in _SHARED:
                if group[key] != first[key]:
                    raise _gate.fail(
                        "LBFGS", key, f"{first[key]!r} in every group (only lr may differ)", repr(group[key])
                    )
            check_parameters("LBFGS", self._params)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._layout = None
        self.state.clear()

    def _learning_rate(self) -> float:
        """The largest lr; `_scale` becomes R^(1/2), or None when all are equal."""
        rates = [float(group["lr"]) for group in self.param_groups]
        top = max(rates)
        if min(rates) == top:
            self._scale = None
        else:
            self._scale = torch.cat(
                [
                    torch.full((p.numel(),), math.sqrt(rate / top), dtype=p.dtype, device=p.device)
                    for rate, group in zip(rates, self.param_groups, strict=True)
                    for p in group["params"]
                ]
            )
        return top

    def _bind(self) -> dict[str, Any]:
        """Build the buffers, at the first step or after a load, from what `self.state` holds; return the state.

        Like torch's, the state is global and filed under the first parameter.

        Raises:
            TypeError, ValueError: the state in `self.state` does not fit the parameters and options.
        """
        options = self.param_groups[0]
        layout = tuple(options[key] for key in _LAYOUT)
        state = self.state[options["params"][0]]
        if layout == self._layout and state is self._own and not self._flat.moved():
            return state
        flat = FlatParameters("LBFGS", self._params)
        history = LBFGSHistory(
            flat.numel,
            options["history_size"],
            dtype=flat.dtype,
            device=flat.device,
            storage_dtype=options["history_dtype"],
            curvature_tol=options["curvature_tol"],
        )
        tensors = {name: flat.vector() for name in _VECTORS} | history.state_dict()
        numbers = {"func_evals": 0, "n_iter": 0, "t": 0.0, "first_grad_max": 0.0}
        if state:
            _check_state(state, tensors, numbers)
            for name, x in tensors.items():
                x.copy_(state[name])
        state.update(tensors)
        for name, number in numbers.items():
            state.setdefault(name, number)

        self._layout, self._own, self._flat, self._history = layout, state, flat, history
        self._prev_grad, self._direction, start = (tensors[name] for name in _VECTORS)
        self._direction_views, self._start = flat.views(self._direction), flat.views(start)
        self._stats, self._unread = history.stats_tensor, ()
        self._maximize = options["maximize"]
        self._grad = flat.vector() if self._maximize else flat.grad
        if options["line_search_fn"] is not None:
            self._best_grad = flat.vector()
        # Where a transfer costs nothing every number is read at once; elsewhere they travel together.
        self._packed = flat.device.type != "cpu"
        # x + s cannot overflow for any finite x when |s| is below half a unit in the last place of the largest number,
        # max * eps / 4; half of that leaves room for the rounding of s.
        info = torch.finfo(flat.dtype)
        self._longest = 0.125 * info.max * info.eps
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._layout = None
        for group in self.param_groups:
            for key in _SHARED:
                group.setdefault(key, self.defaults[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the run continues from it bit for bit.

        Args:
            state_dict: of an `LBFGS` with the same parameters. It is copied, not referenced.

        Raises:
            TypeError, ValueError: the state is of something else, or its tensors have other shapes or dtypes.
        """
        given: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, final: given.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        # torch casts every tensor of the state to the dtype of the parameters; the float64 ones must stay as they are.
        key = given["param_groups"][0]["params"][0]
        if key in given["state"]:
            self.state[self._params[0]] = dict(given["state"][key])
            self._bind()


def _evaluations(options: dict[str, Any]) -> int:
    return options["max_iter"] * 5 // 4 if options["max_eval"] is None else options["max_eval"]


def _check_state(state: dict[str, Any], tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    op = "LBFGS.load_state_dict"
    expected = tensors.keys() | numbers.keys()
    if state.keys() != expected:
        raise _gate.fail(op, "state", f"keys {sorted(expected)}", sorted(state))
    for name, x in tensors.items():
        got = state[name]
        if not isinstance(got, Tensor) or got.shape != x.shape or got.dtype != x.dtype:
            raise _gate.fail(op, f"state[{name!r}]", _gate.describe(x), _gate.describe(got))


def _check_options(options: dict[str, Any]) -> None:
    def check(name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise _gate.fail("LBFGS", name, expected, repr(options[name]))

    def is_int(name: str, low: int) -> bool:
        return isinstance(options[name], int) and options[name] >= low

    lr, searching = options["lr"], options["line_search_fn"] is not None
    one = not isinstance(lr, Tensor) or lr.numel() == 1
    check("lr", one and 0.0 <= float(lr) < math.inf, "a finite number >= 0, or a tensor of one")
    check("line_search_fn", options["line_search_fn"] in (None, "strong_wolfe"), "None or 'strong_wolfe'")
    check("max_iter", is_int("max_iter", 1), "an integer >= 1")
    check(
        "max_eval",
        options["max_eval"] is None or is_int("max_eval", 1 + searching),
        "None or an integer >= " + ("2 (a line search needs one trial)" if searching else "1"),
    )
    for name in _TOLERANCES:
        value = options[name]
        check(name, isinstance(value, (int, float)) and 0.0 <= value < math.inf, "a finite number >= 0")
    size = options["history_size"]
    check("history_size", is_int("history_size", 1) and size <= MAX_HISTORY, f"an integer, 1 to {MAX_HISTORY}")
    check("maximize", isinstance(options["maximize"], bool), "True or False")
    dtype, tol = options["history_dtype"], options["curvature_tol"]
    check("history_dtype", dtype is None or dtype in STORAGE, "None, torch.float32, torch.float64 or torch.bfloat16")
    check(
        "curvature_tol",
        tol is None or (isinstance(tol, (int, float)) and 0.0 <= tol < 1.0),
        "None or a number in [0, 1)",
    )
