"""Launchers of `cpu_step.cpp`, `cpu_newton_schulz.cpp` and `cpu_newton_root.cpp`: the contract on SIMD kernels."""

from __future__ import annotations

import torch
from secant.kernels._cpu_support import available as available
from secant.kernels._cpu_support import extension as _cpu
from secant.kernels.precond.contract import FIXED_RMS, GROWTH, SQUARINGS, Rule, Tensors, eps_of
from secant.kernels.precond.reference import coupled
from torch import Tensor

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: Shorter side of a matrix from which on its products are those of torch's BLAS.
_LARGE = 192


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for real CPU tensors."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    return None if dtype in _TYPES else f"tensors of float32, float64, bfloat16 and float16, not {dtype}"


def step(
    tensors: Tensors,
    layout: Tensor,
    lr: float | Tensor,
    rule: Rule,
    phases: int,
    skipped: Tensor,
    *,
    threads: int = 0,
) -> None:
    """See `reference.step`. `threads` overrides the choice by size (0), for benchmarks and tests."""
    params = tensors.params
    rate = (lr.data_ptr(), lr.dtype is torch.float64, 0.0) if isinstance(lr, Tensor) else (0, False, lr)
    _cpu.precond_step(
        _TYPES[params[0].dtype], tensors.exp_avg[0].dtype is torch.bfloat16, len(params),
        [x.data_ptr() for members in tensors for x in members], layout.data_ptr(), *rate,
        rule.beta1, rule.beta2, rule.beta_gram, eps_of(rule, params[0].dtype), rule.weight_decay, FIXED_RMS, rule.graft,
        rule.rotate, rule.maximize, phases, skipped.data_ptr(), threads,
    )  # fmt: skip


def newton_schulz(
    x: Tensor, steps: int, a: float, b: float, c: float, eps: float, out: Tensor, *, threads: int = 0
) -> None:
    """See `reference.newton_schulz`. `threads` overrides the choice by size (0), for benchmarks and tests."""
    batch, m, n = x.shape
    if min(m, n) >= _LARGE:
        for one, to in zip(x, out, strict=True):
            to.copy_(_large(one, steps, a, b, c, eps))
        return
    _cpu.precond_newton_schulz(_TYPES[x.dtype], batch, m, n, x.data_ptr(), steps, a, b, c, eps, out.data_ptr(), threads)


def newton_inv_root(
    a: Tensor, p: int, damping: float, steps: int, tolerance: float, out: Tensor, info: Tensor, *, threads: int = 0
) -> None:
    """See `reference.newton_inv_root`. `threads` overrides the choice by size (0), for benchmarks and tests."""
    batch, n, _ = a.shape
    if n >= _LARGE:
        for k, one in enumerate(a):
            y, info[k] = coupled(one if one.dtype is torch.float64 else one.float(), p, damping, steps, tolerance)
            out[k].copy_(y)
        return
    _cpu.precond_newton_root(
        _TYPES[a.dtype], batch, n, a.data_ptr(), p, steps, SQUARINGS, damping, tolerance, GROWTH, out.data_ptr(),
        info.data_ptr(), threads,
    )  # fmt: skip


def _large(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """Iterate one matrix by products of torch."""
    y = x if x.dtype is torch.float64 else x.float()
    tall = x.shape[0] > x.shape[1]
    y = y.mT if tall else y
    y = y / torch.linalg.vector_norm(y, dtype=torch.float64).clamp(min=eps).to(y.dtype)
    for _ in range(steps):
        gram = y @ y.mT
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.addmm(y, factor, y, beta=a)
    return y.mT if tall else y
