"""Muon: momentum made orthogonal, for matrices; Adam for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks, ops
from secant._checks import Option
from secant.ops.precond import MUON
from secant.optim import _per_parameter
from secant.optim._per_parameter import BETAS, Batch, PerParameterOptimizer

METHODS = ("auto", "muon", "adam")


def original(rows: int, columns: int) -> float:
    """Compute Jordan's factor, sqrt(max(1, rows / columns))."""
    return math.sqrt(max(1.0, rows / columns))


def match_rms_adamw(rows: int, columns: int) -> float:
    """Compute the factor that gives a step the root mean square that AdamW's has in practice, .2."""
    return 0.2 * math.sqrt(max(rows, columns))


ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {"original": original, "match_rms_adamw": match_rms_adamw}


class Muon(PerParameterOptimizer):
    """Orthogonalise the momentum of matrices by a Newton-Schulz iteration; take Adam's steps with everything else.

    For a matrix W with gradient G

        M <- mu M + (1 - mu) G,    N = (1 - mu) G + mu M  (Nesterov; else N = M),
        W <- (1 - lr w) W - lr a(W) O,    O = p(p(...p(N / |N|_F))),    p(X) = a X + b (X X^T) X + c (X X^T)^2 X,

    where five applications of p bring every singular value of N close to 1 (into about .7 to 1.2), and a(W) makes steps
    of matrices of different shapes comparable. A convolution counts as a matrix of its output channels. Here it is a
    baseline: on the matrices it is `torch.optim.Muon`, except that float32 matrices are iterated in float32 where torch
    takes bfloat16, and those of equal shapes together.

    Embeddings and the last layer are matrices by shape but are better left to Adam: give them a group with
    `method="adam"`. The state is 1 times the memory of the parameters that are matrices, and 2 times that of the others
    (in float32 for bfloat16 and float16 ones).

    Args:
        params: parameters or groups, as for `torch.optim.Optimizer`.
        lr: of the matrices, a number >= 0 or a tensor of one element.
        weight_decay: w, decoupled.
        momentum: mu, in [0, 1).
        nesterov: see above.
        ns_coefficients: (a, b, c). ns_steps: number of applications of p, 1 to 99. eps: least |N|_F.
        adjust_lr: a(W) for W of (rows, columns): "original", sqrt(max(1, rows / columns)), or "match_rms_adamw",
            .2 sqrt(max(rows, columns)), with which rates tuned for AdamW go over.
        method: of a group: "auto" (matrices by Muon, vectors by Adam), "muon" or "adam".
        adam_scale: Adam's learning rate relative to `lr`, so that one schedule moves both; the default is a heuristic.
        betas, adam_eps: Adam's.
        maximize, capturable: as for torch's Adam.

    Raises:
        TypeError, ValueError: a parameter or an option is not what it may be.

    References:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024
        (https://kellerjordan.github.io/posts/muon); Liu et al., Muon is scalable for LLM training, arXiv 2502.16982,
        equation 4 (match_rms_adamw).

    Example:
        >>> w, b = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> optimizer = secant.optim.Muon([w, b], lr=0.1, momentum=0.0, adam_scale=1.0)
        >>> w.grad, b.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([5.0, -0.01])
        >>> optimizer.step()
        >>> b.detach()                                      # Adam's first step: signs
        tensor([-0.1000,  0.1000])
        >>> bool(((-w.detach().diagonal() / 0.1 - 1.0).abs() < 0.35).all())     # 3 and 1 are both near 1
        True
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **PerParameterOptimizer.OPTIONS,
        "momentum": _checks.number_from(0.0, 1.0),
        "nesterov": _checks.flag(),
        "ns_coefficients": Option(
            "three finite numbers",
            lambda x: isinstance(x, (tuple, list)) and len(x) == 3 and all(map(_checks.is_number, x)),
        ),
        "ns_steps": _checks.integer_from(1, 99),
        "eps": _checks.positive_number(),
        "adjust_lr": _checks.one_of(*ADJUSTMENTS),
        "method": _checks.one_of(*METHODS),
        "adam_scale": _checks.number_from(0.0),
        "betas": BETAS,
        "adam_eps": _checks.positive_number(),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_coefficients: tuple[float, float, float] = MUON,
        ns_steps: int = 5,
        eps: float = 1e-7,
        adjust_lr: str = "original",
        method: str = "auto",
        adam_scale: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "eps": eps,
            "adjust_lr": adjust_lr,
            "method": method,
            "adam_scale": adam_scale,
            "betas": betas,
            "adam_eps": adam_eps,
        }
        super().__init__(params, own, weight_decay=weight_decay, maximize=maximize, capturable=capturable)

    def _check_parameter(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        super()._check_parameter(name, p, group)
        if group["method"] == "muon" and p.dim() < 2:
            raise _checks.fail(self._name, name, "a matrix in a group of method 'muon'", _checks.describe(p))

    def _kind(self, p: Tensor, group: dict[str, Any]) -> str:
        kind = _method(p, group)
        state = self.state.get(p)
        if state and ("momentum_buffer" in state) is not (kind == "muon"):
            expected = "what it was when the state of its parameters was built"
            raise _checks.fail(self._name, "method", expected, repr(group["method"]))
        return kind

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        names = ("momentum_buffer",) if _method(p, group) == "muon" else ("exp_avg", "exp_avg_sq")
        return {name: self._zeros(p) for name in names}

    def _update(self, batch: Batch) -> None:
        group = batch.group
        if batch.kind == "adam":
            averages = batch.state("exp_avg"), batch.state("exp_avg_sq")
            _per_parameter.moments(batch, *averages, group["betas"])
            directions = _per_parameter.adam(batch, *averages, group["betas"], group["adam_eps"])
            self._move(batch, directions, batch.lr * group["adam_scale"])
            return
        momentum, averages_of = group["momentum"], batch.state("momentum_buffer")
        torch._foreach_lerp_(averages_of, batch.grads, 1.0 - momentum)
        updates = torch._foreach_lerp(batch.grads, averages_of, momentum) if group["nesterov"] else averages_of
        self._move(batch, _orthogonalized(list(updates), group))


def _method(p: Tensor, group: dict[str, Any]) -> str:
    return "adam" if group["method"] == "adam" or p.dim() < 2 else "muon"


def _orthogonalized(updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Orthogonalise each as a matrix, those of one shape together, and scale it by its shape."""
    adjust = ADJUSTMENTS[group["adjust_lr"]]
    wholes = [_whole(x) for x in updates]
    found: list[Tensor] = [*wholes]
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, x in enumerate(wholes):
        if x.numel():
            shapes.setdefault((x.shape[0], x.shape[1:].numel()), []).append(i)
    for shape, members in shapes.items():
        stack = torch.stack([wholes[i].reshape(shape) for i in members])
        coefficients, eps = group["ns_coefficients"], group["eps"]
        orthogonal = ops.newton_schulz(stack, group["ns_steps"], coefficients=coefficients, eps=eps, out=stack)
        for i, x in zip(members, orthogonal.mul_(adjust(*shape)).unbind(), strict=True):
            found[i] = x.reshape(wholes[i].shape)
    return [_spread_as(x, y) for x, y in zip(found, updates, strict=True)]


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if _per_parameter.is_dtensor(x) else x  # type: ignore[attr-defined]


def _spread_as(x: Tensor, like: Tensor) -> Tensor:
    """Keep of a tensor, which every process has, what this one has of another."""
    if not _per_parameter.is_dtensor(like):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=like.placements  # type: ignore[attr-defined]
    )
