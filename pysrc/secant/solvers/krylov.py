"""A quadratic model in a Krylov space: built once from products, then minimised under any regularisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secant import _checks
from secant.solvers.lanczos import Lanczos


class KrylovModel:
    """The model m(s) = g.s + 1/2 s.A s for s in span(g, A g, A^2 g, ...), in coordinates where it is separable.

    Lanczos gives an orthonormal basis Q, starting with g / |g|, of that space and T = Q^T A Q. With T = S diag(theta)
    S^T and s = Q S u,

        m(s) = sum_i (gamma_i u_i + 1/2 theta_i u_i^2),    gamma = |g| S^T e_1,    |s| = |u|,

    so that what is left is one equation in one unknown for cubic regularisation, none for |A| in place of A. Once the
    space is there, another regularisation takes no further product. With full reorthogonalisation, a host that looks
    at T after every step on a CPU, else after every eighth.

    Args:
        matvec: v -> A v, A symmetric, of the shape of grad.
        grad: g, (n,), float32 or float64, finite and not zero.
        max_iter: dimensions at most, >= 1.

    Attributes:
        values: theta, (m,), ascending. slopes: gamma, (m,); both float64 on the CPU. iterations: m, products made.
        complete: whether the space is invariant: more products would bring nothing. finite: whether all products were.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        Gould, Lucidi, Roma, Toint, Solving the trust-region subproblem using the Lanczos method, SIAM J. Optim. 9
        (1999), section 5. Cartis, Gould, Toint, Adaptive cubic regularisation methods for unconstrained optimization,
        part I, Math. Program. 127 (2011), section 6.2.

    Example:
        >>> a = torch.tensor([4.0, -1.0], dtype=torch.float64)
        >>> model = secant.solvers.KrylovModel(lambda v: a * v, torch.ones(2, dtype=torch.float64), max_iter=2)
        >>> grown = model.grow(2)
        >>> [round(x, 9) for x in model.values.tolist()], model.complete
        ([-1.0, 4.0], True)
        >>> step = model.combine(-model.slopes / model.values.abs())        # -|A|^-1 g
        >>> [round(x, 9) for x in step.tolist()]
        [-0.25, -1.0]
    """

    def __init__(self, matvec: Callable[[Tensor], Tensor], grad: Tensor, *, max_iter: int) -> None:
        op = "KrylovModel"
        grad = _checks.tensor(op, "grad", grad, _checks.REAL).detach()
        if grad.dim() != 1 or len(grad) == 0:
            raise _checks.fail(op, "grad", "shape (n,), n >= 1", f"shape {tuple(grad.shape)}")
        self._size = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
        if not 0.0 < self._size < float("inf"):
            raise _checks.fail(op, "grad", "a finite vector that is not zero", f"one of norm {self._size}")
        self._most = min(_checks.integer(op, "max_iter", max_iter, 1), len(grad))

        def rows(vectors: Tensor) -> Tensor:
            product = matvec(vectors[0])
            if product.shape != grad.shape:
                raise _checks.fail(op, "matvec", f"a function that keeps the shape {tuple(grad.shape)}",
                                   tuple(product.shape))  # fmt: skip
            return product.detach().unsqueeze(0)

        self._run = Lanczos(rows, grad.unsqueeze(0), self._most)
        self._look_every = 1 if grad.device.type == "cpu" else 8
        self.iterations, self.complete, self.finite = 0, False, True
        self.values = self.slopes = self._last = torch.zeros(0, dtype=torch.float64)

    def grow(self, steps: int | None = None) -> bool:
        """Add dimensions, unless the space is complete or as large as allowed; tell whether any were added.

        Args:
            steps: how many; None: as many as the host looks at together.
        """
        run = self._run
        steps = min(self._look_every if steps is None else steps, self._most - run.steps)
        if self.complete or not self.finite or steps <= 0:
            return False
        run.advance(steps)
        t = torch.stack((run.alpha[0, : run.steps], run.beta[0, : run.steps])).cpu()
        self.iterations = m = run.steps
        if not bool(torch.isfinite(t).all()):
            self.finite = False
            return True
        ended = (t[1] == 0).nonzero()
        self.complete = len(ended) > 0 or m == run.basis.shape[2]
        m = int(ended[0]) + 1 if len(ended) else m
        alpha, beta = t[0, :m], t[1, :m]
        off = beta[: m - 1]
        tridiagonal = torch.diag(alpha) + torch.diag(off, 1) + torch.diag(off, -1)
        self.values, self._vectors = torch.linalg.eigh(tridiagonal)
        self.slopes = self._size * self._vectors[0]
        self._last = beta[m - 1] * self._vectors[m - 1]
        return True

    def residual(self, u: Tensor) -> float:
        """Return how far A s leaves the space, |(I - Q Q^T) A s|, for s = Q S u."""
        return float(self._last.dot(u).abs())

    def decrease(self, u: Tensor) -> float:
        """Return -m(s)."""
        return float(-(self.slopes.dot(u) + 0.5 * (self.values * u).dot(u)))

    def combine(self, u: Tensor) -> Tensor:
        """Return s = Q S u, (n,) in the dtype of the gradient."""
        basis = self._run.basis[0, : len(u)]
        return (self._vectors @ u).to(basis) @ basis
