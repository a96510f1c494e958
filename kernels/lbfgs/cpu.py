"""Launchers of `cpu.cpp`: the contract of `reference.py` on SIMD kernels. CPU tensors only."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from secant.kernels._cpu_support import address, shortcut
from secant.kernels._cpu_support import available as available
from secant.kernels._cpu_support import extension as _cpu
from secant.kernels.lbfgs.contract import Dense, Pair, State
from torch import Tensor

_VECTORS = {torch.float32: 0, torch.float64: 1}
_RINGS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for CPU tensors of float32 or float64."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    return None if dtype in _VECTORS else f"it computes in float32 or float64, got {dtype}"


class _Processor(Protocol):
    @property
    def panel_bytes(self) -> int | None: ...
    @property
    def block(self) -> int: ...


def tune(processor: _Processor) -> None:
    """Take the choices for a processor, those of `secant.defaults`."""
    _cpu.lbfgs_tune(2**62 if processor.panel_bytes is None else processor.panel_bytes, processor.block)


#: Bytes of a ring from which on it lies in huge pages.
_HUGE = 16 << 20


def prepare(*rings: Tensor) -> None:
    """Choose the pages of rings that nobody has written yet."""
    for ring in rings:
        if ring.nbytes >= _HUGE:
            _cpu.lbfgs_use_huge_pages(ring.data_ptr(), ring.nbytes)


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


_DOTS, _SOLVE, _COMBINE = 1, 2, 4


def _update(
    state: State,
    pair: Pair | None,
    grad: Tensor | None,
    tol: float,
    out: Tensor | None,
    prev_out: Tensor | None,
    sums: tuple[int, int],
    phases: int,
    threads: int,
) -> None:
    s_ring = state.s
    batch, m, n = s_ring.shape
    t_address, t_stride, t_value = 0, 0, 1.0
    if pair is None:
        vector, s, y, y_prev = grad, 0, 0, 0
    else:
        vector = pair.s
        s, y, y_prev = pair.s.data_ptr(), pair.y.data_ptr(), address(pair.y_prev)
        if isinstance(pair.t, Tensor):
            t_address, t_stride = pair.t.data_ptr(), int(pair.t.numel() > 1)
        else:
            t_value = pair.t
    assert vector is not None
    _cpu.lbfgs_update(
        _VECTORS[vector.dtype], _RINGS[s_ring.dtype], batch, m, n, [x.data_ptr() for x in state],
        (address(grad), s, y, y_prev, address(out), address(prev_out)), sums,
        t_address, t_stride, t_value, tol, pair is not None, grad is not None, phases, threads,
    )  # fmt: skip


def update(
    state: State,
    pair: Pair | None,
    grad: Tensor | None,
    tol: float,
    out: Tensor | None,
    prev_out: Tensor | None,
    *,
    threads: int = 0,
) -> None:
    """See `reference.update`. `threads` overrides the choice by size (0), for benchmarks and tests."""
    _update(state, pair, grad, tol, out, prev_out, (0, 0), _DOTS | _SOLVE | _COMBINE, threads)


def dots(state: State, pair: Pair | None, grad: Tensor | None, out: Tensor) -> None:
    """See `reference.dots`."""
    _update(state, pair, grad, 0.0, None, None, (out.data_ptr(), 0), _DOTS, 0)


def solve(state: State, dots: Tensor, coefs: Tensor, tol: float, pair: bool, direction: bool) -> None:
    """See `reference.solve`."""
    batch, m, n = state.s.shape
    _cpu.lbfgs_update(
        0, 0, batch, m, n, [x.data_ptr() for x in state], (0,) * 6, (dots.data_ptr(), coefs.data_ptr()),
        0, 0, 1.0, tol, pair, direction, _SOLVE, 1,
    )  # fmt: skip


def combine(
    state: State,
    pair: Pair | None,
    grad: Tensor | None,
    coefs: Tensor,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """See `reference.combine`."""
    _update(state, pair, grad, 0.0, out, prev_out, (0, coefs.data_ptr()), _COMBINE, 0)


def dense_update(
    state: Dense,
    pair: Pair | None,
    grad: Tensor | None,
    tol: float,
    rule: int,
    out: Tensor | None,
    prev_out: Tensor | None,
    *,
    threads: int = 0,
) -> None:
    """See `reference.dense_update`. `threads` overrides the choice by size (0), for benchmarks and tests."""
    t_address, t_value, s, y, y_prev = 0, 1.0, 0, 0, 0
    if pair is not None:
        s, y, y_prev = pair.s.data_ptr(), pair.y.data_ptr(), address(pair.y_prev)
        if isinstance(pair.t, Tensor):
            t_address = pair.t.data_ptr()
        else:
            t_value = pair.t
    _cpu.lbfgs_dense_update(
        _VECTORS[state.h.dtype], state.pair.shape[-1], [x.data_ptr() for x in state],
        (0 if out is None else address(grad), s, y, y_prev, address(out), address(prev_out)),
        t_address, t_value, tol, rule, threads,
    )  # fmt: skip
