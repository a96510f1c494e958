"""The base of optimizers that see all parameters as one vector: everything of them but the algorithm."""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant._parameters import FlatParameters
from secant.optim import _closure
from secant.optim._gradients import FlatGradients
from secant.result import Iteration, Status

#: What a closure raises that may stand for an infinite loss, and what of it is no matter of numbers after all.
NUMERICAL = (RuntimeError, ValueError, ArithmeticError)
OTHER = (torch.OutOfMemoryError, NotImplementedError, RecursionError)

Callback = Callable[[Iteration], object]


def rate(x: object) -> float:
    """Read a learning rate, a finite number >= 0 or a real tensor of one; NaN if it is none."""
    if isinstance(x, Tensor):
        one = x.numel() == 1 and not x.is_meta and x.dtype.is_signed and not x.is_complex()
        x = x.item() if one else math.nan
    return float(x) if isinstance(x, Real) and _checks.is_number(x, 0.0) else math.nan


RATE = Option("a finite number >= 0, or a tensor of one", lambda x: not math.isnan(rate(x)))


class FlatOptimizer(torch.optim.Optimizer, abc.ABC):
    """Base of the optimizers that see all parameters as one vector and keep one state.

    It evaluates the closure, checks options wherever they come from, builds the buffers, saves and loads the state,
    undoes a step that an exception ends, and tells status and callback. A new optimizer says which options, vectors and
    numbers it has, and what a step does:

        class HeavyBall(FlatOptimizer):
            OPTIONS = {"lr": RATE, "momentum": _checks.number_from(0.0, 1.0), "maximize": _checks.flag()}
            PER_GROUP = ()
            VECTORS = ("velocity",)

            def __init__(self, params, lr=1e-2, momentum=0.9, *, maximize=False, callback=None):
                super().__init__(params, {"lr": lr, "momentum": momentum, "maximize": maximize}, callback)

            def _iterate(self, closure):
                own, flat, v = self._own, self._flat, self._own["velocity"]
                loss = self._evaluate(closure)              # the gradient of what is minimized is then in self._grad
                value, grad_max = self._read(loss, self._grad.abs().max())          # one transfer to the host
                if not math.isfinite(value) or not math.isfinite(grad_max):
                    return loss, Status.NOT_FINITE
                self._undo.keep("state", [v, *flat.tensors])                        # before anything is written
                views = flat.split(v.mul_(self.param_groups[0]["momentum"]).add_(self._grad))
                flat.freeze_(views)
                flat.add_(views, -self._lr)
                own["n_iter"] += 1
                stop = self._report(value, grad_max, self._lr)                      # the callback
                return loss, Status.STOPPED if stop else Status.MAX_ITER

    The state is filed under the first parameter, as torch's L-BFGS does; its tensors keep their shapes.

    Args:
        params: parameters or groups; real, dense, distinct, float32 or float64, all of one dtype and device.
        defaults: the options.
        callback: called with an `Iteration` after each one; a true value ends the step. It is not part of the state.

    Attributes:
        status: why the last step ended; None before the first.
    """

    #: What each option may be. "lr" and "maximize" have their meaning here, the others in the subclass.
    OPTIONS: ClassVar[Mapping[str, Option]]
    #: Options that may differ between groups; the first group speaks for all in the others.
    PER_GROUP: ClassVar[tuple[str, ...]] = ("lr",)
    #: Options that decide which buffers there are, or what they hold.
    LAYOUT: ClassVar[tuple[str, ...]] = ("maximize",)
    #: Options that states of earlier versions lack, and what they were.
    LATER: ClassVar[Mapping[str, Any]] = {}
    #: Vectors of the state, of the length of all parameters.
    VECTORS: ClassVar[tuple[str, ...]] = ()
    #: Numbers of the state: at the start of a run, and what they may be.
    NUMBERS: ClassVar[Mapping[str, tuple[Any, Option]]] = {
        "func_evals": (0, _checks.integer_from(0)),
        "n_iter": (0, _checks.integer_from(0)),
    }

    _shared: ClassVar[tuple[str, ...]]  # options that are the same in every group

    status: Status | None = None
    callback: Callback | None = None
    _own: dict[str, Any]  # the state
    _layout: tuple[Any, ...] | None = None  # what the buffers were built for; None: nothing is built
    _seen: list[Any]  # options as they were checked
    _flat: FlatGradients
    _grad: Tensor  # of the function that is minimized, at the last evaluated point
    _undo: Undo
    _lr: float  # the largest
    _shares: tuple[float, ...] | None  # R: the lr of each group relative to it; None: all are equal
    _maximize: bool
    _forgiving: bool = False  # whether an error of the closure stands for an infinite loss
    _rounding: float  # unit of rounding of the loss
    _packed: bool

    def __init__(self, params: Any, defaults: dict[str, Any], callback: Callback | None) -> None:
        self._check_options(self._name, defaults)
        if callback is not None and not callable(callback):
            raise TypeError(f"{self._name}: callback: expected a function or None, got {_checks.show(callback)}")
        self.callback = callback
        self._forget()
        super().__init__(params, defaults)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "OPTIONS"):
            cls._shared = tuple(name for name in cls.OPTIONS if name not in cls.PER_GROUP)

    # What a subclass has of its own -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def _iterate(self, closure: _closure.Closure) -> tuple[Any, Status]:
        """Run one step: return what the closure returned first, and why the step ended.

        Whatever is written while the closure or the callback may still raise has been given to `_undo.keep` before.
        """

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        """Raise a ValueError that names the first option which is not what it may be."""
        _checks.options(op, self.OPTIONS, options)

    def _build(self, state: Mapping[str, Any] | None, *, mine: bool) -> dict[str, Any]:
        """Make the buffers that the options ask for; return the state in them.

        Args:
            state: what to take over; None or empty: a run begins.
            mine: whether it is the one in use, whose layout has changed, and not one that was loaded.

        Raises:
            ValueError: a loaded state does not fit.
        """
        own = self._new_state()
        if state:
            if not mine:
                self._check_state(state, own)
            fill(own, state)
        return own

    def _synchronize(self) -> None:
        """Learn from the state what the host keeps in mind of it: after a load, and after an undo."""

    def _migrate(self, group: dict[str, Any], loaded: Mapping[str, Any]) -> None:
        """Mend the options of a loaded group that comes from elsewhere."""

    # A step -----------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Run up to `max_iter` iterations.

        Under `torch.compile` this is run as it is; a closure that is itself compiled stays so.

        Args:
            closure: computes the loss, calls backward on it and returns it: a real number or a tensor of one element.
                It is called with gradients enabled, and may be called several times.

        Returns:
            What the closure returned at its first evaluation: the loss at the start.

        Raises:
            TypeError: `closure` is not callable, returns something that is no real number, or leaves a loss whose graph
                leads to the parameters without having called backward.
            ValueError: a gradient is sparse, or an option was changed to something invalid.
            Whatever the closure or the callback raises. After any of these the parameters, their gradients and the
                state are what they were before the call.
        """
        _closure.check(self._name, closure)
        first = not self.state.get(self._first)
        self._bind()
        self._undo.begin()
        try:
            loss, self.status = self._iterate(closure)
            return loss
        except BaseException:
            if self._undo.restore():
                self._synchronize()
                if first:
                    self.state.pop(self._first)
                    self._forget()
            raise
        finally:
            self._undo.end()

    def _evaluate(self, closure: _closure.Closure) -> Any:
        """Call the closure; its gradient is then in `_grad`, its loss still where it was computed.

        None: it raised something that stands for an infinite loss (see `_forgiving`).
        """
        flat = self._flat
        self._own["func_evals"] += 1
        try:
            loss = _closure.gradient(self._name, closure)
        except NUMERICAL as error:
            if self._forgiving and not isinstance(error, OTHER):
                return None
            raise
        self._rounding = _closure.rounding(loss, flat.dtype)
        flat.gather_grad()
        if len(flat.absent) == len(flat.tensors):
            _closure.check_backward(self._name, loss, flat.tensors)
        if self._maximize:
            torch.neg(flat.grad, out=self._grad)
        return loss

    def _read(self, loss: Any, *tensors: Tensor) -> list[float]:
        """Bring a loss, unless it is None, and tensors to the host, in one transfer; the loss as it is minimized."""
        values: list[float] = []
        if isinstance(loss, Tensor) and loss.device == self._flat.device:
            tensors = (loss, *tensors)
        elif loss is not None:
            values.append(_closure.as_float(loss))
        if self._packed:
            values += torch.cat([x.reshape(-1) for x in tensors]).tolist() if tensors else []
        else:
            for x in tensors:
                values += (x.item(),) if x.dim() == 0 else x.tolist() if x.dim() == 1 else x.reshape(-1).tolist()
        if self._maximize and loss is not None:
            values[0] = -values[0]
        return values

    def _report(self, value: float, grad_max: float, t: float) -> bool:
        """Tell the callback where the iteration has led; return whether it wants to stop."""
        if self.callback is None:
            return False
        own = self._own
        value = -value if self._maximize else value
        return bool(self.callback(Iteration(own["n_iter"], value, grad_max, t, evaluations=own["func_evals"])))

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

    # Groups and options -----------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _first(self) -> Tensor:
        return self.param_groups[0]["params"][0]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. What was learned so far is forgotten, because the vector of parameters has changed its length.

        Raises:
            TypeError, ValueError: the group has no parameters, an invalid option, an option that must not differ but
                does, or parameters of another dtype or device.
        """
        super().add_param_group(param_group)
        try:
            if not self.param_groups[-1]["params"]:
                raise _checks.fail(self._name, "params", "at least one parameter in every group", "an empty group")
            self._check_groups(self._name)
            FlatParameters(self._name, self._params)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._forget()
        self.__dict__.pop("_flat", None)
        self.state.clear()

    def _check_groups(self, op: str) -> None:
        """Raise unless every group is valid and they differ only where they may."""
        first = self.param_groups[0]
        for group in self.param_groups:
            self._check_options(op, group)
            for name in self._shared:
                if group[name] != first[name]:
                    expected = f"{first[name]!r} in every group (only {', '.join(self.PER_GROUP)} may differ)"
                    raise _checks.fail(op, name, expected, repr(group[name]))

    def _check_changes(self) -> None:
        """Check options that someone changed since the last step; what the first group says goes for all."""
        values = [group[name] for group in self.param_groups for name in self._shared]
        seen = self._seen
        if len(seen) == len(values) and all(map(operator.is_, values, seen)):
            return
        first, *others = self.param_groups
        self._check_options(self._name, first)
        for group in others:
            for name, old in zip(self._shared, seen, strict=False):
                if group[name] is old:
                    group[name] = first[name]
        self._check_groups(self._name)
        self._seen = [group[name] for group in self.param_groups for name in self._shared]

    def _read_rates(self) -> None:
        """Read the learning rates, which may be tensors that someone writes."""
        rates = [rate(group["lr"]) for group in self.param_groups]
        for x, group in zip(rates, self.param_groups, strict=True):
            if math.isnan(x):
                raise _checks.fail(self._name, "lr", RATE.expected, repr(group["lr"]))
        self._lr = max(rates)
        self._shares = tuple(x / self._lr for x in rates) if min(rates) != self._lr else None

    def _root_of_shares(self) -> Tensor | None:
        """Make the diagonal of R^(1/2)."""
        if self._shares is None:
            return None
        sizes = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        parts = [self._flat.grad.new_full((n,), math.sqrt(r)) for r, n in zip(self._shares, sizes, strict=True)]
        return torch.cat(parts)

    # State ------------------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Build what a step needs: at the first one, after a load, and after a change of options or parameters.

        Raises:
            TypeError, ValueError: an option is invalid, or the state in `self.state` does not fit the parameters and
                options. Then nothing has changed.
        """
        self._check_changes()
        self._read_rates()
        layout = (*(self.param_groups[0][name] for name in self.LAYOUT), self._shares)
        state = self.state.get(self._first)
        mine = bool(state) and state is self._own
        stayed = hasattr(self, "_flat") and not self._flat.moved()
        if mine and stayed and layout == self._layout:
            return
        before, maximize = dict(self.__dict__), self.param_groups[0]["maximize"]
        try:
            if not stayed:
                self._flat = FlatGradients(self._name, self._params)
            self._grad = self._flat.vector() if maximize else self._flat.grad
            self._own = self._build(state, mine=mine)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        self.state[self._first] = self._own
        self._layout, self._maximize, flat = layout, maximize, self._flat
        self._undo = Undo(flat, self._own, tuple(self.NUMBERS))
        # Where a transfer costs nothing every number is read at once; elsewhere they travel together.
        self._packed = flat.device.type != "cpu"
        self._synchronize()

    def _new_state(self) -> dict[str, Any]:
        """Make the vectors and numbers of a state as they are when a run begins."""
        vectors = {name: self._flat.vector() for name in self.VECTORS}
        return vectors | {name: start for name, (start, _) in self.NUMBERS.items()}

    def _check_state(self, state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
        """Raise unless a loaded state has tensors like these, and valid numbers."""
        op = f"{self._name}.load_state_dict"
        if state.keys() != like.keys():
            raise _checks.fail(op, "state", f"keys {sorted(like)}", sorted(map(str, state)))
        for name, x in like.items():
            got = state[name]
            if name not in self.NUMBERS and not (
                isinstance(got, Tensor) and (got.shape, got.dtype, got.layout) == (x.shape, x.dtype, x.layout)
            ):
                raise _checks.fail(op, f"state[{name!r}]", _checks.describe(x), _checks.describe(got))
        self._check_numbers(state)

    def _check_numbers(self, state: Mapping[str, Any]) -> None:
        """Raise unless the numbers of a loaded state are valid."""
        for name, (_, option) in self.NUMBERS.items():
            if not option.accept(state[name]):
                got = _checks.describe(state[name])
                raise _checks.fail(f"{self._name}.load_state_dict", f"state[{name!r}]", option.expected, got)

    def _forget(self) -> None:
        """Let the next step look at `self.state` anew."""
        self._layout, self._own, self._seen = None, {}, []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name in self.OPTIONS:
                group.setdefault(name, self.defaults.get(name, self.LATER.get(name)))

    def state_dict(self) -> dict[str, Any]:
        """Return state and options, as `torch.optim.Optimizer.state_dict`; for the options as they are now."""
        if self._layout is not None and self.state.get(self._first):
            self._bind()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the run continues from it bit for bit.

        Args:
            state_dict: of the same optimizer with the same parameters. It is copied, not referenced.

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
        op = f"{self._name}.load_state_dict"
        given: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, final: given.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, loaded in zip(self.param_groups, given["param_groups"], strict=True):
            self._migrate(group, loaded)
        self._check_groups(op)
        # torch casts every tensor of the state to the dtype of the parameters; the float64 ones must stay as they are.
        key = given["param_groups"][0]["params"][0]
        if key in given["state"]:
            state = given["state"][key]
            if not isinstance(state, dict):
                raise _checks.fail(op, "state", "a dictionary", _checks.describe(state))
            self.state[self._first] = dict(state)
            self._bind()


def fill(own: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Take over from another state what is there of each name."""
    for name, x in own.items():
        if name not in state:
            continue
        if isinstance(x, Tensor):
            x.copy_(state[name])
        else:
            own[name] = state[name]


class Undo:
    """Copies of what a step changes, kept until it has ended, so that an exception leaves no trace.

    Nothing is read back to the host, and a tensor is copied only before it is about to change. On a CPU the copies'
    memory is kept for the next step: new memory costs there more than the copy.

    Args:
        flat: the parameters; their gradients are kept from the start.
        state: whose numbers are kept from the start.
        numbers: their names.
    """

    def __init__(self, flat: FlatGradients, state: dict[str, Any], numbers: tuple[str, ...]) -> None:
        self._flat, self._state, self._names = flat, state, numbers
        self._kept: dict[tuple[str, int], tuple[list[Tensor], list[Tensor] | None]] = {}
        self._free: dict[str, list[list[Tensor]]] = {}
        self._reuse = flat.device.type == "cpu"
        self._active = False

    def begin(self) -> None:
        """Keep the numbers and the gradients."""
        flat = self._flat
        self._active = True
        self._numbers = [self._state[name] for name in self._names]
        self._knowledge = flat.knowledge()
        grads = flat.grads()
        if any(mine for _, mine in grads):
            self.keep("grad", [flat.grad])
        self._grads = [(g, None if g is None or mine else g.detach().clone()) for g, mine in grads]

    def lacks(self, name: str, part: int = 0) -> bool:
        """Tell whether this has to be kept before it is written."""
        return self._active and (name, part) not in self._kept

    def keep(self, name: str, tensors: list[Tensor], part: int = 0, *, zero: bool = False) -> None:
        """Keep tensors, once a step; those that are known to be zero need no copy.

        Parts of one name are tensors of the same shapes and dtypes.
        """
        if not self.lacks(name, part):
            return
        copies = None
        if not zero:
            free = self._free.get(name)
            copies = free.pop() if free else [torch.empty_like(x) for x in tensors]
            torch._foreach_copy_(copies, tensors)
        self._kept[name, part] = tensors, copies

    @torch.no_grad()
    def restore(self) -> bool:
        """Put everything back, unless the step has ended; return whether it was put back."""
        if not self._active:
            return False
        for tensors, copies in self._kept.values():
            if copies is None:
                torch._foreach_zero_(tensors)
            else:
                torch._foreach_copy_(tensors, copies)
        self._state.update(zip(self._names, self._numbers, strict=True))
        for p, (g, content) in zip(self._flat.tensors, self._grads, strict=True):
            if g is not None and content is not None:
                g.copy_(content)
            if p.grad is not g:
                p.grad = g
        self._flat.recall(self._knowledge)
        self.end()
        return True

    def end(self) -> None:
        """Let go of what only this step needs: from here on nothing can be undone."""
        if self._reuse:
            for (name, _), (_, copies) in self._kept.items():
                if copies is not None:
                    self._free.setdefault(name, []).append(copies)
        self._kept, self._grads, self._active = {}, [], False
