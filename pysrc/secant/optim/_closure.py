"""What a closure returns, by kind, and what an optimizer makes of it.

One kind so far: of "gradient" is a closure that computes the loss, calls backward on it and returns it, as for
`torch.optim.LBFGS`. Another kind is one more function like `gradient` here, from a closure to an evaluated point.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from secant import _checks

Closure = Callable[[], Any]

#: What a closure of each kind does, for messages.
KINDS = {
    "gradient": "calls backward and returns the loss",
    "loss": "returns the loss with its graph",
    "outputs": "returns (outputs, loss)",
    "residuals": "returns residuals",
}


def check(op: str, closure: object) -> None:
    """Refuse what cannot be called."""
    if not callable(closure):
        raise TypeError(f"{op}.step: closure: expected a function that returns the loss, got {closure!r}")


def gradient(op: str, closure: Closure) -> Any:
    """Call a closure of kind "gradient", with gradients enabled; return the loss as it came: one real number.

    Raises:
        TypeError: it returned something else; the message names the kind that it looks like.
    """
    with torch.enable_grad():
        loss = closure()
    if loss is None:
        raise TypeError(f"{op}.step: closure: expected it to return the loss, got None")
    if isinstance(loss, Tensor):
        one = loss.numel() == 1 and not loss.is_complex()
    else:
        one = isinstance(loss, Real) or isinstance(_number(loss), Real)
    if not one:
        got = f"{_checks.describe(loss)}{_hint(loss)}"
        raise TypeError(f"{op}.step: closure: expected it to return a number or a tensor of one, got {got}")
    return loss


def check_backward(op: str, loss: Any, params: Iterable[Tensor]) -> None:
    """Refuse a loss whose graph leads to parameters, none of which has a gradient: of kind "loss", not "gradient".

    A loss that needs no parameter, or gradients that are set without backward, are fine.
    """
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        return
    wanted, seen, left = {id(p) for p in params}, set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            raise TypeError(
                f"{op}.step: closure: expected one that {KINDS['gradient']}, got one that {KINDS['loss']}: no gradient"
            )
        left += [below for below, _ in node.next_functions if below is not None]


def as_float(loss: Any) -> float:
    """Bring a loss to the host."""
    x = _number(loss)
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def rounding(loss: Any, dtype: torch.dtype) -> float:
    """Return the unit of rounding of a loss: of its dtype, or of the parameters' where it has none."""
    return _eps(loss.dtype if isinstance(loss, Tensor) and loss.is_floating_point() else dtype)


@functools.cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _number(x: Any) -> Any:
    """Take out what a tensor or an array of one element holds; leave anything else as it is."""
    if isinstance(x, Tensor) or (not isinstance(x, Real) and getattr(x, "size", None) == 1 and hasattr(x, "item")):
        return x.item()
    return x


def _hint(returned: object) -> str:
    """Name the kind of closure that returns such a thing."""
    kind = None
    if isinstance(returned, Tensor) and returned.is_floating_point() and returned.numel() > 1:
        kind = "residuals"
    elif isinstance(returned, (tuple, list)) and any(isinstance(x, Tensor) for x in returned):
        scalar = len(returned) == 2 and isinstance(returned[1], Tensor) and returned[1].numel() == 1
        kind = "outputs" if scalar else "residuals"
    return "" if kind is None else f", from a closure that {KINDS[kind]}: expected one that {KINDS['gradient']}"
