"""X v and X^T r as torch operations that can be differentiated to any order, in both modes and in batches.

torch multiplies sparse rows, but has no forward mode, no batches and no functorch transform for that, and trusts the
indices. Each of the two products is the derivative of the other, so that is little to say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from secant.kernels.hvp import rows


class _Rows:
    """Sparse rows as functorch lets them through: not a tensor, nor anything that it looks into."""

    def __init__(self, op: str, x: Tensor) -> None:
        self.op, self.x = op, x

    def times(self, v: Tensor, turned: bool) -> Tensor:
        """X v or, `turned`, X^T v. The indices may have changed since the last time."""
        x = rows.checked(self.op, "x", self.x.detach())
        return (x.mT if turned else x) @ v


class _SparseProduct(Function):
    """A product of sparse rows, linear in v; x is given as a tensor too where its derivative is wanted, else None."""

    @staticmethod
    def forward(v: Tensor, x: Tensor | None, held: _Rows, turned: bool) -> Tensor:
        return held.times(v, turned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, ctx.x, ctx.held, ctx.turned = inputs
        if ctx.x is not None:
            ctx.save_for_backward(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        by_v = _SparseProduct.apply(g, ctx.x, ctx.held, not ctx.turned) if ctx.needs_input_grad[0] else None
        if ctx.x is None or not ctx.needs_input_grad[1]:
            return by_v, None, None, None
        (v,) = ctx.saved_tensors
        left, right = (v, g) if ctx.turned else (g, v)
        return by_v, left.reshape(len(left), -1) @ right.reshape(len(right), -1).mT, None, None

    @staticmethod
    def jvp(ctx: Any, dv: Tensor, *others: None) -> Tensor:
        return _SparseProduct.apply(dv, ctx.x, ctx.held, ctx.turned)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], v: Tensor, x: Any, held: _Rows, turned: bool) -> tuple[Tensor, int]:
        v = v.movedim(dims[0], -1)  # a batch is so many columns more
        product = _SparseProduct.apply(v.reshape(len(v), -1), x, held, turned)
        return product.reshape(len(product), *v.shape[1:]), v.dim() - 1


def _product(op: str, x: Tensor, v: Tensor, turned: bool) -> Tensor:
    if x.layout is torch.sparse_csr:
        wanted = x if x.requires_grad and torch.is_grad_enabled() else None
        return _SparseProduct.apply(v, wanted, _Rows(op, x), turned)
    wide = x.to(v.dtype)
    return (wide.mT if turned else wide) @ v


def times(op: str, x: Tensor, v: Tensor) -> Tensor:
    """X v for v (d,) or (d, k)."""
    return _product(op, x, v, False)


def transposed_times(op: str, x: Tensor, r: Tensor) -> Tensor:
    """X^T r for r (N,) or (N, k)."""
    return _product(op, x, r, True)
