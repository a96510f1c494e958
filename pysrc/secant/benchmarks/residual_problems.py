"""Problems whose loss is half a squared sum of residuals: differential equations solved by networks, and a curve.

Residuals are written as a user would: the network is called, and differentiated by its inputs with
`torch.autograd.grad`. Points are drawn once, so that a problem is deterministic; what is learned is measured at others,
as |u - exact| / |exact| in the 2-norm.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

#: Points at which the error is measured.
TEST_POINTS = 5000

Function = Callable[[Tensor], Tensor]


def network(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Make a tanh network of these widths, with torch's initial weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(fan_in, fan_out, dtype=dtype)] + ([nn.Tanh()] if i < len(widths) - 2 else [])
    return nn.Sequential(*layers)


def derivatives(u: Tensor, x: Tensor) -> Tensor:
    """Return du/dx (n, d) for u (n,), row by row a function of x (n, d), with its graph."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def second_derivatives(first: Tensor, x: Tensor, count: int) -> Tensor:
    """Return (d^2 u / dx_1^2, ..., d^2 u / dx_count^2), (n, count), from the first derivatives."""
    return torch.stack([derivatives(first[:, i], x)[:, i] for i in range(count)], 1)


class ResidualProblem(abc.ABC):
    """A function to be learned: residuals of a model, and its error.

    Attributes:
        name: for tables. dimension: of the input. widths: of the network that it is made for.
    """

    name: str
    dimension: int
    widths: tuple[int, ...]

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        """Make the network."""
        return network(*self.widths, seed=seed, dtype=dtype)

    @abc.abstractmethod
    def exact(self, x: Tensor) -> Tensor:
        """Return the solution (n,) at x (n, d)."""

    @abc.abstractmethod
    def residuals(self, model: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Return the residuals r with their graph; the loss is 1/2 sum r^2, means being taken by factors in r."""

    def points(self) -> Tensor:
        """Draw the points (n, d) at which the error is measured, none of them one of the residuals'."""
        generator = torch.Generator().manual_seed(12345)
        return torch.rand(TEST_POINTS, self.dimension, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def error(self, model: Callable[[Tensor], Tensor]) -> float:
        """Return |u - exact| / |exact|, in double precision."""
        x = self.points()
        wanted = self.exact(x)
        parameter = next(iter(getattr(model, "parameters", lambda: ())()), x)
        found = model(x.to(parameter.device, parameter.dtype))[:, 0].to(x)
        return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


class Equation(ResidualProblem):
    """A linear differential equation on the unit cube, L u = f inside and u = exact on the boundary given.

    Residuals are (L u - f) / sqrt(n) at n points inside and weight (u - exact) / sqrt(m) at m of the boundary.

    Args:
        interior, boundary: how many points. seed: of their draw. dtype, device: of the points. weight: of the boundary.
    """

    #: Faces of the cube where u is given: (coordinate, value) each.
    faces: Sequence[tuple[int, float]]
    interior, boundary = 900, 120

    def __init__(
        self,
        interior: int | None = None,
        boundary: int | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        weight: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        d, n, m = self.dimension, interior or self.interior, boundary or self.boundary
        inside = torch.rand(n, d, generator=generator, dtype=torch.float64)
        outside = torch.rand(m, d, generator=generator, dtype=torch.float64)
        for i in range(m):
            coordinate, value = self.faces[i % len(self.faces)]
            outside[i, coordinate] = value
        self.inside, self.outside = inside.to(device, dtype), outside.to(device, dtype)
        self._f = self.right_hand_side(inside).to(self.inside)
        self._g = self.exact(outside).to(self.outside)
        self._scales = 1.0 / math.sqrt(n), weight / math.sqrt(m)

    @abc.abstractmethod
    def left_hand_side(self, u: Tensor, x: Tensor) -> Tensor:
        """Return L u (n,) of u (n,), a function of x (n, d)."""

    @abc.abstractmethod
    def right_hand_side(self, x: Tensor) -> Tensor:
        """Return f (n,) at x (n, d)."""

    def residuals(self, model: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the residuals inside, and those of the boundary."""
        x = self.inside.detach().requires_grad_()
        inside, outside = self._scales
        equation = self.left_hand_side(model(x)[:, 0], x) - self._f
        return inside * equation, outside * (model(self.outside)[:, 0] - self._g)


def _all_faces(dimension: int) -> list[tuple[int, float]]:
    return [(i, value) for i in range(dimension) for value in (0.0, 1.0)]


class Poisson2d(Equation):
    """u_xx + u_yy = f with the solution sin(pi x) sin(pi y)."""

    name, dimension, widths, faces = "poisson-2d", 2, (2, 64, 1), _all_faces(2)

    def exact(self, x: Tensor) -> Tensor:
        """Return sin(pi x) sin(pi y)."""
        return torch.sin(math.pi * x).prod(1)

    def left_hand_side(self, u: Tensor, x: Tensor) -> Tensor:
        """Return the Laplacian."""
        return second_derivatives(derivatives(u, x), x, 2).sum(1)

    def right_hand_side(self, x: Tensor) -> Tensor:
        """Return -2 pi^2 u."""
        return -2.0 * math.pi**2 * self.exact(x)


class Poisson5d(Equation):
    """The Laplace operator in five dimensions, with the solution sum_i cos(pi x_i)."""

    name, dimension, widths, faces = "poisson-5d", 5, (5, 64, 1), _all_faces(5)
    interior, boundary = 3000, 500

    def exact(self, x: Tensor) -> Tensor:
        """Return sum_i cos(pi x_i)."""
        return torch.cos(math.pi * x).sum(1)

    def left_hand_side(self, u: Tensor, x: Tensor) -> Tensor:
        """Return the Laplacian."""
        return second_derivatives(derivatives(u, x), x, 5).sum(1)

    def right_hand_side(self, x: Tensor) -> Tensor:
        """Return -pi^2 u."""
        return -(math.pi**2) * self.exact(x)


class Heat1d(Equation):
    """u_t = u_xx / 4 for 0 <= t <= 1, with the solution exp(-pi^2 t / 4) sin(pi x); inputs are (x, t)."""

    name, dimension, widths = "heat-1+1d", 2, (2, 64, 1)
    faces = ((0, 0.0), (0, 1.0), (1, 0.0))

    def exact(self, x: Tensor) -> Tensor:
        """Return exp(-pi^2 t / 4) sin(pi x)."""
        return torch.exp(-0.25 * math.pi**2 * x[:, 1]) * torch.sin(math.pi * x[:, 0])

    def left_hand_side(self, u: Tensor, x: Tensor) -> Tensor:
        """Return u_t - u_xx / 4."""
        first = derivatives(u, x)
        return first[:, 1] - 0.25 * second_derivatives(first, x, 1)[:, 0]

    def right_hand_side(self, x: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(x[:, 0])


class Heat4d(Equation):
    """The same in four dimensions, with the solution exp(-pi^2 t / 4) sum_i cos(pi x_i)."""

    name, dimension, widths = "heat-4+1d", 5, (5, 64, 1)
    faces = (*_all_faces(4), (4, 0.0))
    interior, boundary = 3000, 500

    def exact(self, x: Tensor) -> Tensor:
        """Return exp(-pi^2 t / 4) sum_i cos(pi x_i)."""
        return torch.exp(-0.25 * math.pi**2 * x[:, 4]) * torch.cos(math.pi * x[:, :4]).sum(1)

    def left_hand_side(self, u: Tensor, x: Tensor) -> Tensor:
        """Return u_t - (u_11 + ... + u_44) / 4."""
        first = derivatives(u, x)
        return first[:, 4] - 0.25 * second_derivatives(first, x, 4).sum(1)

    def right_hand_side(self, x: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(x[:, 0])


class Reaction2d(Equation):
    """u_xx + u_yy - 3 u = f with the solution cos(pi x) exp(y)."""

    name, dimension, widths, faces = "reaction-2d", 2, (2, 40, 1), _all_faces(2)
    interior, boundary = 800, 120

    def exact(self, x: Tensor) -> Tensor:
        """Return cos(pi x) exp(y)."""
        return torch.cos(math.pi * x[:, 0]) * torch.exp(x[:, 1])

    def left_hand_side(self, u: Tensor, x: Tensor) -> Tensor:
        """Return u_xx + u_yy - 3 u."""
        return second_derivatives(derivatives(u, x), x, 2).sum(1) - 3.0 * u

    def right_hand_side(self, x: Tensor) -> Tensor:
        """Return -(pi^2 + 2) u."""
        return -(math.pi**2 + 2.0) * self.exact(x)


class Sinc(ResidualProblem):
    """A curve of one variable: sin(10 pi x) / (10 pi x) on [-1, 1], by a network of 61 parameters.

    Args:
        count: of points, equally spaced. dtype, device: of the points.
    """

    name, dimension, widths = "sinc", 1, (1, 20, 1)

    def __init__(
        self, count: int = 20_000, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        x = torch.linspace(-1.0, 1.0, count, dtype=torch.float64).unsqueeze(1)
        self.x, self.y = x.to(device, dtype), self.exact(x).to(device, dtype)

    def exact(self, x: Tensor) -> Tensor:
        """Return sin(10 pi x) / (10 pi x)."""
        return torch.sinc(10.0 * x[:, 0])

    def points(self) -> Tensor:
        """Draw points of [-1, 1]."""
        return 2.0 * super().points() - 1.0

    def residuals(self, model: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> tuple[Tensor]:
        """Return sqrt(1 / n) (model - y) at all points, or at some rows of them."""
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        return ((model(x)[:, 0] - y) / math.sqrt(len(x)),)

    @torch.no_grad()
    def mse(self, model: Callable[[Tensor], Tensor]) -> float:
        """Return the mean squared error over all points."""
        return float((model(self.x)[:, 0] - self.y).square().mean())


#: Every differential equation, by its name.
EQUATIONS: dict[str, type[Equation]] = {cls.name: cls for cls in (Poisson2d, Heat1d, Poisson5d, Heat4d, Reaction2d)}
