"""AdaHessian: Adam with the diagonal of the Hessian in place of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant.optim._diagonal_optimizer import DiagonalOptimizer, learn
from secant.optim._per_parameter import BETAS, Batch


class AdaHessian(DiagonalOptimizer):
    """Divide the average gradient by the root mean square of samples of the Hessian's diagonal.

        D = mean over a kernel of z * (H z),    z of random signs,
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) D^2,
        p <- (1 - lr w) p - lr clip(m^ / ((v^)^(k/2) + eps)),    m^, v^ corrected for their start at zero,

    where the mean is over the positions of each kernel of a convolution (dimensions 2 and up), and nothing elsewhere.
    Gradients need their graph, `loss.backward(create_graph=True)`, unless there is a `hessian_closure`. The clip, of
    every entry to [-`clip`, `clip`], is ours: the published method has none and divides by eps where the diagonal
    is zero, as it is for linear parts of a network with ReLU, which makes steps of 1e4 gradients. clip=None is as
    published. A sample with an entry that is not finite leaves that entry of v as it is.

    A step costs a second backward pass through the first. The state is at most 2 times the memory of the parameters (in
    float32 for bfloat16 and float16 ones); v of a convolution has one number a kernel. On a digits autoencoder its
    tuned loss was behind that of AdamW.

    Args:
        params: parameters or groups, as for `torch.optim.Optimizer`.
        lr: a number >= 0 or a tensor of one element.
        betas: decay rates of m and v, in [0, 1).
        eps: a number > 0.
        hessian_power: k, in [0, 1]; 0 is momentum alone.
        clip: None, or a number > 0.
        update_every: take a sample at step 1 and every so many steps; 1 in CUDA graphs. Between, v stays.
            `optimizer.needs_graph` tells before a backward pass whether the next step takes one.
        seed: of the signs, which also depend on the step, and on nothing else.
        weight_decay: w, decoupled.
        hessian_closure: None, or a function that returns a loss with its graph and does not call backward, from which D
            is taken; gradients need no graph then. With `torch.amp.GradScaler` it is needed, as the graph of a scaled
            loss has scaled curvature. Not part of the state.
        process_group: "auto" to average D over the default group where there is one; a group; None for no average.
        maximize, capturable: as for torch's Adam.

    Raises:
        TypeError, ValueError: a parameter or an option is not what it may be; at a step: no gradient has a graph.

    References:
        Yao et al., ADAHESSIAN: an adaptive second order optimizer for machine learning, AAAI 2021 (arXiv 2006.00719),
        Algorithm 1, with equations 7 (Hutchinson) and 9 (spatial averaging; signed, as there, where their program
        takes magnitudes).

    Example:
        >>> p = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = secant.optim.AdaHessian([p], lr=1.0, clip=None, eps=1e-12)
        >>> (torch.tensor([1.0, 100.0]) * p**2).sum().backward(create_graph=True)
        >>> optimizer.step()
        >>> p.detach()                                          # Newton's step: the Hessian is its diagonal
        tensor([0., 0.])
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **DiagonalOptimizer.OPTIONS,
        "betas": BETAS,
        "eps": _checks.positive_number(),
        "hessian_power": Option("a number in [0, 1]", lambda x: _checks.is_number(x, 0.0) and x <= 1.0),
        "clip": _checks.or_none(_checks.positive_number()),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        *,
        hessian_power: float = 1.0,
        clip: float | None = 0.1,
        update_every: int = 1,
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
            "eps": eps,
            "hessian_power": hessian_power,
            "clip": clip,
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

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        m = self._zeros(p)
        v = _over_kernels(m).clone() if p.dim() > 2 else torch.zeros_like(m)
        return {"exp_avg": m, "exp_hessian_sq": v, **self._zero_counts(p, group)}

    def _update(self, batch: Batch) -> None:
        group, averages, squares = batch.group, batch.state("exp_avg"), batch.state("exp_hessian_sq")
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(averages, batch.grads, 1.0 - beta1)
        for p, state in zip(batch.params, batch.states, strict=True):
            if (sample := self._samples.get(id(p))) is not None:
                learn(state["exp_hessian_sq"], _over_kernels(sample).square(), beta2)
                state["hessian_step"] += 1

        power = group["hessian_power"]
        roots = list(torch._foreach_div(squares, self._seen_weights(batch, beta2)))
        torch._foreach_pow_(roots, 0.5 * power)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(roots, batch.corrections(beta1))
        directions = [m / root for m, root in zip(averages, roots, strict=True)]  # of which some are one to a kernel
        if group["clip"] is not None:
            torch._foreach_clamp_max_(directions, group["clip"])
            torch._foreach_clamp_min_(directions, -group["clip"])
        self._move(batch, directions)

    @staticmethod
    def _seen_weights(batch: Batch, beta: float) -> list[Any]:
        """Compute 1 - beta^(number of samples), 1 before the first."""
        counts = batch.state("hessian_step")
        if batch.group["capturable"]:
            return [(1.0 - beta**t).where(t > 0, 1.0) for t in counts]
        return [1.0 - beta**t if t else 1.0 for t in (count.item() for count in counts)]


def _over_kernels(x: Tensor) -> Tensor:
    """Average over the positions of each kernel."""
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x
