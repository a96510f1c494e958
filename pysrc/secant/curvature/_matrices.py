"""Matrices of one batch at one point: one class per way to compute their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

from secant.curvature import _graph, _losses
from secant.curvature._columns import Together
from secant.curvature._layers import Layers, parts_of
from secant.curvature._parameters import Parameters


class BatchMatrix(Protocol):
    """A matrix over the parameters, at one point and batch."""

    @property
    def together(self) -> Together:
        """Tell in which graphs `products` pays."""

    def product(self, vector: Tensor, out: Tensor) -> None:
        """Write the product with a flat vector."""

    def products(self, vectors: Tensor, out: Tensor) -> None:
        """Write the products with the rows of (k, n), all at once."""


def split_terms(loss: Tensor, slots: _graph.Slots) -> list[_graph.Term]:
    """Take a loss apart into summands, each a scalar."""
    return [whole(loss)] if loss.dim() > 0 else _graph.terms(_graph.edge_of(loss), slots)


def whole(loss: Tensor) -> _graph.Term:
    """Return a loss of one element as it is, as one summand."""
    with torch.enable_grad():
        return _graph.Term(_graph.edge_of(loss.reshape(())), 1.0)


def _pulled(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, batched: bool
) -> Sequence[Tensor | None]:
    """Pull cotangents back on a kept graph, or k of each at once where `batched`."""
    if batched:
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    return _graph.pull(outputs, inputs, cotangents)


# Hessian --------------------------------------------------------------------------------------------------------------


def _join_columns(found: Sequence[Tensor | None], out: Tensor, params: Parameters) -> None:
    """Write tensors in the shapes of the parameters behind a first dimension of k, None for zero, into (k, n)."""
    for target, x in zip(parts_of(out, params), found, strict=True):
        target.zero_() if x is None else target.copy_(x.detach())


class DoubleBackward:
    """H v = d(g.v)/dw on the kept graph of the gradient g (reverse over reverse).

    Args:
        terms: their sum is the loss. like: a scalar of its dtype and device. found: the gradient with its graph, None
            for zero, where it is known. known: whether custom functions were looked for where this loss was before.
    """

    together: Together = "without convolutions"

    def __init__(
        self,
        terms: Sequence[_graph.Term],
        like: Tensor,
        params: Parameters,
        found: Sequence[Tensor | None] | None = None,
        *,
        known: bool = False,
    ) -> None:
        self.params = params
        if not known and (names := _graph.custom_functions([term.node for term in terms], once=True)):
            raise RuntimeError(f"{', '.join(names)}: backward is marked once_differentiable")
        if found is None:
            found = _losses.gradients(terms, params.tensors, like, create_graph=True)
        self.slots = [i for i, g in enumerate(found) if g is not None and g.requires_grad]
        self.grads = [g for g in found if g is not None and g.requires_grad]

    def parts(self, parts: Sequence[Tensor], *, batched: bool = False) -> list[Tensor | None]:
        """Compute the product in the shapes of the parameters, None for zero; of k vectors at once where `batched`."""
        if not self.grads:  # a loss linear in the parameters
            return [None] * len(parts)
        chosen = [parts[i] for i in self.slots]
        return list(_pulled(self.grads, self.params.tensors, chosen, batched=batched))

    def product(self, vector: Tensor, out: Tensor) -> None:
        """Write the product with a flat vector."""
        self.params.join(self.parts(self.params.split(vector)), out)

    def products(self, vectors: Tensor, out: Tensor) -> None:
        """Write the products with the rows of (k, n), all at once."""
        _join_columns(self.parts(parts_of(vectors, self.params), batched=True), out, self.params)


#: A closure with other tensors in the place of those with these ids; `Evaluator`, and a choice from what it returns.
Evaluate = Callable[[dict[int, Tensor]], Tensor]


class _Transformed:
    """Evaluates a closure as a function of the parameters, under the transforms of torch.func.

    Under them rather than on plain dual numbers: only there are formulas, as that of log_softmax, free of in-place
    operations that another derivative cannot pass.
    """

    def __init__(self, evaluate: Evaluate, params: Parameters, seen: Callable[[Tensor], None]) -> None:
        self.closure, self.params, self.seen = evaluate, params, seen

    def loss(self, *points: Tensor) -> Tensor:
        """Evaluate the loss with these tensors in the place of the parameters."""
        ids = map(id, self.params.tensors)
        return self.closure(dict(zip(ids, points, strict=True))).reshape(())


class ForwardOverReverse(_Transformed):
    """H v = the tangent of the gradient: forward mode through the forward and the backward pass, at every product."""

    together: Together = "always"

    def _tangent(self, *tangents: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Compute the loss, and the product in the shapes of the parameters."""
        points = tuple(p.detach() for p in self.params.tensors)
        gradient = torch.func.grad_and_value(self.loss, argnums=tuple(range(len(points))))
        (_, value), (found, _) = torch.func.jvp(gradient, points, tangents)[:2]
        return value, found

    def product(self, vector: Tensor, out: Tensor) -> None:
        """Write the product with a flat vector."""
        with torch.enable_grad():
            value, found = self._tangent(*self.params.split(vector))
        self.seen(value)
        self.params.join(found, out)

    def products(self, vectors: Tensor, out: Tensor) -> None:
        """Write the products with the rows of (k, n): one forward and backward pass for the tangents of all."""
        with torch.enable_grad():
            value, found = torch.vmap(self._tangent, randomness="same")(*parts_of(vectors, self.params))
        self.seen(value[0])
        _join_columns(found, out, self.params)


class ReverseOverForward(_Transformed):
    """H v = the gradient of the directional derivative g.v: backward through a forward-mode pass, at every product."""

    together: Together = "never"

    def product(self, vector: Tensor, out: Tensor) -> None:
        """Write the product with a flat vector."""
        points, tangents = tuple(self.params.tensors), tuple(self.params.split(vector))
        with torch.enable_grad():
            value, slope = torch.func.jvp(self.loss, points, tangents)[:2]
            self.seen(value)
            if slope.requires_grad:
                self.params.join(torch.autograd.grad(slope, points, allow_unused=True), out)
            else:
                out.zero_()

    def products(self, vectors: Tensor, out: Tensor) -> None:
        """Write the products with the rows of (k, n), one after the other."""
        for vector, row in zip(vectors, out, strict=True):
            self.product(vector, row)


class LayeredHessian:
    """The R-operator for the terms of a loss that Linear + activation layers made, double backward for the others.

    Args:
        parts: for each network in the loss: its layers, and the product with the Hessian of what is above them.
        rest: the other terms, None when there are none.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Layers, _losses.Middle]],
        rest: DoubleBackward | None,
        params: Parameters,
    ) -> None:
        self.networks, self.rest, self.params = parts, rest, params
        self.together: Together = "always" if rest is None else rest.together

    def product(self, vector: Tensor, out: Tensor) -> None:
        """Write the product with a flat vector."""
        parts = self.params.split(vector)
        written = self.rest is not None
        if self.rest is not None:
            self.params.join(self.rest.parts(parts), out)
        for layers, middle in self.networks:
            part = torch.empty_like(out) if written else out
            layers.pull(middle(layers.push(parts)), part, parts)
            if written:
                out += part
            written = True
        if not written:
            out.zero_()

    def products(self, vectors: Tensor, out: Tensor) -> None:
        """Write the products with the rows of (k, n), all at once."""
        parts = parts_of(vectors, self.params)
        written = self.rest is not None
        if self.rest is not None:
            self.rest.products(vectors, out)
        for layers, middle in self.networks:
            part = torch.empty_like(out) if written else out
            tangents, rooms = layers.push_columns(parts)
            layers.pull_columns(_losses.several(middle, tangents), part, parts, rooms)
            if written:
                out += part
            written = True
        if not written:
            out.zero_()


def layered_hessian(loss: Tensor, params: Parameters, slots: _graph.Slots) -> LayeredHessian | str:
    """Build the structured product at the point where `loss` was evaluated, or say what stands in its way."""
    if params.dtype not in (torch.float32, torch.float64):
        return f"{params.dtype}"
    networks: dict[_graph.Node, list[_graph.Term]] = {}
    layers_of: dict[_graph.Node, list[_graph.Affine]] = {}
    rest: list[_graph.Term] = []
    reason = "no Linear layer"
    for term in split_terms(loss, slots):
        top = _graph.boundary(term.at, slots)
        if top is not None and top not in layers_of:
            found = _graph.read_layers((top, 0), slots, params.tensors)
            if isinstance(found, str):
                reason, top = found, None
            else:
                layers_of[top] = found
        if top is None:
            rest.append(term)
        else:
            networks.setdefault(top, []).append(term)
    if not networks:
        return reason
    parts = []
    for top, terms in networks.items():
        gradient, middle = _losses.curvature(terms, top, GradientEdge(top, 0), loss)
        if gradient is not None:
            parts.append((Layers(layers_of[top], params, gradient), middle))
    return LayeredHessian(parts, DoubleBackward(rest, loss, params) if rest else None, params)


# Jacobian of the outputs, for GGN and Fisher --------------------------------------------------------------------------


class BatchJacobian(Protocol):
    """J = d outputs / d parameters at one point and batch."""

    @property
    def together(self) -> Together:
        """Tell in which graphs the products with several vectors at once pay."""

    def push_columns(self, vectors: Tensor) -> Tensor:
        """Compute J v for the rows of (k, n), in the shape of the outputs behind a first dimension of k."""

    def pull_columns(self, cotangents: Tensor, out: Tensor) -> None:
        """Write J^T u for k cotangents behind each other into (k, n)."""

    def add_squares(self, cotangent: Tensor, sign: Tensor, out: Tensor) -> None:
        """Add sum_b sign_b (J_b^T u_b)^2, entry by entry, for the blocks b of rows of the outputs."""

    def push(self, vector: Tensor) -> Tensor:
        """Compute J v, in the shape of the outputs."""

    def pull(self, cotangent: Tensor, out: Tensor) -> None:
        """Write J^T u, flat."""


class GraphJacobian:
    """On the kept graph: J^T u by backward; J v as the derivative by u of (J^T u).v, linear in u."""

    together: Together = "without convolutions"

    def __init__(self, outputs: Tensor, params: Parameters) -> None:
        self.outputs, self.params = outputs, params
        self.dummy = torch.zeros_like(outputs, requires_grad=True)
        with torch.enable_grad():
            pulled = self._pull(self.dummy, create_graph=True)
        self.slots = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self.pulled = [g for g in pulled if g is not None and g.requires_grad]

    def _pull(self, cotangent: Tensor, *, create_graph: bool = False, batched: bool = False) -> Sequence[Tensor | None]:
        if create_graph:
            return _graph.pull([self.outputs], self.params.tensors, [cotangent], create_graph=True)
        return _pulled([self.outputs], self.params.tensors, [cotangent], batched=batched)

    def _push(self, parts: Sequence[Tensor], like: Tensor, *, batched: bool) -> Tensor:
        if not self.pulled:
            return torch.zeros_like(like)
        chosen = [parts[i] for i in self.slots]
        (found,) = _pulled(self.pulled, [self.dummy], chosen, batched=batched)
        return torch.zeros_like(like) if found is None else found

    def push(self, vector: Tensor) -> Tensor:
        """Compute J v."""
        return self._push(self.params.split(vector), self.dummy, batched=False)

    def push_columns(self, vectors: Tensor) -> Tensor:
        """Compute J v for the rows of (k, n)."""
        like = self.dummy.expand(len(vectors), *self.dummy.shape)
        return self._push(parts_of(vectors, self.params), like, batched=True)

    def pull_columns(self, cotangents: Tensor, out: Tensor) -> None:
        """Write J^T u for k cotangents behind each other."""
        _join_columns(self._pull(cotangents, batched=True), out, self.params)

    def pull(self, cotangent: Tensor, out: Tensor) -> None:
        """Write J^T u."""
        self.params.join(self._pull(cotangent), out)

    def add_squares(self, cotangent: Tensor, sign: Tensor, out: Tensor) -> None:
        """Add sum_b sign_b (J_b^T u_b)^2, by a backward pass per block."""
        part = torch.empty_like(out)
        for b, rows in enumerate(cotangent.reshape(len(sign), -1)):
            alone = torch.zeros_like(cotangent)
            alone.view(len(sign), -1)[b] = rows
            self.pull(alone, part)
            out.add_(part.square_() * sign[b])


class ForwardJacobian(GraphJacobian):
    """J v by forward mode, through the closure again at every product; J^T u on the kept graph."""

    together: Together = "always"  # what the tangents win is more than what convolutions lose on the way back

    def __init__(self, outputs: Tensor, params: Parameters, evaluate: Evaluate, seen: Callable[[Tensor], None]) -> None:
        self.outputs, self.params, self.closure, self.seen = outputs, params, evaluate, seen

    def push(self, vector: Tensor) -> Tensor:
        """Compute J v."""
        tensors = self.params.tensors
        with forward_ad.dual_level():
            duals = (
                forward_ad.make_dual(p.detach(), t) for p, t in zip(tensors, self.params.split(vector), strict=True)
            )
            outputs = self.closure({id(p): x for p, x in zip(tensors, duals, strict=True)})
            primal, tangent = forward_ad.unpack_dual(outputs)
            self.seen(primal)
            return torch.zeros_like(self.outputs) if tangent is None else tangent.detach()

    def push_columns(self, vectors: Tensor) -> Tensor:
        """Compute J v for the rows of (k, n): one forward pass for the tangents of all."""
        points, ids = tuple(p.detach() for p in self.params.tensors), [id(p) for p in self.params.tensors]

        def outputs(*points: Tensor) -> Tensor:
            return self.closure(dict(zip(ids, points, strict=True)))

        def tangent(*tangents: Tensor) -> tuple[Tensor, Tensor]:
            primal, found = torch.func.jvp(outputs, points, tangents)[:2]
            return primal, found

        primal, found = torch.vmap(tangent, randomness="same")(*parts_of(vectors, self.params))
        self.seen(primal[0])
        return found.detach()


class LayeredJacobian:
    """Of recognised layers, by the R-operator without the second derivatives."""

    together: Together = "always"

    def __init__(self, outputs: Tensor, layers: Layers, params: Parameters) -> None:
        self.shape, self.layers, self.params = outputs.shape, layers, params

    def push(self, vector: Tensor) -> Tensor:
        """Compute J v."""
        return self.layers.push(self.params.split(vector)).reshape(self.shape)

    def pull(self, cotangent: Tensor, out: Tensor) -> None:
        """Write J^T u."""
        self.layers.pull(cotangent, out)

    def push_columns(self, vectors: Tensor) -> Tensor:
        """Compute J v for the rows of (k, n)."""
        found, _ = self.layers.push_columns(parts_of(vectors, self.params))
        return found.reshape(len(vectors), *self.shape)

    def pull_columns(self, cotangents: Tensor, out: Tensor) -> None:
        """Write J^T u for k cotangents behind each other."""
        self.layers.pull_columns(cotangents, out)

    def add_squares(self, cotangent: Tensor, sign: Tensor, out: Tensor) -> None:
        """Add sum_b sign_b (J_b^T u_b)^2: for all blocks at once where each has its rows in every layer."""
        if self.layers.blocks_fit(len(sign)):
            self.layers.add_squares(cotangent, sign, out)
        else:
            GraphJacobian.add_squares(self, cotangent, sign, out)  # type: ignore[arg-type]


def layered_jacobian(outputs: Tensor, params: Parameters, slots: _graph.Slots) -> LayeredJacobian | str:
    """Build the structured Jacobian at the point where `outputs` were evaluated, or say what stands in its way."""
    if params.dtype not in (torch.float32, torch.float64):
        return f"{params.dtype}"
    found = _graph.read_layers(_graph.edge_of(outputs), slots, params.tensors)
    return found if isinstance(found, str) else LayeredJacobian(outputs, Layers(found, params), params)


class Sandwich:
    """J^T M J, where M is symmetric on the outputs.

    Args:
        middle: M u in the shape of u. like: a tensor like the outputs.
    """

    def __init__(self, jacobian: BatchJacobian, middle: _losses.Middle, like: Tensor) -> None:
        self.jacobian, self.middle, self.like = jacobian, middle, like
        self.together: Together = jacobian.together

    def product(self, vector: Tensor, out: Tensor) -> None:
        """Write the product with a flat vector."""
        self.jacobian.pull(self.middle(self.jacobian.push(vector)), out)

    def products(self, vectors: Tensor, out: Tensor) -> None:
        """Write the products with the rows of (k, n), all at once."""
        self.jacobian.pull_columns(_losses.several(self.middle, self.jacobian.push_columns(vectors)), out)

    def diagonal(self, out: Tensor) -> None:
        """Write the diagonal: squares of J^T s for the factors s of the blocks of M, or by n products."""
        out.zero_()
        n, count = len(out), 0
        factors = self.middle.factors(self.like)
        if factors is not None:
            layered = isinstance(self.jacobian, LayeredJacobian)
            for factor, sign in factors:
                count += len(sign)
                if not layered and count > 2 * n:  # a product takes about two passes
                    break
                self.jacobian.add_squares(factor, sign.to(factor.dtype), out)
            else:
                return
        unit, part = torch.zeros_like(out), torch.empty_like(out)
        for i in range(n):
            unit.zero_()
            unit[i] = 1
            self.product(unit, part)
            out[i] = part[i]
