"""Many minimizations in one call: `minimize(batch=True)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant._fits import by_place, summary
from secant._functions import Malformed, batched_start, check_functions
from secant._sides import pairs, side
from secant.result import OptimizeResult
from secant.solvers.batched_box import batched_lbfgs_b
from secant.solvers.batched_descent import Sides
from secant.solvers.batched_lbfgs import batched_lbfgs
from secant.solvers.box import Box


#: Methods that `minimize` knows with batch=True.
BATCHED = ("l-bfgs", "l-bfgs-b")


class _Values:
    """Evaluates a function of a user, and its gradients, for some of B problems."""

    def __init__(self, op: str, fun: Callable[..., Any], jac: Any, x0: Tensor, args: tuple[Any, ...]) -> None:
        self._op, self._fun = op, by_place(fun, x0, args, {})[0]
        self._given = jac is True
        self._jac = by_place(jac, x0, args, {})[0] if callable(jac) else None

    def __call__(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (b,) and g (b, n)."""
        if self._jac is not None or self._given:
            with torch.no_grad():
                found = self._fun(x, index)
                value, g = self._pair(found) if self._given else (found, self._jac(x, index) if self._jac else None)
            return self._checked(value, x).detach(), self._gradient(g, x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._checked(self._fun(x, index), x)
            if not value.requires_grad:
                raise Malformed(f"{self._op}: fun: expected a tensor that autograd can follow (or give jac)")
            (g,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), g

    def _pair(self, found: Any) -> tuple[Any, Any]:
        if isinstance(found, (tuple, list)) and len(found) == 2:
            return found[0], found[1]
        raise Malformed(f"{self._op}: fun: expected a pair (f, g), as jac=True says, got {_checks.describe(found)}")

    def _checked(self, value: Any, x: Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.shape in ((len(x),), (len(x), 1)) and value.is_floating_point():
            return value.reshape(len(x))
        got = _checks.describe(value)
        raise Malformed(f"{self._op}: fun: expected a real tensor (B,) of B = {len(x)} values, got {got}")

    def _gradient(self, g: Any, x: Tensor) -> Tensor:
        if isinstance(g, Tensor) and g.shape == x.shape:
            return g.detach().to(x)
        raise Malformed(f"{self._op}: jac: expected a tensor {tuple(x.shape)}, got {_checks.describe(g)}")


def _sides(op: str, bounds: Any, x: Tensor) -> Sides:
    """Read bounds as (B, n): pairs for all problems, what has lb and ub, or two tensors or arrays."""
    if isinstance(bounds, tuple) and len(bounds) == 2 and any(hasattr(bound, "shape") for bound in bounds):
        lower, upper = (side(op, f"bounds[{k}]", bound, x) for k, bound in enumerate(bounds))
    elif bounds is None or (hasattr(bounds, "lb") and hasattr(bounds, "ub")):
        lower, upper = pairs(op, bounds, x)
    else:
        lower, upper = (one.expand(x.shape) for one in pairs(op, bounds, x[0]))
    box = Box(lower.reshape(-1), upper.reshape(-1), x.dtype)
    return Sides(*(one.to(x.dtype).view(x.shape) for one in (box.lower, box.upper)))


def batched_minimize(
    op: str,
    fun: Callable[..., Any],
    x0: Any,
    args: tuple[Any, ...],
    jac: Any,
    name: str,
    bounds: Any,
    settings: Mapping[str, Any],
) -> OptimizeResult:
    """Run L-BFGS on B problems, within bounds or not; the arguments are those of `secant.minimize`."""
    check_functions(op, fun, jac)
    x, form = batched_start(op, x0, "n")
    sides = None
    if name == "l-bfgs-b":
        sides = _sides(op, bounds, x)
        x = sides.project(x)
    values = _Values(op, fun, jac, x, args)
    limits = dict(
        history_size=settings["maxcor"], gtol=settings["gtol"], ftol=settings["ftol"], max_iter=settings["maxiter"],
        max_nfev=settings["maxfun"],
    )  # fmt: skip
    if sides is None:
        found = batched_lbfgs(values, x, **limits)
    else:
        found = batched_lbfgs_b(values, x, sides, max_trials=settings["maxls"], **limits)
    good, message = summary(found.status)
    if settings.get("disp"):
        print(f"{op}: {message}")
    return OptimizeResult(
        x=form.give(found.x),
        fun=form.give(found.value),
        jac=form.give(found.grad),
        nit=form.give(found.nit),
        nfev=form.give(found.nfev),
        njev=form.give(found.nfev),
        status=form.give(found.status),
        message=message,
        success=form.give(good),
    )
