"""Many small matrices at once: inverse, solve, eigenvalues, and functions of eigenvalues, for n = 1..64 (128).

The choice of method per size and the bytes that must move are in `kernels/blocks/README.md`; the contract between this
module and the kernels is in `kernels/blocks/reference.py`.

All functions here take blocks `a` of shape (..., n, n), 1 <= n <= 64, of float32, float64, bfloat16 or float16 (the
last two are computed in float32), with any number of batch dimensions, empty ones included, and any strides. Those
that find eigenvalues take n <= 128 on the CPU; on a GPU they raise a `secant.BackendError` beyond 64. None
raises for the sake of a matrix: a block that has no result has NaN in the whole of its own output and says why in
`info` (int32, of the batch's shape), and all other blocks are what they would be without it, bitwise. None reads a
value back to the host. As in LAPACK, `info` speaks of the block: a result beyond the range of the dtype, such as the
inverse of 1e-40 in float32, is infinite, or NaN where infinities meet, with 0.

A damping is None; a number; a tensor of numbers per block, of a shape that broadcasts to the batch's; or
("scale", either of these). The first two add lambda I to the block, the last lambda diag(A), as Levenberg and Marquardt
do. It belongs to the matrix: `a` stays as it is. There is no other jitter. A number has to be finite and >= 0; what a
tensor holds is not looked at, so that a negative entry is subtracted, and one that is not finite makes a bad block.
`block_inv_root` has another one, ("max", eps): relative to the largest eigenvalue, for positive semidefinite blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secant import _checks
from secant.ops import _batching, _gate, _register
from secant.ops import _blocks_autograd as autograd
from secant.ops import _blocks_dispatch as dispatch

MAX_N = dispatch.MAX_N
DTYPES = _checks.REAL + _checks.HALF

MAX_POWER = 64
NAMED = {"exp": ("exp",), "log": ("log",), "sqrt": ("root", 0.5), "abs": ("abs",)}

Damping: TypeAlias = float | Tensor | tuple[str, float | Tensor] | None  # the string is "scale"; for a root also "max"
Entrywise: TypeAlias = Callable[[Tensor], Tensor]
SpectralFunction: TypeAlias = (
    str | tuple[str, float] | tuple[Entrywise, Entrywise] | tuple[Entrywise, Entrywise, Entrywise]
)


def _check_blocks(op: str, a: Tensor, largest: int = MAX_N) -> None:
    _checks.tensor(op, "a", a, DTYPES)
    shape = a.shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise _checks.fail(op, "a", "square blocks, shape (..., n, n)", f"shape {tuple(shape)}")
    if not 1 <= shape[-1] <= largest:
        raise _checks.fail(op, "a", f"blocks of 1 to {largest} rows", f"shape {tuple(shape)}")


def _check_vectors(op: str, vectors: Tensor | None, a: Tensor) -> Tensor | None:
    """Check an earlier eigenbasis, of which nothing has a derivative."""
    if vectors is None:
        return None
    _checks.tensor(op, "vectors", vectors, (a.dtype,), a.device)
    if vectors.shape != a.shape:
        raise _checks.fail(op, "vectors", f"shape {tuple(a.shape)}, as a", f"shape {tuple(vectors.shape)}")
    return vectors.detach()


def _check_spd(op: str, assume: str) -> bool:
    if assume not in ("spd", "general"):
        raise _checks.fail(op, "assume", "'spd' or 'general'", _checks.show(assume))
    return assume == "spd"


def _per_block(op: str, name: str, x: Tensor, a: Tensor) -> Tensor:
    """Return a tensor of one number a block, in the compute dtype and of the batch's shape."""
    _checks.tensor(op, name, x, DTYPES, a.device)
    batch = a.shape[:-2]
    sizes = zip(reversed(x.shape), reversed(batch), strict=False)
    if x.dim() > len(batch) or any(size not in (1, full) for size, full in sizes):
        raise _checks.fail(
            op, name, f"a number per block, of a shape that broadcasts to {tuple(batch)}", f"shape {tuple(x.shape)}"
        )
    return x.resolve_neg().to(_checks.arithmetic(a.dtype)).expand(batch)


def _check_damping(op: str, damping: Damping, a: Tensor) -> tuple[Tensor | None, float | None, bool]:
    """(per-block tensor or None, number or None, whether it multiplies the diagonal)."""
    if damping is None:
        return None, None, False
    amount: Any = damping
    scaled = isinstance(damping, tuple)
    if isinstance(damping, tuple):
        if len(damping) != 2 or damping[0] != "scale":
            raise _checks.fail(
                op, "damping", "a number, a tensor or ('scale', number or tensor)", _checks.show(damping)
            )
        amount = damping[1]
    if isinstance(amount, Tensor):
        return _per_block(op, "damping", amount, a), None, scaled
    return (
        None,
        _checks.nonnegative(op, "damping", amount, "a finite number >= 0, a tensor or ('scale', either)"),
        scaled,
    )


def _check_root_damping(op: str, damping: Damping, a: Tensor) -> tuple[Tensor | None, float | None, bool, bool]:
    """Check as `_check_damping` does, and tell whether it is relative to the largest eigenvalue."""
    if not isinstance(damping, tuple) or len(damping) != 2 or damping[0] != "max":
        return *_check_damping(op, damping, a), False
    amount = damping[1]
    if isinstance(amount, Tensor):
        return _per_block(op, "damping", amount, a), None, False, True
    return None, _checks.positive(op, "damping", amount, "('max', a positive finite number or a tensor)"), False, True


def _refuse_out(op: str, out: Tensor | None) -> None:
    if out is not None:
        raise _checks.fail(op, "out", "None when an argument is being differentiated", "a tensor")


def _real(a: Tensor) -> Tensor:
    """Take half precision to float32, where it is differentiated; each result is rounded once."""
    return a if a.dtype in _checks.REAL else a.float()


@_register.whole
def block_inv(
    a: Tensor, *, damping: Damping = None, assume: str = "spd", out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Invert many small matrices, (A + damping)^-1.

    Args:
        a: (..., n, n), 1 <= n <= 64, float32, float64, bfloat16 or float16, any strides.
        damping: None, lambda, or ("scale", lambda) for A + lambda diag(A); lambda is a number >= 0 or a tensor of a
            shape that broadcasts to the batch's.
        assume: "spd": symmetric positive definite; only the lower triangle is read, and the inverse is exactly
            symmetric. "general": partial pivoting.
        out: as `a`; receives the inverse. It may be `a` itself and must not overlap it else.

    Returns:
        (inverse, info): inverse as `a`, contiguous unless `out` is given; info (...), int32: 0, or k where the k-th
        pivot is not positive (spd) or is zero (general) or is not finite, as torch.linalg.cholesky_ex and inv_ex count.
        Such a block has NaN as its inverse. A badly scaled spd block is equilibrated by powers of two, which changes
        nothing but over- and underflow.

        Differentiable in `a` and `damping`, forward and reverse mode: dX = -X dA X. For spd the gradient is symmetric,
        as that of torch.linalg.cholesky.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shape, device, layout, `damping`, `assume` or `out` do not fit.

    References:
        Golub and Van Loan, Matrix Computations, 4th ed., sections 3.4 and 4.2.
        Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapter 14; LAPACK's xPOTRI and xGETRI.

    Example:
        >>> points = torch.randn(1000, 8, 3)
        >>> inverse, info = secant.ops.block_inv(points.mT @ points, damping=("scale", 1e-4))
        >>> inverse.shape, int(info.count_nonzero())
        (torch.Size([1000, 3, 3]), 0)
        >>> secant.ops.block_inv(torch.tensor([[[2.0]], [[-1.0]]]))     # each block for itself
        (tensor([[[0.5000]],
                 [[   nan]]]), tensor([0, 1], dtype=torch.int32))
    """
    op = "block_inv"
    _check_blocks(op, a)
    spd = _check_spd(op, assume)
    lam, value, scaled = _check_damping(op, damping, a)
    if out is not None:
        _checks.tensor(op, "out", out, (a.dtype,), a.device)
    if _gate.is_transformed(a, lam, out):
        _refuse_out(op, out)
        x, info = _batching.apply(autograd.Inv, _real(a), lam, value, scaled, spd)
        return x.to(a.dtype), info
    if out is not None:
        _gate.output(op, out, tuple(a.shape), a.dtype, a.device, {"a": a, "damping": lam}, same="a")
    return dispatch.inv(a, lam, value, scaled, spd, out)


@_register.whole
def block_solve(
    a: Tensor,
    b: Tensor,
    *,
    damping: Damping = None,
    assume: str = "spd",
    vector: bool | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve many small linear systems, (A + damping) x = b, with one or several right-hand sides.

    `b` holds vectors, shape (..., n), or matrices, shape (..., n, k): `vector` says which. Without it, as
    torch.linalg.solve has it, `b` holds one vector a block when it is of shape (n,) or exactly `a.shape[:-1]`, else
    matrices; so that an (n, n) matrix for n blocks is taken for n vectors. The batch dimensions of `a` and `b`
    broadcast; each block of the broadcast batch is factored.

    Args:
        a: (..., n, n), 1 <= n <= 64, float32, float64, bfloat16 or float16, any strides.
        b: (..., n) or (..., n, k), k >= 0, of the dtype of `a`.
        damping: None, lambda, or ("scale", lambda) for A + lambda diag(A); lambda is a number >= 0 or a tensor of a
            shape that broadcasts to the broadcast batch's.
        assume: "spd": symmetric positive definite; only the lower triangle is read. "general": partial pivoting.
        vector: True where `b` holds vectors, False where it holds matrices, None to tell by its shape.
        out: receives x, of its shape and dtype. It may be `b` itself and must not overlap `a` or `b` else.

    Returns:
        (x, info): x is (..., n) for vectors, (..., n, k) for matrices; info as that of `block_inv`, of the broadcast
        batch's shape.

        Differentiable in `a`, `b` and `damping`, forward and reverse mode: dx = A^-1 (db - dA x). For spd the gradient
        of `a` is symmetric.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shape, device, layout, `damping`, `assume`, `vector` or `out` do not fit.

    References:
        Golub and Van Loan, Matrix Computations, 4th ed., sections 3.4 and 4.2; LAPACK's xPOSV and xGESV.

    Example:
        >>> a, b = torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([5.0, 5.0])
        >>> x, info = secant.ops.block_solve(a, b, damping=1.0)
        >>> x.round(decimals=5), int(info)
        (tensor([1., 1.]), 0)
    """
    op = "block_solve"
    _check_blocks(op, a)
    _checks.tensor(op, "b", b, (a.dtype,), a.device)
    spd = _check_spd(op, assume)
    a, b, vector = _broadcast(op, a, b, vector)
    lam, value, scaled = _check_damping(op, damping, a)
    if out is not None:
        _checks.tensor(op, "out", out, (a.dtype,), a.device)
    if _gate.is_transformed(a, b, lam, out):
        _refuse_out(op, out)
        x, info = _batching.apply(autograd.Solve, _real(a), _real(b), lam, value, scaled, spd)
        x = x.to(a.dtype)
        return (x.squeeze(-1) if vector else x), info
    if out is None:
        x, info = dispatch.solve(a, b, lam, value, scaled, spd)
        return (x.squeeze(-1) if vector else x), info
    target = b.squeeze(-1) if vector else b
    _gate.output(op, out, tuple(target.shape), a.dtype, a.device, {"a": a, "b": target, "damping": lam}, same="b")
    _, info = dispatch.solve(a, b, lam, value, scaled, spd, out.unsqueeze(-1) if vector else out)
    return out, info


def _broadcast(op: str, a: Tensor, b: Tensor, vector: bool | None) -> tuple[Tensor, Tensor, bool]:
    """(a, b, whether b holds vectors), with equal batch dimensions and b as (..., n, k)."""
    if vector is None:
        if b.shape == a.shape[:-1]:
            return a, b.unsqueeze(-1), True
        expected = f"shape ({a.shape[-1]},), {tuple(a.shape[:-1])} or (..., {a.shape[-1]}, k)"
        vector = b.dim() == 1
    elif vector is True:
        expected = f"vectors, shape (..., {a.shape[-1]}),"
    elif vector is False:
        expected = f"matrices, shape (..., {a.shape[-1]}, k),"
    else:
        raise _checks.fail(op, "vector", "True, False or None", _checks.show(vector))
    n, given = a.shape[-1], b.shape
    if vector and given:
        b = b.unsqueeze(-1)
    if b.dim() < 2 or b.shape[-2] != n:
        raise _checks.fail(op, "b", f"{expected} for a of shape {tuple(a.shape)}", f"shape {tuple(given)}")
    if a.shape[:-2] != b.shape[:-2]:
        try:
            batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except RuntimeError:
            raise _checks.fail(
                op, "b", f"batch dimensions that broadcast with {tuple(a.shape[:-2])}", f"shape {tuple(given)}"
            ) from None
        a, b = a.expand(*batch, n, n), b.expand(*batch, n, b.shape[-1])
    return a, b, vector


@_register.whole
def block_eigh(a: Tensor, *, vectors: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute eigenvalues and eigenvectors of many small symmetric matrices, A = V diag(w) V^T.

    Args:
        a: (..., n, n), symmetric, 1 <= n <= 128 (64 on GPUs), float32, float64, bfloat16 or float16, any strides; only
            the lower triangle is read.
        vectors: as `a`, eigenvectors of blocks near these, such as V of an earlier call, to save time. A hint: the
            error is bounded alike whatever it holds (of float32, relative to the largest eigenvalue), and where it
            saves nothing it is not read. It does on the CPU for n < 24 (float64: 16), a third of the time.

    Returns:
        (w, V, info): eigenvalues (..., n), ascending; eigenvectors (..., n, n), orthonormal, in columns, of either
        sign; info (...), int32: 0; -1 where the block has an entry that is not finite, with NaN in w and V; k > 0 where
        k off-diagonal entries were left when the cap on sweeps was reached, with the best effort in w and V.

        Differentiable in `a`, forward and reverse mode: dw = diag(V^T dA V) and dV = V (F * V^T dA V), with
        F_ij = 1 / (w_j - w_i). The gradient is symmetric. Eigenvectors of equal eigenvalues are determined up to a
        rotation among themselves, which has no derivative: there the tangents of these vectors are NaN, and so is the
        gradient of the block wherever anything was made of its vectors, even where it would not depend on the rotation.
        `block_function` is differentiable there; use it for functions of A, such as exp(A) or a projector onto an
        eigenspace. What is made of the eigenvalues alone, such as tr f(A), has a derivative always. Equal means: to
        working precision, closer than n times what rounding each entry of the block may move the two by, so 1 and 2
        differ in diag(1, 2, 1e16), while in a rotation of it in float64 they do not.

    Raises:
        TypeError: `a` is no tensor, or of another dtype.
        ValueError: shape or layout do not fit.
        BackendError: blocks are larger than the backend takes.

    References:
        Golub and Van Loan, Matrix Computations, 4th ed., section 8.5 (cyclic Jacobi); Demmel and Veselic, Jacobi's
        method is more accurate than QR, SIAM J. Matrix Anal. Appl. 13 (1992); LAPACK's xSYEV for `info`.

    Example:
        >>> w, v, info = secant.ops.block_eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> w.round(decimals=5)
        tensor([1., 3.])
    """
    _check_blocks("block_eigh", a, dispatch.MAX_EIGEN_N)
    basis = _check_vectors("block_eigh", vectors, a)
    if _gate.is_transformed(a):
        w, v, info = _batching.apply(autograd.Eigh, _real(a))
        return w.to(a.dtype), v.to(a.dtype), info
    return dispatch.eigh(a, basis)


def _check_function(op: str, f: Any) -> tuple[Any, ...]:
    """Find the rule of `_blocks_functions.py` that an argument stands for."""
    expected = f"{', '.join(map(repr, NAMED))}, ('power', p) or callables (f, df) or (f, df, d2f)"
    if isinstance(f, str) and f in NAMED:
        return NAMED[f]
    if isinstance(f, tuple) and len(f) == 2 and f[0] == "power":
        p = f[1]
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not -MAX_POWER <= p <= MAX_POWER:
            raise _checks.fail(op, "f", f"a power from -{MAX_POWER} to {MAX_POWER}", _checks.show(p))
        return ("integer", int(p)) if p == int(p) else ("root", float(p))
    if isinstance(f, tuple) and len(f) in (2, 3) and all(callable(x) for x in f):
        return ("given", f[0], f[1], f[2] if len(f) == 3 else None)
    raise _checks.fail(op, "f", expected, _checks.show(f))


def block_function(a: Tensor, f: SpectralFunction, *, damping: Damping = None) -> tuple[Tensor, Tensor]:
    """Compute functions of many small symmetric matrices: f(M) = V diag(f(w)) V^T for M = A + damping = V diag(w) V^T.

    Args:
        a: (..., n, n), symmetric, 1 <= n <= 128 (64 on GPUs), float32, float64, bfloat16 or float16, any strides; only
            the lower triangle is read.
        f: "exp"; "log" or "sqrt", of positive definite blocks; "abs"; ("power", p), -64 <= p <= 64: for integer p of
            any block (p < 0: without an eigenvalue of zero), else of positive definite ones; or your own (f, df) or
            (f, df, d2f): callables that map a float64 tensor of any shape to the function, its derivative and its
            second derivative, entry by entry. Without d2f, second derivatives differentiate df.
        damping: None, lambda, or ("scale", lambda) for A + lambda diag(A); lambda is a number >= 0 or a tensor of a
            shape that broadcasts to the batch's.

    Returns:
        (x, info): x as `a`, exactly symmetric; info (...), int32: 0; -1 where the block has an entry that is not
        finite; k > 0 where f is not defined or not finite at k eigenvalues, or where k off-diagonal entries were left
        when the cap on sweeps was reached. Such blocks have NaN in x. Eigenvalues and products of a block do not depend
        on its place, bitwise; f itself is evaluated by torch, whose exp, log and pow may round by the place of a
        number.

        Differentiable in `a` and `damping`, forward and reverse mode, twice, at any eigenvalues, equal ones included:
        the derivative in the direction E has the entries f[w_i, w_j] E_ij in the eigenbasis, with divided differences
        in forms where nothing cancels. Those of callables, which have to be right to float64, are the quotient or an
        average of df between the two eigenvalues, whichever is estimated to be nearer; they keep about 1e-12 of a
        smooth f, of second derivatives 1e-10. "abs" has the slope 0 at 0. The gradient is symmetric.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        BackendError: blocks are larger than the backend takes.
        ValueError: shape, layout, `f` or `damping` do not fit.

    References:
        Higham, Functions of Matrices, Theorem 3.11 (Daleckii and Krein); appendix B.16 (divided differences).

    Example:
        >>> e = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> exp = lambda a: secant.ops.block_function(a, "exp")[0]
        >>> torch.func.jvp(exp, (torch.eye(2),), (e,))      # e I, and its derivative in the direction E, e E
        (tensor([[2.7183, 0.0000],
                [0.0000, 2.7183]]), tensor([[0.0000, 2.7183],
                [2.7183, 0.0000]]))
        >>> soft, _ = secant.ops.block_function(torch.eye(2), (torch.tanh, lambda w: 1 / torch.cosh(w) ** 2))
    """
    if torch.compiler.is_dynamo_compiling() and isinstance(f, tuple) and callable(f[0]):
        return _block_function_of_held(a, _register.hold(f), damping)
    return _block_function(a, f, damping)


@_register.whole
def _block_function_of_held(a: Tensor, key: int, damping: Damping) -> tuple[Tensor, Tensor]:
    return _block_function(a, _register.held(key), damping)


@_register.whole
def _block_function(a: Tensor, f: SpectralFunction, damping: Damping) -> tuple[Tensor, Tensor]:
    op = "block_function"
    _check_blocks(op, a, dispatch.MAX_EIGEN_N)
    rule = _check_function(op, f)
    lam, value, scaled = _check_damping(op, damping, a)
    m = autograd.damped(_real(a), lam, value, scaled)
    if _gate.is_transformed(m):
        x, info = _batching.apply(autograd.Spectral, m, rule)
    else:
        x, info = autograd.spectral(m, rule)
    return x.to(a.dtype), info


@_register.whole
def block_abs_inv(a: Tensor, *, floor: float | Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Invert |A| with its eigenvalues bounded below: V diag(1 / max(|w|, floor)) V^T for A = V diag(w) V^T.

    That is what takes the place of the inverse Hessian in saddle-free Newton methods: the step along an eigenvector of
    negative curvature is reversed, and none is longer than the gradient / floor.

    Args:
        a: (..., n, n), symmetric and possibly indefinite, 1 <= n <= 128 (64 on GPUs), float32, float64, bfloat16 or
            float16, any strides; only the lower triangle is read.
        floor: a positive finite number, or a tensor of such numbers of a shape that broadcasts to the batch's.
        vectors: as `a`, eigenvectors of blocks near these, as in `block_eigh`.

    Returns:
        (x, info): x as `a`, exactly symmetric; info (...), int32: 0; -1 where the block has an entry that is not
        finite; -2 where a tensor has no positive finite floor for it; k > 0 where k off-diagonal entries were left when
        the cap on sweeps was reached. Such blocks have NaN in x.

        Differentiable in `a` (not in `floor`), forward and reverse mode, by divided differences of max(|w|, floor),
        finite at repeated eigenvalues. At |w| = floor, where there is a kink, its slope is taken to be 0.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        BackendError: blocks are larger than the backend takes.
        ValueError: shape, layout or `floor` do not fit, or `floor` requires grad.

    References:
        Dauphin et al., Identifying and attacking the saddle point problem in high-dimensional non-convex optimization,
        NIPS 2014. Higham, Functions of Matrices, Theorem 3.11 (Daleckii and Krein).

    Example:
        >>> x, info = secant.ops.block_abs_inv(torch.tensor([[-2.0, 0.0], [0.0, 1e-9]]), floor=1e-3)
        >>> x.diagonal()
        tensor([5.0000e-01, 1.0000e+03])
    """
    op = "block_abs_inv"
    _check_blocks(op, a, dispatch.MAX_EIGEN_N)
    basis = _check_vectors(op, vectors, a)
    least: Tensor | None = None
    value: float | None = None
    if isinstance(floor, Tensor):
        if floor.requires_grad:
            raise _checks.fail(op, "floor", "a tensor that does not require grad (detach it)", "requires_grad=True")
        least = _per_block(op, "floor", floor, a)
    else:
        value = _checks.positive(op, "floor", floor, "a positive finite number or a tensor")
    if _gate.is_transformed(a, least):
        x, info = _batching.apply(autograd.AbsInv, _real(a), least, value)
        return x.to(a.dtype), info
    return dispatch.abs_inv(a, least, value, basis)


@_register.whole
def block_inv_root(
    a: Tensor, p: int, *, damping: Damping = None, vectors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute inverse p-th roots of many small symmetric positive definite matrices, (A + damping)^(-1/p).

    p = 4 is what Shampoo asks for, p = 2 whitens, p = 1 is the inverse by way of the eigenvalues (`block_inv` is
    faster).

    For positive semidefinite blocks, such as Gram matrices G G^T of any rank, the damping ("max", eps) replaces the
    eigenvalues w_1 <= ... <= w_n by max(w_i, 0) + eps max(w_n, 0): rounding has made some of them negative that would
    be zero, and no entry of the root is larger than (eps w_n)^(-1/p). A block without a positive eigenvalue, such as a
    block of zeros, has the root 0, as in a pseudoinverse: what is preconditioned with it stays where it is.

    Args:
        a: (..., n, n), symmetric, 1 <= n <= 128 (64 on GPUs), float32, float64, bfloat16 or float16, any strides; only
            the lower triangle is read.
        p: 1, 2 or 4.
        damping: None, lambda, or ("scale", lambda) for A + lambda diag(A); lambda is a number >= 0 or a tensor of a
            shape that broadcasts to the batch's. Or ("max", eps), see above; eps is a positive number or such a tensor.
        vectors: as `a`, eigenvectors of blocks near these, as in `block_eigh`.

    Returns:
        (x, info): x as `a`, exactly symmetric and positive definite; info (...), int32: 0; k > 0 where the k smallest
        eigenvalues of the damped block are not positive, or where k off-diagonal entries were left when the cap on
        sweeps was reached; -1 where the block has an entry that is not finite. Such blocks have NaN in x.

        With ("max", eps), x has no NaN where info is k >= 0, the number of eigenvalues below zero that were clamped
        (without rounding, 0 for a Gram matrix); NaN where it is -1, as above, -2, a tensor has no positive finite eps
        for the block, or -3, the cap on sweeps was reached.

        Differentiable in `a` and `damping`, forward and reverse mode, by divided differences (the square roots'
        Sylvester equations, solved in the eigenbasis), finite at repeated eigenvalues. The gradient is symmetric. With
        ("max", eps) too, computed in float64, where max(w, 0) has the slope 0 at 0, and w_n is a single eigenvalue.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        BackendError: blocks are larger than the backend takes.
        ValueError: shape, layout, `p` or `damping` do not fit.

    References:
        Higham, Functions of Matrices, chapters 6 and 7; Gupta, Koren, Singer, Shampoo, ICML 2018.

    Example:
        >>> x, info = secant.ops.block_inv_root(torch.diag(torch.tensor([4.0, 16.0])), 2)
        >>> x.diagonal()
        tensor([0.5000, 0.2500])
        >>> g = torch.tensor([[2.0], [0.0]])                    # of rank 1
        >>> secant.ops.block_inv_root(g @ g.mT, 2, damping=("max", 0.01))[0].diagonal()
        tensor([0.4975, 5.0000])
    """
    op = "block_inv_root"
    _check_blocks(op, a, dispatch.MAX_EIGEN_N)
    if not isinstance(p, int) or isinstance(p, bool) or p not in (1, 2, 4):
        raise _checks.fail(op, "p", "1, 2 or 4", _checks.show(p))
    lam, value, scaled, clamped = _check_root_damping(op, damping, a)
    basis = _check_vectors(op, vectors, a)
    if not _gate.is_transformed(a, lam):
        return dispatch.inv_root(a, p, lam, value, scaled, clamped, basis)
    if clamped:
        x, info = autograd.clamped_root(_real(a), lam, value, p)
    else:
        x, info = _batching.apply(autograd.InvRoot, _real(a), lam, value, scaled, p)
    return x.to(a.dtype), info
