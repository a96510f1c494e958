"""Diagonal blocks of a curvature matrix: Kronecker products of two factors, small dense matrices, diagonals.

The block of a layer acts on W, (groups, O, I) with the bias as a last column, by V -> S V A: A (groups, I, I) of its
inputs, or (groups, I) where it is diagonal, S (groups, O, O) of the gradients of its outputs.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secant.ops import blocks

#: The least damping, in units of rounding, relative to the mean eigenvalue of a block.
_LEAST = 10.0


class Place(NamedTuple):
    """Where a block is among the parameters.

    weight, bias: slots, or None. shape: (groups, O, I) of the weight, I = 0 without one. flipped: whether the weight is
    stored as (I, O).
    """

    weight: int | None
    bias: int | None
    shape: tuple[int, int, int]
    flipped: bool = False

    @property
    def slots(self) -> tuple[int, ...]:
        """Return the slots, the weight's first."""
        return tuple(i for i in (self.weight, self.bias) if i is not None)

    def read(self, parts: Sequence[Tensor]) -> Tensor:
        """Return (k, groups, O, I), the bias as a last column.

        Args:
            parts: in the shapes of the parameters behind a first dimension of k.
        """
        columns = []
        if self.weight is not None:
            part = parts[self.weight]
            if self.flipped:
                part = part.reshape(len(part), self.shape[2], self.shape[1]).mT
            columns.append(part.reshape(len(part), *self.shape))
        if self.bias is not None:
            columns.append(parts[self.bias].reshape(-1, *self.shape[:2], 1))
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def parts(self, found: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Take (1, groups, O, I), the bias as a last column, apart into the shapes of the weight and of the bias."""
        parts, count = [], self.shape[2]
        if self.weight is not None:
            weight = found[0, ..., :count]
            parts.append((weight.mT if self.flipped else weight).reshape(like[0].shape))
        if self.bias is not None:
            parts.append(found[..., -1].reshape(like[-1].shape))
        return parts

    def write(self, found: Tensor, parts: Sequence[Tensor]) -> None:
        """Write what `read` would return into tensors in the shapes of the parameters."""
        if self.weight is not None:
            part, groups, found_weight = parts[self.weight], self.shape[0], found[..., : self.shape[2]]
            if self.flipped:
                part.view(len(part), groups, self.shape[2], self.shape[1]).copy_(found_weight.mT)
            else:
                part.view(len(part), *self.shape).copy_(found_weight)
        if self.bias is not None:
            parts[self.bias].copy_(found[..., -1].reshape(parts[self.bias].shape))


class Block(abc.ABC):
    """A symmetric matrix over x (k, groups, O, I)."""

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Multiply each of k."""

    @abc.abstractmethod
    def diag(self) -> Tensor:
        """Return the diagonal, (groups, O, I)."""

    @abc.abstractmethod
    def inverse(self, damping: float | Tensor) -> Block:
        """Invert the block plus damping I exactly, by its eigenvectors where it has two factors."""

    def trace(self) -> Tensor:
        """Return the trace in float64, a scalar."""
        return self.diag().sum(dtype=torch.float64)


class Diagonal(Block):
    """diag(values), (groups, O, I)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def apply(self, x: Tensor) -> Tensor:
        """Multiply number by number."""
        return x * self.values

    def diag(self) -> Tensor:
        """Return the values."""
        return self.values

    def inverse(self, damping: float | Tensor) -> Block:
        """Return 1 / (values + damping), and 1 where that is zero: no curvature, no damping."""
        shifted = self.values + damping
        return Diagonal(torch.where(shifted == 0.0, 1.0, 1.0 / shifted))


class Dense(Block):
    """A matrix (n, n) over (1, n, 1), n <= 64."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def apply(self, x: Tensor) -> Tensor:
        """Multiply the matrix."""
        return self.matrix @ x

    def diag(self) -> Tensor:
        """Return the diagonal."""
        return self.matrix.diagonal().reshape(1, -1, 1)

    def inverse(self, damping: float | Tensor) -> Block:
        """Invert by Cholesky; the damping is no less than what rounding needs."""
        return Dense(invert([self.matrix.unsqueeze(0)], [_least(self.matrix.unsqueeze(0), damping)])[0][0])


class Kronecker(Block):
    """V -> S V A.

    Args:
        inputs: A. outputs: S.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs, self.outputs = inputs, outputs

    def apply(self, x: Tensor) -> Tensor:
        """Multiply from both sides."""
        if x.shape[:2] == (1, 1) and self.inputs.dim() == 3:  # broadcasting takes longer than small products
            return (self.outputs[0] @ x[0, 0] @ self.inputs[0])[None, None]
        a, found = self.inputs, self.outputs @ x
        return found * a.unsqueeze(-2) if a.dim() == 2 else found @ a

    def diag(self) -> Tensor:
        """Return the products of both diagonals."""
        a = self.inputs if self.inputs.dim() == 2 else self.inputs.diagonal(0, 1, 2)
        return self.outputs.diagonal(0, 1, 2).unsqueeze(-1) * a.unsqueeze(-2)

    def inverse(self, damping: float | Tensor) -> Block:
        """Return (S (x) A + damping I)^-1."""
        (la, qa), (ls, qs) = eigenbasis(self.inputs), eigenbasis(self.outputs)
        assert qs is not None
        values = ls.clamp_min(0.0).unsqueeze(-1) * la.clamp_min(0.0).unsqueeze(-2)
        return Rotated(qa, qs, values).inverse(damping)


class Rotated(Block):
    """V -> Q_S (values * (Q_S^T V Q_A)) Q_A^T.

    Args:
        inputs: Q_A (groups, I, I), None for I. outputs: Q_S (groups, O, O). values: (groups, O, I), >= 0.
    """

    def __init__(self, inputs: Tensor | None, outputs: Tensor, values: Tensor) -> None:
        self.inputs, self.outputs, self.values = inputs, outputs, values

    def apply(self, x: Tensor) -> Tensor:
        """Rotate, scale, rotate back."""
        qa, qs = self.inputs, self.outputs
        x = qs.mT @ x
        if qa is None:
            return qs @ (x * self.values)
        return qs @ ((x @ qa) * self.values) @ qa.mT

    def diag(self) -> Tensor:
        """Return the diagonal."""
        found = self.outputs.square() @ self.values
        return found if self.inputs is None else found @ self.inputs.square().mT

    def inverse(self, damping: float | Tensor) -> Block:
        """Return the same with 1 / (values + damping), a damping no less than what rounding needs."""
        least = _LEAST * torch.finfo(self.values.dtype).eps * self.values.mean((1, 2), keepdim=True)
        least = torch.maximum(least, damping.to(least)) if isinstance(damping, Tensor) else least.clamp_min(damping)
        shifted = self.values + least
        return Rotated(self.inputs, self.outputs, torch.where(shifted == 0.0, 1.0, 1.0 / shifted))


def eigenbasis(a: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return eigenvalues (groups, n) and eigenvectors (groups, n, n); None for those of a diagonal (groups, n)."""
    if a.dim() == 2:
        return a, None
    values, vectors = torch.linalg.eigh(a)
    return values, vectors


def _least(a: Tensor, damping: float | Tensor) -> Tensor:
    """Return the damping of matrices (groups, n, n), or diagonals, as (groups,), no less than what rounding needs."""
    tiny = torch.finfo(a.dtype).tiny ** 0.5
    least = (_LEAST * torch.finfo(a.dtype).eps * _trace(a)).clamp_min(tiny)
    return torch.maximum(least, damping.to(least)) if isinstance(damping, Tensor) else least.clamp_min(damping)


def _trace(a: Tensor) -> Tensor:
    """Return the traces, (groups,)."""
    return a.sum(1) if a.dim() == 2 else a.diagonal(0, 1, 2).sum(1)


def shares(
    products: Sequence[Kronecker], damping: float | Tensor, *, relative: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Divide a damping lambda among the factors of each Kronecker product, (groups,) of A and of S.

        pi sqrt(lambda) of A and sqrt(lambda) / pi of S,    pi^2 = the ratio of the mean eigenvalues of A and S

    The lambda of a block is no less than what rounding needs.

    Args:
        relative: whether lambda is relative to the product of both mean eigenvalues.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML (2015),
        section 6.3 of arXiv 1503.05671.
    """
    mean_a = torch.cat([_trace(p.inputs) / p.inputs.shape[-1] for p in products])
    mean_s = torch.cat([_trace(p.outputs) / p.outputs.shape[-1] for p in products])
    tiny = torch.finfo(mean_a.dtype).tiny ** 0.5
    mean_a, mean_s = mean_a.clamp_min_(tiny), mean_s.clamp_min_(tiny)
    least = mean_a * mean_s * (_LEAST * torch.finfo(mean_a.dtype).eps)
    if relative:
        damping = mean_a * mean_s * damping
    share = torch.maximum(least, damping.to(least)) if isinstance(damping, Tensor) else least.clamp_min_(damping)
    share, pi = share.sqrt_(), (mean_a / mean_s).sqrt_()
    groups = [len(p.outputs) for p in products]
    return list((share * pi).split(groups)), list((share / pi).split(groups))


def invert(matrices: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[Tensor]:
    """Return (a + shift I)^-1 of each, all of one size at once; NaN for one that is not positive definite.

    Args:
        matrices: (groups, n, n), or diagonals (groups, n). shifts: (groups,) of each.
    """
    found: list[Tensor] = [torch.empty(0)] * len(matrices)
    alike: dict[tuple[int, int], list[int]] = {}
    for i, a in enumerate(matrices):
        alike.setdefault((a.dim(), a.shape[-1]), []).append(i)
    for (dim, n), places in alike.items():
        a = torch.cat([matrices[i] for i in places]) if len(places) > 1 else matrices[places[0]]
        shift = torch.cat([shifts[i] for i in places]) if len(places) > 1 else shifts[places[0]]
        if dim == 2:
            inverse = 1.0 / (a + shift.unsqueeze(1))
        elif n <= blocks.MAX_N:
            inverse, _ = blocks.block_inv(a, damping=shift)
        else:
            shifted = a.clone()
            shifted.diagonal(0, 1, 2).add_(shift.unsqueeze(1))
            factor, info = torch.linalg.cholesky_ex(shifted)
            inverse = torch.cholesky_inverse(factor)
            inverse = inverse.masked_fill_((info != 0)[:, None, None], torch.nan)
        for i, part in zip(places, inverse.split([len(matrices[i]) for i in places]), strict=True):
            found[i] = part
    return found


def factored_inverses(
    products: Sequence[Kronecker], damping: float | Tensor, *, relative: bool = False
) -> list[Kronecker]:
    """Return ((A + pi sqrt(lambda) I)^-1, (S + sqrt(lambda) / pi I)^-1) of each; see `shares`."""
    matrices = [p.inputs for p in products] + [p.outputs for p in products]
    if not products:
        return []
    of_inputs, of_outputs = shares(products, damping, relative=relative)
    found = invert(matrices, of_inputs + of_outputs)
    return [Kronecker(a, s) for a, s in zip(found[: len(products)], found[len(products) :], strict=True)]
