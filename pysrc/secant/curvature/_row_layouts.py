"""Where the rows of residuals are in every value of a graph: from the residuals down to the parameters.

A layout says along which dimension of a value the residuals have their parts. Known operations carry it to their
arguments by what they do, others by the sizes of these. Where that is a guess, as where an operation mixes rows and
changes no shape (a cumulative sum), the product of the rows with a random vector tells (`Rows.check`), at each point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from secant.curvature import _row_uses
from secant.curvature._graph import VIEWS, Edge, Node, Slots, below, name_of
from secant.curvature._row_uses import Layout, NotUnderstood, Shape, Use, signed

Read = TypeVar("Read")

#: The layout in each argument; None where an argument has no rows, or no gradient.
Layouts = Sequence[Layout | None]
Shapes = Sequence[Shape | None]


def shape_of(edge: Edge) -> Shape:
    """Return the shape of a value in the graph."""
    return tuple(edge[0]._input_metadata[edge[1]].shape)


def reaching(edges: Sequence[Edge], slots: Slots) -> set[Node]:
    """Find the nodes below these values that a parameter is below."""
    found: set[Node] = set()
    order: list[Node] = []
    seen: set[Node] = set()
    waiting = [node for node, _ in edges]
    while waiting:  # each node twice: before what is below it, and after
        node = waiting.pop()
        if node in seen:
            order.append(node)
            continue
        seen.add(node)
        waiting.append(node)
        waiting += [n for n, nr in below(node) if n not in seen and (n, nr) not in slots]
    for node in order:
        if node not in found and any(n in found or (n, nr) in slots for n, nr in below(node)):
            found.add(node)
    return found


# Rules ----------------------------------------------------------------------------------------------------------------

#: (node, which result, layout there, its shape, shapes of the arguments) -> the layout in each argument.
Rule = Callable[[Node, int, Layout, Shape, Shapes], Layouts]


def _aligned(layout: Layout, shape: Shape, inner: Shape) -> Layout | None:
    """Carry a layout to an argument that is broadcast to the result."""
    dim = layout.dim - (len(shape) - len(inner))
    return layout._replace(dim=dim) if dim >= 0 and inner[dim] == shape[layout.dim] else None


def _pointwise(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    return [None if s is None else _aligned(layout, shape, s) for s in inner]


def _by_sizes(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """Guess for an operation that is not known."""
    name, found = name_of(node), list[Layout | None]()
    for s in inner:
        if s is None:
            found.append(None)
        elif len(s) > layout.dim and s[layout.dim] == shape[layout.dim]:
            found.append(layout)
        elif len(s) < len(shape) and all(n in (1, m) for n, m in zip(s[::-1], shape[::-1], strict=False)):
            found.append(_aligned(layout, shape, s))
        else:
            raise NotUnderstood(f"where {name} takes the rows of its result from is not known here")
    return found


class _Guess(Exception):
    """Says that a rule does not know what the operation does here, so that only sizes tell."""


def _view(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    (target,) = inner
    assert target is not None
    before, after = math.prod(shape[: layout.dim]) * layout.repeats, math.prod(shape[layout.dim + 1 :])
    span, ahead = shape[layout.dim] // layout.repeats * after, 1  # numbers that have each row once
    unit, first = layout.width * after, layout.first * after
    for dim, size in enumerate(target):
        rest = math.prod(target[dim + 1 :])
        apart = before % ahead or unit % rest or first % rest or span % rest
        if size > 1 and not apart and size == before // ahead * (span // rest):
            return [layout._replace(dim=dim, first=first // rest, width=unit // rest, repeats=before // ahead)]
        ahead *= size
    raise NotUnderstood(f"{name_of(node)} takes the rows apart: {target} to {shape}")


def _turned(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    name, count = name_of(node), len(shape)
    if name == "PermuteBackward0":
        return [layout._replace(dim=signed(node._saved_dims[layout.dim]) % count)]
    if name == "TBackward0":
        a, b = 0, count - 1
    else:
        a, b = signed(node._saved_dim0) % count, signed(node._saved_dim1) % count
    return [layout._replace(dim={a: b, b: a}.get(layout.dim, layout.dim))]


def _selected(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """One place, or each place, of a dimension that the result has not."""
    dim = signed(node._saved_dim) % (len(shape) + 1)
    return [layout._replace(dim=layout.dim + (dim <= layout.dim))]


def _put(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """Write to one place of a dimension that the argument has not."""
    dim = signed(node._saved_dim) % len(shape)
    if dim == layout.dim:
        raise NotUnderstood(f"{name_of(node)} puts all of one row together")
    return [layout._replace(dim=layout.dim - (dim < layout.dim))]


def _stacked(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    return [None if s is None else _put(node, number, layout, shape, inner)[0] for s in inner]


def _shifted(layout: Layout, places: int, length: int) -> Layout:
    """Carry a layout to an argument of this length that has as many places before it; clipped to what it has."""
    if layout.repeats > 1:
        raise NotUnderstood("rows that are not in one piece are cut")
    first = layout.first + places
    ahead = -(-max(0, -first) // layout.width)  # rows that begin before it
    count = min(layout.rows - ahead, (length - first) // layout.width - ahead)
    rest = length - first
    if (first < 0 and first % layout.width) or (0 < rest < layout.rows * layout.width and rest % layout.width):
        raise NotUnderstood("rows are cut in the middle")
    return layout._replace(first=first + ahead * layout.width, rows=max(0, count), row=layout.row + ahead)


def _sliced(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    (source,) = inner
    assert source is not None
    dim = signed(node._saved_dim) % len(shape)
    if dim != layout.dim:
        return [layout]
    if node._saved_step != 1:
        raise NotUnderstood("rows are taken from every other place of a longer value")
    start = signed(node._saved_start)
    start = min(max(0, start + source[dim] if start < 0 else start), source[dim])
    return [_shifted(layout, start, source[dim])]


def _slice_put(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    (source,) = inner
    assert source is not None
    dim = signed(node._saved_dim) % len(shape)
    if dim != layout.dim:
        return [layout]
    if node._saved_step != 1:
        raise NotUnderstood("rows are put to every other place of a longer value")
    start = signed(node._saved_start)
    start = min(max(0, start + shape[dim] if start < 0 else start), shape[dim])
    return [_shifted(layout, -start, source[dim])]


def _split(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    (source,) = inner
    assert source is not None
    if signed(node._saved_dim) % len(shape) != layout.dim:
        return [layout]
    if hasattr(node, "_saved_split_size"):
        start = number * int(node._saved_split_size)
    else:
        start = sum(node._saved_split_sizes[:number])
    return [_shifted(layout, start, source[layout.dim])]


def lengths(node: Node, dim: int, total: int, inner: Shapes) -> list[int]:
    """Return the lengths along `dim` of what was concatenated.

    Raises:
        NotUnderstood: several of them are constants, of which the graph does not know it.
    """
    known = [None if s is None else s[dim] if len(s) > dim else 0 for s in inner]
    missing = known.count(None)
    if missing > 1:
        raise NotUnderstood("several constants are concatenated with residuals")
    rest = total - sum(n for n in known if n is not None)
    return [rest if n is None else n for n in known]


def _concatenated(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    dim = signed(node._saved_dim) % len(shape)
    if dim != layout.dim:
        return [None if s is None else layout for s in inner]
    found, start = list[Layout | None](), 0
    for s, length in zip(inner, lengths(node, dim, shape[dim], inner), strict=True):
        found.append(None if s is None else _shifted(layout, -start, length))
        start += length
    return found


def _reduced(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    (source,) = inner
    assert source is not None
    dims = node._saved_dim
    dims = [dims] if isinstance(dims, int) else list(dims or range(len(source)))
    gone = {signed(d) % len(source) for d in dims}
    left = [d for d in range(len(source)) if node._saved_keepdim or d not in gone]
    return [layout._replace(dim=left[layout.dim])]


def _along(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """Mix numbers along some dimensions alone."""
    dims = node._saved_dims if hasattr(node, "_saved_dims") else (node._saved_dim,)
    if not dims or layout.dim in {signed(d) % len(shape) for d in dims}:  # none: a roll of the flat value
        raise _Guess
    return [None if s is None else layout for s in inner]


def _separate(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """Samples along the first dimension, which the operation does not mix."""
    if layout.dim != 0:
        raise _Guess
    return _first(node, number, layout, shape, inner)


def _mm(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    both: Layouts = (layout, None) if layout.dim == 0 else (None, layout)
    if name_of(node) == "MmBackward0":
        return both
    return [None if inner[0] is None else _aligned(layout, shape, inner[0]), *both]


def _mv(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    if name_of(node) == "MvBackward0":
        return [layout, None]
    return [None if inner[0] is None else _aligned(layout, shape, inner[0]), layout, None]


def _bmm(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    return (layout, layout) if layout.dim == 0 else (layout, None) if layout.dim == 1 else (None, layout)


def _first(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """Samples along the first dimensions of the first argument; the others belong to all of them."""
    return [layout, *[None] * (len(inner) - 1)]


def _linear(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    if layout.dim == len(shape) - 1:
        raise NotUnderstood("rows are outputs of a linear layer")
    return _first(node, number, layout, shape, inner)


def _samples(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    if layout.dim != 0:
        raise NotUnderstood(f"{name_of(node)} over the residuals' own dimension")
    return _first(node, number, layout, shape, inner)


def _normalised(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    if layout.dim >= len(shape) - len(node._saved_normalized_shape):
        raise NotUnderstood(f"rows depend on each other: {name_of(node)} normalises over them")
    return _first(node, number, layout, shape, inner)


def _batch_normalised(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    if layout.dim == 1:  # channels that are samples, as instance norms have them
        return [layout, *[None if s is None else layout._replace(dim=0) for s in inner[1:]]]
    if node._saved_training:
        raise NotUnderstood("rows depend on each other: by the statistics of the batch in a batch norm")
    return _samples(node, number, layout, shape, inner)


def _none(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """Look up entries of a table that belongs to all rows."""
    return [None] * len(inner)


def _indexed(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """Take entries: of a table; or of each row its own, where several indices are given, as of log-probabilities."""
    (source,) = inner
    assert source is not None
    several = [i for i in node._saved_indices if i is not None]
    if len(several) > 1 and layout.dim == 0 and source[0] == shape[0]:
        if not _counts(node._saved_indices[0], source[0]):
            raise _Guess
        return [layout]
    if node._saved_indices[0] is None and len(shape) == len(source):
        if len(several) > 1:
            raise _Guess
        return [layout] if layout.dim == 0 else [None]
    return [None]


def _guessed_index(layout: Layout, shape: Shape, inner: Shapes) -> Layouts:
    """Guess that each row has entries of its own."""
    return [layout] if layout.dim == 0 and inner[0] is not None and inner[0][0] == shape[0] else [None]


def _counts(index: Tensor | None, count: int) -> bool:
    """Tell whether an index is 0, 1, 2, ..., one for each row."""
    if index is None or index.dtype is torch.bool or index.shape[0] != count or index.numel() != count:
        return False
    return torch.equal(index.reshape(-1), torch.arange(count, dtype=index.dtype, device=index.device))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    "TBackward0": _turned,
    "TransposeBackward0": _turned,
    "TransposeBackward1": _turned,
    "PermuteBackward0": _turned,
    "SelectBackward0": _selected,
    "UnbindBackward0": _selected,
    "SelectBackwardBackward0": _put,
    "StackBackward0": _stacked,
    "SliceBackward0": _sliced,
    "SliceBackwardBackward0": _slice_put,
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split,
    "UnsafeSplitBackward0": _split,
    "CatBackward0": _concatenated,
    "MmBackward0": _mm,
    "AddmmBackward0": _mm,
    "MvBackward0": _mv,
    "AddmvBackward0": _mv,
    "BmmBackward0": _bmm,
    "LinearBackward0": _linear,
    "ConvolutionBackward0": _samples,
    "NativeLayerNormBackward0": _normalised,
    "FusedRmsNormBackward0": _normalised,
    "NativeGroupNormBackward0": _samples,
    "NativeBatchNormBackward0": _batch_normalised,
    "EmbeddingBackward0": _none,
    "IndexSelectBackward0": _none,
    "RepeatBackward0": _none,
    "IndexBackward0": _indexed,
    **dict.fromkeys(
        (
            "AddBackward0", "SubBackward0", "RsubBackward1", "MulBackward0", "MulBackward1", "DivBackward0",
            "NegBackward0", "PowBackward0", "PowBackward1", "ExpBackward0", "LogBackward0", "SqrtBackward0",
            "TanhBackward0", "TanhBackwardBackward0", "SigmoidBackward0", "SigmoidBackwardBackward0", "SinBackward0",
            "CosBackward0", "ExpandBackward0", "CloneBackward0", "ToCopyBackward0", "WhereBackward0",
            "PreluKernelBackward0", "ReluBackward0", "ThresholdBackward0", "ThresholdBackwardBackward0",
            "GeluBackward0", "GeluBackwardBackward0", "SiluBackward0", "SiluBackwardBackward0", "SoftplusBackward0",
            "SoftplusBackwardBackward0", "EluBackward0", "EluBackwardBackward0", "LeakyReluBackward0",
            "LeakyReluBackwardBackward0", "MishBackward0", "HardtanhBackward0", "HardtanhBackwardBackward0",
            "HardswishBackward0", "HardswishBackwardBackward0", "HardsigmoidBackward0", "LogSigmoidBackward0",
            "LogSigmoidBackwardBackward0", "SoftshrinkBackward0", "HardshrinkBackward0", "NativeDropoutBackward0",
            "AbsBackward0", "SgnBackward0", "SignBackward0", "MaximumBackward0", "MinimumBackward0", "ClampBackward0",
            "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", "ClampMinBackward1", "ClampMaxBackward1",
            "MaskedFillBackward0", "TanBackward0", "SinhBackward0", "CoshBackward0", "AsinBackward0", "AcosBackward0",
            "AtanBackward0", "Atan2Backward0", "ErfBackward0", "Expm1Backward0", "Exp2Backward0", "Log1PBackward0",
            "Log2Backward0", "Log10Backward0", "RsqrtBackward0", "ReciprocalBackward0", "DivBackward1",
            "AddBackward1", "SubBackward1", "RsubBackward0", "AddcmulBackward0", "AddcdivBackward0", "LerpBackward0",
            "LerpBackward1", "LogaddexpBackward0", "XlogyBackward0", "MseLossBackward0", "SmoothL1LossBackward0",
            "HuberLossBackward0", "BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0",
        ),
        _pointwise,
    ),
    **dict.fromkeys(
        (
            "SumBackward1", "MeanBackward1", "LogsumexpBackward0", "AmaxBackward0", "AminBackward0", "MaxBackward0",
            "MinBackward0", "LinalgVectorNormBackward0", "NormBackward1", "VarBackward0", "StdBackward0",
            "ProdBackward1",
        ),
        _reduced,
    ),
    **dict.fromkeys(
        (
            "SoftmaxBackward0", "LogSoftmaxBackward0", "CumsumBackward0", "CumprodBackward0", "LogcumsumexpBackward0",
            "GatherBackward0", "SortBackward0", "TopkBackward0", "GluBackward0", "RollBackward0", "FlipBackward0",
        ),
        _along,
    ),
    **dict.fromkeys(
        (
            "NllLossBackward0", "MaxPool2DWithIndicesBackward0", "AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0",
        ),
        _separate,
    ),
}  # fmt: skip


def carry(node: Node, number: int, layout: Layout, shape: Shape, inner: Shapes) -> tuple[Layouts, bool]:
    """Return the layout in each argument, and whether that is a guess from their sizes.

    Raises:
        NotUnderstood: it is not known.
    """
    name = name_of(node)
    rule = _RULES.get(name)
    if rule is not None:
        try:
            return rule(node, number, layout, shape, inner), False
        except _Guess:
            if rule is _indexed:
                return _guessed_index(layout, shape, inner), True
    elif hasattr(node, "_saved_dim") and hasattr(node, "_saved_keepdim"):
        return _reduced(node, number, layout, shape, inner), True
    return _by_sizes(node, number, layout, shape, inner), True


# Walks ----------------------------------------------------------------------------------------------------------------


def _read(node: Node, read: Callable[[], Read]) -> Read:
    """Read something of a node.

    Raises:
        NotUnderstood: it does not keep what is read, as those of another version of torch.
    """
    try:
        return read()
    except AttributeError as error:
        raise NotUnderstood(f"{name_of(node)} does not keep what is read of it: {error}") from error


class Trace:
    """Uses of parameters in residuals that have a layout in the value at the top.

    Args:
        top: the value. layout: of the rows there. reach: the nodes that a parameter is below. slots: of the parameters.
        statistics: whether those of a batch in a batch norm are taken for constants, so that its samples are apart.

    Attributes:
        uses: with the value that is used: a parameter, or one made of parameters alone. nodes: with rows. names: of the
            nodes. own: places of the parameters that have rows themselves. guessed: a node whose arguments' layouts are
            guesses, if there is one.

    Raises:
        NotUnderstood: rows depend on each other, or an operation is not known.
    """

    def __init__(self, top: Edge, layout: Layout, reach: set[Node], slots: Slots, *, statistics: bool = False) -> None:
        self.uses: list[tuple[Use, Edge]] = []
        self.own: set[int] = set()
        self._kept: list[tuple[Tensor, int]] = []
        self.names: list[str] = []
        self.guessed: str | None = None
        layouts, waiting = {top: layout}, [top]
        while waiting:
            edge = waiting.pop()
            here = layouts[edge]
            if edge in slots:
                self.uses.append((_row_uses.Own(edge, here, shape_of(edge)), edge))
                self.own.add(slots[edge])
                continue
            node, number = edge
            arguments = node.next_functions
            live = [i for i, kid in enumerate(arguments) if kid[0] in reach or kid in slots]
            if not live:
                continue
            self.names.append(name_of(node))
            shape = shape_of(edge)
            inner = [None if kid[0] is None else shape_of(kid) for kid in arguments]
            if statistics and self.names[-1] == "NativeBatchNormBackward0":
                found, is_guess = _samples(node, number, here, shape, inner), False
            else:
                found, is_guess = _read(node, lambda: carry(node, number, here, shape, inner))  # noqa: B023
            if is_guess:
                self.guessed = self.guessed or self.names[-1]
            for i in live:
                kid, below_it = arguments[i], found[i]
                if below_it is None:
                    kid_shape = inner[i]
                    assert kid_shape is not None
                    use = _read(node, lambda: _row_uses.make(node, edge, here, i, shape, kid_shape))  # noqa: B023
                    self.uses.append((use, kid))
                    self._kept += [(x, x._version) for x in vars(use).values() if _has_version(x)]
                elif below_it.rows == 0:
                    continue
                elif kid not in layouts:
                    layouts[kid] = below_it
                    waiting.append(kid)
                elif layouts[kid] != below_it:
                    raise NotUnderstood(f"rows depend on each other: {name_of(node)} moves them against others")
        self.nodes = {node for node, _ in layouts}

    def check_versions(self) -> None:
        """Check that what uses hold is as it was, as autograd does.

        Raises:
            RuntimeError: something was changed in place.
        """
        if any(x._version != version for x, version in self._kept):
            raise RuntimeError("a value that rows need has been modified by an inplace operation")


def _has_version(x: object) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and not x.is_inference()
