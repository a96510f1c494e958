"""Problems of which thousands are solved at once, and the same for one of them in numpy, for the loops of scipy.

Functions of torch take rows (B, n) and give (B,); every row has the same bits in any batch. Functions of numpy take one
point (n,) and give its value with the gradient in closed form, which is the best that a user of scipy can have.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

F64 = torch.float64


def draw(seed: int) -> torch.Generator:
    """Make a generator of its own."""
    return torch.Generator().manual_seed(seed)


# --- Rosenbrock's function


def rosenbrock(x: Tensor) -> Tensor:
    """Compute sum 100 (x_i+1 - x_i^2)^2 + (1 - x_i)^2 of each row."""
    a, b = x[:, :-1], x[:, 1:]
    return (100.0 * (b - a * a).square() + (1.0 - a).square()).sum(-1)


def rosenbrock_value_grad(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same and its gradients in closed form."""
    a, b = x[:, :-1], x[:, 1:]
    gap, rest = b - a * a, 1.0 - a
    g = torch.zeros_like(x)
    g[:, :-1] = -400.0 * gap * a - 2.0 * rest
    g[:, 1:] += 200.0 * gap
    return (100.0 * gap * gap + rest * rest).sum(-1), g


def rosenbrock_one(x: Any) -> tuple[float, Any]:
    """Compute value and gradient at one point."""
    gap, rest = x[1:] - x[:-1] ** 2, 1.0 - x[:-1]
    g = np.zeros_like(x)
    g[:-1] = -400.0 * gap * x[:-1] - 2.0 * rest
    g[1:] += 200.0 * gap
    return float(100.0 * gap @ gap + rest @ rest), g


def rosenbrock_starts(count: int, n: int, seed: int = 0) -> Tensor:
    """Draw points uniformly from [-2, 2]^n."""
    return 4.0 * torch.rand(count, n, generator=draw(seed), dtype=F64) - 2.0


# --- Gaussian peaks on images

#: Pixels of a side.
SIDE = 15


def peak(at: tuple[Tensor, Tensor], a: Tensor, x0: Tensor, y0: Tensor, width: Tensor, floor: Tensor) -> Tensor:
    """Compute a exp(-((x - x0)^2 + (y - y0)^2) / (2 width^2)) + floor."""
    x, y = at
    return a * torch.exp(((x - x0).square() + (y - y0).square()) * (-0.5 / (width * width))) + floor


def peak_jac(at: tuple[Tensor, Tensor], a: Tensor, x0: Tensor, y0: Tensor, width: Tensor, floor: Tensor) -> Tensor:
    """Differentiate `peak` by its five parameters, the last dimension."""
    x, y = at
    dx, dy = x - x0, y - y0
    square = dx * dx + dy * dy
    e = torch.exp(square * (-0.5 / (width * width)))
    m = e * (a / (width * width))
    return torch.stack([e, m * dx, m * dy, m * square / width, torch.ones_like(e)], -1)


def peak_one(at: Any, a: float, x0: float, y0: float, width: float, floor: float) -> Any:
    """Compute one image, (k,), for `scipy.optimize.curve_fit`."""
    x, y = at
    return a * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2.0 * width * width)) + floor


class Peaks(NamedTuple):
    """Noisy images of one peak each: pixels x, y (k,); data, clean (B, k); parameters and first guesses (B, 5)."""

    x: Tensor
    y: Tensor
    data: Tensor
    clean: Tensor
    true: Tensor
    start: Tensor


def peaks(count: int, side: int = SIDE, seed: int = 0) -> Peaks:
    """Draw peaks near the middle, Poisson noise of a few hundred photons at the top, and guesses some 20% off."""
    rng = draw(seed)
    u = torch.rand(count, 5, generator=rng, dtype=F64)
    middle = (side - 1) / 2.0
    low = torch.tensor([300.0, middle - 1.5, middle - 1.5, 1.5, 8.0], dtype=F64)
    high = torch.tensor([700.0, middle + 1.5, middle + 1.5, 2.5, 12.0], dtype=F64)
    true = low + (high - low) * u
    y, x = torch.meshgrid(*[torch.arange(side, dtype=F64)] * 2, indexing="ij")
    x, y = x.reshape(-1), y.reshape(-1)
    clean = peak((x, y), *true[:, :, None].unbind(1))
    off = 2.0 * torch.rand(count, 5, generator=rng, dtype=F64) - 1.0
    start = true * (1.0 + 0.2 * off * torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=F64))
    start[:, 1:3] += 0.2 * true[:, 3:4] * off[:, 1:3]
    return Peaks(x, y, torch.poisson(clean, generator=rng), clean, true, start)


# --- an arm of seven joints

#: Denavit and Hartenberg's numbers of each joint: offset along z, length along x, twist about x, in metres and radians;
#: and the limits of its angle. An arm of seven joints as they are built today: shoulder, elbow and wrist, 1.2 m long.
LINKS = (
    (0.34, 0.0, -math.pi / 2),
    (0.0, 0.0, math.pi / 2),
    (0.40, 0.0, math.pi / 2),
    (0.0, 0.0, -math.pi / 2),
    (0.40, 0.0, -math.pi / 2),
    (0.0, 0.0, math.pi / 2),
    (0.126, 0.0, 0.0),
)
LIMITS = tuple(math.radians(x) for x in (170.0, 120.0, 170.0, 120.0, 170.0, 120.0, 175.0))
#: Weight of the square of a turn (of its matrix) beside that of a distance in metres: 0.1 m counts as some 0.1 rad.
TURN = 0.5
#: A goal is met within a millimetre and a thousandth of a radian, about.
MET = 1e-6


def _step(c: Any, s: Any, x: list[Any], y: list[Any], z: list[Any], p: list[Any], link: tuple[float, ...]) -> Any:
    """Move a frame (its axes x, y, z and place p, three numbers each) by a joint of cosine c and sine s."""
    d, a, twist = link
    ct, st = round(math.cos(twist), 15), round(math.sin(twist), 15)
    new_x = [c * i + s * j for i, j in zip(x, y, strict=True)]
    turned = [c * j - s * i for i, j in zip(x, y, strict=True)]
    new_y = [ct * i + st * k for i, k in zip(turned, z, strict=True)]
    new_z = [ct * k - st * i for i, k in zip(turned, z, strict=True)]
    new_p = [q + d * k + a * i for q, k, i in zip(p, z, new_x, strict=True)]
    return new_x, new_y, new_z, new_p


def hand(q: Tensor) -> Tensor:
    """Compute where the hand is: (B, 7) angles to (B, 12), its place and then its three axes."""
    zero, one = torch.zeros_like(q[:, 0]), torch.ones_like(q[:, 0])
    x, y, z, p = [one, zero, zero], [zero, one, zero], [zero, zero, one], [zero, zero, zero]
    cos, sin = q.cos().unbind(1), q.sin().unbind(1)
    for c, s, link in zip(cos, sin, LINKS, strict=True):
        x, y, z, p = _step(c, s, x, y, z, p, link)
    return torch.stack([*p, *x, *y, *z], 1)


def reach(q: Tensor, goal: Tensor) -> Tensor:
    """Compute |p - p*|^2 + TURN |R - R*|^2 / 2 of each row; goal (B, 12), as `hand` has it."""
    off = (hand(q) - goal).square()
    return off[:, :3].sum(-1) + (0.5 * TURN) * off[:, 3:].sum(-1)


def reach_value_grad(q: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same and its gradient in closed form, of all joints at once by their axes and places.

    A turn by dq_i about the axis z_i through o_i moves the hand by z_i x (p - o_i), and each of its axes by z_i x axis.
    """
    zero, one = torch.zeros_like(q[:, 0]), torch.ones_like(q[:, 0])
    x, y, z, p = [one, zero, zero], [zero, one, zero], [zero, zero, one], [zero, zero, zero]
    cos, sin = q.cos().unbind(1), q.sin().unbind(1)
    axes, places = [], []
    for c, s, link in zip(cos, sin, LINKS, strict=True):
        axes.append(torch.stack(z, -1))
        places.append(torch.stack(p, -1))
        x, y, z, p = _step(c, s, x, y, z, p, link)
    frame = torch.stack([torch.stack(v, -1) for v in (p, x, y, z)], 1)  # (B, 4, 3)
    off = frame - goal.view(-1, 4, 3)
    value = off[:, 0].square().sum(-1) + (0.5 * TURN) * off[:, 1:].square().sum((-1, -2))
    # Both are triple products: g_i = z_i . ((p - o_i) x 2 off_p + TURN sum axis x off_axis).
    torque = TURN * torch.linalg.cross(frame[:, 1:], off[:, 1:]).sum(1)
    axis, place = torch.stack(axes, 1), torch.stack(places, 1)
    lever = torch.linalg.cross(frame[:, :1] - place, 2.0 * off[:, :1].expand_as(place))
    return value, (axis * (lever + torque[:, None])).sum(-1)


def reach_one(q: Any, goal: Any) -> tuple[float, Any]:
    """Compute value and gradient of one goal (12,) by rotations in numpy."""
    turn, place = np.eye(3), np.zeros(3)
    axes, places = np.empty((7, 3)), np.empty((7, 3))
    for i, (d, a, twist) in enumerate(LINKS):
        axes[i], places[i] = turn[:, 2], place
        c, s, ct, st = math.cos(q[i]), math.sin(q[i]), math.cos(twist), math.sin(twist)
        place = place + turn @ np.array([a * c, a * s, d])
        turn = turn @ np.array([[c, -s * ct, s * st], [s, c * ct, -c * st], [0.0, st, ct]])
    off_p, off = place - goal[:3], turn.T - goal[3:].reshape(3, 3)
    torque = np.cross(place - places, 2.0 * off_p) + TURN * np.cross(turn.T, off).sum(0)
    return float(off_p @ off_p + 0.5 * TURN * (off * off).sum()), (axes * torque).sum(1)


class Goals(NamedTuple):
    """Goals for the hand (B, 12), which the arm reaches at `known`, and angles to start from, (B, 7)."""

    goal: Tensor
    known: Tensor
    start: Tensor


def goals(count: int, seed: int = 0) -> Goals:
    """Draw angles within the limits for the goals, and others for the starts, within the half of them."""
    rng = draw(seed)
    limits = torch.tensor(LIMITS, dtype=F64)
    known = limits * (2.0 * torch.rand(count, 7, generator=rng, dtype=F64) - 1.0)
    start = 0.5 * limits * (2.0 * torch.rand(count, 7, generator=rng, dtype=F64) - 1.0)
    return Goals(hand(known), known, start)


# --- clusters of atoms

#: The least energy of 13 atoms: an icosahedron (the Cambridge cluster database).
LJ13 = -44.326801


@functools.cache
def _pairs(atoms: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(atoms, atoms, 1)
    return first, second


def lennard_jones(x: Tensor) -> Tensor:
    """Compute 4 sum r^-12 - r^-6 of clusters (B, 3 N), over pairs of atoms."""
    atoms = x.shape[1] // 3
    at = x.view(-1, atoms, 3)
    first, second = _pairs(atoms)
    inverse = 1.0 / (at[:, first] - at[:, second]).square().sum(-1)
    six = inverse * inverse * inverse
    return 4.0 * (six * six - six).sum(-1)


def lennard_jones_value_grad(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same and its gradients in closed form, over all N^2 pairs."""
    atoms = x.shape[1] // 3
    at = x.view(-1, atoms, 3).mT  # (B, 3, N)
    off = at[..., :, None] - at[..., None, :]  # (B, 3, N, N)
    square = off.square().sum(1)
    square.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    inverse = 1.0 / square
    six = inverse * inverse * inverse
    value = 2.0 * (six * six - six).sum((-1, -2))
    force = (six - 2.0 * six * six) * inverse * 24.0
    return value, (force[:, None] * off).sum(-1).mT.reshape(x.shape)


def lennard_jones_one(x: Any) -> tuple[float, Any]:
    """Compute value and gradient of one cluster."""
    at = x.reshape(-1, 3)
    off = at[:, None] - at[None]
    square = (off * off).sum(-1)
    np.fill_diagonal(square, np.inf)
    inverse = 1.0 / square
    six = inverse**3
    force = (six - 2.0 * six * six) * inverse * 24.0
    return float(2.0 * (six * six - six).sum()), (force[..., None] * off).sum(1).reshape(-1)


def clusters(count: int, atoms: int = 13, seed: int = 0) -> Tensor:
    """Draw clusters uniformly from a ball of about the volume of a packed one; (B, 3 N)."""
    rng = draw(seed)
    at = torch.randn(count, atoms, 3, generator=rng, dtype=F64)
    at = at / at.norm(dim=-1, keepdim=True) * torch.rand(count, atoms, 1, generator=rng, dtype=F64) ** (1.0 / 3.0)
    return (at * (0.75 * atoms ** (1.0 / 3.0))).reshape(count, 3 * atoms)


# --- a function of many minima


def himmelblau_waves(x: Tensor) -> Tensor:
    """Compute Himmelblau's function with waves: (B, 2) -> (B,), tens of minima, of which four are nearly the best."""
    a, b = x[:, 0], x[:, 1]
    valley = (a * a + b - 11.0).square() + (a + b * b - 7.0).square()
    return 0.05 * valley + 2.0 - torch.cos(3.0 * a) - torch.cos(3.0 * b)


# --- Gaussian processes


def gp_negative_log_likelihood(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Compute -log p(y | x) of each data set, without the constant, with a squared-exponential kernel.

    Args:
        theta: (B, 3): logarithms of length, deviation of the signal and of the noise. x, y: (B, k).
    """
    length, signal, noise = theta.exp().unbind(1)
    gap = (x[:, :, None] - x[:, None, :]) / length[:, None, None]
    k = signal[:, None, None].square() * torch.exp(-0.5 * gap.square())
    k = k + (noise.square() + 1e-8)[:, None, None] * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor, info = torch.linalg.cholesky_ex(k)
    white = torch.linalg.solve_triangular(factor, y[..., None], upper=False)[..., 0]
    value = 0.5 * white.square().sum(-1) + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.where(info == 0, value, torch.inf)
