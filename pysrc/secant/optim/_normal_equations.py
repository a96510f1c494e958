"""The equations of a damped least-squares step, in the space of the parameters, of the residuals, or of neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant import _checks, ops
from secant.curvature import Jacobian
from secant.solvers.cg import cg

#: What an optimizer may be asked for.
SOLVER = _checks.one_of("auto", "parameters", "samples", "cg")
#: The smaller side of J above which no Gram matrix is made, and entries of J above which J is not.
GRAM_SIDE, _ENTRIES = 5_000, 2**28
#: Conjugate gradients stop at this residual, or after so many products: both are heuristics.
_CG_TOLERANCE, _CG_STEPS = 1e-3, 500


class Solution(NamedTuple):
    """x, and how many products with J^T J it took."""

    x: Tensor
    inner: int = 0


class NormalEquations:
    r"""(J^T W^2 J + lambda D) x = J^T W u, so that x minimises |W J x - u|^2 + lambda x.D x.

    | space | what is factored | |
    |---|---|---|
    | "parameters" | J^T W^2 J + lambda D, (P, P), by Cholesky | |
    | "samples" | W J D^-1 J^T W + lambda I, (N, N), by Cholesky | x = D^-1 J^T W y, y its solution for u |
    | "cg" | nothing: products with J and J^T | |

    "auto" is the smaller of the first two where that has at most 5,000 rows, else "cg". All of it is in double
    precision whatever the dtype of J: the condition of J is squared here. (Networks in float32 that solve differential
    equations took 1.1 to 1.8 times the iterations to their last digit with J^T J in single precision, each shorter by a
    tenth.)

    Args:
        jacobian: J. size: (N, P). weights: the diagonal of W (N,), None for I. space: "auto" or one of the table.
    """

    def __init__(self, jacobian: Jacobian, size: tuple[int, int], weights: Tensor | None, space: str) -> None:
        n, p = size
        if space == "auto":
            space = "cg" if min(n, p) > GRAM_SIDE else "parameters" if p <= n else "samples"
        self.space, self._weights = space, weights
        self._operator, self._matrix = jacobian, None
        if space != "cg" or n * p <= _ENTRIES:
            self._matrix = _rows(jacobian).double()
            if weights is not None:
                self._matrix = self._matrix * weights.unsqueeze(1)
        self._gram: Tensor | None = None
        self._rounding: float | None = None
        self._factor: Tensor | None = None

    @property
    def matrix(self) -> Tensor | None:
        """Return W J (N, P), where it is made."""
        return self._matrix

    # Products ---------------------------------------------------------------------------------------------------------

    def push(self, v: Tensor) -> Tensor:
        """Return W J v."""
        if self._matrix is not None:
            return self._matrix @ v
        found = self._operator.matvec(v.to(self._operator.dtype)).double()
        return found if self._weights is None else found * self._weights

    def pull(self, u: Tensor) -> Tensor:
        """Return J^T W u."""
        if self._matrix is not None:
            return self._matrix.mT @ u
        u = u if self._weights is None else u * self._weights
        return self._operator.rmatvec(u.to(self._operator.dtype)).double()

    def diagonal(self) -> Tensor:
        """Return the diagonal of J^T W^2 J."""
        assert self._matrix is not None
        if self.space == "parameters":
            return self._gram_matrix(None).diagonal().clone()
        return torch.linalg.vector_norm(self._matrix, dim=0).square()

    def size(self, gradient: Tensor) -> float:
        """Return how large J^T W^2 J is: the largest of its diagonal, or where that is not known its part along g."""
        if self._matrix is not None:
            return float(self.diagonal().max())
        along = self.push(gradient / torch.linalg.vector_norm(gradient))
        return float(along.dot(along))

    def rounding(self, x: Tensor, right: Tensor, residuals: Tensor) -> float:
        r"""Estimate what rounding does to the loss, in units of it, if each residual is that of an x rounded anew.

            sqrt(sum_i u_i^2 ((W J)_i^2 . x^2 + v_i^2)),        u: right,  v: residuals, times W

        which is a change of r_i by eps (|J_i x| + |r_i|) at random, times the derivative of the loss. Found once: the
        point stays where it is.
        """
        if self._rounding is None:
            total = self.push(x).square() if self._matrix is None else self._matrix.square() @ x.square()
            self._rounding = float(right.square().dot(total + residuals.square()).sqrt())
        return self._rounding

    # Solutions --------------------------------------------------------------------------------------------------------

    def _gram_matrix(self, inverse: Tensor | None) -> Tensor:
        """Return J^T W^2 J, or W J D^-1 J^T W in the space of samples."""
        matrix = self._matrix
        assert matrix is not None
        if self.space == "samples" and inverse is not None:
            return ops.gram(matrix.mT, weight=inverse)
        if self._gram is None:
            self._gram = ops.gram(matrix if self.space == "parameters" else matrix.mT)
        return self._gram

    def damp(self, damping: float, scale: Tensor | None = None, free: Tensor | None = None) -> bool:
        """Get ready to solve with this lambda.

        Args:
            damping: lambda > 0. scale: the diagonal of D (P,), positive; None: I.
            free: marks the components of x that are not to be zero; None: all.

        Returns:
            Whether the matrix is positive definite as it is rounded.
        """
        self._damping, self._scale, self._free = damping, scale, free
        if self.space == "cg":
            return True
        if self.space == "parameters":
            matrix = self._gram_matrix(None)
            if free is None:
                matrix = matrix.clone()
            else:
                mask = free.to(matrix.dtype)
                matrix = matrix * mask * mask.unsqueeze(1)
            diagonal = matrix.diagonal()
            diagonal.add_(damping if scale is None else damping * scale)
            if free is not None:
                diagonal.masked_fill_(~free, 1.0)
        else:
            inverse = None if scale is None else 1.0 / scale
            if free is not None:
                inverse = free.double() if inverse is None else inverse * free
            self._inverse = inverse
            matrix = self._gram_matrix(inverse)
            matrix = matrix.clone() if matrix is self._gram else matrix
            matrix.diagonal().add_(damping)
        self._factor = damped(matrix, 0.0)
        return self._factor is not None

    def solve(self, u: Tensor) -> Solution:
        """Return x for a right-hand side u (N,)."""
        if self.space == "samples":
            assert self._factor is not None
            x = self.pull(torch.cholesky_solve(u.unsqueeze(1), self._factor)[:, 0])
            return Solution(x if self._inverse is None else x * self._inverse)
        right = self.pull(u)
        if self._free is not None:
            right = right * self._free
        if self.space == "parameters":
            assert self._factor is not None
            return Solution(torch.cholesky_solve(right.unsqueeze(1), self._factor)[:, 0])
        return conjugate_gradients(self._product, right)

    def _product(self, v: Tensor) -> Tensor:
        product = self.pull(self.push(v))
        if self._free is not None:
            product = product * self._free
        return product.add_(v if self._scale is None else v * self._scale, alpha=self._damping)


def damped(matrix: Tensor, lam: float) -> Tensor | None:
    """Return the Cholesky factor of a matrix plus lambda I; None where it has none as it is rounded."""
    if lam != 0.0:
        matrix = matrix.clone()
        matrix.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if bool(info) else factor


def conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor) -> Solution:
    """Solve for a right-hand side, roughly."""
    found = cg(product, right, rtol=_CG_TOLERANCE, max_iter=_CG_STEPS)
    return Solution(found.x, int(found.iterations))


def _rows(jacobian: Jacobian) -> Tensor:
    return jacobian.to_dense()
