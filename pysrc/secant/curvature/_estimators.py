"""Randomised estimates of a diagonal and of a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from secant import _checks

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


#: Of counts that have no other limit.
_MOST = 2**31 - 1


def brief(x: object) -> str:
    """Write a number as it is, unless that is long or refused (ints of more than 4,300 digits)."""
    if isinstance(x, int) and not isinstance(x, bool) and abs(x) >= 10**20:
        return "an int of more than 20 digits"
    return repr(x)


def check_count(op: str, name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise unless `value` is an integer in the range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name}: expected an int, got {_checks.describe(value)}")
    if not least <= value <= (_MOST if most is None else most):
        expected = f"an int >= {least}" if most is None else f"an int in [{least}, {most}]"
        if most is None and value > _MOST:
            expected = f"an int in [{least}, {_MOST}]"
        raise _checks.fail(op, name, expected, brief(value))


def rademacher(k: int, n: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """(k, n) independent entries, +1 or -1 with equal odds."""
    bits = torch.randint(0, 2, (k, n), device=device, generator=generator, dtype=torch.int8)
    return bits.to(dtype).mul_(2).sub_(1)


def check_seed(op: str, seed: int) -> None:
    """Raise unless torch takes it."""
    if not -(2**63) <= seed < 2**64:
        raise _checks.fail(op, "seed", "an int of 64 bits", brief(seed))


def check_distribution(op: str, distribution: object) -> None:
    """Raise unless it is a name of one."""
    if distribution not in ("rademacher", "normal"):
        raise _checks.fail(op, "distribution", "'rademacher' or 'normal'", brief(distribution))


#: (k, n) independent probes of mean 0 and variance 1.
Draw = Callable[[int], Tensor]


def draw(distribution: str, n: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Draw:
    """Draw rows of n, from "rademacher" or "normal"."""
    if distribution == "rademacher":
        return lambda k: rademacher(k, n, dtype, device, generator)
    return lambda k: torch.randn(k, n, dtype=dtype, device=device, generator=generator)


def _batches(count: int) -> Iterator[int]:
    return (min(_TOGETHER, count - first) for first in range(0, count, _TOGETHER))


def exact_diagonal(rows: Rows, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """e_i.A e_i for every i."""
    found = torch.empty(n, dtype=dtype, device=device)
    first = 0
    for k in _batches(n):
        places = torch.arange(k, device=device)
        unit = torch.zeros(k, n, dtype=dtype, device=device)
        unit[places, first + places] = 1
        found[first : first + k] = rows(unit)[places, first + places]
        first += k
    return found


def diagonal(rows: Rows, n: int, count: int, draw: Draw, device: torch.device) -> Diagonal:
    """Mean of z * A z over the probes z."""
    total = torch.zeros(n, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    for k in _batches(count):
        z = draw(k)
        found = (z * rows(z)).double()
        total += found.sum(0)
        squares += found.square().sum(0)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_(min=0.0)
    stderr = (variance / (count - 1)).sqrt() if count > 1 else torch.full_like(mean, torch.nan)
    return Diagonal(mean.to(z.dtype), stderr.to(z.dtype))


def _mean(samples: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(samples.mean()), float(samples.std() / len(samples) ** 0.5)


def hutchinson(rows: Rows, n: int, count: int, draw: Draw) -> Estimate:
    """Mean of z.A z over the probes z."""
    samples = []
    for k in _batches(count):
        z = draw(k)
        samples.append((z * rows(z)).sum(1, dtype=torch.float64))
    return Estimate(*_mean(torch.cat(samples)), count)


def hutch_plus_plus(rows: Rows, n: int, count: int, draw: Draw) -> Estimate:
    """tr(Q^T A Q) + the mean of z.(I - Q Q^T) A (I - Q Q^T) z, Q an orthonormal basis of A S; a third each."""
    third = min(count // 3, n)
    sketch = draw(third)
    q, _ = torch.linalg.qr(_in_batches(rows, sketch).T)
    exact = float((q.T * _in_batches(rows, q.T.contiguous())).sum(dtype=torch.float64))
    if third == n:
        return Estimate(exact, 0.0, 2 * third)
    samples = []
    remaining = count - 2 * third
    for k in _batches(remaining):
        z = draw(k)
        z = z - (z @ q) @ q.T
        samples.append((z * rows(z)).sum(1, dtype=torch.float64))
    value, stderr = _mean(torch.cat(samples))
    return Estimate(exact + value, stderr, count)


def _in_batches(rows: Rows, vectors: Tensor) -> Tensor:
    return torch.cat([rows(part.contiguous()) for part in vectors.split(_TOGETHER)])
