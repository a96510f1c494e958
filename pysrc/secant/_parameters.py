"""Many tensors as one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from secant import _checks


class FlatParameters:
    """Tensors in a fixed order; entry i of a flat vector belongs to the i-th element of their concatenation.

    The tensors keep their own memory. A vector (a direction, a start point) is split into views once, and is then
    combined with all of them by one call.

    Args:
        op: the optimizer or operator, for messages.
        params: real, dense, distinct tensors with memory, of one dtype and on one device, at least one.
        dtypes: those that it may be.

    Raises:
        TypeError, ValueError: something else was given; the message says which tensor and what was expected.
    """

    _same = "dtype {}, like params[0]"

    def __init__(self, op: str, params: Iterable[Tensor], dtypes: tuple[torch.dtype, ...] = _checks.REAL) -> None:
        if isinstance(params, Tensor):
            raise TypeError(f"{op}: params: expected an iterable of tensors, got a single tensor: pass [tensor]")
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"{op}: params: expected an iterable of tensors, got a module: pass module.parameters()")
        self.op, self.tensors = op, list(params)
        if not self.tensors:
            raise _checks.fail(op, "params", "at least one tensor", "none")
        first = self.tensors[0]
        for i, p in enumerate(self.tensors):
            name = f"params[{i}]"
            if isinstance(p, Tensor) and (p.is_nested or (p.is_meta and i == 0)):
                got = "a nested tensor" if p.is_nested else "a meta tensor"
                raise _checks.fail(op, name, "a dense tensor with memory", got)
            _checks.tensor(op, name, p, dtypes, getattr(first, "device", None))
            if p.dtype is not first.dtype:
                raise TypeError(f"{op}: {name}: expected {self._same.format(first.dtype)}, got {p.dtype}")
        if len({id(p) for p in self.tensors}) < len(self.tensors):
            raise _checks.fail(op, "params", "distinct tensors", "one of them twice")
        self.sizes = [p.numel() for p in self.tensors]
        self.n = sum(self.sizes)
        self.dtype, self.device = first.dtype, first.device

    def moved(self) -> bool:
        """Tell whether a tensor changed its dtype or device (as `module.to` does) since this was built."""
        return any(p.dtype is not self.dtype or p.device != self.device for p in self.tensors)

    def state(self) -> tuple[tuple[int, int], ...]:
        """Return what changes when a tensor is written in place or gets other memory.

        What is written through `.data` or by other programs of the same memory is not seen.
        """
        return tuple((p._version, p.data_ptr()) for p in self.tensors)

    def vector(self) -> Tensor:
        """Make a vector of zeros."""
        return torch.zeros(self.n, dtype=self.dtype, device=self.device)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Make views of a flat vector in the shapes of the tensors."""
        if len(self.tensors) == 1:
            shape = self.tensors[0].shape
            return [vector if vector.shape == shape else vector.view(shape)]
        return list(_unflatten_dense_tensors(vector, self.tensors))

    def join(self, tensors: Sequence[Tensor | None], out: Tensor) -> None:
        """Write tensors in these shapes, None for zero, into a flat vector."""
        if len(tensors) == 1 and (x := tensors[0]) is not None:
            (out if out.shape == x.shape else out.view(x.shape)).copy_(x.detach() if x.requires_grad else x)
        elif any(x is None for x in tensors):
            for part, x in zip(out.split(self.sizes), tensors, strict=True):
                part.zero_() if x is None else part.copy_(x.detach().reshape(-1))
        else:
            torch.cat([x.detach().reshape(-1) for x in tensors if x is not None], out=out)

    # With a vector that was split into `views`:

    def save(self, views: list[Tensor]) -> None:
        """Copy the tensors into a vector."""
        torch._foreach_copy_(views, self.tensors)

    def set_(self, views: list[Tensor]) -> None:
        """Set the tensors to a vector."""
        torch._foreach_copy_(self.tensors, views)

    def add_(self, views: list[Tensor], alpha: float) -> None:
        """Add alpha times a vector to the tensors."""
        if len(views) == 1:
            self.tensors[0].add_(views[0], alpha=alpha)
        else:
            torch._foreach_add_(self.tensors, views, alpha=alpha)

    def toward_(self, views: list[Tensor], weight: float) -> None:
        """Move the tensors by a share `weight` of their way to a vector."""
        torch._foreach_lerp_(self.tensors, views, weight)

    def differs(self, views: list[Tensor]) -> Tensor:
        """Compare the tensors with a vector: one element on the device, true where they are apart."""
        return torch.stack([(p != v).any() for p, v in zip(self.tensors, views, strict=True)]).any()
