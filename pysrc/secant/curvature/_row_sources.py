"""Where the rows of a Jacobian come from: one backward pass, a function of one sample, or a pass for each row."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import _graph, _rows
from secant.curvature._columns import agree
from secant.curvature._operator import LinearOperator
from secant.curvature._parameters import Parameters
from secant.curvature._row_uses import NotUnderstood

if TYPE_CHECKING:
    from secant.curvature.jacobian import Jacobian

#: Bytes that J may take, unless told otherwise.
MAX_BYTES = 2**29
#: Rows by `row`, or by backward passes, that are found together.
_TOGETHER = 256


class Facts:
    """What an operator has found out about its rows, and a room for them that points of one problem share.

    Attributes:
        said: how rows were found. seen: the points at which a computation with some signature was met, and at how many
            it was not checked in a way that tells of every parameter.
    """

    def __init__(self) -> None:
        self.said: str | None = None
        self.seen: dict[Any, int] = {}
        self.reasons: dict[Any, str] = {}
        self._room: Tensor | None = None

    def __copy__(self) -> Facts:
        other = Facts()
        other.__dict__.update(self.__dict__)
        other.seen, other.reasons = dict(self.seen), dict(self.reasons)
        return other

    def __deepcopy__(self, memo: Any) -> Facts:
        return copy.copy(self)

    def room(self, rows: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for so many rows, which other points have had: new memory costs more than what is written."""
        room = self._room
        if room is None or room.numel() < rows * n or room.dtype is not dtype or room.device != device:
            self._room = room = torch.empty(rows * n, dtype=dtype, device=device)
        return room[: rows * n].view(rows, n)

    def source(
        self, parts: Sequence[Tensor], slots: _graph.Slots, operator: Jacobian, row: RowFunction | None, first: int
    ) -> _rows.Source:
        """Find the rows of one batch.

        Args:
            parts: the residuals. row: the function of one sample, where there is one. first: rows before this batch.
        """
        params = operator.params
        m = sum(x.numel() for x in parts)
        try:
            rows = _rows.Rows(parts, params, slots)
            reason = self._verdict(rows, operator)
        except NotUnderstood as error:
            reason = str(error)
        if reason is None:
            self.said = self.said or "one backward pass"
            return rows
        if row is None:
            self.said = f"backward passes: {reason}"
            return Passes(operator, first, m)
        self.said = f"row: {reason}"
        found = row.at(parts)
        if "row" not in self.seen and found.check(parts, operator):
            self.seen["row"] = 1
        return found

    def _verdict(self, rows: _rows.Rows, operator: Jacobian) -> str | None:
        """Tell what is wrong with rows.

        Where the same was computed before with values of the same shapes, that stays so, but what multiplies a zero (of
        a last layer at its start) may hide until that is one no longer. So it is checked again at the next point as
        long as a parameter has no gradient, and at the second, fourth, eighth and so on in any case. Where an operation
        is not known, what it does may depend on values (a sort, an index), so that each point and batch is checked.
        """
        if not _rows.is_telling(operator._eps):
            guess = f"that {rows.guessed} keeps rows apart cannot be checked at this precision"
            return guess if rows.guessed else None
        signature = rows.signature()
        if signature in self.reasons:
            return self.reasons[signature]
        count = self.seen.get(signature, 0) + 1
        if count & (count - 1) and not rows.guessed:
            self.seen[signature] = count
            return None
        generator = operator.generator(count)
        w = torch.randn(rows.m, dtype=operator.dtype, device=operator.device, generator=generator)
        reason, telling = rows.check(w, operator._eps)
        if reason == _rows.NOT_FINITE and count > 1 and not rows.guessed:
            return None  # of what was checked before; the count stays for the next point
        if reason is None:
            self.seen[signature] = count if telling else 0
        elif telling:
            self.reasons[signature] = reason
        return reason


class Passes:
    """Rows by one backward pass each, several at once where that works."""

    full, least = True, 1

    def __init__(self, operator: Jacobian, first: int, m: int) -> None:
        self.operator, self.first, self.m = operator, first, m

    def blocks(self, most: int) -> Iterator[tuple[slice, _rows.Write]]:
        """Yield where at most so many rows are, and what writes them into a tensor (rows, n)."""
        m, n = self.operator.shape
        if n < m == self.m <= most:  # as many products as there are columns are less
            yield slice(0, m), self._write_all
            return
        most = min(most, _TOGETHER)
        for low in range(0, self.m, most):
            rows = slice(low, min(self.m, low + most))
            yield rows, functools.partial(self._write, rows)

    def _write_all(self, out: Tensor) -> None:
        out.copy_(LinearOperator.to_dense(self.operator))

    def _write(self, rows: slice, out: Tensor) -> None:
        unit = torch.zeros(len(out), self.operator.shape[0], dtype=out.dtype, device=out.device)
        unit.diagonal(self.first + rows.start).fill_(1)
        out.copy_(self.operator._transposed_rows(unit))


class RowFunction:
    """A function of the parameters and one sample that gives its residuals.

    Args:
        op: the operator, for messages. row, samples, names: see `Jacobian`; names of the parameters.

    Raises:
        TypeError, ValueError: they are something else.
    """

    def __init__(
        self, op: str, row: Callable[..., Any] | None, samples: Any, params: Parameters, names: list[str] | None
    ) -> None:
        if not callable(row):
            raise TypeError(f"{op}: row: expected a function, got {_checks.describe(row)}")
        self.op, self.row, self.samples, self.params, self.names = op, row, samples, params, names
        if not callable(samples):
            self._read(samples)

    def _read(self, samples: Any) -> tuple[Tensor, ...]:
        found = samples if isinstance(samples, (tuple, list)) else (samples,)
        if not found or not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) == len(found[0]) for x in found):
            got = ", ".join(_checks.describe(x) for x in found) or "none"
            raise _checks.fail(self.op, "samples", "tensors with one first dimension, that of the samples", got)
        return tuple(x.detach() for x in found)

    def at(self, parts: Sequence[Tensor]) -> ByFunction:
        """Return the rows at the current point.

        Args:
            parts: the residuals of the closure, which the function has to give too.

        Raises:
            ValueError: it gives others.
        """
        source = ByFunction(self, self._read(self.samples() if callable(self.samples) else self.samples))
        residuals = torch.cat([x.detach().reshape(-1) for x in parts])
        got = source.values()
        eps = max(torch.finfo(x.dtype).eps for x in (residuals, got))
        if got.shape != residuals.shape or not _are_near(got, residuals, eps**0.5):
            expected = f"the {len(residuals)} residuals of the closure, sample by sample"
            raise _checks.fail(self.op, "row", expected, f"{len(got)} others" if got.dim() else "one")
        return source

    def call(self, tensors: Sequence[Tensor], sample: Sequence[Tensor]) -> Tensor:
        """Return the residuals of one sample."""
        given = list(tensors) if self.names is None else dict(zip(self.names, tensors, strict=True))
        found = self.row(given, *sample)
        if not isinstance(found, Tensor):
            raise TypeError(f"{self.op}: row: expected residuals of one sample, got {type(found).__name__}")
        return found.reshape(-1)


def _are_near(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Tell whether the same numbers are finite, and these agree."""
    finite = torch.isfinite(y)
    same = (torch.isfinite(x) == finite).all()
    x, y = x.where(finite, 0.0), y.where(finite, 0.0)
    return bool(same & (torch.linalg.vector_norm(x - y) <= tolerance * (1 + torch.linalg.vector_norm(y))))


class ByFunction:
    """Rows by the derivative of a function of one sample, for several samples at once.

    Args:
        function: of one sample. samples: tensors, sample after sample.
    """

    full = True

    def __init__(self, function: RowFunction, samples: tuple[Tensor, ...]) -> None:
        self.function, self.samples = function, samples
        self.points = [p.detach() for p in function.params.tensors]
        self.m, self.least = 0, 1

    def values(self) -> Tensor:
        """Return the residuals of all samples, flat."""
        found = torch.vmap(lambda *sample: self.function.call(self.points, sample))(*self.samples)
        self.m = found.numel()
        self.least = max(1, self.m // max(1, len(self.samples[0])))
        return found.reshape(-1).detach()

    def check(self, parts: Sequence[Tensor], operator: Jacobian) -> bool:
        """Compare J^T w with automatic differentiation of the closure, for a random w.

        Returns:
            Whether it did: not so where that is not finite.

        Raises:
            ValueError: they differ.
        """
        params = self.function.params
        w = torch.randn(self.m, dtype=params.dtype, device=params.device, generator=operator.generator(0))
        live = [(x, u.view(x.shape)) for x, u in zip(parts, w.split([x.numel() for x in parts]), strict=True)]
        live = [(x, u.to(x.dtype)) for x, u in live if x.requires_grad]
        want, got = torch.empty(params.n, dtype=w.dtype, device=w.device), w.new_zeros(params.n)
        outputs, cotangents = [x for x, _ in live], [u for _, u in live]
        params.join(
            torch.autograd.grad(outputs, params.tensors, cotangents, retain_graph=True, allow_unused=True), want
        )
        for rows, write in self.blocks(_TOGETHER):
            block = w.new_empty(rows.stop - rows.start, params.n)
            write(block)
            got.addmv_(block.T, w[rows])
        if not bool(torch.isfinite(want).all()):
            return False
        if not agree(got, want, operator._eps):
            expected = "the derivatives of the closure's residuals, each of one sample alone"
            raise _checks.fail(self.function.op, "row", expected, "the same values with others")
        return True

    def blocks(self, most: int) -> Iterator[tuple[slice, _rows.Write]]:
        """Yield where at most so many rows are, or those of one sample, and what writes them."""
        count, each = len(self.samples[0]), self.least
        step = max(1, min(most, _TOGETHER) // each)
        for low in range(0, count, step):
            high = min(count, low + step)
            yield slice(low * each, high * each), functools.partial(self._write, low, high)

    def _write(self, low: int, high: int, out: Tensor) -> None:
        def residuals(tensors: list[Tensor], *sample: Tensor) -> Tensor:
            return self.function.call(tensors, sample)

        with torch.enable_grad():
            jacobian = torch.vmap(torch.func.jacrev(residuals), in_dims=(None, *[0] * len(self.samples)))
            found = jacobian(self.points, *(x[low:high] for x in self.samples))
        for place, x in zip(out.split(self.function.params.sizes, 1), found, strict=True):
            place.copy_(x.detach().reshape(len(out), -1))
