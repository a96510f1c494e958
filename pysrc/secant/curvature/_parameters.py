"""The parameters of an operator as one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from secant.ops import _gate


class Parameters:
    """Tensors in a fixed order; entry i of a flat vector belongs to the i-th element of their concatenation.

    Args:
        op: the operator, for messages.
        params: real, dense, distinct tensors that require gradients, all of one dtype and device.

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
            raise _gate.fail(op, "params", "at least one tensor", "none")
        first = self.tensors[0]
        for i, p in enumerate(self.tensors):
            name = f"params[{i}]"
            device = first.device if isinstance(first, Tensor) else None
            _gate.tensor(op, name, p, _gate.REAL + _gate.HALF, device)
            if p.dtype is not first.dtype:
                raise TypeError(f"{op}: {name}: expected {first.dtype}, like the first, got {p.dtype}")
            if not p.requires_grad:
                raise _gate.fail(op, name, "a tensor that requires gradients", "requires_grad=False")
        if len({id(p) for p in self.tensors}) < len(self.tensors):
            raise _gate.fail(op, "params", "distinct tensors", "one of them twice")
        self.sizes = [p.numel() for p in self.tensors]
        self.n = sum(self.sizes)
        self.dtype, self.device = first.dtype, first.device

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
