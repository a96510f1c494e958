"""The inverse of an operator, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import _estimators
from secant.curvature._algebra import Damped
from secant.curvature._evaluate import plainly
from secant.curvature._operator import LinearOperator
from secant.result import Status
from secant.solvers.cg import CGResult, cg


class Inverse(LinearOperator):
    """(A + lambda I)^-1 for a positive definite A + lambda I: each product solves by conjugate gradients from zero.

    What is asked for and not reached is no error: the product is where the method stopped, and `status`, `iterations`
    and `residuals` tell of the vectors of the last product.

    Args:
        operator: A, symmetric.
        damping: lambda, a finite number, a tensor of one element, or of one per row (a diagonal).
        tol: |b - (A + lambda I) x| / |b| in the norm of the preconditioner, see `secant.solvers.cg`; None: 1e-4 of
            float32, 1e-8 of float64.
        max_iter: products with A per vector, >= 1; None: min(10 n, 1000).
        preconditioner: r (n,) to M^-1 r, symmetric positive definite, in float32 or float64; None: the identity.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. NBS 49 (1952).

    Example:
        >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
        >>> solve = H.inverse(damping=1.0)
        >>> x = solve @ torch.tensor([2.0, 5.0, 10.0])          # (1, 1, 1)
        >>> solve.converged, solve.iterations.tolist()
        (True, [3])
    """

    def __init__(
        self,
        operator: LinearOperator,
        *,
        damping: float | Tensor = 0.0,
        tol: float | None = None,
        max_iter: int | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        op = self._name
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"{op}: operator: expected a LinearOperator, got {_checks.describe(operator)}")
        n = operator._square(op, symmetric=True)
        if tol is None:
            tol = 1e-8 if operator.dtype is torch.float64 else 1e-4
        if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
            raise _checks.fail(op, "tol", "a number between 0 and 1, or None", _estimators.brief(tol))
        if max_iter is None:
            max_iter = max(1, min(10 * n, 1000))
        _estimators.check_count(op, "max_iter", max_iter, 1)
        if preconditioner is not None and not callable(preconditioner):
            raise TypeError(f"{op}: preconditioner: expected a function, got {_checks.describe(preconditioner)}")
        super().__init__(n, operator.dtype, operator.device, operator.shapes)
        self.operator = Damped(operator, damping) if isinstance(damping, Tensor) or damping != 0 else operator
        self.tol, self.max_iter, self.preconditioner = float(tol), max_iter, preconditioner
        #: Of the last product: `secant.Status` (k,), products made (k,), both int32, and the norms of what is left
        #: relative to those of the vectors (k,), as `CGResult.residual` has it; on the device.
        self.status = torch.empty(0, dtype=torch.int32)
        self.iterations = torch.empty(0, dtype=torch.int32)
        self.residuals = torch.empty(0)

    @property
    def converged(self) -> bool:
        """Tell whether every vector of the last product reached `tol` (waits for the device)."""
        return bool((self.status == Status.CONVERGED).all())

    @plainly
    def _rows(self, vectors: Tensor) -> Tensor:
        wide = vectors.to(self._wide)
        found = [self._solve(b) for b in wide]
        self.status = torch.stack([one.status for one in found])
        self.iterations = torch.stack([one.iterations for one in found])
        norms = torch.linalg.vector_norm(wide, dim=1)
        left = torch.linalg.vector_norm(torch.stack([one.residual for one in found]), dim=1)
        self.residuals = torch.where(norms > 0, left / norms, left)
        return torch.stack([one.x for one in found]).to(vectors.dtype)

    def _solve(self, b: Tensor) -> CGResult:
        def product(p: Tensor) -> Tensor:
            return self.operator._wide_rows(p.unsqueeze(0))[0]

        return cg(product, b, preconditioner=self.preconditioner, rtol=self.tol, max_iter=self.max_iter)


def inverse(
    operator: LinearOperator,
    *,
    damping: float | Tensor = 0.0,
    tol: float | None = None,
    max_iter: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Inverse:
    """Return (A + damping I)^-1 as an operator whose products solve by conjugate gradients; see `Inverse`.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    return Inverse(operator, damping=damping, tol=tol, max_iter=max_iter, preconditioner=preconditioner)
