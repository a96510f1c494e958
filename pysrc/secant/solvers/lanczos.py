"""Lanczos tridiagonalisation with full reorthogonalisation, for one start or several at once.

For symmetric A and a unit vector q_1, m steps give orthonormal Q = (q_1 .. q_m) and a tridiagonal T with

    A Q = Q T + beta_m q_(m+1) e_m^T,        T = tridiag(beta, alpha, beta).

The extreme eigenvalues of T approach those of A (Ritz values); with w_i the squared first components of its unit
eigenvectors, sum_i w_i f(theta_i) is the Gauss quadrature of q_1^T f(A) q_1, exact for polynomials to degree 2m - 1.
In floating point the q lose their orthogonality unless it is restored at each step: here against all of them, twice.

alpha and beta stay on the device, and a step that finds an invariant subspace (beta = 0) does not stop: its vectors and
coefficients are zero from there on, so that the host has nothing to look at.

References:
    Lanczos, An iteration method for the solution of the eigenvalue problem, J. Res. Nat. Bur. Standards 45 (1950).
    Golub and Meurant, Matrices, Moments and Quadrature with Applications (2010), chapter 6.
    Giraud, Langou, Rozloznik, van den Eshof, Rounding error analysis of the classical Gram-Schmidt orthogonalization
    process, Numer. Math. 101 (2005): why twice is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Rows (p, n) to rows (p, n), each multiplied by the matrix.
Product = Callable[[Tensor], Tensor]

#: Basis vectors for which there is room at first.
_FIRST = 32


class Lanczos:
    """Runs the recurrence as far as one likes.

    Args:
        product: multiplies each row of a (p, n) tensor by the same symmetric matrix.
        start: (p, n) with p >= 1, float32 or float64, not zero: one start per row, normalised here.
        capacity: the largest number of steps that will be asked for, at most n.

    Attributes:
        alpha: (p, capacity) float64, the diagonals; `beta`: likewise, beta_j below alpha_j.
        steps: how many columns of them are filled.

    Example:
        >>> from secant.solvers.lanczos import Lanczos
        >>> a = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64))
        >>> start = torch.ones(1, 100, dtype=torch.float64)
        >>> recurrence = Lanczos(lambda rows: rows @ a, start, 30)
        >>> recurrence.advance(30)
        >>> round(recurrence.ritz()[0][0, -1].item(), 2)
        100.0
    """

    def __init__(self, product: Product, start: Tensor, capacity: int) -> None:
        p, n = start.shape
        self.product, self.capacity, self.steps = product, capacity, 0
        self.basis = start.new_zeros(p, min(capacity, _FIRST) + 1, n)  # grows: most runs end early
        self.basis[:, 0] = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
        self.alpha = torch.zeros(p, capacity, dtype=torch.float64, device=start.device)
        self.beta = torch.zeros_like(self.alpha)
        self._largest = torch.zeros(p, dtype=torch.float64, device=start.device)
        # A remainder below the rounding of its computation is no direction.
        self._relative = 10 * torch.finfo(start.dtype).eps * n**0.5

    def advance(self, steps: int) -> None:
        """Make this many more steps; nothing is read back to the host."""
        for _ in range(steps):
            j = self.steps
            if j + 1 == self.basis.shape[1]:
                more = min(j, self.capacity - j)
                self.basis = torch.cat((self.basis, torch.zeros_like(self.basis[:, :more])), dim=1)
            q = self.basis[:, j]
            w = self.product(q)
            alpha = _dots(q, w)
            w = self._orthogonal(w, j + 1)
            beta = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
            self._largest = torch.maximum(self._largest, torch.maximum(alpha.abs(), beta))
            alive = beta > self._relative * self._largest
            beta = torch.where(alive, beta, 0.0)
            scale = torch.where(alive, 1 / beta, 0.0).to(w.dtype)
            self.basis[:, j + 1] = w * scale.unsqueeze(1)
            self.alpha[:, j], self.beta[:, j] = alpha, beta
            self.steps = j + 1

    def _orthogonal(self, w: Tensor, count: int) -> Tensor:
        """Project w on what is orthogonal to the first `count` basis vectors."""
        w = w.clone()
        for known, row in zip(self.basis[:, :count].unbind(), w.unbind(), strict=True):
            for _ in range(2):
                # One start at a time: batched products of so few columns are many times slower than these on a CPU.
                row.addmv_(known.T, known @ row, alpha=-1)
        return w

    def restart(self, vector: Tensor) -> None:
        """Go on in a new direction, orthogonal to the basis: after an invariant subspace was found.

        Args:
            vector: (p, n); for rows whose recurrence is still alive it changes nothing.
        """
        j = self.steps
        w = self._orthogonal(vector, j)
        w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
        dead = (self.beta[:, j - 1] == 0).unsqueeze(1)
        self.basis[:, j] = torch.where(dead, w, self.basis[:, j])

    def truncate(self, steps: int) -> None:
        """Forget what came after this many steps."""
        self.alpha[:, steps:], self.beta[:, steps:] = 0.0, 0.0
        self.basis[:, steps + 1 :] = 0.0
        self.steps = steps

    def ritz(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Eigenvalues (p, m), ascending, and eigenvectors (p, m, m) in columns, of T from row `first` on; float64."""
        m = self.steps
        t = torch.diag_embed(self.alpha[:, first:m])
        if m - first > 1:
            off = self.beta[:, first : m - 1]
            t = t + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        return torch.linalg.eigh(t)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, the sum in float64."""
    return (a * b).sum(1, dtype=torch.float64)


class Eigenpairs(NamedTuple):
    """Holds eigenvalues and vectors, and how far they can be trusted.

    values: (k,), ascending, in the dtype of the operator. vectors: (n, k), unit columns. residuals: (k,) estimates of
    |A v - lambda v|, which bound the distance to an eigenvalue. converged: whether all residuals are within the
    tolerance. iterations: products made.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    iterations: int


def _select(values: Tensor, k: int, which: str) -> Tensor:
    """Places of the k wanted among ascending values, ascending."""
    m = len(values)
    k = min(k, m)
    if which == "SA":
        return torch.arange(k)
    if which == "LA":
        return torch.arange(m - k, m)
    return torch.argsort(values.abs(), descending=True)[:k].sort().values


def eigenpairs(
    product: Product,
    start: Tensor,
    k: int,
    which: str,
    *,
    tol: float,
    max_iter: int,
    check_every: int = 10,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Find k extreme eigenpairs of a symmetric matrix.

    The basis grows until the residuals |beta_m s_(m,i)| of all k wanted Ritz pairs are at most tol times the largest
    Ritz value in magnitude. A start has one component per distinct eigenvalue, so that copies of a repeated one cannot
    be seen from it. When the basis exhausts its invariant subspace (few distinct eigenvalues, low rank) it goes on with
    a random direction outside, until such a direction has nothing to add; where it converges before that, the wanted
    eigenvalues are taken to be simple.

    Args:
        product: rows (1, n) to rows. start: (1, n), not zero. k: how many, <= n. which: "LA" largest, "SA" smallest,
            "LM" largest in magnitude. max_iter: products at most, k to n. check_every: products between two looks of
            the host. generator: of the random directions, on the device of `start`.

    Returns:
        `Eigenpairs`; when `max_iter` is reached, the best so far with `converged` False. Where a product is not finite
        there are no such numbers: all NaN, `converged` False.

    References:
        Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13.
    """
    run = Lanczos(product, start, max_iter)
    block = 0  # where the current recurrence begins
    earlier: Tensor | None = None  # what was wanted before it
    while True:
        before = run.steps
        run.advance(min(check_every, max_iter - before))
        beta = run.beta[0, : run.steps].cpu()
        if not bool(torch.isfinite(run.alpha[0, : run.steps]).all()):
            nan = start.new_full((k,), torch.nan)
            return Eigenpairs(nan, nan.expand(start.shape[1], k).clone(), nan.clone(), False, run.steps)
        ended = (beta[before:] == 0).nonzero()
        exhausted = len(ended) > 0
        if exhausted:
            run.truncate(before + int(ended[0]) + 1)
        values, vectors = (x[0].cpu() for x in run.ritz())
        limit = tol * float(values.abs().max())
        chosen = _select(values, k, which)
        last = beta[run.steps - 1]
        residuals = (last * vectors[-1, chosen]).abs()
        small = len(chosen) == k and bool((residuals <= limit).all())
        if run.steps >= max_iter:
            break
        if small and _is_settled(run, block, last, k, which, limit):
            if block == 0 and not exhausted:
                break
            if earlier is not None and len(earlier) == k and bool((values[chosen] - earlier).abs().max() <= limit):
                break
        if exhausted:
            block, earlier = run.steps, values[chosen]
            noise = torch.randn(start.shape, dtype=start.dtype, device=start.device, generator=generator)
            run.restart(noise)
    found = run.basis[0, : run.steps].mT @ vectors[:, chosen].to(start)
    found = found / torch.linalg.vector_norm(found, dim=0)
    return Eigenpairs(values[chosen].to(start), found, residuals.to(start), small, run.steps)


def _is_settled(run: Lanczos, block: int, last: Tensor, k: int, which: str, limit: float) -> bool:
    """Tell whether the current recurrence has its own wanted eigenvalues: those of earlier ones are always settled."""
    if block == 0 or float(last) == 0:
        return True
    values, vectors = (x[0].cpu() for x in run.ritz(block))
    return bool(((last * vectors[-1, _select(values, k, which)]).abs() <= limit).all())
