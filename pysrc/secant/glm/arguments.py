"""The checks of `secant.glm.fit`: every argument is what it should be, or the error names it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant.glm.gram import row_blocks
from secant.glm.objective import Objective
from secant.ops import hvp

OP = "glm.fit"
LOSSES = (*hvp.LOSSES, "multinomial")
SOLVERS = ("auto", "newton-cg", "newton-cholesky", "lbfgs", "min-norm")


#: Rows that are looked at to see how far from zero the features are for their spread.
_LOOK = 4096
#: Mean over standard deviation of a feature above which it is centred: the rounding of a product that cancels to its
#: centred part is then worth a slower pass.
_FAR = {torch.float32: 16.0, torch.float64: 1e5}


def objective(
    X: Any,
    y: Any,
    *,
    loss: str,
    l2: float,
    sample_weight: Any,
    fit_intercept: bool,
    delta: float,
    power: float = 1.5,
    offset: Any = None,
) -> Objective:
    """Make the objective of these arguments.

    Raises:
        TypeError, ValueError: see `secant.glm.fit`; non-finite values of X are left to the first evaluation.
    """
    if loss not in LOSSES:
        raise _checks.fail(OP, "loss", f"one of {', '.join(LOSSES)}", _checks.show(loss))
    l2, delta = _checks.nonnegative(OP, "l2", l2), _checks.positive(OP, "delta", delta)
    power = _checks.number(OP, "power", power, "a number between 1 and 2, neither included", lambda p: 1.0 < p < 2.0)
    x = design(X)
    n = x.shape[0]
    target = _vector("y", y, n, x)
    c = None if sample_weight is None else _vector("sample_weight", sample_weight, n, x).to(x.dtype)
    total = float(n)
    if c is not None:
        if not bool(torch.isfinite(c).all()) or not bool((c >= 0.0).all()):
            raise _checks.fail(OP, "sample_weight", "finite numbers >= 0", f"{_worst(c)}")
        total = float(c.double().sum())
        if total == 0.0:
            raise _checks.fail(OP, "sample_weight", "at least one positive weight", "only zeros")
    if type(fit_intercept).__name__ not in ("bool", "bool_"):  # numpy's too
        raise _checks.fail(OP, "fit_intercept", "True or False", _checks.show(fit_intercept))
    level = _level(target, c) if fit_intercept and loss in ("squared", "huber") else 0.0
    target, classes = _targets(target.double() - level if level else target, loss, x.dtype)
    o = None if offset is None else _offset(offset, x, classes)
    shift = _shift(x, c) if fit_intercept else None
    return Objective(x, target, loss, delta, c, l2, bool(fit_intercept), classes, total, o, shift, level, power)


def _offset(value: Any, x: Tensor, classes: int) -> Tensor:
    shape = (x.shape[0], classes) if classes else (x.shape[0],)
    o = _values("offset", value, shape, x).to(x.dtype)
    if not bool(torch.isfinite(o).all()):
        raise _checks.fail(OP, "offset", "finite values", f"{float(o[~torch.isfinite(o)][0])}")
    return o


def _level(y: Tensor, c: Tensor | None) -> float:
    """Choose what to take off the targets of a loss of differences: their mean, if that is far from zero."""
    y = y.double() if c is None else y[c > 0.0].double()
    mean, spread = float(y.mean()), float(y.std(correction=0))
    return mean if math.isfinite(mean) and abs(mean) > _FAR[torch.float32] * spread else 0.0


def _shift(x: Tensor, c: Tensor | None = None) -> Tensor | None:
    """Choose what to take off the features: the mean of those far from zero for their spread; None if none is.

    Means of some rows, of positive weight, serve as well as those of all: what is left has to be of the size of the
    spread, no more.
    """
    n, d = x.shape
    if x.layout is torch.strided:
        if c is None or bool((c > 0.0).all()):
            some = x[:: max(1, n // _LOOK)]
        else:
            rows = (c > 0.0).nonzero()[:, 0]
            some = x[rows[:: max(1, len(rows) // _LOOK)]]
    else:
        # A column with few zeros alone can be far from zero for its spread.
        full = torch.bincount(x.col_indices(), minlength=d) >= 0.9 * n
        if not bool(full.any()):
            return None
        _, stop, some = next(row_blocks(x, min(n, max(64, (1 << 22) // d))))
        if c is not None and bool((c[:stop] > 0.0).any()):
            some = some[c[:stop] > 0.0]
    some = some.double()
    mean, spread = some.mean(0), some.std(0, correction=0)
    # Of a column that does not vary the size itself counts.
    ratio = mean.abs() / torch.where(spread > 0.0, spread, 1.0)
    far = torch.isfinite(mean) & torch.isfinite(ratio) & (ratio > _FAR[x.dtype])
    return torch.where(far, mean, 0.0).to(x.dtype) if bool(far.any()) else None


def as_tensor(name: str, value: Any) -> Tensor:
    """Make a tensor of an array or tensor, sharing its memory where possible.

    An array of another byte order, or with a negative stride, is copied: no tensor has such memory.
    """
    if isinstance(value, Tensor):
        if value.is_nested or value.is_meta:
            kind = "a nested tensor" if value.is_nested else "a tensor without memory, on device meta"
            raise TypeError(f"{OP}: {name}: expected a tensor or an array of numbers, got {kind}")
        return value.detach().resolve_neg()
    try:
        array = value.__array__() if hasattr(value, "__array__") else value
        if hasattr(array, "dtype") and hasattr(array, "strides"):
            if not array.dtype.isnative:
                array = array.astype(array.dtype.newbyteorder("="))
            if any(stride < 0 for stride in array.strides):
                array = array.copy()
            if array.dtype.kind == "f" and array.dtype.itemsize > 8:
                array = array.astype("f8")
        with warnings.catch_warnings():  # of an array that may not be written to: nothing here writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            x = torch.as_tensor(array)
            # Python's floats have 53 bits; torch takes them for its default dtype.
            plain = not hasattr(array, "dtype") and x.is_floating_point() and name != "X"
            return torch.as_tensor(array, dtype=torch.float64) if plain else x
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{OP}: {name}: expected a tensor or an array of numbers ({error})") from None


def design(X: Any) -> Tensor:
    """Take X as a row-major (N, d) tensor or a CSR one, not copied unless it is column-major."""
    x = as_tensor("X", X)
    if x.dtype not in _checks.REAL:
        raise TypeError(f"{OP}: X: expected dtype float32 or float64, got {x.dtype}")
    if x.layout not in (torch.strided, torch.sparse_csr):
        raise _checks.fail(OP, "X", "a dense or CSR tensor", f"layout {x.layout}")
    if x.layout is torch.sparse_csr and x.device.type != "cpu":
        raise _checks.fail(OP, "X", "a CSR tensor on the CPU", f"one on {x.device}")
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise _checks.fail(OP, "X", "shape (N, d) with N >= 1 and d >= 1", f"shape {tuple(x.shape)}")
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
            raise _checks.fail(OP, "X", "finite values", f"{float(x.values()[bad][0])} among the stored values")
        return
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        i, j = (int(k) for k in bad.nonzero()[0])
        raise _checks.fail(OP, "X", "finite values", f"{float(x[i, j])} in row {i}, column {j}")


def _vector(name: str, value: Any, n: int, x: Tensor) -> Tensor:
    return _values(name, value, (n,), x, ", one number per row of X")


def _values(name: str, value: Any, shape: tuple[int, ...], x: Tensor, meaning: str = "") -> Tensor:
    v = as_tensor(name, value)
    if v.layout is not torch.strided or v.shape != shape:
        raise _checks.fail(OP, name, f"shape {shape}{meaning}", f"shape {tuple(v.shape)}")
    if v.device != x.device:
        raise _checks.fail(OP, name, f"device {x.device}, like X", v.device)
    if v.is_complex():
        raise TypeError(f"{OP}: {name}: expected real numbers, got {v.dtype}")
    return v.contiguous()


def _targets(y: Tensor, loss: str, dtype: torch.dtype) -> tuple[Tensor, int]:
    if loss == "multinomial":
        if y.is_floating_point() or y.dtype is torch.bool:
            raise TypeError(f"{OP}: y: expected integer classes 0, 1, ..., K - 1, got {y.dtype}")
        y = y.long()
        low, high = (int(k) for k in torch.aminmax(y))
        if low < 0 or high < 1:
            raise _checks.fail(OP, "y", "classes 0, 1, ..., K - 1 with K >= 2", f"values from {low} to {high}")
        return y, high + 1
    y = y.to(dtype)
    if not bool(torch.isfinite(y).all()):
        raise _checks.fail(OP, "y", "finite values", _worst(y))
    counts = "values >= 0"
    ranges = {"logistic": "values in [0, 1]", "poisson": counts, "tweedie": counts, "gamma": "values > 0"}
    low = bool((y <= 0.0).any()) if loss == "gamma" else bool((y < 0.0).any())
    if loss in ranges and (low or (loss == "logistic" and bool((y > 1.0).any()))):
        got = f"values from {float(y.min())} to {float(y.max())}"
        raise _checks.fail(OP, "y", f"{ranges[loss]} for loss {loss!r}", got)
    return y, 0


def _worst(v: Tensor) -> str:
    """Name the first entry that is not a finite number >= 0."""
    bad = ~torch.isfinite(v)
    if not bool(bad.any()):
        bad = v < 0.0
    i = int(bad.nonzero()[0])
    return f"{float(v[i])} at {i}"
