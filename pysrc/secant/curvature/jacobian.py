"""The Jacobian of residuals or outputs as a rectangular linear operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from secant import _checks
from secant.curvature import _evaluate, _losses, _matrices
from secant.curvature._columns import Product
from secant.curvature._estimators import Diagonal
from secant.curvature._operator import LinearOperator, Seed
from secant.curvature._parameters import Parameters
from secant.curvature.ggn import _JacobianOperator
from secant.curvature.hessian import trainable


class Jacobian(_JacobianOperator):
    r"""J = d residuals / d params at the current parameters, as an operator of shape (m, n).

        J v = d/dt residuals(params + t v)  at t = 0,        J^T u = grad (u . residuals)(params)

    A row is one number of what the closure returns, flattened; of several tensors, one after the other. A column is one
    number of the parameters, in their order. `J @ v`, `J @ V`, `J.T @ u`, `u @ J`, `J.rmatmat(U)`, `J.to_dense()` and
    the algebra of `LinearOperator`: `J.T @ J` is the Gauss-Newton matrix of half the squared sum, and known to be
    symmetric, so that `(J.T @ J).damped(1e-3).inverse()` solves the equations of Levenberg and Marquardt. `shape` is
    known once the closure was evaluated, and evaluates it where it was not.

    The modes are those of `GGN`, chosen as there by the time that J v and J^T u take together: Linear + activation
    layers are recognised ("r-operator"), less a constant too, as residuals are; elsewhere J v is the derivative of
    J^T u by u on the kept graph ("double-backward") or forward mode through the closure ("forward"). J^T u is always
    one backward pass on the kept graph.

    A list of tensors in the shapes of the parameters is a vector too (`J @ params`); the product is flat. A parameter
    that the closure does not use has zero columns. NaN and infinities stay in the rows that they belong to.

    Args:
        closure: () -> residuals, or (batch) -> with `batches`: a real tensor of any shape with its graph, or a list or
            tuple of them, of which one at least has one.
        params, keep_graphs: as for `Hessian`.
        batches: as for `Hessian`; the rows of one batch follow those of another.
        mode: "auto", "r-operator", "double-backward" or "forward".

    Rows are those of this process: nothing is reduced over processes.

    Raises:
        TypeError, ValueError: an argument is invalid. At a product: the closure returns something else.
        RuntimeError: at a product: an operation cannot be differentiated; the message names it.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd ed., section 10.3 (Gauss-Newton, Levenberg-Marquardt).

    Example:
        >>> t, y = torch.linspace(0, 1, 5), torch.tensor([1.0, 0.8, 0.6, 0.5, 0.4])
        >>> a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
        >>> J = secant.curvature.Jacobian(lambda: a * torch.exp(b * t) - y, [a, b])
        >>> J.shape
        torch.Size([5, 2])
        >>> (J @ torch.tensor([1.0, 0.0]) - torch.exp(-t)).abs().max() < 1e-6
        tensor(True)
    """

    _SYMMETRIC = False

    def __init__(
        self,
        closure: Callable[..., Any],
        params: Iterable[Tensor] | Parameters,
        *,
        batches: Iterable[Any] | None = None,
        mode: str = "auto",
        keep_graphs: bool = True,
    ) -> None:
        self._m: int | None = None
        super().__init__(closure, params, batches=batches, mode=mode, keep_graphs=keep_graphs, process_group=None)

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, **options: Any) -> Jacobian:
        """Return the Jacobian of model(inputs) with respect to the parameters that require gradients.

        Args:
            options: those of the class.

        Raises:
            TypeError, ValueError: an argument is invalid.
        """
        return cls(lambda: model(inputs), trainable(cls.__name__, model), **options)

    @property
    def shape(self) -> torch.Size:
        """Return (m, n); evaluates the closure where that was not done at this point."""
        if self._m is None or (self.keep_graphs and (self._kept is None or self.params.state() != self._state)):
            self._check_surroundings()
            with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients():
                self._counted(list(map(_length, self._iterate())))
        assert self._m is not None
        return torch.Size((self._m, self.params.n))

    def _counted(self, lengths: list[int]) -> None:
        """Remember how many rows there are."""
        if not lengths:
            raise _checks.fail(self._name, "batches", "at least one", "none")
        self._m = sum(lengths)

    def _outputs(self, result: Any) -> Tensor:
        return joined(self._name, result, self.dtype)

    def _middle(self, outputs: Tensor, result: Any) -> _losses.Middle:
        return _losses.IdentityMiddle()

    def _size(self, result: Any) -> Tensor:
        return self._outputs(result).detach().square().sum()

    def _rows(self, vectors: Tensor) -> Tensor:
        self._check_surroundings()
        with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients():
            if vectors.is_inference():
                vectors = vectors.clone()
            parts = []
            for matrix in self._iterate():
                jacobian = _jacobian(matrix)
                out = torch.empty(len(vectors), _length(matrix), dtype=self.dtype, device=self.device)
                one, several = functools.partial(_push, jacobian), functools.partial(_push_columns, jacobian)
                self._multiply(Product("J v", jacobian.together, one, several), vectors, out)
                parts.append(out)
            self._counted([part.shape[1] for part in parts])
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        self._check_surroundings()
        with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients():
            if vectors.is_inference():
                vectors = vectors.clone()
            total: Tensor | None = None
            lengths: list[int] = []
            for matrix in self._iterate():
                jacobian, first, length = _jacobian(matrix), sum(lengths), _length(matrix)
                lengths.append(length)
                some = vectors[:, first : first + length]
                if some.shape[1] != length:
                    break
                out = torch.empty(len(vectors), self.params.n, dtype=self.dtype, device=self.device)
                one, several = functools.partial(_pull, matrix), functools.partial(_pull_columns, matrix)
                self._multiply(Product("J^T u", jacobian.together, one, several), some, out)
                total = out if total is None else total.add_(out)
            self._counted(lengths)
            if self._m != vectors.shape[1] or total is None:
                expected = f"{vectors.shape[1]} residuals, as before"
                raise _checks.fail(self._name, "closure", expected, f"{self._m} or more")
            return total

    def diag(self, num_probes: int | None = None, *, distribution: str = "rademacher", seed: Seed = 0) -> Diagonal:
        """Return the diagonal of a square J; see `LinearOperator.diag`."""
        return LinearOperator.diag(self, num_probes, distribution=distribution, seed=seed)

    def _exact_diagonal(self) -> Tensor:
        return LinearOperator._exact_diagonal(self)


def joined(op: str, result: Any, dtype: torch.dtype) -> Tensor:
    """Join residuals, a tensor or several, to one tensor; a single one stays as it is.

    Raises:
        TypeError, ValueError: they are something else.
    """
    parts = list(result) if isinstance(result, (tuple, list)) else [result]
    if not parts or not all(isinstance(x, Tensor) for x in parts):
        got = type(result).__name__ if parts == [result] or not parts else ", ".join(type(x).__name__ for x in parts)
        raise TypeError(f"{op}: closure: expected residuals (a tensor or several), got {got}")
    for i, x in enumerate(parts):
        if not x.is_floating_point() or x.is_nested:
            name = "closure" if len(parts) == 1 else f"closure: residuals[{i}]"
            raise _checks.fail(op, name, "a dense real tensor", _checks.describe(x))
    with torch.enable_grad():
        whole = parts[0] if len(parts) == 1 else torch.cat([x.reshape(-1) for x in parts])
        return whole if whole.dtype is dtype else whole.to(dtype)


def _jacobian(matrix: _matrices.BatchMatrix) -> _matrices.BatchJacobian:
    assert isinstance(matrix, _matrices.Sandwich)
    return matrix.jacobian


def _length(matrix: _matrices.BatchMatrix) -> int:
    """Return the number of rows of one batch."""
    assert isinstance(matrix, _matrices.Sandwich)
    return matrix.like.numel()


def _push(jacobian: _matrices.BatchJacobian, vector: Tensor, row: Tensor) -> None:
    row.copy_(jacobian.push(vector).reshape(-1))


def _push_columns(jacobian: _matrices.BatchJacobian, vectors: Tensor, rows: Tensor) -> None:
    rows.copy_(jacobian.push_columns(vectors).reshape(len(rows), -1))


def _pull(matrix: _matrices.BatchMatrix, u: Tensor, row: Tensor) -> None:
    assert isinstance(matrix, _matrices.Sandwich)
    matrix.jacobian.pull(u.reshape(matrix.like.shape), row)


def _pull_columns(matrix: _matrices.BatchMatrix, us: Tensor, rows: Tensor) -> None:
    assert isinstance(matrix, _matrices.Sandwich)
    matrix.jacobian.pull_columns(us.reshape(len(us), *matrix.like.shape), rows)
