"""The Hessian of a loss with respect to what the model puts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secant.curvature import _graph
from secant.ops import _hvp_dispatch as dispatch

#: u, with as many numbers as the outputs, to H_L u in the shape of u.
LossProduct = Callable[[Tensor], Tensor]


def _of_cross_entropy(found: _graph.CrossEntropy) -> LossProduct:
    """Rows weight (diag(p) - p p^T) u, from the log-probabilities that the graph keeps: no other (R, V) is stored."""
    log_probs, weight = found
    zero = log_probs.new_zeros(log_probs.shape[0], dtype=torch.promote_types(log_probs.dtype, torch.float32))

    def product(u: Tensor) -> Tensor:
        rows = torch.empty(log_probs.shape, dtype=log_probs.dtype, device=log_probs.device)
        if rows.numel():  # as `secant.ops.cross_entropy_hvp`, without its checks
            dispatch.call("cross_entropy_hvp", log_probs, u.reshape(log_probs.shape), zero, rows)
        return rows.mul_(weight).reshape(u.shape)

    return product


def _by_autograd(gradient: Tensor | None, at: Any) -> LossProduct:
    def product(u: Tensor) -> Tensor:
        if gradient is None or not gradient.requires_grad:  # linear in the outputs
            return torch.zeros_like(u)
        (found,) = torch.autograd.grad(gradient, [at], u.reshape(gradient.shape), retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if found is None else found.reshape(u.shape)

    return product


def gradients(
    terms: Sequence[_graph.Term], inputs: Sequence[Any], like: Tensor, *, create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of a sum of scalar terms, None where there is none. The graph below the terms is kept.

    Args:
        inputs: tensors or gradient edges. like: a scalar of the dtype and device of the terms.
    """
    factors = [like.new_full((), term.factor) for term in terms]
    edges = [term.edge for term in terms]
    return list(
        torch.autograd.grad(edges, inputs, factors, retain_graph=True, create_graph=create_graph, allow_unused=True)
    )


def curvature(
    terms: Sequence[_graph.Term], node: _graph.Node, at: Any, like: Tensor
) -> tuple[Tensor | None, LossProduct]:
    """The gradient of a sum of terms with respect to a value that they depend on, and the product with the Hessian.

    Args:
        node: what made the value, views aside. at: the value, or its gradient edge. like: as for `gradients`.
    """
    found = _graph.read_cross_entropy(terms[0].node, node, terms[0].factor) if len(terms) == 1 else None
    if found is not None:
        return gradients(terms, [at], like)[0], _of_cross_entropy(found)
    (gradient,) = gradients(terms, [at], like, create_graph=True)
    return None if gradient is None else gradient.detach(), _by_autograd(gradient, at)
