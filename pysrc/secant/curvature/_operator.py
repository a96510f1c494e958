"""A symmetric linear operator over flat vectors, and what can be found out by multiplying with it."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from secant.curvature import _estimators
from secant.curvature._estimators import Diagonal, Estimate
from secant.curvature._spectrum import SpectralDensity
from secant.ops import _gate
from secant.solvers import lanczos
from secant.solvers.lanczos import Eigenpairs

Seed = int | torch.Generator
_WHICH = ("LA", "SA", "LM")
#: Basis vectors that the probes of `spectrum` may hold at a time, in bytes.
_BASIS_BYTES = 2**28


class LinearOperator(abc.ABC):
    """A symmetric matrix A of (n, n), known by its products with flat vectors.

    `A @ v` and `A.matvec(v)` take a vector (n,), `A @ V` and `A.matmat(V)` k vectors as columns (n, k). `A + 0.1` is
    the operator A + 0.1 I (`Damped`), as is `0.1 + A`; `A - 0.1` is A - 0.1 I.

    Subclasses implement `_rows`.

    Attributes:
        shape: (n, n). dtype, device: of the vectors.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = torch.Size((n, n))
        self.dtype, self.device = dtype, device

    @abc.abstractmethod
    def _rows(self, vectors: Tensor) -> Tensor:
        """The product of each row of (k, n), k >= 1, contiguous."""

    @property
    def _name(self) -> str:
        return type(self).__name__

    # Products ---------------------------------------------------------------------------------------------------------

    def matvec(self, v: Tensor) -> Tensor:
        """A v.

        Args:
            v: (n,), of the operator's dtype and device.

        Returns:
            (n,), without a graph.

        Raises:
            TypeError, ValueError: `v` does not fit.
        """
        v = _gate.shaped(f"{self._name}.matvec", "v", v, (self.shape[0],), self.dtype, self.device)
        return self._rows(v.detach().contiguous().unsqueeze(0))[0]

    def matmat(self, v: Tensor) -> Tensor:
        """A V for k vectors at once.

        Args:
            v: (n, k), of the operator's dtype and device.

        Returns:
            (n, k), without a graph.

        Raises:
            TypeError, ValueError: `v` does not fit.
        """
        op = f"{self._name}.matmat"
        _gate.tensor(op, "v", v, (self.dtype,), self.device)
        if v.dim() != 2 or v.shape[0] != self.shape[0]:
            raise _gate.fail(op, "v", f"shape ({self.shape[0]}, k)", f"shape {tuple(v.shape)}")
        if v.shape[1] == 0:
            return torch.empty_like(v)
        return self._rows(v.detach().t().contiguous()).t()

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matmat(v) if isinstance(v, Tensor) and v.dim() == 2 else self.matvec(v)

    def __add__(self, damping: float | Tensor) -> Damped:
        return Damped(self, damping)

    __radd__ = __add__

    def __sub__(self, damping: float | Tensor) -> Damped:
        return Damped(self, -damping)

    def __repr__(self) -> str:
        return f"{self._name}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def to_scipy(self) -> Any:
        """The same operator for `scipy.sparse.linalg`: vectors come as numpy arrays and are moved to the device.

        Returns:
            `scipy.sparse.linalg.LinearOperator` of float32 or float64.

        Raises:
            ImportError: scipy is missing.

        Example:
            >>> top = scipy.sparse.linalg.eigsh(H.to_scipy(), k=3, return_eigenvectors=False)
        """
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def product(x: Any) -> Any:
            v = torch.as_tensor(x.reshape(self.shape[0], -1).copy()).to(self.device, self.dtype)
            return self.matmat(v).to("cpu", wide).numpy().reshape(x.shape)

        wide = torch.promote_types(self.dtype, torch.float32)
        dtype = torch.empty(0, dtype=wide).numpy().dtype
        return ScipyOperator(
            tuple(self.shape), matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype
        )

    # Estimates --------------------------------------------------------------------------------------------------------

    def generator(self, seed: Seed) -> torch.Generator:
        """The generator of the probes: the one given, or a new one with this seed on the operator's device."""
        if isinstance(seed, torch.Generator):
            return seed
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{self._name}: seed: expected an int or a torch.Generator, got {_gate.describe(seed)}")
        return torch.Generator(self.device).manual_seed(seed)

    def _wide_rows(self, vectors: Tensor) -> Tensor:
        """Products of rows in `wide`, what estimates and Lanczos compute in."""
        return self._rows(vectors.to(self.dtype).contiguous()).to(vectors.dtype)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def diag(self, num_probes: int = 100, *, seed: Seed = 0) -> Diagonal:
        """Unbiased estimate of the diagonal by Rademacher probes z, entries +1 or -1 with equal odds.

            E[z * A z] = diag(A),        Var[(z * A z)_i] = sum_(j != i) A_ij^2.

        Args:
            num_probes: products to make, >= 1. seed: of the probes, or their generator.

        Returns:
            `Diagonal`: `value` (n,) and `stderr` (n,), the estimated standard error (NaN from a single probe).

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57 (2007).

        Example:
            >>> H.diag(100).value.clamp(min=1e-3).rsqrt()     # a preconditioner
        """
        op = f"{self._name}.diag"
        _estimators.check_count(op, "num_probes", num_probes, 1)
        return _estimators.diagonal(
            self._wide_rows, self.shape[0], num_probes, self._wide, self.device, self.generator(seed)
        )

    def trace(self, num_probes: int = 100, *, method: str = "hutchinson", seed: Seed = 0) -> Estimate:
        """Unbiased estimate of the trace, with its standard error.

        Args:
            num_probes: products to make; >= 2, and >= 6 for "hutch++".
            method: "hutchinson", the mean of z.A z over Rademacher probes; "hutch++", which takes the part of A on the
                range of a random sketch exactly and estimates the remainder, with far less variance when few
                eigenvalues are large.
            seed: of the probes, or their generator.

        Returns:
            `Estimate`: `value`, `stderr` and `num_probes`; `float(estimate)` is the value.

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Hutchinson, A stochastic estimator of the trace of the influence matrix, Comm. Statist. 19 (1990).
            Meyer, Musco, Musco and Woodruff, Hutch++: optimal stochastic trace estimation, SOSA (2021), Algorithm 1.

        Example:
            >>> value, stderr, _ = H.trace(90, method="hutch++")
        """
        op = f"{self._name}.trace"
        methods = {"hutchinson": (_estimators.hutchinson, 2), "hutch++": (_estimators.hutch_plus_plus, 6)}
        if method not in methods:
            raise _gate.fail(op, "method", "'hutchinson' or 'hutch++'", repr(method))
        estimator, least = methods[method]
        _estimators.check_count(op, "num_probes", num_probes, least)
        return estimator(self._wide_rows, self.shape[0], num_probes, self._wide, self.device, self.generator(seed))

    def eigs(
        self,
        k: int = 1,
        which: str = "LA",
        *,
        tol: float | None = None,
        max_iter: int | None = None,
        seed: Seed = 0,
    ) -> Eigenpairs:
        """k extreme eigenvalues and their vectors, by Lanczos with full reorthogonalisation.

        Args:
            k: how many, 1 to n. which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude.
            tol: residual |A v - lambda v| relative to the largest |lambda|; None: 1e-3 of float32, 1e-8 of float64.
            max_iter: products at most, k to n; None: min(n, max(10 k, 200)). Each keeps a vector in memory.
            seed: of the random start, or its generator.

        Returns:
            `Eigenpairs`: `values` (k,) ascending, `vectors` (n, k), `residuals`, `converged`, `iterations`.

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13.

        Example:
            >>> sharpness = H.eigs(1).values[0]
            >>> direction = H.eigs(1, "SA").vectors[:, 0]     # of most negative curvature
        """
        op, n = f"{self._name}.eigs", self.shape[0]
        _estimators.check_count(op, "k", k, 1, n)
        if which not in _WHICH:
            raise _gate.fail(op, "which", "'LA', 'SA' or 'LM'", repr(which))
        if tol is None:
            tol = 1e-8 if self.dtype is torch.float64 else 1e-3
        if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
            raise _gate.fail(op, "tol", "a number between 0 and 1, or None", repr(tol))
        if max_iter is None:
            max_iter = min(n, max(10 * k, 200))
        _estimators.check_count(op, "max_iter", max_iter, k, n)
        generator = self.generator(seed)
        start = torch.randn(1, n, dtype=self._wide, device=self.device, generator=generator)
        return lanczos.eigenpairs(self._wide_rows, start, k, which, tol=tol, max_iter=max_iter, generator=generator)

    def spectrum(self, num_probes: int = 10, *, steps: int = 80, seed: Seed = 0) -> SpectralDensity:
        """The distribution of the eigenvalues, by stochastic Lanczos quadrature.

        For a random unit vector v, n E[v.f(A) v] = tr f(A). From each of `num_probes` Rademacher vectors Lanczos gives
        nodes theta_i and weights w_i with v.f(A) v close to sum_i w_i f(theta_i).

        Args:
            num_probes: random vectors, >= 1. steps: products with each, 1 and up (n at most); the resolution.
            seed: of the vectors, or their generator.

        Returns:
            `SpectralDensity`, with `density(x)`, `trace()`, `fraction_below(x)`, `negative_share()` and `plot()`.

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J. Matrix Anal.
            Appl. 38 (2017). Ghorbani, Krishnan and Xiao, An investigation into neural net optimization via Hessian
            eigenvalue density, ICML (2019).

        Example:
            >>> H.spectrum().plot("spectrum.png")
        """
        op, n = f"{self._name}.spectrum", self.shape[0]
        _estimators.check_count(op, "num_probes", num_probes, 1)
        _estimators.check_count(op, "steps", steps, 1)
        steps, generator = min(steps, n), self.generator(seed)
        together = max(1, _BASIS_BYTES // ((steps + 1) * n * self._wide.itemsize))
        nodes, weights = [], []
        for first in range(0, num_probes, together):
            rows = min(together, num_probes - first)
            start = _estimators.rademacher(rows, n, self._wide, self.device, generator)
            run = lanczos.Lanczos(self._wide_rows, start, steps)
            run.advance(steps)
            values, vectors = run.ritz()
            nodes.append(values.cpu())
            weights.append(vectors[:, 0, :].square().cpu())
        return SpectralDensity(torch.cat(nodes), torch.cat(weights), n)


class Damped(LinearOperator):
    """A + lambda I.

    Args:
        operator: A. damping: lambda, a number or a tensor of one element.

    Raises:
        TypeError: `damping` is something else.
    """

    def __init__(self, operator: LinearOperator, damping: float | Tensor) -> None:
        scalar = isinstance(damping, Tensor) and damping.numel() == 1 and not damping.is_complex()
        if not scalar and (isinstance(damping, (bool, Tensor)) or not isinstance(damping, (int, float))):
            raise TypeError(
                f"{operator._name}: damping: expected a number or a tensor of one element, got "
                f"{_gate.describe(damping)}"
            )
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self.operator = operator
        self.damping = damping.detach().reshape(()).to(self.device) if isinstance(damping, Tensor) else float(damping)

    def _rows(self, vectors: Tensor) -> Tensor:
        found = self.operator._rows(vectors)
        if isinstance(self.damping, Tensor):
            return found.addcmul_(vectors, self.damping.to(found.dtype))
        return found.add_(vectors, alpha=self.damping)
