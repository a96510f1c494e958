"""Which layers parameters are in: what goes into each and the gradients of what comes out, read from a graph.

A layer here is a product with a weight: of a Linear layer, of a convolution with the patches of its input, or of an
embedding with unit vectors. Samples n have places p (tokens, positions of a kernel, several uses of one weight), and

    the gradient of sample n by W = sum_p g_np x_np^T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from secant import _checks, ops
from secant.curvature import _graph, _row_layouts, _row_uses
from secant.curvature._blocks import Place
from secant.curvature._columns import agree
from secant.curvature._graph import Edge, Node, Slots, below, name_of
from secant.curvature._layers import Layers
from secant.curvature._parameters import Parameters
from secant.curvature._row_parts import resolve
from secant.curvature._row_uses import Layout, Use

#: Parameters of no layer have a matrix up to this many numbers, a diagonal above.
DENSE = 64
#: Entries of gradients of single samples that are formed at a time.
_ENTRIES = 2**22

#: Multiplications from which a product that computes one triangle pays (128 columns of 1,024 rows, measured).
_LARGE = 2**24

#: Gradients by the edges of values.
Gradients = Mapping[Edge, Tensor | None]


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return what the kernel of a convolution is multiplied by: (groups, N, places, channels of a group x kernel).

    Args:
        x: (N, C, ...), with as many dimensions behind as the kernel has.
    """
    if any(padding):
        x = F.pad(x, [p for size in reversed(padding) for p in (size, size)])
    dims = len(kernel)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)
        if d > 1:
            x = x[..., ::d]
    n, channels = x.shape[:2]
    x = x.reshape(n, groups, channels // groups, math.prod(x.shape[2 : 2 + dims]), math.prod(kernel))
    return x.permute(1, 0, 3, 2, 4).flatten(3)


def by_group(g: Tensor, groups: int) -> Tensor:
    """Return gradients (N, C, ...) of what a convolution gives as (groups, N, places, C / groups)."""
    return g.reshape(len(g), groups, g.shape[1] // groups, -1).permute(1, 0, 3, 2)


class LayerUse(NamedTuple):
    """One use of the weight of a layer.

    at: the value whose gradient it needs. row: the first sample. inputs: (groups, N, P, I), or indices (N, P) into I.
    gradient: of that of the value to (groups, N, P, O).
    """

    at: Edge
    row: int
    inputs: Tensor
    gradient: Callable[[Tensor], Tensor]

    def outputs(self, gradients: Gradients) -> Tensor | None:
        """Return the gradients of what comes out, None where there are none."""
        found = gradients[self.at]
        return None if found is None else self.gradient(found)


class Layer(NamedTuple):
    """A weight, a bias, or both, with all uses; `table`: whether its inputs are indices."""

    place: Place
    uses: list[LayerUse]
    table: bool

    def sample_gradients(self, gradients: Gradients, samples: int) -> Iterator[Tensor]:
        """Yield gradients of single samples, (some, groups, O, I)."""
        groups, o, i = self.place.shape
        i += self.place.bias is not None
        each = [(use, use.outputs(gradients)) for use in self.uses]
        step = max(1, _ENTRIES // max(1, groups * o * i))
        for low in range(0, samples, step):
            high, found = min(samples, low + step), None
            for use, g in each:
                if g is None:
                    continue
                first, last = max(low, use.row), min(high, use.row + g.shape[1])
                if first >= last:
                    continue
                here = slice(first - use.row, last - use.row)
                if found is None:
                    found = g.new_zeros(high - low, groups, o, i)
                target = found[first - low : last - low]
                if self.table:
                    places = use.inputs[here].unsqueeze(1).expand(-1, o, -1)
                    target[:, 0].scatter_add_(2, places, g[0, here].mT.contiguous())
                else:
                    target += (g[:, here].mT @ use.inputs[:, here]).transpose(0, 1)
            if found is not None:
                yield found


class Rows(NamedTuple):
    """A parameter that is in no layer, or in several kinds of them.

    uses: each with what turns its rows (n, *the value used) into rows of the parameter.
    """

    place: Place
    uses: list[tuple[Use, Callable[[Tensor], Tensor]]]

    def sample_gradients(self, gradients: Gradients, samples: int) -> Iterator[Tensor]:
        """Yield gradients of single samples, (some, n)."""
        n = self.place.shape[1]
        step = max(1, _ENTRIES // max(1, n))
        for low in range(0, samples, step):
            high, found = min(samples, low + step), None
            for use, turn in self.uses:
                g, layout = gradients[use.at], use.layout
                first, last = max(low, layout.row), min(high, layout.row + layout.rows)
                if g is None or first >= last:
                    continue
                rows = turn(use.rows(g, first, last, _same)).reshape(last - first, n)
                if found is None:
                    found = rows.new_zeros(high - low, n)
                found[first - low : last - low] += rows
            if found is not None:
                yield found


def _same(x: Tensor) -> Tensor:
    return x


class Uses:
    """All uses of parameters in outputs (N, ...) of N samples.

    Args:
        outputs: with their graph. params, slots: of the operator.

    Attributes:
        layers, rows: by kind. edges: the values whose gradients are needed. guessed: an operation of which only sizes
            tell that it keeps samples apart, if there is one.

    Raises:
        NotUnderstood: samples depend on each other, or a parameter is used in a way that is not known.
    """

    def __init__(self, outputs: Tensor, params: Parameters, slots: Slots) -> None:
        if outputs.dim() == 0:
            raise _row_uses.NotUnderstood("outputs without a dimension of samples")
        self.params, self.slots, self.samples, self._outputs = params, slots, len(outputs), outputs
        top = _graph.edge_of(outputs)
        reach = _row_layouts.reaching([top], slots)
        layout = Layout(0, 0, len(outputs), 1, 0)
        self._trace = _row_layouts.Trace(top, layout, reach, slots, statistics=True)
        self.guessed = self._trace.guessed
        found = [_Found(use, kid, *self._identify(kid, reach)) for use, kid in self._trace.uses]
        kinds: dict[int, set[tuple[object, ...]]] = {}
        for one in found:
            for slot in one.slots:
                kinds.setdefault(slot, set()).add(one.kind if len(one.slots) == 1 else ("computed",))
        biases = _biases(found, kinds)
        layers: dict[int, Layer] = {}
        rows: dict[int, Rows] = {}
        paired = {bias for bias in biases.values() if bias is not None}
        for one in found:
            for slot in one.slots:
                if slot in paired:
                    continue
                if len(kinds[slot]) == 1 and one.is_layer:
                    layer = layers.get(slot)
                    if layer is None:
                        place = Place(slot, biases[slot], one.shape, one.flipped)
                        layer = layers[slot] = Layer(place, [], isinstance(one.use, _row_uses.Lookup))
                    layer.uses.append(one.layer_use(ones=biases[slot] is not None))
                else:
                    n = params.sizes[slot]
                    entry = rows.setdefault(slot, Rows(Place(slot, None, (1, n, 1)), []))
                    entry.uses.append((one.use, self._turn(one, slot)))
        self.layers, self.rows = list(layers.values()), list(rows.values())
        self.edges = list(
            {use.at: None for layer in self.layers for use in layer.uses}
            | {use.at: None for entry in self.rows for use, _ in entry.uses}
        )

    def _identify(self, kid: Edge, reach: set[Node]) -> tuple[tuple[int, ...], bool, bool]:
        """Return the parameters in a value, whether it is the transpose of one, and whether it is anything else.

        Raises:
            NotUnderstood: it is made of what has samples.
        """
        found = resolve(kid, self.slots)
        if found is not None:
            return (found[0],), found[1], False
        slots, seen, waiting = set[int](), set[Node](), [kid]
        while waiting:
            here = waiting.pop()
            if here in self.slots:
                slots.add(self.slots[here])
            elif here[0] in reach and here[0] not in seen:
                seen.add(here[0])
                if here[0] in self._trace.nodes:
                    raise _row_uses.NotUnderstood(f"some of which all use one {name_of(kid[0])} of theirs")
                waiting += below(here[0])
        return tuple(sorted(slots)), False, True

    def _turn(self, one: _Found, slot: int) -> Callable[[Tensor], Tensor]:
        """Return what turns rows of a value that is used into those of a parameter in it."""
        if not one.computed:
            return (lambda rows: rows.mT) if one.transposed else _same
        param, shape = self.params.tensors[slot], _row_layouts.shape_of(one.kid)

        def pulled(rows: Tensor) -> Tensor:
            edge, each = GradientEdge(*one.kid), rows.reshape(len(rows), *shape)
            found = [_graph.pull([edge], [param], [row])[0] for row in each]
            return torch.stack([torch.zeros_like(param) if g is None else g for g in found])

        return pulled

    def pull(self, cotangent: Tensor) -> Gradients:
        """Return the gradients of cotangent . outputs that the uses need."""
        self._trace.check_versions()
        if not self.edges:
            return {}
        found = _graph.pull([self._outputs], [GradientEdge(*edge) for edge in self.edges], [cotangent])
        return dict(zip(self.edges, found, strict=True))

    def keeps_samples(self, generator: torch.Generator, eps: float) -> bool:
        """Tell whether gradients of single samples, times a random number each, are that of the sum times these."""
        top = self._outputs
        w = torch.randn(len(top), dtype=top.dtype, device=top.device, generator=generator)
        u = torch.randn(top.shape, dtype=top.dtype, device=top.device, generator=generator)
        alone, weighted = self.pull(u), self.pull(u * w.reshape(-1, *[1] * (top.dim() - 1)))
        entries: list[Layer | Rows] = [*self.layers, *self.rows]
        for entry in entries:
            first = 0
            total: Tensor | None = None
            for part in entry.sample_gradients(alone, self.samples):
                found = torch.tensordot(w[first : first + len(part)], part, 1)
                total, first = found if total is None else total + found, first + len(part)
            want = [part.sum(0) for part in entry.sample_gradients(weighted, self.samples)]
            if total is not None and not agree(total, torch.stack(want).sum(0), eps):
                return False
        return True


class ChainUses:
    """All uses of parameters in outputs of recognised layers, where nothing has to be looked for.

    Args:
        layers: see `Layers`. samples: the length of the outputs.
    """

    rows: Sequence[Rows] = ()

    def __init__(self, layers: Layers, samples: int) -> None:
        self._chain, self.samples, self.layers = layers.layers, samples, list[Layer]()
        for i, layer in enumerate(self._chain):
            if layer.weight_slot is None and layer.bias_slot is None:
                continue
            h = layer.inputs if layer.weight_slot is not None else layer.room.new_empty(len(layer.room), 0)
            width = h.shape[1]
            if layer.bias_slot is not None:
                h = torch.cat([h, h.new_ones(len(h), 1)], 1)
            place = Place(layer.weight_slot, layer.bias_slot, (1, layer.room.shape[1], width))
            inputs = h.unsqueeze(0).unsqueeze(0) if len(h) % samples else h.view(1, samples, -1, h.shape[1])
            use = LayerUse((layer, i), 0, inputs, _same)
            self.layers.append(Layer(place, [use], table=False))

    def pull(self, cotangent: Tensor) -> Gradients:
        """Return the gradients of cotangent . outputs that the uses need."""
        found: dict[Edge, Tensor | None] = {}
        delta, shapes = cotangent, {use.at: use.inputs.shape[:3] for layer in self.layers for use in layer.uses}
        for i in range(len(self._chain) - 1, -1, -1):
            layer = self._chain[i]
            delta = delta.reshape(layer.room.shape)
            delta = delta if layer.slope is None else delta * layer.slope
            if (layer, i) in shapes:
                found[layer, i] = delta.view(*shapes[layer, i], delta.shape[1])
            if layer.first:
                break
            delta = delta @ layer.weight
        return found


class _Found(NamedTuple):
    """A use of a value `kid` made of the parameters `slots`: one, its transpose, or computed of several."""

    use: Use
    kid: Edge
    slots: tuple[int, ...]
    transposed: bool
    computed: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what has to be alike in all uses of the weight of a layer."""
        use = self.use
        if self.computed:
            return ("computed",)
        if isinstance(use, _row_uses.Kernel):
            return "kernel", use.transposed, use.groups
        return use.kind, self.flipped

    @property
    def is_layer(self) -> bool:
        """Tell whether it is the weight of a layer."""
        use, dims = self.use, len(_row_layouts.shape_of(self.kid))
        if self.computed or len(self.slots) != 1:
            return False
        if isinstance(use, _row_uses.Kernel):
            return not use.transposed
        if isinstance(use, _row_uses.Lookup):
            return not self.transposed and dims == 2
        return isinstance(use, _row_uses.Product) and dims <= 2

    @property
    def flipped(self) -> bool:
        """Tell whether the parameter is stored as (I, O)."""
        if isinstance(self.use, _row_uses.Product):
            return self.use.gradient_first == self.transposed and len(_row_layouts.shape_of(self.kid)) == 2
        return isinstance(self.use, _row_uses.Lookup)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, O, I) of the weight."""
        use, shape = self.use, _row_layouts.shape_of(self.kid)
        if isinstance(use, _row_uses.Kernel):
            return use.groups, shape[0] // use.groups, math.prod(shape[1:])
        if len(shape) == 1:
            return 1, 1, shape[0]
        first = isinstance(use, _row_uses.Product) and use.gradient_first
        return (1, shape[0], shape[1]) if first else (1, shape[1], shape[0])

    def layer_use(self, *, ones: bool) -> LayerUse:
        """Return the use of a weight.

        Args:
            ones: whether the bias follows as a last column.
        """
        use, layout = self.use, self.use.layout
        low, high = layout.row, layout.row + layout.rows
        if isinstance(use, _row_uses.Kernel):
            x = layout.take(use.input, low, high).flatten(0, 1)
            stride, padding, dilation = use.options[:3]
            inputs = patches(x, use.inner[2:], stride, padding, dilation, use.groups)
            inputs = inputs.reshape(use.groups, layout.rows, -1, inputs.shape[-1])

            def gradient(g: Tensor) -> Tensor:
                found = by_group(layout.take(g, low, high).flatten(0, 1), use.groups)
                return found.reshape(use.groups, layout.rows, -1, found.shape[-1])

        elif isinstance(use, _row_uses.Lookup):
            indices = layout.take(use.indices, low, high).reshape(layout.rows, -1)
            inputs = torch.where(indices < 0, indices + use.inner[0], indices)

            def gradient(g: Tensor) -> Tensor:
                found = layout.take(g, low, high).reshape(1, layout.rows, -1, use.inner[1])
                if use.without is not None:
                    found = found.masked_fill((inputs == use.without).unsqueeze(-1), 0.0)
                return found

        else:
            assert isinstance(use, _row_uses.Product)
            product, at_other = use, use.layout_of_other
            x = at_other.take(product.other, at_other.row, at_other.row + at_other.rows)
            inputs = x.reshape(1, layout.rows, -1, x.shape[-1])

            def gradient(g: Tensor) -> Tensor:
                found = layout.take(g, low, high)
                found = found.unsqueeze(-1) if product.lifted else found
                found = found.reshape(1, layout.rows, -1, found.shape[-1])
                return found if product.scale == 1 else found * product.scale

        if ones:
            inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
        return LayerUse(use.at, layout.row, inputs, gradient)


def _biases(found: Sequence[_Found], kinds: Mapping[int, set[tuple[object, ...]]]) -> dict[int, int | None]:
    """Return the slot of the bias of each weight, where every use of either has one of the other."""
    weights: dict[Edge, int] = {}
    for one in found:
        if one.is_layer and len(kinds[one.slots[0]]) == 1 and not isinstance(one.use, _row_uses.Lookup):
            weights[one.use.at] = one.slots[0]
    partners: dict[int, list[int | None]] = {}
    counts: dict[int, int] = {}
    for one in found:
        for slot in one.slots:
            counts[slot] = counts.get(slot, 0) + 1
        if one.is_layer or one.computed or not _is_summand(one):
            continue
        partners.setdefault(one.slots[0], []).append(_partner(one, weights))
    result: dict[int, int | None] = dict.fromkeys({one.slots[0] for one in found if one.is_layer})
    for bias, those in partners.items():
        weight = those[0]
        if weight is None or set(those) != {weight} or kinds[bias] != {("broadcast", False)}:
            continue
        if len(those) == counts[bias] == counts[weight] and result.get(weight) is None:
            result[weight] = bias
    return result


def _is_summand(one: _Found) -> bool:
    use = one.use
    return isinstance(use, _row_uses.Broadcast) and not isinstance(use.factor, Tensor) and use.factor == 1.0


def _partner(one: _Found, weights: Mapping[Edge, int]) -> int | None:
    """Return the weight of the layer whose products a vector is added to."""
    use = one.use
    assert isinstance(use, _row_uses.Broadcast)
    shape, inner = use.shape, [n for n in use.inner if n != 1]
    if use.at in weights:
        return weights[use.at]
    node = use.at[0]
    if name_of(node) != "AddBackward0" or len(inner) > 1 or use.inner[-1:] != shape[-1:]:
        return None
    for edge in below(node):
        here: Edge | None = edge
        while here is not None and here not in weights and name_of(here[0]) in _graph.VIEWS:
            here = _graph.argument(here[0])
        if here is not None and here in weights and _row_layouts.shape_of(here)[-1:] == shape[-1:]:
            return weights[here]
    return None


def gram(x: Tensor) -> Tensor:
    """Return x^T x of (groups, rows, n), as (groups, n, n)."""
    if len(x) == 1:
        one = x[0]
        if one.dtype in _checks.REAL and one.shape[0] * one.shape[1] ** 2 >= _LARGE:
            return ops.gram(one.contiguous()).unsqueeze(0)
        return (one.mT @ one).unsqueeze(0)
    return x.mT @ x


def second_moment(inputs: Tensor, dtype: torch.dtype, width: int, table: bool, *, reduce: bool) -> tuple[Tensor, int]:
    """Return the sum of x x^T over samples and places, (groups, I, I), and how many there were.

    Args:
        inputs: of a `LayerUse`. width: I of a table, whose sum is diagonal, (1, I). reduce: whether x is the mean over
            the places of a sample.
    """
    if not table:
        x = inputs.mean(2) if reduce else inputs.flatten(1, 2)
        x = x if x.dtype is dtype else x.to(dtype)
        return gram(x), x.shape[1]
    n, places = inputs.shape
    if not reduce:
        counts = torch.zeros(width, dtype=dtype, device=inputs.device)
        counts.scatter_add_(0, inputs.reshape(-1), counts.new_ones(1).expand(inputs.numel()))
        return counts.unsqueeze(0), inputs.numel()
    shares = torch.zeros(n, width, dtype=dtype, device=inputs.device)
    shares.scatter_add_(1, inputs, shares.new_full((1, 1), 1.0 / places).expand(n, places))
    return shares.square_().sum(0, keepdim=True), n
