"""Rows and columns of an operator, by products with unit vectors."""

from __future__ import annotations

import operator as python_operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secant import _checks

if TYPE_CHECKING:
    from secant.curvature._operator import LinearOperator

#: Unit vectors multiplied together.
_TOGETHER = 16


def indices(op: str, name: str, chosen: object, n: int, device: torch.device) -> tuple[Tensor, bool]:
    """Places among n as an int64 tensor (k,), and whether a single one was meant.

    Args:
        chosen: an int, a slice, a sequence of ints, an integer tensor (k,) or a boolean one (n,).

    Raises:
        TypeError, IndexError: it is something else, or out of range.
    """
    expected = f"an index, a slice, a sequence of indices or a mask of {n}"
    if isinstance(chosen, slice):
        try:
            places = list(range(*chosen.indices(n)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{op}: {name}: expected {expected}, got {chosen!r}") from error
        return torch.tensor(places, dtype=torch.int64, device=device), False
    if isinstance(chosen, Tensor):
        if chosen.dtype is torch.bool and chosen.shape == (n,):
            return chosen.nonzero()[:, 0].to(device), False
        if chosen.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) or chosen.dim() > 1:
            raise TypeError(f"{op}: {name}: expected {expected}, got {_checks.describe(chosen)}")
        found, single = chosen.reshape(-1).tolist(), chosen.dim() == 0
    elif isinstance(chosen, (list, tuple, range)):
        found, single = list(chosen), False
    else:
        found, single = [chosen], True
    places = []
    for x in found:
        if isinstance(x, bool) or not hasattr(x, "__index__"):
            raise TypeError(f"{op}: {name}: expected {expected}, got {_checks.describe(x)}")
        i = python_operator.index(x)
        if not -n <= i < n:
            raise IndexError(f"{op}: {name}: expected indices from {-n} to {n - 1}, got {_short(i)}")
        places.append(i % n)
    return torch.tensor(places, dtype=torch.int64, device=device), single


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**20 else "an int of more than 20 digits"


class Submatrix:
    """A[rows, columns], known by products with A: S v puts v at the columns of a zero vector and takes the rows.

    Args:
        operator: A, symmetric. rows, columns: int64 (r,) and (c,), any order, repetitions allowed.

    Attributes:
        shape: (r, c). dtype, device: of the operator.
    """

    def __init__(self, operator: LinearOperator, rows: Tensor, columns: Tensor) -> None:
        self.operator, self.rows, self.columns = operator, rows, columns
        self.shape = torch.Size((len(rows), len(columns)))
        self.dtype, self.device = operator.dtype, operator.device

    def __repr__(self) -> str:
        return f"Submatrix(shape={tuple(self.shape)} of {self.operator!r})"

    def matvec(self, v: Tensor) -> Tensor:
        """S v: v (c,) to (r,).

        Raises:
            TypeError, ValueError: `v` does not fit.
        """
        _checks.shaped("Submatrix.matvec", "v", v, (self.shape[1],), self.dtype, self.device)
        return self._product(v.unsqueeze(1))[:, 0]

    def matmat(self, v: Tensor) -> Tensor:
        """S V: V (c, k) to (r, k).

        Raises:
            TypeError, ValueError: `v` does not fit.
        """
        _checks.tensor("Submatrix.matmat", "v", v, (self.dtype,), self.device)
        if v.dim() != 2 or v.shape[0] != self.shape[1]:
            raise _checks.fail("Submatrix.matmat", "v", f"shape ({self.shape[1]}, k)", f"shape {tuple(v.shape)}")
        return self._product(v)

    def _product(self, v: Tensor) -> Tensor:
        whole = torch.zeros(self.operator.shape[0], v.shape[1], dtype=self.dtype, device=self.device)
        whole.index_add_(0, self.columns, v.detach())
        return self.operator.matmat(whole)[self.rows]

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matmat(v) if isinstance(v, Tensor) and v.dim() == 2 else self.matvec(v)

    def __rmatmul__(self, v: Tensor) -> Tensor:
        return (self.T @ v.mT).mT if isinstance(v, Tensor) and v.dim() == 2 else self.T @ v

    @property
    def T(self) -> Submatrix:
        """A[columns, rows], since A is symmetric."""
        return Submatrix(self.operator, self.columns, self.rows)

    def adjoint(self) -> Submatrix:
        """The transpose."""
        return self.T

    def to_dense(self) -> Tensor:
        """The matrix (r, c), by as many products with A as it has rows or columns, whichever are fewer."""
        if self.shape[0] < self.shape[1]:
            return self.T.to_dense().mT
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for first in range(0, self.shape[1], _TOGETHER):
            columns = self.columns[first : first + _TOGETHER]
            unit = torch.zeros(self.operator.shape[0], len(columns), dtype=self.dtype, device=self.device)
            unit[columns, torch.arange(len(columns), device=self.device)] = 1
            out[:, first : first + _TOGETHER] = self.operator.matmat(unit)[self.rows]
        return out


def block(op: str, operator: LinearOperator, key: Any) -> Tensor:
    """A[key] as a dense tensor: rows and columns are chosen independently (as by `numpy.ix_`)."""
    pair = key if isinstance(key, tuple) else (key, slice(None))
    if len(pair) != 2:
        raise IndexError(f"{op}: index: expected rows, or rows and columns, got {len(pair)} of them")
    n, device = operator.shape[0], operator.device
    (rows, one_row), (columns, one_column) = (
        indices(op, name, x, n, device) for name, x in zip(("rows", "columns"), pair, strict=True)
    )
    found = Submatrix(operator, rows, columns).to_dense()
    if one_row:
        found = found[0]
    return found[..., 0] if one_column else found
