"""Rows of a Jacobian of residuals, all by one backward pass of their sum.

    J_i = sum over uses u of a parameter of (row i of G_u) times (row i of what the parameter was multiplied by)

where G_u is the gradient of the sum of all residuals at the result of use u (`_row_uses`). It holds where residual i
depends on row i of every value alone (`_row_layouts`), and whether that is so is decided by a random vector w: J^T w of
these rows has to be the product w.J of automatic differentiation, which no other J gives but with probability zero.

The gradient of the parameters themselves is never computed, and of all uses of one matrix the outer products are summed
in one batched product. K numbers per sample take K passes. Several residual tensors, and the parts of a concatenation,
have rows of their own; such that share nothing but parameters take one pass together.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from secant.curvature import _graph, _row_layouts
from secant.curvature._graph import VIEWS, Edge, Node, Slots, name_of
from secant.curvature._parameters import Parameters
from secant.curvature._row_layouts import Trace, shape_of
from secant.curvature._row_uses import Layout, NotUnderstood, Own, Product, Shape, Use

#: Numbers of a residual tensor that is not understood for which a backward pass each is as good.
_FEW = 8
#: Values made of parameters alone, up to as many numbers, through which single vectors are pulled one after the other.
_SINGLE = 4
_CHECKED_BYTES = 2**26
#: Columns from which an outer product is as fast by broadcasting; numbers of one up to which a copy of it costs little.
_WIDE, _SMALL = 16, 2**11
#: Roundings of a number on its way through the backward pass, for the bound of the check.
_ROUNDINGS = 128

NOT_FINITE = "the rows are not finite at this point, so that they cannot be checked"

Write = Callable[[Tensor], None]


class Source(Protocol):
    """Rows of one batch.

    m: how many. full: whether blocks hold all of them; the others are zero.
    """

    m: int
    full: bool

    def blocks(self, most: int) -> Iterator[tuple[slice, Write]]:
        """Yield where at most so many rows are, and what writes them into a tensor (rows, n)."""


def symmetric_product(x: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """Write X^T X, or add it to what is there; X (m, n), out (n, n)."""
    if accumulate:
        out.addmm_(x.T, x)
    else:
        torch.mm(x.T, x, out=out)


# Targets --------------------------------------------------------------------------------------------------------------


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
        if isinstance(use, Product) and use.layout.row == 0 and use.layout.count == count:
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
            start, end = max(low, layout.row), min(high, layout.row + layout.count)
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


def _resolve(edge: Edge, slots: Slots) -> tuple[int, bool] | None:
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


class _Part:
    """Residuals with rows along one dimension of one value.

    Attributes:
        count: rows of a pass. starts, step: where row 0 of each pass is among the residuals, and row 1 behind it.
        edges: where gradients are needed. computed: values made of parameters alone.
    """

    def __init__(self, top: Edge, places: Tensor, dim: int, reach: set[Node], slots: Slots, params: Parameters) -> None:
        shape = shape_of(top)
        self.dim, self.count, self.step = dim, shape[dim], places.stride(dim)
        others = [range(n) for d, n in enumerate(shape) if d != dim]
        strides = [s for d, s in enumerate(places.stride()) if d != dim]
        origin = places.storage_offset()
        self.starts = [
            origin + sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*others)
        ]
        self.trace = trace = Trace(top, Layout(dim, 0, self.count, 1, 0), reach, slots)
        self.edges = list({use.at: None for use, _ in trace.uses})
        self.computed: list[Edge] = []
        self.length = 0  # of all of these
        targets: dict[Any, _Target] = {}
        offsets = list(itertools.accumulate(params.sizes, initial=0))
        touched: set[int] = set()
        for use, edge in trace.uses:
            found = _resolve(edge, slots)
            if found is None:
                if edge not in targets:
                    touched |= self._below(edge, reach, slots)
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
        self.direct = [target for key, target in targets.items() if isinstance(key, int)]
        self.indirect = [targets[edge] for edge in self.computed]
        self.untouched = [
            (offsets[i], size) for i, size in enumerate(params.sizes) if i not in targets
        ]  # of the direct ones
        self.cost = len(self.starts) + min(self.length, self.count)  # backward passes
        self._pulled: Tensor | None = None

    def _below(self, edge: Edge, reach: set[Node], slots: Slots) -> set[int]:
        """Return the places of the parameters below a value made of parameters alone.

        Raises:
            NotUnderstood: it is made of what has rows.
        """
        found, seen, waiting = set[int](), set[Node](), [edge]
        while waiting:
            here = waiting.pop()
            if here in slots:
                found.add(slots[here])
            elif here[0] in reach and here[0] not in seen:
                seen.add(here[0])
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


def _take_apart(
    edge: Edge, places: Tensor, reach: set[Node], slots: Slots
) -> Iterator[list[tuple[Edge, Tensor]]]:
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
                    yield from _take_apart(kid, places.narrow(dim, start, length), reach, slots)
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


class _Pass(NamedTuple):
    """Parts that one backward pass serves, each with one of its starts, and the nodes that have rows in them.

    alone: whether no other part may join.
    """

    parts: list[tuple[_Part, int]]
    nodes: set[Node]
    alone: bool


class Rows:
    """The rows of residuals at one point, on their graph.

    Args:
        residuals: tensors, with or without a graph. params, slots: of the operator.

    Attributes:
        m: how many rows there are. full: whether all of them are in blocks; the others are zero.

    Raises:
        NotUnderstood: rows depend on each other, or a parameter is used in a way that is not known.
    """

    def __init__(self, residuals: Sequence[Tensor], params: Parameters, slots: Slots) -> None:
        self.params, self.slots = params, slots
        self.residuals = [r for r in residuals if r.requires_grad]
        starts = list(itertools.accumulate((r.numel() for r in residuals), initial=0))
        self.m = starts[-1]
        self.ranges = [(start, r.numel()) for start, r in zip(starts, residuals, strict=False) if r.requires_grad]
        edges = [_graph.edge_of(r) for r in self.residuals]
        reach = _row_layouts.reaching(edges, slots)
        self.parts: list[_Part] = []
        self.singles: list[int] = []
        for edge, residual, (start, length) in zip(edges, self.residuals, self.ranges, strict=True):
            if edge[0] not in reach and edge not in slots:
                continue
            places = torch.empty(start + length, device="meta")[start:].view(residual.shape)
            for shapes in _take_apart(edge, places, reach, slots):
                self._read(shapes, reach)
        self.full = sum(len(p.starts) * p.count for p in self.parts) + len(self.singles) == self.m
        self.passes: list[_Pass] = []
        for part in self.parts:
            alone = bool(part.trace.own)  # the gradient of a parameter itself is that of all parts of a pass
            free = [p for p in self.passes if not alone and not p.alone and p.nodes.isdisjoint(part.trace.nodes)]
            for start in part.starts:
                if not free:
                    self.passes.append(_Pass([], set(), alone))
                chosen = free.pop(0) if free else self.passes[-1]
                chosen.parts.append((part, start))
                chosen.nodes.update(part.trace.nodes)

    def _read(self, shapes: Sequence[tuple[Edge, Tensor]], reach: set[Node]) -> None:
        """Enter residuals, which are a value in one of several shapes, by the fewest backward passes."""
        reason: NotUnderstood | None = None
        best: _Part | None = None
        for top, places in shapes:
            for dim in (d for d, n in enumerate(places.shape) if n > 1):
                if best is not None and best.cost == 1:
                    break
                try:
                    part = _Part(top, places, dim, reach, self.slots, self.params)
                except NotUnderstood as error:
                    reason = reason or error
                else:
                    best = part if best is None or part.cost < best.cost else best
        if best is not None and (best.dim == 0 or reason is None or len(best.starts) <= best.count):
            self.parts.append(best)
            return
        places = shapes[0][1]
        if places.numel() > _FEW:
            assert reason is not None
            raise reason
        for index in itertools.product(*map(range, places.shape)):
            self.singles.append(
                places.storage_offset() + sum(i * s for i, s in zip(index, places.stride(), strict=True))
            )

    def signature(self) -> tuple[Any, ...]:
        """Return what is the same at points where the same was computed, with values of the same shapes."""
        return self.m, tuple(self.singles), *(part.signature() for part in self.parts)

    def _backward(self, cotangents: Sequence[Tensor], inputs: Sequence[Any]) -> Sequence[Tensor | None]:
        """Return gradients; where every cotangent is zero, of no residual."""
        return torch.autograd.grad(self.residuals, inputs, cotangents, retain_graph=True, allow_unused=True)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Split (m,) into cotangents of the residuals."""
        return [
            flat[start : start + length].view(r.shape).to(r.dtype)
            for (start, length), r in zip(self.ranges, self.residuals, strict=True)
        ]

    def _flat(self) -> Tensor:
        return torch.zeros(self.m, dtype=self.params.dtype, device=self.params.device)

    def _gradients(self, parts: Sequence[tuple[_Part, int]]) -> dict[Edge, Tensor | None]:
        """Return the gradients of the sum of the rows of one pass, where they are needed."""
        ones = self._flat()
        for part, start in parts:
            ones[_slice(start, part.step, 0, part.count)] = 1
        edges = list({edge: None for part, _ in parts for edge in part.edges})
        found = self._backward(self._split(ones), [GradientEdge(*edge) for edge in edges])
        return dict(zip(edges, found, strict=True))

    def blocks(self, most: int) -> Iterator[tuple[slice, Write]]:
        """Yield where at most so many rows are, and what writes them into a tensor (rows, n)."""
        for rows, write in self._sized_blocks(most):
            yield rows, functools.partial(write, size=_same)

    def _sized_blocks(self, most: int) -> Iterator[tuple[slice, Callable[..., None]]]:
        for row in self.singles:
            yield slice(row, row + 1), functools.partial(self._write_single, row)
        for one in self.passes:
            gradients = self._gradients(one.parts)
            for part, start in one.parts:
                for low in range(0, part.count, most):
                    high = min(part.count, low + most)
                    write = functools.partial(part.write, gradients, self.params, low, high)
                    yield _slice(start, part.step, low, high), write

    def _write_single(self, row: int, out: Tensor, *, size: Callable[[Tensor], Tensor]) -> None:
        unit = self._flat()
        unit[row] = 1
        self.params.join(self._backward(self._split(unit), self.params.tensors), out[0])

    def check(self, w: Tensor, eps: float) -> tuple[str | None, bool]:
        """Compare J^T w with automatic differentiation.

        A sum over m rows of products of numbers that were rounded some hundred times on their way differs by no more
        than (m + 128) eps sum_i |w_i| B_i, where B_i bounds row i by the absolute values of what was added up.

        Args:
            w: (m,), random. eps: of the coarsest precision of the closure.

        Returns:
            Why the rows are wrong, or None; and whether that tells something of every parameter that is used.
        """
        params = self.params
        want = torch.empty(params.n, dtype=params.dtype, device=params.device)
        params.join(self._backward(self._split(w), params.tensors), want)
        errors, wants, bounds = _compared(self._sized_blocks, want, w, params)
        if not bool(torch.isfinite(errors).all()):
            return NOT_FINITE, False
        slots = {slot for part in self.parts for _, edge in part.trace.uses for slot in _slots_of(edge, self.slots)}
        telling = all(bool(wants[slot] > 0) for slot in slots)
        allowed = (self.m + _ROUNDINGS) * eps * bounds + _ROUNDINGS * eps * torch.linalg.vector_norm(bounds)
        if bool((errors > allowed).any()):
            share = float((errors / torch.linalg.vector_norm(wants).clamp_min(torch.finfo(torch.float64).tiny)).max())
            return f"rows depend on each other: J^T w differs from the product w.J by {share:.1e} of its norm", telling
        return None, telling


def _compared(
    blocks: Callable[[int], Iterator[tuple[slice, Callable[..., None]]]], want: Tensor, w: Tensor, params: Parameters
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norms, parameter by parameter, of J^T w less what it should be, of that, and of a bound of B^T |w|."""
    got, bound, n = torch.zeros_like(want), torch.zeros_like(want), params.n
    for rows, write in blocks(max(1, _CHECKED_BYTES // (n * want.itemsize))):
        some = w[rows]
        block = torch.empty(len(some), n, dtype=want.dtype, device=want.device)
        write(block, size=_same)
        got.addmv_(block.T, some)
        write(block, size=torch.abs)
        bound.addmv_(block.abs_().T, some.abs())
    parts = ((got.double() - want.double()), want.double(), bound.double())
    norms = [torch.stack([torch.linalg.vector_norm(x) for x in part.split(params.sizes)]) for part in parts]
    return norms[0], norms[1], norms[2]


def _same(x: Tensor) -> Tensor:
    return x


def _slots_of(edge: Edge, slots: Slots) -> list[int]:
    found = _resolve(edge, slots)
    return [] if found is None else [found[0]]


def _slice(start: int, step: int, low: int, high: int) -> slice:
    """Return rows low to high of those that begin at `start`."""
    return slice(start + low * step, start + (high - 1) * step + 1, step)
