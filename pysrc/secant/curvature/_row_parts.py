"""Parts of residuals that have rows along one dimension of one value, and what writes these rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from secant.curvature import _graph, _row_layouts
from secant.curvature._graph import VIEWS, Edge, Node, Slots, name_of
from secant.curvature._parameters import Parameters
from secant.curvature._row_layouts import Trace, shape_of
from secant.curvature._row_uses import Layout, NotUnderstood, Own, Product, Shape, Use

#: Values made of parameters alone, up to as many numbers, through which single vectors are pulled one after the other.
_SINGLE = 4
#: Columns from which an outer product is as fast by broadcasting; numbers of one up to which a copy of it costs little.
_WIDE, _SMALL = 16, 2**11


class _Target:
    """What uses add to: a parameter, or a value made of parameters alone.

    Args:
        first, length: its place in a row.
    """

    def __init__(self, first: int, length: int) -> None:
        self.first, self.length = first, length
        self.products: list[tuple[Product, bool]] = []
        self.others: list[tuple[Use, Shape, bool]] = []

    def add(self, use: Use, inner: Shape, turned: bool, count: int) -> None:
        """Enter a use.

        Args:
            inner: the shape in which the target is used. turned: whether it is used as a transpose. count: all rows.
        """
        if isinstance(use, Product) and use.layout.row == 0 and use.layout.rows == count:
            self.products.append((use, turned))
        else:
            self.others.append((use, inner, turned))

    def write(
        self, gradients: dict[Edge, Tensor | None], low: int, high: int, out: Tensor, size: Callable[[Tensor], Tensor]
    ) -> None:
        """Write rows low to high.

        Args:
            gradients: at the results of all uses. out: (high - low, ...). size: see `Use.rows`.
        """
        out, rows = out[:, self.first : self.first + self.length], high - low
        firsts, seconds = list[Tensor](), list[Tensor]()
        for use, turned in self.products:
            gradient = gradients[use.at]
            if gradient is not None:
                a, b = use.factors(gradient, low, high, size)
                firsts.append(b if turned else a)
                seconds.append(a if turned else b)
        written = bool(firsts)
        if written:
            first, second = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (firsts, seconds))
            _sum_of_outer(first, second, out)
        for other, inner, turned in self.others:
            gradient, layout = gradients[other.at], other.layout
            start, end = max(low, layout.row), min(high, layout.row + layout.rows)
            if gradient is None or start >= end:
                continue
            found = other.rows(gradient, start, end, size)
            if turned:
                found = found.reshape(end - start, *inner).mT
            if written:
                out[start - low : end - low].add_(found.reshape(end - start, -1))
            elif end - start == rows:
                out.copy_(found.reshape(rows, -1))
            else:
                out.zero_()
                out[start - low : end - low].copy_(found.reshape(end - start, -1))
            written = True
        if not written:
            out.zero_()


def _sum_of_outer(first: Tensor, second: Tensor, out: Tensor) -> None:
    """Write sum_u first_iu outer second_iu, i by i: (rows, u, a), (rows, u, b), out (rows, a b)."""
    first, second = first.to(out.dtype), second.to(out.dtype)
    rows, uses, a = first.shape
    b = second.shape[2]
    if uses == 1 and b >= _WIDE:
        torch.mul(first.mT, second, out=out.view(rows, a, b))
    elif a * b <= _SMALL:  # into rows that are apart torch multiplies one by one
        out.copy_(torch.bmm(first.mT, second).view(rows, a * b))
    else:
        torch.bmm(first.mT, second, out=out.view(rows, a, b))


def resolve(edge: Edge, slots: Slots) -> tuple[int, bool] | None:
    """Follow transposes, then views, of a parameter: its place, and whether it is turned. None: something else."""
    turned = viewed = False
    while edge not in slots:
        node, shape = edge[0], shape_of(edge)
        name = name_of(node)
        if name in VIEWS:
            viewed = True
        elif viewed or len(shape) != 2:
            return None
        elif name == "TBackward0" or (name == "PermuteBackward0" and tuple(node._saved_dims) == (1, 0)):
            turned = not turned
        elif name == "TransposeBackward0":
            turned ^= (int(node._saved_dim0) ^ int(node._saved_dim1)) & 1 == 1
        else:
            return None
        edge = node.next_functions[0]
    return slots[edge], turned


# Parts ----------------------------------------------------------------------------------------------------------------


class Part:
    """Residuals with rows along one dimension of one value.

    Attributes:
        count: rows of a pass. starts, step: where row 0 of each pass is among the residuals, and row 1 behind it.
        edges: where gradients are needed. computed: values made of parameters alone. used: places of the parameters
            that these are made of, or that are used themselves.
    """

    def __init__(self, top: Edge, places: Tensor, dim: int, reach: set[Node], slots: Slots, params: Parameters) -> None:
        shape = shape_of(top)
        self.dim, self.count, self.step = dim, shape[dim], places.stride(dim)
        others = [range(n) for d, n in enumerate(shape) if d != dim]
        strides = [s for d, s in enumerate(places.stride()) if d != dim]
        origin = int(places.storage_offset())
        self.starts = [
            origin + sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*others)
        ]
        self.trace = trace = Trace(top, Layout(dim, 0, self.count, 1, 0), reach, slots)
        self.edges = list({use.at: None for use, _ in trace.uses})
        self.computed: list[Edge] = []
        self.below = set[Node]()  # these, and what they are made of
        self.length = 0  # of all of these
        targets: dict[Any, _Target] = {}
        offsets = list(itertools.accumulate(params.sizes, initial=0))
        touched: set[int] = set()
        for use, edge in trace.uses:
            found = resolve(edge, slots)
            if found is None:
                if edge not in targets:
                    touched |= self._slots_below(edge, reach, slots)
                    targets[edge] = _Target(self.length, math.prod(shape_of(edge)))
                    self.length += targets[edge].length
                    self.computed.append(edge)
                targets[edge].add(use, shape_of(edge), False, self.count)
            else:
                slot, turned = found
                if not isinstance(use, Own):
                    touched.add(slot)
                target = targets.setdefault(slot, _Target(offsets[slot], params.sizes[slot]))
                target.add(use, shape_of(edge), turned, self.count)
        if touched & trace.own:
            raise NotUnderstood("a parameter is used row by row, and by all rows too")
        self.used = touched | trace.own
        self.direct = [target for key, target in targets.items() if isinstance(key, int)]
        self.indirect = [targets[edge] for edge in self.computed]
        self.untouched = [
            (offsets[i], size) for i, size in enumerate(params.sizes) if i not in targets
        ]  # of the direct ones
        self.cost = len(self.starts) + min(self.length, self.count)  # backward passes
        self._pulled: Tensor | None = None

    def _slots_below(self, edge: Edge, reach: set[Node], slots: Slots) -> set[int]:
        """Return the places of the parameters below a value made of parameters alone.

        Raises:
            NotUnderstood: it is made of what has rows.
        """
        found, waiting = set[int](), [edge]
        while waiting:
            here = waiting.pop()
            if here in slots:
                found.add(slots[here])
            elif here[0] in reach and here[0] not in self.below:
                self.below.add(here[0])
                if here[0] in self.trace.nodes:
                    raise NotUnderstood(f"rows depend on each other: all of them use one {name_of(edge[0])} of theirs")
                waiting += _graph.below(here[0])
        return found

    def signature(self) -> tuple[Any, ...]:
        """Return what is the same where the same computation was done with values of the same shapes."""
        uses = tuple((use.signature(), shape_of(edge)) for use, edge in self.trace.uses)
        return self.count, self.step, len(self.starts), self.starts[0], tuple(self.trace.names), uses

    def write(
        self,
        gradients: dict[Edge, Tensor | None],
        params: Parameters,
        low: int,
        high: int,
        out: Tensor,
        *,
        size: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """Write rows low to high into out (high - low, n)."""
        for first, length in self.untouched:
            out[:, first : first + length].zero_()
        for target in self.direct:
            target.write(gradients, low, high, out, size)
        if self.indirect:
            rows = torch.empty(high - low, self.length, dtype=out.dtype, device=out.device)
            for target in self.indirect:
                target.write(gradients, low, high, rows, size)
            self._pull(rows, params, out, size)

    def _pull(self, rows: Tensor, params: Parameters, out: Tensor, size: Callable[[Tensor], Tensor]) -> None:
        """Add to rows of the parameters what those of values made of them add: J_p += J_q dq/dp."""
        if self._pulled is None and self.length <= self.count:
            unit = torch.eye(self.length, dtype=out.dtype, device=out.device)
            self._pulled = torch.zeros(self.length, params.n, dtype=out.dtype, device=out.device)
            self._add_products(unit, params, self._pulled)
        if self._pulled is not None:
            out.addmm_(rows, size(self._pulled))
        else:
            self._add_products(rows, params, out)

    def _add_products(self, rows: Tensor, params: Parameters, out: Tensor) -> None:
        lengths, outputs = [t.length for t in self.indirect], [GradientEdge(*edge) for edge in self.computed]
        cotangents = [
            x.reshape(len(rows), *shape_of(edge)).to(edge[0]._input_metadata[edge[1]].dtype)
            for x, edge in zip(rows.split(lengths, 1), self.computed, strict=True)
        ]
        places = out.split(params.sizes, 1)

        def grad(chosen: Sequence[Tensor], *, batched: bool) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                outputs, params.tensors, chosen, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        if len(rows) > _SINGLE:
            for place, x in zip(places, grad(cotangents, batched=True), strict=True):
                if x is not None:
                    place.add_(x.reshape(len(rows), -1))
            return
        for i in range(len(rows)):
            for place, x in zip(places, grad([c[i] for c in cotangents], batched=False), strict=True):
                if x is not None:
                    place[i].add_(x.reshape(-1))


#: Leave every number in its place where they have one argument with a gradient of their own shape.
_PLAIN = {
    "AddBackward0", "SubBackward0", "RsubBackward1", "MulBackward0", "DivBackward0", "NegBackward0", "CloneBackward0",
    "ToCopyBackward0",
}  # fmt: skip


def take_apart(edge: Edge, places: Tensor, reach: set[Node], slots: Slots) -> Iterator[list[tuple[Edge, Tensor]]]:
    """Yield the values that residuals are made of, below views, constants and concatenations, with their places.

    Each is a list: the same numbers in other shapes, the lowest in the graph first.

    Args:
        places: a tensor without memory whose strides say where among the residuals each number is.
    """
    shapes = [(edge, places)]
    while edge not in slots:
        node, shape = edge[0], shape_of(edge)
        live = [kid for kid in node.next_functions if kid[0] in reach or kid in slots]
        if not live:
            return
        name, inner = name_of(node), shape_of(live[0])
        if name == "CatBackward0":
            dim, start = _row_layouts.signed(node._saved_dim) % len(shape), 0
            known = [None if kid[0] is None else shape_of(kid) for kid in node.next_functions]
            lengths = _row_layouts.lengths(node, dim, shape[dim], known)
            for kid, length in zip(node.next_functions, lengths, strict=True):
                if kid in live and length:
                    yield from take_apart(kid, places.narrow(dim, start, length), reach, slots)
                start += length
            return
        if len(live) > 1:
            break
        if name in VIEWS:
            try:
                places = places.view(inner)
            except RuntimeError:  # not in one order any more
                break
        elif name == "TBackward0":
            places = places.t()
        elif name == "TransposeBackward0":
            places = places.transpose(*(_row_layouts.signed(d) for d in (node._saved_dim0, node._saved_dim1)))
        elif name == "PermuteBackward0":
            dims = [_row_layouts.signed(d) % len(shape) for d in node._saved_dims]
            places = places.permute([dims.index(d) for d in range(len(dims))])
        elif name not in _PLAIN or inner != shape:
            break
        edge = live[0]
        if len(inner) == len(shape):  # the same dimensions, or turned
            shapes.pop(0)
        shapes.insert(0, (edge, places))
    yield shapes
