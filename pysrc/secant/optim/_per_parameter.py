"""The base of optimizers that keep a state per parameter and need no closure: everything of them but the algorithm."""

from __future__ import annotations

import abc
import operator
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant.optim import _closure
from secant.optim._flat_optimizer import RATE

DTYPES = _checks.REAL + _checks.HALF

#: A factor per parameter: numbers where the host knows them, tensors of one element where it must not look.
Factors = list[Any]


def is_betas(x: object) -> bool:
    """Tell whether `x` is a pair of decay rates."""
    return isinstance(x, (tuple, list)) and len(x) == 2 and all(_checks.is_number(beta, 0.0, 1.0) for beta in x)


BETAS = Option("two numbers in [0, 1)", is_betas)


def is_dtensor(x: Tensor) -> bool:
    """Tell whether a tensor is spread over processes."""
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported there is none
    return module is not None and isinstance(x, module.DTensor)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the state of parameters, float32 for the half ones, and of the arithmetic of a step."""
    return torch.float32 if dtype in _checks.HALF else dtype


def is_due(t: Any, every: int) -> bool:
    """Tell whether the t-th step finds anew what is found every so many steps, and at 1, 2, 4, 8, ... before."""
    return every == 1 or t % every == 0 or (t < every and int(t) & (int(t) - 1) == 0)


#: Kind, dtype, device and processes (a mesh of devices, or None) that parameters of one batch share.
_Key = tuple[Hashable, torch.dtype, torch.device, Any]


class Batch(NamedTuple):
    """Parameters of one group that have a gradient, of one kind, dtype and device: lists for `torch._foreach_*`.

    group: their options. kind: what `_kind` says of all of them. params, states: as they are.
    grads: of what is minimized, in the dtype of the state (unless they are not `READY`); not to be written.
    lr: a number, or a tensor of one element that must not be read. counts: the number of this step, from 1, of each
    parameter, likewise.
    """

    group: dict[str, Any]
    kind: Hashable
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    lr: float | Tensor
    counts: Factors

    def state(self, name: str) -> list[Tensor]:
        """List one tensor of the state of each parameter."""
        return [state[name] for state in self.states]

    def corrections(self, beta: float, power: float = 1.0) -> Factors:
        """Compute (1 - beta^t)^power; 1 - beta^t is the weight that an average has gathered since it was zero."""
        if self.group["capturable"]:
            found = list(torch._foreach_pow(beta, self.counts))
            torch._foreach_neg_(found)
            torch._foreach_add_(found, 1.0)
            return found if power == 1.0 else list(torch._foreach_pow(found, power))
        known = {t: (1.0 - beta**t) ** power for t in set(self.counts)}  # one, mostly
        return [known[t] for t in self.counts]


class PerParameterOptimizer(torch.optim.Optimizer, abc.ABC):
    """Base of the optimizers that keep a state per parameter, as those of torch do.

    It checks options wherever they come from, collects gradients, builds, saves and loads the state, decays weights
    and moves parameters of any floating dtype, without reading from the device. A new optimizer says which options it
    has, what the state of a parameter is, and what a step does:

        class Sign(PerParameterOptimizer):
            OPTIONS = {**PerParameterOptimizer.OPTIONS, "beta": _checks.number_from(0.0, 1.0)}

            def __init__(self, params, lr=1e-3, beta=0.9, *, weight_decay=0.0, maximize=False, capturable=False):
                own = {"lr": lr, "beta": beta}
                super().__init__(params, own, weight_decay=weight_decay, maximize=maximize, capturable=capturable)

            def _new_state(self, p, group):
                return {"exp_avg": self._zeros(p)}

            def _update(self, batch):
                average = batch.state("exp_avg")
                torch._foreach_lerp_(average, batch.grads, 1.0 - batch.group["beta"])
                self._move(batch, torch._foreach_sign(average))              # decays the weights, too

    The state of a parameter is built by the first step at which it has a gradient: a tensor `step`, which counts, and
    those of `_new_state`; float32 for bfloat16 and float16 parameters, and of their dtype otherwise. The arithmetic of
    a step is done in that dtype, and rounded once. A parameter without a gradient, or frozen since it had one, stays
    where it is, and so does its state.

    Args:
        params: parameters or groups, named or not: real, dense, distinct; float32, float64, bfloat16 or float16.
        defaults: the options of the subclass.
        weight_decay: w; every step begins with p <- (1 - lr w) p, apart from the gradient (Loshchilov and Hutter,
            Decoupled weight decay regularization, ICLR 2019, Algorithm 2).
        maximize: go up instead of down.
        capturable: count steps on the device, so that a step can be part of a CUDA graph. Nothing is read back to
            the host in either case.
    """

    #: What each option may be. They may differ between groups.
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "lr": RATE,
        "weight_decay": _checks.number_from(0.0),
        "maximize": _checks.flag(),
        "capturable": _checks.flag(),
    }
    #: Whether gradients are handed over in the dtype of the state, and negated where the function is maximized.
    READY: ClassVar[bool] = True
    #: Whether the shards of a parameter that is spread over processes (a DTensor) may be updated where they are.
    SHARDS: ClassVar[bool] = True

    #: Whether gradients need a graph: `loss.backward(create_graph=True)`. Trainers ask for it by this name.
    is_second_order: bool = False

    _seen: list[Any]  # options as they were checked
    _learning: set[int]  # parameters that were seen to require a gradient

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, weight_decay: float, maximize: bool, capturable: bool
    ) -> None:
        defaults = {**defaults, "weight_decay": weight_decay, "maximize": maximize, "capturable": capturable}
        self._check_options(self._name, defaults)
        self._forget()
        super().__init__(params, defaults)

    # What a subclass has of its own -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Make the state of a parameter as it is before the first step, without `step`."""

    @abc.abstractmethod
    def _update(self, batch: Batch) -> None:
        """Learn from the gradients, and move the parameters."""

    def _takes_shards(self, group: dict[str, Any]) -> bool:
        """Tell the same for a group, where options decide."""
        return self.SHARDS

    def _kind(self, p: Tensor, group: dict[str, Any]) -> Hashable:
        """Say what parameters have to have in common, dtype and device aside, to be in one batch."""
        return None

    def _check_gradients(self) -> None:
        """Raise unless the gradients are such as the method needs; nothing has changed by then."""

    def _begin(self, batches: list[Batch]) -> None:
        """Compute what needs all parameters at once, before the first is updated."""

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        """Raise a ValueError that names the first option which is not what it may be."""
        _checks.options(op, self.OPTIONS, options)

    # A step -----------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run one step from the gradients as they are.

        Args:
            closure: None, or a function that computes the loss, calls backward on it and returns it; it is called
                first, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            TypeError: `closure` cannot be called.
            ValueError: a gradient is sparse, or an option was changed to something invalid. Then nothing has changed.
        """
        loss = None
        self._check_changes()
        if closure is not None:
            _closure.check(self._name, closure)
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        batches = self._gather()
        self._begin(batches)
        for batch in batches:
            self._update(batch)
        return loss

    def _gather(self) -> list[Batch]:
        """Collect the parameters that have a gradient, and count their step; build the state that is not there yet."""
        found = [(group, kind, members) for group in self.param_groups for kind, members in self._members(group)]
        batches = []
        for group, (kind, dtype, device, _), members in found:
            if not group["capturable"] and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise _checks.fail(self._name, "capturable", "True inside of a CUDA graph", "False")
            states = [self._state_of(p, group) for p in members]
            grads: list[Any] = [p.grad for p in members]
            if dtype in _checks.HALF and self.READY:
                grads = [g.to(wide(dtype)) for g in grads]
            if group["maximize"] and self.READY:
                grads = list(torch._foreach_neg(grads))
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            counts = steps if group["capturable"] else [step.item() for step in steps]
            batches.append(Batch(group, kind, members, grads, states, self._rate(group), counts))
        return batches

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter, which is built if it is not there yet."""
        state = self.state.get(p)
        if not state:
            state = self.state[p] = {"step": self._zero_step(p, group), **self._new_state(p, group)}
        return state

    def _members(self, group: dict[str, Any]) -> list[tuple[_Key, list[Tensor]]]:
        """List the parameters of a group that have a gradient, by kind, dtype, device and processes."""
        members: dict[_Key, list[Tensor]] = {}
        for i, p in enumerate(group["params"]):
            if p.requires_grad:
                self._learning.add(id(p))
            elif id(p) in self._learning:
                self._learning.discard(id(p))  # what is left of its gradient is old; one that is set from now on counts
                p.grad = None
            g = p.grad
            if g is None:
                continue
            if g.layout is not torch.strided:
                expected = "a dense gradient (for an embedding: sparse=False)"
                raise _checks.fail(self._name, f"{self._called(group, i)}.grad", expected, g.layout)
            mesh = p.device_mesh if is_dtensor(p) else None
            members.setdefault((self._kind(p, group), p.dtype, p.device, mesh), []).append(p)
        return list(members.items())

    def _called(self, group: dict[str, Any], i: int) -> str:
        """Name a parameter: by its name if it has one, else by its place among all."""
        if "param_names" in group:
            return str(group["param_names"][i])
        before = 0
        for other in self.param_groups:
            if other is group:
                break
            before += len(other["params"])
        return f"params[{before + i}]"

    def _rate(self, group: dict[str, Any]) -> float | Tensor:
        """Return the learning rate: a number, unless it lives on another device than the host or must not be read."""
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            return float(lr)
        if lr.device.type == "cpu" and not group["capturable"]:
            return float(lr.item())
        return lr.detach().reshape(())

    @staticmethod
    def _zeros(p: Tensor) -> Tensor:
        """Make zeros like a parameter, in the dtype of the state."""
        return torch.zeros_like(p, dtype=wide(p.dtype), memory_format=torch.preserve_format, requires_grad=False)

    @staticmethod
    def _zero_step(p: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")

    def _move(self, batch: Batch, directions: list[Tensor], lr: float | Tensor | None = None) -> None:
        """Decay the weights and subtract lr times the directions, which may be overwritten.

        Args:
            lr: in place of the group's, for the directions alone.
        """
        group, params = batch.group, batch.params
        rate, decay = batch.lr if lr is None else lr, group["weight_decay"]
        half = params[0].dtype in _checks.HALF
        moved = [p.float() for p in params] if half else params
        if decay:
            torch._foreach_mul_(moved, 1.0 - batch.lr * decay)
        if isinstance(rate, Tensor):
            torch._foreach_mul_(directions, rate)
            torch._foreach_sub_(moved, directions)
        else:
            torch._foreach_add_(moved, directions, alpha=-rate)
        if half:
            torch._foreach_copy_(params, moved)

    # Groups and options -----------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the state of the others stays.

        Raises:
            TypeError, ValueError: the group has an invalid option, or a parameter that is complex, of an integer type,
                not dense, there already, or of a kind that this optimizer does not take.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check_options(self._name, group)
            if len({id(p) for p in group["params"]}) < len(group["params"]):
                raise _checks.fail(self._name, "params", "distinct tensors", "one of them twice")
            for i, p in enumerate(group["params"]):
                self._check_parameter(self._called(group, i), p, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._seen = self._values()

    def _check_parameter(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        """Raise unless a parameter is of a kind that this optimizer takes."""
        _checks.tensor(self._name, name, p, DTYPES)
        if is_dtensor(p) and not self._takes_shards(group):
            raise _checks.fail(
                self._name, name, "a tensor of one process (its step needs whole parameters)", "a DTensor"
            )

    def _check_changes(self) -> None:
        """Check options that someone changed since the last step."""
        values, seen = self._values(), self._seen
        if len(seen) == len(values) and all(map(operator.is_, values, seen)):
            return
        for group in self.param_groups:
            self._check_options(self._name, group)
        self._seen = values

    def _values(self) -> list[Any]:
        return [group[name] for group in self.param_groups for name in self.OPTIONS]

    # State ------------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Let the next step look at the options anew."""
        self._seen = []
        self._learning = self.__dict__.get("_learning", set())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name in self.OPTIONS:
                group.setdefault(name, self.defaults.get(name))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the run continues from it bit for bit.

        Tensors keep their dtypes. If the groups are others than those that were saved, parameters find their state by
        name, given that they have names here and there (`named_parameters()`); a group takes the options that its
        parameters had.

        Args:
            state_dict: of the same optimizer with the same parameters. It is copied, not referenced.

        Raises:
            TypeError, ValueError: the state is of something else, its tensors have other shapes, or an option in it is
                invalid. Then nothing has changed.
        """
        before = dict(self.__dict__)
        given: dict[str, Any] = {}

        def regroup(_: Any, final: dict[str, Any]) -> dict[str, Any]:
            given.update(self._regrouped(final))
            # The names stay those that the parameters have here.
            given["param_groups"] = [_without(group, "param_names") for group in given["param_groups"]]
            return given

        hooks = [
            self.register_load_state_dict_pre_hook(regroup),
            self.register_load_state_dict_post_hook(lambda _: self._take(given), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, given: dict[str, Any]) -> None:
        """Take over what torch has cast to the dtypes of the parameters as it was."""
        op = f"{self._name}.load_state_dict"
        for group, saved in zip(self.param_groups, given["param_groups"], strict=True):
            self._check_options(op, group)
            for i, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
                state = given["state"].get(key)
                if not state:
                    self.state.pop(p, None)
                    continue
                like = {"step": self._zero_step(p, group), **self._new_state(p, group)}
                self.state[p] = _fitted(op, f"state of {self._called(group, i)}", state, like)
        self._seen = self._values()

    def _regrouped(self, given: dict[str, Any]) -> dict[str, Any]:
        """Bring the parameters of a state into the groups here, by their names, where the groups are others.

        Groups of the same sizes are taken as they are: those of a distributed checkpoint have been put in order, and
        carry the names of the groups that they came from.
        """
        own, saved = self.param_groups, given["param_groups"]
        same = [len(group["params"]) for group in own] == [len(group["params"]) for group in saved]
        if same or not all("param_names" in group for group in (*own, *saved)):
            return given
        homes = {name: (key, g) for g in saved for name, key in zip(g["param_names"], g["params"], strict=True)}
        if homes.keys() != {name for group in own for name in group["param_names"]}:
            return given
        groups = []
        for group in own:
            found = [homes[name] for name in group["param_names"]]
            options = [_without(home, "params") for _, home in found] or [_without(group, "params")]
            if any(_without(other, "param_names") != _without(options[0], "param_names") for other in options):
                expected = "equal options for parameters that are in one group here"
                raise _checks.fail(f"{self._name}.load_state_dict", "param_groups", expected, "different ones")
            groups.append({**options[0], "params": [key for key, _ in found]})
        return {**given, "param_groups": groups}


def _without(group: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != key}


def _fitted(op: str, name: str, state: object, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy a loaded state into the dtypes and to the devices of one that is as it should be."""
    if not isinstance(state, Mapping):
        raise _checks.fail(op, name, "a dictionary", _checks.describe(state))
    if state.keys() != like.keys():
        raise _checks.fail(op, name, f"keys {sorted(like)}", sorted(map(str, state)))
    fitted = {}
    for key, x in like.items():
        got = state[key]
        if key == "step" and not isinstance(got, Tensor) and _checks.is_number(got, 0.0):
            got = torch.tensor(float(got))
        if not isinstance(got, Tensor) or got.shape != x.shape or got.is_complex() or is_dtensor(got) != is_dtensor(x):
            raise _checks.fail(op, f"{name}[{key!r}]", _checks.describe(x), _checks.describe(got))
        fitted[key] = got.detach().to(dtype=x.dtype, device=x.device, copy=True)
    return fitted


# Adam, which many a method falls back to, or borrows the length of its steps from -------------------------------------


def moments(batch: Batch, first: list[Tensor], second: list[Tensor], betas: tuple[float, float]) -> None:
    """Update running averages of gradients and of their squares."""
    torch._foreach_lerp_(first, batch.grads, 1.0 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, batch.grads, batch.grads, value=1.0 - betas[1])


def adam(
    batch: Batch, first: list[Tensor], second: list[Tensor], betas: tuple[float, float], eps: float
) -> list[Tensor]:
    """Compute m^ / (sqrt(v^) + eps) from the averages, bias-corrected.

    References:
        Kingma and Ba, Adam: a method for stochastic optimization, ICLR 2015, Algorithm 1.
    """
    roots = list(torch._foreach_sqrt(second))
    torch._foreach_div_(roots, batch.corrections(betas[1], 0.5))
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(roots, batch.corrections(betas[0]))
    return list(torch._foreach_div(first, roots))
