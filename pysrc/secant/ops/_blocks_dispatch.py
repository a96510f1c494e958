"""Checked arguments of the `blocks` family on their way to a kernel: canonical layout, allocation, dispatch, and back.

The contract of the kernels is in `kernels/blocks/reference.py`. A damping comes as a pair: `lam`, a tensor of the
compute dtype and of the batch's shape, or None; and `value`, a number, or None. At most one of the two is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secant import _checks, backends
from secant._errors import BackendError
from secant.ops import _gate, _register

#: Largest n that every backend serves, and that some serve where eigenvalues are found.
MAX_N, MAX_EIGEN_N = 64, 128


def _damped(a: Tensor, lam: Tensor | None, value: float | None, *rest: Any) -> tuple[Any, ...]:
    return a, value if lam is None else lam, *rest


#: Shapes of the tensors of the registered ops, as `_checks.shapes` reads them.
_SHAPES = {
    "a": "bnn", "b": "bnk", "lam": "b?", "floor": "b?", "values": "bn", "vectors": "bnn", "out": "bnn", "info": "b",
    "basis": "bnn?",
}  # fmt: skip


def _settled(kernel: _register.Kernel, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay out the arguments of a registered op, and check what a kernel would otherwise trust, for who calls it."""
    op, given = kernel.name, dict(zip(kernel.arguments, args, strict=False))  # without those left out
    for name in ("a", "b", "basis"):
        given[name] = None if given.get(name) is None else _flat(given[name])
    for name in ("lam", "floor"):
        given[name] = None if given.get(name) is None else given[name].resolve_neg().contiguous()
    a = _checks.tensor(op, "a", given["a"], _checks.REAL + _checks.HALF)
    dtypes = {"info": torch.int32, "lam": _checks.arithmetic(a.dtype), "floor": _checks.arithmetic(a.dtype)}
    shapes = _SHAPES | ({"out": "bnk"} if op == "block_solve" else {})
    tensors = (
        (name, given[name], shapes[name], dtypes.get(name, a.dtype))
        for name in kernel.arguments
        if name in shapes and name in given
    )
    n = _checks.shapes(op, tensors, a.device)["n"]
    largest = MAX_N if op in ("block_inv", "block_solve") else largest_eigenproblem(a.device, a.dtype)
    if n > largest:
        raise _checks.fail(op, "a", f"blocks of at most {largest} rows", n)
    return tuple(given[name] for name in kernel.arguments[: len(args)])


def _kernel(method: str, schema: str, contract: Callable[..., tuple[Any, ...]] | None = None) -> _register.Kernel:
    kernel = _register.Kernel("blocks", method, schema, settle=lambda *args: _settled(kernel, args), contract=contract)
    return kernel


_inv = _kernel(
    "inv",
    "block_inv(Tensor a, Tensor? lam, float? value, bool scaled, bool spd, Tensor(a!) out, Tensor(b!) info)",
    _damped,
)
_solve = _kernel(
    "solve",
    "block_solve(Tensor a, Tensor b, Tensor? lam, float? value, bool scaled, bool spd, Tensor(a!) out, "
    "Tensor(b!) info)",
    lambda a, b, lam, value, *rest: (a, b, value if lam is None else lam, *rest),
)
_eigh = _kernel(
    "eigh", "block_eigh(Tensor a, Tensor(a!) values, Tensor(b!) vectors, Tensor(c!) info, Tensor? basis=None)"
)
_abs_inv = _kernel(
    "abs_inv",
    "block_abs_inv(Tensor a, Tensor? floor, float? value, Tensor(a!) out, Tensor(b!) info, Tensor? basis=None)",
    _damped,
)
_inv_root = _kernel(
    "inv_root",
    "block_inv_root(Tensor a, int p, Tensor? lam, float? value, bool scaled, Tensor(a!) out, Tensor(b!) info, "
    "bool clamped=False, Tensor? basis=None)",
    lambda a, p, lam, value, *rest: (a, p, value if lam is None else lam, *rest),
)


def _flat(x: Tensor) -> Tensor:
    """(..., r, c) as (B, r, c) with contiguous row-major blocks and any stride between them; a copy only if need be."""
    x = x.resolve_neg()
    if x.is_contiguous():
        return x if x.dim() == 3 else x.view(-1, *x.shape[-2:])
    x = x.reshape(-1, *x.shape[-2:])  # a view wherever one stride can stand for all batch dimensions
    rows, columns = x.stride()[1:]
    if (columns != 1 and x.shape[2] > 1) or (rows != x.shape[2] and x.shape[1] > 1):
        return x.contiguous()
    return x


def mirrored(a: Tensor) -> Tensor:
    """Return the symmetric matrices that the lower triangles stand for."""
    return a.tril() + a.tril(-1).mT


def _result(shape: torch.Size, like: Tensor, out: Tensor | None) -> tuple[Tensor, bool]:
    """Choose where a kernel may write: `out` itself when its layout allows, else a new tensor."""
    # A registered op may not write to an argument that is an input too, so that `out` is copied to.
    if out is None:
        return _empty(shape, like), False
    direct = _gate.is_plain(out) and out.is_contiguous() and not out.is_neg()
    return (out if direct else _empty(shape, like)), direct


def _empty(shape: torch.Size, like: Tensor) -> Tensor:
    """Allocate a contiguous tensor. What there is to parse makes torch.empty three times as slow as empty_like."""
    return torch.empty_like(like) if like.is_contiguous() and like.shape == shape else like.new_empty(shape)


def _codes(a: Tensor) -> Tensor:
    # A plain number parses in half the time that a slice of a shape takes.
    return a.new_empty(a.shape[0] if a.dim() == 3 else a.shape[:-2], dtype=torch.int32)


def _line(x: Tensor) -> Tensor:
    """(...) as (B,), contiguous; most often it is."""
    return x if x.dim() == 1 and x.is_contiguous() else x.reshape(-1).contiguous()


def _finish(x: Tensor, direct: bool, out: Tensor | None) -> Tensor:
    if out is None:
        return x
    if not direct:
        return out.copy_(x)
    _gate.written(out)
    return out


def inv(
    a: Tensor, lam: Tensor | None, value: float | None, scaled: bool, spd: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(inverse, info) of a (..., n, n)."""
    x, direct = (torch.empty_like(a), False) if out is None and a.is_contiguous() else _result(a.shape, a, out)
    info = _codes(a)
    if a.numel():
        lam = lam if lam is None else _line(lam)
        _inv(_flat(a), lam, value, scaled, spd, x if x.dim() == 3 else _flat(x), _line(info))
    return _finish(x, direct, out), info


def solve(
    a: Tensor,
    b: Tensor,
    lam: Tensor | None,
    value: float | None,
    scaled: bool,
    spd: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x, info) for a (*batch, n, n) and b (*batch, n, k)."""
    x, direct = _result(b.shape, b, out)
    info = _codes(a)
    if a.numel():
        a3, lam = _flat(a), lam if lam is None else _line(lam)
        if b.shape[-1]:
            b3, x3 = _flat(b), (x if x.dim() == 3 else _flat(x))
        else:  # nothing to solve for, but the codes are asked for
            b3 = torch.zeros(len(a3), a3.shape[1], 1, dtype=a.dtype, device=a.device)
            x3 = torch.empty_like(b3)
        _solve(a3, b3, lam, value, scaled, spd, x3, _line(info))
    return _finish(x, direct, out), info


def largest_eigenproblem(device: torch.device, dtype: torch.dtype) -> int:
    """Return the largest n of which the backend that serves these blocks finds eigenvalues."""
    found: int = getattr(backends.resolve("blocks", device, dtype), "EIGEN_N", MAX_N)
    return found


def _check_served(op: str, a: Tensor) -> None:
    """Raise where the backend that serves these blocks has no eigenvalues of blocks so large."""
    n = a.shape[-1]
    if n > MAX_N and n > largest_eigenproblem(a.device, a.dtype):
        backend = backends.resolve("blocks", a.device, a.dtype).__name__.rpartition(".")[2]
        raise BackendError(
            f"{op}: backend {backend!r} finds eigenvalues of blocks of at most {MAX_N} rows, got {n}: "
            "use torch.linalg.eigh, or newton_inv_root for a root"
        )


def eigh(a: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(values, vectors, info) of a (..., n, n)."""
    _check_served("block_eigh", a)
    values = torch.empty(a.shape[:-1], dtype=a.dtype, device=a.device)
    vectors = _empty(a.shape, a)
    info = _codes(a)
    if a.numel():
        _eigh(_flat(a), values.view(-1, a.shape[-1]), _flat(vectors), _line(info), _hint(basis))
    return values, vectors, info


def _hint(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else _flat(basis)


def abs_inv(a: Tensor, floor: Tensor | None, value: float | None, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(V diag(1 / max(|w|, floor)) V^T, info) of a (..., n, n)."""
    _check_served("block_abs_inv", a)
    x = _empty(a.shape, a)
    info = _codes(a)
    if a.numel():
        _abs_inv(_flat(a), floor if floor is None else _line(floor), value, _flat(x), _line(info), _hint(basis))
    return _with_positive(x, info, floor, info == 0)


def inv_root(
    a: Tensor,
    p: int,
    lam: Tensor | None,
    value: float | None,
    scaled: bool,
    clamped: bool = False,
    basis: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """((A + damping)^(-1/p), info) of a (..., n, n)."""
    _check_served("block_inv_root", a)
    x = _empty(a.shape, a)
    info = _codes(a)
    if a.numel():
        lam = lam if lam is None else _line(lam)
        _inv_root(_flat(a), p, lam, value, scaled, _flat(x), _line(info), clamped, _hint(basis))
    return _with_positive(x, info, lam, info >= 0) if clamped else (x, info)


def _with_positive(x: Tensor, info: Tensor, number: Tensor | None, good: Tensor) -> tuple[Tensor, Tensor]:
    """Take away the results of numbers that are not positive and finite, which is known on the device alone."""
    if number is None:
        return x, info
    bad = ~((number > 0) & (number < math.inf))  # NaN is none
    return torch.where(bad[..., None, None], math.nan, x), torch.where(bad & good, -2, info)
