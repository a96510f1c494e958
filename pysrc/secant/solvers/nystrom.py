"""Randomised low-rank approximation of a positive semidefinite matrix, and the preconditioner that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant import _checks


class Nystrom(NamedTuple):
    """Holds U diag(values) U^T, close to A: vectors U (n, r), orthonormal columns; values (r,), descending, >= 0."""

    vectors: Tensor
    values: Tensor

    def preconditioner(self, damping: float = 0.0) -> Callable[[Tensor], Tensor]:
        """Return r -> P^-1 r for A + damping I, as `cg` takes it.

            P^-1 = (l + mu) U (diag(values) + mu I)^-1 U^T + (I - U U^T),    mu = damping

        with l the smallest value that is not zero brings the r largest eigenvalues of A + mu I to about l + mu and
        leaves the others. Without damping mu = l (a heuristic), so that what the sketch has not seen is not magnified.
        Two products with U; nothing is read by the host.

        Args:
            damping: mu, >= 0.

        Raises:
            ValueError: `damping` is negative.

        Example:
            >>> a = torch.cat([torch.logspace(6, 3, 10), torch.linspace(1, 2, 90)]).double()
            >>> sketch = secant.solvers.nystrom(lambda v: a[:, None] * v, 100, 12, dtype=torch.float64)
            >>> solve, b = sketch.preconditioner(), torch.ones(100, dtype=torch.float64)
            >>> found = secant.solvers.cg(lambda v: a * v, b, rtol=1e-8, preconditioner=solve)
            >>> found.iterations.item() < 20       # and 61 without it
            True
        """
        damping = _checks.nonnegative("Nystrom.preconditioner", "damping", damping)
        u, values = self.vectors, self.values
        least = torch.where(values > 0.0, values, torch.inf).amin()
        mu = damping if damping > 0.0 else least
        # What the sketch found to be zero is left alone.
        shrink = torch.where(values > 0.0, (least + mu) / (values + mu), 1.0) - 1.0

        def solve(r: Tensor) -> Tensor:
            return torch.addmv(r, u, shrink * (u.mT @ r))

        return solve


def nystrom(
    matmat: Callable[[Tensor], Tensor],
    n: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Nystrom:
    """Approximate a symmetric positive semidefinite A by U diag(values) U^T from one product with `rank` columns.

        Y = A W,    W (n, r) orthonormal, random;    A ~ Y (W^T Y)^-1 Y^T

    W^T Y is inverted by its eigenvalues, those below rounding, and negative ones, left out: where A is indefinite, what
    the sketch saw of its negative part is left out. The approximation never exceeds A, and its error is about that of
    the best of a somewhat lower rank.

    Args:
        matmat: V (n, r) -> A V.
        n: rows of A, >= 1.
        rank: r, 1 to n.
        dtype: of the vectors, float32 or float64.
        device: of the vectors.
        seed: of the sketch.

    Returns:
        A `Nystrom`, without a graph. Nothing is read by the host but what the eigenvalues take.

    Raises:
        TypeError, ValueError: an argument is invalid, or `matmat` changes the shape.

    References:
        Frangella, Tropp, Udell, Randomized Nystrom preconditioning, SIAM J. Matrix Anal. Appl. 44 (2023), Algorithm
        2.1 and eq. 1.3. (Eigenvalues in place of a shift and a Cholesky factor, which a negative one would break.)

    Example:
        >>> a = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))
        >>> [abs(round(x, 4)) for x in secant.solvers.nystrom(lambda v: a @ v, 4, 3).values.tolist()]
        [3.0, 2.0, 0.0]
    """
    op = "nystrom"
    if dtype not in _checks.REAL:
        raise TypeError(f"{op}: dtype: expected float32 or float64, got {dtype}")
    n = _checks.integer(op, "n", n, 1)
    rank = _checks.integer(op, "rank", rank, 1, n)
    generator = torch.Generator(device).manual_seed(_checks.integer(op, "seed", seed, 0))
    sketch = torch.randn(n, rank, dtype=dtype, device=device, generator=generator)
    sketch = torch.linalg.qr(sketch).Q
    y = matmat(sketch).detach()
    if y.shape != sketch.shape:
        raise _checks.fail(op, "matmat", f"a function that keeps the shape {(n, rank)}", tuple(y.shape))
    core = (sketch.mT.double() @ y.double()).nan_to_num()
    w, v = torch.linalg.eigh(0.5 * (core + core.mT))
    lost = 10.0 * n**0.5 * torch.finfo(dtype).eps * w.abs().amax()
    kept = w > lost
    root = torch.where(kept, w, 1.0).rsqrt() * kept
    b = y.double().nan_to_num() @ (v * root)
    # B = U S X^T by the eigenvectors of B^T B would square the condition: a QR first.
    q, r = torch.linalg.qr(b)
    left, values, _ = torch.linalg.svd(r)
    found = torch.arange(rank, device=w.device) < kept.sum()
    return Nystrom((q @ left).to(dtype), (values.square() * found).to(dtype))
