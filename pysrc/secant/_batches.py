"""Many minimizations in one call: `minimize(batch=True)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant._fits import by_place, summary
from secant._functions import Malformed, batched_start, check_functions
from secant.result import OptimizeResult
from secant.solvers.batched_lbfgs import batched_lbfgs


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


def batched_minimize(
    op: str, fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], jac: Any, settings: Mapping[str, Any]
) -> OptimizeResult:
    """Run L-BFGS on B problems; the arguments are those of `secant.minimize`."""
    check_functions(op, fun, jac)
    x, form = batched_start(op, x0, "n")
    found = batched_lbfgs(
        _Values(op, fun, jac, x, args), x, history_size=settings["maxcor"], gtol=settings["gtol"],
        ftol=settings["ftol"], max_iter=settings["maxiter"], max_nfev=settings["maxfun"],
    )  # fmt: skip
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
