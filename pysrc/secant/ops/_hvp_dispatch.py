"""Checked arguments of the `hvp` family on their way to a kernel: allocation, registration with torch, dispatch.

The contract of the kernels is in `kernels/hvp/reference.py`. Vectors come as matrices of k columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secant import backends
from secant._errors import BackendError
from secant.ops import _gate

_lib = torch.library.Library("secant", "FRAGMENT")
_lib.define("glm_hvp(Tensor x, Tensor v, Tensor weight, float l2, Tensor(a!) out) -> ()")
_lib.define(
    "glm_value_grad(Tensor x, Tensor target, Tensor coef, str loss, float delta, Tensor? sample_weight, float l2, "
    "Tensor(a!) value, Tensor(b!) grad, Tensor(c!) weight) -> ()"
)
_lib.define(
    "softmax_hvp(Tensor x, Tensor v, Tensor probs, Tensor? sample_weight, float l2, Tensor(a!) out) -> ()"
)  # fmt: skip
_lib.define(
    "softmax_value_grad(Tensor x, Tensor target, Tensor coef, Tensor? sample_weight, float l2, "
    "Tensor(a!) value, Tensor(b!) grad, Tensor(c!) probs) -> ()"
)
_lib.define("cross_entropy_hvp(Tensor logits, Tensor u, Tensor? lse, Tensor(a!) out) -> ()")
_lib.define(
    "paired_matmul(Tensor a, Tensor b, Tensor? c, Tensor? e, Tensor? bias, Tensor? scale, Tensor? p, Tensor? q, "
    "Tensor(a!) out) -> ()"
)

NAMES = ("glm_hvp", "glm_value_grad", "softmax_hvp", "softmax_value_grad", "cross_entropy_hvp", "paired_matmul")


def _rows(x: Tensor) -> Tensor:
    """A matrix with contiguous rows and any stride between them, or sparse rows; a copy only if need be."""
    return x if x.layout is torch.sparse_csr or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _line(x: Tensor) -> Tensor:
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def _arguments(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """In the layout of the contract: a compiler may hand over other strides than it traced."""
    if name == "paired_matmul":
        factors, rest = args[:4], args[4:]
        return (
            *[x if x is None else x.resolve_neg() for x in factors],
            *[_line(x) if isinstance(x, Tensor) else x for x in rest],
        )
    rows = 2 if name == "cross_entropy_hvp" else 1
    return (
        *[_rows(x.resolve_neg() if x.is_neg() else x) for x in args[:rows]],
        *[_line(x) if isinstance(x, Tensor) else x for x in args[rows:]],
    )


def _implementation(name: str) -> Any:
    def op(first: Tensor, *args: Any) -> None:
        backend = backends.resolve("hvp", first.device, first.dtype)
        getattr(backend, name)(*_arguments(name, (first, *args)))

    return op


def _no_op(*args: Any) -> None:
    """Fake implementation: every result is written into an argument."""


for _name in NAMES:
    for _key in ("CPU", "CUDA"):
        _lib.impl(_name, _implementation(_name), _key)
    torch.library.register_fake(f"secant::{_name}", _no_op, lib=_lib)


def call(name: str, *args: Any) -> None:
    """Launch a kernel; through the registered op where a compiler or a tensor subclass has to see it."""
    first, out = args[0], args[-1]
    if torch.compiler.is_compiling() or not _gate.is_plain(first, out):
        getattr(torch.ops.secant, name)(*args)
        return
    backend = backends.resolve("hvp", first.device, first.dtype)
    if first.layout is torch.sparse_csr and not getattr(backend, "SPARSE_ROWS", False):
        raise BackendError(f"backend {backend.__name__.rpartition('.')[2]!r} has no sparse {name}: pass x.to_dense()")
    getattr(backend, name)(*_arguments(name, args))
