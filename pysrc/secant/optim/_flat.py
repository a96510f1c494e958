"""A list of parameters seen as one vector, with their gradients stored as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secant import _checks


def check_parameters(owner: str, params: Sequence[Tensor]) -> None:
    """Raise unless `params` are distinct dense tensors of one dtype, float32 or float64, on one device."""
    for i, p in enumerate(params):
        _checks.tensor(owner, f"params[{i}]", p, _checks.REAL, params[0].device)
        if p.dtype != params[0].dtype:
            raise TypeError(f"{owner}: params[{i}]: expected dtype {params[0].dtype}, like params[0], got {p.dtype}")
    if len({id(p) for p in params}) != len(params):
        raise _checks.fail(owner, "params", "distinct tensors", "one of them twice")


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
            raise _checks.fail(owner, "params", "at least one element", "empty tensors only")
        self.grad = self.vector()
        self._grads = self.views(self.grad)
        self._gathered = False
        self._learning: set[int] = set()  # parameters that were seen to require a gradient
        self.absent: tuple[int, ...] = ()  # those that had no gradient at the last gathering

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

    def differs(self, views: list[Tensor]) -> Tensor:
        """Whether the parameters are apart from a vector, given its views: one element on the device."""
        return torch.stack([(p != v).any() for p, v in zip(self.params, views, strict=True)]).any()

    def zero_grad(self) -> None:
        """Zero `grad` and make its pieces the gradients of the parameters.

        Until a gradient has been gathered, and afterwards for the parameters that had none, the gradient becomes None
        instead, so that the next backward shows whether there is one, and of what kind: into a dense view a sparse
        gradient would be added without a word.
        """
        self.grad.zero_()
        for i, (p, view) in enumerate(zip(self.params, self._grads, strict=True)):
            given = self._gathered and i not in self.absent
            if p.grad is not (view if given else None):
                p.grad = view if given else None

    def grads(self) -> list[tuple[Tensor | None, bool]]:
        """The gradients as they are, and of each whether it is a piece of `grad`."""
        return [(p.grad, p.grad is view) for p, view in zip(self.params, self._grads, strict=True)]

    def knowledge(self) -> tuple[Any, ...]:
        """What this remembers of earlier gradients, for `recall`."""
        return self._gathered, set(self._learning), self.absent

    def recall(self, knowledge: tuple[Any, ...]) -> None:
        """Remember what `knowledge` said, and nothing later."""
        self._gathered, self._learning, self.absent = knowledge

    def gather_grad(self) -> None:
        """Bring into `grad` what backward left elsewhere: only gradients that someone replaced are copied.

        A parameter without a gradient, or frozen since it had one, is listed in `absent`; its part of `grad` is zero.

        Raises:
            ValueError: a gradient is not dense.
        """
        absent = []
        for i, (p, view) in enumerate(zip(self.params, self._grads, strict=True)):
            if i in self._learning and not p.requires_grad:
                self._learning.discard(i)  # what is left of its gradient is old; one that is set from now on counts
                p.grad = None
            elif p.requires_grad:
                self._learning.add(i)
            g = p.grad
            if g is view:
                continue
            if g is None:
                view.zero_()
                absent.append(i)
                if not p.requires_grad:
                    continue
            elif g.layout is not torch.strided:
                raise _checks.fail(
                    self.owner, f"params[{i}].grad", "a dense gradient (for an embedding: sparse=False)", g.layout
                )
            else:
                view.copy_(g)
            p.grad = view
        self._gathered, self.absent = True, tuple(absent)
