"""Sophia: momentum divided by a sampled diagonal of the Hessian, and clipped entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant.curvature import Fisher
from secant.optim._diagonal_optimizer import DiagonalOptimizer, learn, mixed
from secant.optim._per_parameter import BETAS, Batch, wide

#: Steps after which the lack of any curvature is an error, at least.
_LATE = 20
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


class Sophia(DiagonalOptimizer):
    """Divide momentum by a running average of samples of the Hessian's diagonal, and clip every entry at 1.

        m <- beta1 m + (1 - beta1) g,    h <- beta2 h + (1 - beta2) h~ every `update_every` steps,
        p <- (1 - lr w) p - lr clip(m / max(rho h, eps), -1, 1).

    Where h is small or negative an entry moves by lr times the sign of m. `estimator` says where h~ comes from:

    - "hutchinson" (Sophia-H): z * (H z) with z of random signs, from the graph of the gradients of that step
      (`loss.backward(create_graph=optimizer.needs_graph)`), or of the loss that `hessian_closure` returns.
    - "gnb" (Sophia-G, Gauss-Newton-Bartlett): the diagonal of the Gauss-Newton matrix, by labels drawn from the
      model. Either `hessian_closure` returns the outputs (logits), whose likelihood `likelihood` names, and h~ is the
      diagonal of `secant.curvature.Fisher`: the mean of the squared gradients of the single predictions. Or,
      as published, call backward on the mean loss of B predictions with such labels, `update_hessian(B)`, and
      `zero_grad()`, every `update_every` steps: h~ is then B times the square of that gradient, of equal mean and
      larger variance.

    The state is 2 times the memory of the parameters (in float32 for bfloat16 and float16 ones). On a digits
    autoencoder its tuned loss was behind that of AdamW.

    Args:
        params: parameters or groups, as for `torch.optim.Optimizer`.
        lr: a number >= 0 or a tensor of one element.
        betas: decay rates of m and h, in [0, 1).
        rho: gamma of the paper, a number > 0. None: .01 for "hutchinson", .05 for "gnb".
        eps: a number > 0.
        estimator, likelihood: see above.
        update_every: k; 1 in CUDA graphs.
        seed: of signs and labels, which also depend on the step, and on nothing else.
        weight_decay: w, decoupled.
        hessian_closure: see above; called without a call of backward in it. Not part of the state.
        process_group: "auto" to average h~ over the default group where there is one; a group; None for no average.
            (`update_hessian` takes gradients as they are, which DistributedDataParallel has averaged.)
        maximize, capturable: as for torch's Adam.

    Raises:
        TypeError, ValueError: a parameter or an option is not what it may be; at a step: no gradient has a graph, or
            2 k steps, and 20, have gone by without a call of `update_hessian`.

    References:
        Liu, Li, Hall, Liang, Ma, Sophia: a scalable stochastic second-order optimizer for language model pre-training,
        ICLR 2024 (arXiv 2305.14342): Algorithms 1 (Hutchinson), 2 (GNB) and 3.

    Example:
        >>> p = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = secant.optim.Sophia([p], lr=0.5, betas=(0.0, 0.0), rho=1.0)
        >>> (torch.tensor([2.0, 100.0]) * p**2 / 2).sum().backward(create_graph=True)
        >>> optimizer.step()
        >>> p.detach()                                          # half of Newton's step
        tensor([0.5000, 0.5000])
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **DiagonalOptimizer.OPTIONS,
        "betas": BETAS,
        "rho": _checks.or_none(_checks.positive_number()),
        "eps": _checks.positive_number(),
        "estimator": _checks.one_of("hutchinson", "gnb"),
        "likelihood": _checks.one_of(*LIKELIHOODS),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.96, 0.99),
        rho: float | None = None,
        *,
        eps: float = 1e-12,
        estimator: str = "hutchinson",
        likelihood: str = "categorical",
        update_every: int = 10,
        seed: int = 0,
        weight_decay: float = 0.0,
        hessian_closure: Callable[[], Any] | None = None,
        process_group: Any = "auto",
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "estimator": estimator,
            "likelihood": likelihood,
            "update_every": update_every,
            "seed": seed,
        }
        super().__init__(
            params,
            own,
            hessian_closure=hessian_closure,
            process_group=process_group,
            weight_decay=weight_decay,
            maximize=maximize,
            capturable=capturable,
        )

    @property
    def is_second_order(self) -> bool:  # type: ignore[override]
        """Tell whether gradients need a graph, at this step or a later one."""
        return super().is_second_order and self._estimator == "hutchinson"

    @property
    def _estimator(self) -> str:
        return self.param_groups[0]["estimator"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, of the estimator that the others have."""
        super().add_param_group(param_group)
        if self.param_groups[-1]["estimator"] != self._estimator:
            self.param_groups.pop()
            raise _checks.fail(self._name, "estimator", f"{self._estimator!r} in every group", "another")

    def _takes_shards(self, group: dict[str, Any]) -> bool:
        return group["estimator"] == "gnb"  # squares of gradients, unlike probes, may be of what a process has

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": self._zeros(p), "hessian": self._zeros(p), **self._zero_counts(p, group)}

    @torch._disable_dynamo
    @torch.no_grad()
    def update_hessian(self, batch_size: int) -> None:
        """Take the gradients, of a mean loss with labels drawn from the model, for a sample of the curvature.

        Args:
            batch_size: B, the number of predictions that the loss is the mean of, over all processes.

        Raises:
            ValueError: the estimator is another, or B is no positive integer.
        """
        if self._estimator != "gnb":
            raise _checks.fail(f"{self._name}.update_hessian", "estimator", "'gnb'", repr(self._estimator))
        size = _checks.integer(f"{self._name}.update_hessian", "batch_size", batch_size, 1)
        self._check_changes()
        for group in self.param_groups:
            for _, members in self._members(group):
                for p in members:
                    state = self._state_of(p, group)
                    sample = p.grad.to(wide(p.dtype)).square().mul_(size)  # type: ignore[union-attr]
                    learn(state["hessian"], sample, group["betas"][1])
                    state["hessian_step"] += 1

    def _check_gradients(self) -> None:
        super()._check_gradients()
        if self._estimator == "hutchinson" or self.hessian_closure is not None:
            return
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"] if p in self.state]
            late = max(_LATE, 2 * group["update_every"])
            if states and not group["capturable"] and all(_is_late(state, late) for state in states):
                expected = f"a call every {group['update_every']} steps, or a hessian_closure"
                raise _checks.fail(self._name, "update_hessian", expected, f"none in {late} steps")

    def _sample(self, due: list[tuple[Batch, list[Tensor]]]) -> None:
        if self._estimator == "hutchinson":
            super()._sample(due)
        elif self.hessian_closure is not None:
            params = [p for _, members in due for p in members]
            options = due[0][0].group
            steps = max(int(self.state[p]["step"].item()) for p in params)
            fisher = Fisher(
                self.hessian_closure,
                params,
                likelihood=options["likelihood"],
                seed=mixed(options["seed"], steps),
                process_group=self.process_group,
            )
            found = fisher.unflatten(fisher.diag().value)
            self._samples = {id(p): x.to(wide(p.dtype)) for p, x in zip(params, found, strict=True)}

    def _update(self, batch: Batch) -> None:
        group, averages, hessians = batch.group, batch.state("exp_avg"), batch.state("hessian")
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(averages, batch.grads, 1.0 - beta1)
        for p, state in zip(batch.params, batch.states, strict=True):
            if (sample := self._samples.get(id(p))) is not None:
                learn(state["hessian"], sample, beta2)
                state["hessian_step"] += 1

        rho = group["rho"] if group["rho"] is not None else 0.01 if group["estimator"] == "hutchinson" else 0.05
        scales = list(torch._foreach_mul(hessians, rho))
        torch._foreach_clamp_min_(scales, group["eps"])
        directions = list(torch._foreach_div(averages, scales))
        torch._foreach_clamp_max_(directions, 1.0)
        torch._foreach_clamp_min_(directions, -1.0)
        self._move(batch, directions)


def _is_late(state: dict[str, Tensor], late: int) -> bool:
    """Tell whether a parameter has moved for long, and nobody has told of its curvature."""
    return state["hessian_step"].item() == 0 and state["step"].item() >= late
