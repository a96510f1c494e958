"""Rows and columns of an operator, by products with unit vectors."""

from __future__ import annotations

import operator as python_operator
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant.curvature._operator import LinearOperator


def indices(op: str, name: str, chosen: object, n: int, device: torch.device) -> tuple[Tensor, bool]:
    """Find places among n, an int64 tensor (k,), and whether a single one was meant.

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


class Submatrix(LinearOperator):
    """A[rows, columns], known by products with A: S v puts v at the columns of a zero vector and takes the rows.

    Args:
        operator: A. rows, columns: int64 (r,) and (c,), any order, repetitions allowed. symmetric: whether both are the
            same choice of a symmetric A.
    """

    def __init__(self, operator: LinearOperator, rows: Tensor, columns: Tensor, *, symmetric: bool = False) -> None:
        super().__init__((len(rows), len(columns)), operator.dtype, operator.device, symmetric=symmetric)
        self.operator, self.rows, self.columns = operator, rows, columns

    @property
    def _has_transpose(self) -> bool:
        return self.operator._has_transpose

    def __repr__(self) -> str:
        return f"Submatrix(shape={tuple(self.shape)} of {self.operator!r})"

    def _rows(self, vectors: Tensor) -> Tensor:
        whole = torch.zeros(len(vectors), self.operator.shape[1], dtype=self.dtype, device=self.device)
        whole.index_add_(1, self.columns, vectors)
        return self.operator._rows(whole)[:, self.rows]

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        whole = torch.zeros(len(vectors), self.operator.shape[0], dtype=self.dtype, device=self.device)
        whole.index_add_(1, self.rows, vectors)
        return self.operator._transposed_rows(whole)[:, self.columns]


def submatrix(op: str, operator: LinearOperator, rows: Any, columns: Any) -> Submatrix:
    """Choose rows and columns, each as `indices` takes them."""
    m, n = operator.shape
    chosen = indices(op, "rows", rows, m, operator.device)[0]
    symmetric = operator.symmetric and rows is columns
    others = chosen if symmetric else indices(op, "columns", columns, n, operator.device)[0]
    return Submatrix(operator, chosen, others, symmetric=symmetric)


def block(op: str, operator: LinearOperator, key: Any) -> Tensor:
    """Return A[key] as a dense tensor: rows and columns are chosen independently (as by `numpy.ix_`)."""
    pair = key if isinstance(key, tuple) else (key, slice(None))
    if len(pair) != 2:
        raise IndexError(f"{op}: index: expected rows, or rows and columns, got {len(pair)} of them")
    (rows, one_row), (columns, one_column) = (
        indices(op, name, x, size, operator.device)
        for name, x, size in zip(("rows", "columns"), pair, operator.shape, strict=True)
    )
    found = Submatrix(operator, rows, columns).to_dense()
    if one_row:
        found = found[0]
    return found[..., 0] if one_column else found
