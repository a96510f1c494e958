"""Shampoo: each matrix is preconditioned on both sides, tile by tile; Adam says how long the steps are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks, ops
from secant._checks import Option
from secant.ops.precond import GRAFTS, NONE
from secant.optim._tiled import TiledOptimizer


class Shampoo(TiledOptimizer):
    """Precondition the momentum of matrices by inverse roots of the Gram averages of both sides, and graft its length.

    A parameter of two or more dimensions is a matrix, its first dimension by all others, cut evenly into tiles of at
    most `block_size` on each side. For each tile W with gradient G

        L <- beta_gram L + (1 - beta_gram) G G^T,      R <- beta_gram R + (1 - beta_gram) G^T G,
        M <- beta1 M + (1 - beta1) G,      V <- beta2 V + (1 - beta2) G^2,
        P = L^^(-e) M^ R^^(-e),      W <- (1 - lr w) W - lr (|A| / |P|) P,      A = M^ / (sqrt(V^) + eps),

    with ^ for averages corrected for their start at zero, Frobenius norms, and roots of L^ + damping lambda_max(L^) I,
    its eigenvalues clamped at zero. The roots are found anew at the steps 1, 2, 4, 8, ... and then every
    `precondition_frequency`. Vectors and scalars take Adam's step A.

    With e = 1/2, the default, P is the step of a Kronecker product whose factors are optimal in the sense of Morwani et
    al.; 1/4 is the exponent of the paper. The default rates, of the averages too, the damping, and the graft of each
    tile to Adam are heuristics that were chosen on a small transformer and an autoencoder; a tile's length is Adam's,
    so that rates of AdamW are of the right order.

    The roots are found by way of eigenvalues or, with `root="newton"`, by products of matrices alone, which a GPU does
    best (`secant.ops.newton_inv_root`): lambda_max is then a norm that is larger by a factor of at most n^(1/64).

    A step whose gradient is not finite leaves the tile as it is, parameter and state, and is counted in `skipped`.

    The state is 4 + (n + 1) / n times the memory of matrices that are cut into tiles of n, which at n = 64 is
    5.01562 times the memory of the parameters (in float32 for bfloat16 and float16 ones): two moments, the roots, and
    one half of each Gram average. It is one less with the graft "rms", "sgd" or "none", and if only one side is
    preconditioned besides it is 2.50781 times the memory of the parameters; half of that with
    `state_dtype=torch.bfloat16`. It is 2 times the memory of vectors. No step has a temporary of the size of the model.

    Args:
        params: parameters or groups, as for `torch.optim.Optimizer`.
        lr: a number >= 0 or a tensor of one element.
        betas: decay rates of M and V, in [0, 1).
        beta_gram: of L and R, in [0, 1).
        eps: a number > 0, Adam's.
        weight_decay: w, decoupled.
        exponent: e, of each side: 1/2, 1/4 or 1.
        damping: a number > 0, relative to the largest eigenvalue; for `root="newton"` at most 1e6.
        root: "eigh" or "newton", see above.
        block_size: n, or None: whole sides.
        max_side: sides that are longer are cut even then.
        one_sided: precondition only the shorter side of each tile, the right one of squares.
        precondition_frequency: see above.
        graft: whose length the step of a tile has: "adam", |A|; "sgd", |M^|; "rms", a root mean square of 0.2; "none",
            its own.
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
        Gupta, Koren, Singer, Shampoo: preconditioned stochastic tensor optimization, ICML 2018 (arXiv 1802.09568),
        Algorithm 1; Morwani et al., A new perspective on Shampoo's preconditioner, arXiv 2406.17748, section 3 (the
        exponent); Anil et al., Scalable second order optimization for deep learning, arXiv 2002.09018, sections 4 and 5
        (blocks and grafting) and Algorithm 2 (the iteration).

    Example:
        >>> w = torch.zeros(2, 2, requires_grad=True)
        >>> optimizer = secant.optim.Shampoo([w], lr=0.1)
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> optimizer.step()
        >>> w.detach()                              # L^(-1/2) G R^(-1/2) = G^(-1), as long as Adam's step
        tensor([[-0.0448,  0.0000],
                [ 0.0000, -0.1342]])
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **TiledOptimizer.OPTIONS,
        "exponent": Option("1/4, 1/2 or 1", lambda x: _checks.is_number(x) and x in (0.25, 0.5, 1.0)),
        "damping": _checks.positive_number(),
        "root": _checks.one_of("eigh", "newton"),
        "graft": _checks.one_of(*GRAFTS),
    }

    ROTATE = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        beta_gram: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        exponent: float = 0.5,
        damping: float = 1e-4,
        root: str = "eigh",
        block_size: int | None = 64,
        max_side: int = 1024,
        one_sided: bool = False,
        precondition_frequency: int = 20,
        graft: str = "adam",
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
            "exponent": exponent,
            "damping": damping,
            "root": root,
            "block_size": block_size,
            "max_side": max_side,
            "one_sided": one_sided,
            "precondition_frequency": precondition_frequency,
            "graft": graft,
            "distribute": distribute,
            "state_dtype": state_dtype,
        }
        super().__init__(params, own, weight_decay=weight_decay, maximize=maximize, capturable=capturable)

    def _graft(self, group: dict[str, Any]) -> int:
        return GRAFTS.index(group["graft"])

    def _refresh(self, tiles: ops.Tiles, group: dict[str, Any]) -> None:
        corrected = group["beta_gram"] if self._graft(group) == NONE else None  # a graft undoes it
        tiles.refresh(
            root=round(1 / group["exponent"]),
            damping=group["damping"],
            beta_gram=corrected,
            method=group["root"],
            process_group=self._process_group(group),
        )
