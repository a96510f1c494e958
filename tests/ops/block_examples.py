"""Blocks for the tests of the public functions, and bounds that follow from their condition number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

F64 = torch.float64


def spd(*shape: int, n: int = 3, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """Symmetric positive definite blocks with eigenvalues from 1 to 10."""
    generator = torch.Generator().manual_seed(100 * seed + n)
    q, _ = torch.linalg.qr(torch.randn(*shape, n, n, generator=generator, dtype=F64))
    a = (q * torch.linspace(1, 10, n, dtype=F64)) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def general(*shape: int, n: int = 3, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """Blocks with singular values from 1 to 10, without symmetry."""
    generator = torch.Generator().manual_seed(100 * seed + n + 50)
    u, _ = torch.linalg.qr(torch.randn(*shape, n, n, generator=generator, dtype=F64))
    return (spd(*shape, n=n, seed=seed) @ u).to(dtype)


def indefinite(*shape: int, n: int = 3, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """Symmetric blocks with eigenvalues of both signs, distinct in magnitude."""
    generator = torch.Generator().manual_seed(100 * seed + n + 70)
    q, _ = torch.linalg.qr(torch.randn(*shape, n, n, generator=generator, dtype=F64))
    w = torch.linspace(0.3, 3, n, dtype=F64) * torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    a = (q * w) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def vectors(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1), dtype=F64).to(dtype)


def tolerance(n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Relative error of inverses and solutions of the blocks above, whose condition number is 10.

    LAPACK's ratio of 30 bounds ||I - A X|| by 30 n eps ||A|| ||X||, hence the error of X by 10 times that, relative to
    ||X||, and once more by 10 for an entry that is small against the norm.
    """
    eps = torch.finfo(dtype).eps if dtype in (torch.float32, F64) else torch.finfo(torch.float32).eps
    bound = 30 * n * eps * 10
    if dtype in (torch.bfloat16, torch.float16):
        bound += torch.finfo(dtype).eps
    return {"rtol": 10 * bound, "atol": bound}
