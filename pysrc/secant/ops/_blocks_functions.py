"""Functions of eigenvalues, their domains and their divided differences, without cancellation.

A matrix function is V f(w) V^T; its derivative in the direction E has the entries f[w_i, w_j] E_ij in the eigenbasis,
and its second one in the directions E and H has the entries sum_k f[w_i, w_k, w_j] (E_ik H_kj + H_ik E_kj), with the
divided differences

    f[x, y] = (f(x) - f(y)) / (x - y),                    f'(x) where x = y,
    f[x, y, z] = (f[x, y] - f[y, z]) / (x - z),           f''(x) / 2 where x = y = z.

The quotients lose what the gaps are small against: each function has a form of its own in which nothing cancels, so
that no tolerance decides which eigenvalues are equal. The first differences are right to a few eps for any gap. The
second ones divide by the widest gap where that is at least a quarter of the largest argument (of 1, for the
exponential), and are Taylor series around the largest argument else; they are right to some tens of eps.

Everything is computed in float64: the n^2 weights of a block are cheap beside its n^3 products.

References:
    Higham, Functions of Matrices, Theorem 3.11 (Daleckii and Krein), appendix B.16 (divided differences).
    McCurdy, Ng, Parlett, Accurate computation of divided differences of the exponential function, Math. Comp. 43
    (1984).
    Radon, Zur mechanischen Kubatur, Monatsh. Math. 52 (1948): the seven points of a triangle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secant import _checks

#: What names a function here: a tuple of its kind and its constants, so that a compiler can trace it.
Rule = tuple[Any, ...]

#: Terms of a series in ratios of at most 1/4; and of the exponential's, in steps of at most 1.
_TERMS, _EXP_TERMS = 28, 20
_POINTS = (0.03376524289842399, 0.16939530676686774, 0.38069040695840156)  # Gauss-Legendre, 6 points of [0, 1], half
_WEIGHTS = (0.08566224618958517, 0.18038078652406930, 0.23395696728634552)


def _safe(x: Tensor, where: Tensor) -> Tensor:
    """x, and 1 where `where` says that it is not used: nothing that is not selected has a derivative of NaN."""
    return torch.where(where, 1.0, x)


def _sorted(*points: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.stack(torch.broadcast_tensors(*points)).sort(0).values)


def _symmetric_sums(points: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """h_0 .. h_(count - 1): complete homogeneous symmetric polynomials, the divided differences of the powers."""
    h = [torch.ones_like(points[0]), *[torch.zeros_like(points[0])] * (count - 1)]
    for x in points:
        for j in range(1, count):
            h[j] = h[j] + x * h[j - 1]
    return h


def _series(coefficients: list[float], points: tuple[Tensor, ...]) -> Tensor:
    """sum_j c_j h_j(points): a divided difference of a power series, its terms from small to large."""
    h = _symmetric_sums(points, len(coefficients))
    total = torch.zeros_like(h[0])
    for c, x in zip(reversed(coefficients), reversed(h), strict=True):
        total = total + c * x
    return total


def _by_the_widest_gap(first: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """f[x, y, z] of x <= y <= z, where x < z."""
    same = x == z
    return (first(z, y) - first(y, x)) / _safe(z - x, same)


# ------------------------------------------------------------------------------------------------------- exponential


def _exp_first(x: Tensor, y: Tensor) -> Tensor:
    """e^max (1 - e^-d) / d, d = |x - y|: it overflows where the exponential itself does."""
    d = (x - y).abs()
    same = d == 0
    return torch.maximum(x, y).exp() * torch.where(same, 1.0, -torch.expm1(-d) / _safe(d, same))


def _exp_second(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    x, y, z = _sorted(x, y, z)
    near = z - x < 1
    low, middle = torch.where(near, x - z, 0.0), torch.where(near, y - z, 0.0)
    series = _series([1 / math.factorial(j + 2) for j in range(_EXP_TERMS)], (low, middle))
    return torch.where(near, z.exp() * series, _by_the_widest_gap(_exp_first, x, y, z))


# ------------------------------------------------------------------ logarithm and powers of positive numbers, by ratios


def _log_ratio(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(log(low / high), delta = (high - low) / high) of 0 < low <= high."""
    delta, ratio = (high - low) / high, low / high
    near, tiny = delta < 0.5, ratio < 1e-290
    far = torch.where(tiny, low.log() - high.log(), torch.where(tiny, 1.0, ratio).log())
    return torch.where(near, torch.log1p(-torch.where(near, delta, 0.0)), far), delta


def _log_first(x: Tensor, y: Tensor) -> Tensor:
    low, high = torch.minimum(x, y), torch.maximum(x, y)
    log, delta = _log_ratio(low, high)
    same = delta == 0
    return torch.where(same, 1.0, -log / _safe(delta, same)) / high


def _log_second(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    coefficients = [(-1.0) ** (j + 1) / (j + 2) for j in range(_TERMS)]
    x, y, z = _sorted(x, y, z)
    return _near_or_far(coefficients, lambda z: 1 / (z * z), _log_first, x, y, z)


def _near_or_far(
    coefficients: list[float],
    scale: Callable[[Tensor], Tensor],
    first: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    z: Tensor,
) -> Tensor:
    near = z - x < z / 4
    low, middle = torch.where(near, (x - z) / z, 0.0), torch.where(near, (y - z) / z, 0.0)
    series = scale(z) * _series(coefficients, (low, middle))
    return torch.where(near, series, _by_the_widest_gap(first, x, y, z))


def _root_first(p: float, x: Tensor, y: Tensor) -> Tensor:
    """high^(p - 1) (1 - r^p) / (1 - r), r = low / high; a negative power is the reciprocal of a positive one."""
    if p < 0:
        return -_root_first(-p, x, y) * x.pow(p) * y.pow(p)
    low, high = torch.minimum(x, y), torch.maximum(x, y)
    log, delta = _log_ratio(low, high)
    same = delta == 0
    return high.pow(p - 1) * torch.where(same, p, -torch.expm1(p * log) / _safe(delta, same))


def _root_second(p: float, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    coefficients, binomial = [], p * (p - 1) / 2
    for j in range(2, 2 + _TERMS + 4 * math.ceil(abs(p))):
        coefficients.append(binomial)
        binomial *= (p - j) / (j + 1)
    x, y, z = _sorted(x, y, z)
    return _near_or_far(coefficients, lambda z: z.pow(p - 2), lambda a, b: _root_first(p, a, b), x, y, z)


# ------------------------------------------------------------------------------------- integer powers, of any numbers


def _integer_first(p: int, x: Tensor, y: Tensor) -> Tensor:
    """h_(p - 1)(x, y); of a reciprocal, -h_(q - 1)(1/x, 1/y) / (x y)."""
    if p < 0:
        return -_integer_first(-p, 1 / x, 1 / y) / x / y
    x, y = torch.broadcast_tensors(x, y)
    return _symmetric_sums((x, y), p)[p - 1] if p else torch.zeros_like(x)


def _integer_second(p: int, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """h_(p - 2)(x, y, z); of g(1/x), g(u) = u^q, with u, v, w for 1/x, 1/y, 1/z: u v w (v g[u, v, w] + g[u, w])."""
    x, y, z = torch.broadcast_tensors(x, y, z)
    if p < 0:
        u, v, w = 1 / x, 1 / y, 1 / z
        return u * v * w * (_integer_second(-p, u, v, w) * v + _integer_first(-p, u, w))
    return _symmetric_sums((x, y, z), p - 1)[p - 2] if p >= 2 else torch.zeros_like(x)


# -------------------------------------------------------------------------------------- the larger of |w| and a floor


def _floor_first(x: Tensor, y: Tensor, floor: Tensor) -> Tensor:
    """m[x, y] of m(w) = max(|w|, floor); where x = y its derivative, 0 at the kink."""
    gap = x - y
    rise = torch.maximum(x.abs(), floor) - torch.maximum(y.abs(), floor)
    inside = torch.where(x.abs() > floor, x.sign(), 0.0)
    same = gap == 0
    return torch.where(same, inside, rise / _safe(gap, same))


def _floor_second(x: Tensor, y: Tensor, z: Tensor, floor: Tensor) -> Tensor:
    """m[x, y, z], 0 where all are equal: m is piecewise linear.

    Sorted, it divides by the widest gap, and wherever that is small against the values, all three lie on one piece (or
    at the kink) and the slopes cancel exactly.
    """
    x, y, z = _sorted(x, y, z)
    return torch.where(x == z, 0.0, _by_the_widest_gap(lambda a, b: _floor_first(a, b, floor), x, y, z))


# ----------------------------------------------------------------------------------------------- the larger of w and 0


def _positive_first(x: Tensor, y: Tensor) -> Tensor:
    gap, rise = x - y, x.clamp(min=0) - y.clamp(min=0)
    same = gap == 0
    return torch.where(same, (x > 0).to(x.dtype), rise / _safe(gap, same))


def _positive_second(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    x, y, z = _sorted(x, y, z)
    return torch.where(x == z, 0.0, _by_the_widest_gap(_positive_first, x, y, z))


# ---------------------------------------------------------------------------------------------------- any functions


def checked(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Wrap a callable of the user's: its result is a float64 tensor of its argument's shape, or an error says so."""

    def call(w: Tensor) -> Tensor:
        x = f(w)
        if not isinstance(x, Tensor) or x.shape != w.shape:
            raise _checks.fail(
                "block_function", "f", f"callables that return a tensor of the shape they get, {tuple(w.shape)}",
                f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__,
            )  # fmt: skip
        return x.to(w.dtype)

    return call


def _rounding(x: Tensor) -> Tensor:
    return x.abs() * torch.finfo(x.dtype).eps


def _given_first(f: Callable[[Tensor], Tensor], df: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return _given_first_and_error(f, df, x, y)[0]


def _given_first_and_error(
    f: Callable[[Tensor], Tensor], df: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """(f[x, y], an estimate of its error), the better of the quotient and the mean of f' between x and y.

    The quotient errs by the rounding of the values over the gap. The mean is taken at six points of Gauss and Legendre,
    and errs by less than it differs from its three points' variant; at x = y it is f'(x). No scale has to be known.
    Where the points saw nothing of a kink or a step between distant numbers, the two do not agree, and the quotient is
    right.
    """
    x, y = torch.broadcast_tensors(x, y)
    same = x == y
    fx, fy = f(x), f(y)
    quotient = (fx - fy) / _safe(x - y, same)
    rough = (_rounding(fx) + _rounding(fy)) / _safe((x - y).abs(), same)
    fine = coarse = torch.zeros_like(x)
    for t, weight in zip(_POINTS, _WEIGHTS, strict=True):
        fine = fine + weight * (df(x + t * (y - x)) + df(y + t * (x - y)))
    for t, weight in ((0.1127016653792583, 5 / 18), (0.5, 2 / 9)):
        coarse = coarse + weight * (df(x + t * (y - x)) + df(y + t * (x - y)))
    error = (fine - coarse).abs() + _rounding(fine)
    use = same | ((error < rough) & ~_contradicts(fine, quotient, error, rough, x, y))
    return torch.where(use, torch.where(same, df(x), fine), quotient), torch.where(use, error, rough)


def _contradicts(fine: Tensor, quotient: Tensor, error: Tensor, rough: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Tell whether a mean between distant numbers differs from the quotient by more than both may err."""
    distant = (x - y).abs() > torch.maximum(x.abs(), y.abs()) / 64
    return distant & ((fine - quotient).abs() > error + 16 * rough)


#: Radon's rule of degree 5 for the triangle: barycentric coordinates and weights, of an area of 1.
_RADON = [((1 / 3, 1 / 3, 1 / 3), 0.225)]
for _sign in (-1, 1):
    _r, _weight = (6 + _sign * math.sqrt(15)) / 21, (155 + _sign * math.sqrt(15)) / 1200
    _RADON += [(p, _weight) for p in ((1 - 2 * _r, _r, _r), (_r, 1 - 2 * _r, _r), (_r, _r, 1 - 2 * _r))]


def _given_second(
    f: Callable[[Tensor], Tensor],
    df: Callable[[Tensor], Tensor],
    d2f: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    y: Tensor,
    z: Tensor,
) -> Tensor:
    """As the first: the quotient by the widest gap, or half the mean of f'' over the simplex of x, y and z (Hermite and
    Genocchi), by Radon's seven points against the three in the middles of the sides.
    """
    x, y, z = _sorted(x, y, z)
    same = x == z
    gap = _safe(z - x, same)
    (upper, e), (lower, g) = _given_first_and_error(f, df, z, y), _given_first_and_error(f, df, y, x)
    quotient, rough = (upper - lower) / gap, (e + g + _rounding(upper) + _rounding(lower)) / gap
    second = _derivative(df) if d2f is None else d2f
    fine = torch.zeros_like(gap)
    for (i, j, k), weight in _RADON:
        fine = fine + weight / 2 * second(i * x + j * y + k * z)
    coarse = (second((x + y) / 2) + second((y + z) / 2) + second((x + z) / 2)) / 6
    error = (fine - coarse).abs() + _rounding(fine)
    use = (error < rough) & ~_contradicts(fine, quotient, error, rough, x, z)
    return torch.where(same, second(x) / 2, torch.where(use, fine, quotient))


def _derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Differentiate a function of each entry."""
    return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


# ------------------------------------------------------------------------------------------------------------- rules


def value(rule: Rule, w: Tensor) -> tuple[Tensor, Tensor]:
    """(f(w), which w are outside of the domain), in float64."""
    kind, everywhere = rule[0], torch.zeros_like(w, dtype=torch.bool)
    if kind == "exp":
        return w.exp(), everywhere
    if kind == "log":
        return w.log(), ~(w > 0)
    if kind == "root":
        return (w.sqrt() if rule[1] == 0.5 else w.pow(rule[1])), ~(w > 0)
    if kind == "integer":
        return w.pow(rule[1]), (w == 0 if rule[1] < 0 else everywhere)
    if kind == "abs":
        return w.abs(), everywhere
    if kind == "positive":
        return w.clamp(min=0), everywhere
    return checked(rule[1])(w), everywhere


def first(rule: Rule, parameter: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """f[x, y]."""
    kind = rule[0]
    if kind == "exp":
        return _exp_first(x, y)
    if kind == "log":
        return _log_first(x, y)
    if kind == "root":
        return _root_first(rule[1], x, y)
    if kind == "integer":
        return _integer_first(rule[1], x, y)
    if kind == "abs":
        return _floor_first(x, y, torch.zeros_like(x))
    if kind == "positive":
        return _positive_first(x, y)
    if kind == "floor":
        return _floor_first(x, y, _floor(rule, parameter, x))
    return _given_first(checked(rule[1]), checked(rule[2]), x, y)


def second(rule: Rule, parameter: Tensor | None, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """f[x, y, z]."""
    kind = rule[0]
    if kind == "exp":
        return _exp_second(x, y, z)
    if kind == "log":
        return _log_second(x, y, z)
    if kind == "root":
        return _root_second(rule[1], x, y, z)
    if kind == "integer":
        return _integer_second(rule[1], x, y, z)
    if kind == "abs":
        return _floor_second(x, y, z, torch.zeros_like(x))
    if kind == "positive":
        return _positive_second(x, y, z)
    if kind == "floor":
        return _floor_second(x, y, z, _floor(rule, parameter, x))
    d2f = None if rule[3] is None else checked(rule[3])
    return _given_second(checked(rule[1]), checked(rule[2]), d2f, x, y, z)


def _floor(rule: Rule, parameter: Tensor | None, like: Tensor) -> Tensor:
    return like.new_full((), rule[1]) if parameter is None else parameter[..., None, None].to(like.dtype)
