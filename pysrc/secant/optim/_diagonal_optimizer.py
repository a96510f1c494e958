"""The base of optimizers that divide by the diagonal of the Hessian, which they sample every few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant.curvature._curvature import mean_over_processes
from secant.curvature._estimators import rademacher
from secant.optim._per_parameter import Batch, PerParameterOptimizer, wide


class DiagonalOptimizer(PerParameterOptimizer):
    """Base of the optimizers that sample the diagonal of the Hessian at step 1 and every `update_every` steps.

    A parameter of which there is no sample yet gets one at its next step: a step with gradients of zero and without a
    rate, by which a checkpoint builds the state, takes none.

    A sample is z * (H z) with entries of z that are 1 or -1 with equal odds: its mean is the diagonal, exactly
    (Hutchinson). H z is the derivative of g.z, so that gradients need their graph: `backward(create_graph=True)`, or a
    `hessian_closure`, which is another computation, of a smaller batch perhaps. The graphs are freed by the step.

    The probes of a parameter come from `seed`, its number in the order in which parameters got their state, and its
    number of steps: a run continues with those that it would have had. Where steps are counted on the device they come
    from the device's default generator. Several processes average their samples, and draw equal probes.

    A subclass reads `_samples`, which has those of this step by the parameters' ids, in the dtype of the state.

    Args:
        hessian_closure: None, or a function that returns a loss with its graph and does not call backward. It is no
            part of the state.
        process_group: as for `secant.curvature.Hessian`.

    Attributes:
        hessian_closure, process_group: as given; they may be replaced.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **PerParameterOptimizer.OPTIONS,
        "update_every": _checks.integer_from(1),
        "seed": _checks.integer_from(0, 2**62),
    }
    SHARDS = False  # equal probes on several shards would be correlated

    hessian_closure: Callable[[], Any] | None = None
    process_group: Any = "auto"
    _samples: dict[int, Tensor]
    _sampled: set[int]  # parameters that are known to have had a sample
    _next: int | None = None  # the number that the next parameter gets; None: the state has to be asked

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        hessian_closure: Callable[[], Any] | None,
        process_group: Any,
        **options: Any,
    ) -> None:
        if hessian_closure is not None and not callable(hessian_closure):
            raise TypeError(
                f"{self._name}: hessian_closure: expected a function or None, got {_checks.show(hessian_closure)}"
            )
        self.hessian_closure, self.process_group = hessian_closure, process_group
        self._samples, self._sampled = {}, set()
        super().__init__(params, defaults, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._samples, self._sampled, self._next = {}, set(), None

    def _take(self, given: dict[str, Any]) -> None:
        super()._take(given)
        self._sampled, self._next = set(), None

    @property
    def is_second_order(self) -> bool:  # type: ignore[override]
        """Tell whether gradients need a graph, `backward(create_graph=True)`, at this step or a later one."""
        return self.hessian_closure is None

    @property
    def needs_graph(self) -> bool:
        """Tell whether the next step samples the diagonal from the graph of the gradients; others can do without."""
        if not self.is_second_order:
            return False
        members = [(p, group) for group in self.param_groups for p in group["params"] if p in self.state]
        return not members or any(group["capturable"] or self._is_next(p, group) for p, group in members)

    def _is_next(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Tell whether the next step of a parameter that has a state takes a sample."""
        return self._is_due(p, self.state[p]["step"].item() + 1, group)

    def _check_gradients(self) -> None:
        if not self.needs_graph:
            return
        due = [
            p.grad
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and (p not in self.state or group["capturable"] or self._is_next(p, group))
        ]
        if not due or any(g.requires_grad or g.layout is not torch.strided for g in due):
            return
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):  # else nothing moves, as in a checkpoint
            expected = "a graph, by backward(create_graph=True), or a hessian_closure"
            raise _checks.fail(self._name, "gradients", expected, "none with a graph")

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        super()._check_options(op, options)
        if options["capturable"] and options["update_every"] != 1:
            raise _checks.fail(op, "update_every", "1 where steps are counted on the device", options["update_every"])

    def _is_due(self, p: Tensor, t: Any, group: dict[str, Any]) -> bool:
        """Tell whether the t-th step of a parameter takes a sample."""
        return group["update_every"] == 1 or t % group["update_every"] == 1 or not self._has_sample(p)

    def _has_sample(self, p: Tensor) -> bool:
        if id(p) in self._sampled:
            return True
        if self.state[p]["hessian_step"].item() == 0:
            return False
        self._sampled.add(id(p))
        return True

    def _begin(self, batches: list[Batch]) -> None:
        self._samples = {}
        due = [
            (batch, [p for p, t in zip(batch.params, batch.counts, strict=True) if self._is_due(p, t, batch.group)])
            for batch in batches
        ]
        due = [(batch, params) for batch, params in due if params]
        if due:
            self._sample(due)
        if self.is_second_order:
            for p in (p for group in self.param_groups for p in group["params"]):
                if p.grad is not None and p.grad.requires_grad:
                    p.grad = p.grad.detach()  # or the graph, which leads to p, would stay with it

    def _sample(self, due: list[tuple[Batch, list[Tensor]]]) -> None:
        """Fill `_samples` for these parameters."""
        params = [p for _, members in due for p in members]
        gradients = self._gradients(params)
        if gradients is None:
            return
        probes = [z for batch, members in due for z in self._probes(batch, members)]
        with torch.enable_grad():
            graphs = [(g, z) for g, z in zip(gradients, probes, strict=True) if g is not None and g.requires_grad]
            outputs, along = zip(*graphs, strict=True)
            products = torch.autograd.grad(outputs, params, along, allow_unused=True)
        negated = {id(p) for batch, members in due if batch.group["maximize"] for p in members}
        for p, z, product in zip(params, probes, products, strict=True):
            found = torch.zeros_like(z) if product is None else z * product  # of whatever the loss is linear in
            self._samples[id(p)] = (-found if id(p) in negated else found).to(wide(p.dtype))
        self._average()

    def _gradients(self, params: list[Tensor]) -> list[Tensor | None] | None:
        """Find gradients with their graphs; None where none has one."""
        gradients: list[Tensor | None] = [p.grad for p in params]
        if self.hessian_closure is not None:
            with torch.enable_grad():
                loss = self.hessian_closure()
                if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
                    expected = "it to return a loss with its graph, and not to call backward"
                    raise TypeError(f"{self._name}: hessian_closure: expected {expected}, got {_checks.describe(loss)}")
                gradients = list(torch.autograd.grad(loss, params, create_graph=True, allow_unused=True))
        return gradients if any(g is not None and g.requires_grad for g in gradients) else None

    def _probes(self, batch: Batch, params: list[Tensor]) -> list[Tensor]:
        """Draw signs in the shapes of parameters, of each from its own number and step: groups do not matter."""
        probes = []
        for p in params:
            generator = None
            if not batch.group["capturable"]:
                state = self.state[p]
                seed = mixed(batch.group["seed"], int(state["probe"].item()), int(state["step"].item()))
                generator = torch.Generator(p.device).manual_seed(seed)
            probes.append(rademacher(1, p.numel(), p.dtype, p.device, generator).view(p.shape))  # type: ignore[arg-type]
        return probes

    def _zero_counts(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Make what is counted for a parameter: samples, and its number among those that have a state."""
        if self._next is None:
            self._next = 1 + max(
                (int(state["probe"].item()) for state in self.state.values() if "probe" in state), default=-1
            )
        own, self._next = self._next, self._next + 1
        return {"hessian_step": self._zero_step(p, group), "probe": torch.tensor(own)}

    def _average(self) -> None:
        """Average the samples over the processes."""
        dist = torch.distributed
        if self.process_group is None or not dist.is_available() or not dist.is_initialized():
            return
        samples = list(self._samples.values())
        total = torch.cat([x.reshape(-1).double() for x in samples])
        mean_over_processes(total, self.process_group)
        for x, mean in zip(samples, total.split([x.numel() for x in samples]), strict=True):
            x.copy_(mean.view(x.shape))


def mixed(*numbers: int) -> int:
    """Make a seed of several numbers, all of whose bits count (the generator of a CPU looks at 32).

    References:
        Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014, Figure 16 (mix64variant13).
    """
    mask, x = 2**64 - 1, 0
    for number in numbers:
        x = (x + number + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x >> 2  # what a seed may be everywhere


def learn(average: Tensor, sample: Tensor, beta: float) -> None:
    """Take a sample into a running average, except where it is not finite."""
    average.lerp_(sample.where(sample.isfinite(), average), 1.0 - beta)
