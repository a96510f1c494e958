"""How a parameter takes part in an operation, row by row: what each use adds to the rows of a Jacobian.

Row i of a value is the part of it that residual i alone depends on. Where G is the gradient of the sum of all residuals
with respect to the result of an operation, row i of G is therefore that of residual i, and the row of J is the gradient
of the operation at row i:

    Z = A B           dr_i/dB = sum_w A_iw outer G_iw           (w: the places of row i, as the tokens of one sample)
    Z = f p, f + p    dr_i/dp = G_i f, summed over what p was broadcast along
    Z = conv(X, W)    dr_i/dW = the gradient of the convolution of X_i alone

References:
    Goodfellow, Efficient per-example gradient computations, arXiv 1510.01799 (2015). Rochette, Manoel and Tramel,
    Efficient per-example gradient computations in convolutional neural networks, arXiv 1912.06015 (2019).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant.curvature._graph import Edge, Node, name_of

Shape = tuple[int, ...]


class NotUnderstood(Exception):
    """Says in a sentence why rows cannot be read from a graph."""


class Layout(NamedTuple):
    """Where the rows of residuals are in a value: `width` places along `dim` each, from the place `first` on.

    Row `row + i` has the places first + i width, ..., first + (i + 1) width - 1, for 0 <= i < rows; where `repeats` is
    more than 1 (the tokens of a sequence before the samples, made one dimension), in each so many-th part of `dim`.
    """

    dim: int
    first: int
    rows: int
    width: int
    row: int
    repeats: int = 1

    @property
    def places(self) -> int:
        """Return how many places one row has along `dim`."""
        return self.width * self.repeats

    def take(self, x: Tensor, low: int, high: int) -> Tensor:
        """Return rows low to high of a value: (high - low, places, the other dimensions in their order)."""
        count, width, first = high - low, self.width, self.first + (low - self.row) * self.width
        if self.dim == 0 and width == 1 and count == x.shape[0]:
            return x.unsqueeze(1)
        if self.repeats > 1:
            x = x.movedim(self.dim, 0).unflatten(0, (self.repeats, -1)).narrow(1, first, count * width)
            return x.unflatten(1, (count, width)).transpose(0, 1).flatten(1, 2)
        x = x.narrow(self.dim, first, count * width)
        return (x if self.dim == 0 else x.movedim(self.dim, 0)).unflatten(0, (count, width))


class Use(abc.ABC):
    """One use of a parameter, or of a value made of parameters alone.

    Attributes:
        at: the result of the operation, whose gradient G is needed. layout: of the rows there.
    """

    at: Edge
    layout: Layout
    kind: str

    @abc.abstractmethod
    def rows(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what it adds to rows low to high, (high - low, *the shape in which the parameter is used).

        Args:
            gradient: G. size: applied to G and to what it is multiplied by: the identity, or the absolute value for a
                bound.
        """

    def signature(self) -> tuple[Any, ...]:
        """Return what tells this use from others."""
        return self.kind, self.layout


class Product(Use):
    """A factor of a matrix product.

    Args:
        other: the other factor. layout_of_other: of its rows. gradient_first: whether the parameter's first dimension
            is that of G. lifted: whether G is a vector (of a product with a vector).
    """

    kind = "product"

    def __init__(
        self, at: Edge, layout: Layout, other: Tensor, layout_of_other: Layout, *,
        gradient_first: bool = False, scale: float = 1.0, lifted: bool = False,
    ) -> None:  # fmt: skip
        self.at, self.layout, self.scale, self.lifted = at, layout, scale, lifted
        self.other, self.layout_of_other, self.gradient_first = other.detach(), layout_of_other, gradient_first

    def factors(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the rows of both factors, (rows, places, a) and (rows, places, b) for a parameter (a, b)."""
        count = high - low
        g = self.layout.take(gradient, low, high)
        g = g.unsqueeze(-1) if self.lifted else g
        x = self.layout_of_other.take(self.other, low, high)
        g, x = size(g.reshape(count, -1, g.shape[-1])), size(x.reshape(count, -1, x.shape[-1]))
        g = g if self.scale == 1 else g * self.scale
        return (g, x) if self.gradient_first else (x, g)

    def rows(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum over places of outer products."""
        first, second = self.factors(gradient, low, high, size)
        return torch.bmm(first.mT, second)


class Stacked(Use):
    """A factor (b, a, c) of a product of stacked matrices, with rows in the other factor."""

    kind = "stacked"

    def __init__(self, at: Edge, layout: Layout, other: Tensor, layout_of_other: Layout, *, left: bool) -> None:
        self.at, self.layout, self.other, self.layout_of_other, self.left = (
            at, layout, other.detach(), layout_of_other, left,
        )  # fmt: skip

    def rows(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum over places of outer products, matrix by matrix."""
        g, x = size(self.layout.take(gradient, low, high)), size(self.layout_of_other.take(self.other, low, high))
        first, second = (g, x) if self.left else (x, g)
        return torch.einsum("cwbi,cwbj->cbij", first, second)


class Broadcast(Use):
    """A summand (factor 1), or a factor, of an operation number by number.

    Args:
        shape: of the result. inner: of the parameter. factor: a number, or a tensor that broadcasts to the result.
    """

    kind = "broadcast"

    def __init__(self, at: Edge, layout: Layout, shape: Shape, inner: Shape, factor: Tensor | float) -> None:
        self.at, self.layout, self.shape, self.inner = at, layout, shape, inner
        self.factor = factor.detach() if isinstance(factor, Tensor) else factor
        padded = (1,) * (len(shape) - len(inner)) + tuple(inner)
        others = [(n, m) for d, (n, m) in enumerate(zip(shape, padded, strict=True)) if d != layout.dim]
        self.sums = ([1] if layout.places > 1 else []) + [2 + d for d, (n, m) in enumerate(others) if m == 1 != n]

    def rows(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> Tensor:
        """Return G f, summed."""
        g = size(self.layout.take(gradient, low, high))
        if isinstance(self.factor, Tensor):
            f = self.factor
            f = f if f.dim() == 0 else self.layout.take(f.expand(self.shape), low, high)
            g = g * size(f)
        elif self.factor != 1:
            g = g * (abs(self.factor) if size is torch.abs else self.factor)
        return (g.sum(self.sums) if self.sums else g).reshape(high - low, *self.inner)

    def signature(self) -> tuple[Any, ...]:
        """Return what tells this use from others."""
        return self.kind, self.layout, self.inner


class Repeated(Use):
    """A vector that is repeated along the dimension of the rows.

    Args:
        inner: its shape.
    """

    kind = "repeated"

    def __init__(self, at: Edge, layout: Layout, inner: Shape) -> None:
        if len(inner) != 1 or layout.dim != 0 or layout.width % inner[0] or layout.first % inner[0]:
            raise NotUnderstood("RepeatBackward0 of more than a vector")
        self.at, self.layout, self.inner = at, layout, inner

    def rows(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> Tensor:
        """Return G, summed over the repetitions."""
        return size(self.layout.take(gradient, low, high)).reshape(high - low, -1, *self.inner).sum(1)


class Lookup(Use):
    """A table (V, ...) whose entries are looked up along its first dimension.

    Args:
        indices: of the shape of the first dimensions of the result. without: an entry without a gradient.
    """

    kind = "lookup"

    def __init__(self, at: Edge, layout: Layout, inner: Shape, indices: Tensor, without: int | None = None) -> None:
        self.at, self.layout, self.inner, self.indices, self.without = at, layout, inner, indices, without

    def rows(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> Tensor:
        """Return G, each place added to its entry."""
        count, length = high - low, math.prod(self.inner[1:])
        g = size(self.layout.take(gradient, low, high)).reshape(count, -1, length)
        places = self.layout.take(self.indices, low, high).reshape(count, -1, 1)
        if self.without is not None:
            g = g.masked_fill(places == self.without, 0.0)
        places = torch.where(places < 0, places + self.inner[0], places)
        out = g.new_zeros(count, self.inner[0], length)
        return out.scatter_add_(1, places.expand_as(g), g).view(count, *self.inner)


class Kernel(Use):
    """The weight of a convolution, whose samples become groups of one.

    Args:
        node: of the convolution. inner: the shape of the weight.
    """

    kind = "convolution"

    def __init__(self, at: Edge, layout: Layout, inner: Shape, node: Node) -> None:
        self.at, self.layout, self.inner = at, layout, inner
        self.input, self.weight = node._saved_input.detach(), node._saved_weight.detach()
        dims = len(inner) - 2
        pads = tuple(_signed(tuple(node._saved_padding)))
        self.transposed, self.groups = bool(node._saved_transposed), int(node._saved_groups)
        self.options = (
            list(node._saved_stride)[:dims], list(pads)[:dims], list(node._saved_dilation)[:dims], self.transposed,
            list(node._saved_output_padding)[:dims],
        )  # fmt: skip

    def rows(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the gradient of the convolution of each sample alone."""
        g, x = self.layout.take(gradient, low, high), self.layout.take(self.input, low, high)
        count, width = g.shape[:2]
        samples = count * width
        g, x = (size(t).reshape(1, samples * t.shape[2], *t.shape[3:]) for t in (g, x))
        weight = self.weight.expand(samples, *self.inner).reshape(samples * self.inner[0], *self.inner[1:])
        found = torch.ops.aten.convolution_backward(
            g, x, weight, None, *self.options, self.groups * samples, [False, True, False]
        )[1]
        return found.view(count, width, *self.inner).sum(1)


class Own(Use):
    """A parameter that has rows itself: row i of it, and no other, belongs to residual i.

    Args:
        inner: its shape.
    """

    kind = "own rows"

    def __init__(self, at: Edge, layout: Layout, inner: Shape) -> None:
        if layout.repeats > 1:
            raise NotUnderstood("a parameter has rows that are not in one piece")
        self.at, self.layout, self.inner = at, layout, inner

    def rows(self, gradient: Tensor, low: int, high: int, size: Callable[[Tensor], Tensor]) -> Tensor:
        """Return G at the own places of each row, zero elsewhere."""
        layout, count = self.layout, high - low
        g = size(layout.take(gradient, low, high))
        out = g.new_zeros(count, *self.inner)
        places = out.narrow(1 + layout.dim, layout.first + (low - layout.row) * layout.width, count * layout.width)
        places = places.unflatten(1 + layout.dim, (count, layout.width))
        places.diagonal(0, 0, 1 + layout.dim).copy_(_last(g, layout.dim))
        return out


def _last(g: Tensor, dim: int) -> Tensor:
    """Move (rows, width, others) to the order of a diagonal: others with the width in its place, then rows."""
    return g.movedim(0, -1).movedim(0, dim)


def _signed(values: Sequence[int]) -> list[int]:
    """Read what autograd keeps as unsigned."""
    return [v - 2**64 if v >= 2**63 else v for v in values]


def signed(value: int) -> int:
    """Read a number that autograd keeps as unsigned."""
    return value - 2**64 if value >= 2**63 else value


# Which operation is which use -----------------------------------------------------------------------------------------

#: (node, its result, layout there, index of the argument, shapes of the result and of the argument) -> the use.
Maker = Callable[[Node, Edge, Layout, int, Shape, Shape], Use]


def _mm(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    if index == 1:
        return Product(at, layout, node._saved_self, layout)
    return Product(at, layout, node._saved_mat2, layout, gradient_first=True)


def _addmm(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    if index == 0:
        return Broadcast(at, layout, shape, inner, float(node._saved_beta))
    scale = float(node._saved_alpha)
    if index == 2:
        return Product(at, layout, node._saved_mat1, layout, scale=scale)
    return Product(at, layout, node._saved_mat2, layout, gradient_first=True, scale=scale)


def _mv(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    return Product(at, layout, node._saved_self, layout, lifted=True)


def _addmv(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    if index == 0:
        return Broadcast(at, layout, shape, inner, float(node._saved_beta))
    return Product(at, layout, node._saved_mat, layout, lifted=True, scale=float(node._saved_alpha))


def _bmm(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    other = node._saved_self if index == 1 else node._saved_mat2
    return Stacked(at, layout, other, layout, left=index == 0)


def _linear(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    if index == 2:
        return Broadcast(at, layout, shape, inner, 1.0)
    return Product(at, layout, node._saved_input, layout, gradient_first=True)


def _added(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    sign = -1.0 if name_of(node) == "SubBackward0" else 1.0
    return Broadcast(at, layout, shape, inner, 1.0 if index == 0 else sign * float(node._saved_alpha))


def _multiplied(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    return Broadcast(at, layout, shape, inner, node._saved_other if index == 0 else node._saved_self)


def _divided(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    other = node._saved_other.detach()
    factor = 1 / other if index == 0 else -node._saved_self.detach() / (other * other)
    return Broadcast(at, layout, shape, inner, factor)


def _power(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    """x^p: p x^(p - 1) dx + x^p log x dp; both zero at x = 0 <= p."""
    x, p, result = node._saved_self.detach(), node._saved_exponent.detach(), node._saved_result
    if index == 0:
        return Broadcast(at, layout, shape, inner, torch.where(p == 0, 0.0, p * x.pow(p - 1)))
    return Broadcast(at, layout, shape, inner, torch.where((x == 0) & (p >= 0), 0.0, result.detach() * x.log()))


def _leaky(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    return Broadcast(at, layout, shape, inner, node._saved_self.detach().clamp(max=0))


def _expanded(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    return Broadcast(at, layout, shape, inner, 1.0)


def _repeated(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    return Repeated(at, layout, inner)


def _chosen(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    condition = node._saved_condition
    return Broadcast(at, layout, shape, inner, (condition if index == 0 else ~condition).to(torch.float64))


def _embedding(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    if node._saved_scale_grad_by_freq:
        raise NotUnderstood("an embedding with scale_grad_by_freq")
    if layout.dim >= node._saved_indices.dim():
        raise NotUnderstood("rows are columns of an embedding")
    return Lookup(at, layout, inner, node._saved_indices, signed(node._saved_padding_idx))


def _index_select(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    if signed(node._saved_dim) % len(inner) or layout.dim:
        raise NotUnderstood("index_select of a parameter along another dimension than the first")
    return Lookup(at, layout, inner, node._saved_index)


def _indexed(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    places = node._saved_indices
    if len(places) != 1 or places[0] is None or places[0].dtype is torch.bool or layout.dim >= places[0].dim():
        raise NotUnderstood("a parameter indexed by several tensors, or a mask")
    return Lookup(at, layout, inner, places[0])


def _convolution(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    if layout.dim != 0 or index == 0:
        raise NotUnderstood("a convolution over the residuals' own dimension")
    if index == 2:
        return Broadcast(at, layout, shape, (*inner, *[1] * (len(shape) - 2)), 1.0)
    return Kernel(at, layout, inner, node)


def _layer_norm(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    if index == 2:
        return Broadcast(at, layout, shape, inner, 1.0)
    x = node._saved_input.detach()
    return Broadcast(at, layout, shape, inner, (x - node._saved_result1) * node._saved_result2)


def _rms_norm(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    return Broadcast(at, layout, shape, inner, node._saved_input.detach() * node._saved_result1)


def _group_norm(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    inner = (*inner, *[1] * (len(shape) - 2))
    if index == 2:
        return Broadcast(at, layout, shape, inner, 1.0)
    n, groups = int(node._saved_N), int(node._saved_group)
    x = node._saved_input.detach().reshape(n, groups, -1)
    mean, rstd = (t.detach().reshape(n, groups, 1) for t in (node._saved_result1, node._saved_result2))
    return Broadcast(at, layout, shape, inner, ((x - mean) * rstd).reshape(shape))


def _batch_norm(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    inner = (*inner, *[1] * (len(shape) - 2))
    if index == 2:
        return Broadcast(at, layout, shape, inner, 1.0)
    ones = [1, -1] + [1] * (len(shape) - 2)
    if node._saved_training:
        mean, scale = (t.detach().reshape(ones) for t in (node._saved_result1, node._saved_result2))
    else:
        mean, variance = (t.detach().reshape(ones) for t in (node._saved_running_mean, node._saved_running_var))
        scale = (variance + node._saved_eps).rsqrt()
    normal = (node._saved_input.detach() - mean) * scale
    return Broadcast(at, layout, shape, inner, normal)


_MAKERS: dict[str, Maker] = {
    "MmBackward0": _mm,
    "AddmmBackward0": _addmm,
    "MvBackward0": _mv,
    "AddmvBackward0": _addmv,
    "BmmBackward0": _bmm,
    "LinearBackward0": _linear,
    "AddBackward0": _added,
    "SubBackward0": _added,
    "MulBackward0": _multiplied,
    "DivBackward0": _divided,
    "PowBackward1": _power,
    "ExpandBackward0": _expanded,
    "RepeatBackward0": _repeated,
    "WhereBackward0": _chosen,
    "PreluKernelBackward0": _leaky,
    "EmbeddingBackward0": _embedding,
    "IndexSelectBackward0": _index_select,
    "IndexBackward0": _indexed,
    "ConvolutionBackward0": _convolution,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeBatchNormBackward0": _batch_norm,
}


def make(node: Node, at: Edge, layout: Layout, index: int, shape: Shape, inner: Shape) -> Use:
    """Build the use of the argument at this index, which has no rows, by a node whose result has.

    Raises:
        NotUnderstood: the operation is not known.
    """
    maker = _MAKERS.get(name_of(node))
    if maker is None:
        raise NotUnderstood(f"a use of a parameter by {name_of(node)} is not known here")
    return maker(node, at, layout, index, shape, inner)
