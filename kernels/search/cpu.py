"""Launchers of `cpu.cpp`: the contract of `reference.py` on SIMD kernels. CPU tensors only."""

from __future__ import annotations

import torch
from secant.kernels._cpu_support import address
from secant.kernels._cpu_support import available as available
from secant.kernels._cpu_support import extension as _cpu
from secant.kernels.search.contract import Rule, Search
from torch import Tensor

_TYPES = {torch.float32: 0, torch.float64: 1}


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for CPU tensors of float32 or float64."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    return None if dtype in _TYPES else f"points of float32 or float64, not {dtype}"


def _state(search: Search, rows: Tensor | None) -> tuple[object, ...]:
    batch, n = search.x.shape
    addresses = [y.data_ptr() for y in search]
    return _TYPES[search.x.dtype], batch, n, addresses, address(rows), batch if rows is None else len(rows)


def _rule(rule: Rule) -> tuple[object, ...]:
    numbers = (rule.c1, rule.c2, rule.tolerance, rule.eps, rule.gtol, rule.ftol)
    return numbers, (rule.max_trials, rule.max_iter, rule.max_nfev)


def _scalars(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def advance(search: Search, value: Tensor, grad: Tensor, rows: Tensor | None, rule: Rule, *, threads: int = 0) -> None:
    """See `reference.advance`. `threads` overrides the choice by size (0), for benchmarks and tests."""
    _cpu.search_advance(*_state(search, rows), value.data_ptr(), grad.data_ptr(), *_rule(rule), threads)


def begin(
    search: Search,
    slope: Tensor,
    g_max: Tensor,
    t: Tensor | None,
    rows: Tensor | None,
    rule: Rule,
    *,
    threads: int = 0,
) -> None:
    """See `reference.begin`. `threads` overrides the choice by size (0), for benchmarks and tests."""
    scalars = (_scalars(x) for x in (slope, g_max, t))
    _cpu.search_begin(*_state(search, rows), *scalars, *_rule(rule), threads)
