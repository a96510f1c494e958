"""Randomised estimates of a diagonal and of a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant.ops import _gate

Rows = Callable[[Tensor], Tensor]
#: Probes multiplied together, so that a mini-batch whose graph is not kept is evaluated once for all of them.
_TOGETHER = 16


class Estimate(NamedTuple):
    """A random number with the right mean: its value, its estimated standard error, and the products it took."""

    value: float
    stderr: float
    num_probes: int

    def __float__(self) -> float:
        return self.value


class Diagonal(NamedTuple):
    """Estimated diagonal (n,), and the estimated standard error of each entry (n,)."""

    value: Tensor
    stderr: Tensor


def check_count(op: str, name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise unless `value` is an integer in the range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name}: expected an int, got {_gate.describe(value)}")
    if value < least or (most is not None and value > most):
        expected = f"an int >= {least}" if most is None else f"an int in [{least}, {most}]"
        raise _gate.fail(op, name, expected, value)


def rademacher(k: int, n: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """(k, n) independent entries, +1 or -1 with equal odds."""
    bits = torch.randint(0, 2, (k, n), device=device, generator=generator, dtype=torch.int8)
    return bits.to(dtype).mul_(2).sub_(1)


def _batches(count: int) -> list[int]:
    return [min(_TOGETHER, count - first) for first in range(0, count, _TOGETHER)]


def diagonal(
    rows: Rows, n: int, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Diagonal:
    """Mean of z * A z over Rademacher z."""
    total = torch.zeros(n, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    for k in _batches(count):
        z = rademacher(k, n, dtype, device, generator)
        found = (z * rows(z)).double()
        total += found.sum(0)
        squares += found.square().sum(0)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_(min=0.0)
    stderr = (variance / (count - 1)).sqrt() if count > 1 else torch.full_like(mean, torch.nan)
    return Diagonal(mean.to(dtype), stderr.to(dtype))


def _mean(samples: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(samples.mean()), float(samples.std() / len(samples) ** 0.5)


def hutchinson(
    rows: Rows, n: int, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Estimate:
    """Mean of z.A z over Rademacher z."""
    samples = []
    for k in _batches(count):
        z = rademacher(k, n, dtype, device, generator)
        samples.append((z * rows(z)).sum(1, dtype=torch.float64))
    return Estimate(*_mean(torch.cat(samples)), count)


def hutch_plus_plus(
    rows: Rows, n: int, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Estimate:
    """tr(Q^T A Q) + the mean of z.(I - Q Q^T) A (I - Q Q^T) z, Q an orthonormal basis of A S; a third each."""
    third = min(count // 3, n)
    sketch = rademacher(third, n, dtype, device, generator)
    q, _ = torch.linalg.qr(_in_batches(rows, sketch).T)
    exact = float((q.T * _in_batches(rows, q.T.contiguous())).sum(dtype=torch.float64))
    if third == n:
        return Estimate(exact, 0.0, 2 * third)
    samples = []
    remaining = count - 2 * third
    for k in _batches(remaining):
        z = rademacher(k, n, dtype, device, generator)
        z = z - (z @ q) @ q.T
        samples.append((z * rows(z)).sum(1, dtype=torch.float64))
    value, stderr = _mean(torch.cat(samples))
    return Estimate(exact + value, stderr, count)


def _in_batches(rows: Rows, vectors: Tensor) -> Tensor:
    return torch.cat([rows(part.contiguous()) for part in vectors.split(_TOGETHER)])
