"""Bounds on each parameter, from the groups of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant._checks import Option
from secant.solvers.box import projected_gradient


def _is_bound(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.is_floating_point() and not x.is_nested
    if isinstance(x, (list, tuple)):
        return len(x) > 0 and all(isinstance(t, Tensor) and _is_bound(t) for t in x)
    value = _checks.as_number(x)
    return value is not None and not math.isnan(value)


BOUNDS = Option(
    "None or a pair (lower, upper), each a number, a flat tensor or a tensor for each parameter",
    lambda x: x is None or (isinstance(x, (list, tuple)) and len(x) == 2 and all(map(_is_bound, x))),
)


class Bounds:
    """lower <= x <= upper, componentwise.

    Args:
        lower, upper: (n,).
    """

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self.lower, self.upper = lower, upper

    @classmethod
    def of(cls, op: str, groups: Sequence[Mapping[str, Any]], like: Tensor) -> Bounds | None:
        """Read the bounds of all parameters; None where no group has any.

        Raises:
            ValueError: a bound has another size than the parameters, or a lower one is not below its upper one.
        """
        if all(group["bounds"] is None for group in groups):
            return None
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for group in groups:
            pair = (-math.inf, math.inf) if group["bounds"] is None else group["bounds"]
            for name, bound, parts in zip(("lower", "upper"), pair, sides, strict=True):
                parts.append(_flat(op, name, bound, group["params"], like))
        box = cls(torch.cat(sides[0]), torch.cat(sides[1]))
        if not bool((box.lower < box.upper).all()):
            raise _checks.fail(op, "bounds", "lower < upper everywhere", "a lower bound that is not, or NaN")
        return box

    def take(self, places: Tensor | None) -> Bounds:
        """Return the bounds of some components."""
        return self if places is None else Bounds(self.lower[places], self.upper[places])

    def contains(self, x: Tensor) -> bool:
        """Tell whether x is within the bounds; NaN is."""
        return not bool(((x < self.lower) | (x > self.upper)).any())

    def free(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Mark components that are not at a bound which the negative gradient points beyond."""
        return ~(((x <= self.lower) & (gradient > 0)) | ((x >= self.upper) & (gradient < 0)))

    def projected(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return x - P(x - gradient), which is zero where x is optimal."""
        return projected_gradient(x, gradient, self.lower, self.upper)


def _flat(op: str, name: str, bound: Any, params: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return one side of the bounds of a group as a vector."""
    sizes = [p.numel() for p in params]
    if isinstance(bound, (list, tuple)):
        for i, (p, part) in enumerate(zip(params, bound, strict=False)):
            if part.shape != p.shape:
                expected = f"shape {tuple(p.shape)}, that of the parameter"
                raise _checks.fail(op, f"bounds: {name}[{i}]", expected, f"shape {tuple(part.shape)}")
        if len(bound) != len(params):
            raise _checks.fail(op, f"bounds: {name}", f"{len(params)} tensors, one per parameter", len(bound))
        bound = torch.cat([part.detach().reshape(-1).to(like) for part in bound])
    if isinstance(bound, Tensor):
        if bound.dim() == 0:
            bound = bound.expand(sum(sizes))
        if bound.shape != (sum(sizes),):
            raise _checks.fail(op, f"bounds: {name}", f"shape ({sum(sizes)},)", f"shape {tuple(bound.shape)}")
        return bound.detach().to(like)
    return torch.full((sum(sizes),), float(bound), dtype=like.dtype, device=like.device)
