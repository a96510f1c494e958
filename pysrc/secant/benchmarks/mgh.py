"""The 35 problems of Moré, Garbow and Hillstrom: least-squares residuals in torch, with starts and known minima.

Each minimizes f(x) = sum_i r_i(x)^2. Minima are those of the paper and, where methods end at others, those too.

References:
    Moré, Garbow and Hillstrom, Testing unconstrained optimization software, ACM TOMS 7 (1981), section 3. In problem 11
    the formula is that of the authors' published code: the paper's has a misprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Residuals = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """Holds a problem: its number and name, residuals r (m,) of x (n,), start, minima of sum r^2, and solutions.

    minima: the global one first. solutions: minimizers in closed form, with the global minimum.
    """

    number: int
    name: str
    residuals: Residuals
    start: Tensor
    m: int
    minima: tuple[float, ...]
    solutions: tuple[Tensor, ...] = ()

    @property
    def n(self) -> int:
        """Give the number of variables."""
        return self.start.numel()

    def value(self, x: Tensor) -> Tensor:
        """Compute the sum of the squared residuals."""
        return self.residuals(x).square().sum()

    def box(self) -> tuple[Tensor, Tensor]:
        """Make bounds (ours, not of the paper) that cut the solution off.

        Every other variable, the first among them, has one half-way from the start to the solution.
        """
        (solution, *_) = self.solutions
        half = torch.where(torch.arange(self.n) % 2 == 0, (self.start + solution) / 2.0, math.nan)
        lower = torch.where(half < self.start, half, -math.inf)
        upper = torch.where(half > self.start, half, math.inf)
        return lower, upper

    def excess(self, value: float) -> float:
        """Return f - f* relative to max(1, |f*|), for the known minimum that is the nearest from below."""
        reached = [(value - f) / max(1.0, abs(f)) for f in self.minima]
        return min(reached, key=abs)


def vector(values: Sequence[float] | range) -> Tensor:
    """Make a float64 vector."""
    return torch.tensor([float(x) for x in values], dtype=torch.float64)


def counted(n: int, first: int = 1) -> Tensor:
    """Make the vector (first, ..., first + n - 1)."""
    return torch.arange(first, first + n, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    """Compute problems 1 and 21."""
    odd, even = x[0::2], x[1::2]
    return torch.stack([10.0 * (even - odd * odd), 1.0 - odd], 1).reshape(-1)


def freudenstein_roth(x: Tensor) -> Tensor:
    """Compute problem 2."""
    a, b = x
    return torch.stack([-13.0 + a + ((5.0 - b) * b - 2.0) * b, -29.0 + a + ((b + 1.0) * b - 14.0) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:
    """Compute problem 3."""
    a, b = x
    return torch.stack([1e4 * a * b - 1.0, torch.exp(-a) + torch.exp(-b) - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    """Compute problem 4."""
    a, b = x
    return torch.stack([a - 1e6, b - 2e-6, a * b - 2.0])


def beale(x: Tensor) -> Tensor:
    """Compute problem 5."""
    a, b = x
    return vector([1.5, 2.25, 2.625]) - a * (1.0 - torch.stack([b, b * b, b * b * b]))


def jennrich_sampson(x: Tensor) -> Tensor:
    """Compute problem 6, with m = 10."""
    i = counted(10)
    return 2.0 + 2.0 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


def helical_valley(x: Tensor) -> Tensor:
    """Compute problem 7; the angle of x_1 < 0, and of x_1 = 0 with the sign of x_2, in turns of [-1/4, 3/4]."""
    a, b, c = x
    turns = torch.atan2(b, a) / (2.0 * math.pi)
    turns = torch.where((a < 0) & (turns < 0), turns + 1.0, turns)
    return torch.stack([10.0 * (c - 10.0 * turns), 10.0 * (torch.sqrt(a * a + b * b) - 1.0), c])


_BARD = vector([0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39])


def bard(x: Tensor) -> Tensor:
    """Compute problem 8."""
    u = counted(15)
    v = 16.0 - u
    return _BARD - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


_GAUSSIAN = vector([0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989])


def gaussian(x: Tensor) -> Tensor:
    """Compute problem 9."""
    t = (8.0 - counted(15)) / 2.0
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2.0) - torch.cat([_GAUSSIAN, _GAUSSIAN[:-1].flip(0)])


_MEYER = vector(
    [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]
)  # fmt: skip


def meyer(x: Tensor) -> Tensor:
    """Compute problem 10."""
    return x[0] * torch.exp(x[1] / (45.0 + 5.0 * counted(16) + x[2])) - _MEYER


def gulf(x: Tensor) -> Tensor:
    """Compute problem 11, with m = 99."""
    t = counted(99) / 100.0
    y = 25.0 + (-50.0 * torch.log(t)) ** (2.0 / 3.0)
    return torch.exp(-((y - x[1]).abs() ** x[2]) / x[0]) - t


def box_three_dimensional(x: Tensor) -> Tensor:
    """Compute problem 12, with m = 10."""
    t = 0.1 * counted(10)
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10.0 * t))


def powell_singular(x: Tensor) -> Tensor:
    """Compute problems 13 and 22."""
    a, b, c, d = x.view(-1, 4).unbind(1)
    parts = [a + 10.0 * b, math.sqrt(5.0) * (c - d), (b - 2.0 * c) ** 2, math.sqrt(10.0) * (a - d) ** 2]
    return torch.stack(parts, 1).reshape(-1)


def wood(x: Tensor) -> Tensor:
    """Compute problem 14."""
    a, b, c, d = x
    root = math.sqrt(10.0)
    return torch.stack(
        [10.0 * (b - a * a), 1.0 - a, math.sqrt(90.0) * (d - c * c), 1.0 - c, root * (b + d - 2.0), (b - d) / root]
    )


_KOWALIK = vector([0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246])
_KOWALIK_U = vector([4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])


def kowalik_osborne(x: Tensor) -> Tensor:
    """Compute problem 15."""
    u = _KOWALIK_U
    return _KOWALIK - x[0] * (u * u + u * x[1]) / (u * u + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:
    """Compute problem 16, with m = 20."""
    t = counted(20) / 5.0
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


_OSBORNE_1 = vector([
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
    0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411,
    0.406,
])  # fmt: skip


def osborne_1(x: Tensor) -> Tensor:
    """Compute problem 17."""
    t = 10.0 * counted(33, 0)
    return _OSBORNE_1 - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def biggs_exp6(x: Tensor) -> Tensor:
    """Compute problem 18, with m = 13."""
    t = 0.1 * counted(13)
    y = torch.exp(-t) - 5.0 * torch.exp(-10.0 * t) + 3.0 * torch.exp(-4.0 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


_OSBORNE_2 = vector([
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
    0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
    0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098,
    0.054,
])  # fmt: skip


def osborne_2(x: Tensor) -> Tensor:
    """Compute problem 19."""
    t = counted(65, 0) / 10.0
    peaks = x[1:4, None] * torch.exp(-((t - x[8:, None]) ** 2) * x[5:8, None])
    return _OSBORNE_2 - (x[0] * torch.exp(-t * x[4]) + peaks.sum(0))


def watson(x: Tensor) -> Tensor:
    """Compute problem 20."""
    powers = (counted(29) / 29.0)[:, None] ** counted(x.numel(), 0)
    slope = powers[:, :-1] @ (counted(x.numel() - 1) * x[1:])
    return torch.cat([slope - (powers @ x) ** 2 - 1.0, x[:1], x[1:2] - x[:1] ** 2 - 1.0])


def penalty_1(x: Tensor) -> Tensor:
    """Compute problem 23."""
    return torch.cat([math.sqrt(1e-5) * (x - 1.0), (x @ x)[None] - 0.25])


def penalty_2(x: Tensor) -> Tensor:
    """Compute problem 24."""
    n, root = x.numel(), math.sqrt(1e-5)
    i, e = counted(n - 1, 2), torch.exp(x / 10.0)
    y = torch.exp(i / 10.0) + torch.exp((i - 1.0) / 10.0)
    last = (counted(n).flip(0) * x * x).sum()[None] - 1.0
    return torch.cat([x[:1] - 0.2, root * (e[1:] + e[:-1] - y), root * (e[1:] - math.exp(-0.1)), last])


def variably_dimensioned(x: Tensor) -> Tensor:
    """Compute problem 25."""
    total = (counted(x.numel()) * (x - 1.0)).sum()[None]
    return torch.cat([x - 1.0, total, total * total])


def trigonometric(x: Tensor) -> Tensor:
    """Compute problem 26."""
    cosines = torch.cos(x)
    return x.numel() - cosines.sum() + counted(x.numel()) * (1.0 - cosines) - torch.sin(x)


def brown_almost_linear(x: Tensor) -> Tensor:
    """Compute problem 27."""
    return torch.cat([x[:-1] + x.sum() - (x.numel() + 1.0), x.prod()[None] - 1.0])


def discrete_boundary_value(x: Tensor) -> Tensor:
    """Compute problem 28."""
    h = 1.0 / (x.numel() + 1)
    t, zero = h * counted(x.numel()), x.new_zeros(1)
    return 2.0 * x - torch.cat([zero, x[:-1]]) - torch.cat([x[1:], zero]) + h * h * (x + t + 1.0) ** 3 / 2.0


def discrete_integral_equation(x: Tensor) -> Tensor:
    """Compute problem 29."""
    h = 1.0 / (x.numel() + 1)
    t = h * counted(x.numel())
    cubes = (x + t + 1.0) ** 3
    below = (t * cubes).cumsum(0)
    above = ((1.0 - t) * cubes).sum() - ((1.0 - t) * cubes).cumsum(0)
    return x + h * ((1.0 - t) * below + t * above) / 2.0


def broyden_tridiagonal(x: Tensor) -> Tensor:
    """Compute problem 30."""
    zero = x.new_zeros(1)
    return (3.0 - 2.0 * x) * x - torch.cat([zero, x[:-1]]) - 2.0 * torch.cat([x[1:], zero]) + 1.0


def broyden_banded(x: Tensor) -> Tensor:
    """Compute problem 31."""
    i = torch.arange(x.numel())
    apart = i[None, :] - i[:, None]
    band = ((apart >= -5) & (apart <= 1) & (apart != 0)).double()
    return x * (2.0 + 5.0 * x * x) + 1.0 - band @ (x * (1.0 + x))


def linear_full_rank(x: Tensor, m: int = 20) -> Tensor:
    """Compute problem 32."""
    common = -2.0 / m * x.sum() - 1.0
    return torch.cat([x + common, common.expand(m - x.numel())])


def linear_rank_1(x: Tensor, m: int = 20) -> Tensor:
    """Compute problem 33."""
    return counted(m) * (counted(x.numel()) @ x) - 1.0


def linear_rank_1_zeros(x: Tensor, m: int = 20) -> Tensor:
    """Compute problem 34."""
    inner = counted(x.numel() - 2, 2) @ x[1:-1]
    factors = counted(m, 0).clone()
    factors[-1] = 0.0
    return factors * inner - 1.0


def chebyquad(x: Tensor) -> Tensor:
    """Compute problem 35: means of the shifted Chebyshev polynomials less their integrals."""
    y = 2.0 * x - 1.0
    before, now, rows = torch.ones_like(y), y, []
    for i in range(1, x.numel() + 1):
        rows.append(now.mean() + (1.0 / (i * i - 1.0) if i % 2 == 0 else 0.0))
        before, now = now, 2.0 * y * now - before
    return torch.stack(rows)


def _grid(n: int) -> Tensor:
    t = counted(n) / (n + 1.0)
    return t * (t - 1.0)


def _rank_1(m: int) -> float:
    return m * (m - 1) / (2.0 * (2 * m + 1))


def _rank_1_zeros(m: int) -> float:
    return (m * m + 3 * m - 6) / (2.0 * (2 * m - 3))


def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


_M = 20  # rows of the linear problems

#: The problems, in the order of the paper; where n is free it is 10, or what the line says.
PROBLEMS: tuple[Problem, ...] = (
    Problem(1, "rosenbrock", rosenbrock, vector([-1.2, 1]), 2, (0.0,), (_ones(2),)),
    Problem(2, "freudenstein and roth", freudenstein_roth, vector([0.5, -2]), 2, (0.0, 48.98425), (vector([5, 4]),)),
    Problem(3, "powell badly scaled", powell_badly_scaled, vector([0, 1]), 2, (0.0,)),
    Problem(4, "brown badly scaled", brown_badly_scaled, _ones(2), 3, (0.0,), (vector([1e6, 2e-6]),)),
    Problem(5, "beale", beale, _ones(2), 3, (0.0,), (vector([3, 0.5]),)),
    Problem(6, "jennrich and sampson", jennrich_sampson, vector([0.3, 0.4]), 10, (124.362182,)),
    Problem(7, "helical valley", helical_valley, vector([-1, 0, 0]), 3, (0.0,), (vector([1, 0, 0]),)),
    Problem(8, "bard", bard, _ones(3), 15, (8.21487731e-3, 17.4286933)),
    Problem(9, "gaussian", gaussian, vector([0.4, 1, 0]), 15, (1.12793277e-8,)),
    Problem(10, "meyer", meyer, vector([0.02, 4000, 250]), 16, (87.9458552,)),
    Problem(11, "gulf", gulf, vector([5, 2.5, 0.15]), 99, (0.0,), (vector([50, 25, 1.5]),)),
    Problem(
        12, "box three-dimensional", box_three_dimensional, vector([0, 10, 20]), 10, (0.0,),
        (vector([1, 10, 1]), vector([10, 1, -1]), vector([2, 2, 0])),
    ),
    Problem(13, "powell singular", powell_singular, vector([3, -1, 0, 1]), 4, (0.0,), (0.0 * _ones(4),)),
    Problem(14, "wood", wood, vector([-3, -1, -3, -1]), 6, (0.0,), (_ones(4),)),
    Problem(
        15, "kowalik and osborne", kowalik_osborne, vector([0.25, 0.39, 0.415, 0.39]), 11, (3.07505604e-4, 1.02734e-3)
    ),
    Problem(16, "brown and dennis", brown_dennis, vector([25, 5, -5, -1]), 20, (85822.2016,)),
    Problem(17, "osborne 1", osborne_1, vector([0.5, 1.5, -1, 0.01, 0.02]), 33, (5.46489470e-5,)),
    Problem(
        18, "biggs exp6", biggs_exp6, vector([1, 2, 1, 1, 1, 1]), 13, (0.0, 5.65564992e-3),
        (vector([1, 10, 1, 5, 4, 3]),),
    ),
    Problem(
        19, "osborne 2", osborne_2, vector([1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5]), 65, (4.01377363e-2,)
    ),
    Problem(20, "watson", watson, 0.0 * _ones(9), 31, (1.39976014e-6,)),
    Problem(21, "extended rosenbrock", rosenbrock, vector([-1.2, 1] * 5), 10, (0.0,), (_ones(10),)),
    Problem(22, "extended powell singular", powell_singular, vector([3, -1, 0, 1] * 3), 12, (0.0,), (0.0 * _ones(12),)),
    Problem(23, "penalty i", penalty_1, counted(10), 11, (7.08765147e-5,)),
    Problem(24, "penalty ii", penalty_2, 0.5 * _ones(10), 20, (2.93660537e-4,)),
    Problem(25, "variably dimensioned", variably_dimensioned, 1.0 - counted(10) / 10.0, 12, (0.0,), (_ones(10),)),
    Problem(26, "trigonometric", trigonometric, 0.1 * _ones(10), 10, (0.0, 2.79505612e-5), (0.0 * _ones(10),)),
    Problem(27, "brown almost-linear", brown_almost_linear, 0.5 * _ones(10), 10, (0.0, 1.0), (_ones(10),)),
    Problem(28, "discrete boundary value", discrete_boundary_value, _grid(10), 10, (0.0,)),
    Problem(29, "discrete integral equation", discrete_integral_equation, _grid(10), 10, (0.0,)),
    Problem(30, "broyden tridiagonal", broyden_tridiagonal, -_ones(10), 10, (0.0,)),
    Problem(31, "broyden banded", broyden_banded, -_ones(10), 10, (0.0,)),
    Problem(32, "linear, full rank", linear_full_rank, _ones(10), _M, (_M - 10.0,), (-_ones(10),)),
    Problem(33, "linear, rank 1", linear_rank_1, _ones(10), _M, (_rank_1(_M),)),
    Problem(34, "linear, rank 1 with zeros", linear_rank_1_zeros, _ones(10), _M, (_rank_1_zeros(_M),)),
    Problem(35, "chebyquad", chebyquad, counted(8) / 9.0, 8, (3.51687373e-3,)),
)  # fmt: skip
