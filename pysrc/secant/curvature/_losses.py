"""The Hessian of a loss with respect to what the model puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from secant.curvature import _graph
from secant.ops import _hvp_dispatch as dispatch

#: u, with as many numbers as the outputs, to H_L u in the shape of u.
LossProduct = Callable[[Tensor], Tensor]


#: Blocks of M that are found by products are no larger, and have no more entries together.
_LARGEST, _ENTRIES = 512, 2**25

#: S, like the outputs, and the signs (B,) of its B blocks of equal numbers of leading entries.
Factor = tuple[Tensor, Tensor]


class Middle(Protocol):
    """M, symmetric on the outputs."""

    def __call__(self, u: Tensor) -> Tensor:
        """Compute M u, in the shape of u."""

    def factors(self, like: Tensor) -> Iterator[Factor] | None:
        """S_f, whose block b is a vector s_fb, such that block b of M is sum_f sign_fb s_fb s_fb^T.

        None where M is not known to be made of blocks, or they are too large.

        Args:
            like: the outputs.
        """


def several(middle: Middle, u: Tensor) -> Tensor:
    """Compute M u for each of (k, ...)."""
    return middle.several(u) if isinstance(middle, FoundMiddle) else torch.stack([middle(x) for x in u])


class IdentityMiddle:
    """I, of half the squared sum of the outputs."""

    def __call__(self, u: Tensor) -> Tensor:
        """Return u."""
        return u

    def factors(self, like: Tensor) -> Iterator[Factor]:
        """Yield the unit vectors of each row at a time."""
        width = like.shape[-1] if like.dim() > 1 else 1
        signs = torch.ones(like.numel() // max(1, width), device=like.device)
        for c in range(width):
            factor = torch.zeros_like(like)
            factor.view(-1, width)[:, c] = 1
            yield factor, signs


class CrossEntropyMiddle:
    """weight (diag(p) - p p^T) = weight sum_c p_c (e_c - p)(e_c - p)^T per row."""

    def __init__(self, found: _graph.CrossEntropy) -> None:
        self.log_probs, self.weight = found
        self._product = _of_cross_entropy(found)

    def __call__(self, u: Tensor) -> Tensor:
        """Compute M u."""
        return self._product(u)

    def factors(self, like: Tensor) -> Iterator[Factor]:
        """One per class."""
        p = self.log_probs.exp()
        weight = torch.as_tensor(self.weight, dtype=p.dtype, device=p.device).expand(len(p), 1)
        for c in range(p.shape[1]):
            factor = -p * (weight.abs() * p[:, c : c + 1]).sqrt()
            factor[:, c] += (weight.abs() * p[:, c : c + 1]).sqrt()[:, 0]
            yield factor.reshape(like.shape), weight[:, 0].sign()


class FoundMiddle:
    """Of any loss: whether M has blocks, one per row of the outputs, is found by products and checked by another.

    Args:
        gradient: of the loss with respect to `at`, with its graph; None for zero. at: the outputs, or their edge.
    """

    def __init__(self, gradient: Tensor | None, at: Any) -> None:
        # A loss that is linear in the outputs has a gradient without a graph.
        self._gradient, self._at = None if gradient is None or not gradient.requires_grad else gradient, at

    def __call__(self, u: Tensor) -> Tensor:
        """Compute M u."""
        return self._product(u, batched=False)

    def several(self, u: Tensor) -> Tensor:
        """Compute M u for each of (k, ...)."""
        return self._product(u, batched=True)

    def _product(self, u: Tensor, *, batched: bool) -> Tensor:
        gradient = self._gradient
        if gradient is None:
            return torch.zeros_like(u)
        along = u.reshape(len(u), *gradient.shape) if batched else u.reshape(gradient.shape)
        (found,) = torch.autograd.grad(
            gradient, [self._at], along, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return torch.zeros_like(u) if found is None else found.reshape(u.shape)

    def factors(self, like: Tensor) -> Iterator[Factor] | None:
        """Return the eigenvectors of each block, times the roots of the magnitudes of their eigenvalues."""
        width = like.shape[-1] if like.dim() > 1 else 1
        if like.numel() == 0 or width > _LARGEST or like.numel() * width > _ENTRIES:
            return None
        rows = like.numel() // width
        blocks = torch.empty(rows, width, width, dtype=like.dtype, device=like.device)
        for c in range(width):
            unit = torch.zeros(rows, width, dtype=like.dtype, device=like.device)
            unit[:, c] = 1
            blocks[:, :, c] = self(unit.reshape(like.shape)).reshape(rows, width)
        generator = torch.Generator(like.device).manual_seed(0)
        u = torch.randn(rows, width, 1, dtype=like.dtype, device=like.device, generator=generator)
        want, got = self(u.reshape(like.shape)).reshape(rows, width, 1), blocks @ u
        rounding = 64 * torch.finfo(like.dtype).eps * torch.linalg.vector_norm(want.double())
        if not bool(torch.linalg.vector_norm((got - want).double()) <= rounding):  # so also for NaN
            return None
        wide = torch.promote_types(like.dtype, torch.float32)
        values, vectors = torch.linalg.eigh((blocks + blocks.mT).to(wide) / 2)
        scaled = (vectors * values.abs().sqrt().unsqueeze(1)).to(like.dtype)
        return ((scaled[:, :, f].reshape(like.shape), values[:, f].sign()) for f in range(width))


class OuterMiddle:
    """sum_f s_f s_f^T per block.

    Args:
        factors: (F, ...), each like the outputs. blocks: how many each of them has.
        product: M u.
    """

    def __init__(self, factors: Callable[[], Iterator[Tensor]], blocks: int, product: LossProduct) -> None:
        self._factors, self._blocks, self._product = factors, blocks, product

    def __call__(self, u: Tensor) -> Tensor:
        """Compute M u."""
        return self._product(u)

    def factors(self, like: Tensor) -> Iterator[Factor]:
        """As given, all positive."""
        ones = torch.ones(self._blocks, device=like.device)
        return ((factor, ones) for factor in self._factors())


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


def gradients(
    terms: Sequence[_graph.Term], inputs: Sequence[Any], like: Tensor, *, create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of a sum of scalar terms, None where there is none. The graph below the terms is kept.

    Args:
        inputs: tensors or gradient edges. like: a scalar of the dtype and device of the terms.
    """
    factors = [like.new_full((), term.factor) for term in terms]
    edges = [term.edge for term in terms]
    return list(_graph.pull(edges, inputs, factors, create_graph=create_graph))


def curvature(terms: Sequence[_graph.Term], node: _graph.Node, at: Any, like: Tensor) -> tuple[Tensor | None, Middle]:
    """Find the gradient of a sum of terms with respect to a value that they depend on, and the Hessian's products.

    Args:
        node: what made the value, views aside. at: the value, or its gradient edge. like: as for `gradients`.
    """
    found = _graph.read_cross_entropy(terms[0].node, node, terms[0].factor) if len(terms) == 1 else None
    if found is not None:
        return gradients(terms, [at], like)[0], CrossEntropyMiddle(found)
    (gradient,) = gradients(terms, [at], like, create_graph=True)
    return None if gradient is None else gradient.detach(), FoundMiddle(gradient, at)
