"""Many minimizations in one call: `minimize(batch=True)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant._fits import by_place, summary
from secant._functions import Malformed, batched_start, check_functions, start
from secant._ragged import Ragged
from secant._sides import pairs, side
from secant.result import OptimizeResult
from secant.solvers.batched_bfgs import batched_bfgs
from secant.solvers.batched_box import batched_lbfgs_b
from secant.solvers.batched_descent import Sides
from secant.solvers.batched_lbfgs import BatchedMinimum, batched_lbfgs
from secant.solvers.batched_newton import batched_newton
from secant.solvers.batched_trust_region import batched_trust_region
from secant.solvers.box import Box

#: Methods that `minimize` knows with batch=True.
BATCHED = ("l-bfgs", "l-bfgs-b", "bfgs", "newton", "trust-exact")
#: What a counter of a problem holds.
_MOST = 2**31 - 1


class _Values:
    """Evaluates a function of a user, its gradients and its Hessians for some of B problems."""

    def __init__(
        self, op: str, fun: Callable[..., Any], jac: Any, hess: Any, x0: Tensor, args: tuple[Any, ...]
    ) -> None:
        self._op, self._fun = op, by_place(fun, x0, args, {})[0]
        self._given = jac is True
        self._jac = by_place(jac, x0, args, {})[0] if callable(jac) else None
        self._hess = None if hess is None else by_place(hess, x0, args, {})[0]

    def __call__(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (b,) and g (b, n)."""
        if self._jac is not None or self._given:
            with torch.no_grad():
                value, g = self._with_gradient(x, index)
            return value.detach(), g.detach()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._followed(x, index)
            (g,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), g

    def hessian(self, x: Tensor, index: Tensor) -> Tensor:
        """Return Hessians (b, n, n): those that are given, or n backward passes, as every problem is its own row."""
        b, n = x.shape
        if self._hess is not None:
            with torch.no_grad():
                found = self._hess(x, index)
            if not (isinstance(found, Tensor) and found.shape == (b, n, n)):
                got = _checks.describe(found)
                raise Malformed(f"{self._op}: hess: expected a tensor (B, n, n) = {(b, n, n)}, got {got}")
            return found.detach().to(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            if self._jac is not None or self._given:
                _, g = self._with_gradient(x, index)
                if not g.requires_grad:
                    raise Malformed(f"{self._op}: jac: expected a gradient that autograd can follow (or give hess)")
            else:
                (g,) = torch.autograd.grad(self._followed(x, index).sum(), x, create_graph=True)
            if not g.requires_grad:  # of a linear function
                return x.new_zeros(b, n, n)
            rows = [
                torch.autograd.grad(g[:, i].sum(), x, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
                for i in range(n)
            ]
        return torch.stack(rows, 1)

    def _followed(self, x: Tensor, index: Tensor) -> Tensor:
        value = self._checked(self._fun(x, index), x)
        if not value.requires_grad:
            raise Malformed(f"{self._op}: fun: expected a tensor that autograd can follow (or give jac)")
        return value

    def _with_gradient(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        found = self._fun(x, index)
        value, g = self._pair(found) if self._given else (found, self._jac(x, index) if self._jac else None)
        return self._checked(value, x), self._gradient(g, x)

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
            return g.to(x)
        raise Malformed(f"{self._op}: jac: expected a tensor {tuple(x.shape)}, got {_checks.describe(g)}")


def _sides(op: str, bounds: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Read bounds as two tensors like x, (B, n) or (total,): pairs, what has lb and ub, or two tensors or arrays."""
    if isinstance(bounds, tuple) and len(bounds) == 2 and any(hasattr(bound, "shape") for bound in bounds):
        lower, upper = (side(op, f"bounds[{k}]", bound, x) for k, bound in enumerate(bounds))
    elif bounds is None or (hasattr(bounds, "lb") and hasattr(bounds, "ub")):
        lower, upper = pairs(op, bounds, x)
    else:
        lower, upper = (one.expand(x.shape) for one in pairs(op, bounds, x if x.dim() == 1 else x[0]))
    box = Box(lower.reshape(-1), upper.reshape(-1), x.dtype)
    lower, upper = (one.to(x.dtype).view(x.shape) for one in (box.lower, box.upper))
    return lower, upper


def batched_minimize(
    op: str,
    fun: Callable[..., Any],
    x0: Any,
    args: tuple[Any, ...],
    jac: Any,
    hess: Any,
    name: str,
    bounds: Any,
    offsets: Any,
    settings: Mapping[str, Any],
) -> OptimizeResult:
    """Run a method on B problems; the arguments are those of `secant.minimize`."""
    check_functions(op, fun, jac)
    if hess is not None and not callable(hess):
        raise _checks.fail(op, "hess", "None or a function", _checks.describe(hess))
    ragged = None
    if offsets is None:
        x, form = batched_start(op, x0, "n")
        given = x
    else:
        given, form = start(op, x0)
        if given.dim() != 1:
            raise _checks.fail(op, "x0", "shape (total,), as offsets are given", f"shape {tuple(given.shape)}")
        if hess is not None:
            raise _checks.fail(op, "hess", "None with offsets", _checks.describe(hess))
        ragged = Ragged(op, given, offsets)
        x = ragged.pad(given)
        fun = ragged.function(fun, None if jac is True else False)
        jac = ragged.function(jac, True) if callable(jac) else jac
    sides = None
    if name == "l-bfgs-b":
        lower, upper = _sides(op, bounds, given)
        if ragged is not None:
            lower, upper = ragged.pad(lower), ragged.pad(upper)
        sides = Sides(lower, upper)
        x = sides.project(x)
    found = _run(name, _Values(op, fun, jac, hess, x, args), x, sides, settings)
    good, message = summary(found.status)
    if settings.get("disp"):
        print(f"{op}: {message}")
    point, g = found.x, found.grad
    if ragged is not None:
        point, g = ragged.flat(point), ragged.flat(g)
    return OptimizeResult(
        x=form.give(point),
        fun=form.give(found.value),
        jac=form.give(g),
        nit=form.give(found.nit),
        nfev=form.give(found.nfev),
        njev=form.give(found.nfev),
        status=form.give(found.status),
        message=message,
        success=form.give(good),
    )


def _run(name: str, values: _Values, x: Tensor, sides: Sides | None, settings: Mapping[str, Any]) -> BatchedMinimum:
    limits: dict[str, Any] = {
        "gtol": settings["gtol"],
        "ftol": settings["ftol"],
        "max_iter": min(settings.get("maxiter", 200 * x.shape[1]), _MOST),
        "max_nfev": min(settings.get("maxfun", _MOST), _MOST),
    }
    if sides is not None:
        size, trials = settings["maxcor"], settings["maxls"]
        return batched_lbfgs_b(values, x, sides, history_size=size, max_trials=trials, **limits)
    if name == "l-bfgs":
        return batched_lbfgs(
            values, x, history_size=settings["maxcor"], check_every=settings.get("check_every"), **limits
        )
    if name == "bfgs":
        return batched_bfgs(values, x, **limits)
    if name == "newton":
        return batched_newton(values, values.hessian, x, **limits)
    most = float(settings["max_trust_radius"])
    size = x.double().norm(dim=-1)
    radius = torch.where((size > 0.0) & size.isfinite(), size, 1.0)
    if "initial_trust_radius" in settings:
        radius = torch.full_like(radius, settings["initial_trust_radius"])
    return batched_trust_region(
        values, values.hessian, x, radius, max_radius=most, eta=settings.get("eta", 0.01), **limits
    )
