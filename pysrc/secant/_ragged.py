"""Problems of different sizes, one behind the other in a flat vector, as rows of one size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant._functions import Malformed


class Ragged:
    """B problems, of which problem i has the entries offsets[i] to offsets[i + 1] of a flat vector.

    A row (n,), n the size of the largest, has the entries of a problem and zeros behind them. Nothing depends on these:
    their gradient is zero, so that they stay what they are.

    Args:
        op: for messages. x: (total,). offsets: B + 1 integers, increasing from 0 to total.

    Raises:
        TypeError, ValueError: offsets are something else.
    """

    def __init__(self, op: str, x: Tensor, offsets: Any) -> None:
        try:
            given = torch.as_tensor(offsets).to("cpu")
        except (TypeError, ValueError, RuntimeError):
            raise _checks.fail(op, "offsets", "B + 1 integers", _checks.show(offsets)) from None
        whole = given.dim() == 1 and len(given) >= 2 and not given.is_floating_point() and given.dtype != torch.bool
        if not whole or bool((given.diff() < 1).any()) or int(given[0]) != 0 or int(given[-1]) != len(x):
            expected = f"B + 1 integers that increase from 0 to {len(x)}, the length of x0"
            raise _checks.fail(op, "offsets", expected, _checks.show(given.tolist()))
        self._op = op
        self._sizes = given.diff().to(x.device, torch.int64)
        columns = torch.arange(int(self._sizes.max()), device=x.device)
        self._there = columns < self._sizes[:, None]

    def pad(self, flat: Tensor, index: Tensor | None = None) -> Tensor:
        """Bring entries, of all problems or of some, to rows (b, n)."""
        there = self._there if index is None else self._there.index_select(0, index)
        rows = flat.new_zeros(there.shape)
        rows[there] = flat
        return rows

    def flat(self, rows: Tensor, index: Tensor | None = None) -> Tensor:
        """Bring rows to entries, one problem behind the other."""
        return rows[self._there if index is None else self._there.index_select(0, index)]

    def function(self, fun: Callable[..., Any], gradients: bool | None) -> Callable[..., Any]:
        """Make a function of rows from one of entries; gradients: whether it returns these, None: (values, these)."""
        names = inspect.signature(fun).parameters

        def called(rows: Tensor, own: Tensor | None, *args: Any, **where: Any) -> Any:
            found = fun(self.flat(rows, own), *args, **where)
            if gradients is None:
                if not (isinstance(found, (tuple, list)) and len(found) == 2):
                    return found  # whoever asks for a pair complains
                return found[0], self._rows(found[1], own)
            return self._rows(found, own) if gradients else found

        if "index" not in names:
            return lambda rows, *args: called(rows, None, *args)

        def some(rows: Tensor, *args: Any, index: Tensor) -> Any:
            where: dict[str, Any] = {"index": index}
            if "offsets" in names:
                ends = self._sizes.index_select(0, index).cumsum(0)
                where["offsets"] = torch.cat([ends.new_zeros(1), ends])
            return called(rows, index, *args, **where)

        return some

    def _rows(self, g: Any, index: Tensor | None) -> Tensor:
        sizes = self._sizes if index is None else self._sizes.index_select(0, index)
        total = int(sizes.sum())
        if not (isinstance(g, Tensor) and g.shape == (total,)):
            raise Malformed(f"{self._op}: jac: expected a tensor ({total},), got {_checks.describe(g)}")
        return self.pad(g, index)
