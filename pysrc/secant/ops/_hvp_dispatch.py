"""Checked arguments of the `hvp` family on their way to a kernel: allocation, registration with torch, dispatch.

The contract of the kernels is in `kernels/hvp/reference.py`. Vectors come as matrices of k columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secant import _checks, backends
from secant._errors import BackendError
from secant.ops import _register


def _rows(x: Tensor) -> Tensor:
    """Return a matrix with contiguous rows and any stride between them, or sparse rows; a copy only if need be."""
    return x if x.layout is torch.sparse_csr or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _line(x: Tensor) -> Tensor:
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


#: Ops of full matrices of any strides, float32 or float64: how many of their arguments are such.
_ANY_STRIDES = {"paired_matmul": 4, "gram": 1}


def _arguments(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """In the layout of the contract: a compiler may hand over other strides than it traced."""
    if name in _ANY_STRIDES:
        count = _ANY_STRIDES[name]
        factors, rest = args[:count], args[count:]
        return (
            *[x if x is None else x.resolve_neg() for x in factors],
            *[_line(x) if isinstance(x, Tensor) else x for x in rest],
        )
    rows = 2 if name == "cross_entropy_hvp" else 1
    return (
        *[_rows(x.resolve_neg() if x.is_neg() else x) for x in args[:rows]],
        *[_line(x) if isinstance(x, Tensor) else x for x in args[rows:]],
    )


#: Shapes of the tensors of an op in its order, as `_checks.shapes` reads them; "-" for what is no tensor. l is d, or
#: d + 1 with an intercept.
_SHAPES = {
    "glm_hvp": ("nd", "lk", "n", "-", "lk"),
    "glm_value_grad": ("nd", "n", "l", "-", "-", "n?", "-", "", "l", "n"),
    "softmax_hvp": ("nd", "lk", "nk", "n?", "-", "lk"),
    "softmax_value_grad": ("nd", "n", "lk", "n?", "-", "", "lk", "nk"),
    "cross_entropy_hvp": ("rv", "rv", "r?", "rv"),
    "paired_matmul": ("MK", "KN", "MP?", "PN?", "N?", "MN?", "MN?", "MN?", "MN"),
    "gram": ("mn", "m?", "-", "nn"),
}


def _dtype(name: str, argument: str, first: torch.dtype) -> torch.dtype:
    """Return what the contract has an argument in where the first one is of this dtype."""
    if argument == "value":
        return torch.float64
    if argument == "target" and name == "softmax_value_grad":
        return torch.int64
    as_it_comes = argument in ("x", "logits") or name in ("cross_entropy_hvp", "paired_matmul")
    return first if as_it_comes and name != "gram" and argument != "lse" else _checks.arithmetic(first)


def _check(name: str, args: tuple[Any, ...]) -> None:
    """Shapes and dtypes of the contract, for who calls a registered op itself: a kernel trusts them."""
    first = args[0]
    tensors = [
        (argument, x, shape, _dtype(name, argument, first.dtype))
        for argument, shape, x in zip(_KERNELS[name].arguments, _SHAPES[name], args, strict=True)
        if shape != "-"
    ]
    for argument, x, shape, _ in tensors[1:]:
        if shape.startswith("l") and x.dim() and first.dim() == 2 and len(x) - first.shape[1] not in (0, 1):
            raise _checks.fail(name, argument, f"{first.shape[1]} rows, or one more with an intercept", len(x))
    _checks.shapes(name, tensors, first.device)


def _kernel(schema: str) -> _register.Kernel:
    name = schema.partition("(")[0]

    def settle(*args: Any) -> tuple[Any, ...]:
        _check(name, args)
        return _arguments(name, args)

    return _register.Kernel("hvp", name, schema, settle=settle)


_KERNELS = {
    kernel.method: kernel
    for kernel in map(
        _kernel,
        (
            "glm_hvp(Tensor x, Tensor v, Tensor weight, float l2, Tensor(a!) out)",
            "glm_value_grad(Tensor x, Tensor target, Tensor coef, str loss, float delta, Tensor? sample_weight, "
            "float l2, Tensor(a!) value, Tensor(b!) grad, Tensor(c!) weight)",
            "softmax_hvp(Tensor x, Tensor v, Tensor probs, Tensor? sample_weight, float l2, Tensor(a!) out)",
            "softmax_value_grad(Tensor x, Tensor target, Tensor coef, Tensor? sample_weight, float l2, "
            "Tensor(a!) value, Tensor(b!) grad, Tensor(c!) probs)",
            "cross_entropy_hvp(Tensor logits, Tensor u, Tensor? lse, Tensor(a!) out)",
            "paired_matmul(Tensor a, Tensor b, Tensor? c, Tensor? e, Tensor? bias, Tensor? scale, Tensor? p, "
            "Tensor? q, Tensor(a!) out)",
            "gram(Tensor x, Tensor? weight, bool accumulate, Tensor(a!) out)",
        ),
    )
}


def call(name: str, *args: Any) -> None:
    """Launch a kernel; through the registered op where a compiler or a tensor subclass has to see it."""
    first = args[0]
    if first.layout is torch.sparse_csr:
        backend = backends.resolve("hvp", first.device, first.dtype)
        if not getattr(backend, "SPARSE_ROWS", False):
            raise BackendError(
                f"backend {backend.__name__.rpartition('.')[2]!r} has no sparse {name}: pass x.to_dense()"
            )
    _KERNELS[name](*_arguments(name, args))
