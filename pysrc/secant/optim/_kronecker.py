"""A preconditioner for Gauss-Newton systems of layers: one Kronecker product per layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secant.curvature._curvature import CurvatureOperator, mean_over_processes
from secant.curvature._layers import Layers
from secant.curvature._matrices import LayeredJacobian, Sandwich

#: The least damping, in units of rounding, relative to the mean eigenvalue of a block.
_LEAST = 10.0


def kronecker(b: CurvatureOperator, damping: float, seed: int) -> Callable[[Tensor], Tensor] | None:
    r"""Make r -> M^-1 r for a Gauss-Newton matrix B + lambda I of Linear + activation layers.

    With h the inputs of a layer (and 1, for the bias) and delta what a vector u above the outputs becomes below it,
    u of mean 0 and covariance H_L, its block of B is about

        A (x) S,    A = mean of h h^T,    S = sum of delta delta^T    over the rows of the batch,

    and its part of M is (A + pi sqrt(lambda) I) (x) (S + sqrt(lambda) / pi I), pi^2 = the ratio of the mean eigenvalues
    of A and S. One u is drawn, H_L v for random signs v, with |u|^2 = v.H_L v: for squared errors the covariance is
    H_L, for other losses only its trace is right. Parameters that no layer uses have M = lambda.

    Args:
        b: of a single batch, in use (a product has been asked for). damping: lambda >= 0; that of a block is no less
            than what rounding needs. seed: of the signs.

    Returns:
        None where the layers are not recognised.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML (2015),
        section 6.3 for pi. u in place of sampled labels is a heuristic.
    """
    (matrix,) = b._iterate()
    if not isinstance(matrix, Sandwich) or not isinstance(matrix.jacobian, LayeredJacobian):
        return None
    like = matrix.like
    bits = torch.randint(2, like.shape, generator=b.generator(seed), dtype=like.dtype, device=like.device)
    signs = bits.mul_(2.0).sub_(1.0)
    u = matrix.middle(signs)
    square = u.square().sum()
    u = u * ((signs * u).sum().abs() / torch.where(square > 0.0, square, 1.0)).sqrt()
    return _Blocks(b, matrix.jacobian.layers, u, damping).solve


class _Blocks:
    """Holds the inverse factors (A^-1, S^-1, places of weight and bias among the parameters) of each layer."""

    def __init__(self, b: CurvatureOperator, layers: Layers, u: Tensor, damping: float) -> None:
        self._params, self._untouched, self._scale = b.params, layers.untouched, 1.0 / damping if damping else 1.0
        self._factors: list[tuple[Tensor, Tensor, int | None, int | None]] = []
        delta = u
        for layer in reversed(layers.layers):
            delta = delta.reshape(layer.room.shape)
            delta = delta if layer.slope is None else delta * layer.slope
            if layer.weight_slot is not None or layer.bias_slot is not None:
                h = layer.inputs if layer.weight_slot is not None else delta.new_empty(len(delta), 0)
                if layer.bias_slot is not None:
                    h = torch.cat([h, h.new_ones(len(h), 1)], 1)
                a, s = (mean_over_processes(x, b.process_group) for x in (h.t() @ h / len(h), delta.t() @ delta))
                self._factors.append((*_inverses(a, s, damping), layer.weight_slot, layer.bias_slot))
            if layer.first:
                return
            delta = delta @ layer.weight

    def solve(self, r: Tensor) -> Tensor:
        """Return M^-1 r."""
        out = torch.empty_like(r)
        parts, results = self._params.split(r), self._params.split(out)
        for i in self._untouched:
            torch.mul(parts[i], self._scale, out=results[i])
        for a, s, weight, bias in self._factors:
            columns = [] if weight is None else [parts[weight]]
            if bias is not None:
                columns.append(parts[bias].unsqueeze(1))
            found = s @ (columns[0] if len(columns) == 1 else torch.cat(columns, 1)) @ a
            if weight is not None:
                results[weight].copy_(found[:, : parts[weight].shape[1]])
            if bias is not None:
                results[bias].copy_(found[:, -1])
        return out


def _inverses(a: Tensor, s: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Invert both factors with their shares of lambda."""
    tiny = torch.finfo(a.dtype).tiny ** 0.5
    mean_a, mean_s = (x.diagonal().mean().clamp_min(tiny) for x in (a, s))
    share = torch.clamp_min(_LEAST * torch.finfo(a.dtype).eps * mean_a * mean_s, damping).sqrt()
    pi = (mean_a / mean_s).sqrt()
    return _inverse(a, share * pi), _inverse(s, share / pi)


def _inverse(x: Tensor, shift: Tensor) -> Tensor:
    """Invert x + shift I, without asking whether its factor exists."""
    shifted = x.clone()
    shifted.diagonal().add_(shift)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)
