"""Functions with strict saddle points, each with a start that plain Newton steps and gradients take to one of them.

Each start is on the stable manifold of a saddle point, known by a symmetry that gradients and Newton steps keep, plus
1e-8 of noise that breaks it. The Hessian at the saddle has a negative eigenvalue. The global minimum is known, and
there is no other local minimum, or none near the way down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: What breaks the symmetry of every start, per parameter.
NOISE = 1e-8


class Saddle(NamedTuple):
    """A function of some tensors in float64: where to start (without the noise), and its smallest value."""

    name: str
    loss: Callable[[list[Tensor]], Tensor]
    start: list[Tensor]
    minimum: float

    def noisy_start(self, seed: int = 0) -> list[Tensor]:
        """Return the start plus noise of this seed."""
        gen = _generator(seed)
        return [x + NOISE * torch.randn(x.shape, dtype=x.dtype, generator=gen) for x in self.start]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=_generator(seed))).Q


def quartic_well() -> Saddle:
    """sum x_i^4 / 4 - x_i^2 / 2, from where all coordinates but the first are zero: a saddle at (1, 0, ..., 0)."""
    n = 10
    start = torch.zeros(n, dtype=torch.float64)
    start[0] = 0.7
    return Saddle("quartic wells", lambda p: (p[0] ** 4 / 4 - p[0] ** 2 / 2).sum(), [start], -n / 4)


def rotated_wells() -> Saddle:
    """Wells of depths over two decades, rotated: negative eigenvalues -1 to -1e-2 among 20."""
    n = 20
    q, depth = _orthogonal(n, 1), torch.logspace(0, -2, n, dtype=torch.float64)

    def loss(p: list[Tensor]) -> Tensor:
        u = q @ p[0]
        return (depth * (u**4 / 4 - u**2 / 2)).sum()

    start = q.T @ torch.cat([torch.full((n // 2,), 0.8), torch.zeros(n - n // 2)]).double()
    return Saddle("rotated wells", loss, [start], -float(depth.sum()) / 4)


def shallow_saddle() -> Saddle:
    """One slightly negative eigenvalue, -1e-3, among 30 that are positive, 0.1 to 10."""
    n = 30
    q, values = _orthogonal(n, 2), torch.logspace(-1, 1, n, dtype=torch.float64)
    values[0] = -1e-3

    def loss(p: list[Tensor]) -> Tensor:
        u = q @ p[0]
        return 0.5 * (values * u * u).sum() + 2.5e-4 * u[0] ** 4

    first = torch.ones(n, dtype=torch.float64)
    first[0] = 0.0
    # In u_0: -5e-4 u^2 + 2.5e-4 u^4, smallest at u = 1.
    return Saddle("shallow saddle", loss, [q.T @ first], -2.5e-4)


def monkey_saddle() -> Saddle:
    """x^3 - 3 x y^2 made strict by (x^2 - y^2) / 2 and bounded by a quartic; even in y, and y = 0 leads to (0, 0)."""

    def loss(p: list[Tensor]) -> Tensor:
        x, y = p[0]
        return x**3 - 3 * x * y**2 + (x**2 - y**2) / 2 + (x**2 + y**2) ** 2

    x, y = torch.linspace(-2, 2, 2001, dtype=torch.float64), torch.linspace(0, 2, 1001, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, y, indexing="ij"))
    at = grid.reshape(2, -1)[:, loss([grid]).argmin()].clone().requires_grad_()
    for _ in range(6):  # Newton's method, from a grid that is finer than its basin
        (g,) = torch.autograd.grad(loss([at]), at)
        h = torch.autograd.functional.hessian(lambda z: loss([z]), at.detach())
        at = (at - torch.linalg.solve(h, g)).detach().requires_grad_()
    start = torch.tensor([0.3, 0.0], dtype=torch.float64)
    return Saddle("monkey saddle", loss, [start], float(loss([at]).detach()))


def factorisation() -> Saddle:
    """|u u^T - M|^2 / 4, M of eigenvalues 4, 3, 1: from along the second eigenvector, a saddle at sqrt(3) v_2."""
    q = _orthogonal(8, 3)
    values = torch.tensor([4.0, 3.0, 1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    m = (q * values) @ q.T

    def loss(p: list[Tensor]) -> Tensor:
        return 0.25 * (torch.outer(p[0], p[0]) - m).square().sum()

    return Saddle("symmetric factorisation", loss, [1.2 * q[:, 1]], (9 + 1) / 4)


def low_rank_factorisation() -> Saddle:
    """|U V^T - M|^2 / 2, U, V of rank 2 and M of rank 3: from factors of its first and third singular vectors."""
    u, v = _orthogonal(6, 4), _orthogonal(5, 5)
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    m = (u[:, :3] * values) @ v[:, :3].T

    def loss(p: list[Tensor]) -> Tensor:
        return 0.5 * (p[0] @ p[1].T - m).square().sum() + 0.05 * (p[0].T @ p[0] - p[1].T @ p[1]).square().sum()

    start = [1.3 * u[:, [0, 2]], 1.3 * v[:, [0, 2]]]
    return Saddle("low-rank factorisation", loss, start, 0.5)


def deep_linear_network() -> Saddle:
    """|W3 W2 W1 X - Y|^2 / 2N, whose first layer has yet to see one of two modes: the middle layer has."""
    n = 3
    target = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))

    def loss(p: list[Tensor]) -> Tensor:
        return 0.5 * (p[2] @ p[1] @ p[0] - target).square().sum()

    outer = torch.diag(torch.tensor([1.2, 0.0, 0.8], dtype=torch.float64))
    middle = torch.eye(n, dtype=torch.float64)
    # Along mode 2 the product is w3 w2 w1 with w1 = w3 = 0 and w2 = 1: curvature -1 along w1 = w3.
    return Saddle("deep linear network", loss, [outer.clone(), middle, outer.clone()], 0.0)


def phase_retrieval() -> Saddle:
    """sum ((a_i.x)^2 - (a_i.z)^2)^2 / 4m, its a_i in pairs mirrored at z: x orthogonal to z stays so, to a saddle."""
    n, m = 6, 60
    gen = _generator(7)
    z = torch.zeros(n, dtype=torch.float64)
    z[0] = 1.0
    a = torch.randn(m, n, dtype=torch.float64, generator=gen)
    mirrored = a.clone()
    mirrored[:, 0] *= -1.0
    a = torch.cat([a, mirrored])
    y = (a @ z).square()

    def loss(p: list[Tensor]) -> Tensor:
        return ((a @ p[0]).square() - y).square().mean() / 4

    start = torch.zeros(n, dtype=torch.float64)
    start[1:] = 0.2
    return Saddle("phase retrieval", loss, [start], 0.0)


def permuted_units() -> Saddle:
    """Two tanh units that begin as the same one, fitted to what two different ones compute."""
    gen = _generator(11)
    x = torch.randn(40, 2, dtype=torch.float64, generator=gen)
    teacher = torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=torch.float64)
    y = torch.tanh(x @ teacher).sum(1)

    def loss(p: list[Tensor]) -> Tensor:
        return 0.5 * (torch.tanh(x @ p[0]) @ p[1] - y).square().mean()

    start = [torch.tensor([[0.6, 0.6], [0.2, 0.2]], dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    return Saddle("permuted hidden units", loss, start, 0.0)


def tensor_decomposition() -> Saddle:
    """-sum_i (u_i.x)^4 + |x|^4 over an orthonormal basis, less |x|^2: from between two of its vectors."""
    q = _orthogonal(5, 8)

    def loss(p: list[Tensor]) -> Tensor:
        u, square = q.T @ p[0], p[0].square().sum()
        return square**2 - 0.5 * (u**4).sum() - square

    # At x = r u_1: r^4 / 2 - r^2, smallest at r = 1.
    return Saddle("tensor decomposition", loss, [0.4 * (q[:, 0] + q[:, 1])], -0.5)


def saddles() -> list[Saddle]:
    """Make all of them."""
    return [
        quartic_well(),
        rotated_wells(),
        shallow_saddle(),
        monkey_saddle(),
        factorisation(),
        low_rank_factorisation(),
        deep_linear_network(),
        phase_retrieval(),
        permuted_units(),
        tensor_decomposition(),
    ]
