"""The checks of `secant.glm.fit`: every argument is what it should be, or the error names it."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from secant.glm.objective import Objective
from secant.ops import _gate, hvp

OP = "glm.fit"
LOSSES = (*hvp.LOSSES, "multinomial")
SOLVERS = ("auto", "newton-cg", "newton-cholesky", "lbfgs")


def objective(
    X: Any, y: Any, *, loss: str, l2: float, sample_weight: Any, fit_intercept: bool, delta: float
) -> Objective:
    """The objective of these arguments.

    Raises:
        TypeError, ValueError: see `secant.glm.fit`; non-finite values of X are left to the first evaluation.
    """
    if loss not in LOSSES:
        raise _gate.fail(OP, "loss", f"one of {', '.join(LOSSES)}", repr(loss))
    number("l2", l2, low=0.0)
    number("delta", delta, low=0.0, strict=True)
    x = design(X)
    n = x.shape[0]
    target = _vector("y", y, n, x)
    c = None if sample_weight is None else _vector("sample_weight", sample_weight, n, x).to(x.dtype)
    total = float(n)
    if c is not None:
        if not bool(torch.isfinite(c).all()) or not bool((c >= 0.0).all()):
            raise _gate.fail(OP, "sample_weight", "finite numbers >= 0", f"{_worst(c)}")
        total = float(c.double().sum())
        if total == 0.0:
            raise _gate.fail(OP, "sample_weight", "at least one positive weight", "only zeros")
    target, classes = _targets(target, c, loss, bool(fit_intercept), x.dtype)
    return Objective(x, target, loss, float(delta), c, float(l2), bool(fit_intercept), classes, total)


def number(name: str, value: Any, *, low: float, strict: bool = False) -> None:
    """Check a finite real number >= low, or > low."""
    ok = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < low or (strict and value == low):
        raise _gate.fail(OP, name, f"a finite number {'>' if strict else '>='} {low:g}", repr(value))


def count(name: str, value: Any) -> None:
    """Check an integer >= 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise _gate.fail(OP, name, "an integer >= 1", repr(value))


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor of an array or tensor, sharing its memory where possible."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        with warnings.catch_warnings():  # of an array that may not be written to: nothing here writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.as_tensor(value.__array__() if hasattr(value, "__array__") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{OP}: {name}: expected a tensor or an array of numbers ({error})") from None


def design(X: Any) -> Tensor:
    """X as a row-major (N, d) tensor or a CSR one, not copied unless it is column-major."""
    x = as_tensor("X", X)
    if x.dtype not in _gate.REAL:
        raise TypeError(f"{OP}: X: expected dtype float32 or float64, got {x.dtype}")
    if x.layout not in (torch.strided, torch.sparse_csr):
        raise _gate.fail(OP, "X", "a dense or CSR tensor", f"layout {x.layout}")
    if x.layout is torch.sparse_csr and x.device.type != "cpu":
        raise _gate.fail(OP, "X", "a CSR tensor on the CPU", f"one on {x.device}")
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise _gate.fail(OP, "X", "shape (N, d) with N >= 1 and d >= 1", f"shape {tuple(x.shape)}")
    if x.layout is torch.sparse_csr:
        return hvp.checked_rows(OP, "X", x)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def check_finite(x: Tensor) -> None:
    """Name the first entry of X that is not finite.

    Raises:
        ValueError: there is one.
    """
    if x.layout is torch.sparse_csr:
        bad = ~torch.isfinite(x.values())
        if bool(bad.any()):
            raise _gate.fail(OP, "X", "finite values", f"{float(x.values()[bad][0])} among the stored values")
        return
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        i, j = (int(k) for k in bad.nonzero()[0])
        raise _gate.fail(OP, "X", "finite values", f"{float(x[i, j])} in row {i}, column {j}")


def _vector(name: str, value: Any, n: int, x: Tensor) -> Tensor:
    v = as_tensor(name, value)
    if v.layout is not torch.strided or v.shape != (n,):
        raise _gate.fail(OP, name, f"shape ({n},), one number per row of X", f"shape {tuple(v.shape)}")
    if v.device != x.device:
        raise _gate.fail(OP, name, f"device {x.device}, like X", v.device)
    if v.is_complex():
        raise TypeError(f"{OP}: {name}: expected real numbers, got {v.dtype}")
    return v.contiguous()


def _targets(y: Tensor, c: Tensor | None, loss: str, intercept: bool, dtype: torch.dtype) -> tuple[Tensor, int]:
    if loss == "multinomial":
        if y.is_floating_point() or y.dtype is torch.bool:
            raise TypeError(f"{OP}: y: expected integer classes 0, 1, ..., K - 1, got {y.dtype}")
        y = y.long()
        low, high = (int(k) for k in torch.aminmax(y))
        if low < 0 or high < 1:
            raise _gate.fail(OP, "y", "classes 0, 1, ..., K - 1 with K >= 2", f"values from {low} to {high}")
        weight = torch.bincount(y, weights=c, minlength=high + 1)
        if intercept and bool((weight == 0.0).any()):
            empty = int((weight == 0.0).nonzero()[0])
            raise _gate.fail(OP, "y", "a row of positive weight for every class", f"none for class {empty}")
        return y, high + 1
    y = y.to(dtype)
    if not bool(torch.isfinite(y).all()):
        raise _gate.fail(OP, "y", "finite values", _worst(y))
    if loss in ("logistic", "poisson"):
        if bool((y < 0.0).any()) or (loss == "logistic" and bool((y > 1.0).any())):
            expected = "values in [0, 1]" if loss == "logistic" else "values >= 0"
            raise _gate.fail(
                OP, "y", f"{expected} for loss {loss!r}", f"values from {float(y.min())} to {float(y.max())}"
            )
        weights = torch.ones_like(y) if c is None else c
        if intercept and not bool(weights @ y > 0.0):
            raise _gate.fail(OP, "y", "a positive target (there is no best intercept)", "only zeros")
        if intercept and loss == "logistic" and not bool(weights @ (1.0 - y) > 0.0):
            raise _gate.fail(OP, "y", "a target below 1: two classes (there is no best intercept)", "only ones")
    return y, 0


def _worst(v: Tensor) -> str:
    """The first entry that is not a finite number >= 0."""
    bad = ~torch.isfinite(v)
    if not bool(bad.any()):
        bad = v < 0.0
    i = int(bad.nonzero()[0])
    return f"{float(v[i])} at {i}"
