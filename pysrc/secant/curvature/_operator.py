"""Matrices over flat vectors that are known by their products, and what can be found out by multiplying."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import _estimators, _evaluate
from secant.curvature._estimators import Diagonal, Estimate
from secant.curvature._spectrum import SpectralDensity
from secant.solvers import lanczos
from secant.solvers.lanczos import Eigenpairs

if TYPE_CHECKING:
    from secant.curvature._algebra import Damped
    from secant.curvature._index import Submatrix
    from secant.curvature._inverse import Inverse

Seed = int | torch.Generator
Vectors = Tensor | Sequence[Tensor]
_WHICH = ("LA", "SA", "LM")
#: Basis vectors that the probes of `spectrum` may hold at a time, in bytes.
_BASIS_BYTES = 2**28
#: Unit vectors multiplied together.
_TOGETHER = 16


class LinearOperator(abc.ABC):
    """A matrix A of (m, n), known by its products with flat vectors; symmetric unless its shape is given as a pair.

    **Products.** `A @ v` and `A.matvec(v)` take a vector (n,), `A @ V` and `A.matmat(V)` k vectors as columns (n, k);
    `v @ A` takes a vector (m,), or k as rows (k, m), as `A.rmatvec(v)` does, and `A.rmatmat(V)` columns (m, k). Where
    the operator is over tensors of some `shapes`, a list of tensors of these shapes is a vector too, and the product is
    such a list where the result has `out_shapes`; with a last dimension k each (a first one in `[...] @ A`) it is k
    vectors.

    **Algebra.** `A.T` (also `A.mT`, `A.adjoint()`) is the transpose, A itself where A is symmetric; `A @ B` the chain
    v -> A (B v); `A + B`, `A - B`, `-A`, `2.0 * A` and `A / 2.0` what they say. `A.damped(d)` is A + d I for a number
    d, or A + diag(d) for a vector (n,), and so are `A + d`, `d + A` and `A - d`. All of them are operators: nothing is
    formed. A chain is known to be symmetric where it reads the same backwards, as `J.T @ J` and `J.T @ M @ J` do.
    `A[rows, columns]` is a dense block, `A.submatrix(rows, columns)` the operator.

    **What takes which.** `diag` and `trace` need a square matrix; `eigs`, `spectrum` and `inverse` one that is known to
    be symmetric.

    Subclasses implement `_rows`, which returns a new tensor, and where they are not symmetric `_transposed_rows`.

    Args:
        size: n of a symmetric matrix; (m, n) of any other; None where a subclass has `shape` as a property.
        shapes: of the tensors that make up a vector (n,), or None. out_shapes: of those that make up a product (m,).
        symmetric: whether A = A^T is known; None: of an n.

    Attributes:
        shape: (m, n). symmetric: whether A = A^T is known. dtype, device: of the vectors. shapes, out_shapes: as given.

    Example:
        >>> t, w = torch.arange(4.0), torch.zeros(2, requires_grad=True)
        >>> J = secant.curvature.Jacobian(lambda: w[0] + w[1] * t - 2 * t - 1, [w])
        >>> gradient = J.T @ (-2 * t - 1)
        >>> step = (J.T @ J).damped(1e-6).inverse() @ -gradient     # (1, 2), the line through the points
        >>> [round(x, 3) for x in step.tolist()]
        [1.0, 2.0]
    """

    #: numpy leaves `array @ A` to the operator, which names the type.
    __array_ufunc__ = None

    def __init__(
        self,
        size: int | tuple[int, int] | None,
        dtype: torch.dtype,
        device: torch.device,
        shapes: Sequence[torch.Size] | None = None,
        *,
        out_shapes: Sequence[torch.Size] | None = None,
        symmetric: bool | None = None,
    ) -> None:
        self.symmetric = isinstance(size, int) if symmetric is None else symmetric
        if size is not None:
            self._shape = torch.Size((size, size) if isinstance(size, int) else size)
        self.dtype, self.device, self.shapes = dtype, device, shapes
        self.out_shapes = shapes if self.symmetric else out_shapes

    @property
    def shape(self) -> torch.Size:
        """(m, n)."""
        return self._shape

    @abc.abstractmethod
    def _rows(self, vectors: Tensor) -> Tensor:
        """Return the product of each row of (k, n), k >= 1, contiguous, as rows (k, m) of a new tensor."""

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        """Return the product of A^T with each row of (k, m), as rows (k, n) of a new tensor."""
        if self.symmetric:
            return self._rows(vectors)
        raise TypeError(f"{self._name}.T: operator: expected one with products with its transpose, got {self!r}")

    @property
    def _has_transpose(self) -> bool:
        """Tell whether there are products with the transpose."""
        return self.symmetric or type(self)._transposed_rows is not LinearOperator._transposed_rows

    @property
    def _name(self) -> str:
        return type(self).__name__

    # Products ---------------------------------------------------------------------------------------------------------

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply a vector: A v.

        Args:
            v: (n,), of the operator's dtype and device.

        Returns:
            (m,), without a graph.

        Raises:
            TypeError, ValueError: `v` does not fit.
        """
        op = f"{self._name}.matvec"
        v = _checks.shaped(op, "v", _unnested(op, v), (self.shape[1],), self.dtype, self.device)
        return self._rows(v.detach().contiguous().unsqueeze(0))[0]

    def matmat(self, v: Tensor) -> Tensor:
        """Multiply k vectors at once: A V.

        Args:
            v: (n, k), of the operator's dtype and device.

        Returns:
            (m, k), without a graph.

        Raises:
            TypeError, ValueError: `v` does not fit.
        """
        op, (m, n) = f"{self._name}.matmat", self.shape
        _checks.tensor(op, "v", _unnested(op, v), (self.dtype,), self.device)
        if v.dim() != 2 or v.shape[0] != n:
            raise _checks.fail(op, "v", f"shape ({n}, k)", f"shape {tuple(v.shape)}")
        if v.shape[1] == 0:
            return v.new_empty(m, 0)
        return self._rows(v.detach().t().contiguous()).t()

    def rmatvec(self, v: Tensor) -> Tensor:
        """Multiply a vector by the transpose: A^T v, v (m,) to (n,).

        Raises:
            TypeError, ValueError: `v` does not fit.
        """
        return self.T.matvec(v)

    def rmatmat(self, v: Tensor) -> Tensor:
        """Multiply k vectors by the transpose: A^T V, V (m, k) to (n, k).

        Raises:
            TypeError, ValueError: `v` does not fit.
        """
        return self.T.matmat(v)

    def __matmul__(self, v: Vectors | LinearOperator) -> Any:
        if isinstance(v, Tensor):
            return self.matmat(v) if v.dim() == 2 else self.matvec(v)
        if isinstance(v, (list, tuple)):
            flat, count = self._joined(v, last=True)
            found = self.matvec(flat) if count is None else self.matmat(flat)
            return self._parted(found, () if count is None else (count,), last=True)
        if isinstance(v, LinearOperator):
            return _algebra().chain(self, v)
        return self.matvec(v)  # type: ignore[arg-type]

    def __rmatmul__(self, v: Vectors) -> Any:
        turned = self.T
        if isinstance(v, (list, tuple)):
            flat, count = turned._joined(v, last=False)
            found = turned.matvec(flat) if count is None else turned.matmat(flat.t()).t()
            return turned._parted(found, () if count is None else (count,), last=False)
        if isinstance(v, Tensor) and v.dim() == 2:
            return turned.matmat(v.t()).t()
        return turned.matvec(v)  # type: ignore[arg-type]

    def _joined(self, parts: Sequence[Tensor], *, last: bool) -> tuple[Tensor, int | None]:
        """Join a list of tensors to one vector, or to k columns (rows, unless `last`), and k."""
        op, shapes = f"{self._name}.matmul", self.shapes
        if shapes is None:
            raise TypeError(f"{op}: v: expected a tensor, got a list: this operator is over flat vectors")
        if len(parts) != len(shapes):
            raise _checks.fail(op, "v", f"{len(shapes)} tensors, one per parameter", f"{len(parts)}")
        counts: set[int | None] = set()
        for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            _checks.tensor(op, f"v[{i}]", _unnested(op, part), (self.dtype,), self.device)
            more = part.dim() - len(shape)
            inner = part.shape[: len(shape)] if last else part.shape[more:]
            if more not in (0, 1) or inner != shape:
                k = (*shape, "k") if last else ("k", *shape)
                expected = f"shape {tuple(shape)} or ({', '.join(map(str, k))})"
                raise _checks.fail(op, f"v[{i}]", expected, f"shape {tuple(part.shape)}")
            counts.add(None if more == 0 else part.shape[-1 if last else 0])
        if len(counts) > 1:
            raise _checks.fail(op, "v", "tensors of one number of vectors", sorted(str(x) for x in counts))
        count = counts.pop()
        if count is None:
            return torch.cat([part.detach().reshape(-1) for part in parts]), None
        if last:
            return torch.cat(
                [part.detach().reshape(shape.numel(), count) for part, shape in zip(parts, shapes, strict=True)]
            ), count
        return torch.cat(
            [part.detach().reshape(count, shape.numel()) for part, shape in zip(parts, shapes, strict=True)], 1
        ), count

    def _parted(self, found: Tensor, count: tuple[int, ...], *, last: bool) -> Any:
        """Take a product apart into tensors, where it is made of some."""
        shapes = self.out_shapes
        if shapes is None:
            return found
        parts = found.split([shape.numel() for shape in shapes], 0 if last else -1)
        return [
            part.reshape((*shape, *count) if last else (*count, *shape))
            for part, shape in zip(parts, shapes, strict=True)
        ]

    # Algebra ----------------------------------------------------------------------------------------------------------

    @property
    def T(self) -> LinearOperator:
        """Return the transpose; the operator itself where it is symmetric."""
        return self if self.symmetric else _algebra().Transposed(self)

    @property
    def mT(self) -> LinearOperator:
        """Return the transpose, by the name that torch has for that of matrices."""
        return self.T

    def adjoint(self) -> LinearOperator:
        """Return the transpose."""
        return self.T

    def damped(self, damping: float | Tensor) -> Damped:
        """Return A + damping I, or A + diag(damping), as an operator.

        Args:
            damping: a finite number, a tensor of one element, or one per row (n,). A tensor is used as it is at each
                product, so that it may be changed in place.

        Raises:
            TypeError, ValueError: it is something else, or A is not square.

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> (H.damped(H.diag().value) @ torch.ones(3)).tolist()     # Marquardt's scaling
            [2.0, 8.0, 18.0]
        """
        return _algebra().Damped(self, damping)

    def __add__(self, other: LinearOperator | float | Tensor) -> LinearOperator:
        if isinstance(other, LinearOperator):
            return _algebra().added(self, other, "+")
        return self.damped(other)

    __radd__ = __add__

    def __sub__(self, other: LinearOperator | float | Tensor) -> LinearOperator:
        if isinstance(other, LinearOperator):
            return _algebra().added(self, other, "-")
        return self.damped(-other if isinstance(other, (Real, Tensor)) and not isinstance(other, bool) else other)

    def __rsub__(self, other: float | Tensor) -> LinearOperator:
        return (-self).damped(other)

    def __neg__(self) -> LinearOperator:
        return _algebra().Scaled(self, -1.0)

    def __mul__(self, factor: float | Tensor) -> LinearOperator:
        return _algebra().Scaled(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> LinearOperator:
        return _algebra().divided(self, divisor)

    def submatrix(self, rows: Any, columns: Any) -> Submatrix:
        """Return A[rows, columns] as an operator, rows and columns chosen independently (as by `numpy.ix_`).

        Args:
            rows, columns: a slice, a sequence of indices or an integer tensor (k,), or a mask; an int is one. The block
                of a symmetric A is known to be symmetric where one object is given for both.

        Returns:
            `Submatrix` of shape (r, c).

        Raises:
            TypeError, IndexError: something else, or out of range.

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> (H.submatrix([0, 2], [1, 2]) @ torch.ones(2)).tolist()
            [0.0, 9.0]
        """
        return _index().submatrix(f"{self._name}.submatrix", self, rows, columns)

    def __getitem__(self, key: Any) -> Tensor:
        return _index().block(f"{self._name}[]", self, key)

    def to_dense(self) -> Tensor:
        """Return the matrix (m, n), by n products, or by m with the transpose where these are fewer."""
        m, n = self.shape
        if m < n and self._has_transpose:
            return self.T.to_dense().mT
        out = torch.empty(m, n, dtype=self.dtype, device=self.device)
        for first in range(0, n, _TOGETHER):
            places = torch.arange(min(_TOGETHER, n - first), device=self.device)
            unit = torch.zeros(len(places), n, dtype=self.dtype, device=self.device)
            unit[places, first + places] = 1
            out[:, first : first + _TOGETHER] = self._rows(unit).t()
        return out

    def inverse(
        self,
        *,
        damping: float | Tensor = 0.0,
        tol: float | None = None,
        max_iter: int | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
    ) -> Inverse:
        """Return (A + damping I)^-1 as an operator whose products solve by conjugate gradients.

        Args:
            damping, tol, max_iter, preconditioner: see `Inverse`.

        Raises:
            TypeError, ValueError: an argument is invalid, or A is not known to be symmetric.

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> x = H.inverse(damping=1.0) @ torch.tensor([2.0, 5.0, 10.0])      # (1, 1, 1)
        """
        from secant.curvature._inverse import Inverse

        return Inverse(self, damping=damping, tol=tol, max_iter=max_iter, preconditioner=preconditioner)

    def _square(self, op: str, *, symmetric: bool = False) -> int:
        """Return n.

        Raises:
            ValueError: the matrix is not square, or not known to be symmetric where it has to be.
        """
        m, n = self.shape
        if m != n or (symmetric and not self.symmetric):
            kind = "symmetric" if symmetric else "square"
            got = f"one of shape {(m, n)}" if m != n else "one that is not known to be"
            raise _checks.fail(op, "operator", f"a {kind} matrix", got)
        return n

    def __repr__(self) -> str:
        return f"{self._name}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def to_scipy(self) -> Any:
        """Return the same operator for `scipy.sparse.linalg`: vectors come as numpy arrays and are moved to the device.

        Returns:
            `scipy.sparse.linalg.LinearOperator` of float32 or float64.

        Raises:
            ImportError: scipy is missing.

        Example:
            >>> from scipy.sparse.linalg import eigsh
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> top = eigsh(H.to_scipy(), k=1, return_eigenvectors=False)        # 9
        """
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def times(operator: LinearOperator, x: Any) -> Any:
            m, n = operator.shape
            v = torch.as_tensor(x.reshape(n, -1).copy()).to(self.device, self.dtype)
            return operator.matmat(v).to("cpu", wide).numpy().reshape(m, *x.shape[1:])

        wide = torch.promote_types(self.dtype, torch.float32)
        dtype = torch.empty(0, dtype=wide).numpy().dtype
        product, turned = functools.partial(times, self), functools.partial(times, self.T)
        return ScipyOperator(
            tuple(self.shape), matvec=product, rmatvec=turned, matmat=product, rmatmat=turned, dtype=dtype
        )

    # Estimates --------------------------------------------------------------------------------------------------------

    def generator(self, seed: Seed) -> torch.Generator:
        """Return the generator of the probes: the one given, or a new one with this seed on the operator's device."""
        if isinstance(seed, torch.Generator):
            if seed.device.type != self.device.type:
                raise _checks.fail(self._name, "seed", f"a generator on {self.device}", f"one on {seed.device}")
            return seed
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{self._name}: seed: expected an int or a torch.Generator, got {_checks.describe(seed)}")
        _estimators.check_seed(self._name, seed)
        return torch.Generator(self.device).manual_seed(seed)

    def _wide_rows(self, vectors: Tensor) -> Tensor:
        """Multiply rows in `wide`, what estimates and Lanczos compute in."""
        return self._rows(vectors.to(self.dtype).contiguous()).to(vectors.dtype)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @_evaluate.plainly
    def diag(self, num_probes: int | None = 100, *, distribution: str = "rademacher", seed: Seed = 0) -> Diagonal:
        """Estimate the diagonal without bias, by random probes z, or compute it.

            E[z * A z] = diag(A),        Var[(z * A z)_i] = sum_(j != i) A_ij^2   (+ 2 A_ii^2 for normal probes).

        Args:
            num_probes: products to make, >= 1; None: the exact diagonal, by n products.
            distribution: of the entries of z: "rademacher", +1 or -1 with equal odds, or "normal".
            seed: of the probes, or their generator.

        Returns:
            `Diagonal`: `value` (n,) and `stderr` (n,), the estimated standard error (NaN from a single probe, zero of
            the exact diagonal).

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57 (2007).

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> H.diag().value.tolist()
            [1.0, 4.0, 9.0]
        """
        op = f"{self._name}.diag"
        n = self._square(op)
        _estimators.check_distribution(op, distribution)
        if num_probes is None:
            value = self._exact_diagonal()
            return Diagonal(value, torch.zeros_like(value))
        _estimators.check_count(op, "num_probes", num_probes, 1)
        draw = _estimators.draw(distribution, n, self._wide, self.device, self.generator(seed))
        return _estimators.diagonal(self._wide_rows, n, num_probes, draw, self.device)

    def _exact_diagonal(self) -> Tensor:
        """In `_wide`."""
        return _estimators.exact_diagonal(self._wide_rows, self.shape[0], self._wide, self.device)

    @_evaluate.plainly
    def trace(
        self,
        num_probes: int = 100,
        *,
        method: str = "hutchinson",
        distribution: str = "rademacher",
        seed: Seed = 0,
    ) -> Estimate:
        """Estimate the trace without bias, and the standard error of that.

        Args:
            num_probes: products to make; >= 2, and >= 6 for "hutch++".
            method: "hutchinson", the mean of z.A z over random probes; "hutch++", which takes the part of A on the
                range of a random sketch exactly and estimates the remainder, with far less variance when few
                eigenvalues are large.
            distribution: of the entries of z: "rademacher", +1 or -1 with equal odds and of the least variance, or
                "normal".
            seed: of the probes, or their generator.

        Returns:
            `Estimate`: `value`, `stderr` and `num_probes`; `float(estimate)` is the value. NaN where products are.

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Hutchinson, A stochastic estimator of the trace of the influence matrix, Comm. Statist. 19 (1990).
            Meyer, Musco, Musco and Woodruff, Hutch++: optimal stochastic trace estimation, SOSA (2021), Algorithm 1.

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> value, stderr, _ = H.trace(90, method="hutch++")        # 14
        """
        op = f"{self._name}.trace"
        n = self._square(op)
        methods = {"hutchinson": (_estimators.hutchinson, 2), "hutch++": (_estimators.hutch_plus_plus, 6)}
        if not isinstance(method, str) or method not in methods:
            raise _checks.fail(op, "method", "'hutchinson' or 'hutch++'", _estimators.brief(method))
        _estimators.check_distribution(op, distribution)
        estimator, least = methods[method]
        _estimators.check_count(op, "num_probes", num_probes, least)
        draw = _estimators.draw(distribution, n, self._wide, self.device, self.generator(seed))
        return estimator(self._wide_rows, n, num_probes, draw)

    @_evaluate.plainly
    def eigs(
        self,
        k: int = 1,
        which: str = "LA",
        *,
        tol: float | None = None,
        max_iter: int | None = None,
        seed: Seed = 0,
    ) -> Eigenpairs:
        """Find k extreme eigenvalues and their vectors, by Lanczos with full reorthogonalisation.

        Args:
            k: how many, 1 to n. which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude.
            tol: residual |A v - lambda v| relative to the largest |lambda|; None: 1e-3 of float32, 1e-8 of float64.
            max_iter: products at most, k to n; None: min(n, max(10 k, 200)). Each keeps a vector in memory.
            seed: of the random start, or its generator.

        Returns:
            `Eigenpairs`: `values` (k,) ascending, `vectors` (n, k), `residuals`, `converged`, `iterations`. Where a
            product is not finite all of them are NaN, and `converged` is False.

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13.

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> sharpness = H.eigs(1).values[0]               # 9
            >>> direction = H.eigs(1, "SA").vectors[:, 0]     # of least curvature, (1, 0, 0) or its opposite
        """
        op = f"{self._name}.eigs"
        n = self._square(op, symmetric=True)
        _estimators.check_count(op, "k", k, 1, n)
        if which not in _WHICH:
            raise _checks.fail(op, "which", "'LA', 'SA' or 'LM'", _estimators.brief(which))
        if tol is None:
            tol = 1e-8 if self.dtype is torch.float64 else 1e-3
        if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
            raise _checks.fail(op, "tol", "a number between 0 and 1, or None", _estimators.brief(tol))
        if max_iter is None:
            max_iter = min(n, max(10 * k, 200))
        _estimators.check_count(op, "max_iter", max_iter, k, n)
        generator = self.generator(seed)
        start = torch.randn(1, n, dtype=self._wide, device=self.device, generator=generator)
        return lanczos.eigenpairs(self._wide_rows, start, k, which, tol=tol, max_iter=max_iter, generator=generator)

    @_evaluate.plainly
    def spectrum(self, num_probes: int = 10, *, steps: int = 80, seed: Seed = 0) -> SpectralDensity:
        """Estimate the distribution of the eigenvalues, by stochastic Lanczos quadrature.

        For a random unit vector v, n E[v.f(A) v] = tr f(A). From each of `num_probes` Rademacher vectors Lanczos gives
        nodes theta_i and weights w_i with v.f(A) v close to sum_i w_i f(theta_i).

        Args:
            num_probes: random vectors, >= 1. steps: products with each, 1 and up (n at most); the resolution.
            seed: of the vectors, or their generator.

        Returns:
            `SpectralDensity`, with `density(x)`, `trace()`, `fraction_below(x)`, `negative_share()` and `plot()`.

        Raises:
            TypeError, ValueError: an argument is invalid.
            RuntimeError: a product is not finite.

        References:
            Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J. Matrix Anal.
            Appl. 38 (2017). Ghorbani, Krishnan and Xiao, An investigation into neural net optimization via Hessian
            eigenvalue density, ICML (2019).

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> density = H.spectrum(num_probes=20).density(torch.linspace(0, 10, 100))
        """
        op = f"{self._name}.spectrum"
        n = self._square(op, symmetric=True)
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
            if not bool(torch.isfinite(run.alpha).all()):
                raise RuntimeError(f"{op}: expected finite products, got NaN or infinity at this point")
            values, vectors = run.ritz()
            nodes.append(values.cpu())
            weights.append(vectors[:, 0, :].square().cpu())
        return SpectralDensity(torch.cat(nodes), torch.cat(weights), n)


def _unnested(op: str, v: Any) -> Any:
    """Refuse what has no shape to be compared."""
    if isinstance(v, Tensor) and v.is_nested:
        raise _checks.fail(op, "v", "a dense (strided) tensor", "a nested one")
    return v


def _algebra() -> Any:
    """Import the classes of sums, chains and the like, which are operators themselves."""
    from secant.curvature import _algebra

    return _algebra


def _index() -> Any:
    """Import the class of submatrices, likewise."""
    from secant.curvature import _index

    return _index
