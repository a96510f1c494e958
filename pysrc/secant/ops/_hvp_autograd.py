"""Derivatives of the `hvp` family around its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from secant.ops import _batching, _gate

#: v (d, k) -> the product, by a kernel.
Product = Callable[[Tensor], Tensor]


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Tell whether autograd, forward AD or a functorch transform looks at one of these."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    if any(x is not None and _gate.is_batched(x) for x in tensors):
        return True
    transformed = torch._C._functorch.maybe_current_level() is not None
    if transformed and any(x is not None and is_wrapped(x) for x in tensors):
        return True
    forward = torch.autograd.forward_ad._current_level >= 0
    # Sparse rows have no tangents.
    dense = (x for x in tensors if x is not None and x.layout is torch.strided)
    return forward and any(unpack_dual(x).tangent is not None for x in dense)


def is_wrapped(x: Tensor) -> bool:
    """Tell whether a functorch transform, or an older batch, stands around this tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or _gate.is_batched(x)


class _Product(Function):
    """A symmetric linear map of v: its derivatives of either mode, of every order, are itself.

    `product` maps (d, k) to (d, k) column by column where `columns` is set; then a batch of vectors is one call.
    """

    @staticmethod
    def forward(v: Tensor, product: Product, columns: bool) -> Tensor:
        return product(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.product, ctx.columns = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return apply(g, ctx.product, ctx.columns), None, None

    @staticmethod
    def jvp(ctx: Any, dv: Tensor, *others: None) -> Tensor:
        return apply(dv, ctx.product, ctx.columns)

    @staticmethod
    def vmap(info: Any, dims: tuple[int, None, None], v: Tensor, product: Product, columns: bool) -> tuple[Tensor, int]:
        v = v.movedim(dims[0], 0)
        if columns:
            batch, d, k = v.shape
            flat = v.movedim(0, 1).reshape(d, batch * k)
            return apply(flat, product, columns).reshape(d, batch, k).movedim(1, 0), 0
        return torch.stack([apply(x, product, columns) for x in v]), 0


def apply(v: Tensor, product: Product, columns: bool) -> Tensor:
    """product(v), differentiable by v."""
    return _batching.apply(_Product, v, product, columns)


class ValueGrad(Function):
    """(value, gradient, per-row result) of a linear model by its kernel, differentiable by the coefficients.

    The last result counts as a constant. A derivative that is to be differentiated again is that of `formula`.
    """

    @staticmethod
    def forward(
        coef: Tensor,
        kernel: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        formula: Callable[[Tensor], Tensor],
        product: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernel(coef)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        coef, _, ctx.formula, ctx.product = inputs
        _, grad, rows = output
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coef, grad, rows)

    @staticmethod
    def backward(
        ctx: Any, value_g: Tensor | None, grad_g: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        coef, grad, rows = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.enable_grad():
                at = coef if coef.requires_grad else coef.detach().requires_grad_()
                (exact,) = torch.autograd.grad(ctx.formula(at), at, create_graph=True)
                total = torch.zeros_like(coef) if value_g is None else value_g.to(exact.dtype) * exact
                if grad_g is not None:
                    total = total + torch.autograd.grad(exact, at, grad_g, create_graph=True)[0]
            return total, None, None, None
        total = torch.zeros_like(coef) if value_g is None else value_g.to(grad.dtype) * grad
        if grad_g is not None:
            total = total + ctx.product(grad_g, rows)
        return total, None, None, None


#: x (m, n), weight (m,) or None -> X^T diag(weight) X, by a kernel.
Gram = Callable[[Tensor, Tensor | None], Tensor]


class _Gram(Function):
    """X^T diag(w) X by its kernel; the derivatives are products of torch, but that by w, which is of the same form."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, kernel: Gram) -> Tensor:
        return kernel(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.kernel = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        y = x @ (g + g.mT)
        by_weight = (x * y).sum(-1) / 2 if ctx.needs_input_grad[1] else None
        return y if weight is None else weight[:, None] * y, by_weight, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, *others: None) -> Tensor:
        x, weight = ctx.saved_tensors
        parts = []
        if dx is not None:
            product = dx.mT @ (x if weight is None else weight[:, None] * x)
            parts.append(product + product.mT)
        if dw is not None:
            parts.append(gram(x, dw, ctx.kernel))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], x: Tensor, weight: Tensor | None, kernel: Gram) -> tuple[Tensor, int]:
        xs, weights = (
            [t] * info.batch_size if t is None or dim is None else t.movedim(dim, 0)
            for t, dim in zip((x, weight), dims, strict=False)
        )
        return torch.stack([gram(a, b, kernel) for a, b in zip(xs, weights, strict=True)]), 0


def gram(x: Tensor, weight: Tensor | None, kernel: Gram) -> Tensor:
    """kernel(x, weight), differentiable by both."""
    return _batching.apply(_Gram, x, weight, kernel)


def value_grad_of(value: Callable[[Tensor], Tensor], coef: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradient) of a formula, both differentiable to any order and by everything that it closes over."""
    grad, result = torch.func.grad_and_value(value)(coef)
    return result, grad
