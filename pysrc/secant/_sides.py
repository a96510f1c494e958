"""Bounds and scales as users give them: numbers, arrays, pairs, or objects with lb and ub."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant.solvers.box import projected_gradient


def pairs(op: str, bounds: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Read bounds as two tensors of float64 and of the shape of x."""
    if bounds is None:
        return torch.full_like(x, -math.inf, dtype=torch.float64), torch.full_like(x, math.inf, dtype=torch.float64)
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        return side(op, "bounds.lb", bounds.lb, x), side(op, "bounds.ub", bounds.ub, x)
    try:
        given = [(lower, upper) for lower, upper in bounds]
    except (TypeError, ValueError):
        raise _checks.fail(
            op, "bounds", "pairs (lower, upper), or an object with lb and ub", _checks.show(bounds)
        ) from None
    if len(given) != x.numel():
        raise _checks.fail(op, "bounds", f"{x.numel()} pairs, one for each element of x0", f"{len(given)}")
    sides = []
    for k, none in ((0, -math.inf), (1, math.inf)):
        values = [none if pair[k] is None else float(pair[k]) for pair in given]
        sides.append(torch.tensor(values, dtype=torch.float64, device=x.device).view(x.shape))
    for i, (lower, upper) in enumerate(zip(*(side.reshape(-1).tolist() for side in sides), strict=True)):
        if not lower <= upper:
            raise _checks.fail(op, f"bounds[{i}]", "lower <= upper", f"({lower}, {upper})")
    return sides[0], sides[1]


def side(op: str, name: str, bound: Any, x: Tensor) -> Tensor:
    """Read a number, or an array or tensor that broadcasts to the shape of x, as float64 of that shape."""
    try:
        given = torch.as_tensor(bound, dtype=torch.float64, device=x.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise _checks.fail(op, name, "a number, an array or a tensor", _checks.show(bound)) from None
    try:
        return given.expand(x.shape) if given.numel() != x.numel() else given.reshape(x.shape)
    except RuntimeError:
        raise _checks.fail(op, name, f"a shape that broadcasts to {tuple(x.shape)}", tuple(given.shape)) from None


def pair(op: str, bounds: Any) -> tuple[Any, Any]:
    """Read (lower, upper)."""
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        return bounds.lb, bounds.ub
    if not (isinstance(bounds, Sequence) and len(bounds) == 2):
        raise _checks.fail(op, "bounds", "a pair (lower, upper), or an object with lb and ub", _checks.show(bounds))
    return bounds[0], bounds[1]


def limits(op: str, bounds: Any, x: Tensor, name: str = "x0") -> tuple[Tensor, Tensor] | None:
    """Read (lower, upper); None where there is no bound."""
    lower, upper = (side(op, f"bounds[{k}]", bound, x).to(x.dtype) for k, bound in enumerate(pair(op, bounds)))
    if not bool((lower < upper).all()):
        raise _checks.fail(op, "bounds", "lower < upper everywhere", "a lower bound that is not, or NaN")
    if bool(((x < lower) | (x > upper)).any()):
        raise _checks.fail(op, name, "a point within the bounds", "one beyond")
    return None if bool(torch.isinf(lower).all() and torch.isinf(upper).all()) else (lower, upper)


def scales(op: str, x_scale: Any, x: Tensor) -> tuple[Tensor | None, str]:
    """Read x_scale: a tensor of the shape of x or None for 1, and how the optimizer is to scale."""
    if isinstance(x_scale, str):
        if x_scale != "jac":
            raise _checks.fail(op, "x_scale", 'a number, an array or "jac"', repr(x_scale))
        return None, "marquardt"
    scale = side(op, "x_scale", x_scale, x).to(x.dtype)
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise _checks.fail(op, "x_scale", "finite numbers > 0", _checks.show(x_scale))
    return None if bool((scale == 1).all()) else scale, "identity"


def at_bounds(x: Tensor, grad: Tensor, box: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return where x is at a bound (-1 a lower one, 1 an upper one, else 0), and x - P(x - grad)."""
    if box is None:
        return torch.zeros_like(x, dtype=torch.int64), grad
    lower, upper = box
    mask = (x >= upper).long() - (x <= lower).long()
    return mask, projected_gradient(x, grad, lower, upper)
