"""Launchers of the C++ kernels: the contract of `reference.py` on SIMD kernels. CPU tensors only.

`threads` overrides the number chosen by size (0), for benchmarks and tests.
"""

from __future__ import annotations

import torch
from secant.kernels._cpu_support import available as available
from secant.kernels._cpu_support import extension as _cpu
from torch import Tensor

#: Largest n of `eigh`, `abs_inv` and `inv_root`.
EIGEN_N = 128

_ARITHMETIC = {torch.float32: 0, torch.float64: 1}
_HALF = (torch.bfloat16, torch.float16)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for CPU tensors of float32, float64, bfloat16 or float16."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    if dtype in _ARITHMETIC or dtype in _HALF:
        return None
    return f"it computes in float32 or float64, got {dtype}"


def _shift(value: float | Tensor | None) -> tuple[int, float]:
    """Address of one number per block, or 0 and the number for all."""
    if isinstance(value, Tensor):
        return value.data_ptr(), 0.0
    return 0, 0.0 if value is None else value


def _wide(x: Tensor) -> Tensor:
    """`x` itself, or in float32 when it is of half precision; blocks that are repeated in memory stay so."""
    if x.dtype not in _HALF:
        return x
    return x[:1].float().expand(x.shape) if x.stride(0) == 0 else x.float()


def inv(
    a: Tensor,
    damping: float | Tensor | None,
    scaled: bool,
    spd: bool,
    out: Tensor,
    info: Tensor,
    *,
    threads: int = 0,
) -> None:
    """See `reference.inv`."""
    if a.dtype in _HALF:
        wide = torch.empty(a.shape, dtype=torch.float32)
        inv(_wide(a), damping, scaled, spd, wide, info, threads=threads)
        out.copy_(wide)
        return
    address, value = _shift(damping)
    _cpu.blocks_inv(
        _ARITHMETIC[a.dtype], a.shape[0], a.shape[1], a.data_ptr(), a.stride(0), address, value,
        scaled and damping is not None, spd, out.data_ptr(), info.data_ptr(), threads,
    )  # fmt: skip


def solve(
    a: Tensor,
    b: Tensor,
    damping: float | Tensor | None,
    scaled: bool,
    spd: bool,
    out: Tensor,
    info: Tensor,
    *,
    threads: int = 0,
) -> None:
    """See `reference.solve`."""
    if a.dtype in _HALF:
        wide = torch.empty(b.shape, dtype=torch.float32)
        solve(_wide(a), _wide(b), damping, scaled, spd, wide, info, threads=threads)
        out.copy_(wide)
        return
    address, value = _shift(damping)
    _cpu.blocks_solve(
        _ARITHMETIC[a.dtype], a.shape[0], a.shape[1], b.shape[2], a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0),
        address, value, scaled and damping is not None, spd, out.data_ptr(), info.data_ptr(), threads,
    )  # fmt: skip


def _given(basis: Tensor | None) -> tuple[int, int]:
    """Address of the first matrix and the stride to the next one, or zeros."""
    return (0, 0) if basis is None else (basis.data_ptr(), basis.stride(0))


def eigh(
    a: Tensor, values: Tensor, vectors: Tensor, info: Tensor, basis: Tensor | None = None, *, threads: int = 0
) -> None:
    """See `reference.eigh`."""
    if a.dtype in _HALF:
        w, v = torch.empty(values.shape, dtype=torch.float32), torch.empty(a.shape, dtype=torch.float32)
        eigh(_wide(a), w, v, info, threads=threads)  # a basis of half precision is orthonormal to half precision
        values.copy_(w)
        vectors.copy_(v)
        return
    _cpu.blocks_eigh(
        _ARITHMETIC[a.dtype], a.shape[0], a.shape[1], a.data_ptr(), a.stride(0), values.data_ptr(), vectors.data_ptr(),
        info.data_ptr(), *_given(basis), threads,
    )  # fmt: skip


def _function(
    a: Tensor,
    root: int,
    shift: float | Tensor | None,
    scaled: bool,
    clamped: bool,
    out: Tensor,
    info: Tensor,
    basis: Tensor | None,
    threads: int,
) -> None:
    if a.dtype in _HALF:
        wide = torch.empty(a.shape, dtype=torch.float32)
        _function(_wide(a), root, shift, scaled, clamped, wide, info, None, threads)
        out.copy_(wide)
        return
    address, value = _shift(shift)
    _cpu.blocks_function(
        _ARITHMETIC[a.dtype], root, a.shape[0], a.shape[1], a.data_ptr(), a.stride(0), address, value,
        scaled and shift is not None, clamped, out.data_ptr(), info.data_ptr(), *_given(basis), threads,
    )  # fmt: skip


def abs_inv(
    a: Tensor, floor: float | Tensor, out: Tensor, info: Tensor, basis: Tensor | None = None, *, threads: int = 0
) -> None:
    """See `reference.abs_inv`."""
    _function(a, 0, floor, False, False, out, info, basis, threads)


def inv_root(
    a: Tensor,
    p: int,
    damping: float | Tensor | None,
    scaled: bool,
    out: Tensor,
    info: Tensor,
    clamped: bool = False,
    basis: Tensor | None = None,
    *,
    threads: int = 0,
) -> None:
    """See `reference.inv_root`."""
    _function(a, p, damping, scaled, clamped, out, info, basis, threads)
