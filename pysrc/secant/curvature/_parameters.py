"""The parameters of an operator: variables that require gradients, and where they are in a graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from secant import _checks
from secant._parameters import FlatParameters
from secant.curvature import _graph


class Parameters(FlatParameters):
    """Tensors as one flat vector, for an operator.

    Args:
        op: the operator, for messages.
        params: real, dense, distinct tensors that require gradients, all of one dtype and device. Those that are no
            leaves are variables of their own: none may be computed from another.

    Raises:
        TypeError, ValueError: something else was given.
    """

    _same = "{}, like the first"

    def __init__(self, op: str, params: Iterable[Tensor]) -> None:
        super().__init__(op, params, _checks.REAL + _checks.HALF)
        self.computed = [p for p in self.tensors if not p.is_leaf]
        self._check_independence()

    def _check_independence(self) -> None:
        slots = self.locate()
        for i, p in enumerate(self.tensors):
            if p.is_leaf:
                continue
            others = {edge: j for edge, j in slots.items() if j != i}
            for j in _graph.survey(_graph.below(_graph.edge_of(p)[0]), others).used:
                expected = "a tensor that no other one of params is computed from"
                raise _checks.fail(self.op, f"params[{j}]", expected, f"one below params[{i}]")

    def locate(self) -> dict[_graph.Edge, int]:
        """Find the places of the parameters in graphs that are made from now on.

        Raises:
            ValueError: one does not require gradients any more.
        """
        for i, p in enumerate(self.tensors):
            if not p.requires_grad:
                raise _checks.fail(self.op, f"params[{i}]", "a tensor that requires gradients", "requires_grad=False")
        slots = {_graph.edge_of(p): i for i, p in enumerate(self.tensors)}
        if len(slots) < len(self.tensors):
            raise _checks.fail(self.op, "params", "distinct tensors", "two that are the same value of a graph")
        return slots
