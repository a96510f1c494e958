"""Reads from an autograd graph which layers made it: Linear, elementwise functions, and the loss above them.

What is recognised is the computation that took place, not a module: an `nn.Sequential` of such layers, the same
written by hand, with Flatten, Identity, and Dropout in evaluation (which leave no node, or a view). Everything else is
answered by None, and the caller differentiates through autograd.

The saved tensors of a node are part of torch's documented interface (Autograd mechanics, "Saved tensors"); a node whose
tensors were changed since raises there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Node = Any  # torch.autograd.graph.Node, whose saved tensors are attributes that only run time knows

#: Change the shape and keep the row-major order.
VIEWS = {
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "SqueezeBackward0",
    "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0",
}  # fmt: skip
_ACCUMULATE = "torch::autograd::AccumulateGrad"

#: A value in a graph: the node that made it, or that gathers a leaf's gradient, and which of its outputs it is.
Edge = tuple[Node, int]
#: Places of the parameters by their edges: a parameter is a leaf, or any tensor with a graph of its own below it.
Slots = Mapping[Edge, int]


def edge_of(x: Tensor) -> Edge:
    """Return where a tensor that requires gradients stands in the graph."""
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def below(node: Node) -> list[Edge]:
    """Return the arguments of a node that have a gradient."""
    return [(n, nr) for n, nr in node.next_functions if n is not None]


def pull(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of cotangents . outputs, None where there is none, and keep the graph.

    As `torch.autograd.grad`, less what that looks at before it asks the engine, which is a quarter of the time of a
    product with the Hessian of a small loss.

    Args:
        outputs, inputs: tensors or gradient edges. cotangents: in the shapes of the outputs.
    """
    found: tuple[Tensor | None, ...] = torch.autograd.Variable._execution_engine.run_backward(
        tuple(outputs),
        tuple(cotangents),
        True,  # keep_graph
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


def name_of(node: Node) -> str:
    """Return the name by which the error messages of torch call it."""
    return str(node.name())


# Elementwise functions ------------------------------------------------------------------------------------------------

#: First and second derivative with respect to the argument.
Derivatives = tuple[Tensor | float, Tensor | float]


def _tanh(node: Node) -> Derivatives:
    a = node._saved_result
    slope = 1 - a * a
    return slope, -2 * a * slope


def _relu(node: Node) -> Derivatives:
    a = node._saved_result
    return (a > 0).to(a.dtype), 0.0


def _sigmoid(node: Node) -> Derivatives:
    a = node._saved_result
    slope = a * (1 - a)
    return slope, slope * (1 - 2 * a)


def _silu(node: Node) -> Derivatives:
    z = node._saved_self
    s = torch.sigmoid(z)
    q = s * (1 - s)
    return s + z * q, q * (2 + z * (1 - 2 * s))


def _softplus(node: Node) -> Derivatives:
    z, beta, threshold = node._saved_self, float(node._saved_beta), float(node._saved_threshold)
    s, linear = torch.sigmoid(beta * z), beta * z > threshold
    return s.masked_fill(linear, 1.0), (beta * s * (1 - s)).masked_fill(linear, 0.0)


def _sin(node: Node) -> Derivatives:
    z = node._saved_self
    return torch.cos(z), -torch.sin(z)


def _gelu(node: Node) -> Derivatives:
    z = node._saved_self
    if node._saved_approximate == "tanh":  # z/2 (1 + tanh u), u = k (z + c z^3)
        k, c = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(k * (z + c * z**3))
        u1, u2, q = k * (1 + 3 * c * z * z), 6 * k * c * z, 1 - t * t
        return 0.5 * (1 + t) + 0.5 * z * q * u1, q * u1 + 0.5 * z * q * (u2 - 2 * t * u1 * u1)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-z / math.sqrt(2)) + z * density, density * (2 - z * z)


ELEMENTWISE: dict[str, Callable[[Node], Derivatives]] = {
    "TanhBackward0": _tanh,
    "ReluBackward0": _relu,
    "SigmoidBackward0": _sigmoid,
    "SiluBackward0": _silu,
    "SoftplusBackward0": _softplus,
    "SinBackward0": _sin,
    "GeluBackward0": _gelu,
}


def derivatives(chain: Sequence[Node]) -> Derivatives | None:
    """Derive the composition of elementwise nodes, innermost first; None of none.

    (g o f)' = g'(f) f',    (g o f)'' = g''(f) f'^2 + g'(f) f''.
    """
    total: Derivatives | None = None
    for node in chain:
        factor = scalar_factor(node)
        factor = shift_factor(node) if factor is None else factor
        outer = (factor, 0.0) if factor is not None else ELEMENTWISE[name_of(node)](node)
        if total is None:
            total = outer
        else:
            total = outer[0] * total[0], outer[1] * total[0] * total[0] + outer[0] * total[1]
    return total


def scalar_factor(node: Node) -> float | None:
    """Return c where the node multiplies its one differentiable argument by a constant scalar c, else None."""
    name = name_of(node)
    if name == "NegBackward0":
        return -1.0
    if name not in ("MulBackward0", "DivBackward0") or len(node.next_functions) != 2:
        return None
    if name == "DivBackward0":
        if node.next_functions[0][0] is None or node.next_functions[1][0] is not None:
            return None
        other = node._saved_other
    elif (node.next_functions[0][0] is None) == (node.next_functions[1][0] is None):
        return None
    else:
        other = node._saved_other if node.next_functions[1][0] is None else node._saved_self
    if not isinstance(other, Tensor) or other.dim() > 0:
        return None
    return 1 / float(other) if name == "DivBackward0" else float(other)


def shift_factor(node: Node) -> float | None:
    """Return c where the node adds a constant of its own shape, or smaller, to c times its argument, else None."""
    name = name_of(node)
    if name == "RsubBackward1":  # a number less the value
        return -float(node._saved_alpha)
    if name not in ("AddBackward0", "SubBackward0") or len(node.next_functions) != 2:
        return None
    places = [i for i, (n, _) in enumerate(node.next_functions) if n is not None]
    if len(places) != 1:
        return None
    below_it, number = node.next_functions[places[0]]
    if tuple(below_it._input_metadata[number].shape) != tuple(node._input_metadata[0].shape):  # it was expanded
        return None
    if places[0] == 0:
        return 1.0
    return float(node._saved_alpha) * (-1.0 if name == "SubBackward0" else 1.0)


def argument(node: Node) -> Edge | None:
    """Return the one value below a node of one differentiable argument."""
    edges = below(node)
    return edges[0] if len(edges) == 1 else None


# What a graph uses ----------------------------------------------------------------------------------------------------

#: Of these the third derivative of torch is wrong (2.13: backward of their backward takes statistics for constants).
_UNRELIABLE = re.compile(r"(Layer|Batch|Instance)Norm\w*BackwardBackward")


class Survey(NamedTuple):
    """What is below a value: slots of the parameters used, and names of nodes that are derivatives of derivatives.

    unreliable: those of them that torch differentiates wrongly. eps: of the coarsest type that values were cast to.
    numel: of all values together. convolves: whether one is a convolution.
    """

    used: set[int]
    higher: list[str]
    unreliable: list[str]
    eps: float
    numel: int
    convolves: bool


def survey(edges: Sequence[Edge], slots: Slots) -> Survey:
    """Walk the graph below these values, to the parameters and no further."""
    used: set[int] = set()
    higher: dict[str, None] = {}
    eps, numel, convolves = 0.0, 0, False
    seen: set[Node] = set()
    waiting = list(edges)
    while waiting:
        edge = waiting.pop()
        slot = slots.get(edge)
        if slot is not None:
            used.add(slot)
            continue
        node = edge[0]
        if node in seen:
            continue
        seen.add(node)
        name, values = name_of(node), node._input_metadata
        numel += sum(math.prod(made.shape) for made in values)
        if "BackwardBackward" in name:
            higher[name] = None
        elif name == "ToCopyBackward0":
            eps = max(eps, *(torch.finfo(made.dtype).eps for made in values if made.dtype.is_floating_point))
        convolves |= "Convolution" in name
        waiting += below(node)
    unreliable = [name for name in higher if _UNRELIABLE.search(name)]
    return Survey(used, list(higher), unreliable, eps, numel, convolves)


# Linear layers --------------------------------------------------------------------------------------------------------


class Affine(NamedTuple):
    """z = inputs weight^T + bias, then the elementwise functions of `chain`, innermost first.

    weight (O, I), None in a first layer without it as a parameter; weight_slot, bias_slot: their places among the
    parameters, None when they are none. inputs (N, I), None when the weight is no parameter; shape (N, I);
    out_shape (N, O). first: nothing below depends on a parameter.
    """

    node: Node
    weight: Tensor | None
    weight_slot: int | None
    bias_slot: int | None
    inputs: Tensor | None
    shape: tuple[int, int]
    out_shape: tuple[int, int]
    chain: tuple[Node, ...]
    first: bool


def _leaf(node: Node | None) -> Tensor | None:
    return node.variable if node is not None and name_of(node) == _ACCUMULATE else None


def _matrix_edges(node: Node) -> tuple[Edge | None, Edge | None, Edge | None]:
    edges = [None if n is None else (n, nr) for n, nr in node.next_functions]
    return (edges[0], edges[1], edges[2]) if name_of(node) == "AddmmBackward0" else (None, edges[0], edges[1])


def read_layers(edge: Edge | None, slots: Slots, tensors: Sequence[Tensor]) -> list[Affine] | str:
    """Read the layers, first to last, that made a value, or the name of the first node that is not recognised.

    Args:
        edge: of a tensor. slots: of the parameters. tensors: the parameters.
    """
    layers: list[Affine] = []
    used: set[int] = set()
    chain: list[Node] = []
    while True:
        if edge is None:
            return "a value that no parameter reaches"
        if edge in slots:
            return "a parameter used as an input"
        node = edge[0]
        name = name_of(node)
        if name in VIEWS:
            edge = argument(node)
        elif (
            name in ELEMENTWISE
            or scalar_factor(node) is not None
            or (not layers and shift_factor(node) is not None)  # residuals: outputs - targets
        ):
            chain.insert(0, node)
            edge = argument(node)
        elif name in ("AddmmBackward0", "MmBackward0"):
            layer = _read_affine(node, slots, tensors, tuple(chain))
            if isinstance(layer, str):
                return layer
            for slot in (layer.weight_slot, layer.bias_slot):
                if slot is not None and slot in used:
                    return "a parameter used by two layers"
                used |= set() if slot is None else {slot}
            layers.insert(0, layer)
            if layer.first:
                return layers
            chain, edge = [], _matrix_edges(node)[1]
        else:
            return name


def _read_affine(node: Node, slots: Slots, tensors: Sequence[Tensor], chain: tuple[Node, ...]) -> Affine | str:
    name = name_of(node)
    bias, inputs, matrix = _matrix_edges(node)
    if name == "AddmmBackward0":
        if node._saved_alpha != 1 or node._saved_beta != 1:
            return "addmm with factors"
        saved, shape = node._saved_mat1, tuple(node._saved_mat1_sym_sizes)
    else:
        saved, shape = node._saved_self, tuple(node._saved_self_sym_sizes)
    weight_slot = bias_slot = weight = None
    if matrix is not None:
        origin = None
        if name_of(matrix[0]) == "TBackward0" and matrix not in slots:  # of a parameter that is a transpose, not this
            origin = argument(matrix[0])
        weight_slot = slots.get(origin) if origin is not None else None
        found = _leaf(origin[0]) if origin is not None and weight_slot is None else None
        if weight_slot is not None:
            found = tensors[weight_slot]
        if found is None:
            return f"{name} with a computed weight"
        weight = found.detach()
    elif node._saved_mat2 is not None:
        weight = node._saved_mat2.t()
    if bias is not None:
        bias_slot = slots.get(bias)
        vector = _leaf(bias[0]) if bias_slot is None else tensors[bias_slot]
        if vector is None or vector.dim() != 1 or vector.numel() != node._saved_mat2_sym_sizes[1]:
            return f"{name} with a computed bias"
    if inputs is not None and inputs in slots:
        return "a parameter used as an input"
    kept = saved.detach() if weight_slot is not None else None
    out_shape = (shape[0], node._saved_mat2_sym_sizes[1])
    first = inputs is None or _leaf(inputs[0]) is not None
    return Affine(node, weight, weight_slot, bias_slot, kept, shape, out_shape, chain, first)


# Losses ---------------------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """A summand of the loss: factor times the value of an edge."""

    at: Edge
    factor: float

    @property
    def node(self) -> Node:
        """Return what made it."""
        return self.at[0]

    @property
    def edge(self) -> GradientEdge:
        """Return what `torch.autograd.grad` takes as an output."""
        return GradientEdge(*self.at)


def terms(edge: Edge, slots: Slots, factor: float = 1.0) -> list[Term]:
    """Take a scalar loss apart: sums, differences and multiples by constants, down to parameters."""
    if edge in slots:
        return [Term(edge, factor)]
    node = edge[0]
    name = name_of(node)
    if name in ("AddBackward0", "SubBackward0"):
        sign = -1.0 if name == "SubBackward0" else 1.0
        factors = (factor, factor * sign * float(node._saved_alpha))
        return [
            term
            for (n, nr), f in zip(node.next_functions, factors, strict=False)
            if n is not None
            for term in terms((n, nr), slots, f)
        ]
    scale = scalar_factor(node)
    if scale is not None:
        argument_edge = argument(node)
        return terms(argument_edge, slots, factor * scale) if argument_edge is not None else []
    return [Term(edge, factor)]


def boundary(edge: Edge, slots: Slots) -> Node | None:
    """Find the one matrix product through which the parameters reach a value; None when there are others."""
    tops: dict[Node, None] = {}
    seen: set[Node] = set()
    waiting = [edge]
    while waiting:
        here = waiting.pop()
        if here in slots:
            return None
        node = here[0]
        if node in seen:
            continue
        seen.add(node)
        if name_of(node) in ("AddmmBackward0", "MmBackward0"):
            tops[node] = None
            continue
        waiting += below(node)
    return next(iter(tops)) if len(tops) == 1 else None


def reaches(edge: Edge, target: Edge) -> bool:
    """Tell whether a value was computed from another."""
    return bool(survey([edge], {target: 0}).used)


def below_views(edge: Edge | None) -> Node | None:
    """Return the first node that is no view."""
    while edge is not None and name_of(edge[0]) in VIEWS:
        edge = argument(edge[0])
    return None if edge is None else edge[0]


class CrossEntropy(NamedTuple):
    """sum_i weight_i (-log p_i,target): log p (R, V), and the weight of a row, a number or (R, 1)."""

    log_probs: Tensor
    weight: Tensor | float


_MEAN, _SUM = 1, 2  # at::Reduction


def read_cross_entropy(node: Node, logits: Node | None, factor: float = 1.0) -> CrossEntropy | None:
    """Read the cross-entropy of class labels that `node` is, of the logits that come out of the node `logits`."""
    if name_of(node) != "NllLossBackward0" or node._saved_reduction not in (_MEAN, _SUM):
        return None
    softmax = node.next_functions[0][0]
    if softmax is None or name_of(softmax) != "LogSoftmaxBackward0" or below_views(argument(softmax)) is not logits:
        return None
    log_probs, target = softmax._saved_result.detach(), node._saved_target
    if log_probs.dim() != 2 or softmax._saved_dim not in (1, -1, 2**64 - 1):
        return None
    scale: Tensor | float = factor
    if node._saved_reduction == _MEAN:
        scale = factor / node._saved_total_weight
    ignored = (target == node._saved_ignore_index).unsqueeze(1)
    weight = node._saved_weight
    row = torch.ones_like(ignored, dtype=log_probs.dtype)
    if weight is not None:
        row = weight[target.masked_fill(ignored.squeeze(1), 0)].unsqueeze(1)
    return CrossEntropy(log_probs, row.masked_fill(ignored, 0.0) * scale)


def custom_functions(nodes: Sequence[Node], *, once: bool = False) -> list[str]:
    """Names of the `torch.autograd.Function` classes in the graph below these nodes.

    Args:
        once: only those whose backward is marked once_differentiable. Such a backward raises only when the gradient
            that it is given has a graph; where that is a constant, its result passes for one too.
    """
    found: dict[str, None] = {}
    seen: set[Node] = set()
    waiting = [node for node in nodes if node is not None]
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        cls = getattr(here, "_forward_cls", None)
        if cls is not None and (not once or _is_once_differentiable(cls.backward)):
            found[cls.__name__] = None
        waiting += [n for n, _ in below(here)]
    return list(found)


def _is_once_differentiable(backward: Any) -> bool:
    """Tell whether one of the decorators around it is torch's."""
    while hasattr(backward, "__wrapped__"):
        if backward.__code__.co_filename == torch.autograd.function.__file__:
            return True
        backward = backward.__wrapped__
    return False
