"""Launchers of `cpu.cpp`: the contract of `reference.py` on SIMD kernels. CPU tensors only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    from secant import _cpu
except ImportError as error:  # a source tree that was never built, or a SECANT_ISA that this machine has not
    _cpu = None
    _reason = f"the extension module secant._cpu cannot be imported: {error}"

_VECTORS = {torch.float32: 0, torch.float64: 1}
_RINGS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def available() -> str | None:
    """Return None when the extension is built, else why it cannot be imported."""
    return None if _cpu is not None else _reason


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for CPU tensors of float32 or float64."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    return None if dtype in _VECTORS else f"it computes in float32 or float64, got {dtype}"


def _exchange() -> bool:
    """Hand torch's DLPack table (2.10 and later) to the extension, which then reads a tensor in one C call."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return _cpu is not None and table is not None and _cpu.use_dlpack(table)


#: two_loop_plain(grad, s, y, out) -> bool: `two_loop` with gamma None and the checks of the public function. False, and
#: nothing done, unless the arguments are right and need no conversion. Tensors are of the very class torch.Tensor.
two_loop_plain = _cpu.lbfgs_two_loop_plain if _exchange() else None


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
        stats.data_ptr(), _address(grad), _address(s), _address(y), _address(y_prev), t_address, t_stride, t_value, tol,
        _address(out), _address(prev_out), threads,
    )  # fmt: skip
