"""What the GPU backends of the `precond` family share: the iteration of matrices that are too large for a kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def large_newton_schulz(x: Tensor, steps: int, a: float, b: float, c: float, eps: float, out: Tensor) -> None:
    """Iterate matrices (B, m, n) by products of torch in the dtype of the arithmetic: see `reference`."""
    y = x if x.dtype is torch.float64 else x.float()
    tall = x.shape[1] > x.shape[2]
    y = y.mT if tall else y
    norm = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True, dtype=torch.float64)
    y = y / norm.clamp(min=eps).to(y.dtype)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    out.copy_(y.mT if tall else y)
