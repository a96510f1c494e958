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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from secant import _checks, ops
from secant.curvature import _graph, _row_layouts
from secant.curvature._graph import Edge, Node, Slots
from secant.curvature._parameters import Parameters
from secant.curvature._row_parts import Part, take_apart
from secant.curvature._row_uses import NotUnderstood

#: Numbers of a residual tensor that is not understood for which a backward pass each is as good.
_FEW = 8
_CHECKED_BYTES = 2**26
#: Roundings of a number on its way through the backward pass, for the bound of the check.
_ROUNDINGS = 128

#: Share of a row that roundings may make up in the check, beyond which it tells nothing.
_MOST = 0.05

NOT_FINITE = "the rows are not finite at this point, so that they cannot be checked"

Write = Callable[[Tensor], None]


class Source(Protocol):
    """Rows of one batch.

    m: how many. full: whether blocks hold all of them; the others are zero. least: of how many a block has room.
    """

    m: int
    full: bool
    least: int

    def blocks(self, most: int) -> Iterator[tuple[slice, Write]]:
        """Yield where at most so many rows are, and what writes them into a tensor (rows, n)."""


def symmetric_product(x: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """Write X^T X, or add it to what is there; X (m, n), out (n, n)."""
    if x.dtype in _checks.REAL:
        ops.gram(x, out=out, accumulate=accumulate)
    elif accumulate:
        out.addmm_(x.T, x)
    else:
        torch.mm(x.T, x, out=out)


class _Pass(NamedTuple):
    """Parts that one backward pass serves, each with one of its starts.

    nodes: that have rows in them. below: that all rows use. alone: whether no other part may join.
    """

    parts: list[tuple[Part, int]]
    nodes: set[Node]
    below: set[Node]
    alone: bool

    def is_apart_from(self, part: Part) -> bool:
        """Tell whether no row of one gets gradients from the other."""
        nodes = part.trace.nodes
        apart = self.nodes.isdisjoint(nodes) and self.nodes.isdisjoint(part.below) and self.below.isdisjoint(nodes)
        return apart and not self.alone


class Rows:
    """The rows of residuals at one point, on their graph.

    Args:
        residuals: tensors, with or without a graph. params, slots: of the operator.

    Attributes:
        m: how many rows there are. full: whether all of them are in blocks; the others are zero. guessed: an operation
            of which only sizes tell that it keeps rows apart, if there is one.

    Raises:
        NotUnderstood: rows depend on each other, or a parameter is used in a way that is not known.
    """

    least = 1

    def __init__(self, residuals: Sequence[Tensor], params: Parameters, slots: Slots) -> None:
        self.params, self.slots = params, slots
        self.residuals = [r for r in residuals if r.requires_grad]
        starts = list(itertools.accumulate((int(r.numel()) for r in residuals), initial=0))
        self.m = starts[-1]
        self.ranges = [(start, r.numel()) for start, r in zip(starts, residuals, strict=False) if r.requires_grad]
        edges = [_graph.edge_of(r) for r in self.residuals]
        reach = _row_layouts.reaching(edges, slots)
        self.parts: list[Part] = []
        self.singles: list[int] = []
        for edge, residual, (start, length) in zip(edges, self.residuals, self.ranges, strict=True):
            if not length or (edge[0] not in reach and edge not in slots):
                continue
            places = torch.empty(start + length, device="meta")[start:].view(residual.shape)
            for shapes in take_apart(edge, places, reach, slots):
                self._read(shapes, reach)
        self.full = sum(len(p.starts) * p.count for p in self.parts) + len(self.singles) == self.m
        self.guessed = next((part.trace.guessed for part in self.parts if part.trace.guessed), None)
        self.passes: list[_Pass] = []
        for part in self.parts:
            alone = bool(part.trace.own)  # the gradient of a parameter itself is that of all parts of a pass
            free = [] if alone else [p for p in self.passes if p.is_apart_from(part)]
            for first in part.starts:
                if not free:
                    self.passes.append(_Pass([], set(), set(), alone))
                chosen = free.pop(0) if free else self.passes[-1]
                chosen.parts.append((part, first))
                chosen.nodes.update(part.trace.nodes)
                chosen.below.update(part.below)

    def _read(self, shapes: Sequence[tuple[Edge, Tensor]], reach: set[Node]) -> None:
        """Enter residuals, which are a value in one of several shapes, by the fewest backward passes."""
        reason: NotUnderstood | None = None
        best: Part | None = None
        for top, places in shapes:
            for dim in (d for d, n in enumerate(places.shape) if n > 1):
                if best is not None and best.cost == 1:
                    break
                try:
                    part = Part(top, places, dim, reach, self.slots, self.params)
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
            steps = sum(i * s for i, s in zip(index, places.stride(), strict=True))
            self.singles.append(int(places.storage_offset()) + steps)

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

    def _gradients(self, parts: Sequence[tuple[Part, int]]) -> dict[Edge, Tensor | None]:
        """Return the gradients of the sum of the rows of one pass, where they are needed."""
        ones = self._flat()
        for part, start in parts:
            part.trace.check_versions()
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

        Row i, rounded some hundred times on its way, is off by no more than 128 eps B_i, where B_i bounds it by the
        absolute values of what was added up. Since the signs of w are random, their sum is off by some
        128 eps (sum_i w_i^2 B_i^2)^(1/2), and adding m terms in turn, whose sum grows as m^(1/2) too, rounds it by no
        more than m^(1/2) eps times the same root.

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
        telling = all(bool(wants[slot] > 0) for part in self.parts for slot in part.used)
        allowed = (self.m**0.5 + _ROUNDINGS) * eps * bounds + _ROUNDINGS * eps * torch.linalg.vector_norm(bounds)
        if bool((errors > allowed).any()):
            share = float((errors / torch.linalg.vector_norm(wants).clamp_min(torch.finfo(torch.float64).tiny)).max())
            return f"rows depend on each other: J^T w differs from the product w.J by {share:.1e} of its norm", telling
        return None, telling


def is_telling(eps: float) -> bool:
    """Tell whether a check at this precision can see anything."""
    return _ROUNDINGS * eps <= _MOST


def _compared(
    blocks: Callable[[int], Iterator[tuple[slice, Callable[..., None]]]], want: Tensor, w: Tensor, params: Parameters
) -> tuple[Tensor, Tensor, Tensor]:
    """Return norms, parameter by parameter: of J^T w less what it should be, of that, and (sum_i w_i^2 B_i^2)^(1/2)."""
    n = params.n
    got, squares = torch.zeros(2, n, dtype=torch.float64, device=want.device)
    for rows, write in blocks(max(1, _CHECKED_BYTES // (n * want.itemsize))):
        some = w[rows].double()
        block = torch.empty(len(some), n, dtype=want.dtype, device=want.device)
        write(block, size=_same)
        got.addmv_(block.double().T, some)
        write(block, size=torch.abs)
        squares.addmv_(block.double().square_().T, some.square())
    parts = (got - want.double(), want.double(), squares.sqrt_())
    norms = [torch.stack([torch.linalg.vector_norm(x) for x in part.split(params.sizes)]) for part in parts]
    return norms[0], norms[1], norms[2]


def _same(x: Tensor) -> Tensor:
    return x


def _slice(start: int, step: int, low: int, high: int) -> slice:
    """Return rows low to high of those that begin at `start`."""
    return slice(start + low * step, start + (high - 1) * step + 1, step)
