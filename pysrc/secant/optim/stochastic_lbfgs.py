"""L-BFGS for mini-batches: pairs that noise does not spoil, and steps as long as Adam's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant.ops import LBFGSHistory
from secant.ops.lbfgs import MAX_HISTORY
from secant.optim import _closure
from secant.optim._per_parameter import BETAS, Batch, PerParameterOptimizer, wide

PAIRS = ("averages", "same-batch", "overlap")
_AVERAGES = ("avg_point", "avg_grad", "last_point", "last_grad")
_SVRG = ("snapshot", "full_grad")
_SOMETIMES = {*_AVERAGES, *_SVRG}
#: Tensors of the state that belong to all parameters; every one of them refers to the same.
_SHARED = ("sy", "yy", "head", "count")


class StochasticLBFGS(PerParameterOptimizer):
    """Multiply the average gradient by an inverse Hessian of L-BFGS, and take a step of the length that Adam's has.

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,    a = m^ / (sqrt(v^) + eps),
        p <- (1 - lr w) p - lr (|a| / |H m|) H m,

    with H from pairs (s, y), which `pairs` says how to find. The difference of the gradients of two batches says more
    about the batches than about the curvature, and H of such pairs diverges. Instead:

    - "averages": s and y are the changes of long averages of points and gradients, of decay `average`, over
      `update_every` steps. No closure is needed.
    - "same-batch": `step(closure)` calls the closure again after the step, on the same batch: s is the step, y the
      change of the gradient. Every step takes two evaluations (every `update_every`-th does).
    - "overlap": `step(closure, overlap)`, where `overlap` evaluates the samples that this batch and the next share,
      before the step and after it.

    Until there is a pair, and where H m is not finite, the step is Adam's. What matters, as measured on a network for
    digits, in order: where pairs come from; the length of the step; damping, with pairs of one batch (it hurts averaged
    ones); clipping only prevents explosions. **It beat AdamW on no network**: at its best learning rate its loss was 1
    to 4 times that of AdamW there. Use it where the noise is small, or to compare.

    Groups may differ in lr and weight_decay, which scale their part of the step. The state is 2 m + 2 times the memory
    of the parameters for a history of m pairs (in float32 for bfloat16 and float16 ones), and 2 m + 6 times with
    "averages": with 10 pairs it is 26 times the memory of the parameters, or 22 times the memory of the parameters.

    Args:
        params: parameters or groups, as for `torch.optim.Optimizer`; on one device, and either all float64 or none.
        lr: a number >= 0 or a tensor of one element.
        pairs: see above.
        history_size: m, 1 to 256.
        betas, eps: of m, v and a.
        average: decay rate of the averages of "averages", in [0, 1).
        update_every: steps from pair to pair; None: 10 for "averages" and else 1. 1 in CUDA graphs.
        damping: whether to damp y as Powell does, y <- theta y + (1 - theta) s / gamma, so that s.y >= .2 s.s / gamma,
            where gamma I is the first matrix of H. None: for "same-batch" and "overlap".
        curvature_tol: a pair enters when s.y > curvature_tol |s| |y|.
        graft: False for steps lr H m of their own length, the root mean square of H m held to at most `clip`.
        clip: see there.
        svrg_every: None, or every how many steps the gradient g~ of all data is computed, at a point p~ that is then
            kept, so that g - g(p~) + g~ takes the place of g, with g(p~) of the same batch as g: less noise for an
            evaluation more a step (SVRG). `step` needs a closure then. 2 more times the memory of the parameters.
        full_closure: computes the loss of all data, calls backward on it and returns it; for `svrg_every`. No part of
            the state.
        weight_decay: w, decoupled.
        maximize, capturable: as for torch's Adam.

    Raises:
        TypeError, ValueError: a parameter or an option is not what it may be; at a step: a closure is missing, and
            lr is not 0.

    References:
        Byrd, Hansen, Nocedal, Singer, A stochastic quasi-Newton method for large-scale optimization, SIAM J. Optim. 26
        (2016), Algorithm 1 (averaged points); Berahas, Nocedal, Takac, A multi-batch L-BFGS method for machine
        learning, NIPS 2016, Algorithm 1 (overlap); Wang, Ma, Goldfarb, Liu, Stochastic quasi-Newton methods for
        nonconvex stochastic optimization, SIAM J. Optim. 27 (2017), equations 3.2 and 3.3 (damping); Moritz, Nishihara,
        Jordan, A linearly-convergent stochastic L-BFGS algorithm, AISTATS 2016, Algorithm 1 (SVRG); Agarwal et al.,
        Disentangling adaptive gradient methods from learning rates, arXiv 2002.11803 (the length of the step).

    Example:
        >>> p = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = secant.optim.StochasticLBFGS([p], lr=0.1, pairs="same-batch")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (torch.tensor([1.0, 100.0]) * p**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(60):
        ...     loss = optimizer.step(closure)
        >>> bool(loss < 1.0)
        True
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **PerParameterOptimizer.OPTIONS,
        "pairs": _checks.one_of(*PAIRS),
        "history_size": _checks.integer_from(1, MAX_HISTORY),
        "betas": BETAS,
        "eps": _checks.positive_number(),
        "average": _checks.number_from(0.0, 1.0),
        "update_every": _checks.or_none(_checks.integer_from(1)),
        "damping": _checks.or_none(_checks.flag()),
        "curvature_tol": _checks.number_from(0.0, 1.0),
        "graft": _checks.flag(),
        "clip": _checks.positive_number(),
        "svrg_every": _checks.or_none(_checks.integer_from(1)),
    }
    SHARDS = False  # a pair is of all parameters
    PER_GROUP = ("lr", "weight_decay")

    full_closure: Callable[[], Any] | None = None
    _flat: _Flat | None = None
    _closure: Callable[[], Any] | None = None  # of the step that is running

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        pairs: str = "averages",
        history_size: int = 10,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        average: float = 0.99,
        update_every: int | None = None,
        damping: bool | None = None,
        curvature_tol: float = 1e-4,
        graft: bool = True,
        clip: float = 1.0,
        svrg_every: int | None = None,
        full_closure: Callable[[], Any] | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        own = {
            "lr": lr,
            "pairs": pairs,
            "history_size": history_size,
            "betas": betas,
            "eps": eps,
            "average": average,
            "update_every": update_every,
            "damping": damping,
            "curvature_tol": curvature_tol,
            "graft": graft,
            "clip": clip,
            "svrg_every": svrg_every,
        }
        self.full_closure = full_closure
        super().__init__(params, own, weight_decay=weight_decay, maximize=maximize, capturable=capturable)

    # Options and parameters -------------------------------------------------------------------------------------------

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        super()._check_options(op, options)
        if options["capturable"] and _every(options) != 1:
            raise _checks.fail(op, "update_every", "1 where steps are counted on the device", options["update_every"])
        if options["capturable"] and options["svrg_every"] is not None:
            raise _checks.fail(op, "svrg_every", "None where steps are counted on the device", options["svrg_every"])
        first = self.param_groups[0] if getattr(self, "param_groups", None) else options
        for name in self.OPTIONS:
            if name not in self.PER_GROUP and options[name] != first[name]:
                only = f"(only {', '.join(self.PER_GROUP)} may differ)"
                raise _checks.fail(op, name, f"{first[name]!r} in every group {only}", repr(options[name]))

    def _check_parameter(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        super()._check_parameter(name, p, group)
        first = self.param_groups[0]["params"][0]
        if wide(p.dtype) is not wide(first.dtype):
            raise TypeError(f"{self._name}: {name}: expected {wide(first.dtype)} as the first, or all, got {p.dtype}")
        if p.device != first.device:
            raise _checks.fail(self._name, name, f"device {first.device}, like the first", p.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. The pairs are forgotten, because the vector of parameters has changed its length.

        Raises:
            TypeError, ValueError: as for other optimizers, or the group differs in an option that must not.
        """
        super().add_param_group(param_group)
        self._flat = None
        self.state.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flat = None

    def _check_changes(self) -> None:
        super()._check_changes()
        group = self.param_groups[0]
        for state in self.state.values():
            vectors = {"exp_avg", "exp_avg_sq"} | (_SOMETIMES & state.keys())
            if len(state["s"]) != group["history_size"] or vectors != set(_vectors(group)):
                expected = "what they were when the state was built, or the first None as then"
                got = f"{group['svrg_every']}, {group['history_size']}, {group['pairs']!r}"
                raise _checks.fail(self._name, "svrg_every, history_size, pairs", expected, got)
            break

    # State ------------------------------------------------------------------------------------------------------------

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        m = group["history_size"]
        dtype, device = wide(p.dtype), p.device
        rings = {name: torch.zeros(m, *p.shape, dtype=dtype, device=device) for name in ("s", "y")}
        grams = {name: torch.zeros(m, m, dtype=torch.float64, device=device) for name in ("sy", "yy")}
        counts = {name: torch.zeros((), dtype=torch.int32, device=device) for name in ("head", "count")}
        vectors = {name: torch.zeros(p.shape, dtype=dtype, device=device) for name in _vectors(group)}
        return {**vectors, **rings, **grams, **counts, "place": torch.tensor(len(self.state))}

    def _bind(self) -> None:
        """Make one vector of all parameters, in an order that stays; those without a gradient have a state, too."""
        group, groups = self.param_groups[0], self.param_groups
        for each in groups:
            self._members(each)  # of which none must be sparse
        if self._flat is None or not self._flat.is_bound(self.state, group):
            params, known = [p for each in groups for p in each["params"]], bool(self.state)
            states = {p: self._state_of(p, each) for each in groups for p in each["params"]}
            if known:
                params.sort(key=lambda p: int(states[p]["place"]))
            self._flat = _Flat(self._name, self.state, params, group)

    # A step -----------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, overlap: Callable[[], Any] | None = None) -> Any:
        """Run one step, from the gradients as they are where there is no closure.

        Args:
            closure: computes the loss of this batch, calls backward on it and returns it. Needed for "same-batch".
            overlap: the same for the samples that this batch shares with the next. Needed for "overlap".

        Returns:
            What the closure returned at its first call. Gradients are then those of that call.

        Raises:
            ValueError: a closure is missing or not wanted, and lr is not 0.
            Whatever a closure raises. If it does so after the step, there is no pair of it.
        """
        self._check_changes()
        kind = self.param_groups[0]["pairs"]
        again = {"averages": None, "same-batch": closure, "overlap": overlap}[kind]
        svrg = self.param_groups[0]["svrg_every"] is not None
        for name, given, wanted in (
            ("closure", closure, kind == "same-batch" or svrg),
            ("overlap", overlap, kind == "overlap"),
            ("full_closure", self.full_closure, svrg),
        ):
            if given is not None:
                _closure.check(self._name, given)
            elif wanted and any(float(group["lr"]) != 0.0 for group in self.param_groups):
                what = "svrg_every" if svrg and name != "overlap" else f"pairs={kind!r}"
                raise _checks.fail(f"{self._name}.step", name, f"a function, for {what}", "None")
        if overlap is not None and kind != "overlap":
            raise _checks.fail(f"{self._name}.step", "overlap", f"None for pairs={kind!r}", "a function")

        self._bind()
        if svrg and closure is None:  # nothing moves, and there is no gradient to keep
            return None
        before = self._gradient_of(overlap) if kind == "overlap" and overlap is not None else None
        flat = self._flat
        assert flat is not None
        flat.is_due = False  # unless there are gradients
        self._closure = closure
        try:
            loss = super().step(closure)
        finally:
            self._closure = None
        if again is None or not flat.is_due:
            return loss
        flat.offer(flat.moved(), self._gradient_of(again).sub_(flat.gradient if before is None else before))
        return loss

    def _gradient_of(self, closure: Callable[[], Any]) -> Tensor:
        """Evaluate a closure for its gradient, and leave those of the parameters as they are."""
        assert self._flat is not None
        params = self._flat.params
        kept = [p.grad for p in params]
        for p in params:
            p.grad = None
        try:
            with torch.enable_grad():
                closure()
            return self._joined(params, [p.grad if p.requires_grad else None for p in params])
        finally:
            for p, g in zip(params, kept, strict=True):
                p.grad = g

    def _joined(self, params: list[Tensor], grads: list[Tensor | None]) -> Tensor:
        """Make one vector of gradients of what is minimized, zero where there is none."""
        pieces = [p.new_zeros(p.numel()) if g is None else g.reshape(-1) for p, g in zip(params, grads, strict=True)]
        found = torch.cat([x.to(wide(x.dtype)) for x in pieces])
        return found.neg_() if self.param_groups[0]["maximize"] else found

    def _begin(self, batches: list[Batch]) -> None:
        flat, group = self._flat, self.param_groups[0]
        if flat is None or not batches:
            return
        t = batches[0].counts[0] if group["capturable"] else max(max(batch.counts) for batch in batches)
        flat.is_due = group["capturable"] or t % _every(group) == 0
        present = {id(p) for batch in batches for p in batch.params}
        grads = [p.grad if id(p) in present else None for p in flat.params]
        g = self._joined(flat.params, grads)
        flat.gradient = g
        if group["svrg_every"] is not None and self._closure is not None and self.full_closure is not None:
            g = self._less_noisy(flat, g, (t - 1) % group["svrg_every"] == 0)
        flat.advance(g, t, group)
        if any(g is None for g in grads):
            for view, given in zip(flat.steps, grads, strict=True):
                if given is None:
                    view.zero_()

    def _less_noisy(self, flat: _Flat, g: Tensor, anew: bool) -> Tensor:
        """Compute g - g(p~) + g~, with the point p~ and the gradient g~ of all data there as they are, or new."""
        assert self._closure is not None
        assert self.full_closure is not None
        snapshot, full = flat.vectors["snapshot"], flat.vectors["full_grad"]
        if anew:
            snapshot.copy_(flat.point())
            return full.copy_(self._gradient_of(self.full_closure))
        here = [p.detach().clone() for p in flat.params]
        try:
            torch._foreach_copy_(flat.params, flat.split(snapshot))
            return g - self._gradient_of(self._closure) + full
        finally:
            torch._foreach_copy_(flat.params, here)

    def _update(self, batch: Batch) -> None:
        flat = self._flat
        assert flat is not None
        self._move(batch, [flat.step_of[id(p)].clone() for p in batch.params])


def _every(options: Mapping[str, Any]) -> int:
    return options["update_every"] or (10 if options["pairs"] == "averages" else 1)


def _vectors(group: Mapping[str, Any]) -> tuple[str, ...]:
    averages = _AVERAGES if group["pairs"] == "averages" else ()
    return ("exp_avg", "exp_avg_sq", *averages, *(_SVRG if group["svrg_every"] is not None else ()))


class _Flat:
    """The state of all parameters as vectors and one history; that of each parameter is a view of its part of them.

    Args:
        state: of every parameter; what is in it is taken over, and views take its place.
    """

    def __init__(self, op: str, state: Any, params: list[Tensor], group: Mapping[str, Any]) -> None:
        self.params, self.sizes = params, [p.numel() for p in params]
        self.options = _layout(group)
        n, m, dtype, device = sum(self.sizes), group["history_size"], wide(params[0].dtype), params[0].device
        if n == 0:
            raise _checks.fail(op, "params", "at least one element", "empty tensors only")
        tol = group["curvature_tol"]
        self.history = LBFGSHistory(n, m, dtype=dtype, device=device, curvature_tol=tol)
        self.vectors = {name: torch.zeros(n, dtype=dtype, device=device) for name in _vectors(group)}
        rings = {"s": self.history.s, "y": self.history.y}
        states = [state[p] for p in params]
        for name, vector in {**self.vectors, **rings}.items():
            for own, part in zip(states, self.split(vector), strict=True):
                part.copy_(own[name])
                own[name] = part
        own = self.history.state_dict()
        for name in _SHARED:
            own[name].copy_(states[0][name])
            for other in states:
                other[name] = own[name]  # the same for all of them
        self._sy = own["sy"]
        self.gradient = self.start = self.step = torch.zeros(0)
        self.steps: list[Tensor] = []
        self.step_of: dict[int, Tensor] = {}
        self.is_due = False

    def split(self, x: Tensor) -> list[Tensor]:
        """Make views of a vector, or of the rows of a ring, in the shapes of the parameters."""
        pieces = x.split(self.sizes, dim=-1)
        return [piece.view((*x.shape[:-1], *p.shape)) for piece, p in zip(pieces, self.params, strict=True)]

    def is_bound(self, state: Any, group: Mapping[str, Any]) -> bool:
        """Tell whether the state of the parameters is still this one, and what it is made for."""
        return _layout(group) == self.options and all(state[p].get("sy") is self._sy for p in self.params)

    def point(self) -> Tensor:
        """Make one vector of the parameters."""
        return torch.cat([p.detach().reshape(-1).to(self.history.dtype) for p in self.params])

    def moved(self) -> Tensor:
        """Compute how far the parameters are from where `advance` found them."""
        return self.point().sub_(self.start)

    def advance(self, g: Tensor, t: Any, group: Mapping[str, Any]) -> None:
        """Learn from a gradient, and compute the step that is to be subtracted."""
        (beta1, beta2), v = group["betas"], self.vectors
        self.start = self.point()
        v["exp_avg"].lerp_(g, 1.0 - beta1)
        v["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        if "avg_point" in v:
            self._average(g, t, group["average"])
        mean = v["exp_avg"] / (1.0 - beta1**t)
        adam = mean / ((v["exp_avg_sq"] / (1.0 - beta2**t)).sqrt_() + group["eps"])
        d = self.history.direction(mean)
        length = torch.linalg.vector_norm(d)
        if group["graft"]:
            scale = torch.linalg.vector_norm(adam) / length.clamp(min=torch.finfo(d.dtype).tiny)
        else:
            scale = (group["clip"] * d.numel() ** 0.5 / length).clamp(max=1.0)
        usable = (self.history.count > 0) & length.isfinite() & (length > 0.0)
        self.step = torch.where(usable, d.mul_(-scale), adam)
        self.steps = self.split(self.step)
        self.step_of = {id(p): x for p, x in zip(self.params, self.steps, strict=True)}

    def _average(self, g: Tensor, t: Any, beta: float) -> None:
        """Update the long averages; where a pair is due offer how they have changed."""
        v = self.vectors
        v["avg_point"].lerp_(self.start, 1.0 - beta)
        v["avg_grad"].lerp_(g, 1.0 - beta)
        if not self.is_due:
            return
        weight = 1.0 - beta**t
        point, grad = v["avg_point"] / weight, v["avg_grad"] / weight
        # Before the first there is nothing to compare with: s = 0 is refused.
        begun = v["last_grad"].any() | v["last_point"].any()
        s = torch.where(begun, point - v["last_point"], 0.0)
        self.offer(s, grad - v["last_grad"])
        v["last_point"].copy_(point)
        v["last_grad"].copy_(grad)

    def offer(self, s: Tensor, y: Tensor) -> None:
        """Offer a pair to the history, damped if the options say so."""
        if self.options["damping"]:
            y = self._damped(s, y)
        self.history.append(s, y)

    def _damped(self, s: Tensor, y: Tensor) -> Tensor:
        """Bring s.y to at least .2 s.s / gamma; the first pair is as it is."""
        gamma = self.history.stats.gamma
        least = torch.dot(s, s).double() / gamma
        sy = torch.dot(s, y).double()
        low = (self.history.count > 0) & (sy < 0.2 * least) & (gamma > 0.0)
        theta = torch.where(low, 0.8 * least / (least - sy), 1.0)
        other = torch.where(low, (1.0 - theta) / gamma, 0.0)
        return y * theta.to(y.dtype) + s * other.to(y.dtype)


def _layout(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the vectors and the history are made for."""
    damping = group["pairs"] != "averages" if group["damping"] is None else group["damping"]
    return {"damping": damping, **{name: group[name] for name in ("history_size", "curvature_tol", "pairs")}}
