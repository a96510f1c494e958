"""The parameters of an operator as one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from secant import _checks
from secant.curvature import _graph


class Parameters:
    """Tensors in a fixed order; entry i of a flat vector belongs to the i-th element of their concatenation.

    Args:
        op: the operator, for messages.
        params: real, dense, distinct tensors that require gradients, all of one dtype and device. Those that are no
            leaves are variables of their own: none may be computed from another.

    Raises:
        TypeError, ValueError: something else was given.
    """

    def __init__(self, op: str, params: Iterable[Tensor]) -> None:
        if isinstance(params, Tensor):
            raise TypeError(f"{op}: params: expected an iterable of tensors, got a single tensor: pass [tensor]")
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"{op}: params: expected an iterable of tensors, got a module: pass module.parameters()")
        self.tensors = list(params)
        if not self.tensors:
            raise _checks.fail(op, "params", "at least one tensor", "none")
        first = self.tensors[0]
        for i, p in enumerate(self.tensors):
            name = f"params[{i}]"
            device = first.device if isinstance(first, Tensor) else None
            if isinstance(p, Tensor) and (p.is_nested or p.is_meta):
                raise _checks.fail(
                    op, name, "a dense tensor with memory", "a nested" if p.is_nested else "a meta tensor"
                )
            _checks.tensor(op, name, p, _checks.REAL + _checks.HALF, device)
            if p.dtype is not first.dtype:
                raise TypeError(f"{op}: {name}: expected {first.dtype}, like the first, got {p.dtype}")
            if not p.requires_grad:
                raise _checks.fail(op, name, "a tensor that requires gradients", "requires_grad=False")
        if len({id(p) for p in self.tensors}) < len(self.tensors):
            raise _checks.fail(op, "params", "distinct tensors", "one of them twice")
        self.op, self.computed = op, [p for p in self.tensors if not p.is_leaf]
        self._check_independence()
        self.sizes = [p.numel() for p in self.tensors]
        self.n = sum(self.sizes)
        self.dtype, self.device = first.dtype, first.device

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
        """The places of the parameters in graphs that are made from now on.

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

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat vector in the shapes of the parameters."""
        return list(_unflatten_dense_tensors(vector, self.tensors))

    def join(self, tensors: Sequence[Tensor | None], out: Tensor) -> None:
        """Write tensors in the shapes of the parameters, None for zero, into a flat vector."""
        if any(x is None for x in tensors):
            for part, x in zip(out.split(self.sizes), tensors, strict=True):
                part.zero_() if x is None else part.copy_(x.detach().reshape(-1))
        else:
            torch.cat([x.detach().reshape(-1) for x in tensors if x is not None], out=out)

    def state(self) -> tuple[tuple[int, int], ...]:
        """Changes when a parameter is written in place or gets other memory.

        What is written through `.data` or by other programs of the same memory is not seen.
        """
        return tuple((p._version, p.data_ptr()) for p in self.tensors)
