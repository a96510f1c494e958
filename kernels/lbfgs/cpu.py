"""Launchers of `cpu.cpp`: the contract of `reference.py` on SIMD kernels. CPU tensors only."""

from __future__ import annotations

import math

import torch
from secant.kernels._cpu_support import address, shortcut
from secant.kernels._cpu_support import available as available
from secant.kernels._cpu_support import extension as _cpu
from torch import Tensor

_VECTORS = {torch.float32: 0, torch.float64: 1}
_RINGS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for CPU tensors of float32 or float64."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    return None if dtype in _VECTORS else f"it computes in float32 or float64, got {dtype}"


#: two_loop_plain(grad, s, y, out) -> bool: `two_loop` with gamma None and the checks of the public function.
two_loop_plain = shortcut("lbfgs_two_loop_plain")


def two_loop(
    grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor, *, panel: int = 0, threads: int = 0
) -> None:
    """See `reference.two_loop`. `panel` and `threads` override the choice by size (0), for benchmarks and tests."""
    *batch, m, n = s.shape
    s_stride, y_stride = s.stride(), y.stride()
    _cpu.lbfgs_two_loop(
        _VECTORS[grad.dtype], _RINGS[s.dtype], batch[0] if batch else 1, m, n,
        grad.data_ptr(), s.data_ptr(), s_stride[0], s_stride[-2], y.data_ptr(), y_stride[0], y_stride[-2],
        math.nan if gamma is None else gamma, out.data_ptr(), panel, threads,
    )  # fmt: skip


def update(
    s_ring: Tensor,
    y_ring: Tensor,
    sy: Tensor,
    yy: Tensor,
    head: Tensor,
    count: Tensor,
    stats: Tensor,
    grad: Tensor | None,
    s: Tensor | None,
    y: Tensor | None,
    y_prev: Tensor | None,
    t: float | Tensor,
    tol: float,
    out: Tensor | None,
    prev_out: Tensor | None,
    *,
    threads: int = 0,
) -> None:
    """See `reference.update`. `threads` overrides the choice by size (0), for benchmarks and tests."""
    batch, m, n = s_ring.shape
    vector = s if s is not None else grad
    assert vector is not None
    if isinstance(t, Tensor):
        t_address, t_stride, t_value = t.data_ptr(), int(t.numel() > 1), 0.0
    else:
        t_address, t_stride, t_value = 0, 0, t
    _cpu.lbfgs_update(
        _VECTORS[vector.dtype], _RINGS[s_ring.dtype], batch, m, n,
        s_ring.data_ptr(), y_ring.data_ptr(), sy.data_ptr(), yy.data_ptr(), head.data_ptr(), count.data_ptr(),
        stats.data_ptr(), address(grad), address(s), address(y), address(y_prev), t_address, t_stride, t_value, tol,
        address(out), address(prev_out), threads,
    )  # fmt: skip
