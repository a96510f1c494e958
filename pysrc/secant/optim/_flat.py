"""A list of parameters seen as one vector, with their gradients stored as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secant.ops import _gate


def check_parameters(owner: str, params: Sequence[Tensor]) -> None:
    """Raise unless `params` are distinct dense tensors of one dtype, float32 or float64, on one device."""
    for i, p in enumerate(params):
        _gate.tensor(owner, f"params[{i}]", p, _gate.REAL, params[0].device)
        if p.dtype != params[0].dtype:
            raise TypeError(f"{owner}: params[{i}]: expected dtype {params[0].dtype}, like params[0], got {p.dtype}")
    if len({id(p) for p in params}) != len(params):
        raise _gate.fail(owner, "params", "distinct tensors", "one of them twice")


class FlatParameters:
    """The vector that the parameters form, in order, without moving them.

    The parameters keep their own memory. Their gradients become views of one vector, `grad`, into which backward
    accumulates; nothing is concatenated. Other vectors (a direction, a start point) are split into views once and then
    combined with the parameters by one call.

    Args:
        owner: name of the optimizer, for error messages.
        params: real, dense, distinct, at least one element in total, of one dtype (float32 or float64) and one device.

    Raises:
        TypeError, ValueError: `params` is something else; the message says which parameter and what was expected.
    """

    def __init__(self, owner: str, params: Sequence[Tensor]) -> None:
        check_parameters(owner, params)
        self.owner, self.params = owner, list(params)
        first = self.params[0]
        self.dtype, self.device = first.dtype, first.device
        self.sizes = [p.numel() for p in self.params]
        self.numel = sum(self.sizes)
        if self.numel == 0:
            raise _gate.fail(owner, "params", "at least one element", "empty tensors only")
        self.grad = self.vector()
        self._grads = self.views(self.grad)
        self._gathered = False

    def vector(self) -> Tensor:
        """A new vector of zeros."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The pieces of a vector, shaped like the parameters."""
        return [v.view(p.shape) for v, p in zip(vector.split(self.sizes), self.params, strict=True)]

    def moved(self) -> bool:
        """Whether a parameter changed its dtype or device (as `module.to` does) since this was built."""
        return any(p.dtype != self.dtype or p.device != self.device for p in self.params)

    def add_(self, views: list[Tensor], alpha: float) -> None:
        """Add alpha times a vector to the parameters, given its views."""
        if len(views) == 1:
            self.params[0].add_(views[0], alpha=alpha)
        else:
            torch._foreach_add_(self.params, views, alpha=alpha)

    def set_(self, views: list[Tensor]) -> None:
        """Set the parameters to a vector, given its views."""
        torch._foreach_copy_(self.params, views)

    def toward_(self, views: list[Tensor], weight: float) -> None:
        """Move the parameters by a share `weight` of their way to a vector, given its views."""
        torch._foreach_lerp_(self.params, views, weight)

    def save(self, views: list[Tensor]) -> None:
        """Copy the parameters into a vector, given its views."""
        torch._foreach_copy_(views, self.params)

    def zero_grad(self) -> None:
        """Zero `grad` and make its pieces the gradients of the parameters.

        Until a gradient has been gathered, the parameters' gradients become None instead, so that the first backward
        shows of what kind they are: into a dense view a sparse gradient would be added without a word.
        """
        self.grad.zero_()
        for p, view in zip(self.params, self._grads, strict=True):
            if p.grad is not view:
                p.grad = view if self._gathered else None

    def gather_grad(self) -> None:
        """Bring into `grad` what backward left elsewhere: only gradients that someone replaced are copied.

        A gradient of None counts as zero.

        Raises:
            ValueError: a gradient is not dense.
        """
        for i, (p, view) in enumerate(zip(self.params, self._grads, strict=True)):
            g = p.grad
            if g is view:
                continue
            if g is None:
                view.zero_()
            elif g.layout is not torch.strided:
                raise _gate.fail(
                    self.owner, f"params[{i}].grad", "a dense gradient (for an embedding: sparse=False)", g.layout
                )
            else:
                view.copy_(g)
            p.grad = view
        self._gathered = True
