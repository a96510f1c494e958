"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secant import ops
from secant.optim._tiled import TiledOptimizer


class SOAP(TiledOptimizer):
    """Run Adam on each tile of a matrix in the eigenvectors of the Gram averages of its two sides.

    A parameter of two or more dimensions is a matrix, its first dimension by all others, cut evenly into tiles of at
    most `block_size` on each side. For each tile W with gradient G

        L <- beta_gram L + (1 - beta_gram) G G^T = Q_L D_L Q_L^T,      R <- likewise, of G^T G,
        M <- beta1 M + (1 - beta1) G,      G' = Q_L^T G Q_R,      M' = Q_L^T M Q_R,
        V <- beta2 V + (1 - beta2) G'^2,      W <- (1 - lr w) W - lr Q_L [M'^ / (sqrt(V^) + eps)] Q_R^T,

    with ^ for averages corrected for their start at zero. The eigenvectors, in the order of their eigenvalues, are
    found anew behind the steps 1, 2, 4, 8, ... and then every `precondition_frequency`, never of the gradient that they
    are applied to: in its own basis most of it is rounding, of which Adam makes steps as long as any. V stays as it is
    when they change (moving it to the new basis made training worse). Vectors and scalars take Adam's step.

    Where the paper's code skips the first step, for want of a basis, here it is Adam's; a new basis is exact, rather
    than one iteration of the QR algorithm.

    A step whose gradient is not finite leaves the tile as it is, parameter and state, and is counted in `skipped`.

    The state is 4 + (n + 1) / n times the memory of matrices that are cut into tiles of n, which at n = 64 is
    5.01562 times the memory of the parameters (in float32 for bfloat16 and float16 ones): two moments, the
    eigenvectors, and one half of each Gram average. It is half of it with `state_dtype=torch.bfloat16`, and 2 times the
    memory of vectors.

    Args:
        params: parameters or groups, as for `torch.optim.Optimizer`.
        lr: a number >= 0 or a tensor of one element.
        betas: decay rates of M and V, in [0, 1).
        beta_gram: of L and R, in [0, 1).
        eps: a number > 0.
        weight_decay: w, decoupled.
        block_size: n, or None: whole sides.
        max_side: sides that are longer are cut even then.
        one_sided: turn only the shorter side of each tile, the right one of squares.
        precondition_frequency: see above.
        distribute: share the matrices of a refresh out over the processes of the default group, by cost, n^3 each, and
            gather what each finds in one exchange: all have to refresh the same parameters at the same steps, with
            equal gradients, as they do under DistributedDataParallel. Steps are not shared: see docs/stochastic.md.
            Without a process group it changes nothing.
        state_dtype: of the state: None, or torch.bfloat16.
        maximize, capturable: as for torch's Adam. A CUDA graph holds a step without a refresh: call `refresh` between
            replays.

    Raises:
        TypeError, ValueError: a parameter or an option is not what it may be.

    References:
        Vyas et al., SOAP: improving and stabilizing Shampoo using Adam, arXiv 2409.11321, Algorithm 3.

    Example:
        >>> w = torch.zeros(2, 2, requires_grad=True)
        >>> optimizer = secant.optim.SOAP([w], lr=0.1)
        >>> w.grad = torch.tensor([[3.0, 4.0], [4.0, -3.0]])
        >>> optimizer.step()
        >>> w.detach()                                  # the first step is Adam's
        tensor([[-0.1000, -0.1000],
                [-0.1000,  0.1000]])
    """

    ROTATE = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        beta_gram: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        block_size: int | None = 64,
        max_side: int = 1024,
        one_sided: bool = False,
        precondition_frequency: int = 20,
        distribute: bool = False,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "beta_gram": beta_gram,
            "eps": eps,
            "block_size": block_size,
            "max_side": max_side,
            "one_sided": one_sided,
            "precondition_frequency": precondition_frequency,
            "distribute": distribute,
            "state_dtype": state_dtype,
        }
        super().__init__(params, own, weight_decay=weight_decay, maximize=maximize, capturable=capturable)

    def _refresh(self, tiles: ops.Tiles, group: dict[str, Any]) -> None:
        tiles.refresh_basis(process_group=self._process_group(group))
