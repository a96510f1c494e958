"""The R-operator of Linear + activation layers: products at one point from what the forward pass left.

At a point, per layer l = 1..L: its input h_(l-1) = a_(l-1), f'(z_l), delta_l = dL/dz_l and f''(z_l) dL/da_l. For a
direction (V_l, c_l), with tangents marked by a dot:

    a._l = f'(z_l) (a._(l-1) W_l^T + h_(l-1) V_l^T + c_l)                                           forward
    delta._l = f'(z_l) (delta._(l+1) W_(l+1) + delta_(l+1) V_(l+1)) + [f'' dL/da]_l z._l            backward
    H V_l = delta._l^T h_(l-1) + delta_l^T a._(l-1),    H c_l = sum over rows of delta._l

Each line is one call of `secant.ops.paired_matmul`. So that the second needs no z., f'' dL/da is kept divided by f' and
multiplies a. = f' z.; where f' is zero and f'' is not, f' is replaced by a number too small to be seen. The products of
GGN and Fisher leave out the terms with delta and f''.

References:
    Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
    Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation 14 (2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secant.curvature import _graph
from secant.curvature._parameters import Parameters
from secant.ops import _hvp_dispatch as dispatch

#: Entries of single blocks' gradients that are formed at a time.
_SQUARES = 2**22


def _slope_and_ratio(slope: Tensor, second: Tensor | float) -> tuple[Tensor, Tensor | None]:
    """f' without the zeros at which f'' is not zero, and f'' / f'; None for f'' = 0."""
    if not isinstance(second, Tensor):
        return slope, None
    tiny = torch.finfo(slope.dtype).tiny ** 0.75  # products with f'' and dL/da stay in range
    slope = slope.masked_fill((slope == 0) & (second != 0), tiny)
    return slope, torch.where(slope == 0, 0.0, second / slope)


def _paired(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    p: Tensor | None = None,
    q: Tensor | None = None,
) -> None:
    """`secant.ops.paired_matmul` without its checks, which take as long as a small product: all is laid out here."""
    if out.numel():
        dispatch.call("paired_matmul", a, b, c, e, bias, scale, p, q, out)


def parts_of(vectors: Tensor, params: Parameters) -> list[Tensor]:
    """Split the rows of (k, n) into views in the shapes of the parameters behind a first dimension of k."""
    parts = zip(vectors.split(params.sizes, 1), params.tensors, strict=True)
    return [part.view(len(vectors), *p.shape) for part, p in parts]


class _Layer:
    """What one layer keeps at a point, and its rooms, in every view that a product asks for.

    Each product writes the same rooms: memory that is new to the process costs more than the arithmetic on it.
    The layer below puts out as many numbers as this one takes in, but its rows may be shorter or longer (a view lies
    between): names that end in _up are in the shape in which the layer above takes them.
    """

    below: Tensor | None = None  # a._(l-1), None for zero
    slope: Tensor | None = None  # f'
    bend: Tensor | None = None  # f'' dL/da over f'
    weight: Any  # tensors wherever a product looks at them
    weight_t: Any
    inputs: Any
    delta: Any = None
    delta_t: Any = None

    def __init__(self, layer: _graph.Affine, params: Parameters, above: tuple[int, int], *, curved: bool) -> None:
        self.weight, self.inputs, self.first = layer.weight, layer.inputs, layer.first
        self.weight_t = None if layer.weight is None else layer.weight.t()
        self.weight_slot, self.bias_slot = layer.weight_slot, layer.bias_slot
        self.room, back = (torch.empty(layer.out_shape, dtype=params.dtype, device=params.device) for _ in range(2))
        self.room_up, self.back, self.back_up = self.room.view(above), back, back.view(above)
        found = _graph.derivatives(layer.chain)
        if found is not None:
            slope, second = found
            slope = torch.full_like(self.room, slope) if isinstance(slope, float) else slope
            self.slope = slope.reshape(layer.out_shape).contiguous()
            if curved and isinstance(second, Tensor):
                self.slope, self.bend = _slope_and_ratio(self.slope, second.reshape(layer.out_shape))
        self.slope_up = None if self.slope is None else self.slope.view(above)
        self.bend_up: Tensor | None = None

    def set_gradient(self, gradient: Tensor) -> Tensor:
        """From dL/da of this layer, delta; returns it."""
        gradient = gradient.reshape(self.room.shape)
        if self.bend is not None:
            self.bend = (gradient * self.bend).contiguous()
            self.bend_up = self.bend.view(self.room_up.shape)
        self.delta = (gradient if self.slope is None else gradient * self.slope).contiguous()
        self.delta_t = self.delta.t()
        return self.delta


class Layers:
    """Products with the Jacobian of recognised layers, and with the Hessian of a loss above them.

    Args:
        layers: first to last. params: of the operator.
        gradient: dL/da_L, for products with the Hessian.
    """

    def __init__(self, layers: Sequence[_graph.Affine], params: Parameters, gradient: Tensor | None = None) -> None:
        self.params = params
        slots = {slot for layer in layers for slot in (layer.weight_slot, layer.bias_slot)}
        self.untouched = [i for i in range(len(params.tensors)) if i not in slots]
        above = [layer.shape for layer in layers[1:]] + [layers[-1].out_shape]
        self.layers = [
            _Layer(layer, params, shape, curved=gradient is not None)
            for layer, shape in zip(layers, above, strict=True)
        ]
        live = None
        for layer in self.layers:
            layer.below = live
            if live is not None or layer.weight_slot is not None or layer.bias_slot is not None:
                live = layer.room_up
        for layer in reversed(self.layers):
            if gradient is None:
                break
            delta = layer.set_gradient(gradient)
            gradient = None if layer.first else delta @ layer.weight

    def push(self, parts: Sequence[Tensor]) -> Tensor:
        """J v, the tangent a._L of what the last layer puts out, (N, O); valid until the next call.

        Args:
            parts: the direction, in the shapes of the parameters.
        """
        for layer in self.layers:
            bias = None if layer.bias_slot is None else parts[layer.bias_slot]
            if layer.weight_slot is None:
                if layer.below is not None:
                    _paired(layer.below, layer.weight_t, None, None, layer.room, bias=bias, scale=layer.slope)
                elif bias is not None:
                    layer.room.copy_(bias if layer.slope is None else bias * layer.slope)
            else:
                direction = parts[layer.weight_slot].t()
                if layer.below is None:
                    _paired(layer.inputs, direction, None, None, layer.room, bias=bias, scale=layer.slope)
                else:
                    a, b = layer.below, layer.weight_t
                    _paired(a, b, layer.inputs, direction, layer.room, bias=bias, scale=layer.slope)
        return self.layers[-1].room

    def blocks_fit(self, blocks: int) -> bool:
        """Tell whether the rows of every layer are as many, or a multiple, so that each belongs to one block."""
        return blocks > 0 and all(layer.room.shape[0] % blocks == 0 for layer in self.layers)

    def add_squares(self, cotangent: Tensor, sign: Tensor, out: Tensor) -> None:
        """Add sum_b sign_b (J_b^T u_b)^2, entry by entry, for the blocks b of rows of the outputs.

        With one row per block, sum_n (delta_n,i h_n,j)^2 is the product of the squares.

        Args:
            cotangent: u. sign: (blocks,). out: flat.
        """
        results, blocks = self.params.split(out), len(sign)
        delta = cotangent
        for layer in reversed(self.layers):
            delta = delta.reshape(layer.room.shape)
            delta = delta if layer.slope is None else delta * layer.slope
            parts = delta.view(blocks, -1, delta.shape[1])
            if layer.bias_slot is not None:
                results[layer.bias_slot].add_((parts.sum(1).square() * sign.unsqueeze(1)).sum(0))
            if layer.weight_slot is not None:
                inputs = layer.inputs.reshape(blocks, -1, layer.inputs.shape[1])
                target = results[layer.weight_slot]
                if parts.shape[1] == 1:
                    target.addmm_((parts[:, 0].square() * sign.unsqueeze(1)).t(), inputs[:, 0].square())
                else:
                    together = max(1, _SQUARES // max(1, target.numel()))
                    for d, h, s in zip(*(x.split(together) for x in (parts, inputs, sign)), strict=True):
                        target.add_(torch.einsum("b,bij->ij", s, torch.bmm(d.mT, h).square()))
            if layer.first:
                return
            delta = delta @ layer.weight

    def pull(self, cotangent: Tensor, out: Tensor, parts: Sequence[Tensor] | None = None) -> None:
        """Write J^T u; or, given the direction that `push` has just had, the product with the Hessian.

        Args:
            cotangent: u, or the tangent of dL/da_L. out: flat. parts: the direction.
        """
        results = self.params.split(out)
        for i in self.untouched:
            results[i].zero_()
        top = self.layers[-1]
        delta = cotangent.reshape(top.room.shape)
        if top.slope is not None:
            delta = delta * top.slope
            if parts is not None and top.bend is not None:
                delta = delta.addcmul_(top.bend, top.room)
        delta_t = delta.t()
        for i in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[i]
            below = layer.below if parts is not None else None
            if layer.weight_slot is not None:
                c, e = (None, None) if below is None else (layer.delta_t, below)
                _paired(delta_t, layer.inputs, c, e, results[layer.weight_slot])
            if layer.bias_slot is not None:
                torch.sum(delta, 0, out=results[layer.bias_slot])
            if layer.first:
                return
            under = self.layers[i - 1]
            c, e = (
                (None, None) if parts is None or layer.weight_slot is None else (layer.delta, parts[layer.weight_slot])
            )
            p, q = (None, None) if below is None or under.bend_up is None else (under.bend_up, below)
            _paired(delta, layer.weight, c, e, under.back_up, scale=under.slope_up, p=p, q=q)
            delta = under.back
            delta_t = delta.t()

    def push_columns(self, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Compute J v for k directions at once.

        Args:
            parts: the directions, in the shapes of the parameters behind a first dimension of k.

        Returns:
            (k, N, O), and the tangents a._l of all layers, None for zero: for `pull_columns`.
        """
        k, rooms = len(parts[0]), list[Tensor | None]()
        live: Tensor | None = None
        for layer in self.layers:
            room, (rows, width) = None, layer.room.shape
            if layer.weight_slot is not None:
                room = torch.bmm(layer.inputs.expand(k, -1, -1), parts[layer.weight_slot].mT)
            if live is not None:
                flat = live.reshape(k * rows, -1)
                if room is None:
                    room = (flat @ layer.weight_t).view(k, rows, width)
                else:
                    room.view(k * rows, width).addmm_(flat, layer.weight_t)
            if layer.bias_slot is not None:
                bias = parts[layer.bias_slot].unsqueeze(1)
                room = bias.expand(k, rows, width).clone() if room is None else room.add_(bias)
            if room is not None and layer.slope is not None:
                room.mul_(layer.slope)
            rooms.append(room)
            live = None if room is None else room.view(k, *layer.room_up.shape)
        assert rooms[-1] is not None
        return rooms[-1], rooms

    def pull_columns(
        self,
        cotangents: Tensor,
        out: Tensor,
        parts: Sequence[Tensor] | None = None,
        rooms: Sequence[Tensor | None] = (),
    ) -> None:
        """Write J^T u for k cotangents at once; or products with the Hessian, as `pull` does.

        Args:
            cotangents: u, or the tangents of dL/da_L, behind a first dimension of k. out: (k, n). parts, rooms: the
                directions, and what `push_columns` had of them.
        """
        k, results = len(out), parts_of(out, self.params)
        for i in self.untouched:
            results[i].zero_()
        top = self.layers[-1]
        delta = cotangents.reshape(k, *top.room.shape)
        if top.slope is not None:
            delta = delta * top.slope
            if parts is not None and top.bend is not None and rooms[-1] is not None:
                delta.addcmul_(top.bend, rooms[-1])
        for i in range(len(self.layers) - 1, -1, -1):
            layer, below = self.layers[i], rooms[i - 1] if parts is not None and i > 0 else None
            if below is not None:
                below = below.view(k, *self.layers[i - 1].room_up.shape)
            if layer.weight_slot is not None:
                target = results[layer.weight_slot]
                torch.bmm(delta.mT, layer.inputs.expand(k, -1, -1), out=target)
                if below is not None:
                    target.baddbmm_(layer.delta_t.expand(k, -1, -1), below)
            if layer.bias_slot is not None:
                torch.sum(delta, 1, out=results[layer.bias_slot])
            if layer.first:
                return
            under = self.layers[i - 1]
            back = (delta.reshape(-1, delta.shape[2]) @ layer.weight).view(k, *under.back_up.shape)
            if parts is not None and layer.weight_slot is not None:
                back.baddbmm_(layer.delta.expand(k, -1, -1), parts[layer.weight_slot])
            if under.slope_up is not None:
                back.mul_(under.slope_up)
            if below is not None and under.bend_up is not None:
                back.addcmul_(under.bend_up, below)
            delta = back.view(k, *under.room.shape)
