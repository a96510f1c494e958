"""Adam whose second moment is a matrix for each few neighbouring entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks, ops
from secant._checks import Option
from secant.optim import _per_parameter
from secant.optim._per_parameter import BETAS, Batch, PerParameterOptimizer


class BlockAdam(PerParameterOptimizer):
    """Precondition the average gradient by the inverse root of the second moment of blocks of consecutive entries.

    A parameter, flattened, is cut into blocks of n entries (all of it if it has fewer; zeros fill up the last). For
    each, with its gradient g and the averages m^ and V^ of g and g g^T, corrected for their start at zero,

        p <- (1 - lr w) p - lr R m^ / (sqrt(tr V^) + eps),    R = ((1 - damping) V / tr V + damping I / n)^(-1/2):

    V^(-1/2) m^ but for the damping, a share of the mean eigenvalue, and eps. With n = 1 that is Adam. The root R is
    found anew every `update_every` steps, and at steps 1, 2, 4, 8, ... before the first of these; in between it is the
    shape alone that is old, since tr V^ is of this step. A block that is zero, or whose root cannot be found, has
    R = I. The blocks know the correlations of entries that lie in one row of a matrix. That helps where inputs are
    correlated; it costs n times Adam's second moment, and it is not invariant to a permutation of the inputs.

    The state is 2 n + 1 times the memory of the parameters (in float32 for bfloat16 and float16 ones): at n = 16 it is
    33 times the memory of the parameters.

    Args:
        params: parameters or groups, as for `torch.optim.Optimizer`.
        lr: a number >= 0 or a tensor of one element.
        block_size: n, 1 to 64.
        betas: decay rates of m and V, in [0, 1).
        eps: a number > 0, as Adam's.
        damping: in (0, 1), relative to the mean eigenvalue.
        update_every: see above; 1 in CUDA graphs.
        weight_decay: w, decoupled.
        maximize, capturable: as for torch's Adam.

    Raises:
        TypeError, ValueError: a parameter or an option is not what it may be.

    References:
        Kingma and Ba, Adam, ICLR 2015, Algorithm 1; the full-matrix version, by blocks: Duchi, Hazan, Singer, Adaptive
        subgradient methods, JMLR 12 (2011), Figure 1; Ledoit and Wolf, J. Multivariate Anal. 88 (2004), equation 14
        (the form of the damping). The scale of an old root is a choice of our own.

    Example:
        >>> p = torch.zeros(2, requires_grad=True)
        >>> optimizer = secant.optim.BlockAdam([p], lr=0.1, block_size=2)
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> p.detach()                             # (g g^T)^(-1/2) g = g / |g|, where Adam has the signs
        tensor([-0.0602, -0.0802])
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **PerParameterOptimizer.OPTIONS,
        "block_size": _checks.integer_from(1, 64),
        "betas": BETAS,
        "eps": _checks.positive_number(),
        "damping": Option("a number in (0, 1)", lambda x: _checks.is_number(x, 0.0, 1.0) and x > 0.0),
        "update_every": _checks.integer_from(1),
    }
    SHARDS = False  # whose ends cut through blocks

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        block_size: int = 16,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        damping: float = 1e-2,
        update_every: int = 10,
        weight_decay: float = 0.0,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        own = {
            "lr": lr,
            "block_size": block_size,
            "betas": betas,
            "eps": eps,
            "damping": damping,
            "update_every": update_every,
        }
        super().__init__(params, own, weight_decay=weight_decay, maximize=maximize, capturable=capturable)

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        super()._check_options(op, options)
        if options["capturable"] and options["update_every"] != 1:
            raise _checks.fail(op, "update_every", "1 where steps are counted on the device", options["update_every"])

    def _kind(self, p: Tensor, group: dict[str, Any]) -> int:
        """Return the size of the parameter's blocks."""
        state, n = self.state.get(p), _size(p, group)
        if state and state["root"].shape[-1] != n:
            expected = "what it was when the state of its parameters was built"
            raise _checks.fail(self._name, "block_size", expected, group["block_size"])
        return n

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        n = _size(p, group)
        outer = torch.zeros(-(-p.numel() // n), n, n, dtype=_per_parameter.wide(p.dtype), device=p.device)
        return {"exp_avg": self._zeros(p), "exp_avg_outer": outer, "root": torch.zeros_like(outer)}

    def _update(self, batch: Batch) -> None:
        group, averages, outers = batch.group, batch.state("exp_avg"), batch.state("exp_avg_outer")
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(averages, batch.grads, 1.0 - beta1)
        torch._foreach_mul_(outers, beta2)
        for outer, g in zip(outers, batch.grads, strict=True):
            blocks = _cut(g, outer.shape[-1])
            outer.addcmul_(blocks.unsqueeze(2), blocks.unsqueeze(1), value=1.0 - beta2)
        traces = [outer.diagonal(dim1=-2, dim2=-1).sum(-1) for outer in outers]

        roots = batch.state("root")
        due = [i for i, t in enumerate(batch.counts) if _per_parameter.is_due(t, group["update_every"])]
        if due:
            found = _roots(torch.cat([outers[i] for i in due]), torch.cat([traces[i] for i in due]), group["damping"])
            torch._foreach_copy_([roots[i] for i in due], list(found.split([len(traces[i]) for i in due])))

        directions = []
        corrections = zip(batch.corrections(beta1), batch.corrections(beta2, 0.5), strict=True)
        for root, m, trace, (first, second) in zip(roots, averages, traces, corrections, strict=True):
            size = (trace.sqrt() / second + group["eps"]) * first
            blocks = torch.bmm(root, _cut(m, root.shape[-1]).unsqueeze(2)).squeeze(2).div_(size.unsqueeze(1))
            directions.append(blocks.reshape(-1)[: m.numel()].reshape(m.shape))
        self._move(batch, directions)


def _size(p: Tensor, group: dict[str, Any]) -> int:
    return max(1, min(group["block_size"], p.numel()))


def _cut(x: Tensor, n: int) -> Tensor:
    """Cut a tensor into rows of n entries, the last one filled up with zeros."""
    flat = x.reshape(-1)
    missing = -flat.numel() % n
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, n)


def _roots(outer: Tensor, trace: Tensor, damping: float) -> Tensor:
    """Compute R of each block, I where that is not possible."""
    n = outer.shape[-1]
    eye = torch.eye(n, dtype=outer.dtype, device=outer.device)
    weight = (1.0 - damping) / trace.where(trace > 0.0, 1.0)
    damped = torch.addcmul(eye * (damping / n), outer, weight[:, None, None])
    root, info = ops.block_inv_root(damped, 2)
    return root.where(((info == 0) & (trace > 0.0))[:, None, None], eye)
