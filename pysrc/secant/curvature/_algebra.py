"""Operators made of operators: transposes, multiples, sums, damped ones, chains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from secant import _checks
from secant.curvature._estimators import Diagonal
from secant.curvature._operator import LinearOperator, Seed


class Transposed(LinearOperator):
    """A^T of an operator that is not symmetric."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            None, operator.dtype, operator.device, operator.out_shapes, out_shapes=operator.shapes, symmetric=False
        )
        self.operator = operator

    @property
    def shape(self) -> torch.Size:
        """(n, m) of an operator of (m, n)."""
        m, n = self.operator.shape
        return torch.Size((n, m))

    @property
    def T(self) -> LinearOperator:
        """Return the operator itself."""
        return self.operator

    @property
    def _name(self) -> str:
        return f"{self.operator._name}.T"

    def _rows(self, vectors: Tensor) -> Tensor:
        return self.operator._transposed_rows(vectors)

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        return self.operator._rows(vectors)


class _Wrapper(LinearOperator):
    """An operator of the shape of another one."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            None,
            operator.dtype,
            operator.device,
            operator.shapes,
            out_shapes=operator.out_shapes,
            symmetric=operator.symmetric,
        )
        self.operator = operator

    @property
    def shape(self) -> torch.Size:
        """Return that of the operator within."""
        return self.operator.shape

    @property
    def _has_transpose(self) -> bool:
        return self.operator._has_transpose


class Damped(_Wrapper):
    """A + lambda I, or A + diag(lambda).

    Args:
        operator: A, square. damping: lambda, a finite number, a tensor of one element, or of one per row (n,). A tensor
            on the operator's device is read at each product: it may be changed in place.

    Raises:
        TypeError, ValueError: `damping` is something else, or A is not square.
    """

    def __init__(self, operator: LinearOperator, damping: float | Tensor) -> None:
        if not operator.symmetric:
            operator._square(f"{operator._name}.damped")
        self.damping = _number(operator._name, "damping", damping, operator)
        super().__init__(operator)

    def diag(self, num_probes: int | None = 100, *, distribution: str = "rademacher", seed: Seed = 0) -> Diagonal:
        """Estimate the diagonal of A, and add lambda; see `LinearOperator.diag`."""
        value, stderr = self.operator.diag(num_probes, distribution=distribution, seed=seed)
        return Diagonal(value + self.damping, stderr)

    def _rows(self, vectors: Tensor) -> Tensor:
        return self._shifted(self.operator._rows(vectors), vectors)

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        return self._shifted(self.operator._transposed_rows(vectors), vectors)

    def _shifted(self, found: Tensor, vectors: Tensor) -> Tensor:
        if isinstance(self.damping, Tensor):
            return found.addcmul_(vectors, self.damping.to(found.dtype))
        return found.add_(vectors, alpha=self.damping)


class Scaled(_Wrapper):
    """factor A.

    Args:
        operator: A. factor: a finite number, or a tensor of one element, which is read at each product.

    Raises:
        TypeError, ValueError: `factor` is something else.
    """

    def __init__(self, operator: LinearOperator, factor: float | Tensor) -> None:
        self.factor = _number(f"{operator._name} * factor", "factor", factor)
        if isinstance(self.factor, Tensor):
            self.factor = self.factor.to(operator.device)
        super().__init__(operator)

    def _times(self, found: Tensor) -> Tensor:
        return found.mul_(self.factor.to(found.dtype) if isinstance(self.factor, Tensor) else self.factor)

    def _rows(self, vectors: Tensor) -> Tensor:
        return self._times(self.operator._rows(vectors))

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        return self._times(self.operator._transposed_rows(vectors))

    def _exact_diagonal(self) -> Tensor:
        return self._times(self.operator._exact_diagonal())


#: An operator and its factor in a sum.
_Summand = tuple[LinearOperator, float]


class Sum(LinearOperator):
    """sum_i c_i A_i for operators of one shape, dtype and device; see `added`."""

    def __init__(self, terms: Sequence[_Summand]) -> None:
        first = terms[0][0]
        symmetric = all(operator.symmetric for operator, _ in terms)
        super().__init__(
            None, first.dtype, first.device, first.shapes, out_shapes=first.out_shapes, symmetric=symmetric
        )
        self.terms = list(terms)

    @property
    def shape(self) -> torch.Size:
        """Return that of every summand."""
        return self.terms[0][0].shape

    @property
    def _has_transpose(self) -> bool:
        return all(operator._has_transpose for operator, _ in self.terms)

    def _rows(self, vectors: Tensor) -> Tensor:
        return _combined([(operator._rows(vectors), factor) for operator, factor in self.terms])

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        return _combined([(operator._transposed_rows(vectors), factor) for operator, factor in self.terms])

    def _exact_diagonal(self) -> Tensor:
        return _combined([(operator._exact_diagonal(), factor) for operator, factor in self.terms])


def _combined(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Add new tensors times their factors, into the first."""
    total, factor = parts[0]
    if factor != 1.0:
        total.mul_(factor)
    for part, factor in parts[1:]:
        total.add_(part, alpha=factor)
    return total


def _summands(operator: LinearOperator) -> list[_Summand]:
    if isinstance(operator, Sum):
        return operator.terms
    if isinstance(operator, Scaled) and isinstance(operator.factor, float):
        return [(operator.operator, operator.factor)]
    return [(operator, 1.0)]


def added(left: LinearOperator, right: LinearOperator, sign: str) -> Sum:
    """Return left + right, or left - right for the sign "-".

    Raises:
        TypeError, ValueError: they differ in shape, dtype or device.
    """
    op = f"{left._name} {sign} {right._name}"
    if left.shape != right.shape:
        expected = f"shape {tuple(left.shape)}, like the left"
        raise _checks.fail(op, "right operand", expected, f"shape {tuple(right.shape)}")
    _alike(op, left, right)
    factor = -1.0 if sign == "-" else 1.0
    return Sum([*_summands(left), *((operator, factor * c) for operator, c in _summands(right))])


class Chain(LinearOperator):
    """A_1 A_2 ... A_k, applied from the right; see `chain`."""

    def __init__(self, factors: Sequence[LinearOperator]) -> None:
        first, last = factors[0], factors[-1]
        symmetric = all(_are_transposes(a, b) for a, b in zip(factors, reversed(factors), strict=True))
        super().__init__(None, first.dtype, first.device, last.shapes, out_shapes=first.out_shapes, symmetric=symmetric)
        self.factors = list(factors)

    @property
    def shape(self) -> torch.Size:
        """(rows of the first, columns of the last)."""
        return torch.Size((self.factors[0].shape[0], self.factors[-1].shape[1]))

    @property
    def _has_transpose(self) -> bool:
        return all(factor._has_transpose for factor in self.factors)

    @property
    def T(self) -> LinearOperator:
        """Return the chain of the transposes, the other way round; itself where that is the same."""
        return self if self.symmetric else Chain([factor.T for factor in reversed(self.factors)])

    def _rows(self, vectors: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            vectors = factor._rows(vectors.contiguous())
        return vectors

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        for factor in self.factors:
            vectors = factor._transposed_rows(vectors.contiguous())
        return vectors


def chain(left: LinearOperator, right: LinearOperator) -> Chain:
    """Return v -> left (right v).

    Raises:
        TypeError, ValueError: the columns of the left are not as many as the rows of the right, or they differ in dtype
            or device.
    """
    op = f"{left._name} @ {right._name}"
    if not _are_transposes(left, right) and left.shape[1] != right.shape[0]:
        expected = f"shape ({left.shape[1]}, k), as the left has shape {tuple(left.shape)}"
        raise _checks.fail(op, "right operand", expected, f"shape {tuple(right.shape)}")
    _alike(op, left, right)
    return Chain(
        [f for operator in (left, right) for f in (operator.factors if isinstance(operator, Chain) else [operator])]
    )


def _are_transposes(a: LinearOperator, b: LinearOperator) -> bool:
    """Return whether one is known to be the transpose of the other; also of two transposes of one operator."""
    return a.T is b or b.T is a


def _alike(op: str, left: LinearOperator, right: LinearOperator) -> None:
    if left.dtype is not right.dtype:
        raise TypeError(f"{op}: right operand: expected dtype {left.dtype}, like the left, got {right.dtype}")
    if left.device != right.device:
        raise _checks.fail(op, "right operand", f"device {left.device}, like the left", right.device)


def divided(operator: LinearOperator, divisor: float | Tensor) -> Scaled:
    """Return A / divisor.

    Raises:
        TypeError, ValueError: the divisor is no finite number or tensor of one element, or a number that is zero.
    """
    op = f"{operator._name} / divisor"
    divisor = _number(op, "divisor", divisor)
    if not isinstance(divisor, Tensor) and (divisor == 0.0 or abs(1 / divisor) > sys.float_info.max):
        raise _checks.fail(op, "divisor", "a number whose reciprocal is finite", divisor)
    return Scaled(operator, 1 / divisor)


def _number(op: str, name: str, value: object, diagonal: LinearOperator | None = None) -> float | Tensor:
    """Check a finite number or a tensor of one element; or of one per row of an operator, moved to its device."""
    words = "a number or a tensor of one element"
    if diagonal is not None:
        words = "a number, a tensor of one element, or of one per row"
    if isinstance(value, Tensor):
        real = not (value.is_nested or value.is_complex() or value.is_meta or value.layout is not torch.strided)
        if real and value.dtype is not torch.bool and value.numel() == 1:
            value = value.detach().reshape(())
            return value if diagonal is None else value.to(diagonal.device)
        if real and value.dtype is not torch.bool and diagonal is not None and value.dim() == 1:
            n = diagonal.shape[0]
            if value.shape != (n,):
                raise _checks.fail(op, name, f"{words} ({n},)", f"shape {tuple(value.shape)}")
            return value.detach().to(diagonal.device)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name}: expected {words}, got {_checks.describe(value)}")
    return _checks.number(op, name, value)
