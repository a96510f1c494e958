"""The problems of Hock and Schittkowski that have bounds and nothing else, in torch.

References:
    Hock and Schittkowski, Test examples for nonlinear programming codes, Lecture Notes in Economics and Mathematical
    Systems 187, Springer (1981); problems 1 to 5, 25, 38, 45 and 110.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant.benchmarks.mgh import gulf, vector

_INF = math.inf


class BoxProblem(NamedTuple):
    """Holds a problem: objective, start (which may be outside), bounds, minimum and a point that has it.

    minima: the global one first, then others at which methods end.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    start: Tensor
    lower: Tensor
    upper: Tensor
    minima: tuple[float, ...]
    solution: Tensor


def banana(x: Tensor) -> Tensor:
    """Compute problems 1 and 2."""
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def _second() -> tuple[float, float]:
    """Solve problem 2: where x_2 = 3/2 and the derivative by x_1 is zero; the point furthest right."""
    a = math.sqrt(598.0 / 1200.0)
    x = 2.0 * a * math.cos(math.acos(1.0 / (400.0 * a**3)) / 3.0)
    return x, 100.0 * (1.5 - x * x) ** 2 + (1.0 - x) ** 2


def flat_valley(x: Tensor) -> Tensor:
    """Compute problem 3."""
    return x[1] + 1e-5 * (x[1] - x[0]) ** 2


def cubic(x: Tensor) -> Tensor:
    """Compute problem 4."""
    return (x[0] + 1.0) ** 3 / 3.0 + x[1]


def sine(x: Tensor) -> Tensor:
    """Compute problem 5."""
    return torch.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1.0


def gulf_value(x: Tensor) -> Tensor:
    """Compute problem 25."""
    return gulf(x).square().sum()


def colville(x: Tensor) -> Tensor:
    """Compute problem 38."""
    a, b, c, d = x
    return (
        100.0 * (b - a * a) ** 2 + (1.0 - a) ** 2 + 90.0 * (d - c * c) ** 2 + (1.0 - c) ** 2
        + 10.1 * ((b - 1.0) ** 2 + (d - 1.0) ** 2) + 19.8 * (b - 1.0) * (d - 1.0)
    )  # fmt: skip


def product(x: Tensor) -> Tensor:
    """Compute problem 45."""
    return 2.0 - x.prod() / 120.0


def logarithms(x: Tensor) -> Tensor:
    """Compute problem 110."""
    return (torch.log(x - 2.0) ** 2 + torch.log(10.0 - x) ** 2).sum() - x.prod() ** 0.2


_TEN = torch.ones(10, dtype=torch.float64)
_X2, _F2 = _second()

#: The problems, in their order.
PROBLEMS: tuple[BoxProblem, ...] = (
    BoxProblem("hs1", banana, vector([-2, 1]), vector([-_INF, -1.5]), vector([_INF, _INF]), (0.0,), vector([1, 1])),
    BoxProblem(
        "hs2", banana, vector([-2, 1]), vector([-_INF, 1.5]), vector([_INF, _INF]), (_F2, 4.94122932),
        vector([_X2, 1.5]),
    ),
    BoxProblem("hs3", flat_valley, vector([10, 1]), vector([-_INF, 0]), vector([_INF, _INF]), (0.0,), vector([0, 0])),
    BoxProblem("hs4", cubic, vector([1.125, 0.125]), vector([1, 0]), vector([_INF, _INF]), (8 / 3,), vector([1, 0])),
    BoxProblem(
        "hs5", sine, vector([0, 0]), vector([-1.5, -3]), vector([4, 3]), (-math.sqrt(3.0) / 2.0 - math.pi / 3.0,),
        vector([0.5 - math.pi / 3.0, -0.5 - math.pi / 3.0]),
    ),
    BoxProblem(
        "hs25", gulf_value, vector([100, 12.5, 3]), vector([0.1, 0, 0]), vector([100, 25.6, 5]), (0.0, 32.835),
        vector([50, 25, 1.5]),
    ),
    BoxProblem(
        "hs38", colville, vector([-3, -1, -3, -1]), vector([-10] * 4), vector([10] * 4), (0.0,), vector([1] * 4)
    ),
    BoxProblem("hs45", product, vector([2] * 5), vector([0] * 5), vector(range(1, 6)), (1.0,), vector(range(1, 6))),
    BoxProblem(
        "hs110", logarithms, 9.0 * _TEN, 2.001 * _TEN, 9.999 * _TEN, (-45.77846970744627,), 9.350265833069384 * _TEN
    ),
)  # fmt: skip
