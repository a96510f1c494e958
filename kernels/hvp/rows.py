"""Sparse rows: torch.sparse_csr tensors, whose indices are input like any other and may be anything.

torch makes such a tensor without a look at its indices (`check_invariants=False`), and its own products trust them. So
they are checked before a kernel, or a product of torch, sees them: by `checked`, or inside a kernel as it reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_INDICES = (torch.int32, torch.int64)


class Parts(NamedTuple):
    """Of a sparse matrix, contiguous: row pointers (N + 1,), columns and values of the entries (nnz,)."""

    crow: Tensor
    col: Tensor
    values: Tensor


def parts(op: str, name: str, x: Tensor) -> Parts:
    """Return the parts of x, the contents of its indices not looked at.

    Raises:
        ValueError: their shapes or dtypes do not fit.
    """
    crow, col, values = x.crow_indices(), x.col_indices(), x.values()
    if crow.dtype not in _INDICES or col.dtype not in _INDICES:
        raise _error(op, name, "row pointers and columns of int32 or int64", f"{crow.dtype} and {col.dtype}")
    if crow.shape != (x.shape[0] + 1,):
        raise _error(op, name, f"{x.shape[0] + 1} row pointers", f"shape {tuple(crow.shape)}")
    if values.dim() != 1 or col.shape != values.shape:
        raise _error(op, name, "a column for every value", f"shapes {tuple(col.shape)} and {tuple(values.shape)}")
    return Parts(crow.contiguous(), col.contiguous(), values.resolve_neg().contiguous())


def checked(op: str, name: str, x: Tensor) -> Tensor:
    """Sparse rows x with valid indices of one dtype: what torch's own products may be trusted with.

    Raises:
        ValueError: a row has no right place or column; it is named.
    """
    crow, col, values = parts(op, name, x)
    n, d = x.shape
    low, high = crow[:-1], crow[1:]
    bad = (low < 0) | (high < low) | (high > len(col))
    bad[:1] |= low[:1] != 0
    bad[-1:] |= high[-1:] != len(col)
    if n == 0 and int(crow[0]) != len(col):
        raise _error(op, name, f"row pointers up to {len(col)}, the number of entries", f"{int(crow[0])}")
    if not bool(bad.any()):
        wrong = (col < 0) | (col >= d)
        if not bool(wrong.any()):
            if crow.dtype is col.dtype:
                return x
            return torch.sparse_csr_tensor(crow.long(), col.long(), values, x.shape, check_invariants=False)
        # The last row that begins at or before the entry.
        row = int(torch.searchsorted(crow.long(), wrong.nonzero()[0], right=True)) - 1
    else:
        row = int(bad.nonzero()[0])
    raise bad_row(op, name, x, row)


def bad_row(op: str, name: str, x: Tensor, row: int) -> ValueError:
    """Say what is wrong with a row of x."""
    crow, col, _ = parts(op, name, x)
    low, high, entries, n = int(crow[row]), int(crow[row + 1]), len(col), x.shape[0]
    first, last = (0 if row == 0 else low), (entries if row == n - 1 else high)
    if not (low == first and 0 <= low <= high <= entries and high == last):
        expected = f"row pointers that rise from 0 to {entries}, the number of entries"
        return _error(op, name, expected, f"{low} to {high} for row {row}")
    columns = col[low:high]
    wrong = columns[(columns < 0) | (columns >= x.shape[1])]
    return _error(op, name, f"columns in 0..{x.shape[1] - 1}", f"{int(wrong[0])} in row {row}")


def _error(op: str, name: str, expected: str, got: str) -> ValueError:
    return ValueError(f"{op}: {name}: expected {expected}, got {got}")
